"""Predictions for images on disk: those of validation, with class names; what is no image is skipped and said."""

from __future__ import annotations

import csv
import functools
import json
import os
import shutil
import signal
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from lowrank_vit import inference, train, validate
from lowrank_vit.common.errors import UserError
from tests.forked import Forked
from tests.integration.test_data_given_directly import TINY
from tests.photos import write_folder
from tests.waiting import LONG_S


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> tuple[Path, Path]:
    """A folder of images, and the checkpoint of a tiny model that was trained on them."""
    root = tmp_path_factory.mktemp("inference")
    write_folder(root / "images" / "train")
    shutil.copytree(root / "images" / "train", root / "images" / "val")
    train.main(["--data-dir", str(root / "images"), *TINY, "--output", str(root / "output")])
    return root / "images" / "val", next((root / "output").glob("vit*/last.pth.tar"))


def predicted(checkpoint: Path, files: Iterable[Path], folder: Path, *words: str) -> list[dict[str, Any]]:
    """What `inference` writes of each file."""
    line = [*map(str, files), "--checkpoint", str(checkpoint), "--device", "cpu", *words]
    inference.main([*line, "--output", str(folder / "predicted.json")])
    return json.loads((folder / "predicted.json").read_text())["predictions"]


def test_predictions_are_those_of_validation(trained, tmp_path, capsys):
    folder, checkpoint = trained
    out = tmp_path / "a.csv"
    inference.main([str(folder), "--checkpoint", str(checkpoint), "--device", "cpu", "--output", str(out)])
    rows = list(csv.DictReader(out.read_text().splitlines()))
    assert len(rows) == 24
    assert {row["class_1"] for row in rows} | {row["class_2"] for row in rows} == {"flower", "temple"}
    assert all(float(row["probability_1"]) >= float(row["probability_2"]) for row in rows)
    hits = np.mean([row["class_1"] == Path(row["file"]).parent.name for row in rows])
    capsys.readouterr()
    validate.main(["--checkpoint", str(checkpoint), "--device", "cpu", "--loader", "resident"])
    assert f"top-1  {100 * hits:6.2f} %" in capsys.readouterr().out


def test_names_that_are_not_utf8_come_back_as_they_are(trained, tmp_path):
    folder, checkpoint = trained
    content = torch.load(checkpoint, weights_only=False)
    names = content["class_names"] = [os.fsdecode(b"fleur\xe9"), "temple"]
    torch.save(content, tmp_path / "named.pth")
    (tmp_path / "val").mkdir()
    for name, label in zip(names, ("flower", "temple"), strict=True):
        shutil.copytree(folder / label, tmp_path / "val" / name)
    of_both = ["--checkpoint", str(tmp_path / "named.pth"), "--device", "cpu"]
    inference.main([str(tmp_path / "val"), *of_both, "--output", str(tmp_path / "a.csv")])
    validate.main(["--data", str(tmp_path / "val"), *of_both, "--per-class", str(tmp_path / "b.csv")])
    assert b"/fleur\xe9/" in (tmp_path / "a.csv").read_bytes()
    assert b"\nfleur\xe9," in (tmp_path / "b.csv").read_bytes().replace(b"\n0,", b"\n")


def test_a_prediction_does_not_depend_on_the_others(trained, tmp_path):
    folder, checkpoint = trained
    files = sorted(folder.rglob("*.jpg"))[:5]
    together = predicted(checkpoint, files, tmp_path, "--batch-size", "3")
    for file, prediction in zip(files, together, strict=True):
        (alone,) = predicted(checkpoint, [file], tmp_path)
        assert (alone["file"], alone["classes"]) == (str(file), prediction["classes"])
        assert np.allclose(alone["probabilities"], prediction["probabilities"], atol=1e-5)


