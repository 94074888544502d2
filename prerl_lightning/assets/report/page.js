// State, controls and legend of the page. charts.js draws figures, samples.js browses samples. Text of models and names
// of runs reach the document as text nodes only.
"use strict";
const DATA = JSON.parse(document.getElementById("data").textContent);
const COLOURS = 7;
const DASHES = [[1, 0], [6, 3], [2, 2], [8, 3, 2, 3]];
const state = {
  axis: "step",
  seeds: "range",
  smoothing: 1,
  source: "training",
  measure: "ratio",
  split: "all",
  shown: DATA.groups.map(() => true),
};
const listeners = []; // called after a change of state
const changed = (...keys) => listeners.forEach((listener) => listener(keys));

// element("p", {class: "x"}, "text", child) with text as text
function element(name, attributes = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

// A row of buttons of which one is pressed.
function choice(id, key, options, apply) {
  const place = document.getElementById(id);
  if (!place) return;
  const buttons = options.map(([value, label, title]) => {
    const button = element("button", { type: "button", "data-value": value, title: title || label }, label);
    button.addEventListener("click", () => {
      state[key] = value;
      mark();
      if (apply) apply(value);
      changed(key);
    });
    return button;
  });
  const mark = () => buttons.forEach((b) => b.setAttribute("aria-pressed", String(b.dataset.value === String(state[key]))));
  place.replaceChildren(...buttons);
  mark();
}

function swatch(group) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  made.setAttribute("class", "swatch");
  made.setAttribute("viewBox", "0 0 22 8");
  made.setAttribute("aria-hidden", "true");
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  const dash = DASHES[Math.floor(group / COLOURS) % DASHES.length].join(" ");
  const said = { x1: 1, y1: 4, x2: 21, y2: 4, "stroke-width": 2.5, "stroke-dasharray": dash === "1 0" ? "" : dash };
  for (const [key, value] of Object.entries(said)) line.setAttribute(key, value);
  line.style.stroke = `var(--g${group % COLOURS})`;
  made.append(line);
  return made;
}

function legend() {
  const place = document.getElementById("legend");
  if (DATA.groups.length < 2) return void (place.hidden = true);
  const buttons = DATA.groups.map((group, i) => {
    const runs = group.runs.length > 1 ? ` · ${group.runs.length} runs` : "";
    const button = element("button", { type: "button", "data-group": i }, swatch(i), group.name + runs);
    button.addEventListener("click", () => show((shown, j) => (j === i ? !shown : shown)));
    return button;
  });
  const show = (rule) => {
    state.shown = state.shown.map(rule);
    buttons.forEach((b, i) => b.setAttribute("aria-pressed", String(state.shown[i])));
    changed("shown");
  };
  const all = (label, value) => {
    const button = element("button", { type: "button", class: "all" }, label);
    button.addEventListener("click", () => show(() => value));
    return button;
  };
  place.replaceChildren(...buttons, all("all", true), all("none", false));
  buttons.forEach((b) => b.setAttribute("aria-pressed", "true"));
}

// Only what the files have: ratios, say, are of all responses.
function limitSplit() {
  const able = (measure, split) => has(`${state.source}-${measure}-${split}`);
  document.querySelectorAll("#measure button").forEach((b) => (b.disabled = !able(b.dataset.value, "all")));
  const pick = (id, value) => document.querySelector(`#${id} [data-value="${value}"]`)?.click();
  if (!able(state.measure, "all") && able("count", "all")) return pick("measure", "count");
  document.querySelectorAll("#split button").forEach((b) => (b.disabled = !able(state.measure, b.dataset.value)));
  if (!able(state.measure, state.split) && state.split !== "all") pick("split", "all");
}

function setTheme(value) {
  if (value === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = value;
}

const most = Math.max(1, ...DATA.groups.map((group) => group.runs.length));
choice("axis", "axis", [
  ["step", "steps", "optimizer steps"],
  ["samples", "samples", "responses sampled so far"],
  ["seconds", "time", "wall time since the run began"],
]);
choice("seeds", "seeds", [
  ["range", "mean, min to max", "band: smallest to largest value over the runs of a setting"],
  ["sd", "mean ± sd", "band: standard deviation over the runs of a setting"],
  ["each", "each run"],
]);
document.getElementById("seeds-field").hidden = most < 2;
choice("smoothing", "smoothing", [[1, "off"], [5, "5", "running mean of 5 points"], [15, "15", "running mean of 15 points"]]);
state.theme = "auto";
choice("theme", "theme", [["auto", "auto"], ["light", "light"], ["dark", "dark"]], setTheme);
const views = Object.values(DATA.figures).flatMap((figure) => Object.keys(figure.views));
const has = (view) => views.some((one) => one.includes(view));
if (has("held-out")) state.source = "held-out";
// ratios where most families have one: a family that step 0 has none of has no ratio
const withViews = Object.values(DATA.figures).filter((figure) => Object.keys(figure.views).length);
const withRatio = withViews.filter((figure) => `${state.source}-ratio-all` in figure.views);
if (withRatio.length * 2 < withViews.length) state.measure = "count";
choice("source", "source", [["held-out", "held out"], ["training", "training"]].filter(([source]) => has(source)), limitSplit);
choice("measure", "measure", [["ratio", "× step 0"], ["count", "a response"], ["per_1k", "per 1,000 tokens"]], limitSplit);
choice("split", "split", [["all", "all"], ["right", "right"], ["wrong", "wrong"], ["both", "right and wrong"]]);
limitSplit();
legend();
document.querySelector(".controls").hidden = false;
document.querySelectorAll("[data-needs-script]").forEach((part) => (part.hidden = false));
