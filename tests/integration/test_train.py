"""The whole way in one process: what a run leaves behind, and that it can be repeated, resumed and scored."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

from lowrank_vit import analyze_spectrum
from lowrank_vit import train as train_command
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.report.__main__ import main as report_main
from lowrank_vit.score.options import ValidateOptions
from lowrank_vit.score.scorer import ModelOptions, load_scorer
from lowrank_vit.score.validation import validate
from lowrank_vit.training.step import TrainStep
from lowrank_vit.training.trainer import COLD_UPDATES, Trainer
from tests.events import scalars
from tests.runs import spectral_records, stop_after
from tests.wandb_files import run_files


def lines(run: Path, kind: str) -> list[dict]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == kind]


@pytest.fixture(scope="module")
def finished(digits_dir, tmp_path_factory) -> Path:
    """The run directory of one small finished run, trained through the command itself."""
    from tests.integration.conftest import SMALL

    output = tmp_path_factory.mktemp("output")
    argv = [*SMALL, "--data-dir", str(digits_dir), "--output", str(output), "--experiment", "run"]
    train_command.main(argv)
    return output / "run"


def test_run_directory_is_complete(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {
        "args.yaml",
        "environment.json",
        "metrics.jsonl",
        "summary.csv",
        "last.pth.tar",
        "model_best.pth.tar",
        "spectra",
    }
    assert not [name for name in names if name.endswith(".part")]
    assert (finished.parent / "latest").resolve() == finished.resolve()
    environment = json.loads((finished / "environment.json").read_text())
    assert environment["torch"] == torch.__version__.partition("+")[0] or environment["torch"] == torch.__version__
    with (finished / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == [0, 1]
    assert float(rows[1]["train_loss"]) < float(rows[0]["train_loss"])
    assert {"eval_loss", "eval_top1", "eval_top5", "eval_ema_top1", "lr", "img_per_s", "data_wait"} <= set(rows[0])


def test_metrics_hold_training_validation_and_spectra(finished):
    updates = 1437 // 128 * 2
    assert [r["update"] for r in lines(finished, "train")][-1] == updates
    assert [r["update"] for r in lines(finished, "eval")] == [updates // 2, updates]
    spectra = spectral_records(finished)
    # On a busy machine a refresh may still run when the next is due, which is then left out.
    assert {0} <= {r["update"] for r in spectra} <= {0, 10, 20}
    for kind in ("spec", "spec_ema"):
        for module in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
            prefix = f"{kind}/blocks.1.{module}"
            assert spectra[-1][f"{prefix}/sigma_max"] == spectra[-1][f"{prefix}/sv1"] >= spectra[-1][f"{prefix}/sv8"]
            assert spectra[-1][f"{prefix}/sv_last1"] <= spectra[-1][f"{prefix}/sv_last8"]
    stored = np.load(finished / "spectra" / f"update_{spectra[-1]['update']:08d}.npz")
    assert stored["spec/blocks.1.attn.qkv"][0] == spectra[-1]["spec/blocks.1.attn.qkv/sv1"]


def test_monitored_spectra_are_those_of_the_weights(train, tmp_path):
    """An independent path: numpy's SVD of the checkpoint's weights against what the monitor wrote."""
    train("--experiment", "a", "--epochs", "2", "--spec-every", "22")  # at 0 and at the end: none is left out
    stored = np.load(tmp_path / "a" / "spectra" / "update_00000022.npz")
    checkpoint = read_checkpoint(tmp_path / "a" / "last.pth.tar")
    for kind, use_ema in (("spec", False), ("spec_ema", True)):
        weights = checkpoint.weights(use_ema)
        for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2"):
            expected = np.linalg.svd(weights[f"{name}.weight"].double().numpy(), compute_uv=False)
            np.testing.assert_allclose(stored[f"{kind}/{name}"], expected, rtol=1e-9)


def test_checkpoint_loads_in_plain_timm(finished):
    options = {"patch_size": 4, "embed_dim": 32, "depth": 2, "num_heads": 2, "class_token": False, "global_pool": "avg"}
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=16,
        checkpoint_path=str(finished / "model_best.pth.tar"),
        **options,
    )
    best = torch.load(finished / "model_best.pth.tar", weights_only=True)
    # timm prefers the EMA weights of a checkpoint.
    assert torch.equal(model.state_dict()["head.weight"], best["state_dict_ema"]["head.weight"])


def test_validate_repeats_the_runs_own_score(finished):
    last = lines(finished, "eval")[-1]
    for use_ema, prefix in ((False, "eval_"), (True, "eval_ema_")):
        for batch_size in (128, 77, 1000):  # with and without a short last batch
            scores = validate(
                ValidateOptions(finished / "last.pth.tar", use_ema=use_ema, batch_size=batch_size, device="cpu")
            )
            assert scores.num_samples == 360
            assert scores.top1 == pytest.approx(last[f"{prefix}top1"], abs=1e-9)
            assert scores.loss == pytest.approx(last[f"{prefix}loss"], rel=1e-5)


def test_validation_is_plain_timms(finished, digits_dir):
    """The same accuracy from nothing of ours but the weights: PIL resizes, timm's model classifies."""
    from PIL import Image

    checkpoint = read_checkpoint(finished / "last.pth.tar")
    model = timm.create_model(
        "vit_tiny_patch16_224",
        num_classes=10,
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=2,
        num_heads=2,
        class_token=False,
        global_pool="avg",
    )
    model.load_state_dict(checkpoint.weights(use_ema=False))
    beton = Beton(digits_dir / "val.beton")
    images = [
        np.asarray(Image.fromarray(beton.sample(i).reshape(8, 8, 3)).resize((16, 16), Image.Resampling.BICUBIC))
        for i in range(360)
    ]
    pixels = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2) / 255
    with torch.no_grad():
        predictions = model.eval()((pixels - 0.5) / 0.5).argmax(1).numpy()
    expected = 100 * np.mean(predictions == beton.labels)
    assert lines(finished, "eval")[-1]["eval_top1"] == pytest.approx(expected, abs=0.3)  # one sample in 360


