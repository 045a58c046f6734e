/* Figures of matrices, whose number, layer and weights the reader chooses. */
const typesOf = (m) => [...new Set(m.types)];
function rowOf(m, kind, metric, index) {
  const values = m.values[kind]?.[metric], count = m.updates.length;
  return values ? values.subarray(index * count, (index + 1) * count) : null;
}
const hasAny = (row) => row && row.some(isKnown);
const named = (metric) => (metric.unit ? `${metric.label}, ${metric.unit}` : metric.label);
const titled = (metric) => (metric.unit ? `${metric.label}\n${metric.unit}` : metric.label);
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
          gaps: true, hover: `${t("update {n}", { n: "%{x:,}" })}: %{y:.4~g}<extra>${plain(name)}</extra>`, ...extra });
      };
      const members = (type) => m.names.map((_, i) => i).filter((i) => m.types[i] === type);
      if (single >= 0) add(m.names[single], [rowOf(m, kind, metric.key, single)], { look: m.types[single] });
      else if (inOne) members(inOne).forEach((i, at, all) =>
        add(m.names[i], [rowOf(m, kind, metric.key, i)], { color: shade(at / Math.max(1, all.length - 1)) }));
      else for (const type of types)
        add(type, members(type).map((i) => rowOf(m, kind, metric.key, i)).filter(Boolean), { look: type });
      if (kind === m.kinds[0][0] && metric.chance) {
        const chosen = single >= 0 ? [single] : m.names.map((_, i) => i).filter((i) => !inOne || m.types[i] === inOne);
        const groups = single >= 0 || inOne ? [[t("chance"), chosen, { color: "ink" }]]
          : types.map((type) => [t("chance, {type}", { type }), members(type), { look: type, legend: false }]);
        for (const [name, of, extra] of groups) {
          const rows = metric.chance === "0" ? [m.updates.map(() => 0)]
            : of.map((i) => rowOf(m, kind, metric.chance, i)).filter(hasAny);
          if (rows.length) series.push({ name, x: m.updates, y: meanOf(rows), dash: "dash", width: 1, mode: "lines",
            gaps: true, isChance: true, ...extra });
          if (metric.chance === "0") break;
        }
      }
    }
    const zero = metric.chance === "0" ? series.filter((one) => one.isChance) : [];
    zero.forEach((one) => { one.name = t("chance"); one.color = "ink"; delete one.look; one.legend = true; });
    show(place, { x: t("update"), y: titled(metric), log: log.checked, series, revision: metric.key + log.checked });
  };
  const what = select(bar, "metric", t("number"), metrics.map((one) => [one.key, named(one)]), render);
  if (first && metrics.some((one) => one.key === first)) what.value = first;
  const layers = select(bar, "layer", t("layers"), [["means", t("means by type")], ...types.map((type) => ["type:" + type, t("each {type}", { type })]),
    ...m.names.map((name, i) => ["layer:" + i, name])], render);
  const weights = select(bar, "weights", t("weights"),
    m.kinds.length > 1 ? [...m.kinds, ["both", t("both (EMA dotted)")]] : m.kinds, render);
  const log = tick(bar, "log", t("logarithmic"), false, render);
  made.append(bar);
  const place = chart(made, 420);
  render();
}
function heatMap(m) {
  const metrics = m.metrics.filter((one) => m.kinds.some(([kind]) => m.values[kind]?.[one.key]));
  if (!metrics.length || m.updates.length < 2) return;
  const made = section("fig-heat", t("Layer by time"), t("A row is a matrix, the first block on top; a column is a refresh. "
    + "Empty: not computed there, or not finite.")), bar = controls();
  const render = () => {
    const metric = metrics.find((one) => one.key === what.value);
    const at = m.names.map((_, i) => i).filter((i) => type.value === "all" || m.types[i] === type.value)
      .filter((i) => hasAny(rowOf(m, weights.value, metric.key, i)));
    if (type.value === "all") at.sort((a, b) => m.types[a] === m.types[b] ? a - b
      : typesOf(m).indexOf(m.types[a]) - typesOf(m).indexOf(m.types[b]));
    place.style.height = Math.min(1400, Math.max(320, 90 + 15 * at.length)) + "px";
    show(place, { x: t("update"), yaxis: { autorange: "reversed", type: "category", showgrid: false },
      xaxis: { type: "category", nticks: 8, showgrid: false }, revision: metric.key + type.value,
      heat: at.length ? { x: m.updates.map((u) => u.toLocaleString("en")), y: at.map((i) => m.names[i]), log: log.checked,
        z: at.map((i) => rowOf(m, weights.value, metric.key, i)), label: titled(metric) } : null });
  };
  const what = select(bar, "metric", t("number"), metrics.map((one) => [one.key, named(one)]), render);
  if (metrics.some((one) => one.key === "stable_rank")) what.value = "stable_rank";
  const type = select(bar, "type", t("type"), [...typesOf(m).map((one) => [one, one]), ["all", t("all types")]], render);
  const weights = select(bar, "weights", t("weights"), m.kinds, render);
  const log = tick(bar, "log", t("logarithmic colours"), false, render);
  made.append(bar);
  const place = chart(made, 420);
  render();
}
/* From four decades below the greatest value, or the smallest: zeros after rounding would squeeze the rest. */
function decades(values) {
  const known = Array.from(values).filter((value) => value > 0 && isKnown(value));
  const most = known.reduce((a, b) => Math.max(a, b), 0) || 1, least = known.reduce((a, b) => Math.min(a, b), most);
  return [Math.log10(Math.max(least, most * 1e-4) / 1.15), Math.log10(most * 1.15)];
}
function singularValues(m) {
  const kinds = m.kinds.filter(([kind]) => m.spectra[kind]);
  if (!kinds.length) return;
  const made = section("fig-values", t("Singular values of a matrix"), m.spectraNote), bar = controls();
  const render = () => {
    const found = m.spectra[weights.value], one = found.matrices[Number(layer.value)], series = [];
    if (!one) return show(place, { series });
    const count = one.index.length, times = found.updates.length;
    if (over.value === "time") one.index.forEach((index, at) => {
      const y = Array.from({ length: times }, (_, time) => one.values[time * count + at]);
      if (y.some(isKnown)) series.push({ name: "σ" + index, x: found.updates, y, color: shade(at / Math.max(1, count - 1)),
        width: 1.2, gaps: true, mode: times < 30 ? "lines+markers" : "lines", size: 3, legend: false,
        hover: `${t("update {n}", { n: "%{x:,}" })}: %{y:.4~g}<extra>σ<sub>${index}</sub></extra>` });
    });
    else [...new Set([0, times - 1])].forEach((at) => series.push({ name: t("update {n}", { n: found.updates[at].toLocaleString("en") }),
      x: one.index, y: one.values.subarray(at * count, (at + 1) * count), look: m.types[Number(layer.value)],
      dash: at === times - 1 ? "solid" : "dash", width: at === times - 1 ? 2 : 1.2, mode: "lines",
      hover: `σ<sub>%{x}</sub>: %{y:.4~g}<extra>${t("update {n}", { n: found.updates[at].toLocaleString("en") })}</extra>` }));
    const isTime = over.value === "time";
    show(place, { title: m.names[Number(layer.value)], x: isTime ? t("update") : t("index i"), y: t("singular value σᵢ"),
      log: log.checked, series, revision: over.value + log.checked + layer.value,
      yaxis: log.checked ? { range: decades(one.values) } : {} });
  };
  const layer = select(bar, "layer", t("matrix"), m.names.map((name, i) => [i, name]), render);
  const weights = select(bar, "weights", t("weights"), kinds, render);
  const isOne = m.spectra[kinds[0][0]].updates.length < 2;
  const over = select(bar, "over", t("over"), isOne ? [["index", t("index")]]
    : [["time", t("updates")], ["index", t("index: start and now")]], render);
  const log = tick(bar, "log", t("logarithmic"), true, render);
  made.append(bar);
  const place = chart(made, 440);
  render();
}
function bulk(m) {
  const at = Object.keys(m.bulk);
  if (!at.length) return;
  const made = section("fig-bulk", t("Bulk of a spectrum"), t("Bars: the newest values; line: the Marchenko-Pastur law of noise "
    + "with the same median; dashed: its edge, which 99 % of noise stays below.")), bar = controls();
  const told = make("p", { class: "told" });
  const render = () => {
    const one = m.bulk[layer.value], step = one.right / one.counts.length;
    const series = [{ name: t("values"), bars: true, width: step, y: one.counts, x: Array.from(one.counts, (_, i) => (i + 0.5) * step),
      hover: t("around {x}: density {y}", { x: "%{x:.4g}", y: "%{y:.4g}" }) + "<extra></extra>" }];
    if (one.density) series.push({ name: "Marchenko-Pastur", x: Array.from(one.density, (_, i) => (i + 0.5) / one.density.length * one.right),
      y: one.density, mode: "lines", look: m.types[m.names.indexOf(one.name)] });
    told.textContent = one.told;
    show(place, { title: one.name, x: t("singular value σᵢ"), y: t("density"), series, lines: isKnown(one.edge) ? [one.edge] : [],
      log: log.checked, revision: layer.value + log.checked });
  };
  const layer = select(bar, "layer", t("matrix"), at.map((key) => [key, m.bulk[key].label]), render);
  const log = tick(bar, "log", t("logarithmic"), false, render);
  made.append(bar);
  const place = chart(made, 400);
  made.append(told);
  render();
}
