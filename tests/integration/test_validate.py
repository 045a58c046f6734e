"""The validation command as a user types it: what it says and what it writes."""

from __future__ import annotations

import csv
import json

import pytest
from PIL import Image

from lowrank_vit import validate as validate_command
from lowrank_vit.common.errors import UserError
from lowrank_vit.training.trainer import Trainer


@pytest.fixture
def checkpoint(train):
    return str(train("--experiment", "run", "--epochs", "1", "--warmup-epochs", "0").run_dir / "last.pth.tar")


def test_everything_it_can_write(checkpoint, digits_dir, tmp_path, capsys):
    table, scores = tmp_path / "deep" / "classes.csv", tmp_path / "scores.json"
    argv = f"--model vit_tiny_patch16_224 --data-dir {digits_dir} --checkpoint {checkpoint} --batch-size 256".split()
    validate_command.main([*argv, "--per-class", str(table), "--json", str(scores), "--device", "cpu"])
    said = capsys.readouterr().out
    assert all(len(line) <= 80 for line in said.splitlines() if str(tmp_path) not in line and "loader" not in line)
    content = json.loads(scores.read_text())
    assert f"top-1  {content['top1']:6.2f} %   95 % interval" in said
    assert content["weights"] == "model"
    assert content["num_samples"] == sum(row["num_samples"] for row in content["classes"]) == 360
    low, high = content["top1_interval"]
    assert low < content["top1"] < high
    weighted = sum(row["top1"] * row["num_samples"] for row in content["classes"]) / 360
    assert weighted == pytest.approx(content["top1"])
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == [str(n) for n in range(10)]
    with Image.open(table.with_suffix(".png")) as picture:
        assert picture.width > 1000


def test_ema_and_mirror_images_change_the_score(checkpoint, digits_dir, tmp_path):
    losses = []
    for n, more in enumerate(((), ("--use-ema",), ("--tta", "2"), ("--amp",))):
        path = tmp_path / f"{n}.json"
        argv = ["--data", str(digits_dir), "--checkpoint", checkpoint, "--json", str(path), "--device", "cpu"]
        validate_command.main([*argv, *more])
        losses.append(json.loads(path.read_text())["loss"])
    assert len(set(losses)) == 4


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--per-class", "x.txt"), r"--per-class x\.txt must end in \.csv"),
        (("--json", "x.csv"), r"--json x\.csv must end in \.json"),
        (("--json", "/dev/null/x.json"), "cannot be written"),
    ],
)
def test_files_that_cannot_be_written(checkpoint, digits_dir, more, message):
    with pytest.raises(UserError, match=message):
        validate_command.main(["--data", str(digits_dir), "--checkpoint", checkpoint, "--device", "cpu", *more])


def test_a_full_disk_costs_neither_the_scores_nor_the_other_files(checkpoint, digits_dir, tmp_path, capsys):
    (tmp_path / "a.json").symlink_to("/dev/full")
    files = ["--json", str(tmp_path / "a.json"), "--results-file", str(tmp_path / "b.csv")]
    with pytest.raises(UserError, match=r"a\.json cannot be written: No space left on device\.$"):
        validate_command.main(["--data", str(digits_dir), "--checkpoint", checkpoint, *files])
    assert "  top-1  " in capsys.readouterr().out
    assert (tmp_path / "b.csv").read_text().startswith("model,")


def test_training_with_mirror_images_scores_as_validation_does(small, digits_dir, tmp_path):
    from lowrank_vit.config.flags import parse
    from lowrank_vit.score.options import ValidateOptions
    from lowrank_vit.score.validation import validate
    from tests.runs import records

    run = Trainer(parse(small("--tta", "2", "--epochs", "1", "--warmup-epochs", "0")), "x").run().run_dir
    scores = validate(ValidateOptions(run / "last.pth.tar", tta=2, device="cpu"))
    assert records(run, "eval")[0]["eval_loss"] == pytest.approx(scores.loss, rel=1e-5)
