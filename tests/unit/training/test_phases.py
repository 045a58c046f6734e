"""A listener hears every phase of the real loop, in order and nested, and changes no bit of it."""

from __future__ import annotations

import json
import time
from collections.abc import Generator
from typing import cast

import torch

from lowrank_vit.config.flags import parse
from lowrank_vit.ranks.signs import Progress
from lowrank_vit.run.directory import RunDir
from lowrank_vit.run.state import Position
from lowrank_vit.training.phases import Phase, PhaseListener, Phases, ToldToRanks
from lowrank_vit.training.trainer import Trainer
from tests.runs import losses, same_weights

TINY = """
--device cpu --no-compile --model vit_tiny_patch16_224
--model-kwargs patch_size=4 embed_dim=16 depth=1 num_heads=1 class_token=False global_pool=avg
--drop 0.1 --img-size 16 --epochs 2 --warmup-epochs 0 -b 128 --log-interval 1
--spec-monitor --spec-every 100 --aa rand-m9-mstd0.5-inc1
""".split()
INSIDE = {"augment": "data", **dict.fromkeys(("inputs", "forward", "backward", "optimizer", "ema"), "step")}
UPDATES = 22


class Recorder(PhaseListener):
    def __init__(self) -> None:
        self.began: list[Phase] = []
        self._open: list[Phase] = []

    def begin(self, phase: Phase) -> None:
        around = [one for one in self._open if one != "epoch"]
        assert around == ([INSIDE[phase]] if phase in INSIDE else [])
        self._open.append(phase)
        self.began.append(phase)

    def end(self, phase: Phase) -> None:
        assert self._open.pop() == phase


def test_a_listener_hears_the_whole_loop_and_changes_no_bit(digits_dir, tmp_path, monkeypatch):
    """Nor does who takes the updates one by one, and takes its time."""
    argv = [*TINY, "--data-dir", str(digits_dir), "--output", str(tmp_path)]
    recorder = Recorder()
    heard = Trainer(parse([*argv, "--experiment", "heard"]), "x", listener=recorder).run().run_dir
    trainer = Trainer(parse([*argv, "--experiment", "alone"]), "x")
    clock, passed, seen = time.perf_counter, [0.0], list[int]()
    monkeypatch.setattr("time.perf_counter", lambda: clock() + passed[0])
    for position in trainer.updates():
        seen.append(position.num_updates)
        passed[0] += 1e4
    assert seen == list(range(1, UPDATES + 1))
    assert trainer.result.train_s < 1e4
    alone = trainer.result.run_dir
    lines = map(json.loads, (alone / "metrics.jsonl").read_text().splitlines())
    assert min(line["img_per_s"] for line in lines if line["kind"] == "train") > UPDATES * 128 / 1e4
    assert losses(heard) == losses(alone)
    assert same_weights(*(run / "last.pth.tar" for run in (heard, alone)))
    count = {phase: recorder.began.count(phase) for phase in dict.fromkeys(recorder.began)}
    assert count["epoch"] == count["evaluation"] == 2
    assert count["data"] == UPDATES + 2  # with the end of each epoch
    for phase in ("augment", "step", "inputs", "forward", "backward", "optimizer", "ema", "refresh", "log"):
        assert count[phase] == UPDATES
    assert count["checkpoint"] == UPDATES + 2 * 2
    one = recorder.began[: recorder.began.index("checkpoint")]
    assert one == ["epoch", "data", "augment", "step", *list(INSIDE)[1:], "refresh", "log"]


def test_an_abandoned_run_closes_what_it_has_opened(digits_dir, tmp_path):
    trainer = Trainer(parse([*TINY, "--data-dir", str(digits_dir), "--output", str(tmp_path)]), "x")
    updates = trainer.updates()
    next(updates)
    updates.close()
    RunDir.reopen(trainer.run_dir.path).close()  # nobody owns it any more
    assert not list(trainer.run_dir.path.glob("*.pth.tar"))


def test_work_of_a_thread_counts_where_a_phase_may_wait_for_it():
    progress = Progress()
    told = Phases(ToldToRanks(progress, Position(), None))
    counts = dict[Phase, bool]()
    for phase in ("refresh", "checkpoint", "backward", "evaluation"):
        with told(phase):
            counts[phase] = progress.is_background
    assert counts == {"refresh": True, "checkpoint": True, "backward": False, "evaluation": False}


def test_without_a_listener_nothing_is_wrapped():
    phases, items = Phases(), iter([torch.zeros(1)])
    assert phases.each("data", items) is items
    assert phases.around("augment", losses) is losses
    assert phases("step") is phases("ema")


def test_closing_the_items_of_a_phase_closes_what_makes_them():
    closed: list[bool] = []

    def made() -> Generator[int]:
        try:
            yield from range(3)
        finally:
            closed.append(True)

    source = made()
    items = Phases(Recorder()).each("data", source)
    next(items)
    cast(Generator[int], items).close()
    assert closed
