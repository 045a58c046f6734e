"""Each example does what it says: scripts in this process, the notebook in a kernel of its own."""

from __future__ import annotations

import ast
import base64
import json
import runpy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from torch import nn

from data_prep.__main__ import main as prepare
from lowrank_vit import SpectralSettings, open_spectra
from tests.documents import ROOT
from tests.waiting import LONG_S

EXAMPLES = ROOT / "examples"
SETTINGS = SpectralSettings(topk=2)


def example(name: str) -> dict[str, Any]:
    return runpy.run_path(str(EXAMPLES / name))


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the first example writes."""
    folder = tmp_path_factory.mktemp("examples") / "watched"
    example("monitor_in_a_loop.py")["main"](str(folder), updates=100)
    return folder


def test_the_monitor_in_a_loop_finds_the_rank_of_its_task(watched: Path) -> None:
    spectra = open_spectra(watched)
    assert (spectra.updates, spectra.names) == ([0, 50, 100], ["0", "2"])
    for name in spectra.names:
        values = spectra.values(name)
        assert values[2] > 1.5 * values[3]


def test_the_loader_in_a_loop_trains_and_scores_each_sample(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prepare(["digits", "--out", str(tmp_path)])
    share = example("loader_in_a_loop.py")["main"](str(tmp_path), epochs=1)
    told = capsys.readouterr().out
    assert "resident loader" in told
    assert f"top-1 {100 * share:.1f} %" in told
    assert share * 360 == pytest.approx(round(share * 360))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_the_callback_in_hugging_faces_trainer(tmp_path: Path) -> None:
    from transformers import Trainer, TrainingArguments, ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=12, image_size=8, patch_size=4
    )
    model = ViTForImageClassification(config)
    images = [{"pixel_values": torch.randn(3, 8, 8), "labels": n % 2} for n in range(8)]
    options = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "report_to": [], "use_cpu": True}
    settings = TrainingArguments(
        str(tmp_path / "out"),
        max_steps=4,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        **options,
    )
    callback = example("spectra_callback.py")["SpectraCallback"](
        str(tmp_path / "watched"), every=2, last_update=4, settings=SETTINGS
    )
    Trainer(model, settings, train_dataset=images, callbacks=[callback]).train()  # type: ignore[arg-type]
    spectra = open_spectra(tmp_path / "watched")
    assert {0, 4} <= {*spectra.updates} <= {0, 2, 4}
    assert {"classifier", "vit.layers.0.mlp.fc1"} <= {*spectra.names}
    torch.testing.assert_close(
        torch.from_numpy(spectra.values("classifier")), torch.linalg.svdvals(model.classifier.weight.double())
    )


def test_the_callback_as_lightning_calls_it(tmp_path: Path) -> None:
    model, optimized = nn.Sequential(nn.Linear(4, 3)), 0
    callback = example("spectra_callback.py")["SpectraCallback"](str(tmp_path), every=1, settings=SETTINGS)
    trainer = SimpleNamespace(is_global_zero=True, global_step=0)
    callback.on_fit_start(trainer, model)
    callback.on_train_start(trainer, model)
    for batch_idx in range(4):  # two batches to an update
        optimized += batch_idx % 2
        trainer.global_step = optimized
        callback.on_train_batch_end(trainer, model, None, None, batch_idx)
        callback.monitor.wait()
    callback.on_train_end(trainer, model)
    callback.on_exception(trainer, model, KeyboardInterrupt())
    assert open_spectra(tmp_path).updates == [0, 1, 2]
    resumed = example("spectra_callback.py")["SpectraCallback"](str(tmp_path), every=1, settings=SETTINGS)
    trainer.global_step = 1
    resumed.on_train_start(trainer, model)
    resumed.on_train_end(trainer, model)
    assert open_spectra(tmp_path).updates == [0, 1]
    other = example("spectra_callback.py")["SpectraCallback"](str(tmp_path / "none"))
    other.on_train_start(SimpleNamespace(is_global_zero=False, global_step=0), model)
    other.on_train_end(trainer, model)
    assert not (tmp_path / "none").exists()
    with pytest.raises(AttributeError):
        other.state_dict()


def test_the_notebook_draws_three_pictures(watched: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = EXAMPLES / "read_spectra.ipynb"
    notebook: Any = nbformat.read(path, as_version=4)
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in notebook.cells)  # none is kept
    monkeypatch.setenv("RUN", str(watched))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    NotebookClient(
        notebook, timeout=LONG_S, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    pictures = [output.data["image/png"] for output in outputs if "data" in output and "image/png" in output.data]
    assert [base64.b64decode(one)[:4] for one in pictures] == [b"\x89PNG"] * 3
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.parametrize("path", sorted(EXAMPLES.iterdir()), ids=lambda path: path.name)
def test_examples_use_public_names_alone(path: Path) -> None:
    import lowrank_vit

    if path.suffix == ".ipynb":
        cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
        text = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    else:
        text = path.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 90
    nodes = [node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom | ast.Import)]
    of_ours = [node for node in nodes if ast.unparse(node).removeprefix("from ").startswith(("lowrank", "data_prep"))]
    assert of_ours
    for node in of_ours:
        assert isinstance(node, ast.ImportFrom)
        assert node.module == "lowrank_vit"
        assert {alias.name for alias in node.names} <= {*lowrank_vit.__all__}
