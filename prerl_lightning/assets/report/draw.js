// Draws figures when they come into view and again when the state changes; shows values under the pointer.
"use strict";
const FEW = 10; // runs of which all figures are drawn without being asked for
const places = [...document.querySelectorAll("[data-figure]")];
const drawing = new Map(); // figure element -> {view, series}
const inView = new Set();
const stale = new Set(places);

async function draw(place) {
  stale.delete(place);
  const figure = DATA.figures[place.dataset.figure];
  const plot = place.querySelector(".plot");
  const wide = place.classList.contains("wide");
  const width = Math.floor(plot.clientWidth);
  if (!figure || width < 40) return void stale.add(place);
  let spec = null;
  let series = [];
  if (figure.kind === "stack") {
    const group = stackGroup(place);
    if (group !== null) ({ spec, series } = stackSpec(figure, group, width));
  } else if (figure.kind === "points" || figure.kind === "lengths") {
    spec = pointSpec(figure, width, wide);
  } else {
    const found = seriesOf(figure);
    series = found.series.filter((one) => one.points.length);
    variantKey(place, found.variants);
    place.querySelector(".source").textContent = `metrics.csv: ${found.columns.join(", ") || "no such column"}${bandWords(series)}${smoothed(series)}`;
    if (series.length) spec = lineSpec(figure, series, width, wide);
  }
  drawing.get(place)?.view?.finalize();
  drawing.delete(place);
  if (!spec) {
    plot.replaceChildren(element("p", { class: "empty" }, state.shown.some(Boolean) ? absent(place) : "nothing is selected"));
    place.dataset.drawn = "empty";
    return;
  }
  const { view } = await vegaEmbed(plot, spec, { ast: true, actions: false, renderer: "svg", tooltip: false, mode: "vega-lite" });
  drawing.set(place, { view, series });
  place.dataset.drawn = state.axis;
  plot.setAttribute("aria-label", describe(figure, series));
}

// What the band around a curve is.
function bandWords(series) {
  const found = series.length > BANDED ? [] : series.filter(banded);
  const runs = found.some((one) => one.points.some((p) => p.n > 1));
  const interval = found.some((one) => one.points.every((p) => p.n === 1));
  const said = [runs && (state.seeds === "sd" ? "± standard deviation over runs" : "min to max over runs"), interval && "95 % interval over problems"];
  return found.length ? `; band: ${said.filter(Boolean).join(", of a single run ")}` : "";
}

const smoothed = (series) => (series.some((one) => one.points.some((p) => p.over > 1)) ? `; mean of ${state.smoothing} points` : "");

function absent(place) {
  const ratio = place.closest("#thoughts") && state.measure === "ratio";
  return ratio ? "None at step 0, so there is no ratio." : "No such values.";
}

const digits = (y) => (y !== 0 && (Math.abs(y) < 1e-3 || Math.abs(y) >= 1e5) ? y.toExponential(2) : Number(y.toPrecision(4)).toString());

function describe(figure, series) {
  const said = series.slice(0, 6).map(({ name, label, points }) => {
    const [a, b] = [points[0], points[points.length - 1]];
    return `${name}${label ? `, ${label}` : ""}: ${digits(a.y)} at step ${a.step} to ${digits(b.y)} at step ${b.step}`;
  });
  return `${figure.title}. ${said.join("; ")}${series.length > 6 ? `; and ${series.length - 6} more` : ""}`;
}

function variantKey(place, variants) {
  const caption = place.querySelector("figcaption");
  caption.querySelectorAll(".key-line").forEach((old) => old.remove());
  variants.forEach((label, v) => {
    const line = swatch(v * COLOURS);
    line.firstChild.style.stroke = "currentColor";
    caption.append(element("span", { class: "key-line" }, line, label));
  });
}

// Of which setting the stacked figure is: the first shown, or the one chosen.
function stackGroup(place) {
  const shown = DATA.groups.map((_, g) => g).filter((g) => state.shown[g]);
  if (!shown.length) return null;
  let select = place.querySelector("select");
  if (!select && DATA.groups.length > 1) {
    select = element("select", { "aria-label": "Setting" }, ...DATA.groups.map((g, i) => element("option", { value: i }, g.name)));
    select.addEventListener("change", () => draw(place));
    place.querySelector("figcaption").append(select);
  }
  return select ? Number(select.value) : shown[0];
}

let queue = Promise.resolve();
function refresh() {
  for (const place of places) if (stale.has(place) && inView.has(place)) queue = queue.then(() => stale.has(place) && draw(place));
  return queue;
}

new Promise((done) => (document.readyState === "loading" ? document.addEventListener("DOMContentLoaded", done) : done())).then(() => {
  const watch = new IntersectionObserver((entries) => {
    for (const entry of entries) entry.isIntersecting ? inView.add(entry.target) : inView.delete(entry.target);
    refresh();
  }, { rootMargin: "400px" });
  places.forEach((place) => watch.observe(place));
  if (DATA.runs.length <= FEW) drawRest();
});

// Draws what is out of view, too, when there is time: it may be printed.
function drawRest() {
  (window.requestIdleCallback || setTimeout)(() => {
    const next = places.find((place) => !place.dataset.drawn && stale.has(place) && place.querySelector(".plot").clientWidth > 0);
    if (!next) return;
    queue = queue.then(() => stale.has(next) && draw(next));
    queue.then(drawRest);
  });
}