def test_next_commands_work(finished, tmp_path, capsys, sketched):
    report_main([str(finished)])
    assert (finished / "report.html").stat().st_size > 10_000
    assert (finished / "report" / "spectra.png").exists()
    checkpoint = str(finished / "model_best.pth.tar")
    analyze_spectrum.main(["--checkpoint", checkpoint, "--use-ema", "--save-dir", str(tmp_path)])
    assert "blocks.1" in capsys.readouterr().out


def losses(result) -> list[float]:
    return [record["loss"] for record in lines(result.run_dir, "train")]


def test_args_yaml_repeats_the_run_bit_for_bit(train, tmp_path):
    first = train("--experiment", "a", "--no-spec-monitor", "--drop-path", "0.1", "--mixup", "0.8", "--cutmix", "1")
    again = Trainer(parse(["--config", str(tmp_path / "a" / "args.yaml"), "--experiment", "b"]), "x").run()
    assert losses(first) == losses(again)
    assert (tmp_path / "a" / "args.yaml").read_text() == (tmp_path / "b" / "args.yaml").read_text()


def test_the_monitor_changes_no_bit(train):
    more = ("--spec-updates", "--spec-flows", "--spec-flow-images", "40")
    on, off = train("--experiment", "on", *more), train("--experiment", "off", "--no-spec-monitor")
    assert losses(on) == losses(off)
    scores = [[(r["eval_loss"], r["eval_ema_loss"]) for r in lines(one.run_dir, "eval")] for one in (on, off)]
    assert scores[0] == scores[1]
    flows = lines(on.run_dir, "flow")
    assert [(r["epoch"], r["update"], r["spec/flow/images"]) for r in flows] == [(0, 11, 40), (1, 22, 40)]
    stored = np.load(on.run_dir / "spectra" / "flows_00000022.npz")
    assert stored["spec/blocks.1:variances"].shape == (32,)
    assert stored["spec_ema/blocks.1:entropies"].mean() == flows[-1]["spec_ema/flow/blocks.1/entropy"]
    assert "spec/blocks.1.mlp.fc1/opt_top_u" in spectral_records(on.run_dir)[-1]


