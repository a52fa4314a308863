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
const tints = ["c0", "c1", "c2", "c3", "c4", "c5", "c0l", "c1l", "c2l", "c3l", "c4l", "c5l"];
const tint = i => i < tints.length ? `var(--${tints[i]})` : `light-dark(hsl(${i * 137.5} 60% 84%), hsl(${i * 137.5} 45% 24%))`;
function group(button) {
  const stride = +button.dataset.stride, count = +button.dataset.count, seen = new Map();
  for (const one of document.querySelectorAll("button.axis")) one.setAttribute("aria-pressed", one === button);
  for (const cell of cells) {
    const rank = +cell.dataset.rank, first = rank - Math.floor(rank / stride) % count * stride;
    if (!seen.has(first)) seen.set(first, seen.size);
    cell.firstElementChild.style.fill = tint(seen.get(first));
    cell.classList.toggle("pale", seen.get(first) > 5);
    cell.dataset.group = first;
    cell.dataset.t = `rank ${rank}: its group is ` + Array.from({length: count}, (_, i) => first + i * stride).join(", ");
  }
}
for (const cell of cells) {
  const all = cell.closest("svg");
  cell.onpointerenter = () => {
    for (const one of cells) one.classList.toggle("peer", one.dataset.group === cell.dataset.group);
    all.classList.add("picked");
  };
  cell.onpointerleave = () => all.classList.remove("picked");
}
for (const button of document.querySelectorAll("button.axis")) button.onclick = () => group(button);
const last = [...document.querySelectorAll("button.axis")].pop();
if (last) group(last);
