"""`python -m lowrank_vit.train`: train a ViT from `.beton` files and watch its spectra."""

from __future__ import annotations

import sys
from pathlib import Path

from data_prep.errors import exit_cleanly
from lowrank_vit.config import parse
from lowrank_vit.engine.distributed import World, environment_world, joined
from lowrank_vit.engine.failing import exit_together
from lowrank_vit.engine.progress import duration
from lowrank_vit.engine.setup import pick_device
from lowrank_vit.engine.trainer import Result, Trainer
from lowrank_vit.options import Config
from lowrank_vit.timm_flags import with_long_names


def main(argv: list[str] | None = None) -> None:
    """Parse the command line, train, and say what came of it and what to do next. Under torchrun: one of the ranks."""
    argv = sys.argv[1:] if argv is None else argv
    world = environment_world()
    if world.size > 1:
        exit_together(lambda: _train(argv, world), world)
    else:
        _train(argv, world)


def _train(argv: list[str], world: World) -> None:
    config = parse(argv)
    with joined(world, pick_device(config.step.device, world.local_rank)):
        result = Trainer(config, default_name(argv, config), world).run()
        if world.is_first:
            print(_farewell(result, config.model.model_ema))


def default_name(argv: list[str], config: Config) -> str:
    """How a run directory's name begins: the configuration file's name, else the model's."""
    argv = with_long_names(argv)
    for flag, value in zip(argv, [*argv[1:], ""], strict=True):
        if flag == "--config":
            return Path(value).stem
        if flag.startswith("--config="):
            return Path(flag).stem
    return config.model.model


def _farewell(result: Result, has_ema: bool) -> str:
    run, best = result.run_dir, result.run_dir / "model_best.pth.tar"
    python, ema = _python(), " --use-ema" if has_ema else ""
    if result.stopped_by:
        return f"""
stopped by {result.stopped_by} after update {result.num_updates}; everything is saved. Go on with:
  {python} -m lowrank_vit.train --config {run}/args.yaml \\
      --resume {run}/last.pth.tar"""
    if result.best is None:
        return f"\n{result.num_updates} updates in {duration(result.train_s)}, see {run}/metrics.jsonl"
    return f"""
{_best(result)}, {duration(result.train_s)} of training

  {run}/
    args.yaml         every option; --config on it repeats the run
    summary.csv       one row an epoch; metrics.jsonl has everything
    spectra/          full spectra, one file a refresh
    last.pth.tar      to resume from; model_best.pth.tar has the best weights

next:
  {python} -m lowrank_vit.report {run}
  {python} -m lowrank_vit.analyze_spectrum{ema} --checkpoint \\
      {best}
  {python} -m lowrank_vit.validate{ema} --checkpoint \\
      {best}"""


def _best(result: Result) -> str:
    name, percent = ("loss", "") if result.metric == "loss" else (result.metric.replace("top", "top-"), " %")
    return f"{name} {result.best:.4g}{percent} (best, epoch {result.best_epoch + 1})"


def _python() -> str:
    """The interpreter as it can be typed here: .venv/bin/python after `make`, else python."""
    local = Path(".venv/bin/python")
    return str(local) if local.exists() and Path(sys.prefix).resolve() == Path(".venv").resolve() else "python"


if __name__ == "__main__":
    exit_cleanly(main)
