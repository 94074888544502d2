// Figures as Vega-Lite specifications, out of DATA and the state.
"use strict";
const SPARSE = 16; // a curve of so few points shows them
const MANY = 12; // more curves than these are thin
const BANDED = 6; // and more than these have no bands
const LABELLED = 5; // so many curves are labelled at their ends
const BINS = 60;
const UNITS = [[2 * 86400, 86400, "days"], [7200, 3600, "hours"], [180, 60, "minutes"], [0, 1, "seconds"]];
const PLAIN_ZERO = "datum.value === 0 ? '0' : datum.label"; // not 0k
const AXES = { step: "optimizer step", samples: "responses sampled", seconds: "" };

const tableOf = (run, column) => run.tables.find((table) => column in table.columns);
const longest = Math.max(1, ...DATA.runs.flatMap((run) => run.tables.flatMap((t) => t.seconds.filter((s) => s !== null))));
const [, perUnit, unitName] = UNITS.find(([from]) => longest >= from);
AXES.seconds = `${unitName} since the run began`;

function xValues(table) {
  const values = table[state.axis];
  return state.axis === "seconds" ? values.map((s) => (s === null ? null : s / perUnit)) : values;
}

// Where a step lies on the x axis of a run, between the steps that are known.
function xAt(run, step) {
  if (state.axis === "step" || step <= 0) return Math.max(0, step);
  const known = run.tables.reduce((a, b) => (a && a.step.length >= b.step.length ? a : b), null);
  if (!known) return step;
  const x = xValues(known);
  let [s0, x0] = [0, 0];
  for (let i = 0; i < x.length; i++) {
    if (x[i] === null) continue;
    if (known.step[i] >= step) return known.step[i] === s0 ? x[i] : x0 + ((x[i] - x0) * (step - s0)) / (known.step[i] - s0);
    [s0, x0] = [known.step[i], x[i]];
  }
  return x0;
}

// The same of a setting: the mean over its runs with the most steps, so that a run that ends early bends no curve.
function groupX(group, step) {
  const runs = group.runs.map((r) => DATA.runs[r]);
  const steps = maximum(runs.map((run) => run.steps));
  return mean(runs.filter((run) => run.steps === steps).map((run) => xAt(run, step)));
}

// [{step, x, y, lo, hi, n, over}] of one column of one run; lo and hi are the file's 95 % interval where it has one;
// n: runs, over: points, of which y is the mean.
function curve(run, column, interval) {
  const table = tableOf(run, column);
  if (!table) return [];
  const x = xValues(table);
  const low = interval ? table.columns[`${column}/low`] : null;
  const high = interval ? table.columns[`${column}/high`] : null;
  const points = [];
  table.columns[column].forEach((y, i) => {
    if (y !== null && x[i] !== null) points.push({ step: table.step[i], x: x[i], y, lo: low?.[i] ?? null, hi: high?.[i] ?? null, n: 1, over: 1 });
  });
  return smooth(points, column.startsWith("val/") ? 1 : state.smoothing);
}

function smooth(points, width) {
  if (width < 2) return points;
  const half = Math.floor(width / 2);
  return points.map((point, i) => {
    const reach = Math.min(half, i, points.length - 1 - i); // symmetric, so that ends stay where they are
    const near = points.slice(i - reach, i + reach + 1);
    return { ...point, y: mean(near.map((p) => p.y)), over: near.length };
  });
}

// Over a setting's runs, at each step, of those that have it.
function band(group, curves) {
  const at = new Map();
  for (const points of curves) for (const p of points) at.has(p.step) ? at.get(p.step).push(p) : at.set(p.step, [p]);
  return [...at.entries()].sort((a, b) => a[0] - b[0]).map(([step, found]) => {
    const values = found.map((p) => p.y);
    const y = mean(values);
    const sd = found.length > 1 ? Math.sqrt(values.reduce((sum, v) => sum + (v - y) ** 2, 0) / (found.length - 1)) : 0;
    const [lo, hi] = state.seeds === "sd" ? [y - sd, y + sd] : [minimum(values), maximum(values)];
    return { step, x: groupX(group, step), y, lo, hi, n: found.length, over: maximum(found.map((p) => p.over)) };
  });
}

