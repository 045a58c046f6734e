"""The loop that joins the rooms: epochs of steps, validation, checkpoints and the spectral monitor."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from timm.utils import ModelEmaV3
from torch import nn

from data_prep.errors import UserError
from lowrank_vit import config as configuration
from lowrank_vit.augment.pipeline import Augment
from lowrank_vit.config import Config
from lowrank_vit.data.beton import Beton
from lowrank_vit.data.datasets import open_datasets
from lowrank_vit.data.loader import Loader, open_loader
from lowrank_vit.data.plan import EvalPlan, TrainPlan, TrainRules
from lowrank_vit.engine.checkpoint import Checkpoint, load_weights, read_checkpoint, write_checkpoint
from lowrank_vit.engine.distributed import rank_and_world_size
from lowrank_vit.engine.evaluate import Evaluator, Scores
from lowrank_vit.engine.metrics import RunLog
from lowrank_vit.engine.model import InputSpec, create_model, input_spec
from lowrank_vit.engine.optim import create_optimizer, create_scheduler, learning_rate
from lowrank_vit.engine.progress import Clock, Display, duration
from lowrank_vit.engine.run_dir import RunDir, environment_json
from lowrank_vit.engine.step import TrainStep
from lowrank_vit.spectral.monitor import SpectralMonitor


@dataclass(frozen=True)
class Result:
    """What a finished run has to say."""

    run_dir: Path
    top1: float
    """Best validation top-1, percent: of the EMA where there is one."""
    best_epoch: int
    train_s: float
    """Seconds in training steps, without validation."""


class Trainer:
    """One run of one configuration. Everything that can be wrong is found before the run directory is made."""

    def __init__(self, config: Config, default_name: str) -> None:
        """`default_name` begins the run directory's name where `--experiment` is not given. Raises `UserError`."""
        self.config = config
        rank_and_world_size()
        self.device = pick_device(config.step.device)
        torch.manual_seed(config.run.seed)
        train_set, self.val_set, self.num_classes = open_datasets(
            config.data.dataset, config.data.data_dir, config.model.num_classes
        )
        resumed = read_checkpoint(config.run.resume) if config.run.resume else None
        self.model = self._make_model(resumed).to(self.device)
        self.spec = input_spec(self.model, config.data.img_size, config.data.crop_pct)
        self.augment = Augment(self.spec.mean, self.spec.std, self.num_classes, config.augment.smoothing)
        self.augment.to(self.device)
        self.ema = self._make_ema(resumed)
        batch_size = config.data.batch_size
        self.plan = make_train_plan(config, train_set, self.spec)
        self.lr, self.lr_origin = learning_rate(config.optim, batch_size)
        self.optimizer = create_optimizer(config.optim, self.model, self.lr)
        self.scheduler, self.num_epochs = create_scheduler(config.optim, self.optimizer, self.plan.steps_per_epoch)
        self.step = TrainStep(config, self.model, self.augment, self.optimizer, self.ema)
        self.val_batch = min(config.data.validation_batch_size or batch_size, self.val_set.num_samples)
        evaluated = {"": self.model} | ({"ema_": self.ema.module} if self.ema else {})
        self.evaluators = {
            prefix: Evaluator(model, self.augment, amp=config.step.amp, compile=config.step.compile)
            for prefix, model in evaluated.items()
        }
        self.best_top1, self.best_epoch, self.start_epoch = -1.0, -1, 0
        if resumed:
            self._restore(resumed)
        self._open_loaders(train_set)
        self.run_dir = (
            RunDir.reopen(resumed.path.parent)
            if resumed
            else RunDir.create(config.run.output, config.run.experiment, default_name)
        )

    def _make_model(self, resumed: Checkpoint | None) -> nn.Module:
        options = self.config.model
        model = create_model(
            options.model,
            self.num_classes,
            img_size=self.config.data.img_size,
            drop=options.drop,
            drop_path=options.drop_path,
            model_kwargs=options.model_kwargs,
        )
        if resumed:
            load_weights(model, resumed, resumed.weights(use_ema=False), options.model)
        elif options.initial_checkpoint:
            initial = read_checkpoint(options.initial_checkpoint)
            load_weights(model, initial, initial.weights(use_ema=False), options.model)
        return model

    def _make_ema(self, resumed: Checkpoint | None) -> ModelEmaV3 | None:
        options = self.config.model
        if not options.model_ema:
            return None
        ema = ModelEmaV3(self.model, decay=options.model_ema_decay, use_warmup=options.model_ema_warmup)
        if resumed:
            load_weights(ema.module, resumed, resumed.weights(use_ema=True), options.model)
        return ema

    def _open_loaders(self, train_set: Beton) -> None:
        data = self.config.data
        self.train_loader, train_line = open_loader(data.loader, train_set, self.plan, self.device, data.workers)
        val_plan = EvalPlan(
            self.val_set.heights,
            self.val_set.widths,
            img_size=self.spec.img_size,
            crop_pct=self.spec.crop_pct,
            batch_size=self.val_batch,
        )
        self.val_loader, val_line = open_loader(data.loader, self.val_set, val_plan, self.device, data.workers)
        self.loader_lines = [train_line, val_line]

    def run(self) -> Result:
        """Train to the last epoch. The run directory holds everything; see `docs/architecture.md`."""
        config, path = self.config, self.run_dir.path
        self.run_dir.write_text("args.yaml", configuration.to_yaml(config))
        self.run_dir.write_text("environment.json", environment_json(self.device))
        total_updates = self.num_epochs * self.plan.steps_per_epoch
        train_s = 0.0
        with ExitStack() as stack:
            stack.callback(self.run_dir.close)
            stack.callback(self.train_loader.close)
            stack.callback(self.val_loader.close)
            flags = {name: value for name, _, value in configuration.leaves(config)}
            project = config.run.wandb_project if config.run.log_wandb else None
            self.log = stack.enter_context(
                RunLog(path, wandb_project=project, config=flags, start_epoch=self.start_epoch)
            )
            self.monitor = stack.enter_context(self._make_monitor()) if config.spectra.spec_monitor else None
            display = stack.enter_context(Display(total_updates, self.step.num_updates))
            self._say_what_runs(display)
            if self.monitor and self.step.num_updates == 0:
                self.monitor.observe(0)
            for epoch in range(self.start_epoch, self.num_epochs):
                train = self._train_epoch(epoch, display)
                train_s += train["train_s"]
                is_last = epoch == self.num_epochs - 1
                if is_last or (epoch + 1) % config.run.val_interval == 0:
                    self._finish_epoch(epoch, train, display)
                else:
                    self._save(epoch, is_best=False)
                self.scheduler.step(epoch + 1)
            if self.monitor:
                self.monitor.close()
                self._log_spectra()
        return Result(path, self.best_top1, self.best_epoch, train_s)

    def _make_monitor(self) -> SpectralMonitor:
        options = self.config.spectra
        return SpectralMonitor(
            self.model,
            self.ema.module if self.ema else None,
            targets=options.spec_targets,
            every=options.spec_every,
            topk=options.spec_topk,
            interval=options.spec_interval,
            store_dir=self.run_dir.path / "spectra",
        )

    def _say_what_runs(self, display: Display) -> None:
        parameters = sum(p.numel() for p in self.model.parameters())
        batch_size = self.config.data.batch_size
        for line in (
            f"{self.config.model.model}: {parameters / 1e6:.2f} M parameters, {self.spec.img_size} px, "
            f"{self.num_classes} classes, on {self.device}",
            *self.loader_lines,
            f"peak learning rate {self.lr:.3g} ({self.lr_origin}), batch {batch_size}, "
            f"{self.plan.steps_per_epoch} updates an epoch, {self.num_epochs} epochs",
            f"run directory {self.run_dir.path}",
        ):
            display.say(line)
        if self.start_epoch:
            display.say(f"resumed after epoch {self.start_epoch - 1}, best top-1 so far {self.best_top1:.2f} %")

    def _train_epoch(self, epoch: int, display: Display) -> dict[str, float]:
        """Train one epoch; returns its mean loss, learning rate, speed and share of time waiting for data."""
        self.model.train()
        clock, steps, loss_sum, logged = Clock(), self.plan.steps_per_epoch, 0.0, 0
        lr = self.step.lr
        for n, batch in enumerate(clock.timed(self.train_loader.batches(epoch)), start=1):
            lr = self.step.lr
            self.step(batch)
            self.scheduler.step_update(self.step.num_updates)
            if self.monitor:
                self.monitor.observe(self.step.num_updates)
            if n % self.config.run.log_interval == 0 or n == steps:
                loss = self.step.read_loss()
                loss_sum += loss * (n - logged)
                logged = n
                img_per_s = n * self.config.data.batch_size / max(clock.train_s, 1e-9)
                values = {"epoch": epoch, "loss": loss, "lr": lr, "img_per_s": img_per_s, "data_wait": clock.wait_share}
                self.log.log("train", self.step.num_updates, values)
                self._log_spectra()
                name = f"epoch {epoch + 1}/{self.num_epochs}"
                display.update(self.step.num_updates, name, loss, img_per_s, clock.wait_share)
        return {
            "train_loss": loss_sum / steps,
            "lr": lr,
            "img_per_s": steps * self.config.data.batch_size / clock.train_s,
            "data_wait": clock.wait_share,
            "train_s": clock.train_s,
        }

    def _finish_epoch(self, epoch: int, train: dict[str, float], display: Display) -> None:
        """Validate, log, save."""
        scores = {prefix: evaluate(self.val_loader, self.val_batch) for prefix, evaluate in self.evaluators.items()}
        decisive = scores.get("ema_", scores[""])
        is_best = decisive.top1 > self.best_top1
        if is_best:
            self.best_top1, self.best_epoch = decisive.top1, epoch
        values = {f"eval_{prefix}{k}": v for prefix, s in scores.items() for k, v in _as_logged(s).items()}
        self.log.log("eval", self.step.num_updates, {"epoch": epoch, **values})
        shown = ("lr", "img_per_s", "data_wait")
        row = {"epoch": epoch, "update": self.step.num_updates, "train_loss": train["train_loss"]}
        self._save(epoch, is_best)
        self.log.log_epoch(row | values | {k: train[k] for k in shown})
        ema = f" (EMA {scores['ema_'].top1:.2f} %)" if "ema_" in scores else ""
        display.say(
            f"epoch {epoch + 1:>3}/{self.num_epochs}  loss {train['train_loss']:.3f}  "
            f"top-1 {scores[''].top1:.2f} %{ema}  {train['img_per_s']:,.0f} img/s  wait {train['data_wait']:.0%}  "
            f"{duration(train['train_s'])}"
        )

    def _log_spectra(self) -> None:
        if self.monitor:
            for record in self.monitor.records():
                self.log.log("spec", record.update, record.values)

    def _save(self, epoch: int, is_best: bool) -> None:
        content: dict[str, Any] = {
            "version": 2,  # of timm's layout
            "arch": self.config.model.model,
            "epoch": epoch,
            "state_dict": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "metric": self.best_top1,
            "best_epoch": self.best_epoch,
            "num_updates": self.step.num_updates,
            "num_classes": self.num_classes,
            "input": asdict(self.spec),
            "rng": {"cpu": torch.get_rng_state()},
            "args": {name: _plain(value) for name, _, value in configuration.leaves(self.config)},
        }
        if self.device.type == "cuda":
            content["rng"]["cuda"] = torch.cuda.get_rng_state()
        if self.ema:
            content["state_dict_ema"] = self.ema.module.state_dict()
        write_checkpoint(self.run_dir.path / "last.pth.tar", content)
        if is_best:
            write_checkpoint(self.run_dir.path / "model_best.pth.tar", content)

    def _restore(self, resumed: Checkpoint) -> None:
        """Continue after the last finished epoch: optimizer, schedule, generators, best metric."""
        try:
            self.optimizer.load_state_dict(resumed.training_state("optimizer"))
        except (ValueError, KeyError) as error:
            raise UserError(f"{resumed.path} was saved with another optimizer ({error}). Give its --opt.") from error
        self.start_epoch = resumed.epoch + 1
        if self.start_epoch >= self.num_epochs:
            raise UserError(
                f"{resumed.path} has finished epoch {self.start_epoch} of {self.num_epochs}: nothing is left to train. "
                "Give a greater --epochs to go on."
            )
        self.best_top1, self.best_epoch = resumed.training_state("metric"), resumed.training_state("best_epoch")
        self.step.num_updates = resumed.training_state("num_updates")
        self.scheduler.step(self.start_epoch)
        self.scheduler.step_update(self.step.num_updates)
        rng = resumed.training_state("rng")
        torch.set_rng_state(rng["cpu"])
        if self.device.type == "cuda" and "cuda" in rng:
            torch.cuda.set_rng_state(rng["cuda"])


