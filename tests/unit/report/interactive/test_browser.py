"""The page in a real browser: it opens without errors, and what a reader chooses, sorts and zooms changes it.

One browser and one run serve all tests, which share a loaded page where they can.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lowrank_vit import open_spectra
from lowrank_vit.report.language import in_language, texts
from lowrank_vit.report.page import draw_report, write_report
from lowrank_vit.spectral.watching.files import CIRCUITS
from lowrank_vit.spectral.watching.store import SpectraStore
from tests.big_run import write_big_run
from tests.browser import Tab, opened
from tests.reported import fill
from tests.unit.report.spectra.test_circuits import stored
from tests.unit.report.test_compression import content
from tests.unit.report.test_switching import evidence, switch
from tests.waiting import wait_until

EVIL = "<img src=x onerror=\"document.title='hurt'\"><b>x<b>"
SECTIONS = "training cosines metrics heat values bulk table lowrank vectors flows circuits compression data".split()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run with all that a page shows, whose name and whose layers hold HTML, and its report."""
    path = tmp_path_factory.mktemp("pages") / EVIL
    path.mkdir()
    fill(path)
    circuits = {f"spec/circuit/{block}": one for block, one in stored(3).items()}
    SpectraStore(path / "spectra", 1e9, {CIRCUITS: "raw"}).save(4, {}, circuits=circuits)
    log = path / "metrics.jsonl"
    named = log.read_text().replace("/blocks.2.mlp.fc2/", f"/{json.dumps(EVIL)[1:-1]}/")
    named = re.sub(r'"([^"]*)/alpha": ', r'"\1/block_cos0_u_overlap": 0.5, "\1/alpha_sigma": 9, "\1/alpha": ', named)
    flows = {f"spec/flow/blocks.{block}/entropy": 1.5 for block in range(3)}
    events = [
        *({"kind": "flow", "update": update, "spec/flow/images": 40, **flows} for update in (5, 10)),
        evidence(8),
        switch(10, ["blocks.0.attn.qkv", "blocks.0.mlp.fc1"], 2),
    ]
    log.write_text(named + "".join(json.dumps(event) + "\n" for event in events))
    (path / "compression.json").write_text(json.dumps(content()))
    write_report(path, png=False)
    return path


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with opened(tmp_path_factory.mktemp("profile")) as tab:
        yield tab


@pytest.fixture
def page(run: Path, tab: Tab) -> Tab:
    """The run's page in a wide window; loaded anew only where another was shown."""
    page = run / "report.html"
    if tab.js("location.href") != page.resolve().as_uri() or tab.js("innerWidth") != 1400:
        tab.open(page)
    tab.errors.clear()
    return tab


def drawn(tab: Tab, figure: str) -> None:
    tab.js(f"document.getElementById('{figure}').scrollIntoView()")
    tab.wait(f"document.querySelector('#{figure} .js-plotly-plot')")


def of_plot(tab: Tab, figure: str, expression: str) -> Any:
    return tab.js(
        f"(() => {{ const plot = document.querySelector('#{figure} .js-plotly-plot'); return {expression}; }})()"
    )


@pytest.mark.parametrize(("width", "scheme"), [(420, "dark"), (1400, "light")])
def test_a_page_opens_without_errors_and_is_no_wider_than_its_window(
    run: Path, tab: Tab, width: int, scheme: str
) -> None:
    tab.open(run / "report.html", width=width, scheme=scheme)
    assert tab.js("document.documentElement.dataset.state") == "ready"
    sections = tab.js("[...document.querySelectorAll('section.interactive')].map((one) => one.id)")
    assert sections == [f"fig-{name}" for name in SECTIONS]
    for name in sections:
        if name not in ("fig-table", "fig-data"):
            drawn(tab, name)
    assert tab.js("document.documentElement.scrollWidth") <= width
    assert tab.js("getComputedStyle(document.body).backgroundColor") == (
        "rgb(246, 248, 250)" if scheme == "light" else "rgb(18, 24, 30)"
    )
    assert tab.js("document.title") != "hurt"
    assert tab.js("document.querySelectorAll('main img').length") == 0
    assert tab.errors == []


