"""An interrupted conversion goes on where it stopped, ends in the same bytes, and believes nothing that changed."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import data_prep
from data_prep.formats.beton import MIN_PAGE_SIZE, MODE_RAW
from data_prep.formats.jpeg import BadImageError, EncodedImage
from data_prep.sources.samples import Sample
from data_prep.writing import workers as workers_module
from data_prep.writing.beton import Resume, Written, write_beton
from data_prep.writing.resuming import RECORD
from lowrank_vit.common.errors import UserError
from tests.waiting import LONG_S

NUM_SAMPLES = 60
KEY = "0" * 64


class Folder:
    """Sixty samples of 150 to 250 kB in pages of 2 MiB, "files" that can change, and a count of the encoded ones."""

    def __init__(self, root: Path) -> None:
        self.out = root / "a.beton"
        rng = np.random.default_rng(0)
        self.contents = [rng.bytes(30 * int(rng.integers(5_000, 8_300))) for _ in range(NUM_SAMPLES)]
        self.changed = [0] * NUM_SAMPLES
        self.bad: set[int] = set()
        self.encoded: list[int] = []
        self.stop_at = NUM_SAMPLES
        self.samples = [Sample(i % 7, str(i)) for i in range(NUM_SAMPLES)]

    def encode(self, sample: Sample) -> EncodedImage:
        i = int(sample.name)
        if i == self.stop_at:
            raise KeyboardInterrupt
        self.encoded.append(i)
        if i in self.bad:
            raise BadImageError(sample.name, "bad")
        return EncodedImage(MODE_RAW, len(self.contents[i]) // 30, 10, self.contents[i], "raw", self.stat(sample))

    def stat(self, sample: Sample) -> tuple[int, int]:
        i = int(sample.name)
        return len(self.contents[i]), self.changed[i]

    def write(self, key: str = KEY, on_bad: str = "error", out: Path | None = None, workers: int = 1) -> Written:
        self.encoded.clear()
        return write_beton(
            out or self.out,
            self.samples,
            self.encode,
            workers=workers,
            on_bad=on_bad,  # type: ignore[arg-type]
            page_size=MIN_PAGE_SIZE,
            resume=Resume(key, self.stat),
        )

    def interrupted(self, at: int, on_bad: str = "error") -> None:
        self.stop_at = at
        with pytest.raises(KeyboardInterrupt):
            self.write(on_bad=on_bad)
        self.stop_at = NUM_SAMPLES

    def whole(self) -> bytes:
        """What an undisturbed run writes."""
        path = self.out.with_name("whole.beton")
        self.write(out=path, on_bad="skip")
        return path.read_bytes()

    @property
    def left_behind(self) -> list[str]:
        return sorted(path.name for path in self.out.parent.iterdir() if path.name.startswith("."))


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.mark.parametrize("at", [0, 1, 11, 12, 30, 59])
def test_it_goes_on_where_it_stopped(folder: Folder, at: int) -> None:
    expected = folder.whole()
    folder.interrupted(at)
    written = folder.write()
    assert folder.out.read_bytes() == expected
    assert written.resumed == folder.encoded[0]
    assert at - 15 < written.resumed <= at, "at most one page is lost"
    assert folder.left_behind == []


def test_it_can_be_interrupted_again_and_again(folder: Folder) -> None:
    expected = folder.whole()
    for at in (13, 14, 30, 31, 55):
        folder.interrupted(at)
    assert folder.write().resumed > 40
    assert folder.out.read_bytes() == expected


def test_runs_that_stop_at_once_lose_nothing(folder: Folder) -> None:
    folder.interrupted(50)
    journal = folder.out.with_name(".a.beton.partial.journal")
    finished = (journal.stat().st_size - 64) // RECORD.itemsize
    assert finished > 50 - 15
    for _ in range(5):
        folder.interrupted(finished)  # at the first new image
    assert folder.write().resumed == finished
    assert folder.out.read_bytes() == folder.whole()


def _nothing(folder: Folder) -> None:
    pass


def _a_file_changes(folder: Folder) -> None:
    folder.changed[20] = 1


def _a_byte_on_the_disk_changes(folder: Folder) -> None:
    path = folder.out.with_name(".a.beton.partial")
    content = bytearray(path.read_bytes())
    content[3 * MIN_PAGE_SIZE + 1000] ^= 1
    path.write_bytes(content)


def _a_bad_one_is_mended(folder: Folder) -> None:
    folder.bad = {7}


def _a_bad_one_is_removed(folder: Folder) -> None:
    folder.samples = [sample for sample in folder.samples if sample.name != "7"]


def _a_good_one_is_removed(folder: Folder) -> None:
    folder.samples = [sample for sample in folder.samples if sample.name != "21"]


def _a_label_changes(folder: Folder) -> None:
    folder.samples[22] = Sample(6, "22")


@pytest.mark.parametrize(
    ("befalls", "most"),
    [
        (_nothing, 50),
        (_a_file_changes, 20),
        (_a_byte_on_the_disk_changes, 21),
        (_a_bad_one_is_mended, 31),
        (_a_bad_one_is_removed, 50),
        (_a_good_one_is_removed, 21),
        (_a_label_changes, 22),
    ],
)
def test_threads_read_back_what_one_does(folder: Folder, befalls: Callable[[Folder], None], most: int) -> None:
    """The same samples are taken over, whatever became of one of them meanwhile, and no more are held than usual."""
    folder.bad = {7, 31}
    folder.interrupted(50, on_bad="skip")
    befalls(folder)
    partial = {path.name: path.read_bytes() for path in folder.out.parent.glob(".a.beton.partial*")}
    found = list[tuple[int, bytes]]()
    for workers in (1, 3):
        for name, content in partial.items():
            (folder.out.parent / name).write_bytes(content)
        folder.out.unlink(missing_ok=True)
        found.append((folder.write(on_bad="skip", workers=workers).resumed, folder.out.read_bytes()))
    assert found[0] == found[1]
    assert most - 15 < found[0][0] <= most
    assert found[0][1] == folder.whole()


def test_threads_read_back_side_by_side(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two reads are under way at once."""
    folder.interrupted(50)
    both, pread = threading.Barrier(2), os.pread

    def together(*given: int) -> bytes:
        both.wait(LONG_S)
        return pread(*given)

    monkeypatch.setattr(os, "pread", together)
    monkeypatch.setattr(workers_module, "CHUNK", 1)
    resumed = len(np.frombuffer(folder.out.with_name(".a.beton.partial.journal").read_bytes()[64:], RECORD)) // 2 * 2
    journal = folder.out.with_name(".a.beton.partial.journal")
    journal.write_bytes(journal.read_bytes()[: 64 + resumed * RECORD.itemsize])
    assert folder.write(workers=2).resumed == resumed


