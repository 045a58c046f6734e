"""When layers of a training go in factors: what has settled is waited for and acts at the next refresh."""

from __future__ import annotations

import copy
import io
import re
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lowrank_vit.config.low_rank_options import LowRank
from lowrank_vit.lowrank.layers import costs_alone
from lowrank_vit.lowrank.switching import controller
from lowrank_vit.lowrank.switching.controller import LowRankTraining, Span
from lowrank_vit.lowrank.switching.planner import Planner
from lowrank_vit.model.low_rank import low_rank_layers, ranks_of
from lowrank_vit.model.optimizer import Constant
from lowrank_vit.ranks.world import World
from tests.settling import Told
from tests.unit.lowrank.examples import model_and_images

EVIDENCE = LowRank(lowrank_train="energy", lowrank_settled=2)
SCHEDULED = LowRank(lowrank_train="kfac", lowrank_schedule=("1=0.7", "3=0.5"))
SPAN = Span(full_every=4, last_update=40)
"""A refresh is due every second update."""


def training(options: LowRank, **changes: Any) -> LowRankTraining:
    """Of a small model that has made one step; layers settle at ranks 3, then 2, then 1."""
    model, images = model_and_images()
    optimizer = torch.optim.AdamW(model.parameters())
    model(images).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    labels = torch.arange(len(images)) % 3
    made = LowRankTraining(
        options=options,
        model=model,
        ema=None,
        optimizer=optimizer,
        scheduler=Constant(),
        costs=costs_alone({name: layer.weight for name, layer in model.targets().items()}),
        settling=Told(times=options.lowrank_settled, ranks=(3, 2, 1)),  # type: ignore[arg-type]
        planner=Planner(options, lambda: [(images, labels)], 4, 0),
        span=SPAN,
        world=World(),
        rebuild=lambda: None,
    )
    return replace(made, **changes)


def go(one: LowRankTraining, updates: range, seen: Callable[[Tensor], Tensor] = lambda weight: weight) -> list[int]:
    """Refresh at every second update; those at which the model has changed."""
    changed: list[int] = []
    for update in updates:
        if update % 2 == 0:
            if one.at_refresh(update):
                changed.append(update)
            if update % SPAN.full_every == 0:
                one.see(update, {name: seen(weight_of(one.model, name)) for name in one.costs.layers})
    return changed


def weight_of(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Module)
    return layer.weight if isinstance(layer, nn.Linear) else layer.up @ layer.down  # type: ignore[operator]


def told(one: LowRankTraining) -> dict[str, list[dict[str, Any]]]:
    """Values of what has happened, by kind of event."""
    found: dict[str, list[dict[str, Any]]] = {}
    for event in one.events():
        found.setdefault(event.values["event"], []).append({"update": event.update, "line": event.line, **event.values})
    return found


def test_what_has_settled_acts_at_the_next_refresh_and_not_before():
    one = training(replace(EVIDENCE, lowrank_switches=2))
    assert go(one, range(6)) == []  # whole refreshes at 0 and 4 settle the first block
    assert ranks_of(one.model) == {}
    assert go(one, range(6, 7)) == [6]
    assert ranks_of(one.model) == {"blocks.0.fc1": 3, "blocks.0.fc2": 3}
    assert go(one, range(7, 20)) == [10]  # the second block's third look is at 8
    assert ranks_of(one.model) == dict.fromkeys(one.costs.layers, 3)
    seen = told(one)
    assert [event["update"] for event in seen["switch"]] == [6, 10]
    assert [event["seen"] for event in seen["evidence"]] == [0, 4, 8]
    assert seen["used-up"][0]["line"].startswith("low rank: this was switch 2 of --lowrank-switches 2")
    assert "2 layers from full rank to rank 3" in seen["switch"][0]["line"]
    assert seen["switch"][0]["layers"]["blocks.0.fc1"]["streak"] == 2
    assert not one.events()


def test_layers_in_factors_shrink_later():
    one = training(EVIDENCE)
    assert go(one, range(20)) == [6, 10, 18]  # at 14 the first block alone is due, half of them, and waits
    assert ranks_of(one.model) == dict.fromkeys(one.costs.layers, 2)


def test_a_refresh_that_is_done_again_or_out_of_turn_is_not_counted():
    one = training(EVIDENCE)
    go(one, range(5))
    before = one.state_dict()
    for update in (4, 0, 6):
        one.see(update, {name: weight_of(one.model, name) for name in one.costs.layers})
    assert one.state_dict() == before


