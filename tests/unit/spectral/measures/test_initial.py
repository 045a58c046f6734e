"""Single entries far out of fresh weights: found, told by monitor, analysis and report, and drawn anew."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from lowrank_vit.analyze_spectrum import main as analyze
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.report.read import read_analysis, read_run
from lowrank_vit.spectral.measures.initial import FarEntry, far_entries, redraw_far_entries
from lowrank_vit.spectral.watching.stored import open_spectra
from lowrank_vit.training.models import make_model
from lowrank_vit.training.setup import silent
from tests.monitors import watch
from tests.spectra import tiny_vit

NAME = "blocks.1.mlp.fc1"


def noise(*shape: int, deviation: float = 0.02, dtype: torch.dtype = torch.float32) -> Tensor:
    return (deviation * torch.randn(shape, generator=torch.Generator().manual_seed(0))).to(dtype)


def spiked_vit() -> nn.Module:
    model = tiny_vit()
    with torch.no_grad():
        model.get_parameter(f"{NAME}.weight")[3, 5] = -2.0
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(8, 8), (96, 64), (700, 300), (12, 3, 4, 4)])
def test_planted_entries_are_found_and_nothing_else(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = noise(*shape, dtype=dtype)
    assert far_entries(weight) == []
    places = [(0,) * len(shape), tuple(side - 1 for side in shape)]
    for place, value in zip(places, (2.0, -2.0), strict=True):
        weight[place] = value
    found = far_entries(weight)
    assert [(one.at, one.value) for one in found] == [(places[0], 2.0), (places[1], -2.0)]
    assert all(70 < one.deviations < 140 for one in found)
    assert far_entries(weight.movedim(0, -1)) != []  # whatever its strides
    assert FarEntry.of(json.loads(json.dumps(found[0].content()))) == found[0]


@pytest.mark.parametrize(
    "weight",
    [
        torch.zeros(20, 20),
        torch.eye(20) * 3,
        torch.full((20, 20), float("nan")),
        noise(20, 20).index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("inf"))),
        torch.rand(200, 200, generator=torch.Generator().manual_seed(0)) - 0.5,
        torch.distributions.StudentT(1.5).sample((200, 200)),
        torch.tensor([[1.0, 1.1, 1.2, 50.0]]),
        torch.ones(20, 20, dtype=torch.int64),
    ],
    ids=["zero", "eye", "nan", "inf", "uniform", "heavy", "few", "integers"],
)
def test_where_no_deviation_is_known_or_no_entry_single_none_is_found(weight: Tensor) -> None:
    assert far_entries(weight) == []


def test_the_monitor_tells_of_them_at_update_0_and_a_resumed_one_keeps_that(tmp_path: Path) -> None:
    said: list[str] = []
    with watch(spiked_vit(), tmp_path / "spectra", say=said.append) as monitor:
        monitor.observe(0)
        monitor.observe(2)
    (line,) = said
    assert f"{NAME}[3, 5] = -2 (" in line
    assert "--fix-init" in line
    with watch(tiny_vit(), tmp_path / "spectra", say=said.append, resumed_update=2, recorded_update=2) as monitor:
        monitor.observe(4)
    assert said == [line]
    found = open_spectra(tmp_path / "spectra").far_entries
    assert [(name, [one.at for one in of]) for name, of in found.items()] == [(NAME, [(3, 5)])]
    assert [note for note in read_run(tmp_path).notes if f"{NAME}[3, 5] = -2 (" in note]


def test_ordinary_weights_are_said_nothing_of(tmp_path: Path) -> None:
    said: list[str] = []
    with watch(tiny_vit(), tmp_path, say=said.append) as monitor:
        monitor.observe(0)
    assert said == []
    assert "far_entries" not in json.loads((tmp_path / "index.json").read_text())


def test_the_analysis_and_its_report_tell_of_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"arch": "vit", "epoch": 0, "state_dict": spiked_vit().state_dict()}, tmp_path / "a.pth")
    analyze(["--checkpoint", str(tmp_path / "a.pth"), "--save-dir", str(tmp_path), "--topk", "2"])
    assert f"{NAME}[3, 5] = -2 (" in capsys.readouterr().out
    layers = json.loads((tmp_path / "vit_spectral.json").read_text())["layers"]
    assert layers[NAME]["far_entries"][0]["at"] == [3, 5]
    assert layers["blocks.0.mlp.fc1"]["far_entries"] == []
    assert any(f"{NAME}[3, 5] = -2 (" in note for note in read_analysis(tmp_path / "vit_spectral.json").notes)


def test_redrawn_entries_are_ordinary_the_same_for_a_seed_and_all_else_stays() -> None:
    first, again, other = (spiked_vit() for _ in range(3))
    before, state = copy.deepcopy(first.state_dict()), torch.get_rng_state()
    found = redraw_far_entries(first, 1)
    assert [(name, of[0].at) for name, of in found.items()] == [(f"{NAME}.weight", (3, 5))]
    assert redraw_far_entries(first, 1) == {}
    redraw_far_entries(again, 1)
    redraw_far_entries(other, 2)
    assert torch.equal(torch.get_rng_state(), state)
    own, same, new = (model.get_parameter(f"{NAME}.weight")[3, 5].item() for model in (first, again, other))
    assert own == same != new
    before[f"{NAME}.weight"][3, 5] = own
    assert all(torch.equal(w, before[name]) for name, w in first.state_dict().items())


def test_a_fresh_model_is_mended_where_that_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lowrank_vit.training.models.create_model", lambda *_, **__: spiked_vit())
    plain = make_model(parse([]), 3, None, None, silent)
    assert plain.get_parameter(f"{NAME}.weight")[3, 5] == -2
    said: list[str] = []
    mended = make_model(parse(["--fix-init"]), 3, None, None, said.append)
    assert mended.get_parameter(f"{NAME}.weight")[3, 5].abs() < 1
    assert "--fix-init has redrawn" in said[0]


@pytest.mark.parametrize("start", [["--pretrained"], ["--initial-checkpoint", "a"], ["--pretrained-path", "a"]])
def test_weights_that_are_not_fresh_are_not_redrawn(start: list[str]) -> None:
    with pytest.raises(UserError, match=f"--fix-init redraws fresh weights, but {start[0]} starts"):
        parse(["--fix-init", *start])
