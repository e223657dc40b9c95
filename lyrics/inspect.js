// Filters of a shard's page. Without this script all pictures are shown.
const form = document.querySelector(".controls");
const cards = [...document.querySelectorAll("article")];
const number = (field, otherwise) => (field.value === "" ? otherwise : Number(field.value));

function apply() {
  const { tag, least, most, text, boxes, masks } = form.elements;
  const [low, high, words] = [number(least, 0), number(most, Infinity), text.value.trim().toLowerCase()];
  let shown = 0;
  for (const card of cards) {
    const objects = Number(card.dataset.n);
    const fits =
      objects >= low &&
      objects <= high &&
      (!tag.value || card.dataset.tags.split("\n").includes(tag.value)) &&
      (!words || card.textContent.toLowerCase().includes(words));
    card.hidden = !fits;
    shown += fits;
  }
  document.body.classList.toggle("no-boxes", !boxes.checked);
  document.body.classList.toggle("no-masks", !masks.checked);
  form.querySelector("output").textContent = `${shown} of ${cards.length} pictures`;
}

form.hidden = false;
form.addEventListener("input", apply);
form.addEventListener("submit", (event) => event.preventDefault());
apply();
