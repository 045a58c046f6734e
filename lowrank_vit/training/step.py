"""One training step: normalise, mix, erase, forward, loss, backward, update.

The host never waits for the device here, unless it is so far ahead that the device has enough work (`Pace`).
"""

from __future__ import annotations

import gc
import inspect
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from timm.models import model_parameters
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.augment.recipe import batches_of_update
from lowrank_vit.common.devices import DTYPES, FIRST, cuda_path, pick_device, side_stream
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.options import Config
from lowrank_vit.data.batch import Batch
from lowrank_vit.lowrank.regularisers.regulariser import Regulariser
from lowrank_vit.lowrank.switching.groups import groups_of, step_of_factors
from lowrank_vit.model.patches import patch_of_product, set_patch_embedding
from lowrank_vit.ranks.world import World
from lowrank_vit.run.metrics import Meter
from lowrank_vit.run.state import Position
from lowrank_vit.training.phases import NOBODY_LISTENS, Phases

RUN_AHEAD = 3
"""How many steps may be queued on the device when the host begins the next one."""


@dataclass(frozen=True)
class Loss:
    """timm's SoftTargetCrossEntropy, or its BinaryCrossEntropy if `is_binary`; for smoothed and mixed targets."""

    is_binary: bool = False
    sums_classes: bool = False
    """Binary: sum over the classes instead of taking the mean."""
    threshold: float | None = None
    """Binary: targets above it count as 1, others as 0."""

    @classmethod
    def of(cls, config: Config) -> Loss:
        """The loss chosen by the flags."""
        augment = config.augment
        return cls(augment.bce_loss, augment.bce_sum, augment.bce_target_thresh)

    def __call__(self, logits: Tensor, targets: Tensor) -> Tensor:
        """The mean loss over the batch, float32 (); logits and soft targets (0-1) are float32 (B, C)."""
        if not self.is_binary:
            return torch.sum(-targets * torch.log_softmax(logits, dim=1), dim=1).mean()
        if self.threshold is not None:
            targets = targets.gt(self.threshold).to(targets.dtype)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        return loss.sum(1).mean() if self.sums_classes else loss.mean()


def stream_of_step(config: Config, world: World) -> torch.cuda.Stream | None:
    """A stream for the loop with priority over the spectra's; None without the monitor, and on a CPU."""
    device = pick_device(config.step.device, world.local_rank)
    return side_stream(device, FIRST) if config.spectra.spec_monitor else None


