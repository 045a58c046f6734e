"""Where a run's numbers go: metrics.jsonl (everything), summary.csv (a row an epoch) and, if asked for, W&B."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import IO, Any

from data_prep.errors import UserError


class RunLog:
    """Appends to the files of one run directory. Use as a context manager."""

    def __init__(self, run_dir: Path, *, wandb_project: str | None, config: dict[str, Any], start_epoch: int) -> None:
        """`wandb_project` None: no W&B. `start_epoch` > 0 continues a run: later rows of summary.csv are dropped."""
        self._summary = run_dir / "summary.csv"
        self._rows = _rows_before(self._summary, start_epoch) if start_epoch else []
        self._wandb = _start_wandb(wandb_project, run_dir, config) if wandb_project else None
        self._jsonl: IO[str] = (run_dir / "metrics.jsonl").open("a", encoding="utf-8")

    def log(self, kind: str, update: int, values: dict[str, Any]) -> None:
        """One line in metrics.jsonl: `kind` is train, eval or spec; `update` the number of optimizer updates so far."""
        # JSON has no NaN: a value that is not finite becomes null.
        finite = {k: (v if not isinstance(v, float) or math.isfinite(v) else None) for k, v in values.items()}
        self._jsonl.write(json.dumps({"kind": kind, "update": update, **finite}, allow_nan=False) + "\n")
        self._jsonl.flush()
        if self._wandb is not None:
            # Spectra are finished some updates after they were taken, so they have a step axis of their own.
            self._wandb.log({"spec_update" if kind == "spec" else "update": update, **values})

    def log_epoch(self, row: dict[str, Any]) -> None:
        """One row in summary.csv; `row` has the same keys in every epoch that is validated."""
        self._rows.append({k: f"{v:.6g}" if isinstance(v, float) else str(v) for k, v in row.items()})
        columns = list(dict.fromkeys(key for r in self._rows for key in r))
        temporary = self._summary.with_name(".summary.csv.part")
        with temporary.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, columns, restval="")
            writer.writeheader()
            writer.writerows(self._rows)
        temporary.replace(self._summary)

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._jsonl.close()
        if self._wandb is not None:
            self._wandb.finish()


def _rows_before(summary: Path, epoch: int) -> list[dict[str, str]]:
    if not summary.exists():
        return []
    with summary.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if int(row["epoch"]) < epoch]


def _start_wandb(project: str, run_dir: Path, config: dict[str, Any]) -> Any:
    import wandb  # heavy: only where asked for

    try:
        run = wandb.init(project=project, name=run_dir.name, dir=str(run_dir), config=config)
    except wandb.Error as error:
        raise UserError(
            f"--log-wandb: Weights & Biases cannot start: {error} Log in with `wandb login`, or log to files only with "
            "WANDB_MODE=offline in the environment."
        ) from error
    run.define_metric("update")
    run.define_metric("*", step_metric="update")
    run.define_metric("spec_update")
    for kind in ("spec", "spec_ema"):
        run.define_metric(f"{kind}/*", step_metric="spec_update")
    return run