def test_pixels_mean_what_they_mean_in_conversion(trained, tmp_path):
    """A turned photograph, 16 bits and transparency are read as the converter reads them."""
    folder, checkpoint = trained
    with Image.open(next(folder.rglob("*.jpg"))) as opened:
        photo = opened.convert("RGB")
    photo.save(tmp_path / "upright.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to see it upright
    photo.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    grey = photo.convert("L")
    grey.save(tmp_path / "grey.png")
    Image.fromarray(np.asarray(grey).astype(np.uint16) * 257).save(tmp_path / "grey16.png")
    clear = photo.copy()
    clear.putalpha(0)
    clear.save(tmp_path / "clear.png")
    Image.new("RGB", photo.size, "white").save(tmp_path / "white.png")
    pairs = (("turned", "upright"), ("grey16", "grey"), ("clear", "white"))
    for one, other in pairs:
        a, b = predicted(checkpoint, [tmp_path / f"{name}.png" for name in (one, other)], tmp_path)
        assert a["classes"] == b["classes"]
        assert a["probabilities"] == b["probabilities"], (one, other)


def test_any_format_is_read_and_what_is_no_image_is_skipped(trained, tmp_path, capsys):
    folder, checkpoint = trained
    photo = Image.open(next(folder.rglob("*.jpg")))
    for name, mode in (("a.png", "RGBA"), ("b.webp", "RGB"), ("c.bmp", "L"), ("d.tiff", "CMYK")):
        photo.convert(mode).save(tmp_path / name)
    (tmp_path / "e.jpg").write_bytes(b"no image")
    (tmp_path / "f.jpg").write_bytes(next(folder.rglob("*.jpg")).read_bytes()[:900])
    (tmp_path / "notes.txt").write_text("not an image, and not asked for")
    out = tmp_path / "out.json"
    inference.main(["--input", str(tmp_path), "--checkpoint", str(checkpoint), "--device", "cpu", "--output", str(out)])
    content = json.loads(out.read_text())
    assert [Path(p["file"]).name for p in content["predictions"]] == ["a.png", "b.webp", "c.bmp", "d.tiff"]
    assert content["skipped"][str(tmp_path / "e.jpg")] == "cannot identify image file"
    assert "truncated" in content["skipped"][str(tmp_path / "f.jpg")]
    assert f"skipped {tmp_path / 'e.jpg'}" in capsys.readouterr().err


def classify_and_die(argv: list[str], *, after: int) -> None:
    """Classify, and end by SIGKILL in the middle of what the given batch writes."""
    from lowrank_vit.score import kept

    really, calls = kept._write, list[int]()

    def write(file, content: bytes) -> None:
        calls.append(1)
        if len(calls) > 4 * after:
            really(file, content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        really(file, content)

    kept._write = write
    inference.main(argv)


@pytest.mark.parametrize("change", ["", "arguments", "weights", "images"])
def test_a_killed_command_goes_on_and_ends_in_the_same_bytes(trained, tmp_path, capsys, change):
    folder, checkpoint = trained
    shutil.copytree(folder, tmp_path / "images")
    (tmp_path / "images" / "flower" / "broken.jpg").write_bytes(b"no image")
    shutil.copy(checkpoint, tmp_path / "c.pth")

    def line(out: str) -> list[str]:
        files = ["--results-dir", str(tmp_path / out), "--results-file", "r", "--results-format", "csv", "json"]
        of_model = ["--checkpoint", str(tmp_path / "c.pth"), "--device", "cpu", "--no-console-results"]
        return [str(tmp_path / "images"), *of_model, *files, "-b", "4", *(["--topk", "1"] if is_changed else [])]

    is_changed = False
    process = Forked(functools.partial(classify_and_die, after=3), line("killed"))
    process.communicate(LONG_S)
    assert process.returncode == -signal.SIGKILL
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".r.csv.partial"]
    is_changed = change == "arguments"
    if change == "weights":
        content = torch.load(tmp_path / "c.pth", weights_only=False)
        content["state_dict"]["head.bias"] += 1
        torch.save(content, tmp_path / "c.pth")
    elif change == "images":
        images = sorted((tmp_path / "images").rglob("*.jpg"))
        shutil.copy(images[-1], images[5])
    inference.main(line("killed"))
    said = capsys.readouterr().err
    begun = {"": 12, "images": 4}.get(change, 0)
    assert (f"{begun} images were done before" in said) == (begun > 0)
    reason = {"arguments": "--topk is 1, there 5", "weights": "other weights"}.get(change, "")
    assert ("begins anew" in said) == bool(reason)
    assert reason in said
    inference.main(line("whole"))
    for name in ("r.csv", "r.json"):
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len(list((tmp_path / "killed").iterdir())) == 2


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--input", "nowhere"], "--input nowhere does not exist"),
        (["--input", "{empty}"], "holds no image"),
        (["--input", "{bad}"], "None of the 1 files could be read"),
        (["--input", "{bad}", "--output", "x.txt"], r"--output x.txt must end in .csv or .json"),
        (["--input", "{bad}", "--topk", "0"], "--topk takes a whole number of at least 1, not `0`"),
    ],
)
def test_wrong_use(trained, tmp_path, argv, message):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.jpg").write_bytes(b"no image")
    places = {"empty": tmp_path / "empty", "bad": tmp_path / "bad.jpg"}
    with pytest.raises(UserError, match=message):
        inference.main([*(token.format(**places) for token in argv), "--checkpoint", str(trained[1])])


def test_a_checkpoint_of_timm_has_numbers_for_classes(trained, tmp_path):
    import timm

    model = timm.create_model("vit_tiny_patch16_224", img_size=32, num_classes=7)
    torch.save({"state_dict": model.state_dict()}, tmp_path / "timm.pth.tar")
    file = next(trained[0].rglob("*.jpg"))
    words = "--model vit_tiny_patch16_224 --img-size 32 --topk 9".split()
    (found,) = predicted(tmp_path / "timm.pth.tar", [file], tmp_path, *words)
    assert sorted(found["classes"]) == [str(n) for n in range(7)]
    assert sum(found["probabilities"]) == pytest.approx(1.0, abs=1e-5)


def test_validation_refuses_other_classes(trained, tmp_path):
    shutil.copytree(trained[0], tmp_path / "val")
    (tmp_path / "val" / "temple").rename(tmp_path / "val" / "zoo")
    with pytest.raises(UserError, match=r"The classes do not fit.*former has zoo; .*latter has temple"):
        validate.main([str(tmp_path / "val"), "--checkpoint", str(trained[1])])
