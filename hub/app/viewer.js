// The slices are all here, so scrolling asks the server nothing. `value` holds them, `routing` what lies over them.
let index = 0;
const find = (selector) => element.querySelector(selector);

function draw() {
  const scan = props.value, routing = props.routing;
  const count = scan ? scan.slices.length : 0;
  index = Math.max(0, Math.min(index, count - 1));
  const figures = [...element.querySelectorAll("figure")];
  figures.slice(0, 3).forEach((figure, window) => {
    const shown = !scan || window < scan.windows.length;
    figure.style.display = shown ? "" : "none";
    figure.querySelector("figcaption").textContent = scan && shown ? scan.windows[window] : "";
    figure.querySelector("img").src = scan && shown ? scan.slices[index][window] : "";
  });
  const slider = find("input[type=range]");
  slider.max = Math.max(0, count - 1);
  slider.value = index;
  find(".where").textContent = scan ? place(scan) : "No scan is open.";
  drawRouting(scan, routing);
  drawScores(count, routing && routing.scores);
}

function place(scan) {
  let text = `Slice ${index + 1} of ${scan.slices.length}`;
  if (scan.positions) {
    text += `, ${scan.positions[index].toFixed(1)} mm above the lowest, ${scan.slab_mm.toFixed(1)} mm thick, `;
    text += `field of view ${scan.field_mm.toFixed(0)} mm`;
  }
  const scores = props.routing && props.routing.scores;
  return scores ? `${text}, slice score ${(100 * scores[index]).toFixed(1)} %` : text;
}

function drawRouting(scan, routing) {
  const select = find("select"), canvas = find(".routing canvas"), picture = find(".routing img");
  const maps = routing ? routing.maps : [];
  const names = maps.map((map) => map.name);
  if ([...select.options].map((option) => option.text).join() !== names.join()) {
    select.replaceChildren(...names.map((name) => new Option(name)));
  }
  select.style.display = maps.length ? "" : "none";
  const empty = find(".empty");
  empty.style.display = scan && maps.length ? "none" : "";
  if (routing) empty.textContent = "No part of this scan was routed.";
  picture.src = scan && maps.length ? scan.slices[index][Math.min(1, scan.windows.length - 1)] : "";
  const grid = maps.length ? maps[Math.max(0, select.selectedIndex)].experts[index] : [];
  canvas.width = grid.length ? grid[0].length : 1;
  canvas.height = grid.length || 1;
  const pen = canvas.getContext("2d");
  grid.forEach((row, y) => row.forEach((expert, x) => {
    if (expert < 0) return;
    pen.fillStyle = `rgb(${routing.colours[expert % routing.colours.length].join()})`;
    pen.fillRect(x, y, 1, 1);
  }));
}

function drawScores(count, scores) {
  const canvas = find(".scores");
  canvas.hidden = !scores;
  if (!scores) return;
  canvas.width = canvas.clientWidth;
  const pen = canvas.getContext("2d"), most = Math.max(...scores), width = canvas.width / count;
  scores.forEach((score, slice) => {
    pen.fillStyle = slice === index ? "#ffd25a" : "#5b7a99";
    const height = (score / most) * 30;
    pen.fillRect(slice * width, 34 - height, Math.max(1, width - 2), height);
  });
}

function go(slice) {
  index = slice;
  draw();
}

const steps = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 5, PageDown: -5, Home: 1e6, End: -1e6 };
element.addEventListener("keydown", (event) => {
  if (!(event.key in steps) || event.target.tagName === "SELECT") return;
  event.preventDefault();
  go(index + steps[event.key]);
});
element.addEventListener("wheel", (event) => {
  if (!event.target.closest(".panes") || !props.value) return;
  event.preventDefault();
  go(index - Math.sign(event.deltaY));
}, { passive: false });
element.addEventListener("input", (event) => {
  if (event.target.type === "range") go(Number(event.target.value));
});
element.addEventListener("change", (event) => {
  if (event.target.tagName === "SELECT") draw();
});
element.addEventListener("click", (event) => {
  if (event.target.closest(".panes") && event.target.tagName !== "SELECT") find(".viewer").focus();
});
watch("value", () => go(Math.floor((props.value ? props.value.slices.length : 0) / 2)));
watch("routing", draw);
draw();
