"""The limits: positive, in the right unit, and counted as they are said to be. No test asserts a time."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from PIL import Image

from benchmarks import limits as bench
from benchmarks.__main__ import main
from benchmarks.harness import limits
from benchmarks.harness.limits import Products
from lowrank_vit.common.errors import UserError

CPU = torch.device("cpu")


def test_smoke(tmp_path, capsys):
    path, scratch = tmp_path / "limits.json", tmp_path / "scratch"
    sizes = "--count 10 --megabytes 2 --gflop 1 --device cpu --repeats 1".split()
    main(["limits", *sizes, "--scratch", str(scratch), "--json", str(path)])
    result = json.loads(path.read_text())
    units = {name: case["unit"] for name, case in result["cases"].items()}
    assert all(case["median"] > 0 for case in result["cases"].values())
    assert {units[name] for name in ("memory_copy", "page_cache_read", "disk_write", "disk_read")} == {"GB/s"}
    assert units["jpeg_decode_1_core"] == units["jpeg_entropy_1_core"] == "img/s"
    assert {units[f"cpu_product_{dtype}"] for dtype in ("float32", "float64", "bfloat16")} == {"TFLOP/s"}
    assert [one.name for one in scratch.iterdir()] == ["photos_10"]  # the files are gone
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80
    with pytest.raises(UserError, match="--megabytes is 0, expected 1 or more"):
        bench.run(bench.Options(megabytes=0))
    for gflop in (-5.0, 0.0, float("nan")):
        with pytest.raises(UserError, match=r"--gflop is .*, expected more than 0"):
            bench.run(bench.Options(gflop=gflop))


def test_products_do_at_least_the_arithmetic_asked_for_and_count_what_they_do():
    state = torch.get_rng_state()
    products = Products.of(3e9, CPU, torch.float32)
    assert torch.equal(torch.get_rng_state(), state)
    assert 3e9 <= products.flops < 6e9
    products.run()
    torch.testing.assert_close(products.out, products.a @ products.b)
    assert limits.products_case(1e9, 3, "img/s", CPU).items == products.flops / 1e9
    assert limits.products_case(3e9, 1, "TFLOP/s", CPU, unit_flops=1e12).items == products.flops / 1e12


def test_copies_copy_and_count_each_byte_read_and_written(tmp_path):
    source, target = torch.arange(1000, dtype=torch.float32), torch.zeros(1000)
    case = limits.copy_case(source, target, 3)
    case.run()
    assert torch.equal(source, target)
    assert case.items == 2 * 4000 * 3 / 1e9
    file = tmp_path / "file"
    file.write_bytes(b"x" * 3_000_000)
    case = limits.page_cache_case(file)
    case.run()
    assert case.items == 0.003


def test_the_least_of_augmentation_writes_every_image():
    images = torch.randint(256, (4, 8, 8, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    case = limits.normalizing_case(images, 3)
    case.run()
    assert case.items == 12
    cells = dict(zip(case.run.__code__.co_freevars, case.run.__closure__ or (), strict=True))
    assert torch.equal(cells["out"].cell_contents, images.float())


def test_the_disk_cases_write_and_read_all_of_it(tmp_path, monkeypatch):
    out = tmp_path / "out"
    writing = limits.disk_write_case(out, 3 << 20)
    fsynced = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda descriptor: fsynced.append(fsync(descriptor)))
    writing.run()
    assert len(fsynced) == 1
    assert out.stat().st_size == 3 << 20
    assert writing.items == (3 << 20) / 1e9
    reading = limits.disk_read_case(out)
    offsets = []
    preadv = os.preadv

    def noting(descriptor: int, buffers: list, offset: int) -> int:
        offsets.append(offset)
        return preadv(descriptor, buffers, offset)

    monkeypatch.setattr(os, "preadv", noting)
    reading.run()
    assert sorted(offsets) == [0, 1 << 20, 2 << 20]
    assert ("O_DIRECT" in reading.setting) == ("O_DIRECT" in writing.setting)
    with pytest.raises(UserError, match="cannot be written: No space left"):
        limits.disk_write_case(Path("/dev/full"), 1 << 20).run()


def test_storing_counts_the_images_whose_bytes_it_writes(tmp_path):
    files = [tmp_path / str(n) for n in range(3)]
    for file in files:
        file.write_bytes(bytes(1 << 20))
    case = limits.store_case(files, tmp_path / "out")
    case.run()
    assert case.items == 3
    case.after()
    assert not (tmp_path / "out").exists()


def test_only_what_libjpeg_decodes_is_decoded(tmp_path):
    names = [tmp_path / name for name in ("good.jpg", "cut.jpg", "picture.png")]
    Image.new("RGB", (64, 48), "red").save(names[0])
    Image.effect_noise((64, 48), 80).convert("RGB").save(names[1])
    names[1].write_bytes(names[1].read_bytes()[:400])
    Image.new("RGB", (64, 48)).save(names[2])
    assert limits.decodable(names) == names[:1]
    assert len(limits.decodable(names[:1] * 5000)) == 2000


def test_copying_a_batch_is_counted_by_the_image():
    case = limits.batch_copy_case(10, 4, 8, CPU)
    case.run()
    assert case.items == 8
