// Shows the values under the pointer.  The drawing itself says which value lies where (charts.py).
function show(event) {
  const svg = event.target.closest && event.target.closest("svg[data-x]");
  document.querySelectorAll("line.at").forEach(line => line.remove());
  if (!svg) return;
  const axis = letter => svg.dataset[letter].split(" ").map(Number);
  const value = (a, at) => { const [low, high, first, last, log] = a, share = (at - first) / (last - first);
    return log ? Math.pow(10, Math.log10(low) + share * Math.log10(high / low)) : low + share * (high - low); };
  const box = svg.getBoundingClientRect(), at = (event.clientX - box.left) / box.width * 400;
  const text = number => Math.abs(number) >= 1000 ? Math.round(number).toLocaleString("en")
    : Number(number.toPrecision(4)).toString();
  let words = [], place = null;
  svg.querySelectorAll("path.line").forEach(path => {
    let best = null;
    path.getAttribute("d").slice(1).split("L").forEach(pair => {
      const [x, y] = pair.split(" ").map(Number);
      if (!best || Math.abs(x - at) < Math.abs(best[0] - at)) best = [x, y];
    });
    if (place === null) { place = best[0]; words.push(text(Math.round(value(axis("x"), best[0])))); }
    words.push(path.dataset.name + " " + text(value(axis("y"), best[1])));
  });
  const name = svg.querySelector("text.name").textContent;
  svg.closest("figure").querySelector("output").textContent = name + " " + words.join(", ");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "at");
  for (const [key, number] of [["x1", place], ["x2", place], ["y1", 10], ["y2", 192]]) line.setAttribute(key, number);
  svg.append(line);
}
document.addEventListener("pointermove", show);
document.addEventListener("pointerdown", show);
