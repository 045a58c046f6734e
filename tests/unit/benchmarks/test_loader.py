"""The bench `loader`: its cases run and do what they say. No test asserts a time."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from benchmarks import loader, loader_peers
from benchmarks.__main__ import main
from benchmarks.harness import limits, sets
from benchmarks.harness.sets import ensure_photos
from data_prep.formats import turbojpeg
from data_prep.formats.jpeg import ImageOptions
from lowrank_vit.common.errors import UserError


@pytest.mark.parametrize("with_stock_ffcv", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_smoke(tmp_path, capsys, monkeypatch, with_stock_ffcv):
    if not with_stock_ffcv:  # which compiles its loader for ten seconds
        monkeypatch.setattr(loader_peers, "stock_ffcv", lambda path, **_: path.stat)
    path = tmp_path / "loader.json"
    sizes = "--count 24 -b 8 --img-size 32 --device cpu --repeats 1 --workers 2"
    main(["loader", *sizes.split(), "--json", str(path), "--scratch", str(tmp_path / "scratch")])
    result = json.loads(path.read_text())
    ours, peers = ["ffcv", "dali_cpu", "resident", "resident_32px"], ["stock_ffcv", "stock_dali", "timm", "torchvision"]
    spdl = [] if any("SPDL: not measured, because" in text for text in result["limits"]) else ["spdl"]
    assert (result["spdl"] == "measured") == bool(spdl)
    limits = ["decode_limit", "copy_limit"]
    assert list(result["cases"]) == [*ours, *peers, *spdl, "plan", "plan_full_recipe", *limits]
    shares = {f"{name}_share_of_limit" for name in (*ours, *peers, *spdl)}
    assert shares == {name for name in result["ratios"] if name.endswith("_share_of_limit")}
    assert {"ffcv_vs_stock_ffcv", "dali_cpu_vs_stock_dali", "best_vs_timm"} < set(result["ratios"])
    assert result["ratios"]["best_vs_timm"] == result["ratios"][f"{result['best']}_vs_timm"]
    assert all(case["median"] > 0 for case in result["cases"].values())
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


@pytest.mark.parametrize("peer", [loader_peers.timm_loader, loader_peers.torch_loader])
def test_the_peers_give_the_batches_that_are_counted(tmp_path, peer):
    folder = ensure_photos(tmp_path / "photos", 24)
    with peer(folder, steps=4, batch_size=8, img_size=32, workers=1) as run:
        cells = dict(zip(run.__code__.co_freevars, run.__closure__ or (), strict=True))
        batches = list(cells["loader"].cell_contents)
    assert [tuple(images.shape) for images, _ in batches] == [(8, 3, 32, 32)] * 4
    assert all(images.numpy().dtype == np.uint8 for images, _ in batches)


def test_processes_that_make_whole_batches_have_as_many_each():
    for batches in (1, 9, 31, 64):
        for processes in (1, 2, 3, 16):
            steps = loader_peers.fair_steps(batches, processes)
            assert steps % processes == 0
            assert steps >= 4 * processes
            assert batches <= steps < max(batches, 4 * processes) + processes


def test_a_sample_of_a_beton_is_read_by_all(tmp_path):
    """Of a set of 24, 16 are copied to files and converted from there, byte for byte, labels and all."""
    photos = ensure_photos(tmp_path / "photos", 24)
    given = sets.converted(photos, "", ImageOptions(max_side=200))
    options = loader.Options(data=given.path, count=16, batch_size=8, img_size=32, scratch=tmp_path / "scratch")
    folder, beton = loader._sets(options, lambda _: None)
    small = sets.converted(folder, "_32", ImageOptions(raw=32))
    ids = sets.chosen(given, 16)
    assert len(ids) == beton.num_samples == small.num_samples == 16
    found = sorted((int(beton.labels[n]), beton.sample(n).tobytes()) for n in range(16))
    assert found == sorted((int(given.labels[n]), given.sample(n).tobytes()) for n in ids)
    written = {file: file.stat().st_mtime_ns for file in folder.rglob("*.jpg")}
    assert len(written) == 16
    assert loader._sets(options, lambda text: pytest.fail(text) if "once" in text else None)[0] == folder
    assert {file: file.stat().st_mtime_ns for file in folder.rglob("*.jpg")} == written
    with pytest.raises(UserError, match="holds raw pixels"):
        loader._sets(replace(options, data=small.path), lambda _: None)


def test_chosen_cases_read_the_set_several_times_over(tmp_path):
    kept = []
    options = loader.Options(
        count=10, batch_size=4, img_size=32, workers=1, times=3, repeats=2, device="cpu", scratch=tmp_path,
        cases=("copy_limit", "resident_32px"),
    )  # fmt: skip
    result = loader.run(options, keep=kept.append)
    assert list(result.cases) == ["resident_32px", "copy_limit"]
    assert list(result.ratios) == ["resident_32px_share_of_limit"]
    assert len(kept) == 1
    assert result.extra["times"] == 3
    assert {path.name for path in tmp_path.glob("*.beton")} == {"photos_10.beton", "photos_10_32.beton"}
    with pytest.raises(UserError, match=r"--cases timmm is not a case of this bench here\. There are: ffcv"):
        loader.run(replace(options, cases=("timmm",)))
    sides = np.arange(10) + 100
    plan = loader.plan_of(sides, sides + 1, options, loader.TrainRules())
    assert plan.ids(0).shape == (7, 4)
    assert set(plan.ids(0).flatten()) == set(range(10))
    drawn = plan.batch(0, 0, plan.ids(0)[0])
    assert (drawn.windows[:, 2] <= sides[drawn.ids]).all()


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


def test_wrong_options(tmp_path):
    with pytest.raises(UserError, match="--batch-size is 0, expected 1 or more"):
        loader.run(loader.Options(batch_size=0))
    with pytest.raises(UserError, match="--batch-size 64 is more than the 10 photographs"):
        loader.run(loader.Options(count=10, device="cpu", scratch=tmp_path))
    with pytest.raises(UserError, match=r"nothing\.beton is not a file"):
        loader.run(loader.Options(data=tmp_path / "nothing.beton", device="cpu", scratch=tmp_path))
