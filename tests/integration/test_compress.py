"""The compress command as a user types it: curves, the page, checkpoints that every other command takes."""

from __future__ import annotations

import csv
import json
import math
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from lowrank_vit import compress, train, validate
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.command_line import read_options
from lowrank_vit.config.flags import parse
from lowrank_vit.lowrank import command
from lowrank_vit.lowrank.images import Images
from lowrank_vit.lowrank.options import METHODS, CompressOptions
from lowrank_vit.lowrank.truncate import Decomposition
from lowrank_vit.model.low_rank import rebuild
from lowrank_vit.report.compression.read import read_compression, tables
from lowrank_vit.training.trainer import Trainer
from tests.integration.conftest import SMALL

MODULES = [f"blocks.{n}.{name}" for n in range(2) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture(scope="module")
def checkpoint(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    more = f"--epochs 2 --data-dir {digits_dir} --output {folder} --no-spec-monitor --experiment small".split()
    return Trainer(parse([*SMALL, *more]), "small").run().run_dir / "last.pth.tar"


@pytest.fixture(scope="module")
def curve(checkpoint: Path, digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("curve") / "new"
    options = "--budgets 0.9 0.4 --ranks greedy uniform --calibration-images 96 --device cpu --measure-layers"
    compress.main([str(checkpoint), "--data", str(digits_dir), "--out", str(out), *options.split()])
    return out


def scores_of(path: Path, digits_dir: Path, tmp_path: Path) -> dict[str, Any]:
    argv = f"--checkpoint {path} --data {digits_dir} --json {tmp_path / 'scores.json'} --device cpu".split()
    validate.main(argv)
    return json.loads((tmp_path / "scores.json").read_text())


def test_every_budget_method_and_allocation_is_a_point(curve, checkpoint, digits_dir, tmp_path):
    content = json.loads((curve / "compression.json").read_text())
    original, points = content["original"], content["points"]
    scored = scores_of(checkpoint, digits_dir, tmp_path)
    assert original["top1"] == pytest.approx(scored["top1"])
    assert original["loss"] == pytest.approx(scored["loss"], abs=1e-5)
    found = {(one["method"], one["allocation"], one["budget"]) for one in points}
    assert found == {(m, a, b) for m in METHODS for a in ("greedy", "uniform") for b in (0.9, 0.4)}
    for one in points:
        assert one["params"] <= one["budget"] * original["params"]
        assert one["flops"] < original["flops"]
        assert set(one["ranks"]) <= set(MODULES)
        assert 0 <= one["top1"] <= 100
        assert math.isfinite(one["loss"])
        assert one["predicted_loss"] >= original["loss"] - 1e-9
        assert one["loss_difference"] == pytest.approx(one["loss"] - original["loss"])
        assert one["loss_error"] > 0
    assert content["spectra"].keys() == set(MODULES)
    assert {"measured", "predicted"} <= content["sensitivities"]["layers"][0].keys()
    assert content["latency"]["layers"][0]["pays_up_to"] > 0
    with (curve / "compression.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["loss"]) for row in rows] == pytest.approx([one["loss"] for one in points], rel=1e-4)
    assert (curve / "compression.png").stat().st_size > 10_000
    titles = [table.title.partition(",")[0] for table in tables(read_compression(curve / "compression.json"))]
    assert titles[2:] == [
        "Ranks by layer and budget",
        "Sensitivities of the layers",
        "Latency",
        "Up to which rank a layer is faster",
    ]


def test_the_same_seed_gives_the_same_numbers_and_other_weights_are_not_written_over(
    curve, checkpoint, digits_dir, tmp_path
):
    options = "--budgets 0.4 --calibration-images 96 --device cpu --method kfac --no-latency".split()
    argv = [str(checkpoint), "--data", str(digits_dir), *options]
    found = []
    for _ in range(2):
        compress.main([*argv, "--out", str(tmp_path)])
        found.append(json.loads((tmp_path / "compression.json").read_text())["points"])
    assert found[0] == found[1]
    spectra = json.loads((tmp_path / "compression.json").read_text())["spectra"]
    assert all(list(of_layer) == ["svd", "kfac"] for of_layer in spectra.values())
    before = (curve / "compression.json").read_bytes()
    with pytest.raises(UserError, match=r"compression\.json is the result of other weights, .*\(model\), and is kept"):
        compress.main([*argv, "--out", str(curve), "--use-ema"])
    assert (curve / "compression.json").read_bytes() == before


def test_models_wait_for_one_pass_only_as_far_as_there_is_room_and_decompositions_go_with_their_method(
    checkpoint, digits_dir, monkeypatch
):
    """With room for no two models each is scored in a pass of its own, with the scores that it has among others."""
    seen: list[weakref.ref[Decomposition]] = []
    passes: list[int] = []
    decompose, score = command.decompose, Images.score

    def decomposed(*args: Any) -> dict[str, Decomposition]:
        assert not [one for one in seen if one() is not None]
        made = decompose(*args)
        seen.extend(weakref.ref(one) for one in made.values())
        return made

    def scored(self: Images, models: Sequence[nn.Module], which: str = "validation"):
        passes.append(len(models))
        return score(self, models, which)

    monkeypatch.setattr(command, "decompose", decomposed)
    monkeypatch.setattr(Images, "score", scored)
    line = f"{checkpoint} --data {digits_dir} --budgets 0.6 0.4 --method svd kfac --device cpu --calibration-images 32"
    found = []
    for room in (command.ROOM_BYTES, 1):
        monkeypatch.setattr(command, "ROOM_BYTES", room)
        result = command.compress(read_options(CompressOptions, line.split(), "compress"))
        assert result
        found.append([(one.method, one.budget, one.scores and one.scores.loss) for one in result.points])
        assert not any(one.factors for one in result.points)  # nothing is to be saved or timed
    assert passes == [1, 3, 4, 1, 1, 3, 1, 1, 1]  # the original alone, and once with what the constant is of
    assert found[0] == found[1]


def test_weights_of_half_precision_are_taken_as_float32_and_that_is_said(checkpoint, digits_dir, tmp_path, capsys):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"] = {name: one.bfloat16() for name, one in content["state_dict"].items()}
    torch.save(content, tmp_path / "half.pth.tar")
    small = tmp_path / "small.pth.tar"
    argv = f"--budget 0.5 --method svd --save {small} --device cpu".split()
    for path, is_said in ((tmp_path / "half.pth.tar", True), (checkpoint, False)):
        small.unlink(missing_ok=True)
        compress.main([str(path), *argv])
        said = " ".join(capsys.readouterr().out.split())
        assert ("note: the file's weights are bfloat16; they are compressed and saved as float32" in said) == (is_said)
        assert {one.dtype for one in torch.load(small, weights_only=True)["state_dict"].values()} == {torch.float32}


def test_a_smaller_model_is_taken_by_every_command_and_merged_by_timm(checkpoint, digits_dir, tmp_path, capsys):
    small, merged = tmp_path / "deep" / "small.pth.tar", tmp_path / "merged.pth.tar"
    argv = f"{checkpoint} --data {digits_dir} --budget 0.4 --save {small} --merge {merged} --calibration-images 96"
    compress.main([*argv.split(), "--device", "cpu"])
    said = capsys.readouterr().out
    short = [line for line in said.splitlines() if "loader" not in line and "/" not in line]
    assert len(short) == 5
    assert all(len(line) <= 80 for line in short), said
    scores = [scores_of(path, digits_dir, tmp_path) for path in (small, merged)]
    assert scores[0]["top1"] == scores[1]["top1"]
    assert scores[0]["loss"] == pytest.approx(scores[1]["loss"], abs=1e-5)
    assert f"{scores[0]['loss']:.4f}" in said
    content = torch.load(small, weights_only=True)
    assert set(content["lowrank_ranks"]) <= set(MODULES)
    assert "lowrank_ranks" not in torch.load(merged, weights_only=True)
    options = {"embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}
    images = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    options |= {"num_classes": 10, "img_size": 16, "patch_size": 4}
    plain = timm.create_model("vit_tiny_patch16_224", checkpoint_path=str(merged), **options)
    own = timm.create_model("vit_tiny_patch16_224", **options)
    weights = content["state_dict"]
    rebuild(own, weights, content["lowrank_ranks"], "small")
    own.load_state_dict(weights)
    with torch.no_grad():
        assert torch.allclose(plain.eval()(images), own.eval()(images), atol=1e-5)
    made = content["compression"]
    assert (made["method"], made["calibration_images"], made["sequential"]) == ("kfac", 96, False)
    more = f"--initial-checkpoint {small} --data-dir {digits_dir} --output {tmp_path} --experiment tuned --epochs 1"
    train.main([*SMALL, *more.split(), "--warmup-epochs", "0", "--no-spec-monitor"])
    tuned = torch.load(tmp_path / "tuned" / "last.pth.tar", weights_only=True)
    assert tuned["lowrank_ranks"] == content["lowrank_ranks"]
    capsys.readouterr()
    again = f"--data {digits_dir} --device cpu --budget 0.2 --save {tmp_path / 'smaller.pth.tar'} --method svd"
    compress.main([str(small), *again.split()])
    said = " ".join(capsys.readouterr().out.split())
    assert "layers are factorised already; their products are compressed" in said
    smaller = torch.load(tmp_path / "smaller.pth.tar", weights_only=True)["lowrank_ranks"]
    assert smaller.keys() == content["lowrank_ranks"].keys()
    assert all(smaller[name] <= rank for name, rank in content["lowrank_ranks"].items())
    assert smaller != content["lowrank_ranks"]
    with pytest.raises(UserError, match="another"):  # the file of other weights stays
        compress.main([*argv.split(), "--device", "cpu", "--use-ema"])


def test_a_few_images_of_one_class_are_enough_and_said(checkpoint, digits_dir, capsys):
    line = "--budgets 0.5 --method kfac --ranks uniform energy greedy --split heads --by flops --calibration-images 1"
    compress.main([str(checkpoint), "--data", str(digits_dir), "--device", "cpu", "--sequential", *line.split()])
    said = capsys.readouterr().out
    assert "note: all calibration images are of one class" in said
    assert "predictions and constant are for the same ranks without --sequential" in said
    rows = [row for row in said.splitlines() if row.startswith("kfac")]
    assert [row.split()[1] for row in rows] == ["uniform", "energy", "greedy"]
    assert all(len(row) <= 80 and "…" not in row for row in rows)


def test_svd_without_data(checkpoint, digits_dir, tmp_path, capsys):
    small = tmp_path / "small.pth.tar"
    compress.main([str(checkpoint), *f"--budget 0.5 --method svd --save {small} --device cpu".split()])
    assert scores_of(small, digits_dir, tmp_path)["num_samples"] == 360
    assert "kfac" not in capsys.readouterr().out


def test_files_of_the_same_weights_are_made_again_in_either_format(checkpoint, tmp_path, capsys):
    for name in ("small.pth", "small.safetensors"):
        argv = [str(checkpoint), *f"--method svd --save {tmp_path / name} --device cpu".split()]
        compress.main([*argv, "--budget", "1"])
        assert "every layer fits whole in a budget of" in capsys.readouterr().out
        compress.main([*argv, "--budget", "0.5"])
        assert "8 factorised layers" in capsys.readouterr().out
        with pytest.raises(UserError, match=r"has other weights \(.*last.pth.tar\)"):
            compress.main([*argv, "--budget", "0.5", "--use-ema"])


def test_a_checkpoint_tells_what_was_done_not_what_was_asked_for(checkpoint, digits_dir, tmp_path, capsys):
    small = tmp_path / "small.pth"
    options = f"--data {digits_dir} --budget 0.5 --method svd --sequential --calibration-images 5000 --save {small}"
    compress.main([str(checkpoint), *options.split(), "--device", "cpu"])
    made = torch.load(small, weights_only=True)["compression"]
    assert (made["calibration_images"], made["sequential"]) == (1437, False)
    assert "note: svd needs no moments" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--budgets 0.01", r"--budgets: .* more than a budget of 0\.01\. Give at least 0\.\d+, or more layers"),
        ("--targets attn.qkw", r"--targets: .attn\.qkw. matches no"),
        ("--targets patch_embed.proj", "No layer that --targets names"),
        ("--split heads --targets mlp.fc1", "--split heads needs a target named qkv"),
        ("--data nowhere", "^--data nowhere does not exist"),
        ("--model nothing", "nothing is not a timm model"),
        ("--out /dev/null/x", "cannot be written"),
    ],
)
def test_bad_input(checkpoint, digits_dir, line, message):
    with pytest.raises(UserError, match=message):
        compress.main([str(checkpoint), "--data", str(digits_dir), "--device", "cpu", *line.split()])


def test_weights_that_are_not_finite(checkpoint, digits_dir, tmp_path):
    content = torch.load(checkpoint, weights_only=True)
    content["state_dict"]["blocks.1.mlp.fc1.weight"][0, 0] = math.nan
    torch.save(content, tmp_path / "nan.pth.tar")
    with pytest.raises(UserError, match=r"blocks\.1\.mlp\.fc1.* not finite"):
        compress.main([str(tmp_path / "nan.pth.tar"), "--data", str(digits_dir), "--device", "cpu"])
