"""What a user may have on disk: folders of images in splits, CIFAR-100's archive; and a log to look into."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from lowrank_vit.data.sets.staging import stage_all
from tests.photos import write_folder
from tests.unit.data_prep.sources.test_cifar100 import PYTHON_FORM, write_tar
from tests.waiting import LONG_S


class Said(list[str]):
    """Collects the lines that would be printed."""

    def __call__(self, line: str) -> None:
        self.append(line)

    def about(self, word: str) -> list[str]:
        """The lines with a word."""
        return [line for line in self if word in line]


def write_splits(root: Path, train: str = "train", val: str = "val") -> Path:
    """Two splits of the same 24 JPEGs in two classes."""
    write_folder(root / train)
    shutil.copytree(root / train, root / val)
    return root


def write_archive(root: Path) -> Path:
    """A small CIFAR-100 in the official form, packed."""
    root.mkdir(parents=True, exist_ok=True)
    return write_tar(root / "cifar-100-python.tar.gz", PYTHON_FORM, "cifar-100-python")


def stage(beton: Path, stage_dir: Path, say: Callable[[str], object]) -> Path:
    """The staged copy of one set."""
    (copy,) = stage_all([beton], stage_dir, say)
    return copy


def run_at_once(code: str, count: int = 3) -> list[str]:
    """What each of several processes prints that run the same code at once; all must succeed."""
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(count)
    ]
    outputs = [process.communicate(timeout=LONG_S) for process in running]
    assert [process.returncode for process in running] == [0] * count, outputs
    return [out for out, _ in outputs]
