"use strict";

// Charts, confusion matrix, tables and images of the report. `data` is in the page as JSON.
const SVG = "http://www.w3.org/2000/svg";
const DASHES = ["", "7 4", "9 3 2 3", "2 3", "12 3", "5 2 1 2"];
const NUM_COLORS = 6;
let data;

function svg(tag, attributes, parent, text) {
  const element = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  if (text !== undefined) element.textContent = text;
  if (parent) parent.append(element);
  return element;
}

function html(tag, properties, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}

function format(value) {
  return Math.abs(value) >= 1e7 || (value && Math.abs(value) < 1e-3) ? value.toExponential(2) : String(+value.toPrecision(Math.abs(value) >= 1e4 ? 6 : 4));
}

// Round values between two limits, about `count` of them.
function ticks(low, high, count, minStep = 0) {
  const rough = Math.max((high - low) / count, minStep);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((candidate) => candidate >= rough);
  const first = Math.ceil(low / step - 1e-9);
  return Array.from({ length: Math.floor(high / step + 1e-9) - first + 1 }, (_, index) => +((first + index) * step).toPrecision(12));
}

function logTicks(low, high) {
  const values = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++)
    for (const factor of high / low > 300 ? [1] : [1, 2, 5]) values.push(+(factor * 10 ** power).toPrecision(6));
  return values.filter((value) => value >= low && value <= high);
}

// Scale from values to pixels.
function makeScale(low, high, from, to, log) {
  const place = log ? Math.log : (value) => value;
  const span = place(high) - place(low) || 1;
  return (value) => from + ((place(value) - place(low)) / span) * (to - from);
}

