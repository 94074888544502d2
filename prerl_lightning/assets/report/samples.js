// The sample browser: filters, a list, one sample with its thoughts marked and what changed against the same prompt's
// previous answer. Offsets of thoughts count code points, so texts are cut as arrays of them.
"use strict";
(() => {
  const place = document.getElementById("sample");
  if (!place) return;
  const list = document.getElementById("sample-list");
  const filters = {
    right: document.getElementById("f-right"), life: document.getElementById("f-life"), step: document.getElementById("f-step"),
    kind: document.getElementById("f-kind"), thought: document.getElementById("f-thought"), run: document.getElementById("f-run"),
    text: document.getElementById("f-text"),
  };
  const LISTED = 200; // list entries at a time
  const DIFFED = 4000; // words of either side that are compared
  const families = [...new Set([...DATA.families, ...DATA.samples.flatMap((s) => s.thoughts.map((t) => t[2]))])];
  const isRight = (sample) => sample.reward > 1 - 1e-6;
  const distinct = (value) => [...new Set(DATA.samples.map(value).filter((v) => v !== null && v !== undefined))];
  const tint = (family) => `t${families.indexOf(family) % COLOURS}`;
  let found = [];
  let at = 0;

  function options(select, values, label = String) {
    select.replaceChildren(element("option", { value: "" }, "all"), ...values.map((v) => element("option", { value: v }, label(v))));
    select.parentElement.hidden = values.length < 2 && select !== filters.thought;
  }
  const lifeName = (life) => [`life ${life}`, ...distinct((s) => (s.life === life ? s.objective : null))].join(", ");
  options(filters.life, distinct((s) => s.life).sort((a, b) => a - b), lifeName);
  options(filters.step, distinct((s) => s.step).sort((a, b) => a - b));
  options(filters.kind, distinct((s) => s.kind), (kind) => kind.replace("_", " "));
  options(filters.thought, families);
  filters.thought.parentElement.hidden = !families.length;
  options(filters.run, distinct((s) => s.run), (run) => DATA.runs[run].name);

  function fits(sample) {
    const text = filters.text.value.toLowerCase();
    return (
      (!filters.right.value || (filters.right.value === "right") === isRight(sample)) &&
      ["life", "step", "kind", "run"].every((key) => !filters[key].value || String(sample[key]) === filters[key].value) &&
      (!filters.thought.value || sample.thoughts.some(([, , family]) => family === filters.thought.value)) &&
      (!text || [sample.prompt, sample.response, sample.ground_truth].some((t) => String(t ?? "").toLowerCase().includes(text)))
    );
  }

  // Pieces of a text between spans: marked where a thought lies.
  function marked(text, spans) {
    const points = Array.from(text);
    const pieces = [];
    let from = 0;
    for (const [start, end, family] of spans) {
      pieces.push(points.slice(from, start).join(""), element("mark", { class: tint(family), title: family }, points.slice(start, end).join("")));
      from = end;
    }
    return [...pieces, points.slice(from).join("")];
  }

  // Longest common subsequence over words; equal beginnings and ends are taken off first.
  function wordDiff(before, after) {
    const [a, b] = [before, after].map((text) => text.match(/\s+|[\p{L}\p{M}]+|\p{N}+|[^\s\p{L}\p{M}\p{N}]/gu) || []);
    let start = 0;
    while (start < a.length && start < b.length && a[start] === b[start]) start++;
    let end = 0;
    while (end < a.length - start && end < b.length - start && a[a.length - 1 - end] === b[b.length - 1 - end]) end++;
    const [x, y] = [a.slice(start, a.length - end), b.slice(start, b.length - end)];
    if (x.length > DIFFED || y.length > DIFFED) return null;
    const wide = y.length + 1;
    const common = new Uint16Array((x.length + 1) * wide);
    for (let i = x.length - 1; i >= 0; i--)
      for (let j = y.length - 1; j >= 0; j--)
        common[i * wide + j] = x[i] === y[j] ? common[(i + 1) * wide + j + 1] + 1 : Math.max(common[(i + 1) * wide + j], common[i * wide + j + 1]);
    const steps = [["", a.slice(0, start).join("")]];
    const push = (kind, word) => (steps[steps.length - 1][0] === kind ? (steps[steps.length - 1][1] += word) : steps.push([kind, word]));
    let [i, j] = [0, 0];
    while (i < x.length || j < y.length) {
      if (i < x.length && j < y.length && x[i] === y[j]) { push("", x[i++]); j++; }
      else if (i < x.length && (j === y.length || common[(i + 1) * wide + j] >= common[i * wide + j + 1])) push("del", x[i++]);
      else push("ins", y[j++]);
    }
    push("", a.slice(a.length - end).join(""));
    return steps.filter(([, text]) => text).map(([kind, text]) => (kind ? element(kind, {}, text) : text));
  }

  // of a cut response: how many are in what is shown
  const times = (sample, family) => {
    const here = sample.thoughts.filter((t) => t[2] === family).length;
    return sample.counts ? `${here} of ${sample.counts[family]}` : here;
  };
  const block = (...children) => element("p", { class: "text-block", dir: "auto" }, ...children);
  const verdict = (sample) => element("span", { class: isRight(sample) ? "mark-right" : "mark-wrong" }, isRight(sample) ? "✓ right" : "✗ wrong");

  function show() {
    const sample = found[at];
    if (!sample) return void place.replaceChildren(element("p", { class: "note" }, "No sample fits these filters."));
    const button = (label, by) => {
      const made = element("button", { type: "button" }, label);
      made.addEventListener("click", () => go(by));
      return made;
    };
    const facts = [
      `step ${sample.step}`, sample.objective && `life ${sample.life}, ${sample.objective}`, sample.kind?.replace("_", " "),
      `reward ${sample.reward}`, sample.tokens !== null && `${sample.tokens} tokens`, sample.truncated && "cut off by the length limit",
      DATA.runs.length > 1 && DATA.runs[sample.run].name,
    ].filter(Boolean).join(" · ");
    const used = families.filter((family) => sample.thoughts.some((t) => t[2] === family));
    const keys = used.map((f) => element("span", {}, element("mark", { class: tint(f) }, f), ` ${times(sample, f)}`));
    const parts = [
      element("div", { class: "walk" }, button("previous", -1), button("next", 1)),
      element("h3", {}, verdict(sample), ` row ${sample.row ?? "?"}`),
      element("p", { class: "note" }, facts),
      element("h4", {}, "Prompt"), block(sample.prompt ?? ""),
      element("h4", {}, "Response"), block(...marked(sample.response ?? "", sample.thoughts)),
      keys.length ? element("p", { class: "thought-keys" }, ...keys) : null,
      element("h4", {}, "Ground truth"), block(String(sample.ground_truth ?? "")),
    ];
    if (sample.previous) {
      const changes = wordDiff(sample.previous.response ?? "", sample.response ?? "");
      parts.push(element("h4", {}, `Against its answer at step ${sample.previous.step} (reward ${sample.previous.reward}): `, element("del", {}, "gone"), " ", element("ins", {}, "new")));
      parts.push(changes ? block(...changes) : element("div", {}, element("p", { class: "note" }, "Too long to compare; this was it:"), block(sample.previous.response ?? "")));
    }
    place.replaceChildren(...parts.filter(Boolean));
  }

  function fill() {
    const first = Math.max(0, Math.min(at - LISTED / 2, found.length - LISTED));
    const entries = found.slice(first, first + LISTED).map((sample, i) => {
      const entry = element("li", { role: "option", id: `sample-${first + i}`, "aria-selected": String(first + i === at) },
        verdict(sample), ` step ${sample.step} ${sample.kind?.replace("_", " ") ?? ""}`,
        DATA.runs.length > 1 ? element("span", { class: "of" }, DATA.runs[sample.run].name) : null,
        element("span", { class: "text", dir: "auto" }, Array.from(sample.response ?? "").slice(0, 80).join("")));
      entry.addEventListener("click", () => { at = first + i; update(); });
      return entry;
    });
    list.replaceChildren(...entries);
    const of = found.length < DATA.samples.length ? ` of ${DATA.samples.length}` : "";
    document.getElementById("sample-count").textContent = `${found.length}${of} samples`;
    if (found.length) list.setAttribute("aria-activedescendant", `sample-${at}`);
    else list.removeAttribute("aria-activedescendant");
    const chosen = list.querySelector('[aria-selected="true"]');
    if (chosen) list.scrollTop = Math.max(0, chosen.offsetTop - list.clientHeight / 2);
  }

  function update() { fill(); show(); }
  function go(by) { if (found.length) { at = Math.min(found.length - 1, Math.max(0, at + by)); update(); } }
  function filter() { found = DATA.samples.filter(fits); at = 0; update(); }

  for (const control of Object.values(filters)) control.addEventListener("input", filter);
  document.getElementById("sample-filters").addEventListener("submit", (event) => event.preventDefault());
  list.addEventListener("keydown", (event) => {
    const by = { ArrowDown: 1, ArrowUp: -1, Home: -Infinity, End: Infinity, PageDown: 10, PageUp: -10 }[event.key];
    if (by) { event.preventDefault(); go(by); }
  });
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.closest("input, select, textarea")) return;
    if (event.key === "/") { event.preventDefault(); filters.text.focus(); }
    const section = place.closest("section");
    const { top, bottom } = section.getBoundingClientRect();
    if ((top > innerHeight || bottom < 0) && !section.contains(document.activeElement)) return;
    if (event.key === "j") go(1);
    if (event.key === "k") go(-1);
  });
  filter();
})();