def _as_logged(scores: Scores) -> dict[str, float]:
    return {"loss": scores.loss, "top1": scores.top1, "top5": scores.top5}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return list(value)
    return str(value) if isinstance(value, Path) else value


def pick_device(name: str) -> torch.device:
    """`auto`, `cpu` or `cuda` as a device. Raises `UserError` for cuda without a GPU."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no CUDA device. Check nvidia-smi, or use --device cpu.")
    return torch.device(name)


def make_train_plan(config: Config, train_set: Beton, spec: InputSpec) -> TrainPlan:
    """The plan that the configuration's data and augmentation flags describe. Raises `UserError`."""
    data, augment = config.data, config.augment
    rules = TrainRules(
        scale=data.scale,
        ratio=data.ratio,
        hflip=data.hflip,
        mixup=augment.mixup,
        cutmix=augment.cutmix,
        mixup_prob=augment.mixup_prob,
        mixup_switch_prob=augment.mixup_switch_prob,
        mixup_off_epoch=augment.mixup_off_epoch,
    )
    return TrainPlan(
        train_set.heights,
        train_set.widths,
        rules,
        seed=config.run.seed,
        img_size=spec.img_size,
        batch_size=data.batch_size,
    )


__all__ = ["Loader", "Result", "Trainer", "make_train_plan", "pick_device"]
