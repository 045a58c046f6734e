"use strict";
/* Draws the report's figures from the data that stand in the page. No network; see packing.py for how data stand there. */
(() => {
const byId = (id) => document.getElementById(id);
const root = document.documentElement;
const css = (name) => getComputedStyle(root).getPropertyValue(name).trim();
const isCoarse = matchMedia("(pointer: coarse)").matches;
let data;

/* ---- data ---- */
async function inflate(id) {
  const packed = Uint8Array.from(atob(byId(id).textContent.trim()), (one) => one.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}
function numbersOf(bytes) {
  const count = bytes.length / 4, whole = new Uint8Array(bytes.length);
  for (let plane = 0; plane < 4; plane++)
    for (let i = 0; i < count; i++) whole[4 * i + plane] = bytes[plane * count + i];
  return new Float32Array(whole.buffer);
}
function unpacked(value, numbers) {
  if (Array.isArray(value)) return value.map((one) => unpacked(one, numbers));
  if (value === null || typeof value !== "object") return value;
  if (Array.isArray(value.$)) return numbers.subarray(value.$[0], value.$[0] + value.$[1]);
  return Object.fromEntries(Object.entries(value).map(([key, one]) => [key, unpacked(one, numbers)]));
}

/* ---- small pieces of the page ---- */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}
/* Plotly takes a few tags in texts: names are shown as they are. */
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const isKnown = (value) => value !== null && value !== undefined && Number.isFinite(value);
function shown(value) {
  if (!isKnown(value)) return "";
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size >= 1e6 || size < 1e-3) return value.toExponential(2);
  return Number.isInteger(value) ? value.toLocaleString("en") : String(Number(value.toPrecision(4)));
}
function section(id, title, note) {
  const made = make("section", { id, class: "interactive" }, make("h2", {}, title));
  if (note) made.append(make("p", { class: "sub" }, note));
  byId("figures").append(made);
  return made;
}
function select(bar, name, label, options, changed) {
  const box = make("select", { name, onchange: changed });
  fill(box, options);
  bar.append(make("label", {}, label + " ", box));
  return box;
}
function fill(box, options) {
  const before = box.value;
  box.replaceChildren(...options.map(([value, text]) => make("option", { value }, text)));
  if (options.some(([value]) => String(value) === before)) box.value = before;
}
function tick(bar, name, label, checked, changed) {
  const box = make("input", { type: "checkbox", name, onchange: changed });
  box.checked = checked;
  bar.append(make("label", {}, box, " " + label));
  return box;
}
const controls = () => make("div", { class: "controls" });

/* ---- charts ---- */
/* Neither dark nor light, so that all are seen on both backgrounds. */
const shades = [[132, 84, 214], [62, 124, 228], [30, 158, 158], [112, 176, 72], [222, 160, 40]];
function shade(share) {
  const at = Math.min(0.9999, Math.max(0, share)) * (shades.length - 1), i = Math.floor(at);
  return `rgb(${shades[i].map((low, c) => Math.round(low + (at - i) * (shades[i + 1][c] - low))).join(",")})`;
}
const charts = new Map();
const watcher = new IntersectionObserver((entries) => {
  for (const entry of entries) if (entry.isIntersecting) { watcher.unobserve(entry.target); draw(entry.target); }
}, { rootMargin: "400px" });

/* A place for a panel; it is drawn when it comes near the window. Give another panel to `show` to change it. */
function chart(parent, height) {
  const place = make("div", { style: `height:${height || 310}px` });
  parent.append(make("div", { class: "plot" }, make("h3", {}), place));
  return place;
}
function show(place, panel) {
  const isDrawn = charts.get(place)?.drawn;
  charts.set(place, { panel, drawn: isDrawn });
  if (isDrawn) draw(place);
  else watcher.observe(place);
}
function axis(title, extra) {
  return { title: { text: plain(title || ""), font: { size: 12 }, standoff: 8 }, gridcolor: css("--line"), linecolor: css("--line"),
    zerolinecolor: css("--line"), automargin: true, ...extra };
}
const MOST_NAMED = 16;
/* A panel: {title, x, y, log, range, series: [{name, x, y, look | color, dash, width, mode, error, hover, on2}],
   y2, heat: {x, y, z, label, range, scale, log}, bars, lines: [x of a vertical line]}. */
function draw(place) {
  const held = charts.get(place), panel = held.panel, known = (panel.series || []).length;
  held.drawn = true;
  place.previousSibling.textContent = panel.title || "";
  const traces = (panel.series || []).map((one) => trace(one, panel));
  if (panel.heat) traces.push(heat(panel.heat));
  const few = traces.filter((one) => one.showlegend !== false && one.name).length;
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 12 },
    margin: { l: 56, r: panel.y2 || panel.heat ? 60 : 16, t: 12, b: 48 },
    showlegend: few > 1 && few <= MOST_NAMED, legend: { orientation: "h", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
    hovermode: panel.heat ? "closest" : panel.hover || "closest",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--muted"), font: { color: css("--ink") } },
    dragmode: isCoarse ? false : "zoom", barmode: "overlay", bargap: 0, uirevision: panel.revision || "all", modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--ink") },
    xaxis: axis(panel.x, { type: panel.xlog ? "log" : undefined, ...(panel.xaxis || {}) }),
    yaxis: axis(panel.y, { type: panel.log ? "log" : undefined, exponentformat: panel.log ? "power" : "SI",
      ...(panel.range && !panel.log ? { range: panel.range } : {}), ...(panel.yaxis || {}) }),
    shapes: (panel.lines || []).map((x) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper",
      line: { color: css("--mark"), width: 1.3, dash: "dash" } })),
    annotations: known || panel.heat ? [] : [{ text: "no finite numbers", showarrow: false, xref: "paper",
      yref: "paper", x: 0.5, y: 0.5, font: { color: css("--muted"), size: 14 } }],
  };
  if (panel.y2) layout.yaxis2 = axis(panel.y2, { overlaying: "y", side: "right", showgrid: false, rangemode: "tozero" });
  Plotly.react(place, traces, layout, { responsive: true, displaylogo: false, displayModeBar: "hover",
    /* Named one by one, and no server: of the library's own buttons one would send the chart to a service. */
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], plotlyServerURL: "",
    toImageButtonOptions: { filename: panel.title || "figure", scale: 2 } });
}
function trace(one, panel) {
  const look = data.looks[one.look] || {}, color = one.color === "ink" ? css("--ink")
    : one.color || (isKnown(one.shade) ? shade(one.shade) : look.color);
  if (one.bars) return { type: "bar", name: plain(one.name), x: one.x, y: one.y, width: one.width,
    marker: { color: color || css("--muted"), opacity: 0.65 }, hovertemplate: one.hover || "%{x:.4g}: %{y:.4g}" };
  const few = Array.prototype.filter.call(one.y, isKnown).length <= 60;
  const mode = one.mode || (few || one.look ? "lines+markers" : "lines");
  return { type: "scatter", name: plain(one.name), x: one.x, y: one.y, mode, showlegend: one.legend !== false,
    text: one.text ? one.text.map(plain) : undefined, yaxis: one.on2 ? "y2" : "y", connectgaps: Boolean(one.gaps),
    line: { color, width: one.width || 1.8, dash: one.dash || "solid", shape: one.stepped ? "hv" : "linear" },
    marker: { color, size: one.size || 6, symbol: one.symbol || look.symbol || "circle", opacity: one.opacity || 1,
      maxdisplayed: few ? 0 : 12 },
    error_y: one.error ? { type: "data", array: one.error, color, thickness: 1, width: 3 } : undefined,
    fill: one.fill, fillcolor: one.fillcolor,
    hovertemplate: one.hover || `${one.text ? "%{text}<br>" : ""}%{x:,.6~g}: %{y:.4~g}<extra>${plain(one.name)}</extra>` };
}
function heat(one) {
  let z = one.z, text, bar = {};
  if (one.log) {
    z = one.z.map((row) => Array.from(row, (value) => value > 0 && isKnown(value) ? Math.log10(value) : null));
    const all = z.flat().filter(isKnown);
    const low = Math.min(...all), high = Math.max(...all), ticks = [];
    for (let k = Math.floor(low); k <= high; k++)
      for (const step of high - low > 3 ? [1] : [1, 2, 5]) {
        const at = k + Math.log10(step);
        if (at >= low && at <= high) ticks.push([at, shown(step * 10 ** k)]);
      }
    if (ticks.length > 1) bar = { tickvals: ticks.map((t) => t[0]), ticktext: ticks.map((t) => t[1]) };
    else if (all.length) bar = { tickvals: [low, high], ticktext: [shown(10 ** low), shown(10 ** high)] };
  } else z = one.z.map((row) => Array.from(row));
  text = one.z.map((row) => Array.from(row, shown));
  return { type: "heatmap", x: one.x, y: one.y.map(plain), z, text, colorscale: one.scale || "Viridis",
    zmin: one.log ? undefined : one.range?.[0], zmax: one.log ? undefined : one.range?.[1], hoverongaps: false,
    colorbar: { title: { text: plain(one.label || ""), side: "right", font: { size: 11 } }, thickness: 12, ...bar },
    hovertemplate: `%{y}<br>${plain(one.over || "update")} %{x}: %{text}<extra></extra>` };
}

