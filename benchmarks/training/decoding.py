"""The speed of a run's decoder while its step runs: an upper bound for training."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from benchmarks.harness.measure import Case
from benchmarks.training.run import TrainingRun
from benchmarks.training.timed_steps import warming_updates
from lowrank_vit.common.devices import Mark, current_stream, on_stream, side_stream
from lowrank_vit.common.errors import UserError
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.loader import Loader
from lowrank_vit.data.sets.beton import Beton

_AHEAD = 2
"""Batches that the host may have taken before the device has made them, as in training."""


def nothing_taken() -> float:
    """Images per second if nothing was decoded."""
    return 0.0


@dataclass(frozen=True)
class DecodingCase(Case):
    """A case that measures its own speed."""

    speed: Callable[[], float] = nothing_taken
    """Images per second of the last round."""

    def sample(self, seconds: float) -> float:
        """The speed, independent of the round's duration."""
        return self.speed()


class DecodingBeside:
    """A second loader like the run's; a thread takes and drops its batches while the step runs on a fixed batch."""

    def __init__(self, training: TrainingRun) -> None:
        """The loader is opened in the first round."""
        self._training, self._stream = training, side_stream(training.device)
        self._loader: Loader | None = None
        self._thread: threading.Thread | None = None

    def _open(self) -> Loader:
        setup = self._training.timed.trainer.setup
        config, loader = setup.config.data, self._of_run
        options = LoaderOptions(
            loader.name,
            config.workers or 1,
            config.prefetch,
            config.hw_decoder_load,
            jpeg_fancy_upsampling=config.jpeg_fancy_upsampling,
        )
        assert config.data_dir is not None
        beton = Beton(Path(config.data_dir) / "train.beton")
        try:
            return open_loader(beton, setup.plan, setup.device, options, prepare=loader._prepare)[0]
        except UserError as error:  # a UserError would end the bench
            raise RuntimeError(str(error)) from error

    @property
    def _of_run(self) -> Any:
        return self._training.timed.trainer.setup.train_loader

    def case(self) -> DecodingCase:
        """The case for the bench."""
        setting = "the decoder alone, as in end_to_end, while the step runs on a batch that stays"
        around = self._start, self._stop
        return DecodingCase(self._run, self._training.items, "img/s", setting, *around, speed=self._speed)

    def close(self) -> None:
        """Stop decoding, and close the loader."""
        self._stop()
        if self._loader is not None:
            self._loader.close()

    def _start(self) -> None:
        """Start decoding, and wait until the queue is full."""
        self._loader = self._loader or self._open()
        self._times, self._failed, self._is_over = list[float](), list[BaseException](), threading.Event()
        self._thread = threading.Thread(target=self._take, args=(self._loader,), daemon=True)
        self._thread.start()
        self._training.timed.held(1)  # the first use makes the batch
        while len(self._times) < warming_updates(self._training.config.data.prefetch) and self._thread.is_alive():
            time.sleep(0.002)

    def _run(self) -> None:
        """Run at least a round's steps, until as many batches are decoded."""
        assert self._thread is not None
        steps, self._first = self._training.load.steps, len(self._times)
        while self._thread.is_alive():
            self._training.timed.held(steps)
            if len(self._times) > self._first + steps:
                break
        self._last = len(self._times) - 1

    def _stop(self) -> None:
        if self._thread is not None:
            self._is_over.set()
            self._thread.join()
            self._thread = None
            if self._failed:
                raise self._failed[0]

    def _speed(self) -> float:
        batches, seconds = self._last - self._first, self._times[self._last] - self._times[self._first]
        return batches * self._training.load.batch_size / seconds

    def _take(self, loader: Loader) -> None:
        marks = deque[Mark]()
        try:
            with on_stream(self._stream):
                for epoch in count():
                    with closing(loader.batches(epoch)) as batches:  # type: ignore[type-var]
                        for _ in batches:
                            marks.append(Mark.of(current_stream(self._training.device)))
                            if len(marks) > _AHEAD:
                                marks.popleft().wait_on_host()
                                self._times.append(time.perf_counter())
                            if self._is_over.is_set():
                                return
        except BaseException as error:  # raised where the thread is waited for
            self._failed.append(error)
