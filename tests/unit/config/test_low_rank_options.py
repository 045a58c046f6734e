"""Options of training that becomes low-rank."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.config.low_rank_options import LowRank, parse_schedule
from lowrank_vit.config.option_types import leaves, may_change
from lowrank_vit.config.options import Config


def test_a_schedule_is_a_share_by_the_number_of_epochs_before():
    line = "--config configs/quickstart.yaml --lowrank-train kfac --lowrank-schedule 8=0.15 20=.08 30=1e-2"
    assert parse_schedule(parse(shlex.split(line)).lowrank.lowrank_schedule) == {8: 0.15, 20: 0.08, 30: 0.01}
    assert parse_schedule(()) == {}


@pytest.mark.parametrize(
    "texts",
    [
        "8",
        "8=",
        "=0.1",
        "8:0.1",
        "8=0",
        "8=1",
        "8=1.5",
        "8=nan",
        "8=inf",
        "-1=0.1",
        "8.5=0.1",
        "8=0.1,20=0.08",
        "a=b",
        "8=-0.1",
    ],
)
def test_what_is_no_schedule_is_shown_one(texts: str):
    with pytest.raises(UserError, match=r"takes EPOCH=BUDGET, a whole number and a share .* 8=0.15 20=0.08; not `"):
        parse_schedule(tuple(texts.split()))


@pytest.mark.parametrize(
    ("texts", "why"),
    [
        ("20=0.15 8=0.08", "epoch 8 follows epoch 20"),
        ("8=0.15 8=0.08", "epoch 8 follows epoch 8"),
        ("8=0.08 20=0.15", "ranks never grow, so 20=0.15 does nothing after 8=0.08"),
        ("0=0.15", "the smallest EPOCH is 1"),
    ],
)
def test_a_schedule_goes_forward_and_down(texts: str, why: str):
    with pytest.raises(UserError, match=why):
        parse_schedule(tuple(texts.split()))


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("--lowrank-train kfac", "needs the refreshes of --spec-monitor, which is off. Add --spec-monitor"),
        ("--spec-monitor --lowrank-train kfac --lowrank-schedule 8", "takes EPOCH=BUDGET"),
        ("--spec-monitor --lowrank-train svd", "--lowrank-train takes one of none, energy, mp, kfac, not `svd`"),
        (
            "--spec-monitor --lowrank-train mp --lowrank-init 0.2",
            "--lowrank-init factorises the targets from the start",
        ),
        (
            "--lora 4 --lowrank-init 0.2",
            "--lora keeps the targets' own weights .*, and --lowrank-init changes them",
        ),
        ("--spec-monitor --lora 4 --lowrank-train mp", "--lora keeps .* and --lowrank-train changes them"),
        ("--lora 4 --reg-nuclear 0.1", "--lora keeps .* and --reg-nuclear changes them"),
        ("--lora 4 --spectral-clip 2", "--lora keeps .* and --spectral-clip changes them"),
        ("--lora 0", "--lora takes a whole number of at least 1"),
        ("--lora 4 --lora-alpha 0", "--lora-alpha takes a number above 0"),
        ("--lora 4 --lora-dropout 1", "--lora-dropout takes a number from 0 to below 1"),
        ("--lowrank-init 0", "--lowrank-init takes a number above 0, up to below 1"),
        ("--lowrank-init 1", "--lowrank-init takes a number above 0, up to below 1"),
        (
            "--spec-monitor --lowrank-train kfac --lowrank-budget 0",
            "--lowrank-budget takes a number above 0, up to",
        ),
        (
            "--spec-monitor --lowrank-train kfac --lowrank-budget 1",
            "--lowrank-budget takes a number above 0, up to",
        ),
        ("--spec-monitor --lowrank-train energy --lowrank-energy 1", "--lowrank-energy takes a number above 0, up"),
        ("--spec-monitor --lowrank-train mp --lowrank-thresholds 0.7 0.7 1", "--lowrank-thresholds takes"),
        ("--spec-monitor --lowrank-train mp --lowrank-schedule 1=1", "a share above 0 and below 1.*not `1=1`"),
        (
            "--spec-monitor --lowrank-train kfac --lowrank-schedule 2=0.4 4=0.3 6=0.2 8=0.1",
            "has 4 epochs, and --lowrank-switches 3 lets a run switch no more often .* Add --lowrank-switches 4",
        ),
        (
            "--spec-monitor --lowrank-train mp --lowrank-switches 0",
            "--lowrank-switches takes a whole number of at least 1",
        ),
        (
            "--spec-monitor --lowrank-train mp --lowrank-at-once 1.5",
            "--lowrank-at-once takes a number from 0 to 1",
        ),
    ],
)
def test_what_contradicts_is_said_before_anything_is_opened(line: str, why: str):
    with pytest.raises(UserError, match=why):
        parse(shlex.split(line))


def test_what_decides_when_and_how_much_stays_as_it_is_on_resume():
    assert not [name for name, hint, _ in leaves(Config().lowrank) if may_change(hint)]


TRAIN = "--spec-monitor --lowrank-train"
WITH = {
    "--lora-alpha 8": ["--lora 4"],
    "--lora-dropout 0.1": ["--lora 4"],
    "--lowrank-targets mlp.fc1": [f"{TRAIN} mp", "--lowrank-init 0.2", "--lora 4", "--spectral-clip 2"],
    "--lowrank-energy 0.8": [f"{TRAIN} energy", f"{TRAIN} kfac --lowrank-schedule 8=0.15"],
    "--lowrank-budget 0.3": [f"{TRAIN} kfac"],
    "--lowrank-settled 5": [f"{TRAIN} mp", f"{TRAIN} kfac --lowrank-schedule 8=0.15"],
    "--lowrank-thresholds 0.8 0.7 0.3": [f"{TRAIN} mp"],
    "--lowrank-switches 1": [f"{TRAIN} mp --lowrank-dry-run", f"{TRAIN} kfac --lowrank-schedule 8=0.15"],
    "--lowrank-at-once 0": [f"{TRAIN} mp --lowrank-dry-run"],
    "--lowrank-schedule 8=0.15": [f"{TRAIN} energy"],
    "--lowrank-dry-run": [f"{TRAIN} energy"],
    "--lowrank-moments restart": [f"{TRAIN} mp --lowrank-dry-run"],
    "--lowrank-decay product": [f"{TRAIN} mp", "--lowrank-init 0.2"],
    "--lowrank-calibration-images 99": [f"{TRAIN} kfac", f"{TRAIN} energy"],
    "--reg-every 3": ["--reg-nuclear 0.1", "--reg-stable-rank 0.1", "--spectral-clip 2"],
    "--reg-targets mlp.fc1": ["--reg-nuclear 0.1", "--reg-stable-rank 0.1", "--spectral-clip 2"],
    "--reg-coupled": ["--reg-nuclear 0.1", "--reg-stable-rank 0.1"],
}
"""Options that do nothing alone, and what each of them does something with."""
BY_THEMSELVES = {"lowrank-train", "lowrank-init", "lora", "reg-nuclear", "reg-stable-rank", "spectral-clip"}


@pytest.mark.parametrize("option", WITH)
def test_an_option_that_would_do_nothing_is_refused(option: str):
    name = option.split()[0]
    with pytest.raises(UserError, match=rf"^{name} (needs|names) .* Add .*, or leave it out\.$"):
        parse(option.split())
    for others in WITH[option]:
        parse(f"{option} {others}".split())


@pytest.mark.parametrize(
    ("line", "why"),
    [
        (f"{TRAIN} mp --lowrank-energy 0.8", "--lowrank-energy needs --lowrank-train energy"),
        (f"{TRAIN} kfac --lowrank-energy 0.8", "--lowrank-energy needs --lowrank-train energy"),
        (f"{TRAIN} energy --lowrank-budget 0.3", "--lowrank-budget needs --lowrank-train kfac"),
        (f"{TRAIN} kfac --lowrank-schedule 8=0.15 --lowrank-budget 0.3", "--lowrank-schedule sets the epochs"),
        ("--lowrank-init 0.2 --lowrank-moments restart", "--lowrank-moments needs --lowrank-train"),
        ("--lora 4 --lowrank-decay product", "--lowrank-decay needs layers that"),
        ("--spectral-clip 2 --reg-targets fc1 --lowrank-targets fc1", "regularisers without --reg-targets"),
        ("--reg-targets fc1", "needs --reg-nuclear, --reg-stable-rank or --spectral-clip, and none"),
        ("--spectral-clip 2 --reg-coupled", "needs --reg-nuclear or --reg-stable-rank, and neither"),
    ],
)
def test_an_option_that_the_others_leave_nothing_to_do_is_refused(line: str, why: str):
    with pytest.raises(UserError, match=why):
        parse(line.split())


def test_defaults_may_be_spelled_and_every_option_is_known_to_do_something(tmp_path: Path):
    options = list(leaves(Config().lowrank))
    assert {name for name, _, _ in options} == BY_THEMSELVES | {option.split()[0].removeprefix("--") for option in WITH}
    path = tmp_path / "args.yaml"
    path.write_text("".join(f"{name}: {json.dumps(value)}\n" for name, _, value in options))
    assert parse(["--config", str(path)]).lowrank == LowRank()