/* ---- figures that come ready: panels, in one view or several to choose from ---- */
function figure(one) {
  const made = section("fig-" + one.id, one.title, one.note);
  const names = Object.keys(one.views), bar = controls(), grid = make("div", { class: "panels" });
  const render = () => {
    grid.replaceChildren();
    for (const panel of one.views[chosen ? chosen.value : names[0]])
      show(chart(grid, panel.height), { ...panel, log: log && panel.positive !== false ? log.checked : panel.log });
  };
  const chosen = names.length > 1 ? select(bar, "view", "show", names.map((name) => [name, name]), render) : null;
  const log = one.logarithmic ? tick(bar, "log", "logarithmic", one.logarithmic === "on", render) : null;
  if (bar.children.length) made.append(bar);
  made.append(grid);
  render();
}

/* ---- numbers of matrices ---- */
const typesOf = (m) => [...new Set(m.types)];
function rowOf(m, kind, metric, index) {
  const values = m.values[kind]?.[metric], count = m.updates.length;
  return values ? values.subarray(index * count, (index + 1) * count) : null;
}
const hasAny = (row) => row && row.some(isKnown);
const metricsOf = (m, kind, wanted) => m.metrics.filter((one) => m.values[kind]?.[one.key] && (!wanted || wanted(one)));
function meanOf(rows) {
  const sums = new Array(rows[0].length).fill(0), counts = new Array(rows[0].length).fill(0);
  for (const row of rows) row.forEach((value, i) => { if (isKnown(value)) { sums[i] += value; counts[i]++; } });
  return sums.map((sum, i) => (counts[i] ? sum / counts[i] : null));
}
function explorer(m, id, title, note, wanted, first) {
  const metrics = m.metrics.filter((one) => m.kinds.some(([kind]) => m.values[kind]?.[one.key]) && wanted(one));
  if (!metrics.length || m.updates.length < 2) return;
  const made = section(id, title, note), bar = controls(), types = typesOf(m);
  const render = () => {
    const metric = metrics.find((one) => one.key === what.value), series = [];
    const kinds = m.kinds.filter(([kind]) => weights.value === "both" || weights.value === kind);
    const inOne = layers.value.startsWith("type:") ? layers.value.slice(5) : null;
    const single = layers.value.startsWith("layer:") ? Number(layers.value.slice(6)) : -1;
    for (const [kind, kindName] of kinds) {
      const dash = kind === "spec_ema" && kinds.length > 1 ? "dot" : "solid";
      const add = (name, rows, extra) => {
        const found = rows.filter(hasAny);
        if (!found.length) return;
        series.push({ name: kinds.length > 1 ? `${name}, ${kindName}` : name, x: m.updates, y: meanOf(found), dash,
          gaps: true, hover: `update %{x:,}: %{y:.4~g}<extra>${plain(name)}</extra>`, ...extra });
      };
      const members = (type) => m.names.map((_, i) => i).filter((i) => m.types[i] === type);
      if (single >= 0) add(m.names[single], [rowOf(m, kind, metric.key, single)], { look: m.types[single] });
      else if (inOne) members(inOne).forEach((i, at, all) =>
        add(m.names[i], [rowOf(m, kind, metric.key, i)], { color: shade(at / Math.max(1, all.length - 1)) }));
      else for (const type of types)
        add(type, members(type).map((i) => rowOf(m, kind, metric.key, i)).filter(Boolean), { look: type });
      if (kind === m.kinds[0][0] && metric.chance) {
        const chosen = single >= 0 ? [single] : m.names.map((_, i) => i).filter((i) => !inOne || m.types[i] === inOne);
        const groups = single >= 0 || inOne ? [["chance", chosen, { color: "ink" }]]
          : types.map((type) => [`chance, ${type}`, members(type), { look: type, legend: false }]);
        for (const [name, of, extra] of groups) {
          const rows = metric.chance === "0" ? [m.updates.map(() => 0)]
            : of.map((i) => rowOf(m, kind, metric.chance, i)).filter(hasAny);
          if (rows.length) series.push({ name, x: m.updates, y: meanOf(rows), dash: "dash", width: 1, mode: "lines",
            gaps: true, ...extra });
          if (metric.chance === "0") break;
        }
      }
    }
    const zero = metric.chance === "0" ? series.filter((one) => one.name.startsWith("chance")) : [];
    zero.forEach((one) => { one.name = "chance"; one.color = "ink"; delete one.look; one.legend = true; });
    show(place, { x: "update", y: metric.label, log: log.checked, series, revision: metric.key + log.checked });
  };
  const what = select(bar, "metric", "number", metrics.map((one) => [one.key, one.label]), render);
  if (first && metrics.some((one) => one.key === first)) what.value = first;
  const layers = select(bar, "layer", "layers", [["means", "means by type"], ...types.map((t) => ["type:" + t, "each " + t]),
    ...m.names.map((name, i) => ["layer:" + i, name])], render);
  const weights = select(bar, "weights", "weights",
    m.kinds.length > 1 ? [...m.kinds, ["both", "both (EMA dotted)"]] : m.kinds, render);
  const log = tick(bar, "log", "logarithmic", false, render);
  made.append(bar);
  const place = chart(made, 420);
  render();
}
function heatMap(m) {
  const metrics = m.metrics.filter((one) => m.kinds.some(([kind]) => m.values[kind]?.[one.key]));
  if (!metrics.length || m.updates.length < 2) return;
  const made = section("fig-heat", "Layer by time", "A row is a matrix, the first block on top; a column is a refresh. "
    + "Empty: not computed there, or not finite."), bar = controls();
  const render = () => {
    const metric = metrics.find((one) => one.key === what.value);
    const at = m.names.map((_, i) => i).filter((i) => type.value === "all" || m.types[i] === type.value)
      .filter((i) => hasAny(rowOf(m, weights.value, metric.key, i)));
    if (type.value === "all") at.sort((a, b) => m.types[a] === m.types[b] ? a - b
      : typesOf(m).indexOf(m.types[a]) - typesOf(m).indexOf(m.types[b]));
    place.style.height = Math.min(1400, Math.max(320, 90 + 15 * at.length)) + "px";
    show(place, { x: "update", yaxis: { autorange: "reversed", type: "category", showgrid: false },
      xaxis: { type: "category", nticks: 8, showgrid: false }, revision: metric.key + type.value,
      heat: at.length ? { x: m.updates.map((u) => u.toLocaleString("en")), y: at.map((i) => m.names[i]), log: log.checked,
        z: at.map((i) => rowOf(m, weights.value, metric.key, i)), label: metric.label } : null });
  };
  const what = select(bar, "metric", "number", metrics.map((one) => [one.key, one.label]), render);
  if (metrics.some((one) => one.key === "stable_rank")) what.value = "stable_rank";
  const type = select(bar, "type", "type", [...typesOf(m).map((one) => [one, one]), ["all", "all types"]], render);
  const weights = select(bar, "weights", "weights", m.kinds, render);
  const log = tick(bar, "log", "logarithmic colours", false, render);
  made.append(bar);
  const place = chart(made, 420);
  render();
}
/* From four decades below the greatest value, or the smallest: what rounding has made of zeros would squeeze the rest. */
function decades(values) {
  const known = Array.from(values).filter((value) => value > 0 && isKnown(value));
  const most = known.reduce((a, b) => Math.max(a, b), 0) || 1, least = known.reduce((a, b) => Math.min(a, b), most);
  return [Math.log10(Math.max(least, most * 1e-4) / 1.15), Math.log10(most * 1.15)];
}
function singularValues(m) {
  const kinds = m.kinds.filter(([kind]) => m.spectra[kind]);
  if (!kinds.length) return;
  const made = section("fig-values", "Singular values of a matrix", m.spectraNote), bar = controls();
  const render = () => {
    const found = m.spectra[weights.value], one = found.matrices[Number(layer.value)], series = [];
    if (!one) return show(place, { series });
    const count = one.index.length, times = found.updates.length;
    if (over.value === "time") one.index.forEach((index, at) => {
      const y = Array.from({ length: times }, (_, t) => one.values[t * count + at]);
      if (y.some(isKnown)) series.push({ name: "σ" + index, x: found.updates, y, color: shade(at / Math.max(1, count - 1)),
        width: 1.2, gaps: true, mode: times < 30 ? "lines+markers" : "lines", size: 3, legend: false,
        hover: `update %{x:,}: %{y:.4~g}<extra>σ<sub>${index}</sub></extra>` });
    });
    else [...new Set([0, times - 1])].forEach((t) => series.push({ name: `update ${found.updates[t].toLocaleString("en")}`,
      x: one.index, y: one.values.subarray(t * count, (t + 1) * count), look: m.types[Number(layer.value)],
      dash: t === times - 1 ? "solid" : "dash", width: t === times - 1 ? 2 : 1.2, mode: "lines",
      hover: `σ<sub>%{x}</sub>: %{y:.4~g}<extra>update ${found.updates[t].toLocaleString("en")}</extra>` }));
    const isTime = over.value === "time";
    show(place, { title: m.names[Number(layer.value)], x: isTime ? "update" : "index i", y: "singular value σᵢ",
      log: log.checked, series, revision: over.value + log.checked + layer.value,
      yaxis: log.checked ? { range: decades(one.values) } : {} });
  };
  const layer = select(bar, "layer", "matrix", m.names.map((name, i) => [i, name]), render);
  const weights = select(bar, "weights", "weights", kinds, render);
  const isOne = m.spectra[kinds[0][0]].updates.length < 2;
  const over = select(bar, "over", "over", isOne ? [["index", "index"]]
    : [["time", "updates"], ["index", "index: start and now"]], render);
  const log = tick(bar, "log", "logarithmic", true, render);
  made.append(bar);
  const place = chart(made, 440);
  render();
}
function bulk(m) {
  const at = Object.keys(m.bulk);
  if (!at.length) return;
  const made = section("fig-bulk", "Bulk of a spectrum", "Bars: the newest values; line: the Marchenko-Pastur law of noise "
    + "with the same median; dashed: its edge, which 99 % of noise stays below."), bar = controls();
  const told = make("p", { class: "told" });
  const render = () => {
    const one = m.bulk[layer.value], step = one.right / one.counts.length;
    const series = [{ name: "values", bars: true, width: step, y: one.counts, x: Array.from(one.counts, (_, i) => (i + 0.5) * step),
      hover: "around %{x:.4g}: density %{y:.4g}<extra></extra>" }];
    if (one.density) series.push({ name: "Marchenko-Pastur", x: Array.from(one.density, (_, i) => (i + 0.5) / one.density.length * one.right),
      y: one.density, mode: "lines", look: m.types[m.names.indexOf(one.name)] });
    told.textContent = one.told;
    show(place, { title: one.name, x: "singular value σᵢ", y: "density", series, lines: isKnown(one.edge) ? [one.edge] : [],
      log: log.checked, revision: layer.value + log.checked });
  };
  const layer = select(bar, "layer", "matrix", at.map((key) => [key, m.bulk[key].label]), render);
  const log = tick(bar, "log", "logarithmic", false, render);
  made.append(bar);
  const place = chart(made, 400);
  made.append(told);
  render();
}