// Whether a curve has a band: decided once, so that a point without spread is one of no width, and not passed over.
const banded = (one) => one.points.some((p) => p.hi !== null && p.hi > p.lo);

// The curves of a figure: {group, name, label, dash, points}.
function seriesOf(figure) {
  const chosen = Object.keys(figure.views).length ? figure.views[`${state.source}-${state.measure}-${state.split}`] || [] : figure.series;
  const found = [];
  DATA.groups.forEach((group, g) => {
    if (!state.shown[g]) return;
    chosen.forEach(([label, column], v) => {
      const curves = group.runs.map((r) => curve(DATA.runs[r], column, group.runs.length === 1)).filter((c) => c.length);
      const drawn = curves.length > 1 && state.seeds !== "each" ? [band(group, curves)] : curves;
      const dash = chosen.length > 1 ? v % DASHES.length : Math.floor(g / COLOURS) % DASHES.length;
      drawn.forEach((points) => found.push({ group: g, name: group.name, label: chosen.length > 1 ? label : "", dash, points }));
    });
  });
  return { series: found, variants: chosen.length > 1 ? chosen.map(([label]) => label) : [], columns: chosen.map(([, column]) => column) };
}

// Lives of these settings: shading where all that have several agree, and a line at each reincarnation.
function livesOf(groups) {
  const runs = (g) => DATA.groups[g].runs.map((r) => DATA.runs[r]);
  const run = (g) => runs(g).reduce((a, b) => (b.steps > a.steps ? b : a));
  const several = groups.filter((g) => run(g).lives.length > 1);
  const key = (one) => JSON.stringify(one.lives.map(([name, first]) => [name, first]));
  // a condition may end a life at another step in each run; one that failed before has fewer lives
  const full = (g) => runs(g).filter((one) => one.lives.length === run(g).lives.length);
  const alike = several.length > 0 && several.flatMap(full).every((one) => key(one) === key(run(several[0])));
  const agreed = alike && (state.axis === "step" || several.length === 1);
  const why = (g, text) => (several.length === 1 && runs(g).length === 1 && text) || "";
  const at = (g, one = run(g)) => one.lives.map(([name, first, text]) => ({ name, why: why(g, text), x: groupX(DATA.groups[g], first), groups: agreed ? several : [g] }));
  const lives = agreed ? at(several[0]) : [];
  // a setting without a reincarnation is no part of the shading: say whose it is
  const who = agreed && several.length < groups.length ? `${settings(several)}: ` : "";
  return { agreed, who, lives, lines: agreed ? lives.slice(1) : merged(several.flatMap((g) => full(g).flatMap((one) => at(g, one).slice(1)))) };
}
const shownGroups = () => DATA.groups.map((_, g) => g).filter((g) => state.shown[g]);
const brief = (name) => (name.length > 24 ? `${name.slice(0, 23)}…` : name);
const settings = (groups) => (groups.length > 1 ? `${groups.length} settings` : brief(DATA.groups[groups[0]].name));

// Lines at one place under one name become one, of several settings.
function merged(lines) {
  const found = new Map();
  for (const line of lines) {
    const key = `${line.x} ${line.name}`;
    if (found.has(key)) found.get(key).groups = [...new Set([...found.get(key).groups, ...line.groups])];
    else found.set(key, line);
  }
  return [...found.values()];
}

const css = (name) => `var(${name})`; // resolved by the page, so that a theme, or paper, needs no new drawing
const colour = (group) => css(`--g${group % COLOURS}`);
const maximum = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
const mean = (values) => values.reduce((a, b) => a + b, 0) / values.length;
const minimum = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);

function xDomain() {
  const ends = DATA.groups.flatMap((group, g) => (state.shown[g] ? group.runs.flatMap((r) => DATA.runs[r].tables.map((t) => maximum(xValues(t).filter((x) => x !== null)))) : []));
  return [0, Math.max(maximum(ends), state.axis === "step" ? 1 : 1e-9)];
}