def test_a_reader_chooses_a_number_a_layer_and_weights(page: Tab) -> None:
    tab = page
    drawn(tab, "fig-metrics")
    assert set(of_plot(tab, "fig-metrics", "plot.data.map((one) => one.name)")) >= {"attn.proj", "mlp.fc1"}
    tab.choose("#fig-metrics select[name=layer]", "type:attn.proj")
    names = of_plot(tab, "fig-metrics", "plot.data.map((one) => one.name)")
    assert names == [f"blocks.{block}.attn.proj" for block in range(3)]
    tab.choose("#fig-metrics select[name=weights]", "both")
    assert len(of_plot(tab, "fig-metrics", "plot.data")) == 6
    tab.choose("#fig-metrics select[name=metric]", "stable_rank")
    assert of_plot(tab, "fig-metrics", "[...plot.data[0].y]") == [1, 2, 3]
    tab.click("#fig-metrics input[name=log]")
    assert of_plot(tab, "fig-metrics", "plot.layout.yaxis.type") == "log"
    tab.choose("#fig-heat select[name=type]", "all")
    drawn(tab, "fig-heat")
    assert len(of_plot(tab, "fig-heat", "plot.data[0].z")) == 12
    assert tab.errors == []


def test_an_axis_is_read_without_guessing(page: Tab) -> None:
    tab = page
    drawn(tab, "fig-cosines")
    told = "document.querySelector('#fig-cosines .plot .told')"
    assert tab.js(f"{told}.hidden")
    tab.click("#fig-cosines input[name=log]")
    assert tab.js(f"!{told}.hidden && {told}.textContent") == (
        "Values of 0 or less are not drawn on a logarithmic axis: chance."
    )
    tab.click("#fig-cosines input[name=log]")
    assert tab.js(f"{told}.hidden")
    drawn(tab, "fig-values")
    ticks = "[...plot.querySelectorAll('.ytick text')].map((one) => Number(one.textContent))"
    heights = of_plot(tab, "fig-values", ticks)
    assert len(heights) > 2
    assert heights == sorted(heights)
    assert min(heights) < 1 < max(heights)
    drawn(tab, "fig-training")
    assert tab.js("document.querySelector('#fig-training label').textContent.trim()") == "logarithmic loss"
    assert tab.errors == []


def test_of_one_epoch_a_learning_rate_and_its_update_can_be_read(tab: Tab, tmp_path: Path) -> None:
    (tmp_path / "summary.csv").write_text("epoch,update,eval_top1,lr\n0,44,9.72,1e-05\n")
    write_report(tmp_path, png=False)
    tab.open(tmp_path / "report.html")
    drawn(tab, "fig-training")
    plot = "[...document.querySelectorAll('#fig-training .js-plotly-plot')].at(-1)"
    tab.wait(f"{plot}?.data[0].name === 'lr'")
    low, high = tab.js(f"{plot}.layout.yaxis.range")
    assert 0 <= low < 1e-5 < high < 1e-4
    ticks = tab.js(f"[...{plot}.querySelectorAll('.xtick text')].map((one) => one.textContent)")
    assert "44" in ticks
    assert all("." not in one for one in ticks)


def test_a_drag_zooms_and_a_double_click_ends_it(page: Tab) -> None:
    tab = page
    drawn(tab, "fig-metrics")
    before = of_plot(tab, "fig-metrics", "[...plot.layout.xaxis.range]")
    left, top, width, height = tab.place("#fig-metrics .nsewdrag")
    across, down = left + 0.2 * width, top + 0.5 * height
    tab.mouse("mouseMoved", across, down)
    tab.mouse("mousePressed", across, down, 1)
    for share in (0.3, 0.5, 0.6):
        tab.mouse("mouseMoved", left + share * width, down, 1)
    tab.mouse("mouseReleased", left + 0.6 * width, down)
    plot = "document.querySelector('#fig-metrics .js-plotly-plot')"
    tab.wait(f"{plot}.layout.xaxis.range[0] > {before[0]} && {plot}.layout.xaxis.range[1] < {before[1]}")
    is_back = f"Math.abs({plot}.layout.xaxis.range[0] - {before[0]}) < 1e-6"
    for _ in range(20):  # on a busy machine two clicks are too far apart for Plotly to be one double click
        for clicks in (1, 2):
            tab.mouse("mousePressed", across, down, 1, clicks)
            tab.mouse("mouseReleased", across, down, 0, clicks)
        if tab.js(is_back):
            break
    tab.wait(is_back)
    assert tab.errors == []


