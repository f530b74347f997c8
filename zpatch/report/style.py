"""How a report looks, and the one thing that it does: show the subjects whose names hold what is typed."""

from __future__ import annotations

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #fff; --ink: #1c2126; --soft: #667079; --line: #e4e7ea; --wash: #f6f7f8;
  --link: #1f5fa8; --warn: #8a5300; --bad: #b3261e; --good: #2c7a4b; --bars: #9aa7b4;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #14171a; --ink: #d9dde1; --soft: #8d969f; --line: #2b3036; --wash: #1b1f23;
    --link: #86b6ec; --warn: #e2ab5c; --bad: #ff8d83; --good: #7cc79a; --bars: #59646f;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; padding: 2.5rem 1.5rem 4rem; max-width: 68rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, "Segoe UI", Roboto, "Helvetica Neue", "DejaVu Sans", sans-serif;
  font-variant-numeric: tabular-nums; overflow-wrap: anywhere;
}
h1 { margin: 0; font-size: 1.7rem; font-weight: 650; letter-spacing: -.01em; }
h2 { margin: 0 0 .6rem; font-size: 1.15rem; font-weight: 650; }
h3 { margin: 1.4rem 0 .5rem; font-size: 1rem; font-weight: 600; }
h2 small, h3 small { margin-left: .6em; color: var(--soft); font-size: .85rem; font-weight: 400; }
p { margin: .4rem 0; }
a { color: var(--link); text-decoration: none; }
a:hover { text-decoration: underline; }
section { margin-top: 2.6rem; }
.soft { color: var(--soft); font-size: .85rem; }
.figures { display: flex; flex-wrap: wrap; gap: .6rem 2.2rem; margin: 1.4rem 0 0; }
.figures div { display: flex; flex-direction: column-reverse; }
.figures dd { margin: 0; font-size: 1.25rem; font-weight: 600; line-height: 1.2; }
.figures dt { color: var(--soft); font-size: .8rem; }
table { width: 100%; border-collapse: collapse; font-size: .85rem; }
th { color: var(--soft); font-weight: 400; text-align: left; }
th, td { padding: .28rem .9rem .28rem 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: break-word; }
.number { text-align: right; white-space: nowrap; }
.problems { margin: .5rem 0; padding: 0; list-style: none; font-size: .9rem; }
.problems li { margin: .3rem 0; padding: .35rem .8rem; border-left: 3px solid var(--warn);
  background: var(--wash); }
.problems .damage { border-color: var(--bad); }
.problems b { font-weight: 600; }
.well { color: var(--good); }
.facts { display: flex; flex-wrap: wrap; gap: .15rem 1.8rem; margin: .4rem 0; font-size: .85rem; }
.facts dt, .facts dd { display: inline; margin: 0; }
.facts dt { margin-right: .5em; color: var(--soft); }
.tools { display: flex; flex-wrap: wrap; gap: .4rem 1.5rem; align-items: center; margin-bottom: .6rem; }
.tools input[type=search] { width: 16rem; padding: .3rem .6rem; border: 1px solid var(--line);
  border-radius: 4px;
  background: var(--paper); color: inherit; font: inherit; font-size: .85rem; }
.subject { padding-top: 1.6rem; border-top: 1px solid var(--line); }
.panels { display: flex; flex-wrap: wrap; gap: .5rem 1.5rem; }
.panels > div { min-width: 0; }
.planes { display: flex; gap: .5rem; align-items: flex-start; }
figure { margin: 0; min-width: 0; }
.view { position: relative; overflow: hidden; border-radius: 3px; background: #000; color: #fffc;
  font-size: .7rem;
  line-height: 1; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.view img { position: absolute; inset: 0; width: 100%; height: 100%; }
.view span { position: absolute; padding: .2em .35em; border-radius: 3px; background: #0008; }
.view .left { left: .3em; top: 50%; transform: translateY(-50%); }
.view .right { right: .3em; top: 50%; transform: translateY(-50%); }
.view .top { top: .3em; left: 50%; transform: translateX(-50%); }
.view .bottom { bottom: .3em; left: 50%; transform: translateX(-50%); }
.unread { display: grid; place-items: center; height: 100%; color: #fffa; }
figcaption { margin-top: .2rem; color: var(--soft); font-size: .75rem; }
body:has(#outlines:not(:checked)) .outline { display: none; }
.beside { display: flex; flex-wrap: wrap; gap: .8rem 2.2rem; align-items: flex-end; margin-top: .7rem; }
.histogram { flex: 0 1 17rem; }
.histogram svg { display: block; width: 100%; height: 3.6rem; border-bottom: 1px solid var(--line);
  fill: var(--bars); }
.histogram div { display: flex; justify-content: space-between; color: var(--soft); font-size: .75rem;
  white-space: nowrap; }
.statistics { flex: 1 1 24rem; }
.legend { display: flex; flex-wrap: wrap; gap: .2rem 1.3rem; margin: .8rem 0 0; padding: 0; list-style: none;
  font-size: .85rem; }
.chip { display: inline-block; width: .8em; height: .8em; margin-right: .45em; border: 2px solid;
  border-radius: 2px;
  vertical-align: -.05em; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
.dashed .chip { border-style: dashed; }
footer { margin-top: 3rem; padding-top: .8rem; border-top: 1px solid var(--line); color: var(--soft);
  font-size: .8rem; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  .tools { display: none; }
  figure, tr, .problems li, .beside { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
}
"""

SCRIPT = """
const field = document.querySelector("#filter");
const named = document.querySelectorAll("[data-name]");
field.hidden = false;
field.addEventListener("input", () => {
  const wanted = field.value.trim().toLowerCase();
  for (const part of named) part.hidden = !part.dataset.name.toLowerCase().includes(wanted);
});
"""