class LineChart {
  constructor(figure, chart) {
    this.figure = figure;
    this.plot = figure.querySelector(".plot");
    this.readout = figure.querySelector(".readout");
    this.chart = chart;
    this.hidden = new Set();
    this.log = chart.log;
    this.makeKeys();
    new ResizeObserver(() => this.draw()).observe(this.plot);
    this.plot.addEventListener("pointermove", (event) => this.showNearest(event.offsetX));
    this.plot.addEventListener("pointerleave", () => this.clearCursor());
    this.plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
      if (step) {
        event.preventDefault();
        const index = this.xs.indexOf(this.cursor);
        this.showValues(this.xs[Math.max(0, Math.min(this.xs.length - 1, index + step))]);
      }
    });
    this.draw();
  }

  makeKeys() {
    const keys = html("div", { className: "keys" });
    if (this.chart.lines.length > 1)
      for (const line of this.chart.lines) {
        const button = html("button", { type: "button" });
        const sample = svg("svg", { "aria-hidden": "true" }, button);
        this.path(sample, line, "M0 5H26");
        button.append(line.name);
        button.setAttribute("aria-pressed", "true");
        button.addEventListener("click", () => {
          if (!this.hidden.delete(line)) this.hidden.add(line);
          button.setAttribute("aria-pressed", String(!this.hidden.has(line)));
          this.draw();
        });
        keys.append(button);
      }
    if (this.chart.log) {
      const button = html("button", { type: "button", textContent: "log scale" });
      button.setAttribute("aria-pressed", "true");
      button.addEventListener("click", () => {
        this.log = !this.log;
        button.setAttribute("aria-pressed", String(this.log));
        this.draw();
      });
      keys.append(button);
    }
    if (keys.children.length) this.figure.append(keys);
  }

  path(parent, line, d) {
    const cycle = line.style + Math.floor(line.style / NUM_COLORS);
    const group = svg("g", { class: `s${line.style % NUM_COLORS}` }, parent);
    svg("path", { class: `line${line.thin ? " thin" : ""}`, d, "stroke-dasharray": DASHES[cycle % DASHES.length] }, group);
    return group;
  }

  draw() {
    const width = this.plot.clientWidth;
    if (!width) return;
    const height = Math.round(Math.max(210, Math.min(340, width * 0.5)));
    const { levels, marks } = this.chart;
    const lines = this.chart.lines.filter((line) => !this.hidden.has(line));
    this.lines = lines;
    this.xs = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
    const ys = [...lines.flatMap((line) => line.y), ...levels.map(([y]) => y)];
    const xHigh = Math.max(this.xs.at(-1) ?? 1, ...marks.map(([x]) => x)) || 1;
    const xLow = this.chart.x === "step" ? this.xs[0] ?? 0 : 0;
    let low = Math.min(0, ...ys), high = Math.max(...ys, 0);
    if (this.log && ys.length) { low = Math.min(...ys) / 1.1; high = Math.max(...ys) * 1.1; }
    else high += (high - low) * 0.08 || 1;
    const yTicks = this.log ? logTicks(low, high) : ticks(low, high, 5);
    const left = 14 + 7 * Math.max(...yTicks.map((tick) => format(tick).length), 2);
    const x = (this.toX = makeScale(xLow, xHigh, left, width - 12));
    const y = makeScale(low, high, height - 34, 8, this.log);

    const root = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
    for (const tick of yTicks) {
      svg("path", { class: "axis", d: `M${left} ${y(tick)}H${width - 12}` }, root);
      svg("text", { x: left - 6, y: y(tick) + 4, "text-anchor": "end" }, root, format(tick));
    }
    for (const tick of ticks(xLow, xHigh, Math.max(2, width / 90), this.chart.x === "recall" ? 0 : 1))
      svg("text", { x: x(tick), y: height - 18, "text-anchor": "middle" }, root, format(tick));
    svg("text", { x: width - 12, y: height - 3, "text-anchor": "end" }, root, this.chart.x);
    for (const [value, text] of levels) {
      svg("path", { class: "level", d: `M${left} ${y(value)}H${width - 12}` }, root);
      svg("text", { x: left + 4, y: y(value) - 5 }, root, text);
    }
    for (const [px, py, text] of marks) {
      svg("path", { class: "cursor", d: `M${x(px) - 4} ${y(py) - 4}l8 8m0 -8l-8 8` }, root);
      svg("text", { x: x(px), y: y(py) + 18, "text-anchor": x(px) > width - 40 ? "end" : "middle" }, root, text);
    }
    for (const line of lines) {
      const group = this.path(root, line, "M" + line.x.map((value, index) => `${x(value).toFixed(1)} ${y(line.y[index]).toFixed(1)}`).join("L"));
      if (line.markers && line.x.length < 100)
        line.x.forEach((value, index) => svg("circle", { cx: x(value), cy: y(line.y[index]), r: 3 }, group));
    }
    this.cursorLine = svg("path", { class: "cursor", d: "" }, root);
    this.bottom = height - 34;
    this.plot.replaceChildren(root);
  }

  showNearest(px) {
    const distance = (x) => Math.abs(this.toX(x) - px);
    if (this.xs.length) this.showValues(this.xs.reduce((best, x) => (distance(x) < distance(best) ? x : best)));
  }

  showValues(x) {
    this.cursor = x;
    this.cursorLine.setAttribute("d", `M${this.toX(x)} 8V${this.bottom}`);
    const values = this.lines.flatMap((line) => {
      const index = line.x.indexOf(x);
      return index < 0 ? [] : [(this.chart.lines.length > 1 ? `${line.name}: ` : "") + format(line.y[index])];
    });
    this.readout.textContent = `${this.chart.x} ${format(x)}: ${values.join(" · ")}`;
  }

  clearCursor() {
    this.cursorLine.setAttribute("d", "");
    this.readout.textContent = "";
  }
}

function initCharts() {
  const byName = new Map(data.charts.map((chart) => [chart.name, chart]));
  for (const figure of document.querySelectorAll("[data-chart]")) {
    const chart = new LineChart(figure, byName.get(figure.dataset.chart));
    if (figure.dataset.chart === "precision_recall") initClassChoice(chart);
  }
}

// The curves of one class in place of the mean.
function initClassChoice(chart) {
  const select = document.getElementById("curve-class");
  const means = chart.chart.lines.map((line) => ({ x: line.x, y: line.y }));
  const names = new Set(data.curves.flatMap(({ curves }) => Object.keys(curves)));
  for (const name of names) select.append(html("option", { value: name, textContent: name }));
  select.addEventListener("change", () => {
    chart.chart.lines.forEach((line, index) => {
      const curve = data.curves[index].curves[select.value];
      line.y = select.value ? curve ?? [] : means[index].y;
      line.x = line.y.map((_, step) => step / Math.max(1, line.y.length - 1));
    });
    chart.draw();
  });
}

