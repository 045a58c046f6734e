"""A small ViT in the middle of its training, with all that a switch changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import Tensor, nn

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.config.flags import parse
from lowrank_vit.config.options import Config
from lowrank_vit.data.batch import Batch
from lowrank_vit.lowrank.switching.change import KeptMoments
from lowrank_vit.lowrank.switching.factors import make_factors
from lowrank_vit.lowrank.switching.switch import Switched, prepare, work_out
from lowrank_vit.model.optimizer import create_optimizer, create_scheduler
from lowrank_vit.ranks.world import World
from lowrank_vit.training.step import TrainStep
from tests.unit.training.test_step import NUM_CLASSES, OPTIONS, batches, small_vit

LR, UPDATES_PER_EPOCH = 1e-3, 4
ALL = [f"blocks.{block}.{layer}" for block in (0, 1) for layer in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


def switch(
    model: nn.Module,
    ema: nn.Module | None,
    optimizer: Any,
    scheduler: Any,
    factors: Any,
    world: World | None = None,
    *,
    moments: KeptMoments = "carry",
    **more: Any,
) -> Switched:
    """Factorise layers as a run does: the first rank works the numbers out, and each makes ready and switches."""
    world = world or World()
    numbers = work_out(model, ema, optimizer, factors, moments=moments) if world.is_first else None
    return prepare(model, ema, optimizer, scheduler, world.from_first(numbers), moments=moments, **more).put()


@dataclass
class Training:
    """A model and its step; `batches` are those that are still to come."""

    config: Config
    model: Any
    ema: Any
    optimizer: Any
    scheduler: Any
    step: TrainStep
    batches: list[Batch]

    def go_on(self, count: int) -> None:
        """Make updates, with the schedule."""
        for batch in self.batches[:count]:
            self.step(batch)
            done = self.step.position.num_updates
            self.scheduler.step_update(done)
            if done % UPDATES_PER_EPOCH == 0:
                self.scheduler.step(done // UPDATES_PER_EPOCH)
        del self.batches[:count]

    def switch(self, ranks: dict[str, int] | None = None, world: World | None = None, **more: Any) -> Switched:
        """Factorise layers, all to rank 6 if not said."""
        factors = make_factors(self.model, ranks or dict.fromkeys(ALL, 6))
        parts = self.model, self.ema.module, self.optimizer, self.scheduler
        made = switch(*parts, factors, world, num_updates=self.step.position.num_updates, **more)
        self.step.rebuild()
        return made

    def everything(self) -> dict[str, Any]:
        """Copies of all that a switch may change, by name."""
        state = {
            name: {key: torch.as_tensor(value).clone() for key, value in self.optimizer.state[one].items()}
            for name, one in self.model.named_parameters()
            if one in self.optimizer.state
        }
        names = {id(one): name for name, one in self.model.named_parameters()}
        groups = [
            {key: [names.get(id(one)) for one in value] if key == "params" else value for key, value in group.items()}
            for group in self.optimizer.param_groups
        ]
        weights = {name: one.clone() for name, one in self.model.state_dict().items()}
        averages = {name: one.clone() for name, one in self.ema.module.state_dict().items()}
        lists = {key: list(value) for key, value in vars(self.scheduler).items() if isinstance(value, list)}
        return {"weights": weights, "ema": averages, "state": state, "groups": groups, "scheduler": lists}


def training(argv: str = "", updates: int = 10, world: World | None = None, model: nn.Module | None = None) -> Training:
    """A training of a small ViT by AdamW, if not said, after some updates; 60 batches are there in all."""
    config = parse([*OPTIONS.split(), "--opt", "adamw", "--epochs", "20", *argv.split()])
    model = model or small_vit()
    augment = Augment((0.5, 0.5, 0.5), (0.5, 0.5, 0.5), NUM_CLASSES, config.augment.smoothing)
    optimizer = create_optimizer(config.optim, model, LR)
    scheduler, _ = create_scheduler(config.optim, optimizer, UPDATES_PER_EPOCH)
    ema = ModelEmaV3(model, decay=0.9)
    made = Training(
        config, model, ema, optimizer, scheduler, TrainStep(config, model, augment, optimizer, ema, world), batches(60)
    )
    made.go_on(updates)
    return made


def same(first: Any, second: Any) -> bool:
    """Whether nested values are the same, tensors to the bit."""
    if isinstance(first, Tensor):
        return isinstance(second, Tensor) and torch.equal(first, second)
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return first == second
