"""A run's numbers: sums on the device; metrics.jsonl, summary.csv (a row per epoch) and trackers, if requested."""

from __future__ import annotations

import contextlib
import csv
import io
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from lowrank_vit.common import terminal
from lowrank_vit.common.errors import Failures, UserError
from lowrank_vit.common.files import append_whole, whole_file, write_whole
from lowrank_vit.ranks.world import World
from lowrank_vit.run.spectral_records import Logged, Prepared, Preparing, Sent, ended, json_of, table_of
from lowrank_vit.run.trackers.sending import Trackers

_AXES = {"flow": "spec_update", "eval": "epoch"}
"""The trackers' axis by kind of record; `update` for other kinds."""


_ALSO = {"eval": ("epoch",), "flow": ("epoch",)}
"""Extra keys of a record by kind: a validation's records also have the epoch."""


class Means(NamedTuple):
    """Means over the updates and ranks of an interval."""

    loss: float
    top1: float
    """Percent of images whose label (before mixing) is predicted, 0-100."""


class Event(NamedTuple):
    """An event at an update: values for metrics.jsonl, and a line to print, if not empty."""

    update: int
    values: dict[str, Any]
    """Plain values; those of layers are in mappings by layer name."""
    line: str = ""


NEVER = torch.iinfo(torch.int64).max
"""Stands for "no update" as the first update with a loss that is not finite."""


class Meter:
    """Sums of losses and hits since the last `read`, and the first update whose loss was not finite.

    With float16 the unscaled loss is checked: an update that the scaler skips because of overflowing gradients has a
    finite loss. A loss that is not finite has overflowed in the forward pass, which no scale can fix.
    """

    def __init__(self, device: torch.device, accum_steps: int = 1) -> None:
        """`accum_steps`: batches per update."""
        self._accum_steps = accum_steps
        # Sums of means per update, so that a run can continue with another number of batches per update.
        self._sums = torch.zeros(2, dtype=torch.float64, device=device)
        self._bad_update = torch.full((), NEVER, dtype=torch.int64, device=device)
        self._lrs: dict[int, float] = {}

    def add(self, loss: Tensor, hits: Tensor, batch_size: int, update: int, lr: float) -> None:
        """Add one batch of update `update`: its mean loss, and its number of correct predictions."""
        self._sums.add_(torch.stack([loss.double(), hits.double() / batch_size]), alpha=1 / self._accum_steps)
        self._bad_update = torch.where(torch.isfinite(loss), self._bad_update, self._bad_update.clamp(max=update))
        self._lrs[update] = lr

    def read(self, world: World) -> Means:
        """Means since the last call, over all ranks (this waits for the device); every rank calls it together.

        Raises `UserError` naming update and learning rate if a loss was not finite.
        """
        return self.read_with([], world)[0]

    def read_with(self, own: Sequence[float], world: World) -> tuple[Means, np.ndarray]:
        """The result of `read`, and the `own` numbers of every rank, float64 (W, F), which are sent with the sums."""
        numbers = torch.zeros(world.size, len(own), dtype=torch.float64)
        numbers[world.rank] = torch.tensor(own, dtype=torch.float64)
        together = torch.cat([self._sums, numbers.flatten().to(self._sums.device)])
        world.sum(together)
        sums = together.cpu().numpy()
        loss, hits = (one / max(1, len(self._lrs) * world.size) for one in sums[:2].tolist())
        if not math.isfinite(loss):
            self._raise_not_finite(world)
        self._sums.zero_()
        self._lrs.clear()
        return Means(loss, 100 * hits), sums[2:].reshape(world.size, len(own))

    def _raise_not_finite(self, world: World) -> None:
        number = int(world.least(self._bad_update))
        lr = f" (learning rate {self._lrs[number]:.3g})" if number in self._lrs else ""
        raise UserError(
            f"The loss is not finite at update {number}{lr}. "
            "Nothing was saved since then. Try a smaller --lr, a longer --warmup-epochs or --clip-grad 1."
        )

    def state_dict(self, world: World) -> dict[str, Any]:
        """The sums so far, averaged over the ranks; all ranks call it together unless nothing was added."""
        sums, bad_update = self._sums.clone(), self._bad_update
        if self._lrs:
            world.sum(sums)
            bad_update = world.least(bad_update)
        return {"sums": sums / world.size, "bad_update": bad_update, "lrs": self._lrs.copy()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue with the sums of `state_dict`, which may come from other numbers of ranks and batches per update."""
        self._sums.copy_(state["sums"])
        self._bad_update.copy_(state["bad_update"])
        self._lrs = dict(state["lrs"])


class RunLog:
    """Appends to the files of one run directory. Use as a context manager.

    Failures to write (a full disk) are reported once, and training goes on.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        trackers: Trackers | None = None,
        start_epoch: int = 0,
        start_update: int = 0,
        spec_log: Logged = "means",
        wandb_spec: Sent = "means",
        say: Callable[[str], object] = terminal.say,
    ) -> None:
        """For a resumed run, rows of `start_epoch` and later, and records after `start_update`, are dropped.

        `spec_log`, `wandb_spec`: the parts of the spectra to write and to send to trackers, see `spectral_records`.
        """
        self._prepare = Preparing(spec_log, wandb_spec if trackers else None)
        self._newest_spectra: tuple[int, dict[str, Any]] | None = None
        self._summary, self._jsonl, self._trackers = run_dir / "summary.csv", run_dir / "metrics.jsonl", trackers
        self._lost_lines = Failures("lines of metrics.jsonl were lost", say)
        self._lost_rows = Failures("versions of summary.csv could not be written", say)
        self._rows = _rows_before(self._summary, start_epoch) if start_epoch else []
        if self._jsonl.is_file():
            try:
                _drop_after(self._jsonl, start_update, start_epoch)
            except OSError as error:
                say(
                    f"warning: metrics.jsonl cannot be rewritten ({error.strerror}); for updates after "
                    f"{start_update}, only its last lines count"
                )

    def log(self, kind: str, update: int, values: dict[str, Any]) -> None:
        """Write one line to metrics.jsonl, of kind train, eval, spec, flow, lowrank or speed; `update`: made so far."""
        if kind == "spec":
            self.log_spectra(update, values)
            return
        self._append(json_of(kind, update, values))
        # A tracker would make curves of lowrank's tables; the numbers of speed are in train lines.
        if self._trackers is not None and kind not in ("lowrank", "speed"):
            axis = _AXES.get(kind, "update")
            named = {f"train/{name}": value for name, value in values.items()} if kind == "train" else values
            self._trackers.log({"update" if kind == "eval" else axis: update, **named}, axis)

    def log_spectra(self, update: int, values: dict[str, Any], prepared: Prepared | None = None) -> None:
        """Log one refresh of the spectra: to each place the part of its numbers that belongs there.

        `prepared`: the result of `Preparing` for `values`, to which more may have been added since; made here if None.
        """
        prepared = prepared or self._prepare(update, values)
        late = dict(itertools.islice(values.items(), prepared.num_values, None))
        self._append(ended(prepared.line, late))
        if self._trackers is not None:
            self._newest_spectra = update, values
            self._trackers.send(prepared.row | late if late else prepared.row, "spec_update")

    def _append(self, line: str) -> None:
        try:
            append_whole(self._jsonl, f"{line}\n")
            self._lost_lines.is_over()
        except OSError as error:
            self._lost_lines.note(_lost(error, self._jsonl))

    def log_epoch(self, row: dict[str, Any]) -> None:
        """Log a validated epoch: a row in summary.csv and a line of kind eval. `row` must have the key `update`.

        A value of None becomes an empty cell in the row, and is left out of the line.
        """
        self.log("eval", row["update"], {k: v for k, v in row.items() if k != "update" and v is not None})
        self._rows.append({k: _cell(v) for k, v in row.items()})
        columns = list(dict.fromkeys(key for r in self._rows for key in r))
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="")
        writer.writeheader()
        writer.writerows(self._rows)
        try:
            write_whole(self._summary, text.getvalue(), through_link=False)
            self._lost_rows.is_over()
        except OSError as error:
            self._lost_rows.note(_lost(error, self._summary))

    def __enter__(self) -> RunLog:
        return self

    def __exit__(self, *_: object) -> None:
        self._lost_lines.tell()
        self._lost_rows.tell()
        if self._trackers is not None:
            self._trackers.finish(self._newest_spectra and table_of(*self._newest_spectra))