function initConfusion() {
  const card = document.getElementById("confusion");
  if (!card) return;
  const slider = document.getElementById("score");
  const choice = document.getElementById("confusion-run");
  const update = () => showConfusion(card, data.confusions[choice ? choice.selectedIndex : 0], +slider.value);
  slider.addEventListener("input", update);
  if (choice) choice.addEventListener("change", update);
  setTimeout(update); // thousands of cells: after the page can be used
}

function showConfusion(card, run, score) {
  document.getElementById("score-text").textContent = score.toFixed(2);
  const names = ["background", ...run.classes], size = names.length;
  const cells = new Map();
  const missed = [0, ...run.objects];
  let correct = 0, detections = 0;
  for (const [object, detected, bin, count] of run.counts) {
    if (bin + 1e-6 < score * run.score_bins) continue;
    const key = object * size + detected;
    cells.set(key, (cells.get(key) ?? 0) + count);
    if (object) missed[object] -= count;
    if (object === detected) correct += count;
    detections += count;
  }
  missed.forEach((count, object) => { if (count > 0) cells.set(object * size, count); });
  drawMatrix(card.querySelector(".matrix"), names, cells);
  const objects = run.objects.reduce((sum, count) => sum + count, 0);
  const percent = (part, whole) => (whole ? `${((100 * part) / whole).toFixed(1)}%` : "–");
  document.getElementById("confusion-summary").textContent =
    `${detections} detections: precision ${percent(correct, detections)}, recall ${percent(correct, objects)} of ${objects} objects`;
  const wrong = [...cells].filter(([key]) => Math.floor(key / size) !== key % size).sort((a, b) => b[1] - a[1]);
  const describe = (object, detected) =>
    !detected ? `${names[object]} missed` : !object ? `${names[detected]} detected in the background` : `${names[object]} detected as ${names[detected]}`;
  document.getElementById("confusion-list").replaceChildren(
    ...wrong.slice(0, 12).map(([key, count]) => html("li", { textContent: `${describe(Math.floor(key / size), key % size)}: ${count}` })));
}

function drawMatrix(element, names, cells) {
  const size = names.length, hasNames = size <= 24;
  const left = hasNames ? 90 : 4, cell = hasNames ? Math.max(22, Math.min(64, 480 / size)) : 7;
  const width = left + size * cell, top = hasNames ? 86 : 4;
  const root = svg("svg", { viewBox: `0 0 ${width + 40} ${top + size * cell}`, "aria-hidden": "true" });
  const order = [...names.keys()].slice(1).concat(0); // the background comes last
  const place = new Map(order.map((index, position) => [index, position * cell]));
  const totals = new Map();
  for (const [key, count] of cells) totals.set(Math.floor(key / size), (totals.get(Math.floor(key / size)) ?? 0) + count);
  for (const [key, count] of cells) {
    const object = Math.floor(key / size), detected = key % size;
    const x = left + place.get(detected), y = top + place.get(object);
    const rect = svg("rect", { x, y, width: cell, height: cell, class: object === detected ? "on" : "off", "fill-opacity": (0.08 + 0.82 * (count / totals.get(object))).toFixed(3) }, root);
    svg("title", {}, rect, `object ${names[object]}, detection ${names[detected]}: ${count}`);
    if (cell >= 22) svg("text", { class: "count", x: x + cell / 2, y: y + cell / 2 + 4, "text-anchor": "middle" }, root, count);
  }
  if (hasNames)
    order.forEach((index, position) => {
      const middle = position * cell + cell / 2;
      const short = names[index].length > 13 ? `${names[index].slice(0, 12)}…` : names[index];
      svg("text", { x: left - 6, y: top + middle + 4, "text-anchor": "end" }, root, index ? short : "background");
      svg("text", { transform: `translate(${left + middle + 4} ${top - 6}) rotate(-50)` }, root, index ? short : "missed");
    });
  element.replaceChildren(root);
}

function initTables() {
  for (const table of document.querySelectorAll("table.sortable"))
    table.querySelectorAll("thead th").forEach((header) => {
      const button = html("button", { type: "button" }, ...header.childNodes);
      header.append(button);
      button.addEventListener("click", () => sortRows(table, header));
    });
}