listeners.push((keys) => {
  if (keys.every((key) => key === "theme")) return;
  const section = keys.every((key) => ["source", "measure", "split"].includes(key)) ? "#thoughts" : "main";
  places.filter((place) => place.closest(section)).forEach((place) => stale.add(place));
  refresh();
});

let lastWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth === lastWidth) return;
  lastWidth = innerWidth;
  clearTimeout(addEventListener.timer);
  addEventListener.timer = setTimeout(() => { places.forEach((place) => stale.add(place)); refresh(); }, 150);
});
addEventListener("beforeprint", () => places.forEach((place) => inView.add(place)) || refresh());

// ---- values under the pointer, or, with the left and right keys, at one step after the other

const tip = element("div", { class: "tip", role: "status", hidden: "" });
document.body.append(tip);
const cross = element("div", { class: "cross", hidden: "" });
let shownX = null; // where the values are of, on the figure's x axis

// The parts of a figure's drawing that have values: {plot, series, scale, left, top}.
function readable(target) {
  const plot = target.closest?.(".plot");
  const drawn = plot && drawing.get(plot.closest("[data-figure]"));
  if (!drawn || !drawn.series.length) return null;
  const [origin, padding] = [drawn.view.origin(), drawn.view.padding()];
  return { plot, series: drawn.series, scale: drawn.view.scale("x"), y: drawn.view.scale("y"), left: origin[0] + padding.left, top: origin[1] + padding.top };
}

function hover(event) {
  const found = readable(event.target);
  if (!found) return leave();
  const pixel = event.clientX - found.plot.getBoundingClientRect().left - found.left;
  const [from, to] = found.scale.range();
  if (pixel < from - 6 || pixel > to + 6) return leave();
  values(found, pixel, event.clientX, event.clientY);
}

function values({ plot, series, scale, y, left, top }, pixel, clientX, clientY) {
  const near = (points) => points.reduce((a, b) => (Math.abs(scale(b.x) - pixel) < Math.abs(scale(a.x) - pixel) ? b : a));
  const covers = (points) => scale(points[0].x) - 40 < pixel && pixel < scale(points[points.length - 1].x) + 40;
  const found = series.filter((one) => covers(one.points)).map((one) => ({ ...one, at: near(one.points) }));
  if (!found.length) return leave();
  const first = found.reduce((a, b) => (Math.abs(scale(b.at.x) - pixel) < Math.abs(scale(a.at.x) - pixel) ? b : a)).at;
  const rows = found.sort((a, b) => b.at.y - a.at.y).slice(0, 10).map(({ group, name, label, part, at }) => {
    const range = at.lo !== null && at.hi !== null ? ` [${digits(at.lo)}, ${digits(at.hi)}]` : "";
    const who = [DATA.groups.length > 1 && name, label, at.step !== first.step ? `(step ${at.step})` : ""].filter(Boolean).join(" ");
    return element("p", {}, part === undefined ? swatch(group) : element("i", { class: `key p${part}` }), who, element("span", {}, digits(at.y) + range + (at.n > 1 ? `, ${at.n} runs` : "")));
  });
  const more = found.length > 10 ? [element("p", {}, `and ${found.length - 10} more`)] : [];
  const over = first.over > 1 ? `, mean of ${first.over} points` : "";
  tip.replaceChildren(element("b", {}, `step ${first.step.toLocaleString("en")}${over}`), ...rows, ...more);
  tip.hidden = cross.hidden = false;
  if (cross.parentElement !== plot) plot.append(cross);
  shownX = first.x;
  cross.style.left = `${left + scale(first.x)}px`;
  cross.style.top = `${top}px`;
  cross.style.height = `${Math.abs(y.range()[0] - y.range()[1])}px`;
  const beside = clientX + 18 + tip.offsetWidth > innerWidth ? clientX - 18 - tip.offsetWidth : clientX + 18;
  tip.style.left = `${Math.max(4, beside)}px`;
  tip.style.top = `${Math.min(clientY + 14, innerHeight - tip.offsetHeight - 8)}px`;
}

function walk(event) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (event.key === "Escape") return leave();
  const found = by && event.target.matches(".plot") ? readable(event.target) : null;
  if (!found) return;
  event.preventDefault();
  const all = [...new Set(found.series.flatMap((one) => one.points.map((p) => p.x)))].sort((a, b) => a - b);
  const here = cross.parentElement === found.plot && !cross.hidden ? shownX : null;
  const further = by > 0 ? all.filter((x) => x > here) : all.filter((x) => x < here).reverse();
  const x = here === null ? all[by > 0 ? 0 : all.length - 1] : further[0] ?? here;
  const box = found.plot.getBoundingClientRect();
  values(found, found.scale(x), box.left + found.left + found.scale(x), box.top + found.top);
}

function leave() { tip.hidden = cross.hidden = true; }
document.addEventListener("pointermove", hover);
document.addEventListener("pointerdown", hover); // a finger does not hover
document.addEventListener("keydown", walk);
document.addEventListener("focusout", (event) => event.target === cross.parentElement && leave());
document.addEventListener("scroll", leave, { passive: true });