def test_a_source_file_that_changed_is_read_again(folder: Folder) -> None:
    folder.interrupted(50)
    folder.contents[20] = folder.contents[20][:-30]
    folder.changed[33] = 1
    assert folder.write().resumed == 20
    assert folder.out.read_bytes() == folder.whole()


@pytest.mark.parametrize("offset", [0, 1000])
def test_pages_that_were_damaged_meanwhile_are_written_again(folder: Folder, offset: int) -> None:
    folder.interrupted(50)
    partial = folder.out.with_name(".a.beton.partial")
    with partial.open("r+b") as file:
        file.seek(2 * MIN_PAGE_SIZE + offset)
        byte = file.read(1)
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte[0] ^ 1]))
    assert 5 < folder.write().resumed < 15
    assert folder.out.read_bytes() == folder.whole()


def test_a_journal_full_of_rubbish_does_no_harm(folder: Folder) -> None:
    expected, journal = folder.whole(), folder.out.with_name(".a.beton.partial.journal")
    rng = np.random.default_rng(0)
    for _ in range(30):
        folder.interrupted(40)
        content = bytearray(journal.read_bytes())
        for position in rng.integers(64, len(content), 3):
            content[position] = rng.integers(256)
        journal.write_bytes(content[: int(rng.integers(64, len(content) + 1))])
        folder.write()
        assert folder.out.read_bytes() == expected


def test_other_options_begin_anew(folder: Folder) -> None:
    folder.interrupted(50)
    assert folder.write(key="1" * 64).resumed == 0
    assert folder.out.read_bytes() == folder.whole()


def test_bad_images_are_tried_again(folder: Folder) -> None:
    folder.bad = {3, 4, 25, 41}
    folder.interrupted(50, on_bad="skip")
    written = folder.write(on_bad="skip")
    assert [image.name for image in written.skipped] == ["3", "4", "25", "41"]
    assert written.num_samples == 56
    assert folder.out.read_bytes() == folder.whole()
    folder.interrupted(50, on_bad="skip")
    folder.bad = {3, 4, 41}  # number 25 was mended
    assert folder.write(on_bad="skip").resumed == 25
    assert folder.out.read_bytes() == folder.whole()


def test_what_is_good_before_a_bad_image_is_kept(folder: Folder) -> None:
    folder.bad = {30, 50}
    with pytest.raises(UserError, match=r"2 of 60 images(.|\n)*30: bad\n  50: bad") as caught:
        folder.write()
    assert any("52 images are finished and kept in" in note for note in caught.value.__notes__), caught.value.__notes__
    folder.bad = set()
    assert folder.write().resumed == 30
    assert folder.out.read_bytes() == folder.whole()


def test_bad_images_can_be_skipped_or_removed_afterwards(folder: Folder) -> None:
    folder.bad = {3, 30, 50}
    for remove in (False, True):
        with pytest.raises(UserError):
            folder.write()
        if remove:
            folder.samples = [sample for sample in folder.samples if int(sample.name) not in folder.bad]
        assert folder.write(on_bad="skip").resumed >= (47 if remove else 50)  # all whole pages
        assert folder.out.read_bytes() == folder.whole()


