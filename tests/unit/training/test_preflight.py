"""What is wrong with a command line is found out before any data are opened, let alone converted."""

from __future__ import annotations

import socket

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.training import setup
from lowrank_vit.training.preflight import check_before_data
from lowrank_vit.training.trainer import Trainer

TINY = "--device cpu --model-kwargs patch_size=4 embed_dim=32 depth=2 num_heads=2 --img-size 32".split()
LOW = "--spec-monitor --lowrank-train"


@pytest.fixture
def no_data(monkeypatch):
    monkeypatch.setattr(setup, "_open_sets", lambda *args: pytest.fail("the data are opened first"))


@pytest.mark.usefixtures("no_data")
@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--model vit_smal_patch16_224", "Did you mean vit_small_patch16_224"),
        ("--opt adamww", "Did you mean adamw"),
        ("--opt adamw --opt-kwargs nonsense=1", "nonsense"),
        ("--aa rand-x9", "`x9` of it is not known"),
        ("--initial-checkpoint absent.pth", "absent.pth does not exist"),
        ("--pretrained-path absent.pth", "absent.pth does not exist"),
        ("--model-kwargs dpeth=3", "cannot be built"),
        ("--spec-monitor --spec-targets attn.qvk", "attn.qvk"),
        ("--model resnet18 --model-kwargs --sync-bn", "--sync-bn: --model resnet18 has BatchNorm"),
        ("--model lcnet_035 --model-kwargs --pretrained", "timm has no weights for lcnet_035"),
        ("--experiment used", r"used is in use: it has a run. .*--resume .*used/last\.pth\.tar"),
        ("--experiment mine", "mine is in use: notes.txt is not a run's file"),
        ("--model vgg11 --model-kwargs --img-size 24", "cannot take an RGB image of 24 x 24 pixels: .* own is 224"),
        ("--model-kwargs depth=1 global_pool=", r"returns the shape \(1, 5, 2\) for one image"),
        (
            "--model resnet18 --model-kwargs features_only=True",
            "--model resnet18 returns a list for one image; a tensor",
        ),
        ("--lr 1e-4 --min-lr 1e-3", r"--min-lr 0.001, .* above the peak learning rate 0.0001 \(--lr\)"),
        ("--lr-base 0.1 -b 64 --min-lr 0.03", r"peak learning rate 0.025 \(--lr-base 0.1, linear"),
        ("--lr-base 0.1 -b 64 --global-batch-size 512 --min-lr 0.3", "peak learning rate 0.2 .* from batch 256 to 512"),
        ("--mixup 1 --global-batch-size 7 -b 4", "--global-batch-size 7 does not fit 1 rank: .* no number of ranks"),
        ("--sched wsd --epochs 6 --warmup-epochs 5 --decay-epochs 5", "--sched wsd cannot be made"),
        ("--log-wandb --wandb-project a/b", "--wandb-project a/b: W&B does not allow `/`"),
        ("--tracker tensorboard wandb", "No API key configured.* Log in with `wandb login`"),
        ("--tracker trackio", "--tracker trackio needs the package trackio, which is not installed: `pip install"),
        ("--log-wandb", "No API key configured.* Log in with `wandb login`"),
        ("--model dla46_c --model-kwargs --grad-checkpointing", "--grad-checkpointing: --model dla46_c does not"),
        (f"{LOW} kfac --lowrank-schedule 300=0.2", "300=0.2: the run ends after 300 epochs.* Give 299 at most"),
        (f"{LOW} kfac --epochs 1 --lowrank-schedule 1=0.2", r"ends after 1 epochs.* Give a larger --epochs"),
        (f"{LOW} kfac --lowrank-schedule 2=0.001", "2=0.001: rank 1 of every target needs 0.0[0-9]+ of their"),
        (f"{LOW} kfac --lowrank-budget 0.001", "--lowrank-budget 0.001: rank 1 of every target needs"),
        (f"{LOW} mp --spec-targets attn.qkv", "blocks.0.attn.proj is not monitored. Add it to --spec-targets"),
        (
            f"{LOW} energy --spec-split-qkv",
            "blocks.0.attn.qkv is not monitored as one matrix. Leave out --spec-split-qkv",
        ),
        (f"{LOW} energy --lowrank-targets mlp.fc9", "'mlp.fc9' matches no 2-D weight"),
        (f"{LOW} energy --opt adafactor", "Adafactor keeps .* Train with another --opt: adam"),
    ],
)
def test_it_is_found_out_before_the_data(line, said, tmp_path, monkeypatch):
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "last.pth.tar").write_text("")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    with pytest.raises(UserError, match=said):
        Trainer(parse([*TINY, "--output", str(tmp_path), *line.split()]), "x")


def test_what_is_right_passes():
    check_before_data(parse([*TINY, "--spec-monitor", "--sync-bn", "--opt", "lookahead_adamw"]), is_resumed=False)


@pytest.mark.parametrize("name", ["step", "multistep"])
def test_schedules_that_read_no_least_learning_rate_take_any(name):
    check_before_data(parse([*TINY, "--sched", name, "--lr", "1e-6", "--min-lr", "1e-5"]), is_resumed=False)


def test_files_that_a_resumed_run_does_not_read_need_not_be_there():
    config = parse([*TINY, "--initial-checkpoint", "absent.pth"])
    check_before_data(config, is_resumed=True)
    with pytest.raises(UserError, match=r"absent.pth does not exist"):
        check_before_data(config, is_resumed=False)


def test_weights_out_of_reach_are_found_out(monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("no network")

    monkeypatch.setattr(socket, "create_connection", refuse)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    config = parse(["--model", "vit_giant_patch14_dinov2", "--pretrained"])
    with pytest.raises(UserError, match="cannot be fetched from the Hugging Face hub"):
        check_before_data(config, is_resumed=False)
