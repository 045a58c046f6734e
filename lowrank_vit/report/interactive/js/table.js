/* The table by matrix. */
const AT_ONCE = 150;
function matrixTable(m) {
  const held = m.table;
  if (!held || !held.rows.length) return;
  const made = section("fig-table", t("Every matrix"), held.note), bar = controls();
  let order = null, rising = false, limit = AT_ONCE;
  const cell = (row, column, part) => held[part][row * held.columns.length + column];
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
    const columns = held.columns.map((_, i) => i).filter((i) => all.checked || held.columns[i].first);
    let rows = held.rows.map((_, i) => i).filter((i) => (type.value === "all" || m.types[held.rows[i][0]] === type.value)
      && (weights.value === "all" || m.kinds[held.rows[i][1]][0] === weights.value)
      && m.names[held.rows[i][0]].toLowerCase().includes(search.value.toLowerCase()));
    if (order !== null && order !== "name") {
      const [part, column] = order.split(":");
      const key = (i) => cell(i, Number(column), part);
      rows.sort((a, b) => isKnown(key(a)) !== isKnown(key(b)) ? (isKnown(key(a)) ? -1 : 1)
        : (rising ? 1 : -1) * ((isKnown(key(a)) ? key(a) - key(b) : 0)) || a - b);
    } else if (order === "name") rows.sort((a, b) => (rising ? 1 : -1) * (m.names[held.rows[a][0]]
      .localeCompare(m.names[held.rows[b][0]], "en", { numeric: true }) || held.rows[a][1] - held.rows[b][1]));
    const head = make("tr", {}, heading(t("matrix"), "name"), make("th", {}, t("weights")));
    for (const i of columns) head.append(heading(held.columns[i].label, "newest:" + i), heading(`${held.columns[i].label} ${held.columns[i].ratio ? t("÷ start") : t("− start")}`, "change:" + i));
    const used = new Map(), body = make("tbody");
    for (const i of rows.slice(0, limit)) {
      const line = make("tr", {}, make("td", {}, m.names[held.rows[i][0]]), make("td", {}, m.kinds[held.rows[i][1]][1]));
      for (const column of columns) {
        for (const part of ["newest", "change"]) {
          const value = cell(i, column, part), td = make("td", {});
          td.append(isKnown(value) ? (part === "change" ? changed(value, held.columns[column].ratio) : shown(value)) : "–");
          for (const why of (held.doubts[part][`${i},${column}`] || [])) {
            if (!used.has(why)) used.set(why, `?${used.size + 1}`);
            const mark = used.get(why), words = `${mark}: ${held.reasons[why]}`;
            td.append(make("button", { type: "button", class: "doubt", title: held.reasons[why],
              onclick: () => { reason.textContent = words; } }, mark));
          }
          line.append(td);
        }
      }
      body.append(line);
    }
    table.replaceChildren(make("thead", {}, head), body);
    more.textContent = t("show all {n} rows", { n: rows.length });
    more.hidden = rows.length <= limit;
    list.replaceChildren(...[...used].map(([why, mark]) => make("li", {}, `${mark}: ${held.reasons[why]}`)));
    reason.textContent = "";  /* marks are numbered again */
  };
  const changed = (value, isRatio) => isRatio ? `×${shown(value)}` : (value > 0 ? "+" : "") + shown(value);
  const type = select(bar, "type", t("type"), [["all", t("all")], ...typesOf(m).map((one) => [one, one])], () => render());
  const weights = select(bar, "weights", t("weights"), m.kinds.length > 1 ? [...m.kinds, ["all", t("both")]] : m.kinds, () => render());
  const search = make("input", { type: "search", name: "search", size: 14, oninput: () => render() });
  bar.append(make("label", {}, t("name has") + " ", search));
  const all = tick(bar, "all", t("all {n} numbers", { n: held.columns.length }), false, () => render());
  const list = make("ul", { class: "reasons" });
  made.append(bar, make("div", { class: "card" }, table), more, reason, list);
  render();
}
