"""timm's own command lines for scoring: published weights, its flags, its files; and what a user sees meanwhile."""

from __future__ import annotations

import csv
import io
import json
import shlex
import socket
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from PIL import Image

from lowrank_vit import inference, validate
from lowrank_vit.common.errors import UserError
from lowrank_vit.score import prediction
from tests.photos import write_folder
from tests.waiting import LONG_S

TINY: dict[str, Any] = {"patch_size": 16, "embed_dim": 32, "depth": 1, "num_heads": 2}
KWARGS = " ".join(f"{name}={value}" for name, value in TINY.items())
SMALL = f"--model-kwargs {KWARGS} --img-size 32 --device cpu"


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """A bare state dict of two classes, as other programs save it."""
    return save(tmp_path_factory.mktemp("weights") / "weights.pth", 2)


def save(path: Path, num_classes: int, model: str = "vit_base_patch16_224") -> Path:
    torch.manual_seed(num_classes)
    torch.save(timm.create_model(model, num_classes=num_classes, img_size=32, **TINY).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    return write_folder(tmp_path_factory.mktemp("photos") / "val")


def score(line: str, tmp_path: Path) -> dict:
    """What `validate` writes to a .json file."""
    path = tmp_path / "scores.json"
    validate.main([*shlex.split(line), "--json", str(path)])
    return json.loads(path.read_text())


def rows_of(table: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(table.read_text(encoding="utf-8").splitlines()))


def test_the_usual_command_word_for_word(photos, weights, tmp_path):
    """Behind it only what makes the model small."""
    line = f"--model vit_base_patch16_224 --data-dir {photos} --checkpoint {weights} --batch-size 256"
    content = score(f"{line} {SMALL}", tmp_path)
    assert (content["model"], content["num_samples"], content["weights"]) == ("vit_base_patch16_224", 24, "model")


def test_flags_of_timm(photos, weights, tmp_path, capsys):
    line = f"{photos} -m vit_base_patch16_224 --checkpoint {weights} --model-kwargs {KWARGS} --device cpu"
    more = "--input-size 3 32 32 --num-classes 2 --pin-mem --no-prefetcher --channels-last --log-freq 5 --num-gpu 1"
    first = score(f"{line} {more} --pretrained", tmp_path)
    said = capsys.readouterr().out
    assert "note: --pin-mem, --no-prefetcher, --channels-last, --log-freq, --num-gpu change nothing here" in said
    assert "the weights are those of --checkpoint" in said
    for look in ("--mean 0.4 0.4 0.4", "--std 0.2 0.2 0.2", "--interpolation bilinear"):
        assert score(f"{line} {more} {look}", tmp_path)["loss"] != first["loss"]
    with pytest.raises(UserError, match=r"--num-classes 5: --checkpoint .* has 2 classes"):
        score(f"{line} --num-classes 5", tmp_path)


@pytest.mark.parametrize(("name", "form"), [("r.csv", "csv"), ("r", "csv"), ("r.json", "csv"), ("r", "json")])
def test_results_file(photos, weights, tmp_path, name, form):
    line = f"-m vit_base_patch16_224 --data {photos} --checkpoint {weights} {SMALL}"
    content = score(f"{line} --results-file {tmp_path / 'new' / name} --results-format {form}", tmp_path)
    if "json" in (form, name[2:]):
        assert json.loads((tmp_path / "new" / "r.json").read_text()) == content
    else:
        (row,) = rows_of(tmp_path / "new" / "r.csv")
        assert float(row["top1"]) == pytest.approx(content["top1"], rel=1e-5)
        assert float(row["top1"]) + float(row["top1_err"]) == pytest.approx(100)
        assert {"model", "img_size", "crop_pct", "interpolation", "top5", "top5_err", "param_count"} <= set(row)


def test_weights_without_a_checkpoint(photos, weights, tmp_path, capsys):
    line = f"-m vit_base_patch16_224 --data {photos} {SMALL}"
    by_file = score(f"{line} --pretrained-path {weights}", tmp_path)
    assert str(weights) in capsys.readouterr().out
    assert by_file["loss"] == score(f"{line} --checkpoint {weights}", tmp_path)["loss"]
    assert by_file["checkpoint"] is None
    with pytest.raises(UserError, match=r"--num-classes 9: --pretrained-path .* has 2 classes, and another head"):
        score(f"{line} --pretrained-path {weights} --num-classes 9", tmp_path)
    with pytest.raises(UserError, match="Give --checkpoint FILE, or --model NAME --pretrained"):
        score(f"--data {photos}", tmp_path)
    with pytest.raises(UserError, match="--use-ema needs --checkpoint"):
        score(f"{line} --pretrained --use-ema", tmp_path)


@pytest.mark.parametrize("flag", ["--pretrained", ""])
def test_published_weights(photos, tmp_path, monkeypatch, capsys, flag):
    """Timm's own loading, but for the download, as it is where no --checkpoint is given."""
    file = save(tmp_path / "published.pth", 1000)
    really = timm.create_model
    overlay = {"file": str(file), "num_classes": 1000}
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: really(*a, **k, pretrained_cfg_overlay=overlay))
    line = f"-m vit_base_patch16_224 {flag} --data {photos} {SMALL}"
    with pytest.raises(UserError, match=r"2 classes \(flower, temple\); .*1,000 \(n01440764.*--trust-labels"):
        score(line, tmp_path)
    score(f"{line} --trust-labels", tmp_path)
    assert "vit_base_patch16_224 (timm's weights), 24 samples" in capsys.readouterr().out
    out = tmp_path / "o.csv"
    photo = photos / "temple" / "00.jpg"
    for kind, index in (("auto", "tench"), ("name", "n01440764"), ("detail", "freshwater"), ("none", "0")):
        argv = f"-m vit_base_patch16_224 {flag} {SMALL} --topk 1000 --label-type {kind} --output {out} {photo}"
        inference.main(shlex.split(argv))
        (row,) = rows_of(out)
        assert any(index in row[f"class_{n + 1}"] for n in range(1000))


