"""The command lines that users bring along, word for word; and that each trains, made small by flags at its end."""

from __future__ import annotations

import csv
import shlex
from pathlib import Path

import pytest
import torch
from torch.distributed.run import get_args_parser as torchrun_parser

from lowrank_vit import train as train_command
from lowrank_vit.config.flags import parse
from lowrank_vit.model.create import create_model
from tests.sources import write_archive, write_splits
from tests.wandb_files import run_files

CIFAR100 = """
--dataset torch/cifar100 --dataset-download --data-dir ./data --model {model} --num-classes 100 --img-size 224
--batch-size {batch} --epochs 300 --opt adamw --lr {lr} --weight-decay 0.05 --sched cosine --warmup-epochs 20
--min-lr 1e-5 --aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --drop-path {drop_path} --reprob 0.25
--remode pixel --amp --model-ema --model-ema-decay 0.9999 --workers 8 --output ./output --experiment {experiment}
"""
IMAGENET100 = """
--data-dir /data/imagenet100 --train-split train --val-split val --model vit_small_patch16_224 --num-classes 100
--pretrained --img-size 224 --batch-size 128 --epochs 100 --opt adamw --lr 1e-4 --weight-decay 0.05 --sched cosine
--warmup-epochs 5 --min-lr 1e-6 --aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --drop-path 0.1
--reprob 0.25 --remode pixel --amp --model-ema --workers 8 --output ./output --experiment imagenet100_vit_small
"""
IMAGENET = """
--data-dir /data/imagenet --train-split train --val-split val --model {model} --img-size 224 --batch-size {batch}
--epochs 300 --opt adamw --lr {lr} --weight-decay 0.05 --sched cosine --warmup-epochs 20 --min-lr 1e-5
--aa rand-m9-mstd0.5-inc1 --mixup 0.8 --cutmix 1.0 --smoothing 0.1 --drop-path {drop_path} --reprob 0.25 --remode pixel
--amp --model-ema --model-ema-decay 0.9999 --workers 16 --output ./output --experiment {experiment}
"""
FINE_TUNING = " --pretrained --epochs 100 --lr 5e-5"
SPECTRA = """
 --layer-decay 0.65 --drop-path 0.3 --log-wandb --wandb-project lowrank-vit --spec-monitor --spec-every 10 --spec-topk 8
--spec-interval 2 --spec-targets "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
"""
SMALL = {"model": "vit_small_patch16_224", "batch": 128, "lr": "5e-4", "drop_path": 0.1}
BASE = {"model": "vit_base_patch16_224", "batch": 64, "lr": "3e-4", "drop_path": 0.2}
COMMANDS = {
    "cifar100_vit_small": CIFAR100.format(**SMALL, experiment="cifar100_vit_small"),
    "cifar100_vit_base": CIFAR100.format(**BASE, experiment="cifar100_vit_base"),
    "imagenet100_vit_small": IMAGENET100,
    "imagenet1k_vit_small": IMAGENET.format(**SMALL, experiment="imagenet1k_vit_small"),
    "imagenet1k_fine_tuning": IMAGENET.format(**SMALL, experiment="imagenet1k_fine_tuning") + FINE_TUNING,
    "imagenet1k_vit_base_spectra": IMAGENET.format(**BASE, experiment="imagenet1k_vit_base_spectra") + SPECTRA,
}
TINY = "patch_size=8 embed_dim=32 depth=2 num_heads=2"
SHRINK = f"""
--img-size 32 --model-kwargs {TINY} --epochs 1 --warmup-epochs 0 -b 8 -vb 8 --workers 1 --no-compile --no-amp
--device cpu --loader resident --experiment run
"""