class TrainStep:
    """Updates `model` (and `ema`) batch by batch; keeps loss and accuracy on the device, in `meter`.

    Gradients are averaged over the ranks in the last batch of an update, so weights, optimizer state and EMA are
    bit-identical on all ranks.

    torch's generators (dropout, drop-path) are seeded for each update from the run's seed, the update and the rank, so
    their state need not be saved.
    """

    def __init__(
        self,
        config: Config,
        model: nn.Module,
        augment: Augment,
        optimizer: Optimizer,
        ema: ModelEmaV3 | None,
        world: World | None = None,
        *,
        position: Position | None = None,
        phases: Phases = NOBODY_LISTENS,
    ) -> None:
        """`model`, `augment` and `ema` must be on one device; `model` is the raw module, which is compiled here.

        Updates are counted in `position`, and the parts of a step are reported to `phases`.
        """
        self.position, self._phases = position or Position(), phases
        self._model, self._optimizer, self._world = model, optimizer, world or World()
        self._average = Average(ema, model) if ema is not None else None
        self.regulariser = Regulariser.of(config.lowrank, model, optimizer, self._world)
        self._augment = augment
        # Reused for all batches: touching new memory takes longer than the arithmetic.
        self._inputs: Tensor | None = None
        self._clip_grad, self._clip_mode = config.optim.clip_grad, config.optim.clip_mode
        self._seed, self._accum_steps = config.run.seed, batches_of_update(config, self._world.size)[1]
        device = next(model.parameters()).device
        if cuda_path(device):  # on a CPU it is not faster, and losses keep their bits
            set_patch_embedding(model, as_product=True)
        dtype = DTYPES[config.step.amp_dtype] if config.step.amp else None
        # float16's range is too small for gradients, so the loss is scaled; timm does the same.
        self._scaler = torch.amp.GradScaler(device.type, enabled=dtype is torch.float16)
        self._loss_of_batch = LossOfBatch(model, augment, Loss.of(config), dtype)
        mode = config.step.compile_mode
        self._compile_mode = mode if config.step.compile else None
        uses_graphs = config.step.compile and mode in ("reduce-overhead", "max-autotune") and cuda_path(device)
        self._ddp: DistributedDataParallel | None = None
        self._assemble(device)
        self._keeps_grads = False
        if uses_graphs and self._accum_steps > 1:
            self.keep_grads()
        self._num_batches = 0
        self._pace = Pace(device)
        self.meter = Meter(device, self._accum_steps)
        self.grad_norm: Tensor | None = None
        """Norm of all gradients before clipping, in the last update with `measure_norm`; on the device."""

    def _assemble(self, device: torch.device) -> None:
        loss_of: nn.Module = self._loss_of_batch
        if self._world.is_joined:
            loss_of = self._ddp = _distribute(loss_of, device)
        self._loss_of: Callable[..., tuple[Tensor, Tensor]] = loss_of
        if self._compile_mode is not None:
            self._loss_of = torch.compile(loss_of, mode=self._compile_mode)

    def rebuild(self) -> None:
        """Rebuild everything that depends on the model's parameters, after some were replaced.

        Call it between two updates, on the step's stream, on all ranks together. DDP has hooks on every parameter, also
        on those that stay, until it is freed. All compiled code of the process is dropped: torch would count a new
        version of the same code for each switch, and silently stop compiling it from the eighth on. The float16 scaler,
        the meter and the position are kept.
        """
        assert self._num_batches == 0
        device = next(self._model.parameters()).device
        for parameter in self._model.parameters():
            parameter.grad = None  # a view of DDP's memory, which is freed with it
        self._loss_of, self._ddp = self._loss_of_batch, None
        if self._compile_mode is not None:
            torch._dynamo.reset()  # pyright: ignore[reportPrivateUsage, reportPrivateImportUsage]
        if self._world.is_joined:
            gc.collect()  # the hooks are freed with the last reference, and some references are cycles
        if self._average is not None:
            self._average = Average(*self._average.models)
        if self.regulariser:
            self.regulariser.follow(self._model, self._optimizer)
        self._assemble(device)
        if self._keeps_grads:
            self.keep_grads()

    def __call__(self, batch: Batch, *, measure_norm: bool = False) -> bool:
        """Run one batch that `augment.prepare` has processed; returns whether it completed an update.

        The model must be in training mode. `measure_norm`: store the gradients' norm if this completes an update.
        """
        with self._phases("step"):
            return self._run(batch, measure_norm)

    def _run(self, batch: Batch, measure_norm: bool) -> bool:
        is_last = self._num_batches + 1 == self._accum_steps
        if self._num_batches == 0:
            self._seed_update()
        with self._phases("inputs"):
            images, *drawn = self._augment.begin(batch.images, batch.plan, self._inputs)
            self._inputs = images if images is not batch.images else None
        with nullcontext() if is_last else self._without_averaging():
            with self._phases("forward"):
                loss, hits = self._loss_of(images, batch.targets, *drawn)
            with self._phases("backward"):
                scaled = self._scaler.scale(loss if self._accum_steps == 1 else loss / self._accum_steps)
                scaled.backward()
        self.meter.add(loss.detach(), hits, len(batch), self.position.num_updates, self.lr)
        self._num_batches = 0 if is_last else self._num_batches + 1
        if is_last:
            with self._phases("optimizer"):
                self._update(measure_norm)
            self.position.count_update()
            with self._phases("ema"):
                if self._average is not None:
                    self._average.update(self.position.num_updates)
        self._pace.step()
        return is_last

    def keep_grads(self) -> None:
        """Accumulate the gradients of several batches in their own memory, which is zeroed after an update.

        This is needed because a CUDA graph's outputs only live until its next run. Otherwise it only costs time: each
        gradient is zeroed, added to, and divided by the number of ranks. That is three passes more than writing it,
        instead of one, in which DDP divides it on the way into its bucket.
        """
        self._keeps_grads = True
        for parameter in self._model.parameters():
            if parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)

    def _update(self, measure_norm: bool) -> None:
        regulariser, update = self.regulariser, self.position.num_updates
        has_factors = self._scaler.is_enabled() and bool(groups_of(self._optimizer)[1])
        if self._clip_grad is not None or measure_norm or regulariser or has_factors:
            self._scaler.unscale_(self._optimizer)
        if measure_norm:
            grads = [p.grad for p in self._model.parameters() if p.grad is not None]
            self.grad_norm = torch.nn.utils.get_total_norm(grads)
        if self._clip_grad is not None:
            clipped = model_parameters(self._model, exclude_head="agc" in self._clip_mode)  # as timm
            dispatch_clip_grad(clipped, self._clip_grad, mode=self._clip_mode)
        if regulariser:
            regulariser.before_step(update, self._is_skipped())
        with step_of_factors(self._optimizer, update, self._is_skipped() if has_factors else None):
            self._scaler.step(self._optimizer)
        if regulariser:
            regulariser.after_step(update)
        self._scaler.update()
        self._optimizer.zero_grad(set_to_none=not self._keeps_grads)

    def _is_skipped(self) -> Tensor | None:
        """A tensor () above 0 if the scaler skips the update, as gradients are not finite; None without a scaler."""
        if not self._scaler.is_enabled():
            return None
        by_device: dict[torch.device, Tensor] = self._scaler._found_inf_per_device(self._optimizer)  # pyright: ignore
        return next(iter(by_device.values()))

    def _seed_update(self) -> None:
        # An odd multiplier is a bijection modulo 2**63, so no two updates or ranks share a seed.
        number = self.position.num_updates * self._world.size + self._world.rank
        torch.manual_seed((self._seed + number * 0x9E3779B97F4A7C15) % 2**63)

    def _without_averaging(self) -> AbstractContextManager[None]:
        return self._ddp.no_sync() if self._ddp is not None else nullcontext()

    @property
    def lr(self) -> float:
        """The largest learning rate of all parameter groups (layer decay makes some smaller).

        Groups of factors are left out: they have their weight's learning rate times a scale.
        """
        return max(group["lr"] for group in groups_of(self._optimizer)[0])

    def state_dict(self) -> dict[str, Any]:
        """The state besides weights, EMA, optimizer and position. Call it between two updates."""
        assert self._num_batches == 0
        state: dict[str, Any] = {"scaler": self._scaler.state_dict(), "meter": self.meter.state_dict(self._world)}
        return state | ({"regulariser": self.regulariser.state_dict()} if self.regulariser else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a state. Raises `UserError` if it lacks the regulariser's."""
        if state["scaler"]:
            self._scaler.load_state_dict(state["scaler"])
        self.meter.load_state_dict(state["meter"])
        if self.regulariser:
            if "regulariser" not in state:
                raise UserError("it lacks the state of the run's regulariser. Give another checkpoint of the run.")
            self.regulariser.load_state_dict(state["regulariser"])


class Average:
    """Updates timm's EMA of a model in one call, from lists of tensors that are made once.

    The arithmetic is that of timm's `update`, which collects the tensors of both models anew at each step.
    """

    def __init__(self, ema: ModelEmaV3, model: nn.Module) -> None:
        """Both must be on one device. Later changes of values are seen, but not tensors that replace others."""
        self.models = ema, model
        states = (ema.module.state_dict(keep_vars=True), model.state_dict(keep_vars=True))
        pairs = list(zip(*(state.values() for state in states), strict=True))
        self._averages = [average for average, _ in pairs if average.is_floating_point()]
        self._values = [value for average, value in pairs if average.is_floating_point()]
        self._copied = [pair for pair in pairs if not pair[0].is_floating_point()]
        kinds = {tensor.dtype for tensor in [*self._averages, *self._values]}
        # timm itself handles dtypes that it rounds or converts, and an average on another device.
        self._is_plain = ema.foreach and not ema.exclude_buffers and kinds <= {torch.float32}

    @torch.no_grad()
    def update(self, num_updates: int) -> None:
        """Move the averages towards the weights after update `num_updates`, with timm's decay for it."""
        if not self._is_plain:
            self.models[0].update(self.models[1], step=num_updates)
            return
        weight = 1.0 - self.models[0].get_decay(num_updates)
        torch._foreach_lerp_(self._averages, self._values, weight=weight)  # pyright: ignore[reportPrivateUsage]
        for average, value in self._copied:
            average.copy_(value)


class LossOfBatch(nn.Module):
    """From uint8 images to the loss of one batch: the module that is compiled and wrapped by DDP."""

    def __init__(self, model: nn.Module, augment: Augment, loss: Loss, dtype: torch.dtype | None) -> None:
        """`dtype`: of the autocast forward; None: no autocast."""
        super().__init__()
        self.model, self.augment, self._loss, self._dtype = model, augment, loss, dtype

    def forward(self, images: Tensor, targets: Tensor, *drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        """Mean loss, float32 (), and number of correct predictions, int64 (), for the outputs of `Augment.begin`."""
        patch = patch_of_product(self.model) if torch.compiler.is_compiling() else None
        inputs, soft_targets = self.augment(images, targets, *drawn, patch=patch)
        with torch.autocast(images.device.type, dtype=self._dtype, enabled=self._dtype is not None):
            logits = self.model(inputs)
        logits = logits.float()
        return self._loss(logits, soft_targets), (logits.detach().argmax(1) == targets).sum()


def _distribute(loss_of: nn.Module, device: torch.device) -> DistributedDataParallel:
    """Wrap the loss in DDP, which averages gradients over the ranks during the backward pass.

    Gradients are views of DDP's buckets (torch's sizes: 1 MiB first, then 25). When the backward pass has written a
    gradient, torch multiplies it into its bucket, divided by the number of ranks; nothing is copied back. A compiled
    graph is split at the end of a bucket. torch's static_graph would save nothing here, and fails with no_sync.
    """
    # Buffers are not broadcast before each step: statistics of normalisation are averaged before validation instead.
    named = inspect.signature(DistributedDataParallel).parameters
    name = "forward_sync_buffers" if "forward_sync_buffers" in named else "broadcast_buffers"  # torch < 2.14
    no_buffers: dict[str, Any] = {name: False}
    return DistributedDataParallel(
        loss_of,
        device_ids=[device.index] if cuda_path(device) else None,
        gradient_as_bucket_view=True,
        **no_buffers,
    )


class Pace:
    """Holds the host back if it is `RUN_AHEAD` steps ahead of a GPU.

    A step that is one CUDA graph takes the host almost no time. The host could queue all updates up to the next
    synchronisation at once, with each of their batches in memory. The device still has steps to do while the host
    waits, so it is never idle. On a CPU nothing runs ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._under_way: deque[torch.cuda.Event] = deque()

    def step(self) -> None:
        """Note that a step is queued completely, and wait if the device is too far behind."""
        if not cuda_path(self._device):
            return
        done = torch.cuda.Event(blocking=True)  # waits without using a CPU core, which the decoder needs
        done.record()
        self._under_way.append(done)
        if len(self._under_way) > RUN_AHEAD:
            self._under_way.popleft().synchronize()