def test_the_table_sorts_and_says_why_a_number_is_doubted(page: Tab) -> None:
    tab = page
    cells = "[...document.querySelectorAll('#fig-table tbody tr')].map((row) => row.cells[{}].textContent)"
    names = tab.js(cells.format(0))
    assert len(names) == 12
    assert EVIL in names
    headings = tab.js("[...document.querySelectorAll('#fig-table thead th')].map((one) => one.textContent)")
    assert [one for one in headings if one.startswith("stable rank")] == ["stable rank", "stable rank ÷ start"]
    notes = tab.js("[...document.querySelectorAll('#fig-table .reasons li')].map((one) => one.textContent)")
    assert [one.partition(":")[0] for one in notes] == [f"?{i + 1}" for i in range(len(notes))]
    tab.click('#fig-table th button[data-sort="name"]')
    tab.click('#fig-table th button[data-sort="name"]')
    assert tab.js(cells.format(0))[0] == "blocks.2.mlp.fc1"
    assert tab.js("document.querySelector('#fig-table th').getAttribute('aria-sort')") == "descending"
    tab.js("document.querySelector('#fig-table input[name=search]').focus()")
    tab.call("Input.insertText", text="BLOCKS.1.")
    tab.wait("document.querySelectorAll('#fig-table tbody tr').length === 4")
    tab.click("#fig-table .doubt")
    why = tab.js("document.querySelector('#fig-table .told').textContent")
    assert "smaller than the standard error" in why
    assert why in tab.js("[...document.querySelectorAll('#fig-table .reasons li')].map((one) => one.textContent)")
    assert tab.errors == []


def test_without_scripts_the_pictures_are_shown_and_with_them_they_are_not_loaded(run: Path, tab: Tab) -> None:
    content = (run / "report.html").read_text()
    picture = '<img alt="a picture" src="data:image/png;base64,iVBORw0KGgo=">'
    page = run / "with pictures.html"
    page.write_text(content.replace("</main>", f'<noscript id="pictures"><figure>{picture}</figure></noscript></main>'))
    tab.open(page, scripts=False)
    tab.wait("document.querySelectorAll('main img').length === 1")
    tab.open(page)
    assert tab.js("document.querySelectorAll('main img').length") == 0
    page.write_text(page.read_text().replace('id="packed-json">', 'id="packed-json">x'))
    tab.open(page)
    assert tab.js("document.documentElement.dataset.state") == "failed"
    assert tab.js("document.querySelectorAll('#figures img').length") == 1
    assert "could not be drawn" in tab.js("document.getElementById('figures').textContent")


@pytest.mark.parametrize(
    ("figure", "view"),
    [("lowrank", "evidence by type"), ("flows", "over the validations"),
     ("circuits", "blocks.1 reads the block before"), ("compression", "ranks by layer")],
)  # fmt: skip
def test_flows_circuits_switches_and_a_compression_are_drawn_where_they_are_recorded(
    page: Tab, figure: str, view: str
) -> None:
    drawn(page, f"fig-{figure}")
    page.choose(f"#fig-{figure} select[name=view]", view)
    page.wait(f"document.querySelector('#fig-{figure} .js-plotly-plot')?.data.length")
    assert page.errors == []


ENGLISH = re.compile(r"[A-Za-z][a-z]{2,} [a-z]{2,}")
OF_THE_PAGE = """(() => {
  const found = [], walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const one = walker.currentNode;
    const left = "script, style, noscript, pre, .pairs, h1, h1 + .sub";
    if (!one.parentElement.closest(left)) found.push(one.textContent.trim());
  }
  for (const one of document.querySelectorAll("[title], [data-title]"))
    found.push(one.getAttribute("title") || one.getAttribute("data-title"));
  return found.filter(Boolean);
})()"""