@pytest.mark.parametrize("name", COMMANDS)
def test_it_parses_unchanged(name):
    config = parse(shlex.split(COMMANDS[name]))
    is_base, is_tuned = "base" in name, "fine" in name
    assert config.model.model == f"vit_{'base' if is_base else 'small'}_patch16_224"
    assert (config.data.batch_size, config.model.num_classes) == (64 if is_base else 128, None if "1k" in name else 100)
    assert (config.optim.opt, config.optim.weight_decay) == ("adamw", 0.05)
    assert (config.augment.mixup, config.augment.cutmix, config.augment.reprob) == (0.8, 1.0, 0.25)
    assert config.model.model_ema
    assert config.step.amp
    assert (config.model.pretrained, config.optim.lr) == (
        is_tuned or "imagenet100" in name,
        5e-5 if is_tuned else 1e-4 if "imagenet100" in name else 3e-4 if is_base else 5e-4,
    )
    assert config.run.experiment == name
    assert config.run.output == Path("output")
    assert config.tracking.log_wandb == config.spectra.spec_monitor == ("spectra" in name)
    if "spectra" in name:
        assert (config.optim.layer_decay, config.model.drop_path) == (0.65, 0.3)
        assert (config.spectra.spec_every, config.spectra.spec_topk, config.spectra.spec_interval) == (10, 8, 2)
        assert config.spectra.spec_targets == "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"


@pytest.mark.parametrize("name", COMMANDS)
def test_it_parses_under_torchrun(name):
    """What torchrun's own parser hands on is every word behind the module's name."""
    launch = torchrun_parser().parse_args(shlex.split(f"--nproc_per_node=4 -m lowrank_vit.train {COMMANDS[name]}"))
    assert (launch.nproc_per_node, launch.module, launch.training_script) == ("4", True, "lowrank_vit.train")
    assert parse(launch.training_script_args) == parse(shlex.split(COMMANDS[name]))


def run(name: str, more: str = "") -> list[dict[str, str]]:
    """Train a command in the current folder; the rows of its summary."""
    train_command.main(shlex.split(COMMANDS[name] + SHRINK + more))
    with Path("output/run/summary.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("name", ["cifar100_vit_small", "cifar100_vit_base"])
def test_cifar100_trains(name, tmp_path, monkeypatch):
    """The archive is there, so that nothing is downloaded; every other word is the command's."""
    monkeypatch.chdir(tmp_path)
    write_archive(Path("data"))
    (row,) = run(name)
    assert float(row["train_loss"]) > 0
    assert "eval_ema_top1" in row


@pytest.mark.parametrize("name", ["imagenet100_vit_small", "imagenet1k_vit_small", "imagenet1k_fine_tuning"])
def test_image_folders_train(name, tmp_path, monkeypatch, capsys):
    """With --pretrained where that is in the command, from a file of 7 classes: there may be no network here."""
    monkeypatch.chdir(tmp_path)
    write_splits(Path("photos"))
    more = " --data-dir photos --num-classes 2"
    torch.manual_seed(1)
    weights = create_model("vit_small_patch16_224", 7, img_size=32, model_kwargs=tuple(TINY.split())).state_dict()
    torch.save(weights, "small.pth")
    if "--pretrained" in COMMANDS[name]:
        more += " --pretrained-path small.pth --lr 1e-12 --warmup-lr 0 --min-lr 0 --weight-decay 0"
    (row,) = run(name, more)
    assert float(row["train_loss"]) > 0
    if "--pretrained" in COMMANDS[name]:
        assert "head of 7 classes replaced by one of 2" in capsys.readouterr().out
        trained = torch.load("output/run/last.pth.tar", weights_only=True)["state_dict"]
        key = "blocks.0.mlp.fc1.weight"
        torch.testing.assert_close(trained[key], weights[key], rtol=0, atol=1e-9)  # where it began


def test_spectra_and_wandb_train(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    write_splits(Path("photos"))
    (row,) = run("imagenet1k_vit_base_spectra", " --data-dir photos --spec-every 1")
    assert float(row["train_loss"]) > 0
    assert list(Path("output/run/spectra").glob("update_*.npz"))
    assert run_files(next(tmp_path.rglob("wandb")))