def test_quickstart_for_one_epoch(digits_dir, tmp_path):
    """What the Makefile's help offers: make train ARGS='--epochs 1'."""
    config = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
    argv = f"--config {config} --epochs 1 --data-dir {digits_dir} --output {tmp_path} --device cpu -b 128".split()
    argv += "--model-kwargs patch_size=4 embed_dim=32 depth=2 num_heads=2 class_token=False global_pool=avg".split()
    assert Trainer(parse(argv), "x").run().best_epoch == 0


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled_and_bf16_training_learns(train, backend, monkeypatch):
    """The graphs are made by both backends; code is written for them, and compiled, by the second alone."""
    compile = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, mode=None: compile(function, backend=backend))
    model = "patch_size=4 embed_dim=32 depth=1 num_heads=2 class_token=False global_pool=avg".split()
    common = ("--no-model-ema", "--no-spec-monitor", "--model-kwargs", *model)
    eager = train("--experiment", "eager", *common)
    compiled = train("--experiment", "compiled", "--compile", "--amp", *common)
    np.testing.assert_allclose(losses(compiled), losses(eager), rtol=0.02)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_first_updates_of_a_process_are_no_part_of_its_speed(train, monkeypatch, compiled):
    """By a clock that only the steps move: the cold ones 100 s each, the others 1 s."""
    now = [0.0]
    for reader in ("run.speed", "common.devices"):
        monkeypatch.setattr(f"lowrank_vit.{reader}.time", SimpleNamespace(perf_counter=lambda: now[0]))
    trainer = Trainer(parse_small(train, "--experiment", "cold", "--epochs", "2", "--no-spec-monitor"), "x")
    trainer.config = replace(trainer.config, step=replace(trainer.config.step, compile=compiled))
    cold = min(COLD_UPDATES[compiled], trainer.setup.plan.updates_per_epoch // 2)
    original = TrainStep.__call__

    def timed(step, batch, **more):
        now[0] += 100.0 if step.position.num_updates < cold else 1.0
        return original(step, batch, **more)

    monkeypatch.setattr(TrainStep, "__call__", timed)
    run = trainer.run().run_dir
    batch = trainer.setup.plan.batch_size
    with (run / "summary.csv").open() as file:
        assert [float(row["img_per_s"]) for row in csv.DictReader(file)] == [batch, batch]
    assert [record["img_per_s"] for record in lines(run, "train")][-1] == batch


def test_trackers_work_offline_and_go_on_with_the_same_run(train, tmp_path, monkeypatch):
    """What arrives is looked for in W&B's own files, in which names stand as they are."""
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    recipe = "--tracker wandb tensorboard --wandb-project test --wandb-tags small digits".split()
    recipe += ["--epochs", "3", "--spec-every", "11"]
    part = Trainer(parse_small(train, "--experiment", "w", *recipe), "x")
    stop_after(part, 15)
    run = part.run().run_dir
    train(*recipe, "--resume", str(run / "last.pth.tar"))
    files = run_files(run / "wandb", 2)
    assert len({file.name for file in files}) == 1  # run-ID.wandb
    content = b"".join(file.read_bytes() for file in files)
    timms = "epoch train_loss eval_loss eval_top1 eval_top5 lr"
    ours = "update eval_ema_top1 train/loss train/img_per_s train/grad_norm train/memory_gb spec_update"
    spectra = "spec/blocks.0.mlp.fc1/sigma_max spec_ema/blocks.0.mlp.fc1/sigma_max"
    for name in f"{timms} {ours} {spectra} small digits batch-size environment spec-indices".split():
        assert name.encode() in content, name
    train_loss = scalars(run, "update")["train/loss"]
    assert [step for step, _ in train_loss] == [record["update"] for record in lines(run, "train")]
    assert [step for step, _ in scalars(run, "epoch")["eval_top1"]] == [0, 1, 2]
    refreshes = sorted(record["update"] for record in lines(run, "spec"))
    for kind in ("spec", "spec_ema"):
        points = scalars(run, "spec_update")[f"{kind}/blocks.0.mlp.fc1/sigma_max"]
        assert sorted(step for step, _ in points) == refreshes


def parse_small(train, *more):
    """The configuration that the `train` fixture would train."""
    return parse(train.__closure__[0].cell_contents(*more))


def test_wandb_without_a_login_is_told(train, monkeypatch):
    import wandb
    from wandb.errors import UsageError

    def refuse(**kwargs):
        raise UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "init", refuse)
    with pytest.raises(UserError, match=r"No API key configured\..* Log in with `wandb login`.*WANDB_MODE=offline"):
        train("--experiment", "w", "--log-wandb")


@pytest.mark.parametrize("options", [{"batch_size": 0}, {"crop_pct": -1.0}, {"img_size": 0}])
def test_validate_checks_its_ranges(options, tmp_path):
    with pytest.raises(UserError, match="takes a"):
        validate(ValidateOptions(tmp_path / "x.pth.tar", **options))


