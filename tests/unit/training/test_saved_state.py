"""A run goes on from a checkpoint that holds what it must, and names what is not so in any other."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.config.options import Config
from lowrank_vit.model.weights import Checkpoint, read_checkpoint
from lowrank_vit.run.state import RunState
from lowrank_vit.training.resume import as_resumed, capture, restore
from lowrank_vit.training.setup import Setup, set_up, silent
from tests.integration.conftest import SMALL

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning")  # torch's, about the odd tensors
ODD: list[Any] = [
    *(None, 3, -1, 2.5, "x", True, [], {}, float("nan"), float("inf"), 10**30, [1, 2], {"a": 1}),
    *(torch.zeros(3, 5), torch.zeros(2, dtype=torch.complex64), torch.eye(3).to_sparse(), torch.tensor(float("nan"))),
]
UNUSED = {"version", "arch", "epoch", "metric", "better", "is_finite", "num_classes", "input"}
"""For people, for timm and for other commands."""


class Run:
    """A run that has made some updates, and what it has saved."""

    def __init__(self, argv: list[str], path: Path) -> None:
        self.config = parse([*argv, "--resume", str(path)])
        setup = set_up(self.config)
        self.state, self.setup, self.path = RunState(setup.step.position), setup, path
        setup.model.train()
        self.batch = next(setup.train_loader.batches(0))
        for _ in range(3):
            setup.step(self.batch)
            setup.scheduler.step_update(self.state.position.num_updates)
        self.content: dict[str, Any] = copy.deepcopy(capture(setup, self.state))

    def go_on(self, content: dict[str, Any], config: Config | None = None) -> None:
        """Go on from a file of that content, and make an update. Raises `UserError`."""
        torch.save(content, self.path)
        checkpoint = read_checkpoint(self.path)
        setup = self._like_new()
        as_resumed(config or self.config, checkpoint, silent)
        state = RunState(setup.step.position)
        restore(setup, state, checkpoint)
        setup.step(self.batch)
        capture(setup, state)

    def _like_new(self) -> Setup:
        self.setup.optimizer.load_state_dict(copy.deepcopy(self.content["optimizer"]))
        return self.setup


@pytest.fixture(scope="module")
def run(digits_dir, tmp_path_factory) -> Run:
    argv = [*SMALL, "--data-dir", str(digits_dir), "--lr", "1e-3", "-b", "16"]
    return Run(argv, tmp_path_factory.mktemp("state") / "last.pth.tar")


def changed(
    content: dict[str, Any], place: tuple[Any, ...], value: Any = None, *, gone: bool = False
) -> dict[str, Any]:
    """The content with another value in one place, or without it."""
    content = copy.deepcopy(content)
    holder: Any = content
    for key in place[:-1]:
        holder = holder[key]
    if gone:
        del holder[place[-1]]
    else:
        holder[place[-1]] = value
    return content


def places(value: Any, above: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    if above:
        yield above
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, one in items:
        yield from places(one, (*above, key))


def test_what_was_saved_is_taken(run):
    run.go_on(run.content)


def test_whatever_stands_anywhere_else_is_taken_or_told(run):
    """80 of the changes, to a key as often as to another, however much there is below it."""
    draw, by_key = random.Random(1), dict[str, list[tuple[Any, ...]]]()
    for place in places(run.content):
        if place[0] not in UNUSED:
            by_key.setdefault(place[0], []).append(place)
    told = 0
    for _ in range(80):
        place = draw.choice(by_key[draw.choice(list(by_key))])
        n = draw.randrange(-1, len(ODD))
        try:
            run.go_on(changed(run.content, place, ODD[n], gone=n < 0))
        except UserError as error:
            told += len(str(error)) < 1000
    assert told > 40


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("progress",), 3, r"cannot be resumed: it lacks `progress`, since it is .* a part missing"),
        (("progress", "epoch"), "1", r"its `progress` has '1' for `epoch`, but a whole number, 0 or more is expected"),
        (("progress", "epoch"), True, r"its `progress` has True for `epoch`"),
        (("progress", "epoch"), 1, r"its counts contradict each other: 3 updates, but 1 epochs of 89 and 3 more"),
        (("progress", "updates_done"), 10**30, r"contradict"),
        (("progress", "loss_sum"), float("nan"), r"its `progress` has nan for `loss_sum`, but a finite number"),
        (("progress", "new"), 1, r"its `progress` has the unknown entry 'new'"),
        (("progress", "kept"), [1, 2], r"its `progress` has \[1, 2\] for `kept`"),
        (("step", "num_updates"), -3, r"its `step` has -3 for `num_updates`"),
        (
            ("step", "meter", "sums"),
            torch.zeros(2),
            r"a tensor of float32, \(2,\) for `sums`, but two finite numbers",
        ),
        (("step", "meter", "lrs"), {}, r"0 of them logged and 0 not"),
        (("step", "scaler"), {"scale": 1.0}, r"its `step.scaler` lacks `growth_factor`"),
        (("data", "update"), 2, r"its data are at epoch 0, update 2, but the run is at 0, 3"),
        (("data", "seed"), 1.5, r"its `data` has 1.5 for `seed`"),
        (("args", "smoothing"), "x", r"its `args` has 'x' for --smoothing, which does not take this value"),
        (("args", "smoothing"), torch.zeros(2), r"its `args` has a tensor of float32, \(2,\) for --smoothing"),
        (("class_names",), "cats", r"its `class_names` is 'cats', not a list of names"),
        (
            ("state_dict", "head.bias"),
            torch.full((10,), torch.nan),
            r"its `state_dict` has NaN values in head.bias",
        ),
        (("optimizer", "state"), {}, r"its optimizer lacks the `step` of a parameter of shape"),
        (
            ("optimizer", "state", 0, "exp_avg"),
            torch.zeros(2),
            r"its optimizer's `exp_avg` of .* is a tensor of float32",
        ),
        (("optimizer", "param_groups", 0, "lr"), float("nan"), r"its optimizer's `lr` of group 0 is nan"),
        (("optimizer", "param_groups", 0, "betas"), [0.9], r"its optimizer's `betas` of group 0 is \[0.9\]"),
        (
            ("optimizer", "param_groups"),
            [],
            r"was saved with another optimizer, or is damaged: its groups have other",
        ),
    ],
)
def test_what_is_wrong_is_named(run, place, value, message):
    with pytest.raises(UserError, match=message) as caught:
        run.go_on(changed(run.content, place, value))
    assert str(caught.value).count("\n") == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda one: one["optimizer"]["state"][0].update(
                exp_avg=one["optimizer"]["state"][0]["exp_avg"].to_sparse()
            ),
            "exp_avg",
        ),
        (
            lambda one: one["state_dict"].update({"head.weight": one["state_dict"]["head.weight"].to_sparse()}),
            "sparse_coo",
        ),
        (lambda one: one["step"]["meter"].update(sums=one["step"]["meter"]["sums"].to_sparse()), "`sums`"),
    ],
)
def test_sparse_tensors_are_told(run, change: Callable[[dict[str, Any]], None], message):
    content = copy.deepcopy(run.content)
    change(content)
    with pytest.raises(UserError, match=message):
        run.go_on(content)


def test_a_run_in_float16_needs_its_scale(run):
    content = copy.deepcopy(run.content)
    content["args"].update({"amp": True, "amp-dtype": "float16"})
    with pytest.raises(UserError, match=r"cannot be resumed: its `step.scaler` lacks `scale`"):
        run.go_on(content)


def test_older_files_lack_what_came_later(run):
    content = copy.deepcopy(run.content)
    for name in ("lr", "best_scores", "better", "is_chosen_by_ema", "tracker_ids"):
        del content["progress"][name]
    run.go_on(content)


def test_the_wandb_run_of_an_older_file_goes_on():
    saved = RunState(tracker_ids={"wandb": "abc", "mlflow": "x"}).state_dict()
    newer, older = RunState(), RunState()
    newer.load_state_dict(saved, 0)
    older.load_state_dict({"wandb_id": "abc", **{k: v for k, v in saved.items() if k != "tracker_ids"}}, 0)
    assert newer.tracker_ids == {"wandb": "abc", "mlflow": "x"}
    assert older.tracker_ids == {"wandb": "abc"}


@pytest.mark.parametrize("opt", ["sgd", "lookahead_adamw", "adafactorbv", "muon"])
def test_every_optimizers_own_state_is_taken(digits_dir, tmp_path, opt):
    run = Run(
        [*SMALL, "--data-dir", str(digits_dir), "--lr", "1e-3", "-b", "16", "--opt", opt], tmp_path / "last.pth.tar"
    )
    run.go_on(run.content)
    tensors = [
        (number, name)
        for number, state in run.content["optimizer"]["state"].items()
        for name, value in state.items()
        if isinstance(value, Tensor)
    ]
    for number, name in tensors[:: max(1, len(tensors) // 5)]:
        with pytest.raises(UserError, match=f"`{name}`"):
            run.go_on(changed(run.content, ("optimizer", "state", number, name), torch.zeros(2, 5)))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"w": torch.ones(2)}, "a file with weights only"),
        ({"state_dict": {"w": torch.ones(2)}}, "a file with weights only"),
        (
            {"model": {"w": torch.ones(2)}, "optimizer": {}, "epoch": 3},
            r"a checkpoint of another program \(its optimizer, epoch are",
        ),
    ],
)
def test_what_is_no_runs_checkpoint_is_told_which_flag_takes_it(tmp_path, content, kind):
    torch.save(content, tmp_path / "w.pth")
    message = rf"it lacks `.*`, since it is {kind}.*--initial-checkpoint .*w.pth, or with --pretrained-path .*w.pth"
    with pytest.raises(UserError, match=message):
        as_resumed(Config(), read_checkpoint(tmp_path / "w.pth"), silent)
    with pytest.raises(
        UserError, match=r"it is Google's arrays. .* start a new run from these weights with --pretrained-path"
    ):
        as_resumed(Config(), Checkpoint(tmp_path / "w.npz", {}, is_npz=True), silent)
