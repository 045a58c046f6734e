"""The offline analysis: the monitor's numbers from a checkpoint file, as a table that fits and JSON that reads back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.cells import cell_len
from timm.models.vision_transformer import VisionTransformer

from data_prep.errors import UserError
from lowrank_vit.analyze_spectrum import main
from lowrank_vit.spectral.analyze import LayerSpectrum, analyze_weights, as_json
from lowrank_vit.spectral.monitor import SpectralMonitor
from lowrank_vit.spectral.select import DEFAULT_TARGETS
from lowrank_vit.spectral.solve import singular_values_svd

ARCH = "vit_tiny_patch16_224"


def tiny_vit(seed: int) -> VisionTransformer:
    torch.manual_seed(seed)
    return VisionTransformer(img_size=16, patch_size=8, embed_dim=16, depth=2, num_heads=2, num_classes=3)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    path = tmp_path / "last.pth.tar"
    content = {
        "arch": ARCH,
        "epoch": 3,
        "state_dict": tiny_vit(0).state_dict(),
        "state_dict_ema": tiny_vit(1).state_dict(),
    }
    torch.save(content, path)
    return path


def analyze(checkpoint: Path, *flags: str) -> dict[str, Any]:
    out = checkpoint.parent / "out"
    main(["--checkpoint", str(checkpoint), "--save-dir", str(out), *flags])
    assert [path.name for path in out.iterdir()] == [f"{ARCH}_spectral.json"]
    return json.loads((out / f"{ARCH}_spectral.json").read_text())


@pytest.mark.parametrize("kind", ["spec", "spec_ema"])
def test_numbers_are_the_monitors_bit_for_bit(checkpoint: Path, tmp_path: Path, kind: str) -> None:
    monitor = SpectralMonitor(
        tiny_vit(0), tiny_vit(1), targets=DEFAULT_TARGETS, every=1, topk=4, interval=3, store_dir=tmp_path / "spectra"
    )
    monitor.observe(0)
    monitor.close()
    (record,) = monitor.records()
    ema = ["--use-ema"] if kind == "spec_ema" else []
    content = analyze(checkpoint, "--topk", "4", "--interval", "3", *ema)
    assert content["meta"]["epoch"] == 3
    assert content["meta"]["model"] == ARCH
    assert content["meta"]["use_ema"] is bool(ema)
    assert list(content["layers"]) == list(analyze_weights(tiny_vit(0).state_dict(), DEFAULT_TARGETS))
    for name, layer in content["layers"].items():
        for metric in ("sigma_max", "stable_rank", "effective_rank"):
            assert layer[metric] == record.values[f"{kind}/{name}/{metric}"]
        assert layer["sv_topk"] == [record.values[f"{kind}/{name}/sv{k}"] for k in range(1, 5)]
        assert layer["sv_lastk"] == [record.values[f"{kind}/{name}/sv_last{k}"] for k in range(1, 5)]
        assert layer["sigma_min"] == layer["sv_lastk"][0]


def test_numbers_agree_with_a_direct_svd_and_shapes_are_right(checkpoint: Path) -> None:
    weights = tiny_vit(0).state_dict()
    content = analyze(checkpoint, "--targets", "mlp.fc1")
    assert list(content["layers"]) == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    for name, layer in content["layers"].items():
        expected = singular_values_svd({name: weights[f"{name}.weight"]})[name]
        assert layer["shape"] == [64, 16]
        np.testing.assert_allclose(layer["sv_topk"], expected[:8], rtol=1e-12)
    mean = np.mean([layer["sigma_max"] for layer in content["layers"].values()])
    assert content["types"]["mlp.fc1"]["layers"] == 2
    assert content["types"]["mlp.fc1"]["sigma_max_mean"] == pytest.approx(mean)


def test_tables_fit_80_columns_also_for_the_names_and_shapes_of_a_large_vit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # room enough: the table itself must be narrow
    weights = {
        "blocks.23.attn.proj.weight": torch.randn(1024, 16) * 1.2345e-7,
        "blocks.23.mlp.fc1.weight": torch.randn(4096, 16) * 1234.5,
    }
    path = tmp_path / "large.pth.tar"
    torch.save({"arch": ARCH, "epoch": 0, "state_dict": weights}, path)
    main(["--checkpoint", str(path), "--save-dir", str(tmp_path), "--targets", "attn.proj,mlp.fc1"])
    output = capsys.readouterr().out.splitlines()
    tables = [line for line in output if line[:1] in "┏┃┡│└"]
    assert any("blocks.23.attn.proj │" in line for line in tables)
    assert any("mlp.fc1 " in line and " 1 " in line for line in tables)
    assert max(cell_len(line) for line in tables) <= 80


def test_nan_is_null_in_the_json_and_does_not_spread() -> None:
    layers = {
        "blocks.0.head": LayerSpectrum((3, 2), np.array([2.0, 1.0])),
        "blocks.1.head": LayerSpectrum((3, 2), np.full(2, np.nan)),
    }
    content = json.loads(json.dumps(as_json(layers, {}, topk=2, interval=1), allow_nan=False))
    assert content["layers"]["blocks.1.head"]["sv_topk"] == [None, None]
    assert content["layers"]["blocks.1.head"]["stable_rank"] is None
    assert content["layers"]["blocks.0.head"]["sv_topk"] == [2.0, 1.0]


def test_wrong_use_is_one_clear_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        main(["--checkpoint", str(tmp_path / "nowhere.pth")])
    with pytest.raises(UserError, match=r"meant 'attn\.qkv'"):
        main(["--checkpoint", str(checkpoint), "--targets", "attn.qvk"])
    with pytest.raises(UserError, match="--topk 0"):
        main(["--checkpoint", str(checkpoint), "--topk", "0"])
    with pytest.raises(UserError, match="--save-dir"):
        main(["--checkpoint", str(checkpoint), "--save-dir", str(checkpoint / "under-a-file")])


def test_asking_for_an_ema_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "no_ema.pth.tar"
    torch.save({"arch": ARCH, "epoch": 0, "state_dict": tiny_vit(0).state_dict()}, path)
    with pytest.raises(UserError, match="EMA"):
        main(["--checkpoint", str(path), "--use-ema", "--save-dir", str(tmp_path / "out")])


def test_a_bare_state_dict_is_named_after_its_file(tmp_path: Path) -> None:
    path = tmp_path / "deit.pth"
    torch.save(tiny_vit(0).state_dict(), path)
    main(["--checkpoint", str(path), "--save-dir", str(tmp_path / "out")])
    assert (tmp_path / "out" / "deit_spectral.json").is_file()