/* ---- table by matrix ---- */
const AT_ONCE = 150;
function matrixTable(m) {
  const t = m.table;
  if (!t || !t.rows.length) return;
  const made = section("fig-table", "Every matrix", t.note), bar = controls();
  let order = null, rising = false, limit = AT_ONCE;
  const cell = (row, column, part) => t[part][row * t.columns.length + column];
  const table = make("table", { class: "matrices" }), reason = make("p", { class: "told", "aria-live": "polite" });
  const more = make("button", { type: "button", onclick: () => { limit = Infinity; render(); } });
  const heading = (text, key) => {
    const mark = order === key ? (rising ? " ▲" : " ▼") : "";
    const th = make("th", { "aria-sort": order === key ? (rising ? "ascending" : "descending") : "none" });
    th.append(make("button", { type: "button", "data-sort": key, onclick: () => {
      if (order === key) rising = !rising; else { order = key; rising = key === "name"; }
      render();
    } }, text + mark));
    return th;
  };
  const render = () => {
    const columns = t.columns.map((_, i) => i).filter((i) => all.checked || t.columns[i].first);
    let rows = t.rows.map((_, i) => i).filter((i) => (type.value === "all" || m.types[t.rows[i][0]] === type.value)
      && (weights.value === "all" || m.kinds[t.rows[i][1]][0] === weights.value)
      && m.names[t.rows[i][0]].toLowerCase().includes(search.value.toLowerCase()));
    if (order !== null && order !== "name") {
      const [part, column] = order.split(":");
      const key = (i) => cell(i, Number(column), part);
      rows.sort((a, b) => isKnown(key(a)) !== isKnown(key(b)) ? (isKnown(key(a)) ? -1 : 1)
        : (rising ? 1 : -1) * ((isKnown(key(a)) ? key(a) - key(b) : 0)) || a - b);
    } else if (order === "name") rows.sort((a, b) => (rising ? 1 : -1) * (m.names[t.rows[a][0]]
      .localeCompare(m.names[t.rows[b][0]], "en", { numeric: true }) || t.rows[a][1] - t.rows[b][1]));
    const head = make("tr", {}, heading("matrix", "name"), make("th", {}, "weights"));
    for (const i of columns) head.append(heading(t.columns[i].label, "newest:" + i), heading(t.columns[i].ratio ? "÷ start" : "− start", "change:" + i));
    const used = new Set(), body = make("tbody");
    for (const i of rows.slice(0, limit)) {
      const line = make("tr", {}, make("td", {}, m.names[t.rows[i][0]]), make("td", {}, m.kinds[t.rows[i][1]][1]));
      for (const column of columns) {
        for (const part of ["newest", "change"]) {
          const value = cell(i, column, part), td = make("td", {});
          td.append(isKnown(value) ? (part === "change" ? changed(value, t.columns[column].ratio) : shown(value)) : "–");
          for (const why of (t.doubts[part][`${i},${column}`] || [])) {
            used.add(why);
            td.append(make("button", { type: "button", class: "doubt", title: t.reasons[why],
              onclick: () => { reason.textContent = `?${why + 1}: ${t.reasons[why]}`; } }, `?${why + 1}`));
          }
          line.append(td);
        }
      }
      body.append(line);
    }
    table.replaceChildren(make("thead", {}, head), body);
    more.textContent = `show all ${rows.length} rows`;
    more.hidden = rows.length <= limit;
    list.replaceChildren(...[...used].sort((a, b) => a - b).map((why) => make("li", {}, `?${why + 1}: ${t.reasons[why]}`)));
  };
  const changed = (value, isRatio) => isRatio ? `×${shown(value)}` : (value > 0 ? "+" : "") + shown(value);
  const type = select(bar, "type", "type", [["all", "all"], ...typesOf(m).map((one) => [one, one])], () => render());
  const weights = select(bar, "weights", "weights", m.kinds.length > 1 ? [...m.kinds, ["all", "both"]] : m.kinds, () => render());
  const search = make("input", { type: "search", name: "search", size: 14, oninput: () => render() });
  bar.append(make("label", {}, "name has ", search));
  const all = tick(bar, "all", `all ${t.columns.length} numbers`, false, () => render());
  const list = make("ul", { class: "reasons" });
  made.append(bar, make("div", { class: "card" }, table), more, reason, list);
  render();
}