function shared(figure, width, height) {
  const [soft, line] = [css("--soft"), css("--line")];
  return {
    $schema: "https://vega.github.io/schema/vega-lite/v6.json",
    width, height, background: "transparent", autosize: { type: "fit", contains: "padding" },
    config: {
      font: getComputedStyle(document.body).fontFamily, view: { stroke: null },
      axis: { labelColor: soft, titleColor: soft, gridColor: line, domainColor: soft, tickColor: soft, labelFontSize: 11, titleFontSize: 11, titleFontWeight: "normal", gridOpacity: 0.7 },
    },
  };
}

function xEncoding(wide) {
  return {
    field: "x", type: "quantitative", scale: { domain: xDomain(), nice: false, zero: false },
    axis: { title: wide ? AXES[state.axis] : null, grid: false, tickCount: wide ? 10 : 5, format: { step: ",d", samples: "~s", seconds: ",~f" }[state.axis], labelExpr: PLAIN_ZERO, labelFlush: true, ...(state.axis === "step" ? { tickMinStep: 1 } : {}) },
  };
}

const ROW = 12; // pixels between two rows of labels above a figure

// The lives behind, or on top of, what a figure draws. Vega makes the room for the labels above it.
function lifeLayers(wide, width, groups = shownGroups(), shaded = true) {
  const { agreed, who, lives, lines } = livesOf(groups);
  const layers = [];
  const [, end] = xDomain();
  const plain = xEncoding(wide); // an axis of its own would hide the figure's
  const shades = lives.flatMap(({ x }, i) => (i % 2 ? [] : [{ x, x2: Math.min(end, lives[i + 1]?.x ?? end) }])).filter((s) => s.x2 > s.x);
  if (shades.length && shaded) {
    layers.push({ data: { values: shades }, mark: { type: "rect", color: css("--life"), opacity: 1 }, encoding: { x: plain, x2: { field: "x2" } } });
  }
  const late = (one) => one.x > end * 0.75; // its label stands to the left of it
  const label = (one, text, color, row) => {
    const mark = { type: "text", text, align: late(one) ? "right" : "left", baseline: "bottom", dx: late(one) ? -2 : 0, color, fontSize: 11 };
    layers.push({ data: { values: [one] }, mark, encoding: { x: plain, y: { value: -4 - ROW * row } } });
  };
  const short = lives.map(({ name }, i) => (i ? (wide ? `reincarnation: ${name}` : name) : who + name));
  const long = lives.map(({ why }, i) => short[i] + (wide && why ? `, as ${why}` : ""));
  const fits = (names, more) => {
    const between = (i) => names[i].length * !late(lives[i]) + (names[i + 1]?.length ?? 0) * (lives[i + 1] ? late(lives[i + 1]) : 0); // characters
    return lives.slice(more ? 0 : 1).every((_, i) => 6.2 * between(i) + 8 < (((lives[i + 1]?.x ?? end) - lives[i].x) / end) * width);
  };
  const names = fits(long, true) ? long : short;
  const room = fits(names, false);
  // of one setting's runs, each at a step of its own, the first line has the label
  const same = new Set(lines.map((one) => `${one.groups} ${one.name}`)).size === 1;
  const alone = !agreed && lines.length > 1 && same ? lines.reduce((a, b) => (b.x < a.x ? b : a)) : null;
  lines.slice(0, 12).forEach((one, i) => {
    const shade = agreed || one.groups.length > 1 ? css("--soft") : colour(one.groups[0]);
    layers.push({ data: { values: [one] }, mark: { type: "rule", color: shade, strokeDash: [3, 3], strokeWidth: 1.2 }, encoding: { x: plain } });
    if (agreed && room) label(one, names[i + 1], shade, 0);
    if (!agreed && wide && !alone && lines.length <= 4) label(one, `reincarnation of ${settings(one.groups)}: ${one.name}`, shade, lines.length - 1 - i);
    if (!agreed && wide && one === alone) label(one, `reincarnations of the runs: ${one.name}`, shade, 0);
  });
  // names that would run into each other become one
  if (agreed) label(lives[0], room ? names[0] : who + lives.map(({ name }) => name).join(" → "), css("--soft"), 0);
  return layers;
}