def test_a_loss_that_is_not_finite_stops_the_run(train, tmp_path):
    with pytest.raises(UserError, match=r"not finite at update \d+ \(learning rate 1e\+30\)"):
        train("--experiment", "nan", "--opt", "sgd", "--lr", "1e30", "--warmup-epochs", "0")
    assert not (tmp_path / "nan" / "last.pth.tar").exists()


def test_no_memory_beside_a_resident_set_is_told_with_what_that_takes(train, monkeypatch):
    def step(*_: object, **__: object) -> bool:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(TrainStep, "__call__", step)
    with pytest.raises(UserError, match=r"^CUDA out of memory\. Decoded images take .* --loader dali"):
        train("--loader", "resident", "--no-spec-monitor")


def test_console_script_and_exit_codes():
    environment = os.environ | {"COLUMNS": "80"}
    done = subprocess.run(
        [sys.executable, "-m", "lowrank_vit", "train", "--epochs", "0"],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: --epochs takes a whole number")
    assert "Traceback" not in done.stderr
    helped = subprocess.run([sys.executable, "-m", "lowrank_vit"], capture_output=True, text=True, check=True)
    assert "analyze-spectrum" in helped.stdout


def test_photographs_from_folder_to_score(tmp_path):
    """The user's own way: an image folder of JPEGs of many sizes, converted, trained on FFCV's threads, scored."""
    from PIL import Image
    from sklearn.datasets import load_sample_images

    from data_prep.__main__ import main as prep

    for split, count in (("train", 24), ("val", 6)):
        for label, name in enumerate(("temple", "flower")):
            folder = tmp_path / split / name
            folder.mkdir(parents=True)
            for n in range(count):
                left, top = 13 * n % 300, 29 * n % 150
                crop = load_sample_images().images[label][top : top + 200 + n, left : left + 300 - n]
                Image.fromarray(crop).save(folder / f"{n}.jpg")
        out = str(tmp_path / "data" / f"{split}.beton")
        prep(["imagefolder", "--src", str(tmp_path / split), "--out", out, "--workers", "1"])
    model = "--model vit_tiny_patch16_224 --img-size 32 --model-kwargs patch_size=8 embed_dim=48 depth=2 num_heads=3"
    recipe = "--epochs 25 --warmup-epochs 2 -b 16 --opt adamw --lr 2e-3 --model-ema-decay 0.9 --device cpu --no-compile"
    train_command.main(
        [*f"{model} {recipe}".split(), "--data-dir", str(tmp_path / "data"), "--output", str(tmp_path / "output")]
    )
    scores = validate(ValidateOptions(tmp_path / "output" / "latest" / "last.pth.tar", device="cpu"))
    assert scores.num_samples == 12
    assert scores.top1 > 80  # a temple is no flower


def test_mean_and_std_are_stored_and_honoured_by_validation_and_inference(train, tmp_path):
    own = train(
        "--experiment", "own", "--epochs", "1", "--warmup-epochs", "0", "--mean", "0.1", "0.2", "0.3", "--std", "0.4"
    )
    checkpoint = read_checkpoint(own.run_dir / "last.pth.tar")
    assert checkpoint.content["input"]["mean"] == [0.1, 0.2, 0.3]
    assert checkpoint.content["input"]["std"] == [0.4] * 3
    scorer = load_scorer(ModelOptions(own.run_dir / "last.pth.tar"), torch.device("cpu"))
    assert (scorer.spec.mean, scorer.spec.std) == ((0.1, 0.2, 0.3), (0.4, 0.4, 0.4))
    scores = validate(ValidateOptions(own.run_dir / "last.pth.tar", device="cpu"))
    assert lines(own.run_dir, "eval")[0]["eval_loss"] == pytest.approx(scores.loss, rel=1e-5)


def test_the_head_begins_as_it_is_told(small):
    trainer = Trainer(parse(small("--head-init-bias", "-4", "--head-init-scale", "0")), "x")
    trainer.run_dir.close()
    parts = trainer.setup
    head = parts.model.get_classifier()  # type: ignore[operator]
    assert not head.weight.any()
    assert torch.equal(head.bias, torch.full((10,), -4.0))
    assert parts.ema is not None
    assert not parts.ema.module.get_classifier().weight.any()
