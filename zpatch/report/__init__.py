"""One HTML page about a store: its problems, and planes of its images as pictures."""