function lineSpec(figure, series, width, wide) {
  const height = wide ? 320 : 170;
  const bands = series.length <= BANDED;
  const rows = series.flatMap((one, s) => one.points.map((p) => ({ ...p, s, g: String(one.group), d: String(one.dash), few: one.points.length <= SPARSE })));
  const spreads = bands ? rows.filter((row) => row.lo !== null && row.hi !== null && banded(series[row.s])) : [];
  const values = [...rows.map((r) => r.y), ...spreads.flatMap((r) => [r.lo, r.hi]), ...(figure.rule !== null ? [figure.rule] : []), ...(figure.zero ? [0] : [])];
  let [low, high] = [minimum(values), maximum(values)];
  if (low === high) [low, high] = figure.zero ? [Math.min(0, low), Math.max(high, 0) || 1] : [low - (Math.abs(low) * 0.05 || 0.5), high + (Math.abs(high) * 0.05 || 0.5)];
  const groups = [...new Set(rows.map((r) => r.g))];
  const largest = Math.max(Math.abs(low), Math.abs(high));
  const format = figure.format !== ".3~g" ? figure.format : largest >= 1000 ? "~s" : largest < 1e-3 ? ".2~e" : ".3~g";
  const y = { field: "y", type: "quantitative", scale: { domain: [low, high], nice: true, zero: false }, axis: { title: null, format, labelExpr: PLAIN_ZERO, tickCount: wide ? 6 : 4 } };
  const x = xEncoding(wide);
  const color = { field: "g", type: "nominal", legend: null, scale: { domain: groups, range: groups.map((g) => colour(Number(g))) } };
  const dash = { field: "d", type: "nominal", legend: null, scale: { domain: ["0", "1", "2", "3"], range: DASHES } };
  const thin = series.length > MANY;
  const layers = lifeLayers(wide, width);
  if (figure.rule !== null) layers.push({ data: { values: [{ y: figure.rule }] }, mark: { type: "rule", color: css("--soft"), strokeWidth: 1 }, encoding: { y } });
  if (spreads.length) layers.push({ data: { values: spreads }, mark: { type: "area", opacity: 0.16, clip: true }, encoding: { x, y: { ...y, field: "lo" }, y2: { field: "hi" }, color, detail: { field: "s" } } });
  layers.push({ data: { values: rows }, mark: { type: "line", strokeWidth: thin ? 1 : wide ? 2.2 : 1.7, opacity: thin ? 0.75 : 1, strokeJoin: "round" }, encoding: { x, y, color, strokeDash: dash, detail: { field: "s" } } });
  const dots = rows.filter((row) => row.few);
  if (dots.length && !thin) layers.push({ data: { values: dots }, mark: { type: "point", filled: true, size: wide ? 34 : 20, opacity: 1 }, encoding: { x, y, color } });
  if (wide && DATA.groups.length > 1 && series.length <= LABELLED && width > 560) {
    layers.push(...endLabels(series, low, high, height, x, y));
  }
  return { ...shared(figure, width, height), padding: { left: 2, right: 8, top: 4, bottom: 4 }, layer: layers };
}

// Names at the ends of curves, moved apart where they would lie on each other.
function endLabels(series, low, high, height, x, y) {
  const ends = series.map((one) => ({ ...one, end: one.points[one.points.length - 1] })).sort((a, b) => b.end.y - a.end.y);
  let lowest = -Infinity;
  return ends.map(({ name, group, end }) => {
    const at = (height - 50) * (1 - (end.y - low) / (high - low || 1));
    const moved = Math.max(at, lowest + 14);
    lowest = moved;
    return { data: { values: [end] }, mark: { type: "text", text: brief(name), align: "left", dx: 7, dy: moved - at, color: colour(group), fontSize: 12, fontWeight: 600 }, encoding: { x, y } };
  });
}

