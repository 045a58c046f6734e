"""One training step: mix, forward, loss, backward, update. The host never waits for the device here."""

from __future__ import annotations

from collections.abc import Callable

import torch
from timm.utils import ModelEmaV3, dispatch_clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer

from data_prep.errors import UserError
from lowrank_vit.augment.mix import mix_to_tensor
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.data.batch import Batch
from lowrank_vit.options import Config


class TrainStep:
    """Updates `model` (and `ema`) by one batch; keeps the loss on the device until `read_loss`."""

    def __init__(
        self, config: Config, model: nn.Module, augment: Augment, optimizer: Optimizer, ema: ModelEmaV3 | None
    ) -> None:
        """`model`, `augment` and `ema` are on one device; `model` is the raw module, which is compiled here."""
        self._model, self._augment, self._optimizer, self._ema = model, augment, optimizer, ema
        self._clip_grad, self._clip_mode = config.optim.clip_grad, config.optim.clip_mode
        device = next(model.parameters()).device
        self._device_type, self._amp = device.type, config.step.amp
        self._loss_of: Callable[[Tensor, Tensor, Tensor], Tensor] = self._compute_loss
        if config.step.compile:
            self._loss_of = torch.compile(self._compute_loss, mode=config.step.compile_mode)
        self._loss_sum = torch.zeros((), dtype=torch.float64, device=device)
        self._num_losses = 0
        self._bad_update = torch.full((), -1, dtype=torch.int64, device=device)
        self._lrs: dict[int, float] = {}
        self.num_updates = 0

    def _compute_loss(self, images: Tensor, targets: Tensor, mix: Tensor) -> Tensor:
        mixed, soft_targets = self._augment(images, targets, mix)
        with torch.autocast(self._device_type, dtype=torch.bfloat16, enabled=self._amp):
            logits = self._model(mixed)
        return torch.sum(-soft_targets * torch.log_softmax(logits.float(), dim=1), dim=1).mean()

    def __call__(self, batch: Batch) -> None:
        """Run one update on a batch that `augment.prepare` has gone over. The model must be in training mode."""
        mix = mix_to_tensor(batch.plan.mix)
        if batch.images.is_cuda:
            mix = mix.pin_memory().to(batch.images.device, non_blocking=True)
        loss = self._loss_of(batch.images, batch.targets, mix)
        loss.backward()
        if self._clip_grad is not None:
            dispatch_clip_grad(self._model.parameters(), self._clip_grad, mode=self._clip_mode)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self._note(loss.detach())
        self.num_updates += 1
        if self._ema is not None:
            self._ema.update(self._model, step=self.num_updates)

    def _note(self, loss: Tensor) -> None:
        """Add up the loss and remember the first update whose loss is not finite, both on the device."""
        self._loss_sum += loss
        self._num_losses += 1
        is_first_bad = (self._bad_update < 0) & ~torch.isfinite(loss)
        self._bad_update = torch.where(is_first_bad, self.num_updates, self._bad_update)
        self._lrs[self.num_updates] = self.lr

    @property
    def lr(self) -> float:
        """The greatest learning rate of all parameter groups (layer decay makes some smaller)."""
        return max(group["lr"] for group in self._optimizer.param_groups)

    def read_loss(self) -> float:
        """The mean loss since the last call (this waits for the device).

        Raises `UserError` naming update and learning rate if a loss was not finite.
        """
        bad_update = int(self._bad_update)
        if bad_update >= 0:
            raise UserError(
                f"The loss is not finite at update {bad_update} (learning rate {self._lrs[bad_update]:.3g}). "
                "Nothing was saved since. Try a smaller --lr, a longer --warmup-epochs or --clip-grad 1."
            )
        mean = float(self._loss_sum) / max(1, self._num_losses)
        self._loss_sum.zero_()
        self._num_losses = 0
        self._lrs.clear()
        return mean
