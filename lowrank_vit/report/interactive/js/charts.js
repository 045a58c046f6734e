/* Charts: panels that the library draws when they come near the window, and ready-made figures of panels. */
/* Neither dark nor light, so that all show on both backgrounds. */
const shades = [[132, 84, 214], [62, 124, 228], [30, 158, 158], [112, 176, 72], [222, 160, 40]];
function shade(share) {
  const at = Math.min(0.9999, Math.max(0, share)) * (shades.length - 1), i = Math.floor(at);
  return `rgb(${shades[i].map((low, c) => Math.round(low + (at - i) * (shades[i + 1][c] - low))).join(",")})`;
}
const charts = new Map();
const watcher = new IntersectionObserver((entries) => {
  for (const { isIntersecting, target } of entries) if (isIntersecting) {
    watcher.unobserve(target);
    plotly().then(() => draw(target)).catch(failed);
  }
}, { rootMargin: "400px" });
/* The library takes most of a page's time, so it is loaded after the rest, when the first chart comes near. */
let library;
function plotly() {
  library ||= inflate("packed-library").then((bytes) => {
    document.head.append(Object.assign(document.createElement("script"), { textContent: new TextDecoder().decode(bytes) }));
  });
  return library;
}

/* A place for a panel; it is drawn when it comes near the window. Give another panel to `show` to change it. */
function chart(parent, height) {
  const place = make("div", { style: `height:${height || 310}px` });
  parent.append(make("div", { class: "plot" }, make("h3", {}), place, make("p", { class: "told", hidden: "" })));
  return place;
}
function show(place, panel) {
  const isDrawn = charts.get(place)?.drawn;
  charts.set(place, { panel, drawn: isDrawn });
  if (isDrawn) draw(place);
  else watcher.observe(place);
}
function axis(title, extra) {
  return { title: { text: lines(title || ""), font: { size: 12 }, standoff: 8 }, gridcolor: css("--line"), linecolor: css("--line"),
    zerolinecolor: css("--line"), automargin: true, ...extra };
}
/* Ticks between the powers of ten are written in full: the library's own are "1 5 2 1". */
const logarithmic = { type: "log", tickformat: "~g" };
/* Blocks and updates have no halves: an axis of blocks, or of few updates, has ticks at whole numbers. */
function whole(panel) {
  const xs = (panel.series || []).flatMap((one) => Array.from(one.x));
  if (!xs.length || !xs.every(Number.isInteger)) return {};
  const [low, high] = ends(xs);
  return panel.whole || high - low <= 10 ? { tick0: 0, dtick: Math.max(1, Math.ceil((high - low) / 12)) } : {};
}
/* For a single value the library's axis goes from 1 below to 1 above, where a learning rate cannot be read. */
function fromZero(panel) {
  const [low, high] = ends((panel.series || []).flatMap((one) => Array.from(one.y)).filter(isKnown));
  return low === high && low ? { rangemode: "tozero" } : {};
}
const ends = (values) => values.reduce(([low, high], one) => [Math.min(low, one), Math.max(high, one)], [Infinity, -Infinity]);
const MOST_NAMED = 16;
/* A panel: {title, x, y, log, range, series: [{name, x, y, look | color, dash, width, mode, error, hover, on2}],
   y2, heat: {x, y, z, label, range, scale, log}, bars, lines: [x of a vertical line]}. */