function pointSpec(figure, width, wide) {
  const long = figure.kind === "lengths"; // x is the response's tokens, whatever the axis of the page
  const rows = DATA.groups.flatMap((group, g) => !state.shown[g] ? [] : group.runs.flatMap((r) => DATA.runs[r].points.map(([step, y, right, tokens]) => ({ x: long ? tokens : xAt(DATA.runs[r], step), y, g: String(g), right }))));
  if (!rows.length) return null;
  const groups = [...new Set(rows.map((r) => r.g))];
  const color = { field: "g", type: "nominal", legend: null, scale: { domain: groups, range: groups.map((g) => colour(Number(g))) } };
  const x = long ? { field: "x", type: "quantitative", axis: { title: null, grid: false, tickCount: 5 } } : xEncoding(wide);
  const encoding = { x, y: { field: "y", type: "quantitative", scale: { zero: false }, axis: { title: null, tickCount: 4 } }, color };
  const mark = (right) => ({ data: { values: rows.filter((r) => r.right === right) }, mark: { type: "point", filled: right === 1, size: 14, opacity: 0.55, strokeWidth: 1 }, encoding });
  return { ...shared(figure, width, 170), padding: { left: 2, right: 8, top: 4, bottom: 4 }, layer: [...(long ? [] : lifeLayers(wide, width)), ...[0, 1].filter((right) => rows.some((r) => r.right === right)).map(mark)] };
}

// Seconds a step by part, in bins of steps. What runs every n steps only is spread over the steps between.
function stackSpec(figure, group, width) {
  const runs = DATA.groups[group].runs.map((r) => DATA.runs[r]);
  const last = maximum(runs.map((run) => run.steps));
  const size = Math.max(1, Math.ceil(last / BINS));
  const rows = [];
  for (let from = 0; from < last; from += size) {
    const [x, x2] = [from, Math.min(last, from + size)].map((step) => groupX(DATA.groups[group], step));
    let y = 0;
    figure.series.forEach(([label, column], p) => {
      const found = runs.map((run) => meanBetween(run, column, from, from + size)).filter((v) => v !== null);
      const value = found.length ? mean(found) : 0;
      if (value > 0) rows.push({ x, x2, y, y2: (y += value), p, label, value, step: Math.min(last, from + size) });
    });
  }
  const parts = figure.series.map((_, p) => p);
  const color = { field: "p", type: "ordinal", legend: null, scale: { domain: parts, range: figure.series.map(([, c]) => css(`--t${ALL_PARTS.indexOf(c)}`)) } };
  const y = { field: "y", type: "quantitative", axis: { title: "seconds", tickCount: 6 } };
  const mark = { type: "rect", strokeWidth: 0.7 };
  const bars = { data: { values: rows }, mark, encoding: { x: xEncoding(true), x2: { field: "x2" }, y, y2: { field: "y2" }, color, stroke: { ...color } } };
  const layers = lifeLayers(true, width, [group], false); // on top: bars would hide them
  const spec = { ...shared(figure, width, 320), padding: { left: 2, right: 8, top: 4, bottom: 4 }, layer: [bars, ...layers] };
  const series = figure.series.map(([label, column], p) => ({
    name: "", label, part: ALL_PARTS.indexOf(column),
    points: rows.filter((r) => r.p === p).map((r) => ({ step: r.step, x: (r.x + r.x2) / 2, y: r.value, lo: null, hi: null, n: 1, over: 1 })),
  }));
  return { spec, series: series.filter((one) => one.points.length) };
}
const ALL_PARTS = ["rollout", "reward", "forward_backward", "optimizer", "update_weights", "statistics", "other", "watchers"].map((p) => `time/${p}`);

function meanBetween(run, column, from, to) {
  const table = tableOf(run, column);
  if (!table) return null;
  const values = table.columns[column].map((v, i) => [table.step[i], v]).filter(([, v]) => v !== null);
  if (table.share < 0.5) { // every n steps: the next one, spread evenly
    const next = values.find(([step]) => step > from) || values[values.length - 1];
    return next ? next[1] * table.share : null;
  }
  const inside = values.filter(([step]) => step > from && step <= to).map(([, v]) => v);
  return inside.length ? mean(inside) : null;
}
