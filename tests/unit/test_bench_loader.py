"""The bench `loader`: its cases run and do what they say. No test asserts a time."""

from __future__ import annotations

import json

import numpy as np
import pytest
from PIL import Image

from data_prep import turbojpeg
from data_prep.errors import UserError
from lowrank_vit.bench import limits, loader, loader_peers
from lowrank_vit.bench.__main__ import main
from lowrank_vit.bench.photos import ensure_photos


def test_smoke(tmp_path, capsys):
    path = tmp_path / "loader.json"
    sizes = "--count 24 -b 8 --img-size 32 --device cpu --repeats 1 --workers 2"
    main(["loader", *sizes.split(), "--json", str(path), "--scratch", str(tmp_path / "scratch")])
    result = json.loads(path.read_text())
    ours, peers = ["ffcv", "dali_cpu", "resident", "resident_32px"], ["stock_ffcv", "stock_dali", "timm", "torchvision"]
    assert list(result["cases"]) == [*ours, *peers, "plan", "plan_full_recipe", "decode_limit"]
    assert {"ffcv_vs_stock_ffcv", "dali_cpu_vs_stock_dali", "best_vs_timm"} < set(result["ratios"])
    assert result["ratios"]["best_vs_timm"] == result["ratios"][f"{result['best']}_vs_timm"]
    assert all(case["median"] > 0 for case in result["cases"].values())
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("peer", [loader_peers.timm_loader, loader_peers.torch_loader])
def test_the_peers_give_the_batches_that_are_counted(tmp_path, peer):
    folder = ensure_photos(tmp_path / "photos", 24)
    with peer(folder, batch_size=8, img_size=32, workers=1) as run:
        cells = dict(zip(run.__code__.co_freevars, run.__closure__ or (), strict=True))
        batches = list(cells["loader"].cell_contents)
    assert [tuple(images.shape) for images, _ in batches] == [(8, 3, 32, 32)] * 3
    assert all(images.numpy().dtype == np.uint8 for images, _ in batches)


def test_the_limit_decodes_every_file(tmp_path, monkeypatch):
    files = sorted(ensure_photos(tmp_path / "photos", 12).glob("*/*.jpg"))
    seen: list[np.ndarray] = []
    decode = turbojpeg.decode
    monkeypatch.setattr(turbojpeg, "decode", lambda *args: seen.append(decode(*args)))
    case = limits.decode_case(files, 2)
    case.run()
    assert case.items == len(seen) == 12
    pixels = {np.asarray(Image.open(file).convert("RGB")).mean().round(1) for file in files}
    assert {image.mean().round(1) for image in seen} == pixels


def test_wrong_options():
    with pytest.raises(UserError, match="--batch-size is 0, expected 1 or more"):
        loader.run(loader.Options(batch_size=0))
    with pytest.raises(UserError, match="--batch-size 64 is more than the --count of 10 photographs"):
        loader.run(loader.Options(count=10))