@pytest.mark.parametrize("options", [EVIDENCE, SCHEDULED, replace(EVIDENCE, lowrank_train="kfac", lowrank_budget=0.7)])
def test_weights_that_are_no_numbers_stay_whole_and_training_goes_on(options: LowRank):
    one = training(options)
    with torch.no_grad():
        weight_of(one.model, "blocks.0.fc1")[0, 0] = torch.nan
    before = copy.deepcopy(one.model.state_dict())
    assert go(one, range(7)) == []
    assert not one.at_epoch(1, 7)
    refused = told(one)["refused"]
    assert all("no layer is factorised at update" in event["line"] for event in refused)
    assert all("Training goes on" in event["line"] for event in refused)
    assert "NaN" in refused[0]["why"]
    after = one.model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) or after[name].isnan().any() for name in before)
    assert len(one.optimizer.param_groups) == 1


def test_what_cannot_be_looked_at_is_said_and_the_next_refresh_counts():
    one = training(EVIDENCE)

    def fails(weight: Tensor) -> Tensor:
        return weight[0]  # no matrix

    assert go(one, range(4), fails) == []
    assert go(one, range(4, 15)) == [10, 14]
    (refused,) = told(one)["refused"]
    assert "the refresh at update 0 could not be judged: AssertionError" in refused["line"]


def test_at_the_last_update_nothing_is_switched():
    one = training(EVIDENCE, span=Span(4, 6))
    assert go(one, range(7)) == []
    (refused,) = told(one)["refused"]
    assert refused["why"] == "2 have settled, but no update is left to train their factors"


def test_a_schedule_switches_whatever_has_settled_and_what_has_settled_switches_nothing():
    one = training(SCHEDULED)
    assert go(one, range(12)) == []
    assert not one.at_epoch(0, 0)
    assert one.at_epoch(1, 12)
    first = ranks_of(one.model)
    assert one.costs.count(first) <= 0.7 * one.costs.count({})
    assert not one.at_epoch(2, 24)
    assert one.at_epoch(3, 36)
    second = ranks_of(one.model)
    assert one.costs.count(second) <= 0.5 * one.costs.count({})
    assert all(second[name] <= rank for name, rank in first.items())
    seen = told(one)
    assert [(event["update"], event["epoch"], event["budget"]) for event in seen["switch"]] == [
        (13, 1, 0.7),
        (37, 3, 0.5),
    ]
    assert seen["evidence"][-1]["due"]
    assert "used-up" not in seen


def test_a_later_budget_that_changes_nothing_is_said():
    one = training(replace(SCHEDULED, lowrank_schedule=("1=0.6", "3=0.57")))
    one.at_epoch(1, 12)
    before = ranks_of(one.model)
    assert not one.at_epoch(3, 36)
    assert ranks_of(one.model) == before
    assert told(one)["refused"][0]["why"] == "a budget of 0.57 makes no layer smaller"


@pytest.mark.parametrize("options", [EVIDENCE, SCHEDULED, replace(EVIDENCE, lowrank_train="kfac", lowrank_budget=0.7)])
def test_a_dry_run_tells_the_same_and_changes_nothing(options: LowRank):
    wet, dry = training(options), training(replace(options, lowrank_dry_run=True))
    before = copy.deepcopy(dry.model.state_dict()), copy.deepcopy(dry.optimizer.state_dict())
    modes = [module.training for module in dry.model.modules()]
    random = torch.get_rng_state()
    for one in (wet, dry):
        one.at_epoch(1, 0)
        go(one, range(11))
        one.at_epoch(3, 11)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in dry.model.modules()] == modes
    assert all(parameter.requires_grad and parameter.grad is None for parameter in dry.model.parameters())
    after = dry.model.state_dict()
    assert all(torch.equal(after[name], weight) for name, weight in before[0].items())
    assert dry.optimizer.state_dict()["param_groups"] == before[1]["param_groups"]
    real, only_told = told(wet)["switch"], told(dry)["dry-run"]
    for name in ("update", "ranks", "ranks_before", "parameters", "parameters_before", "share"):
        assert [event[name] for event in real] == [event[name] for event in only_told]
    for name in ("loss", "loss_before"):  # those of factors of factors err by rounding more
        assert [event[name] for event in real] == pytest.approx([event[name] for event in only_told], rel=1e-4)
    assert "(dry run) at update" in only_told[0]["line"]
    assert "earlier dry switches" not in only_told[0]["line"]
    if len(only_told) > 1:
        assert only_told[1]["parameters_before"] == only_told[0]["parameters"]
        assert re.search(r"with the [2-4] of earlier dry switches factorised", only_told[1]["line"])


