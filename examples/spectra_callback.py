"""Watch the spectra of a model that somebody else's trainer trains: one callback for Hugging Face and for Lightning.

    trainer = transformers.Trainer(model, args, callbacks=[SpectraCallback("watched", every=100)], ...)

The trainer of transformers calls any object that has the methods of its events. Lightning asks for its own base class,
which may stand beside this one:

    class Spectra(SpectraCallback, lightning.Callback): ...

    trainer = lightning.Trainer(callbacks=[Spectra("watched", every=100)])
"""

from typing import Any

from torch import nn

from lowrank_vit import SpectralMonitor


class SpectraCallback:
    """Has a `SpectralMonitor` observe each update, on the first process alone, which needs the whole weights (DDP)."""

    def __init__(self, store_dir: str, **options: Any) -> None:
        """Take what `SpectralMonitor` takes beside the model."""
        self.store_dir, self.options, self.seen = store_dir, options, -1
        self.monitor: SpectralMonitor | None = None

    def begin(self, model: nn.Module, update: int) -> None:
        """Make the monitor, of a run that goes on from `update` or begins with 0."""
        resumed = {"resumed_update": update} if update else {}
        self.monitor = SpectralMonitor(model, store_dir=self.store_dir, **resumed, **self.options)
        self.observe(update)

    def observe(self, update: int) -> None:
        """Take a refresh, if one is due; of batches that accumulate only the last makes an update."""
        if self.monitor is not None and update > self.seen:
            self.monitor.observe(update)
            self.seen = update

    # transformers: (args, state, control, **more)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: nn.Module, **more: Any) -> None:
        """Begin, with the model on its device."""
        if state.is_world_process_zero:
            self.begin(model, state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        """Observe; its global step counts updates."""
        self.observe(state.global_step)

    # Lightning: (trainer, module, ...)

    def on_train_start(self, trainer: Any, module: nn.Module) -> None:
        """Begin, with the model on its device."""
        if trainer.is_global_zero:
            self.begin(module, trainer.global_step)

    def on_train_batch_end(self, trainer: Any, module: nn.Module, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Observe; its global step counts updates."""
        self.observe(trainer.global_step)

    def on_exception(self, trainer: Any, module: nn.Module, exception: BaseException) -> None:
        """Give up what is being solved."""
        if self.monitor is not None:
            self.monitor.close(cancel=True)

    # Both

    def on_train_end(self, *of_trainer: Any, **more: Any) -> None:
        """Wait for the last refresh."""
        if self.monitor is not None:
            self.monitor.close()

    def __getattr__(self, name: str) -> Any:
        """Do nothing at the other events."""
        if name.startswith("on_"):
            return lambda *of_trainer, **more: None
        raise AttributeError(name)
