"""Familiar command lines: folders of images and CIFAR-100's archive go in as they are."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_vit import train, validate
from tests.photos import write_folder
from tests.unit.test_locate import write_archive

TINY = """--model vit_tiny_patch16_224 --img-size 16 --epochs 1 --warmup-epochs 0 -b 8 -j 2 --opt adamw --lr 1e-3
--no-model-ema --device cpu --model-kwargs patch_size=4 embed_dim=32 depth=1 num_heads=2""".split()


@pytest.fixture
def folder(tmp_path) -> Path:
    write_folder(tmp_path / "images" / "train")
    shutil.copytree(tmp_path / "images" / "train", tmp_path / "images" / "val")
    return tmp_path / "images"


def start(*argv: str, output: Path) -> str:
    """`python -m lowrank_vit.train`, as a stranger runs it."""
    command = [sys.executable, "-m", "lowrank_vit.train", *argv, *TINY, "--output", str(output)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_folder_is_converted_and_trained_on_and_the_second_run_converts_nothing(folder, tmp_path):
    first = start(str(folder), "--loader", "dali", output=tmp_path / "output")
    assert f"converting {folder}/train and {folder}/val into {folder}/.lowrank_vit (once)" in first
    assert "dali loader (--loader dali)" in first
    written = (folder / ".lowrank_vit" / "train.beton").stat()
    second = start("--data-dir", str(folder), "--stage-dir", str(tmp_path / "fast"), output=tmp_path / "output")
    assert "converting" not in second
    assert "copying train.beton and 2 more files" in second
    assert (folder / ".lowrank_vit" / "train.beton").stat() == written
    record = json.loads(next((tmp_path / "output").glob("vit*/metrics.jsonl")).read_text().splitlines()[0])
    assert record["decode_ms_p50"] > 0
    assert {"queue_depth", "decode_ms_p90", "data_wait", "img_per_s"} < set(record)


@pytest.mark.parametrize("given", ["nothing", "the folder"])
def test_validation_finds_the_same_images(folder, tmp_path, capsys, given):
    train.main(["--data-dir", str(folder), *TINY, "--output", str(tmp_path / "output")])
    checkpoint = str(next((tmp_path / "output").glob("vit*/last.pth.tar")))
    in_training = [line for line in capsys.readouterr().out.splitlines() if line.startswith("epoch")][-1]
    validate.main([*([str(folder)] if given == "the folder" else []), "--checkpoint", checkpoint, "--device", "cpu"])
    said = capsys.readouterr().out
    assert "on 24 samples" in said
    top1 = said.split("top-1 ")[1].split(" %")[0]
    assert f"top-1 {float(top1):5.2f} %" in in_training


def test_cifar100_is_trained_on_from_its_archive(tmp_path, capsys):
    write_archive(tmp_path / "root")
    argv = ["--dataset", "torch/cifar100", "--dataset-download", "--data-dir", str(tmp_path / "root")]
    train.main([*argv, *TINY, "--output", str(tmp_path / "output")])
    said = capsys.readouterr().out
    assert "100 classes" in said
    assert "train.beton: 130 samples, resident loader" in said


@pytest.mark.parametrize("loader", ["ffcv", "dali", "resident"])
def test_a_damaged_sample_is_left_out_on_request(folder, tmp_path, capsys, loader):
    train.main(["--data-dir", str(folder), *TINY, "--output", str(tmp_path / "output")])
    from lowrank_vit.data.beton import Beton

    path = folder / ".lowrank_vit" / "train.beton"
    beton, content = Beton(path), bytearray(path.read_bytes())
    content[int(beton.pointers[3]) : int(beton.pointers[3]) + 500] = bytes(500)
    path.write_bytes(content)
    capsys.readouterr()
    argv = ["--data-dir", str(folder), "--loader", loader, "--on-bad-sample", "skip", "--epochs", "2"]
    train.main([*TINY, *argv, "--output", str(tmp_path / "output")])
    said = capsys.readouterr().out
    assert said.count("left out as damaged (1 so far)") == 1
    assert "flower/03.jpg" in said
    newest = max((tmp_path / "output").glob("vit*/metrics.jsonl"), key=lambda path: path.stat().st_mtime_ns)
    records = [json.loads(line) for line in newest.read_text().splitlines()]
    assert [record["bad_samples"] for record in records if record["kind"] == "train"][-1] == 1
