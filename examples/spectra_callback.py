"""Monitor the spectra of a model in another trainer: one callback for Hugging Face and for Lightning.

    trainer = transformers.Trainer(model, args, callbacks=[SpectraCallback("watched", every=100)], ...)

The trainer of transformers calls any object that has the methods of its events. Lightning needs its own base class
too:

    class Spectra(SpectraCallback, lightning.Callback): ...

    trainer = lightning.Trainer(callbacks=[Spectra("watched", every=100)])
"""

from typing import Any

from torch import nn

from lowrank_vit import SpectralMonitor


class SpectraCallback:
    """Lets a `SpectralMonitor` observe each update, only on the first process, which must have all weights (DDP)."""

    def __init__(self, store_dir: str, **options: Any) -> None:
        """`options`: arguments of `SpectralMonitor` besides the model."""
        self.store_dir, self.options, self.seen = store_dir, options, -1
        self.monitor: SpectralMonitor | None = None

    def begin(self, model: nn.Module, update: int) -> None:
        """Make the monitor for a run that continues from `update`, or starts at 0."""
        resumed = {"resumed_update": update} if update else {}
        self.monitor = SpectralMonitor(model, store_dir=self.store_dir, **resumed, **self.options)
        self.observe(update)

    def observe(self, update: int) -> None:
        """Start a refresh if one is due; with gradient accumulation only the last batch makes an update."""
        if self.monitor is not None and update > self.seen:
            self.monitor.observe(update)
            self.seen = update

    # transformers: (args, state, control, **more)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **more: Any) -> None:
        """Begin, with the model on its device."""
        if state.is_world_process_zero:
            self.begin(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Observe; the trainer's global step counts updates."""
        self.observe(state.global_step)

    # Lightning: (trainer, module, ...)

    def on_train_start(self, trainer: Any, module: nn.Module) -> None:
        """Begin, with the model on its device."""
        if trainer.is_global_zero:
            self.begin(module, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Observe; the trainer's global step counts updates."""
        self.observe(trainer.global_step)

    def on_exception(self, trainer: Any, module: nn.Module, exception: BaseException) -> None:
        """Stop without waiting for the running refresh."""
        if self.monitor is not None:
            self.monitor.close(cancel=True)

    # Both

    def on_train_end(self, *of_trainer: Any, **more: Any) -> None:
        """Wait for the last refresh."""
        if self.monitor is not None:
            self.monitor.close()

    def __getattr__(self, name: str) -> Any:
        """Do nothing for other events."""
        if name.startswith("on_"):
            return lambda *of_trainer, **more: None
        raise AttributeError(name)
