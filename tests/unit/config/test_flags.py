"""Flags and their checks."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.check import parse_interval
from lowrank_vit.config.flags import parse, to_yaml
from lowrank_vit.config.option_types import leaves, may_change
from lowrank_vit.config.options import Config, Step

# What a user types is a contract: a flag may be added, but not renamed or dropped. (docs/from_timm.md has them all.)
FLAGS = """
dataset dataset-download data-dir train-split val-split beton-dir nested-classes stage-dir synthetic loader workers
prefetch hw-decoder-load jpeg-fancy-upsampling on-bad-sample epoch-order batch-size validation-batch-size img-size
crop-pct mean std aug-repeats
train-crop-mode scale ratio hflip vflip train-interpolation model model-kwargs num-classes larger-head trust-labels
class-order head-init-scale head-init-bias fix-init sync-bn drop drop-path pretrained
pretrained-path initial-checkpoint grad-checkpointing model-ema model-ema-decay model-ema-warmup opt opt-eps opt-betas
opt-kwargs muon-fallback momentum weight-decay lr lr-base lr-base-size lr-base-scale layer-decay layer-decay-min-scale
layer-decay-no-opt-scale clip-grad clip-mode grad-accum-steps global-batch-size sched sched-on-updates epochs
warmup-epochs warmup-prefix warmup-lr min-lr cooldown-epochs decay-epochs decay-rate decay-milestones lr-decay-fn
lr-stable-timescale lr-cycle-mul
lr-cycle-decay lr-cycle-limit lr-k-decay lr-noise lr-noise-pct lr-noise-std aa color-jitter reprob remode recount
erase-first resplit smoothing bce-loss bce-sum bce-target-thresh mixup cutmix mixup-prob mixup-switch-prob mixup-mode
mix-block cutmix-minmax mixup-off-epoch device amp amp-dtype tf32 compile compile-mode compile-cache spec-monitor
spec-every spec-full-every spec-topk spec-interval spec-targets spec-split-qkv spec-circuits spec-solver spec-on-cpu
spec-cpu-threads spec-store-gb spec-log spec-updates spec-flows spec-flow-images
lowrank-init lora lora-alpha lora-dropout lowrank-train lowrank-targets lowrank-energy lowrank-budget lowrank-settled
lowrank-switches lowrank-at-once lowrank-schedule lowrank-dry-run lowrank-moments lowrank-decay
lowrank-calibration-images reg-nuclear reg-stable-rank spectral-clip reg-every reg-targets reg-coupled
output experiment resume seed seeds log-interval val-interval eval-metric tta checkpoint-hist checkpoint-interval
rank-timeout init-timeout tracker log-wandb wandb-project wandb-tags wandb-resume-id wandb-spec
""".split()


def test_flag_names_are_unique_and_none_is_lost():
    names = [name for name, _, _ in leaves(Config())]
    assert len(names) == len(set(names))
    assert set(FLAGS) <= set(names)


def test_a_share_is_a_number_or_left_to_the_program(tmp_path):
    def share(*argv: str) -> float | None:
        return parse(argv).data.hw_decoder_load

    path = tmp_path / "args.yaml"
    path.write_text("hw-decoder-load: 0.5\n")
    assert share() is share("--hw-decoder-load", "auto") is share("--hw-decoder-load=None") is None
    assert (share("--hw-decoder-load", "0"), share("--config", str(path))) == (0.0, 0.5)
    assert share("--config", str(path), "--hw-decoder-load", "auto") is None
    path.write_text("hw-decoder-load: auto\n")
    assert share("--config", str(path)) is None
    for wrong in ("1.1", "off", ""):
        with pytest.raises(UserError, match="--hw-decoder-load takes a number from 0 to 1, or auto, not"):
            share("--hw-decoder-load", wrong)


@pytest.mark.parametrize(
    ("in_file", "line", "said"),
    [
        ("", "--spec-circuits --spec-topk 4", "--spec-topk, --spec-circuits change nothing without --spec-monitor"),
        ("", "--spec-updates --spec-flows", "--spec-updates changes nothing without --spec-monitor"),
        ("", "--spec-flow-images 9", "--spec-flow-images changes nothing without --spec-flows"),
        ("spec-circuits: raw", "", "--spec-circuits changes nothing without --spec-monitor"),
        (
            "spec-monitor: false\nspec-topk: 4",
            "--spec-updates",
            "--spec-updates changes nothing without --spec-monitor",
        ),
        ("spec-monitor: false\nspec-topk: 4", "", ""),
        ("spec-monitor: true\nspec-topk: 4", "--no-spec-monitor", ""),
        ("spec-topk: 4", "--spec-monitor --spec-circuits", ""),
        ("", "--spec-every 100 --spec-circuits none", ""),
        ("", "--spec-flows --spec-flow-images 9", ""),
    ],
)
def test_options_of_spectra_without_what_they_are_about_are_said(tmp_path, capsys, in_file, line, said):
    path = tmp_path / "recipe.yaml"
    path.write_text(f"lr: 0.001\n{in_file}\n")
    parse(["--config", str(path), *line.split()])
    assert capsys.readouterr().out == (f"note: {said}\n" if said else "")


def test_a_resumed_run_may_change_what_no_update_depends_on():
    free = {name for name, hint, _ in leaves(Config()) if may_change(hint)}
    assert {
        "data-dir",
        "workers",
        "batch-size",
        "grad-accum-steps",
        "global-batch-size",
        "epochs",
        "device",
        "spec-every",
        "output",
    } <= free
    assert not free & {"model", "opt", "lr", "weight-decay", "aa", "mixup", "drop-path", "seed", "img-size", "sched"}
    groups = {group.name for group in dataclasses.fields(Config)}
    assert {g for g in groups if all(may_change(h) for _, h, _ in leaves(getattr(Config(), g)))} == {
        "spectra",
        "step",
        "tracking",
    }


def test_timms_spelling():
    config = parse(
        shlex.split("-b 64 --opt adamw --lr 5e-4 --wd 0.05 --no-amp --mixup 0.8 --cutmix 1 -j 2 --spec-every 10")
    )
    assert (config.data.batch_size, config.data.workers) == (64, 2)
    assert (config.optim.opt, config.optim.lr, config.optim.weight_decay) == ("adamw", 5e-4, 0.05)
    assert (config.augment.mixup, config.augment.cutmix) == (0.8, 1.0)
    assert not config.step.amp
    assert config.spectra.spec_every == 10


@pytest.mark.parametrize(
    "line",
    ["DIR --model x", "--model x DIR", "--mixup 0.8 DIR --model x", "--data-dir DIR", "--data DIR", "--data=DIR"],
)
def test_timms_forms_of_the_data_directory(line, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data-dir: data/cifar100\n")
    assert parse(line.split()).data.data_dir == Path("DIR")
    assert parse([*line.split(), "--config", str(path)]).data.data_dir == Path("DIR")
    assert parse(["--config", str(path)]).data.data_dir == Path("data/cifar100")
    assert parse([]).data.data_dir is None


def test_one_data_directory_given_twice_is_one():
    assert parse(["DIR", "--data-dir", "DIR"]).data.data_dir == Path("DIR")


@pytest.mark.parametrize(
    "line",
    [
        "--color-jitter 0.4 DIR",
        "--color-jitter 0.4 0.3 0.2 DIR --epochs 7",
        "--opt-betas 0.9 0.95 0.99 DIR",
        "--mean 0.5 DIR",
        "--decay-milestones 3 5 DIR",
        "--lr-noise 0.4 DIR",
        "--scale 0.1 1 DIR",
    ],
)
def test_a_list_of_numbers_does_not_swallow_the_data_directory(line: str):
    config = parse(line.split())
    assert config.data.data_dir == Path("DIR")
    name, *numbers = line.partition(" DIR")[0].split()
    assert list({n: v for n, _, v in leaves(config)}[name[2:]]) == [float(number) for number in numbers]


def test_no_worker_is_one(capsys):
    assert parse(["-j", "0"]).data.workers == 1
    assert "note: --workers 0 is --workers 1" in capsys.readouterr().out


def test_two_data_directories_are_refused():
    with pytest.raises(UserError, match=r"DIR and --data-dir OTHER: .* Give it once"):
        parse(["DIR", "--data-dir", "OTHER"])


@pytest.mark.parametrize(
    ("line", "size"),
    [
        ("--model-kwargs img_size=32", 32),
        ("--model-kwargs img_size=(32,32) depth=2", 32),
        ("--model-kwargs img_size=[32,32] --img-size 32", 32),
        ("--img-size 32 --model-kwargs depth=2 img_size=32", 32),
        ("--config FILE --img-size 32", 32),
        ("--config FILE --model-kwargs img_size=32", 32),
        ("--config FILE --model-kwargs depth=2", 64),
    ],
)
def test_the_image_size_may_be_given_as_timm_wants_it(line, size, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("img_size: 64\nmodel_kwargs: {img_size: 64}\n")
    config = parse(line.replace("FILE", str(path)).split())
    assert config.data.img_size == size
    assert config.model.model_kwargs == (("depth=2",) if "depth" in line else ())
    path.write_text(to_yaml(config))
    assert parse(["--config", str(path)]) == config


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--mixupp", "0.8"], "--mixup"),
        (["--epochs", "many"], "--epochs"),
        (["--loader", "dally"], "resident"),
        (["--config", "TYPE"], "`epochs`"),
    ],
)
def test_misspelt_flags_and_wrong_types_name_the_right_one(argv, said, tmp_path):
    (tmp_path / "type.yaml").write_text("epochs: soon\n")
    argv = [str(tmp_path / "type.yaml") if a == "TYPE" else a for a in argv]
    with pytest.raises(UserError, match=said):
        parse(argv)


@pytest.mark.parametrize(
    "argv",
    [
        "--batch-size 0",
        "--epochs -1",
        "--drop-path 1",
        "--smoothing 1",
        "--hflip 1.5",
        "--lr 0",
        "--lr nan",
        "--lr inf",
        "--mixup -0.1",
        "--scale 0 1",
        "--opt-betas 0.9 1.0",
        "--crop-pct 0",
        "--spec-every 0",
        "--seed -1",
    ],
)
def test_values_out_of_range(argv):
    flag, *values = argv.split()
    with pytest.raises(UserError, match=rf"^{flag} takes .*numbers? .*, not `({'|'.join(values)})`\.$"):
        parse(argv.split())


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        ("--epochs 5 --warmup-epochs 5", "at most 4"),
        ("--scale 1.0 0.5", "smaller number comes first"),
        ("--experiment a/b", "plain name"),
        ("--experiment ..", "plain name"),
        ("--color-jitter 0.4 0.4", "one number, or three"),
        ("--color-jitter strong", "--color-jitter takes numbers of at least 0, not `strong`"),
        ("--img-size 32 --model-kwargs img_size=64", "--img-size 32 and --model-kwargs img_size=64 differ"),
        ("--model-kwargs img_size=(32,64)", "images are square here"),
        ("--model-kwargs img_size=x", "images are square here"),
        ("--model-kwargs img_size=[32,32,32]", "images are square here"),
        ("--model-kwargs img_size={}", "images are square here"),
        ("--model-kwargs depth", "--model-kwargs takes NAME=VALUE, e.g. patch_size=2, not `depth`"),
        ("--opt-kwargs nesterov", "--opt-kwargs takes NAME=VALUE, e.g. nesterov=True, not `nesterov`"),
        ("--mean 0.5 0.5", "--mean takes one number, or three"),
        ("--decay-milestones 60 30", "--decay-milestones must increase"),
        ("--lr-noise 0.1 0.2 0.3", "--lr-noise takes one share"),
        ("--opt-betas 0.9", "^--opt-betas takes 2 or more numbers from 0 to below 1, not only `0.9`.$"),
        ("--opt-betas=0.9", "^--opt-betas takes 2 or more numbers from 0 to below 1, not only `0.9`.$"),
        ("--scale 1", "^--scale takes 2 numbers above 0, up to 1, not only `1`.$"),
        ("--img-size x", "^--img-size takes a whole number of at least 1, not `x`.$"),
        ("--lr fast", "^--lr takes a number above 0, not `fast`.$"),
        ("--seed 9223372036854775808", "^--seed takes .* from 0 to 9223372036854775807, not `9223372036854775808`.$"),
        ("--epochs 0", "^--epochs takes a whole number of at least 1, not `0`.$"),
        ("--device tpu", "--device takes auto, cpu, cuda or cuda:N, not `tpu`"),
        ("--cutmix-minmax 0.8 0.2", "smaller number comes first"),
        ("--global-batch-size 64 --grad-accum-steps 2", "--grad-accum-steps 2 and --global-batch-size 64 both say"),
        ("--global-batch-size 0", "--global-batch-size takes a whole number of at least 1, not `0`"),
        ("--mixup 0.8 --batch-size 1", "--mixup mixes each image with another .*--batch-size 1"),
        ("--mixup 0.8 --mix-block 1", "--mixup mixes each image with another .*--mix-block 1"),
        ("--cutmix 1 -b 1", "--cutmix mixes each image with another .*--batch-size 1"),
        ("--cutmix-minmax 0.2 0.8 -b 1", "--cutmix-minmax mixes"),
        ("--bce-sum", "--bce-sum needs --bce-loss"),
        ("--bce-target-thresh 0", "--bce-target-thresh needs --bce-loss"),
        ("--pretrained --initial-checkpoint a.pth", "Give one of them"),
        ("--pretrained-path b.pth --initial-checkpoint a.pth", "Give one of them"),
        ("--synthetic --data-dir x", "--synthetic reads no data, so --data-dir"),
        ("--synthetic --data x", "--synthetic reads no data, so --data-dir"),
        ("x --synthetic", "--synthetic reads no data, so --data-dir"),
        ("--dataset digits --synthetic", "--synthetic reads no data, so --dataset"),
        ("--checkpoint-interval soon", "--checkpoint-interval takes updates, e.g. 500, or minutes.* not `soon`"),
    ],
)
def test_options_that_cannot_be_had(argv, message):
    with pytest.raises(UserError, match=message):
        parse(argv.split())


def test_a_run_of_its_own_name_is_repeated_under_another(tmp_path):
    path = tmp_path / "args.yaml"
    path.write_text(to_yaml(parse(["--experiment", "x", "--resume", "x/last.pth.tar", "--lr", "1e-5"])))
    again = parse(["--config", str(path)])
    assert (again.run.experiment, again.run.resume, again.optim.lr) == ("", None, 1e-5)


def test_a_short_run_shortens_the_warm_up_unless_it_is_asked_for(tmp_path, capsys):
    path = tmp_path / "long.yaml"
    path.write_text("epochs: 300\nwarmup-epochs: 20\n")
    assert parse(["--config", str(path), "--epochs", "1"]).optim.warmup_epochs == 0
    assert "shortened to 0" in capsys.readouterr().out
    with pytest.raises(UserError, match="at most 0"):
        parse(["--config", str(path), "--epochs", "1", "--warmup-epochs", "3"])


def test_cpu_turns_off_what_is_meant_for_a_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert parse([]).step == Step(amp=True, compile=True)
    assert parse(["--device", "cpu"]).step == Step(device="cpu", amp=False, compile=False)
    assert parse(["--device", "cpu", "--amp"]).step == Step(device="cpu", amp=True, compile=False)


def test_default_config_is_valid():
    assert parse([]) == Config()


@pytest.mark.parametrize(
    ("text", "expected"),
    [("", (None, None)), ("500", (500, None)), ("10m", (None, 600.0)), ("0.5m", (None, 30.0)), ("1", (1, None))],
)
def test_checkpoint_intervals(text, expected):
    assert parse_interval(text) == expected
    assert parse(["--checkpoint-interval", text]).run.checkpoint_interval == text


@pytest.mark.parametrize("text", ["0", "0m", "-5", "1.5", "10s", "m", "1e3", "infm", "nanm", "5 m", "1_0"])
def test_bad_checkpoint_intervals(text):
    with pytest.raises(UserError, match=r"takes updates, e\.g\. 500, or minutes, e\.g\. 10m"):
        parse_interval(text)


def test_an_odd_batch_can_be_mixed():
    assert parse(["--mixup", "0.8", "--cutmix", "1", "-b", "3"]).data.batch_size == 3


def test_a_resumed_run_says_whose_weights_it_takes(capsys):
    for line in ("--pretrained", "--pretrained-path a.pth", "--initial-checkpoint a.pth"):
        parse(["--resume", "run/last.pth.tar", *line.split()])
        flag = line.split()[0].removesuffix("-path")
        note = f"note: the weights are those of --resume run/last.pth.tar; {flag} is not read again\n"
        assert capsys.readouterr().out == note
    parse(["--resume", "run/last.pth.tar"])
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("rank", "speaks"), [("", True), ("0", True), ("1", False), ("7", False)])
def test_of_several_ranks_one_speaks(rank, speaks, monkeypatch, capsys):
    monkeypatch.setenv("RANK", rank)
    parse(["--epochs", "1"])
    assert ("shortened to 0" in capsys.readouterr().out) == speaks


def test_an_odd_batch_that_is_mixed_is_said(capsys):
    parse(["-b", "71", "--mixup", "0.2"])
    assert "--batch-size 71 is odd: mixing pairs images" in capsys.readouterr().out
    parse(["-b", "71"])
    parse(["-b", "70", "--mixup", "0.2"])
    assert "odd" not in capsys.readouterr().out
