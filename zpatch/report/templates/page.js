const field = document.querySelector("#filter");
const named = document.querySelectorAll("[data-name]");
field.hidden = false;
field.addEventListener("input", () => {
  const wanted = field.value.trim().toLowerCase();
  for (const part of named) part.hidden = !part.dataset.name.toLowerCase().includes(wanted);
});
