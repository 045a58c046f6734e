function start() {
  const before = data.figures.filter((one) => one.place !== "end");
  before.forEach(figure);
  if (data.matrices) {
    const m = data.matrices, isCosine = (one) => one.group === "cosine";
    explorer(m, "fig-cosines", t("How the top subspaces turn"), t("Compared with the refresh before, the first one, and the EMA. "
      + "Dashed: the values of unrelated subspaces."), isCosine, "block_cos0_u_overlap");
    explorer(m, "fig-metrics", t("Numbers of the matrices over time"), m.note, (one) => !isCosine(one), "sigma_max");
    heatMap(m);
    singularValues(m);
    bulk(m);
    matrixTable(m);
  }
  data.figures.filter((one) => one.place === "end").forEach(figure);
  downloads();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => redraw((held) => held.drawn));
  addEventListener("beforeprint", () => { if (window.Plotly) redraw(() => true); });
}
function redraw(wanted) {
  for (const [place, held] of charts) if (place.isConnected && wanted(held)) draw(place);
}
/* An old browser, or an incomplete page: show the pictures that readers without scripts see. */
function failed(error) {
  if (root.dataset.state === "failed") return;
  console.error(error);
  root.dataset.state = "failed";
  const pictures = byId("pictures");
  if (pictures) byId("figures").innerHTML = pictures.textContent;
  byId("figures").prepend(t("The interactive figures could not be drawn: {why}", { why: error.message }));
}
async function boot() {
  try {
    const [json, block] = await Promise.all(["json", "numbers"].map((id) => inflate("packed-" + id)));
    data = unpacked(JSON.parse(new TextDecoder().decode(json)), numbersOf(block));
    start();
    root.dataset.state = "ready";
  } catch (error) {
    failed(error);
  }
}
boot();