def test_after_a_full_disk_it_goes_on(folder: Folder) -> None:
    expected = folder.whole()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 * MIN_PAGE_SIZE + 100_000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"a\.beton cannot be written: .* Check the free space") as caught:
            folder.write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the same command resumes from there" in caught.value.__notes__[0]
    assert folder.write().resumed > 5
    assert folder.out.read_bytes() == expected


def test_two_processes_do_not_write_the_same_file(folder: Folder) -> None:
    def encode(sample: Sample) -> EncodedImage:
        if sample.name == "30":
            with pytest.raises(UserError, match="another process is writing"):
                folder.write()
        return folder.encode(sample)

    write_beton(folder.out, folder.samples, encode, page_size=MIN_PAGE_SIZE, resume=Resume(KEY, folder.stat))
    assert folder.out.read_bytes() == folder.whole()


def test_nothing_is_left_of_a_run_that_finished_no_page(folder: Folder) -> None:
    folder.interrupted(3)
    assert folder.left_behind == []


def test_records_are_small() -> None:
    assert RECORD.itemsize <= 48


@pytest.mark.parametrize("kills", [4, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_in_the_same_bytes(tmp_path: Path, kills: int) -> None:
    """SIGKILL, in the command itself; both splits, ImageNet-like files of 100 kB of noise in pages of 8 MiB."""
    from PIL import Image

    rng = np.random.default_rng(0)
    for split in ("train", "val"):
        (tmp_path / "src" / split / "a").mkdir(parents=True)
        for i in range(160 * kills):
            path = tmp_path / "src" / split / "a" / f"{i:04d}.jpg"
            if i < 40:
                Image.fromarray(rng.integers(0, 256, (300, 300, 3), np.uint8)).save(path)
            else:
                path.hardlink_to(path.with_name(f"{i % 40:04d}.jpg"))

    def command(out: str) -> list[str]:
        arguments = ["--src", str(tmp_path / "src"), "--out", str(tmp_path / out), "--workers", "2"]
        return [sys.executable, "-m", "data_prep", "imagefolder", *arguments]

    def written() -> int:
        """How many images both splits have finished; it grows by whole pages."""
        sizes = [path.stat().st_size for path in (tmp_path / "out").glob("*.journal")]
        return sum(max(0, size - 64) // RECORD.itemsize for size in sizes)

    root = Path(data_prep.__file__).parents[1]
    subprocess.run(command("whole"), cwd=root, check=True, capture_output=True)
    moments = random.Random(0)
    for kill in range(kills):
        before = written()
        process = subprocess.Popen(command("out"), cwd=root, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while written() == before and process.poll() is None:
            time.sleep(0.001)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        if process.wait() == 0 and kill:
            break  # this process got no turn until it was through
        assert process.returncode == -signal.SIGKILL
    done = subprocess.run(command("out"), cwd=root, check=True, capture_output=True, text=True)
    assert "finished by an" in done.stdout  # interrupted run, or earlier one
    for name in ("train.beton", "val.beton", "train.beton.samples", "val.beton.samples"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        path.name for path in (tmp_path / "whole").iterdir()
    )


KILLED_AT_EVERY_STEP = """
import os, signal, sys
from pathlib import Path
from data_prep.convert import convert_image_folder
src, whole, out = map(Path, sys.argv[1:])
convert_image_folder(src, whole)
expected = {path.name: path.read_bytes() for path in whole.parent.iterdir()}
steps = 0

def counted(function, step, counter=[0]):
    def wrapper(*arguments, **options):
        if counter[0] == step:
            os.kill(os.getpid(), signal.SIGKILL)
        counter[0] += 1
        return function(*arguments, **options)
    return wrapper

while True:
    if not (child := os.fork()):
        for owner, name in ((os, "fsync"), (Path, "replace"), (Path, "unlink"), (os, "pwrite")):
            setattr(owner, name, counted(getattr(owner, name), steps))
        convert_image_folder(src, out)
        os._exit(0)
    if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0:
        break
    convert_image_folder(src, out)
    found = {path.name: path.read_bytes() for path in out.parent.iterdir()}
    assert {*found} == {*expected}, (steps, sorted(found))
    assert all(found[name] == expected[name] for name in found), steps
    for path in out.parent.iterdir():
        path.unlink()
    steps += 1
print(steps)
"""


def test_killed_at_every_step_of_its_end_it_leaves_nothing_after_the_next_run(tmp_path: Path) -> None:
    from PIL import Image

    for name in ("src/a", "whole", "out"):
        (tmp_path / name).mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "src" / "a" / "1.jpg")
    paths = [tmp_path / "src", tmp_path / "whole" / "set.beton", tmp_path / "out" / "set.beton"]
    root = Path(data_prep.__file__).parents[1]
    told = subprocess.run(
        [sys.executable, "-c", KILLED_AT_EVERY_STEP, *paths], cwd=root, capture_output=True, text=True, check=False
    )
    assert told.returncode == 0, told.stderr
    assert int(told.stdout) >= 12