/* ---- start ---- */
function start() {
  const before = data.figures.filter((one) => one.place !== "end");
  before.forEach(figure);
  if (data.matrices) {
    const m = data.matrices, isCosine = (one) => one.group === "cosine";
    explorer(m, "fig-cosines", "How the top subspaces turn", "Against the refresh before, the first one, and the EMA. "
      + "Dashed: what unrelated subspaces would have.", isCosine, "block_cos0_u_overlap");
    explorer(m, "fig-metrics", "Numbers of the matrices over time", m.note, (one) => !isCosine(one), "sigma_max");
    heatMap(m);
    singularValues(m);
    bulk(m);
    matrixTable(m);
  }
  data.figures.filter((one) => one.place === "end").forEach(figure);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    for (const [place, held] of charts) if (held.drawn && place.isConnected) draw(place);
  });
}
async function boot() {
  try {
    const [library, json, block] = await Promise.all(["library", "json", "numbers"].map((id) => inflate("packed-" + id)));
    const text = new TextDecoder();
    document.head.append(Object.assign(document.createElement("script"), { textContent: text.decode(library) }));
    data = unpacked(JSON.parse(text.decode(json)), numbersOf(block));
    start();
    root.dataset.state = "ready";
  } catch (error) {
    /* An old browser, or a page that was cut off: the pictures that readers without scripts see. */
    console.error(error);
    root.dataset.state = "failed";
    const pictures = byId("pictures");
    if (pictures) byId("figures").innerHTML = pictures.textContent;
    byId("figures").prepend(`The interactive figures could not be drawn: ${error.message}`);
  }
}
boot();
})();
