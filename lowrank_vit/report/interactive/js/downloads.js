/* Tables for other programs: CSV of the page's data. Columns are those of `report --export csv`. */
const cellOf = (value) => {
  if (typeof value === "number") return Number.isNaN(value) ? "" : Number.isFinite(value)
    ? String(Number.isInteger(value) ? value : Number(value.toPrecision(6))) : value > 0 ? "inf" : "-inf";
  const text = value === null || value === undefined ? "" : String(value);
  return /[",\n\r]/.test(text) ? `"${text.replace(/"/g, '""')}"` : text;
};
const boolOf = (kind) => (kind === "spec_ema" ? "True" : "False");
/* By name: {columns, count, rows: a generator of rows}. */
function tablesToLoad() {
  const found = {};
  for (const [name, columns] of Object.entries(data.tables || {})) {
    const names = Object.keys(columns), of = Object.values(columns), count = of[0].length;
    found[name] = { columns: names, count, * rows() { for (let i = 0; i < count; i++) yield of.map((one) => one[i]); } };
  }
  const m = data.matrices;
  if (!m) return { ...found, ...linesToLoad() };
  const keys = m.metrics.map((one) => one.key), none = [];
  found.scalars = { columns: ["update", "ema", "name", ...keys], count: m.updates.length * m.kinds.length * m.names.length,
    * rows() {
      for (let at = 0; at < m.updates.length; at++) for (const [kind] of m.kinds) for (let i = 0; i < m.names.length; i++)
        yield [m.updates[at], boolOf(kind), m.names[i],
          ...keys.map((key) => (m.values[kind][key] || none)[i * m.updates.length + at])];
    } };
  const spectra = Object.entries(m.spectra), indices = new Set();
  for (const [, one] of spectra) for (const of of Object.values(one.matrices)) of.index.forEach((i) => indices.add(i));
  const columns = [...indices].sort((a, b) => a - b);
  const times = spectra.flatMap(([kind, one]) => Array.from(one.updates, (update, time) => ({ kind, one, update, time })));
  times.sort((a, b) => a.update - b.update);
  if (columns.length) found.singular_values = { columns: ["update", "ema", "name", ...columns.map((i) => "s" + i)],
    count: times.reduce((sum, { one }) => sum + Object.keys(one.matrices).length, 0),
    * rows() {
      for (const { kind, one, update, time } of times) for (const [place, of] of Object.entries(one.matrices)) {
        const at = new Map(Array.from(of.index, (index, column) => [index, of.values[time * of.index.length + column]]));
        yield [update, boolOf(kind), m.names[place], ...columns.map((index) => at.get(index))];
      }
    } };
  return found;
}
/* Every point of the ready-made figures, for pages that have no others. */
function linesToLoad() {
  const points = [];
  for (const figure of data.figures) for (const [weights, views] of Object.entries(figure.weights || { "": figure.views }))
    for (const [view, panels] of Object.entries(views)) for (const panel of panels) for (const line of panel.series || [])
      Array.prototype.forEach.call(line.x, (x, i) => points.push(
        [figure.id, weights, view, panel.title, line.name, line.text ? line.text[i] : "", x, line.y[i], line.band?.[i]]));
  const columns = ["figure", "weights", "view", "panel", "line", "point", "x", "y", "sd"];
  return points.length ? { lines: { columns, count: points.length, rows: () => points } } : {};
}
function csvOf(table) {
  const lines = [table.columns.map(cellOf).join(",")];
  for (const row of table.rows()) lines.push(row.map(cellOf).join(","));
  return lines.join("\n") + "\n";
}
function download(name, text) {
  const link = make("a", { href: URL.createObjectURL(new Blob([text], { type: "text/csv" })), download: name });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60000);
}
/* Three lines that read a table, that of the matrices' numbers if there is one. */
function recipes(name, table) {
  const isOver = table.columns.includes("update");
  const column = isOver ? table.columns.find((one) => !["update", "ema", "name", "epoch"].includes(one)) || "update"
    : table.columns.at(-1);
  const quoted = (text) => JSON.stringify(text), file = quoted(name + ".csv");
  const where = table.columns.includes("name") ? `table["name"] == ${quoted(data.matrices.names[0])}` : "";
  return {
    pandas: `import pandas\ntable = pandas.read_csv(${file})\nprint(table${where && `[${where}]`}${isOver ? '.set_index("update")' : ""}[${quoted(column)}])`,
    numpy: `import numpy\ntable = numpy.genfromtxt(${file}, delimiter=",", names=True, dtype=None, encoding="utf-8")\n`
      + `print(table[${quoted(column)}]${where && `[${where}]`})`,
  };
}
function downloads() {
  const tables = tablesToLoad(), names = Object.keys(tables);
  if (!names.length) return;
  const made = section("fig-data", t("Data"), data.exports
    ? t("Tables as CSV with the data of this page, to at least four digits. "
      + "What this page leaves out is listed at its end; report --export csv DIR writes everything.")
    : t("Tables as CSV with the data of this page, to at least four digits.")), bar = controls();
  for (const name of names) bar.append(make("button", { type: "button", "data-table": name,
    onclick: () => download(name + ".csv", csvOf(tables[name])) }, t("{file}: {rows} rows, {columns} columns",
    { file: name + ".csv", rows: tables[name].count.toLocaleString("en"), columns: tables[name].columns.length })));
  made.append(bar);
  const of = names.includes("scalars") ? "scalars" : names[0];
  for (const [library, text] of Object.entries(recipes(of, tables[of])))
    made.append(make("p", { class: "sub" }, t("To read one with {library}:", { library })), make("pre", { class: "recipe", "data-library": library }, text));
}
