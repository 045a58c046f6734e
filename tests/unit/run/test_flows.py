"""The images of a validation that flows are of: the same whatever the ranks, the batches and the order of reading."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import timm
import torch

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.plan.order import subset
from lowrank_vit.ranks.world import World
from lowrank_vit.run.flows import FlowWatch, flows_of
from lowrank_vit.score.evaluate import Evaluator

NUM_SAMPLES = 23
IMAGES = torch.randint(0, 256, (NUM_SAMPLES, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


class Loader:
    """Some of the samples in batches."""

    def __init__(self, ids: np.ndarray, batch_size: int) -> None:
        self.parts = np.array_split(ids, range(batch_size, len(ids), batch_size))

    def batches(self, epoch: int) -> Any:
        for ids in self.parts:
            yield SimpleNamespace(images=IMAGES[ids], plan=SimpleNamespace(ids=ids))


class OneOf(World):
    """A rank that hears what the others have, too."""

    def __init__(self, others: list[Any], rank: int = 0) -> None:
        super().__init__(rank=rank)
        self.others = others

    def gather_on_first(self, value: Any) -> list[Any] | None:
        self.others.insert(0, value)
        return self.others if self.is_first else None


@pytest.fixture(scope="module")
def evaluators() -> dict[str, Evaluator]:
    torch.manual_seed(0)
    tiny: dict[str, Any] = {"img_size": 16, "patch_size": 4, "embed_dim": 16, "depth": 2, "num_heads": 2}
    augment = Augment((0.5,) * 3, (0.25,) * 3, 3, smoothing=0.0)
    models = {kind: timm.create_model("vit_tiny_patch16_224", **tiny, num_classes=3).train() for kind in ("", "ema_")}
    return {kind: Evaluator(model, augment, amp=False, compile=False) for kind, model in models.items()}


def flows(evaluators: dict[str, Evaluator], shares: list[Loader], count: int = 7, seed: int = 5) -> Any:
    """What the first of so many ranks tells of its validation, in two passes."""
    told, said, others = [], [], []
    for rank, loader in reversed(list(enumerate(shares))):
        world = OneOf(others, rank)
        watch = FlowWatch(evaluators, subset(seed, NUM_SAMPLES, count), world, said.append)
        with flows_of(loader, watch, lambda *found: told.append(found)) as seen:
            for _ in evaluators:
                assert len(list(seen.batches(0))) == len(loader.parts)
    assert not said
    (found,) = told
    return found


def without_time(values: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in values.items() if name != "spec/flow/seconds"}


def test_numbers_are_the_same_bits_whatever_the_ranks_and_the_batches(evaluators):
    everyone = np.arange(NUM_SAMPLES)
    values, found = flows(evaluators, [Loader(everyone, 23)])
    assert values["spec/flow/images"] == 7
    assert {name.partition("/flow/")[0] for name in values} == {"spec", "spec_ema"} == set(found)
    for shares in (
        [Loader(everyone, 4)],
        [Loader(everyone[::-1].copy(), 5)],
        [Loader(ids, 3) for ids in np.array_split(everyone, 2)],
        [Loader(ids, 1) for ids in np.array_split(everyone, 23)],  # most have none of them
    ):
        again, found_again = flows(evaluators, shares)
        assert without_time(again) == without_time(values)
        for kind, one in found.items():
            for block, variances in one.variances.items():
                assert np.array_equal(variances, found_again[kind].variances[block])
    other, _ = flows(evaluators, [Loader(everyone, 4)], seed=6)
    assert other["spec/flow/blocks.0/cosine"] != values["spec/flow/blocks.0/cosine"]
    assert values["spec/flow/blocks.0/cosine"] != values["spec_ema/flow/blocks.0/cosine"]


def test_models_keep_their_mode_and_their_state(evaluators):
    before = {name: value.clone() for name, value in evaluators[""]._model.state_dict().items()}
    random = torch.get_rng_state()
    flows(evaluators, [Loader(np.arange(NUM_SAMPLES), 8)])
    assert torch.equal(random, torch.get_rng_state())
    for evaluator in evaluators.values():
        assert evaluator._model.training
        assert not any(module._forward_hooks for module in evaluator._model.modules())
    assert all(torch.equal(before[name], value) for name, value in evaluators[""]._model.state_dict().items())


def test_more_images_than_there_are_means_all_of_them(evaluators):
    values, _ = flows(evaluators, [Loader(np.arange(NUM_SAMPLES), 8)], count=1000)
    assert values["spec/flow/images"] == NUM_SAMPLES
    assert subset(1, 5, 1000).tolist() == [0, 1, 2, 3, 4]


def test_what_fails_is_said_and_ends_nothing(evaluators, monkeypatch):
    said: list[str] = []
    watch = FlowWatch(evaluators, np.arange(4), World(), said.append)
    with monkeypatch.context() as patch:
        patch.setattr(Evaluator, "apart", lambda self: 1 / 0)
        with flows_of(Loader(np.arange(NUM_SAMPLES), 8), watch, lambda *_: pytest.fail("told")) as seen:
            list(seen.batches(0))
    assert said == ["warning: the flows of this validation failed: division by zero. Training goes on."]
    with pytest.raises(KeyError), flows_of(Loader(np.arange(3), 8), watch, lambda *_: pytest.fail("told")):
        raise KeyError  # such as a request to stop
    loader = Loader(np.arange(3), 8)
    with flows_of(loader, None, lambda *_: pytest.fail("told")) as seen:
        assert seen is loader
