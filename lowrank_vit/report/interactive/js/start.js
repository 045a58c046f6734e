function start() {
  const before = data.figures.filter((one) => one.place !== "end");
  before.forEach(figure);
  if (data.matrices) {
    const m = data.matrices, isCosine = (one) => one.group === "cosine";
    explorer(m, "fig-cosines", t("How the top subspaces turn"), t("Against the refresh before, the first one, and the EMA. "
      + "Dashed: what unrelated subspaces would have."), isCosine, "block_cos0_u_overlap");
    explorer(m, "fig-metrics", t("Numbers of the matrices over time"), m.note, (one) => !isCosine(one), "sigma_max");
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
    byId("figures").prepend(t("The interactive figures could not be drawn: {why}", { why: error.message }));
  }
}
boot();