def _lost(error: OSError, path: Path) -> str:
    return f"{path.name} cannot be written ({error.strerror or error}); its numbers are lost until it can be."


def _cell(value: Any) -> str:
    return "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)


def _rows_before(summary: Path, epoch: int) -> list[dict[str, str]]:
    if not summary.exists():
        return []
    with summary.open(newline="", encoding="utf-8", errors="replace") as file:
        rows = [row for row in csv.DictReader(file) if (row.get("epoch") or "").isdecimal()]
    return [row for row in rows if int(row["epoch"]) < epoch and None not in row.values() and None not in row]


def last_recorded(run_dir: Path, kind: str, until: int) -> int:
    """The largest `update` up to `until` of the records of this kind; -1 if there is none."""
    newest = -1
    with contextlib.suppress(OSError), (run_dir / "metrics.jsonl").open("rb") as file:
        for record in filter(None, map(_record, file)):
            if record["kind"] == kind and record["update"] <= until:
                newest = max(newest, record["update"])
    return newest


def _record(line: bytes) -> dict[str, Any] | None:
    """The record in a line of metrics.jsonl; None for a line that is cut short, damaged or foreign."""
    with contextlib.suppress(ValueError, RecursionError):
        record = json.loads(line.decode())
        if isinstance(record, dict) and isinstance(record.get("kind"), str):
            found = cast(dict[str, Any], record)
            if all(isinstance(found.get(name), int) for name in ("update", *_ALSO.get(found["kind"], ()))):
                return found
    return None


def _drop_after(path: Path, update: int, epoch: int) -> None:
    """Keep only the records up to `update`, atomically, so that a resumed run has each record once.

    `epoch` is the first whose scores are still to come, since an epoch's end may share its update. Lines that are no
    record, such as one cut short by a kill, are removed too.
    """
    with path.open("rb") as old, whole_file(path, through_link=False) as new:
        for line in old:
            record = _record(line)
            if not record or record["update"] > update or (record["kind"] in _ALSO and record["epoch"] >= epoch):
                continue
            new.write(line if line.endswith(b"\n") else line + b"\n")
