"""Familiar command lines: folders of images and CIFAR-100's archive go in as they are."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path

import pytest

from lowrank_vit import train, validate
from lowrank_vit.common.errors import UserError
from tests.photos import NUM_PHOTOS
from tests.sources import write_archive, write_splits

TINY = """--model vit_tiny_patch16_224 --img-size 16 --epochs 1 --warmup-epochs 0 -b 8 -j 2 --opt adamw --lr 1e-3
--no-model-ema --device cpu --model-kwargs patch_size=4 embed_dim=32 depth=1 num_heads=2""".split()


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_splits(tmp_path / "images")


def start(*argv: str, output: Path) -> str:
    """What `python -m lowrank_vit.train` prints."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        train.main([*argv, *TINY, "--output", str(output)])
    return printed.getvalue()


def test_a_folder_is_converted_and_trained_on_and_the_second_run_converts_nothing(folder, tmp_path):
    first = start(str(folder), "--loader", "dali", output=tmp_path / "output")  # as a stranger does
    assert f"converting {folder}/train and {folder}/val into {folder}/.lowrank_vit (once)" in first
    assert "dali loader (--loader dali)" in first
    written = (folder / ".lowrank_vit" / "train.beton").stat()
    second = start("--data-dir", str(folder), "--stage-dir", str(tmp_path / "fast"), output=tmp_path / "output")
    assert "converting" not in second
    assert "copying train.beton and val.beton with sidecars" in second
    assert (folder / ".lowrank_vit" / "train.beton").stat() == written
    third = start("--data", str(folder), "--stage-dir", str(tmp_path / "fast"), output=tmp_path / "output")
    assert "copying" not in third
    assert f"staged copy of train.beton and val.beton in {tmp_path / 'fast'} is up to date" in third
    record = json.loads(next((tmp_path / "output").glob("vit*/metrics.jsonl")).read_text().splitlines()[0])
    assert record["decode_ms_p50"] > 0
    assert {"queue_depth", "decode_ms_p90", "data_wait", "img_per_s"} < set(record)


def last_epoch(said: str) -> str:
    return [line for line in said.splitlines() if line.startswith("epoch")][-1]


def score_of(said: str) -> str:
    """The top-1 that `validate` prints, as `train` prints it."""
    return f"top-1 {float(said.split('top-1 ')[1].split(' %')[0]):5.2f} %"


@pytest.mark.parametrize(
    "given",
    [
        "",
        "FOLDER",
        "--data FOLDER",
        "--data-dir FOLDER/val",
        "--split val",
        "--stage-dir FOLDER/fast",
        "--dataset folder",
    ],
)
def test_validation_finds_the_same_images(trained, capsys, given):
    folder, checkpoint, in_training = trained
    validate.main([*given.replace("FOLDER", str(folder)).split(), "--checkpoint", str(checkpoint), "--device", "cpu"])
    said = capsys.readouterr().out
    assert f"{NUM_PHOTOS} samples" in said
    assert "converting" not in said
    assert score_of(said) in in_training


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path, str]:
    """A folder of images, the checkpoint of a run on it, and what the run said of its last epoch."""
    root = tmp_path_factory.mktemp("trained")
    folder = write_splits(root / "images")
    said = start("--data-dir", str(folder), output=root / "output")
    return folder, next((root / "output").glob("vit*/last.pth.tar")), last_epoch(said)


def test_validation_of_another_split_and_of_new_images(trained, capsys, tmp_path):
    _, checkpoint, _ = trained
    folder = write_splits(tmp_path / "other", val="sketches")
    argv = ["--checkpoint", str(checkpoint), "--device", "cpu"]
    validate.main([str(folder), "--split", "sketches", *argv])
    said = capsys.readouterr().out
    assert f"converting {folder}/sketches into {folder}/.lowrank_vit (once)" in said
    assert f"{NUM_PHOTOS} samples" in said
    with pytest.raises(UserError, match="has no folder for --val-split validation"):
        validate.main([str(folder), *argv])
    with pytest.raises(UserError, match="Give it once"):
        validate.main([str(folder), "--data", str(tmp_path), *argv])


def test_cifar100_is_trained_on_and_scored_from_its_archive(tmp_path, capsys):
    root = tmp_path / "root"
    archive = write_archive(root)
    argv = ["--dataset", "torch/cifar100", "--dataset-download", "--data-dir", str(root), *TINY]
    train.main([*argv, "--output", str(tmp_path / "output")])
    first = capsys.readouterr().out
    assert f"CIFAR-100: data root {root} (--data-dir)\nconverting {archive} into" in first
    assert "100 classes" in first
    assert "train.beton: 130 samples, resident loader" in first
    train.main([*argv, "--output", str(tmp_path / "output")])
    assert "converting" not in capsys.readouterr().out
    checkpoint = str(next((tmp_path / "output").glob("vit*/last.pth.tar")))
    for given in ([], ["--data", str(root), "--dataset", "torch/cifar100", "--split", "test"]):
        validate.main([*given, "--checkpoint", checkpoint, "--device", "cpu"])
        said = capsys.readouterr().out
        assert "110 samples" in said
        assert score_of(said) in last_epoch(first)


def test_a_damaged_archive_stops_before_there_is_a_run_directory(tmp_path):
    archive = write_archive(tmp_path / "root")
    archive.write_bytes(archive.read_bytes()[:3000])
    argv = ["--dataset", "torch/cifar100", "--data-dir", str(tmp_path / "root"), "--output", str(tmp_path / "output")]
    with pytest.raises(UserError, match="--dataset-download"):
        train.main([*argv, *TINY])
    assert not (tmp_path / "output").exists()


@pytest.mark.parametrize("loader", ["ffcv", "dali", "resident"])
def test_a_damaged_sample_is_left_out_on_request(folder, tmp_path, capsys, loader):
    train.main(["--data-dir", str(folder), *TINY, "--output", str(tmp_path / "output")])
    from lowrank_vit.data.sets.beton import Beton

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
