const tip = document.getElementById("tip");
document.addEventListener("pointermove", event => {
  const told = event.target.closest && event.target.closest("[data-t]");
  tip.style.display = told ? "block" : "none";
  if (!told) return;
  tip.textContent = told.dataset.t;
  const box = tip.getBoundingClientRect();
  tip.style.left = Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 8)) + "px";
  tip.style.top = (event.clientY + 18 + box.height > innerHeight ? event.clientY - box.height - 10 : event.clientY + 18) + "px";
});
const cells = [...document.querySelectorAll(".cell")];
const tints = ["--c0", "--c1", "--c2", "--c3", "--c4", "--c5", "--c0l", "--c1l", "--c2l", "--c3l", "--c4l", "--c5l"];
function group(button) {
  const stride = +button.dataset.stride, count = +button.dataset.count, seen = new Map();
  for (const one of document.querySelectorAll("button.axis")) one.setAttribute("aria-pressed", one === button);
  for (const cell of cells) {
    const rank = +cell.dataset.rank, first = rank - Math.floor(rank / stride) % count * stride;
    if (!seen.has(first)) seen.set(first, seen.size);
    cell.firstElementChild.style.fill = `var(${tints[seen.get(first) % tints.length]})`;
    cell.dataset.t = `rank ${rank}: its group is ` + Array.from({length: count}, (_, i) => first + i * stride).join(", ");
  }
}
for (const button of document.querySelectorAll("button.axis")) button.onclick = () => group(button);
const last = [...document.querySelectorAll("button.axis")].pop();
if (last) group(last);