def test_without_network_one_line_says_so(photos, tmp_path, monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise OSError("unreachable")

    monkeypatch.setattr(socket, "create_connection", no_network)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("urllib.request.getproxies", dict)
    with pytest.raises(UserError, match="cannot be fetched from the Hugging Face hub") as caught:
        score(f"-m vit_small_patch16_224 --pretrained --data {photos} --device cpu", tmp_path)
    assert "\n" not in str(caught.value)


def test_classes_are_named_by_the_data_where_the_checkpoint_does_not(photos, weights, tmp_path):
    table = tmp_path / "deep" / "classes.csv"
    score(f"-m vit_base_patch16_224 --data {photos} --checkpoint {weights} {SMALL} --per-class {table}", tmp_path)
    assert [row["class"] for row in rows_of(table)] == ["flower", "temple"]


def test_a_loss_that_is_no_number_is_null_and_said(photos, tmp_path, capsys):
    path = save(tmp_path / "nan.pth", 2)
    state = torch.load(path)
    state["head.bias"][:] = torch.nan
    torch.save(state, path)
    out, results = tmp_path / "nan.json", tmp_path / "results.json"
    line = f"-m vit_base_patch16_224 --data {photos} --checkpoint {path} {SMALL} --json {out} --results-file {results}"
    validate.main(shlex.split(line))
    assert "the loss is not finite" in capsys.readouterr().out
    for file in (out, results):
        content = json.loads(file.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert content["loss"] is None


def test_predictions_in_timms_words(photos, weights, tmp_path, capsys):
    line = f"--model vit_base_patch16_224 {SMALL} --checkpoint {weights} --data-dir {photos} --topk 2 --label-type none"
    inference.main(shlex.split(f"{line} --results-dir {tmp_path / 'r'} --results-format csv json --include-index"))
    assert len(capsys.readouterr().out.splitlines()) == 24
    rows = rows_of(tmp_path / "r" / "vit_base_patch16_224.csv")
    assert [row["class_1"] for row in rows] == [row["index_1"] for row in rows]
    content = json.loads((tmp_path / "r" / "vit_base_patch16_224.json").read_text())["predictions"]
    assert [str(p["indices"][0]) for p in content] == [row["index_1"] for row in rows]
    more = f"--output-type logit --output {tmp_path / 'l.csv'} --no-console-results"
    inference.main(shlex.split(f"{line} {more}"))
    assert capsys.readouterr().out == ""
    (first, *_) = rows_of(tmp_path / "l.csv")
    gap = float(first["logit_1"]) - float(first["logit_2"])
    assert float(rows[0]["probability_1"]) == pytest.approx(1 / (1 + 2.718281828**-gap), abs=1e-4)
    inference.main(shlex.split(f"{line} --exclude-output --output {tmp_path / 'e.csv'}"))
    assert (tmp_path / "e.csv").read_text().splitlines()[0] == "file,class_1,class_2"
    with pytest.raises(UserError, match="the 2 classes have no known names"):
        inference.main(shlex.split(line.replace("none", "description")))


def test_images_behind_the_flags(photos, weights, capsys):
    photo = photos / "temple" / "00.jpg"
    inference.main(shlex.split(f"--checkpoint {weights} -m vit_base_patch16_224 --device cpu {SMALL} {photo}"))
    assert str(photo) in capsys.readouterr().out


def test_every_format_that_pillow_reads_by_itself(photos, weights, tmp_path, capsys):
    photo = Image.open(photos / "temple" / "00.jpg")
    suffixes = ".gif .avif .jfif .jp2 .ico .icns .tga .pcx .dds .sgi .pbm .webp .qoi".split()
    for suffix in suffixes:
        mode = {".gif": "P", ".pbm": "1"}.get(suffix, "RGB")
        photo.convert(mode).save(tmp_path / f"a{suffix}")
    photo.save(tmp_path / "b.eps")
    (tmp_path / "c.jpg").write_bytes((tmp_path / "b.eps").read_bytes())  # not handed to Ghostscript, either
    (tmp_path / "d.txt").write_text("x")
    Image.new("F", (9, 9)).save(tmp_path / "e.tiff")
    out = tmp_path / "out.json"
    line = f"{tmp_path} -m vit_base_patch16_224 --checkpoint {weights} {SMALL} --output {out}"
    inference.main(shlex.split(line))
    content = json.loads(out.read_text())
    assert sorted(Path(p["file"]).suffix for p in content["predictions"]) == sorted(suffixes)
    assert content["skipped"][str(tmp_path / "c.jpg")] == "cannot identify image file"
    assert "floating-point pixels have no defined white" in content["skipped"][str(tmp_path / "e.tiff")]
    said = capsys.readouterr().err
    assert f"{tmp_path}: left out 2 files without an image suffix (1 .eps, 1 .txt)" in said


@pytest.mark.parametrize("out", ["/dev/null/x.csv", "{folder}"])
def test_an_output_that_cannot_be_written_is_found_before_the_work(weights, tmp_path, monkeypatch, out):
    monkeypatch.setattr(prediction, "load_scorer", lambda *_: pytest.fail("works"))
    (tmp_path / "x.csv").mkdir()
    (tmp_path / "photo.jpg").touch()
    line = f"{tmp_path / 'photo.jpg'} --checkpoint {weights} --output {out.format(folder=tmp_path / 'x.csv')}"
    with pytest.raises(UserError, match="cannot be written"):
        inference.main(shlex.split(line))


def test_the_next_batch_is_decoded_while_this_one_is_computed(photos, weights, monkeypatch, capsys):
    begun, waited = threading.Event(), []
    crop, classify = prediction._crop, prediction._classify
    files = tuple(sorted(photos.rglob("*.jpg"))[:6])

    def crop_one(file: Path, scorer):
        if file in files[3:]:
            begun.set()
        return crop(file, scorer)

    def compute(*arguments):
        waited.append(begun.wait(LONG_S))
        return classify(*arguments)

    monkeypatch.setattr(prediction, "_crop", crop_one)
    monkeypatch.setattr(prediction, "_classify", compute)
    line = f"--checkpoint {weights} --model vit_base_patch16_224 --model-kwargs {KWARGS} --img-size 32 --batch-size 3"
    inference.main([*map(str, files), *shlex.split(line), "--device", "cpu"])
    assert [row.split("  ")[0] for row in capsys.readouterr().out.splitlines()] == list(map(str, files))
    assert waited == [True, True]


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("is_terminal", [True, False])
def test_a_live_line_on_a_terminal_alone(photos, weights, monkeypatch, is_terminal):
    err = Terminal() if is_terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", err)
    monkeypatch.setenv("TERM", "xterm")
    line = f"-m vit_base_patch16_224 --checkpoint {weights} {SMALL}"
    validate.main(shlex.split(f"{line} --data {photos}"))
    inference.main(shlex.split(f"{photos} {line}"))
    assert (err.getvalue().count("24/24") >= 2) == ("img/s" in err.getvalue()) == is_terminal
    assert is_terminal or err.getvalue() == ""
