"use strict";
// Sorting, column choices, curves and effects of `unclip compare`. Text from records only ever becomes textContent.

const data = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 10;
const MOST_PLACES = 1500; // of a chart's horizontal axis: more than it has pixels
const SHOWN_IN_TIP = 12;
const NEAR = 0.02; // of an axis: a value from farther away says where it is from
const LEAST_TICK_GAP = 0.08; // of an axis, so that the ticks' labels do not touch

const byId = (id) => document.getElementById(id);
const styleOf = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (run) => styleOf(`--run-${run % COLOURS}`);
const dashOf = (run) => [[], [8, 4], [2, 3], [10, 3, 2, 3]][Math.floor(run / COLOURS) % 4];

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

function shortNumber(value) {
  if (value === null || value === undefined) return "";
  if (Number.isInteger(value)) return value.toLocaleString("en");
  return Number(value.toPrecision(4)).toString();
}

function axisNumber(value) {
  if (value === null) return "";
  const size = Math.abs(value);
  if (size >= 1e9) return `${Number((value / 1e9).toPrecision(4))}G`;
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(4))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(4))}k`;
  if (size && size < 1e-3) return Number(value.toPrecision(3)).toExponential();
  return Number(value.toPrecision(4)).toString();
}

// --- tables ----------------------------------------------------------------------------------------------------------

function compareCells(one, other) {
  const [a, b] = [one, other].map((cell) => cell.dataset.value ?? cell.textContent.trim());
  const isNumber = (text) => text !== "" && Number.isFinite(Number(text));
  if (isNumber(a) && isNumber(b)) return Number(a) - Number(b);
  return a.localeCompare(b, "en", { numeric: true });
}

function sortBy(table, heading) {
  const place = [...heading.parentElement.children].indexOf(heading);
  const isDescending = heading.getAttribute("aria-sort") === "ascending";
  for (const each of heading.parentElement.children) each.setAttribute("aria-sort", "none");
  heading.setAttribute("aria-sort", isDescending ? "descending" : "ascending");
  const rows = [...table.tBodies[0].rows];
  const isEmpty = (row) => (row.cells[place].dataset.value ?? row.cells[place].textContent).trim() === "";
  rows.sort((a, b) => {
    if (isEmpty(a) || isEmpty(b)) return isEmpty(a) - isEmpty(b); // what a run does not have, and nan, comes last either way
    return compareCells(a.cells[place], b.cells[place]) * (isDescending ? -1 : 1);
  });
  table.tBodies[0].append(...rows);
  byId("announcer").textContent = `sorted by ${heading.textContent.trim()}, ${heading.getAttribute("aria-sort")}`;
}

function setUpTables() {
  for (const table of document.querySelectorAll("table.sortable")) {
    for (const button of table.tHead.querySelectorAll("button")) {
      button.addEventListener("click", () => sortBy(table, button.closest("th")));
    }
  }
  const choices = [...document.querySelectorAll(".stage-choice")];
  const showColumns = () => {
    const shown = new Set(choices.filter((choice) => choice.checked).map((choice) => choice.value));
    const isAll = byId("all-metrics").checked;
    for (const cell of document.querySelectorAll(".results [data-stage]")) {
      cell.hidden = !shown.has(cell.dataset.stage) || !(isAll || cell.dataset.headline === "true");
    }
  };
  for (const choice of [...choices, byId("all-metrics")]) choice.addEventListener("change", showColumns);
  showColumns();
}

// --- charts ----------------------------------------------------------------------------------------------------------

const hiddenRuns = new Set();
let charts = [];

/** One horizontal axis for all lines, as uPlot wants it; where there are too many places, neighbours share one. */
function aligned(lines) {
  let places = [...new Set(lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  let placeOf = (x) => x;
  if (places.length > MOST_PLACES) {
    const [first, last] = [places[0], places[places.length - 1]];
    const step = (last - first) / MOST_PLACES;
    placeOf = (x) => first + Math.round((x - first) / step) * step;
    places = [...new Set(places.map(placeOf))];
  }
  const indexOf = new Map(places.map((place, index) => [place, index]));
  const columns = lines.map((line) => {
    const column = new Array(places.length).fill(null);
    line.x.forEach((x, number) => { if (line.y[number] !== null) column[indexOf.get(placeOf(x))] = line.y[number]; });
    return column;
  });
  return [places, ...columns];
}

/** The index of the value of a line that is nearest to the cursor; null before its first value and after its last. */
function nearest(u, series, index) {
  const values = u.data[series];
  const [before, after] = [lookFrom(values, index, -1), lookFrom(values, index, 1)];
  if (before === null || after === null) return null;
  return index - before <= after - index ? before : after;
}

function lookFrom(values, index, step) {
  for (let at = index; at >= 0 && at < values.length; at += step) if (values[at] != null) return at;
  return null;
}

/** A point speaks for its own place alone, a curve for those between its points too. */
function placeOf(u, series, index, line) {
  if (line.points) return u.data[series][index] == null ? null : index;
  return nearest(u, series, index);
}

function showTip(u, tip, spec) {
  const index = u.cursor.idx;
  if (index == null || u.cursor.left < 0) { tip.hidden = true; return; }
  const found = [];
  for (let series = 1; series < u.data.length; series++) {
    const place = placeOf(u, series, index, spec.lines[series - 1]);
    if (place !== null) found.push({ line: spec.lines[series - 1], value: u.data[series][place], x: u.data[0][place] });
  }
  found.sort((a, b) => b.value - a.value);
  const x = u.data[0][index];
  const near = NEAR * (u.data[0][u.data[0].length - 1] - u.data[0][0]);
  tip.replaceChildren(element("b", spec.xText(x)));
  for (const { line, value, x: own } of found.slice(0, SHOWN_IN_TIP)) {
    const row = element("div");
    const mark = element("i");
    mark.style.background = line.colour;
    row.append(mark, element("span", line.label), element("span", shortNumber(value)));
    if (Math.abs(own - x) > near) row.append(element("small", `at ${spec.xText(own)}`));
    tip.append(row);
  }
  if (found.length > SHOWN_IN_TIP) tip.append(element("div", `and ${found.length - SHOWN_IN_TIP} more below`));
  tip.hidden = false;
  const isRight = u.cursor.left > u.over.clientWidth / 2;
  const left = u.over.offsetLeft + u.cursor.left;
  tip.style.top = "2.2rem";
  tip.style.left = isRight ? "auto" : `${left + 14}px`;
  tip.style.right = isRight ? `${tip.parentElement.clientWidth - left + 8}px` : "auto";
}

function moveByKey(event, u) {
  const last = u.data[0].length - 1;
  const index = u.cursor.idx ?? last;
  const next = { ArrowLeft: index - 1, ArrowRight: index + 1, Home: 0, End: last, PageUp: index - 10, PageDown: index + 10 }[event.key];
  if (event.key === "Escape") u.setCursor({ left: -10, top: -10 });
  if (next === undefined) return;
  event.preventDefault();
  const place = u.data[0][Math.max(0, Math.min(last, next))];
  u.setCursor({ left: u.valToPos(place, "x"), top: u.over.clientHeight / 2 });
}

/** spec: title, lines of {label, colour, dash, x, y, points}, xLabel, xText, xTicks, isLog. Returns the chart's element. */
function chart(spec) {
  const box = element("div", "", { class: "chart" });
  const plot = element("div", "", { class: "plot", tabindex: 0, role: "group", "aria-label": `${spec.title}: ${spec.lines.length} lines; arrow keys read their values` });
  const tip = element("div", "", { class: "tip", role: "status" });
  tip.hidden = true;
  box.append(element("h3", spec.title), plot, tip);
  const entry = { plot, u: null, draw: () => { entry.u = drawn(spec, plot, tip); } };
  plot.addEventListener("keydown", (event) => entry.u && moveByKey(event, entry.u));
  plot.addEventListener("blur", () => { tip.hidden = true; });
  charts.push(entry);
  return box;
}

function drawn(spec, plot, tip) {
  const ink = styleOf("--soft");
  const grid = { stroke: styleOf("--line"), width: 1 };
  const axis = { stroke: ink, grid, ticks: grid, font: "12px system-ui", labelFont: "12px system-ui" };
  const xAxis = { ...axis, label: spec.xLabel, labelSize: 18, size: 34, values: (_, ticks) => ticks.map(axisNumber) };
  if (spec.xPlaces) xAxis.splits = () => spec.xPlaces;
  if (spec.xTicks) Object.assign(xAxis, { splits: () => spec.xTicks.map((_, place) => place), values: () => spec.xTicks });
  const options = {
    width: plot.clientWidth,
    height: plot.clientHeight,
    legend: { show: false },
    cursor: { dataIdx: (u, series, index) => (series === 0 ? index : placeOf(u, series, index, spec.lines[series - 1])), points: { size: 7 }, y: false },
    scales: { x: { time: false, ...(spec.xTicks ? { range: [-0.5, spec.xTicks.length - 0.5] } : {}) }, y: spec.isLog ? { distr: 3 } : { range: (_, low, high) => (low === high ? [low - 1, high + 1] : uPlot.rangeNum(low, high, 0.1, true)) } },
    axes: [xAxis, { ...axis, size: 58, values: (_, ticks) => ticks.map(axisNumber) }],
    series: [{}, ...spec.lines.map((line) => ({
      label: line.label, stroke: line.colour, width: line.points ? 0 : 1.75, dash: line.dash, spanGaps: true,
      points: line.points ? { show: true, size: 8, fill: line.colour } : { show: line.x.length < 2 },
    }))],
    hooks: { setCursor: [(u) => showTip(u, tip, spec)] },
  };
  return new uPlot(options, aligned(spec.lines), plot);
}

/** Charts are drawn when they come into view. */
const inView = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) {
    const entry = charts.find((each) => each.plot === target);
    if (isIntersecting && entry && !entry.u && target.clientWidth) entry.draw();
  }
}, { rootMargin: "300px" });

const resized = new ResizeObserver((entries) => {
  for (const { target } of entries) {
    const entry = charts.find((each) => each.plot === target);
    if (entry?.u && target.clientWidth) entry.u.setSize({ width: target.clientWidth, height: target.clientHeight });
  }
});

function replaceCharts(container, boxes) {
  for (const entry of charts.filter((each) => container.contains(each.plot))) {
    inView.unobserve(entry.plot);
    resized.unobserve(entry.plot);
    entry.u?.destroy();
  }
  charts = charts.filter((each) => !container.contains(each.plot));
  container.replaceChildren(...boxes);
  for (const { plot } of charts.filter((each) => container.contains(each.plot))) {
    inView.observe(plot);
    resized.observe(plot);
  }
}

// --- curves ----------------------------------------------------------------------------------------------------------

function smoothed(values, weight) {
  if (!weight) return values;
  let sum = 0;
  let share = 0;
  return values.map((value) => {
    sum = weight * sum + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return sum / share;
  });
}

function labelOf(runs) {
  const names = runs.map((run) => data.runs[run]);
  return names.length > 2 ? `${names[0]} and ${names.length - 1} more` : names.join(", ");
}

function lineOf(curve, axis, isLog, weight) {
  const isShared = curve.runs.length > 1;
  const first = curve.runs.find((run) => !hiddenRuns.has(run));
  const values = smoothed(curve.values, weight).map((value) => (isLog && value <= 0 ? null : value));
  return {
    label: labelOf(curve.runs), x: curve[axis], y: values,
    colour: isShared && curve.runs.length === data.runs.length ? styleOf("--shared") : colourOf(first),
    dash: dashOf(first),
  };
}

/** Losses and metrics before the learning rate, and what was measured of the machine last. */
function rankOf(metric) {
  if (metric.startsWith("system/")) return 2;
  return metric === "learning_rate" ? 1 : 0;
}

function drawCurves() {
  const stage = byId("curve-stage").value;
  const axis = document.querySelector("input[name=axis]:checked").value;
  const isLog = byId("log-scale").checked;
  const weight = Number(byId("smoothing").value);
  const filter = byId("metric-filter").value.toLowerCase();
  const notes = new Set();
  const notPositive = [];
  const boxes = [];
  const ranked = Object.entries(data.curves[stage] ?? {}).sort((a, b) => rankOf(a[0]) - rankOf(b[0]));
  for (const [metric, curves] of ranked) {
    if (!metric.toLowerCase().includes(filter)) continue;
    const visible = curves.filter((curve) => curve.runs.some((run) => !hiddenRuns.has(run)));
    for (const curve of visible) if (!curve[axis]) notes.add(`No hours were recorded for ${labelOf(curve.runs)}.`);
    const lines = visible.filter((curve) => curve[axis]).map((curve) => lineOf(curve, axis, isLog, weight));
    const ready = lines.filter((line) => line.y.some((value) => value !== null));
    if (lines.some((line) => line.y.includes(null))) notPositive.push(metric);
    if (!ready.length) continue;
    const xText = (x) => (axis === "hours" ? `${shortNumber(x)} h` : `${shortNumber(Math.round(x))} samples`);
    boxes.push(chart({ title: metric, lines: ready, xLabel: axis === "hours" ? "hours of training" : "samples seen", xText, isLog }));
  }
  const isSampled = Object.values(data.curves[stage] ?? {}).flat().some((curve) => !curve.isWhole);
  if (isSampled) notes.add("Long records are drawn from an even sample of their rows and from all validations: a short spike may be missing.");
  if (!boxes.length && hiddenRuns.size === data.runs.length) notes.add("No run is chosen.");
  if (notPositive.length) notes.add(`A log scale leaves out what is not positive, here in ${notPositive.join(", ")}.`);
  if (!Object.keys(data.curves).length) notes.add("No stage of these runs has logged a curve yet.");
  if (stage && data.common.includes(stage) && data.runs.length > 1) notes.add(`All runs share this ${stage}.`);
  byId("curve-note").textContent = [...notes].join(" ");
  replaceCharts(byId("charts"), boxes);
}

/** Runs that are shown, chosen all at once and drawn once. */
function showRuns(isShown) {
  hiddenRuns.clear();
  [...byId("legend").querySelectorAll("input")].forEach((box, run) => {
    box.checked = isShown(run);
    if (!box.checked) hiddenRuns.add(run);
  });
  drawCurves();
}

/** One run alone, or all again where it is alone already. */
function showOnly(run) {
  const isAlone = !hiddenRuns.has(run) && hiddenRuns.size === data.runs.length - 1;
  showRuns((each) => isAlone || each === run);
}

function setUpCurves() {
  const stages = Object.keys(data.curves);
  const select = byId("curve-stage");
  for (const stage of stages) select.append(element("option", stage, { value: stage }));
  const distinct = (stage) => Math.max(...Object.values(data.curves[stage]).map((curves) => curves.length));
  select.value = stages.reduce((best, stage) => (best === "" || distinct(stage) >= distinct(best) ? stage : best), "");
  data.runs.forEach((name, run) => {
    const label = element("label");
    const box = element("input", "", { type: "checkbox" });
    box.checked = true;
    label.addEventListener("click", (event) => {
      if (!event.shiftKey) return;
      event.preventDefault();
      // The browser puts the box back to what it was when this event began; what is shown is set after that.
      if (event.target === box) setTimeout(() => showOnly(run)); else showOnly(run);
    });
    box.addEventListener("keydown", (event) => { if (event.key === "Enter") showOnly(run); });
    box.addEventListener("change", () => { box.checked ? hiddenRuns.delete(run) : hiddenRuns.add(run); drawCurves(); });
    const mark = document.createElementNS("http://www.w3.org/2000/svg", "svg");
    mark.setAttribute("width", 22);
    mark.setAttribute("height", 8);
    mark.setAttribute("aria-hidden", "true");
    const line = document.createElementNS("http://www.w3.org/2000/svg", "path");
    line.setAttribute("d", "M0 4H22");
    line.setAttribute("style", `stroke: var(--run-${run % COLOURS}); stroke-width: 3; stroke-dasharray: ${dashOf(run).join(" ") || "none"}`);
    mark.append(line);
    label.append(box, mark, element("span", name));
    byId("legend").append(label);
  });
  byId("all-runs").addEventListener("click", () => showRuns(() => true));
  byId("no-runs").addEventListener("click", () => showRuns(() => false));
  for (const id of ["curve-stage", "log-scale"]) byId(id).addEventListener("change", drawCurves);
  for (const id of ["smoothing", "metric-filter"]) byId(id).addEventListener("input", drawCurves);
  for (const radio of document.querySelectorAll("input[name=axis]")) radio.addEventListener("change", drawCurves);
  drawCurves();
}

// --- effects of a sweep ----------------------------------------------------------------------------------------------

function effectTable(effect) {
  const table = element("table");
  const head = table.createTHead().insertRow();
  const first = effect.parameter === "setting" ? "setting" : "value";
  for (const title of [first, "runs", "mean", "±", "lowest", "highest"]) head.append(element("th", title, { scope: "col" }));
  const body = table.createTBody();
  for (const level of effect.levels) {
    const row = body.insertRow();
    row.append(element("th", level.label, { scope: "row" }));
    const values = level.points.map(([, value]) => value);
    row.append(element("td", level.count));
    const mean = element("td", shortNumber(level.mean), level.isBest ? { class: "best" } : {});
    if (level.isBest) mean.append(element("span", "★", { class: "star", role: "img", "aria-label": " best" }));
    const ends = values.length ? [Math.min(...values), Math.max(...values)] : [null, null];
    row.append(mean, ...[level.deviation, ...ends].map((value) => element("td", shortNumber(value))));
  }
  const scroll = element("div", "", { class: "scroll", role: "region", tabindex: 0, "aria-label": `Effect of ${effect.parameter}` });
  scroll.append(table);
  return scroll;
}

function effectChart(effect, metric) {
  const placeOf = (level, number) => (effect.isNumeric ? Number(level.label) : number);
  const levels = effect.levels.map((level, number) => ({ ...level, place: placeOf(level, number) })).filter((level) => level.mean !== null);
  const lines = [{ label: "mean", colour: styleOf("--accent"), dash: [], x: levels.map((level) => level.place), y: levels.map((level) => level.mean) }];
  for (const level of levels) {
    for (const [runs, value] of level.points) {
      lines.push({ label: labelOf(runs), colour: colourOf(runs[0]), dash: [], points: true, x: [level.place], y: [value] });
    }
  }
  const labels = effect.levels.map((level) => level.label);
  const places = levels.map((level) => level.place);
  const least = Math.min(...places.slice(1).map((place, number) => place - places[number]));
  const areApart = least > LEAST_TICK_GAP * (places[places.length - 1] - places[0]);
  const xText = (x) => `${effect.parameter} = ${effect.isNumeric ? shortNumber(x) : labels[Math.round(x)]}`;
  return chart({ title: metric, lines, xLabel: effect.parameter, xText, xTicks: effect.isNumeric ? null : labels, xPlaces: areApart ? places : null, isLog: false });
}

function drawEffects() {
  const metric = byId("effect-metric").value;
  const { better, effects } = data.sweep.metrics[metric];
  byId("effect-note").textContent = `Means over the members with that value, whatever else they vary; ± is the standard deviation. Members that share the stage count once.${better ? ` ${better === "low" ? "Lower" : "Higher"} is better.` : ""}`;
  const boxes = effects.map((effect) => {
    const isSetting = effect.parameter === "setting";
    const box = element("div", "", { class: isSetting ? "effect wide" : "effect" });
    box.append(element("h3", isSetting ? "by setting, seeds together" : effect.parameter));
    const isMeasured = effect.levels.some((level) => level.mean !== null);
    if (!isSetting && isMeasured) box.append(effectChart(effect, metric));
    box.append(effectTable(effect));
    return box;
  });
  replaceCharts(byId("effect-tables"), boxes);
}

function setUpEffects() {
  const select = byId("effect-metric");
  if (!select) return;
  for (const name of Object.keys(data.sweep.metrics)) select.append(element("option", name, { value: name }));
  select.value = data.sweep.metric;
  select.addEventListener("change", drawEffects);
  drawEffects();
}

// --- graph -----------------------------------------------------------------------------------------------------------

function setUpGraph() {
  const boxes = [...document.querySelectorAll(".graph .box")];
  const light = () => {
    const chosen = new Set(boxes.filter((box) => box.matches(":hover, :focus")).map((box) => box.dataset.users));
    const shown = boxes.find((box) => box.matches(":hover")) ?? boxes.find((box) => box.matches(":focus"));
    byId("graph-note").textContent = shown ? `Of ${shown.getAttribute("aria-label")}.` : "";
    for (const edge of document.querySelectorAll(".graph .edge")) {
      edge.classList.toggle("lit", chosen.has(edge.dataset.from) || chosen.has(edge.dataset.to));
    }
  };
  for (const box of boxes) for (const event of ["pointerenter", "pointerleave", "focus", "blur"]) box.addEventListener(event, light);
}

setUpTables();
setUpCurves();
setUpEffects();
setUpGraph();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { drawCurves(); if (data.sweep) drawEffects(); });
