"use strict";

// Tables: a click on a heading sorts, a second one turns the order.
const table = document.getElementById("score-table");
const body = table.tBodies[0];
const headings = [...table.tHead.rows[0].cells];

const keyOf = (cell) => cell.dataset.value !== undefined ? Number(cell.dataset.value)
  : cell.classList.contains("num") ? -Infinity : cell.textContent;

headings.forEach((heading, column) => heading.firstElementChild.addEventListener("click", () => {
  const numeric = heading.classList.contains("num");
  const now = heading.getAttribute("aria-sort");
  const order = now === null ? (numeric ? "descending" : "ascending") : now === "ascending" ? "descending" : "ascending";
  headings.forEach((other) => other.removeAttribute("aria-sort"));
  heading.setAttribute("aria-sort", order);
  const sign = order === "ascending" ? 1 : -1;
  const rows = [...body.rows].map((row) => [keyOf(row.cells[column]), row]);
  rows.sort(([a], [b]) => sign * (numeric ? (a === b ? 0 : a - b) : a.localeCompare(b)));
  body.append(...rows.map(([, row]) => row));
}));

const scoreFilter = document.getElementById("score-filter");
const filterScores = () => {
  const words = scoreFilter.value.toLowerCase().split(/\s+/);
  let count = 0;
  for (const row of body.rows) {
    const cells = [...row.cells].slice(0, 3).map((cell) => cell.textContent.toLowerCase());
    row.hidden = !words.every((word) => cells.some((text) => text.includes(word)));
    count += !row.hidden;
  }
  document.getElementById("score-count").textContent = `${count} of ${body.rows.length} scores`;
};
scoreFilter.addEventListener("input", filterScores);
filterScores();

const controls = document.getElementById("gallery-controls");
if (controls) {
  const gallery = document.getElementById("gallery-cards");
  const cards = [...gallery.children];
  const filterCards = () => {
    const wanted = ["split", "kind", "verdict"].map((name) => [name, controls.elements[name].value]);
    let count = 0;
    for (const card of cards) {
      card.hidden = !wanted.every(([name, value]) => !value || card.dataset[name] === value);
      count += !card.hidden;
    }
    gallery.classList.toggle("no-boxes", !controls.elements.boxes.checked);
    gallery.classList.toggle("no-masks", !controls.elements.masks.checked);
    document.getElementById("gallery-count").textContent = `${count} of ${cards.length} shown`;
  };
  controls.addEventListener("input", filterCards);
  controls.addEventListener("submit", (event) => event.preventDefault());
  filterCards();
}
