"""Trainings that become low-rank: at given epochs or on evidence, dry, stopped, resumed, and what they refuse."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from lowrank_vit import analyze_spectrum, compress, inference, validate
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.lowrank.switching import begin
from lowrank_vit.model.low_rank import with_products
from lowrank_vit.report.read import read_run
from lowrank_vit.report.switching.plots import switching_plot
from lowrank_vit.report.switching.read import in_words, read_switching
from lowrank_vit.training.trainer import Trainer
from tests.integration.conftest import SMALL, UPDATES
from tests.integration.test_ranks import altered, finish, forked
from tests.monitors import TIMES
from tests.runs import losses, records, same_weights, spectral_records, stop_after
from tests.settling import Told

EVERY = "--epochs 3 --log-interval 1 --drop-path 0.1 --mixup 0.2 --spec-every 4 --spec-full-every 2 --seed 3".split()
SCHEDULE = "--lowrank-train kfac --lowrank-schedule 1=0.4 2=0.2 --lowrank-calibration-images 200".split()
EVIDENCE = "--lowrank-train energy --lowrank-settled 2 --lowrank-switches 2".split()
Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(digits_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Uninterrupted runs by their options; each is made once."""
    made: dict[tuple[str, ...], Path] = {}

    def trained(*more: str) -> Path:
        if more not in made:
            output = tmp_path_factory.mktemp("whole")
            argv = [*SMALL, "--data-dir", str(digits_dir), "--output", str(output), *EVERY, *more]
            made[more] = Trainer(parse(argv), "whole").run().run_dir
        return made[more]

    return trained


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers settle at the looks that tests/settling.py says."""
    monkeypatch.setattr(begin, "Settling", Told)


def events(folder: Path, *kinds: str) -> list[dict[str, Any]]:
    return [one for one in records(folder, "lowrank") if one["event"] in kinds]


def state(folder: Path, name: str = "last.pth.tar") -> dict[str, Any]:
    return torch.load(folder / name, weights_only=True)


def test_at_the_given_epochs_layers_go_in_factors_and_shrink_and_until_then_no_bit_differs(run: Run):
    whole, dry, folder = run(), run(*SCHEDULE, "--lowrank-dry-run"), run(*SCHEDULE)
    assert losses(dry) == losses(whole)
    assert same_weights(dry / "last.pth.tar", whole / "last.pth.tar")
    both = losses(folder), losses(whole)
    assert [both[0][n] == both[1][n] for n in range(1, UPDATES + 1)] == [True] * UPDATES
    assert all(both[0][n] != both[1][n] for n in range(UPDATES + 2, 3 * UPDATES + 1))

    first, second = events(folder, "switch")
    assert (first["update"], first["epoch"], first["budget"]) == (UPDATES + 1, 1, 0.4)
    assert (second["update"], second["epoch"], second["budget"]) == (2 * UPDATES + 1, 2, 0.2)
    for one, budget in ((first, 0.4), (second, 0.2)):
        assert 0.9 * budget < one["share"] <= budget
        assert one["parameters"] < one["parameters_before"]
        assert one["flops"] < one["flops_before"]
    assert set(first["ranks_before"].values()) == {None}
    assert all(rank < second["ranks_before"][name] for name, rank in second["ranks"].items())
    content = state(folder)
    assert content["lowrank_ranks"] == {**first["ranks"], **second["ranks"]}
    assert content["lowrank"]["ranks"] == content["lowrank_ranks"]
    assert first["loss_before"] != first["loss"]
    of_dry = events(dry, "dry-run")
    assert of_dry[0]["ranks"] == first["ranks"]
    assert of_dry[0]["loss_before"] == first["loss_before"]
    assert of_dry[0]["loss"] == pytest.approx(first["loss"], rel=1e-5)
    assert [one["update"] for one in of_dry] == [first["update"], second["update"]]
    assert "lowrank_ranks" not in state(dry)
    assert "lowrank" not in state(whole)
    assert not records(whole, "lowrank")
    measured = records(folder, "speed")
    assert [one["switch"] for one in measured] == [first["update"], second["update"]]
    assert all(one["update"] > one["switch"] and one["img_per_s"] > 0 for one in measured)
    assert all(one["img_per_s_before"] > 0 for one in measured)
    switching = read_switching(folder)
    assert switching is not None
    assert [speed > 0 for pair in switching.speeds() for speed in pair] == [True] * 4
    assert not records(dry, "speed")


@pytest.mark.parametrize(
    "after",
    [
        UPDATES,  # at the end of the epoch before the first, not yet validated
        UPDATES + 1,  # at it
        2 * UPDATES + 3,  # after the one that shrinks
    ],
)
def test_resumed_is_uninterrupted_around_the_given_epochs(small: Any, run: Run, tmp_path: Path, after: int):
    whole = run(*SCHEDULE)
    check_resumed(small, tmp_path, whole, after, SCHEDULE)


@pytest.mark.parametrize("after", [8, 12, 17])  # with a refresh under way, at a switch, and between the two
def test_resumed_is_uninterrupted_around_what_evidence_leads_to(
    small: Any, run: Run, told: None, tmp_path: Path, after: int
):
    check_resumed(small, tmp_path, run(*EVIDENCE), after, EVIDENCE)


def check_resumed(small: Any, tmp_path: Path, whole: Path, after: int, flags: Sequence[str]) -> None:
    """Stop a run after some updates and resume it; all that it leaves is that of the whole one."""
    part = Trainer(parse(small(*EVERY, *flags)), "part")
    stop_after(part, after)
    folder = part.run().run_dir
    Trainer(parse([*small(*EVERY, *flags), "--resume", str(folder / "last.pth.tar")]), "part").run()
    assert losses(folder) == losses(whole)
    assert same_weights(folder / "last.pth.tar", whole / "last.pth.tar")
    assert records(folder, "lowrank") == records(whole, "lowrank")
    assert spectra(folder) == spectra(whole)


def spectra(folder: Path) -> list[dict[str, Any]]:
    """The lines about spectra, without what tells of time."""
    return [{k: v for k, v in line.items() if not k.endswith(TIMES)} for line in spectral_records(folder)]


@pytest.mark.parametrize("name", ["checkpoint-0.pth.tar", "checkpoint-1.pth.tar"])
def test_a_run_goes_on_from_the_checkpoint_of_an_epoch(small: Any, run: Run, tmp_path: Path, name: str):
    whole = run(*SCHEDULE)
    folder = tmp_path / "copy"
    shutil.copytree(whole, folder)
    Trainer(parse([*small(*EVERY, *SCHEDULE), "--resume", str(folder / name)]), "copy").run()
    assert losses(folder) == losses(whole)
    assert same_weights(folder / "last.pth.tar", whole / "last.pth.tar")
    assert records(folder, "lowrank") == records(whole, "lowrank")


def test_on_evidence_all_that_are_due_switch_at_the_next_refresh_and_so_often_as_is_allowed(
    run: Run, told: None, capsys: pytest.CaptureFixture[str]
):
    folder, dry = run(*EVIDENCE), run(*EVIDENCE, "--lowrank-dry-run")
    switches = events(folder, "switch")
    # Whole refreshes: 0, 8, 16, ... The second look is at 8 for the first block, the third at 16 for the second.
    assert [one["update"] for one in switches] == [12, 20]
    assert [sorted({name.split(".")[1] for name in one["ranks"]}) for one in switches] == [["0"], ["1"]]
    assert {rank for one in switches for rank in one["ranks"].values()} == {9}
    assert events(folder, "used-up")[0]["update"] == 20
    assert "this was switch 2 of --lowrank-switches 2" in capsys.readouterr().out
    assert [one["seen"] for one in events(folder, "evidence")] == [0, 8, 16]
    assert losses(dry) == losses(run())
    assert [(one["update"], one["ranks"]) for one in events(dry, "dry-run")] == [
        (one["update"], one["ranks"]) for one in switches
    ]


def test_a_run_of_full_rank_is_not_resumed_as_low_rank_nor_the_other_way(small: Any, run: Run):
    for before, now, was in (((), SCHEDULE, "none, now kfac"), (SCHEDULE, (), "kfac, now none")):
        last = str(run(*before) / "last.pth.tar")
        with pytest.raises(UserError, match=rf"other options: --lowrank-train was {was}.*--initial-checkpoint"):
            Trainer(parse([*small(*EVERY, *now), "--resume", last]), "x")
    last = str(run(*SCHEDULE) / "last.pth.tar")
    for more in (["--spec-every", "8"], ["--spec-full-every", "1"], ["--lowrank-settled", "9"]):
        with pytest.raises(UserError, match=rf"other options: {more[0]} was"):
            Trainer(parse([*small(*EVERY, *SCHEDULE), *more, "--resume", last]), "x")


def test_ranks_decide_alike_and_one_process_goes_on_from_what_they_saved(
    small: Any, run: Run, told: None, tmp_path: Path
):
    """Each of two ranks is shown a share of the layers, and one has all of them afterwards."""
    program = altered(
        tmp_path,
        """
        from tests.settling import Told
        t.setup.low_rank.settling = Told(times=2)
        """,
    )
    argv = small(*EVERY, *EVIDENCE)
    code, out, err = finish(forked(2, [*argv, "-b", "64", "--experiment", "two"], program=program))
    assert code == 0, err
    whole, folder = run(*EVIDENCE), tmp_path / "two"
    assert out.count("low rank at update") == 2
    for ours, expected in zip(events(folder, "switch"), events(whole, "switch"), strict=True):
        assert (ours["update"], ours["ranks"]) == (expected["update"], expected["ranks"])
        assert ours["loss"] == pytest.approx(expected["loss"], rel=1e-3)
    seen = [[(one["update"], one["layers"]) for one in events(of, "evidence")] for of in (folder, whole)]
    assert seen[0] == seen[1]
    of_whole = losses(whole)
    assert losses(folder) == pytest.approx(of_whole, rel=5e-3)
    # Between two refreshes: what was seen at update 8 is still to act.
    Trainer(parse([*argv, "--resume", str(folder / "checkpoint-0.pth.tar")]), "two").run()
    assert losses(folder) == pytest.approx(of_whole, rel=5e-3)
    assert [one["update"] for one in events(folder, "switch")] == [12, 20]


def test_a_run_too_short_for_a_layer_to_settle_is_warned_of(small: Any, capsys: pytest.CaptureFixture[str]):
    """Whole refreshes at 0, 8, 16 and 24 of 33 updates: the third look after the first acts at 28."""
    few, enough, scheduled = EVERY, [*EVERY, "--lowrank-settled", "3"], [*EVERY, *SCHEDULE]
    for flags, is_warned in ((["--lowrank-settled", "4", *few], True), (enough, False), (scheduled, False)):
        rule = [] if flags is scheduled else ["--lowrank-train", "energy"]
        Trainer(parse([*small(*rule, *flags)]), "x")
        line = (
            "cannot factorise any layer in this run: with --lowrank-settled 4 and a complete refresh every 8 updates, "
        )
        assert (line in capsys.readouterr().out) == is_warned


def test_targets_of_which_no_factors_save_anything_are_named():
    model, config = torch.nn.Module(), parse("--spec-monitor --lowrank-train energy --lowrank-targets head".split())
    model.head = torch.nn.Linear(9, 1)
    with pytest.raises(
        UserError, match=r"targets head: factors of no rank have fewer weights than head \(1 x 9\)\. Name"
    ):
        begin.check_low_rank_training(config, model, 3)


def test_a_model_that_is_in_factors_already_is_refused(small: Any, run: Run):
    last = str(run(*SCHEDULE) / "last.pth.tar")
    with pytest.raises(UserError, match=r"already: blocks.0.attn.qkv and 7 more\. .* leave out --lowrank-train"):
        Trainer(parse([*small(*EVERY, *SCHEDULE), "--initial-checkpoint", last]), "x")


def test_every_command_takes_the_checkpoint_of_a_run_that_switched(
    small: Any, run: Run, digits_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """And all mean the products of its factors, as the monitor does."""
    folder = run(*SCHEDULE, "--spec-every", str(UPDATES))  # so that the last refresh is of the last weights
    last, ranks = folder / "last.pth.tar", state(folder)["lowrank_ranks"]
    of_run, on_cpu = ["--checkpoint", str(last)], ["--device", "cpu"]
    data = ["--data", str(digits_dir)]

    logged = records(folder, "eval")[-1]
    for more in ((), ("--use-ema",)):
        validate.main([*of_run, *data, *on_cpu, *more, "--results-file", str(tmp_path / "scores.json")])
        found = json.loads((tmp_path / "scores.json").read_text())
        assert found["top1"] == pytest.approx(logged["eval_ema_top1" if more else "eval_top1"], abs=0.01)

    Image.new("RGB", (16, 16), (9, 90, 200)).save(tmp_path / "one.png")
    inference.main([str(tmp_path / "one.png"), *of_run, *on_cpu, "--output", str(tmp_path / "classes.csv")])
    assert "one.png" in (tmp_path / "classes.csv").read_text()

    newest = spectral_records(folder)[-1]
    assert {name: newest[f"spec/{name}/numerical_rank"] for name in ranks} == ranks
    analyze_spectrum.main([*of_run, "--save-dir", str(tmp_path / "spectra")])
    (file,) = (tmp_path / "spectra").glob("*.json")
    layers = json.loads(file.read_text())["layers"]
    assert {name: layers[name]["numerical_rank"] for name in ranks} == ranks
    assert newest["update"] == state(folder)["step"]["num_updates"]
    for name in ranks:
        assert layers[name]["sigma_max"] == pytest.approx(newest[f"spec/{name}/sigma_max"])

    capsys.readouterr()
    merged = tmp_path / "merged.pth.tar"
    compress.main([str(last), *data, *on_cpu, "--budget", "1", "--method", "svd", "--merge", str(merged)])
    assert f"{len(ranks)} layers are factorised already" in capsys.readouterr().out
    plain = torch.load(merged, weights_only=True)
    assert "lowrank_ranks" not in plain
    for name, product in with_products(state(folder)["state_dict"]).items():
        torch.testing.assert_close(plain["state_dict"][name].double(), product.double(), atol=1e-5, rtol=0)

    more = ["--epochs", "1", "--warmup-epochs", "0", "--initial-checkpoint", str(last), "--no-spec-monitor"]
    tuned = Trainer(parse(small(*more)), "tuned").run().run_dir
    assert state(tuned)["lowrank_ranks"] == ranks
    assert "lowrank" not in state(tuned)

    switching = read_switching(folder)
    assert switching is not None
    assert [(one.update, one.is_dry) for one in switching.switches] == [(UPDATES + 1, False), (2 * UPDATES + 1, False)]
    assert switching.ranks_after(2) == ranks
    assert switching.looks
    assert all(" → " in line and " img/s" in line for line in in_words(switching))
    assert switching_plot(read_run(folder))
    assert [one.is_dry for one in (read_switching(run(*SCHEDULE, "--lowrank-dry-run")) or switching).switches] == [
        True
    ] * 2
