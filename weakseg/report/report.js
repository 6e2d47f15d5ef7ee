// The overlay slider, and the values under the pointer. Without scripts the page is complete but for these two.
const overlay = document.getElementById("overlay");
overlay?.addEventListener("input", () => document.documentElement.style.setProperty("--overlay", overlay.value / 100));

for (const svg of document.querySelectorAll(".chart svg")) {
  const series = JSON.parse(svg.dataset.series);
  const cursor = document.createElementNS("http://www.w3.org/2000/svg", "line");
  cursor.setAttribute("class", "cursor");
  const tip = document.createElement("div");
  tip.className = "tip";
  const short = (v) => (Math.abs(v) >= 100 ? Math.round(v).toLocaleString("en") : String(+v.toPrecision(3)));

  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    const near = series.map((s) => s.points.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a)));
    const at = near.reduce((a, b) => (Math.abs(b[0] - x) < Math.abs(a[0] - x) ? b : a));
    for (const [name, value] of [["x1", at[0]], ["x2", at[0]], ["y1", 32], ["y2", 236]]) cursor.setAttribute(name, value);
    svg.append(cursor);
    const lines = series.map((s, i) => `${s.name}: ${short(near[i][3])}`);
    tip.replaceChildren();
    for (const line of [`${svg.dataset.x} ${short(at[2])}`, ...lines]) {
      const row = document.createElement("div");
      row.textContent = line;
      tip.append(row);
    }
    tip.style.left = `${Math.min(Math.max(at[0] / scale, 60), box.width - 60)}px`;
    tip.style.top = `${Math.min(...near.map((p) => p[1])) / scale}px`;
    svg.parentElement.append(tip);
  });
  svg.addEventListener("pointerleave", () => { cursor.remove(); tip.remove(); });
}