def test_what_has_settled_waits_for_enough_and_no_longer_counts_where_it_turns_meanwhile():
    one = training(replace(EVIDENCE, lowrank_at_once=0.9))
    assert go(one, range(8)) == []  # the first block, half of the parameters, is due at 6
    assert told(one)["evidence"][-1]["due"] == {"blocks.0.fc1": 3, "blocks.0.fc2": 3}
    turned = copy.deepcopy(one.settling.state_dict())
    assert go(one, range(8, 11)) == [10]
    assert ranks_of(one.model) == dict.fromkeys(one.costs.layers, 3)
    switch = told(one)["switch"][0]
    assert switch["share"] < 1.0

    one = training(replace(EVIDENCE, lowrank_at_once=0.9))
    go(one, range(8))
    turned["layers"]["blocks.0.fc1"]["looks"] = turned["layers"]["blocks.0.fc2"]["looks"] = -3
    one.settling.load_state_dict(turned)
    assert go(one, range(8, 15)) == []  # the second block alone is half of them again
    evidence = told(one)["evidence"][-1]
    assert set(evidence["due"]) == {"blocks.1.fc1", "blocks.1.fc2"}
    assert 0.5 == evidence["share"] < evidence["needed"] == pytest.approx(0.9 * (1 - 14 / 40))


def test_what_is_waited_for_falls_with_the_updates_that_are_left():
    one = training(replace(EVIDENCE, lowrank_settled=3, lowrank_at_once=1.0))
    one.settling._layers["blocks.1.fc1"] = one.settling._layers["blocks.1.fc2"] = {"looks": -99, "switched": 0}  # type: ignore[attr-defined]
    assert go(one, range(30)) == [22]  # the next decision behind 20, where a half is enough
    assert set(ranks_of(one.model)) == {"blocks.0.fc1", "blocks.0.fc2"}


def test_kfac_switches_at_the_ranks_of_then_and_keeps_to_its_budget_over_several_switches(
    monkeypatch: pytest.MonkeyPatch,
):
    options = replace(EVIDENCE, lowrank_train="kfac", lowrank_budget=0.6, lowrank_settled=2, lowrank_at_once=0.0)

    class Given(Told):
        """Judges at the ranks that it is given, as the real one."""

        def see(self, update: int, weights: Mapping[str, Tensor], **more: Any) -> None:
            super().see(update, weights, **more)
            self.given = dict(more["ranks"])

        def verdicts(self) -> dict[str, Any]:
            return {name: replace(one, rank=self.given.get(name, 0)) for name, one in super().verdicts().items()}

    one = training(options, settling=Given(times=2))
    assert go(one, range(11)) == [6, 10]
    assert ranks_of(one.model).keys() == one.costs.layers.keys()
    assert one.costs.count(ranks_of(one.model)) <= 0.6 * one.costs.count({})
    seen = told(one)
    assert [event["update"] for event in seen["ranks"]] == [0, 6, 10]  # whole refreshes are at 0, 4, 8
    for switch, chosen in zip(seen["switch"], seen["ranks"][1:], strict=True):
        assert switch["ranks"].items() <= chosen["ranks"].items()

    monkeypatch.setattr(controller, "is_near", lambda rank, settled: rank == settled)
    one = training(options, settling=Given(times=2))
    go(one, range(6))
    with torch.no_grad():
        weight_of(one.model, "blocks.0.fc1").mul_(1e-3)  # whose rank of then is far from that which has settled
    assert go(one, range(6, 7)) == [6]
    assert ranks_of(one.model).keys() == {"blocks.0.fc2"}


def test_kfacs_ranks_follow_the_weights_once_in_as_many_whole_refreshes_as_settle_a_layer():
    seen: list[Mapping[str, int] | None] = []

    class Noted(Told):
        def see(self, update: int, weights: Mapping[str, Tensor], **more: Any) -> None:
            super().see(update, weights, **more)
            seen.append(more["ranks"])

    options = replace(EVIDENCE, lowrank_train="kfac", lowrank_budget=0.6, lowrank_settled=2)
    one = training(options, settling=Noted(times=9))
    go(one, range(3))
    with torch.no_grad():
        weight_of(one.model, "blocks.0.fc1").mul_(1e-3)
    go(one, range(4, 14))
    first, *same, last = seen
    assert first is not None
    assert last is not None
    assert same == [first, first]
    assert one.costs.count(dict(first)) <= 0.6 * one.costs.count({})
    assert last["blocks.0.fc1"] == 1 < first["blocks.0.fc1"]


def test_its_state_is_of_plain_values_and_tensors_and_a_run_goes_on_from_it_at_any_update():
    whole = training(EVIDENCE)
    go(whole, range(20))
    for cut in range(1, 15):
        part = training(EVIDENCE)
        go(part, range(cut))
        file = io.BytesIO()
        torch.save(part.state_dict(), file)
        file.seek(0)
        rest = replace(part, settling=Told(times=2, ranks=(3, 2, 1)), _seen=-1, _decided=-1, _num_switches=0)
        rest.load_state_dict(torch.load(file, weights_only=True))
        part.events()
        go(rest, range(cut, 20))
        assert ranks_of(rest.model) == ranks_of(whole.model)
        assert rest.state_dict() == whole.state_dict()
        for name, layer in low_rank_layers(whole.model).items():
            assert torch.equal(layer.up, rest.model.get_submodule(name).up)  # type: ignore[arg-type]