def test_a_chinese_page_has_no_english_but_names(run: Path, tab: Tab) -> None:
    with in_language("zh"):
        (run / "zh.html").write_text(draw_report(run, png=False).html)
        others = {text for text, own in texts().items() if text != own and len(text) > 3}
    tab.open(run / "zh.html", width=1400)
    for name in SECTIONS:
        if name not in ("table", "data"):
            drawn(tab, f"fig-{name}")
    for name in ("lowrank", "flows", "circuits", "compression"):
        for view in tab.js(f"[...document.querySelectorAll('#fig-{name} select option')].map((one) => one.value)"):
            tab.choose(f"#fig-{name} select", view)
            drawn(tab, f"fig-{name}")
    tab.click("#fig-table input[name=all]")
    shown = [text.replace(EVIL, "").replace("report --export csv DIR", "") for text in tab.js(OF_THE_PAGE)]
    assert len(shown) > 300
    assert [text for text in shown if ENGLISH.search(text) or text in others] == []
    assert tab.js("document.documentElement.lang") == "zh-CN"
    assert tab.errors == []


def test_tables_are_downloaded_with_the_numbers_of_the_run_and_read_by_the_pages_own_recipes(
    tab: Tab, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pandas = pytest.importorskip("pandas")
    run = write_big_run(tmp_path / "run", 0.001, blocks=1)
    write_report(run, png=False)
    tab.open(run / "report.html")
    tab.call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(tmp_path))
    for name in ("scalars", "singular_values", "epochs", "train"):
        tab.click(f"#fig-data button[data-table={name}]")
        wait_until(lambda name=name: (tmp_path / f"{name}.csv").exists(), f"{name}.csv")
    spectra = open_spectra(run)
    table = pandas.read_csv(tmp_path / "scalars.csv")
    wanted = spectra.to_pandas(*(set(table.columns) - {"update", "ema", "name"}))
    keys = ["update", "ema", "name"]
    table, wanted = (one.set_index(keys).sort_index().sort_index(axis=1) for one in (table, wanted))
    assert table.shape == (3 * 8, len(wanted.columns))
    pandas.testing.assert_frame_equal(table, wanted, rtol=7e-5, check_dtype=False)
    values = pandas.read_csv(tmp_path / "singular_values.csv")
    updates, all_TK = spectra.series("blocks.0.attn.proj", ema=True)
    own = values[values.ema & (values.name == "blocks.0.attn.proj")].drop(columns=keys)
    assert set(values["update"]) == set(updates.tolist())
    np.testing.assert_allclose(own, all_TK[:, [int(name[1:]) - 1 for name in own.columns]], rtol=7e-5)
    epochs = pandas.read_csv(tmp_path / "epochs.csv")
    pandas.testing.assert_frame_equal(epochs, pandas.read_csv(run / "summary.csv"), check_dtype=False)
    assert len(pandas.read_csv(tmp_path / "train.csv").columns) == 6
    monkeypatch.chdir(tmp_path)
    for library in ("pandas", "numpy"):
        recipe = tab.js(f"document.querySelector('.recipe[data-library={library}]').textContent")
        assert len(recipe.splitlines()) == 3
        exec(recipe, {})
    assert tab.errors == []


def test_a_tenth_of_a_long_run_is_a_page_below_6_mb_that_says_what_it_leaves_out(tab: Tab, tmp_path: Path) -> None:
    run = write_big_run(tmp_path / "big", 0.1)
    write_report(run, png=False)
    page = run / "report.html"
    assert page.stat().st_size < 4e6  # the pictures take up to 2 MB more
    assert "This page holds" in page.read_text()
    tab.open(page)
    assert tab.js("document.documentElement.dataset.state") == "ready"
    drawn(tab, "fig-values")
    tab.choose("#fig-values select[name=layer]", "47")
    assert of_plot(tab, "fig-values", "plot.data.length") > 20
    assert tab.errors == []