function draw(place) {
  const held = charts.get(place), panel = held.panel, known = (panel.series || []).length;
  held.drawn = true;
  place.previousSibling.textContent = panel.title || "";
  const gone = panel.log ? (panel.series || []).filter((one) => one.y.some((y) => isKnown(y) && y <= 0)) : [];
  place.nextSibling.hidden = !gone.length;
  place.nextSibling.textContent = t("Values of 0 or less are not drawn on a logarithmic axis: {names}.",
    { names: gone.slice(0, 3).map((one) => one.name).join(", ") + (gone.length > 3 ? ", …" : "") });
  const traces = (panel.series || []).flatMap((one) => [...band(one), trace(one, panel)]);
  if (panel.heat) traces.push(heat(panel.heat));
  const few = traces.filter((one) => one.showlegend !== false && one.name).length;
  const layout = {
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", font: { color: css("--ink"), size: 12 },
    margin: { l: 56, r: panel.y2 || panel.heat ? 60 : 16, t: 12, b: 48 },
    showlegend: few > 1 && few <= MOST_NAMED, legend: { orientation: "h", traceorder: "normal", x: 0, y: 1.02, yanchor: "bottom", font: { size: 11 } },
    hovermode: panel.heat ? "closest" : panel.hover || "closest",
    hoverlabel: { bgcolor: css("--card"), bordercolor: css("--muted"), font: { color: css("--ink") } },
    dragmode: isCoarse ? false : "zoom", barmode: "overlay", bargap: 0, uirevision: panel.revision || "all", modebar: { bgcolor: "rgba(0,0,0,0)", color: css("--muted"), activecolor: css("--ink") },
    xaxis: axis(panel.x, { ...(panel.xlog ? logarithmic : whole(panel)), ...(panel.xaxis || {}) }),
    yaxis: axis(panel.y, { ...(panel.log ? logarithmic : { exponentformat: "SI", ...fromZero(panel) }),
      ...(panel.range && !panel.log ? { range: panel.range } : {}), ...(panel.yaxis || {}) }),
    shapes: (panel.lines || []).map((x) => ({ type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper",
      line: { color: css("--mark"), width: 1.3, dash: "dash" } })),
    annotations: known || panel.heat ? [] : [{ text: t("no finite numbers"), showarrow: false, xref: "paper",
      yref: "paper", x: 0.5, y: 0.5, font: { color: css("--muted"), size: 14 } }],
  };
  if (panel.y2) layout.yaxis2 = axis(panel.y2, { overlaying: "y", side: "right", showgrid: false, rangemode: "tozero" });
  Plotly.react(place, traces, layout, { responsive: true, displaylogo: false, displayModeBar: "hover",
    /* Buttons are named one by one, and no server: one of the library's own would send the chart to a service. */
    modeBarButtons: [["toImage", "zoom2d", "pan2d", "resetScale2d"]], plotlyServerURL: "",
    locale: "own", locales: { own: { dictionary: {
      "Download plot as a PNG": t("Download plot as a PNG"), "Zoom": t("Zoom"), "Pan": t("Pan"), "Reset axes": t("Reset axes"),
      "Double-click to zoom back out": t("Double-click to zoom back out") } } },
    toImageButtonOptions: { filename: panel.title || t("figure"), scale: 2 } });
}
/* Below a line the values within one standard deviation of it. */
function band(one) {
  if (!one.band) return [];
  const edge = (sign) => ({ type: "scatter", mode: "lines", x: one.x, y: Array.from(one.y, (y, i) => y + sign * one.band[i]),
    name: `${plain(one.name)}, ± sd`, showlegend: false, line: { color: one.color, width: 0.01 },
    hovertemplate: `%{x:,.6~g}: %{y:.4~g}<extra>${plain(one.name)}, ${sign < 0 ? "−" : "+"} sd</extra>` });
  return [edge(-1), { ...edge(1), fill: "tonexty", fillcolor: one.color + "38" }];
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
    colorbar: { title: { text: lines(one.label || ""), side: "right", font: { size: 11 } }, thickness: 12, ...bar },
    hovertemplate: `%{y}<br>${plain(one.over || t("update"))} %{x}: %{text}<extra></extra>` };
}

/* ---- ready-made figures: panels, in one view or several to choose from ---- */
function figure(one) {
  const made = section("fig-" + one.id, one.title, one.note), bar = controls(), grid = make("div", { class: "panels" });
  const sets = one.weights || { "": one.views }, labels = Object.keys(sets), names = (label) => Object.keys(sets[label]);
  const render = () => {
    const views = sets[weights ? weights.value : labels[0]];
    if (chosen) fill(chosen, Object.keys(views).map((name) => [name, name]));
    grid.replaceChildren();
    for (const panel of views[chosen ? chosen.value : Object.keys(views)[0]])
      show(chart(grid, panel.height), { ...panel, log: log && panel.positive !== false ? log.checked : panel.log });
  };
  const chosen = labels.some((label) => names(label).length > 1)
    ? select(bar, "view", t("show"), names(labels[0]).map((name) => [name, name]), render) : null;
  const weights = labels.length > 1 ? select(bar, "weights", t("weights"), labels.map((one) => [one, one]), render) : null;
  const log = one.logarithmic ? tick(bar, "log", one.logName || t("logarithmic"), one.logarithmic === "on", render) : null;
  if (bar.children.length) made.append(bar);
  made.append(grid);
  render();
}