function sortRows(table, header) {
  const ascending = header.getAttribute("aria-sort") === "descending";
  table.querySelectorAll("[aria-sort]").forEach((other) => other.removeAttribute("aria-sort"));
  header.setAttribute("aria-sort", ascending ? "ascending" : "descending");
  const text = (row) => row.cells[header.cellIndex].textContent.trim();
  const number = (row) => parseFloat(text(row).replaceAll(",", ""));
  const rows = [...table.tBodies[0].rows].sort((a, b) => {
    const order = isNaN(number(a)) || isNaN(number(b)) ? text(b).localeCompare(text(a), undefined, { numeric: true }) : number(b) - number(a);
    return ascending ? -order : order;
  });
  table.tBodies[0].append(...rows);
}

function initImages() {
  const section = document.getElementById("images");
  if (!section) return;
  const figures = [...section.querySelectorAll(".thumbs figure")];
  initFilters(section.querySelector(".filters"), figures);
  const viewer = document.getElementById("viewer"), frame = viewer.querySelector(".viewer-image");
  let current = 0;
  const setLineSize = () => {
    for (const image of section.querySelectorAll("svg[viewBox]")) {
      const box = image.getBoundingClientRect(), { width, height } = image.viewBox.baseVal;
      if (box.width) image.style.setProperty("--px", 1 / Math.min(box.width / width, box.height / height));
    }
  };
  const show = (index) => {
    const visible = figures.filter((figure) => !figure.hidden);
    current = (index + visible.length) % visible.length;
    const figure = visible[current];
    frame.replaceChildren(figure.querySelector(".thumb").firstElementChild.cloneNode(true));
    viewer.querySelector(".viewer-caption").textContent = `${current + 1} of ${visible.length}: ${figure.querySelector("figcaption").textContent}`;
    if (!viewer.open) viewer.showModal();
    setLineSize();
  };
  for (const figure of figures)
    figure.querySelector(".thumb").addEventListener("click", () => show(figures.filter((other) => !other.hidden).indexOf(figure)));
  viewer.querySelectorAll("[data-step]").forEach((button) => button.addEventListener("click", () => show(current + +button.dataset.step)));
  viewer.querySelectorAll("[data-layer]").forEach((box) =>
    box.addEventListener("change", () => viewer.classList.toggle(`no-${box.dataset.layer}`, !box.checked)));
  viewer.querySelector("[data-close]").addEventListener("click", () => viewer.close());
  viewer.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) show(current + step);
  });
  viewer.addEventListener("click", (event) => { if (event.target === viewer) viewer.close(); });
  new ResizeObserver(setLineSize).observe(section);
}

function initFilters(bar, figures) {
  const groups = [...new Set(figures.map((figure) => figure.dataset.group))].filter(Boolean);
  if (groups.length < 2) return;
  const buttons = ["", ...groups].map((group) => {
    const count = figures.filter((figure) => !group || figure.dataset.group === group).length;
    const button = html("button", { type: "button", textContent: `${group || "all"} (${count})` });
    button.setAttribute("aria-pressed", String(!group));
    button.addEventListener("click", () => {
      buttons.forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
      figures.forEach((figure) => { figure.hidden = Boolean(group) && figure.dataset.group !== group; });
    });
    return button;
  });
  bar.append(...buttons);
}

function init() {
  data = JSON.parse(document.getElementById("data").textContent);
  initCharts();
  initConfusion();
  initTables();
  initImages();
}

// The page of a run in progress replaces its content when the server has a new one.
function initReload() {
  if (!("live" in document.documentElement.dataset)) return;
  let tag = "";
  setInterval(async () => {
    if (document.querySelector("dialog[open]")) return;
    const response = await fetch(location.href, { headers: tag ? { "If-None-Match": tag } : {} }).catch(() => null);
    if (!response?.ok) return; // unchanged, or the server has ended
    tag = response.headers.get("ETag");
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    const open = [...document.querySelectorAll("details")].map((details) => details.open);
    for (const selector of ["nav", "header", "main", "#data", "title"]) document.querySelector(selector).replaceWith(page.querySelector(selector));
    document.querySelectorAll("details").forEach((details, index) => { details.open = Boolean(open[index]); });
    init();
  }, 2000);
}

init();
initReload();
