"""Rows that are appended: the finished files are those of the standard library, whatever befell the command before."""

from __future__ import annotations

import contextlib
import csv
import errno
import io
import json
import os
from pathlib import Path

import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.score import kept as module
from lowrank_vit.score.kept import Kept, Part, keeping
from lowrank_vit.score.results import Prediction, csv_columns, csv_rows, json_items

COLUMNS = {"index": True, "value": "prob"}
KEY = {"--topk": ("5", "5")}
BATCH = 4
FILES = [Path(f"f/{n}.jpg") for n in range(30)] + [Path("f/3.jpg"), Path(os.fsdecode(b"\xff.jpg")), Path('a"\n,b.jpg')]
BAD = {3, 7, 30}  # one of them twice


def prediction(n: int) -> Prediction:
    return Prediction(FILES[n], [f"c{n}", "é, d"], [1 / (n + 1), 1e-9], [n, 2], [n + 0.5, -1.0])


def part(batch: int) -> Part:
    numbers = range(len(FILES))[BATCH * batch : BATCH * (batch + 1)]
    found = [prediction(n) for n in numbers if n not in BAD]
    rows = {".csv": csv_rows(found, **COLUMNS), ".json": json_items(found, **COLUMNS)}
    skipped = [(str(FILES[n]), f"reason {n}") for n in numbers if n in BAD]
    return Part(len(numbers), len(found), rows, skipped, f"{batch:016x}")


BATCHES = -(-len(FILES) // BATCH)


def expected() -> tuple[bytes, bytes]:
    text, shown = io.StringIO(), list[dict[str, object]]()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "class_1", "index_1", "probability_1", "class_2", "index_2", "probability_2"])
    for p in (prediction(n) for n in range(len(FILES)) if n not in BAD):
        numbers = [float(f"{share:.6g}") for share in p.probabilities]
        three = zip(p.classes, p.labels, numbers, strict=True)
        writer.writerow([p.file, *(value for one in three for value in one)])
        shown.append({"file": str(p.file), "classes": p.classes, "indices": p.labels, "probabilities": numbers})
    skipped = {str(FILES[n]): f"reason {n}" for n in sorted(BAD)}
    whole = json.dumps({"predictions": shown, "skipped": skipped}, indent=1) + "\n"
    return text.getvalue().encode(errors="surrogateescape"), whole.encode()


class Stopped(BaseException):
    """What ends a command in the middle."""


def run(
    folder: Path, *, stop: int = BATCHES, together: int = 1, key=KEY, is_same=lambda first, stats: True
) -> tuple[int, str]:
    """Add batches up to `stop`, where it ends if that is not the last; where it began, and the first note."""
    notes = list[str]()
    outputs = [folder / "o.csv", folder / "o.json"]
    begun = 0
    with contextlib.suppress(Stopped), keeping(outputs, key, is_same, notes.append) as kept:
        begun = kept.num_images
        for first in range(begun // BATCH, stop, together):
            kept.add([part(n) for n in range(first, min(first + together, BATCHES))])
        if stop < BATCHES:
            raise Stopped
        kept.finish(outputs, csv_columns(2, **COLUMNS))
    return begun, (*notes, "")[0]


def written(folder: Path) -> tuple[bytes, bytes]:
    assert {path.name for path in folder.iterdir()} == {"o.csv", "o.json"}
    return (folder / "o.csv").read_bytes(), (folder / "o.json").read_bytes()


@pytest.mark.parametrize("together", [1, 3, 100])
def test_files_are_those_of_the_standard_library(tmp_path, together):
    assert run(tmp_path, together=together) == (0, "")
    assert written(tmp_path) == expected()


@pytest.mark.parametrize("name", ["rows.csv", "rows.json", "skipped", "journal"])
@pytest.mark.parametrize("damage", ["torn", "more", "lost", "changed"])
def test_a_killed_one_ends_in_the_same_bytes(tmp_path, name, damage):
    """Whatever of its last batch is there, and with other shares of the batches then."""
    run(tmp_path, stop=5)
    assert not (tmp_path / "o.csv").exists()
    file = tmp_path / ".o.csv.partial" / name
    whole = file.read_bytes()
    content = {"torn": whole[:-3], "more": whole + b'[5, {"x', "lost": b"", "changed": b"?" + whole[1:]}[damage]
    file.write_bytes(content)
    begun, note = run(tmp_path, together=2)
    assert (begun == 5 * BATCH) == (damage == "more")
    assert begun % BATCH == 0
    assert (f"{begun} images were done before" in note) == (begun > 0)
    assert written(tmp_path) == expected()


def test_images_that_have_changed_are_classified_again(tmp_path):
    run(tmp_path, stop=6)
    asked = list[tuple[int, list[str]]]()

    def is_same(first: int, stats: list[str]) -> bool:
        asked.append((first, stats))
        return first != 4 * BATCH

    assert run(tmp_path, is_same=is_same)[0] == 4 * BATCH
    assert asked == [(BATCH * n, [f"{n:016x}"]) for n in range(5)]
    assert written(tmp_path) == expected()


def test_other_arguments_begin_anew_and_say_why(tmp_path):
    run(tmp_path, stop=5)
    begun, note = run(tmp_path, key={"--topk": ("3", "3")})
    assert begun == 0
    assert "begins anew: --topk is 3, there 5" in note
    assert written(tmp_path) == expected()


def test_two_processes_do_not_write_one_file(tmp_path):
    with (
        keeping([tmp_path / "o.csv"], KEY, lambda first, stats: True, str),
        pytest.raises(UserError, match="another process is writing"),
        keeping([tmp_path / "o.csv"], KEY, lambda first, stats: True, str),
    ):
        pass


def test_a_full_disk_costs_nothing_that_is_done(tmp_path, monkeypatch):
    really, calls = module._write, list[int]()

    def write(file, content: bytes) -> None:
        calls.append(1)
        if len(calls) == 10:  # in the middle of a batch's files
            really(file, content[:2])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        really(file, content)

    monkeypatch.setattr(module, "_write", write)
    with pytest.raises(UserError, match=r"No space left on device. Make room") as caught:
        run(tmp_path)
    monkeypatch.undo()
    assert f"{2 * BATCH} images are done and kept in {tmp_path}/.o.csv.partial" in caught.value.__notes__[0]
    assert run(tmp_path)[0] == 2 * BATCH
    assert written(tmp_path) == expected()


def test_what_cannot_lie_beside_its_output_lies_elsewhere(tmp_path):
    """A pipe gets all at the end."""
    os.mkfifo(tmp_path / "o.csv")
    reader = os.open(tmp_path / "o.csv", os.O_RDONLY | os.O_NONBLOCK)
    with keeping([tmp_path / "o.csv"], KEY, lambda first, stats: True, str) as kept:
        for n in range(BATCHES):
            kept.add([part(n)])
        kept.finish([tmp_path / "o.csv"], csv_columns(2, **COLUMNS))
    assert os.read(reader, 1 << 16) == expected()[0]
    os.close(reader)
    assert [path.name for path in tmp_path.iterdir()] == ["o.csv"]


def test_without_predictions_files_are_empty_tables(tmp_path):
    with keeping([tmp_path / "o.csv", tmp_path / "o.json"], KEY, lambda first, stats: True, str) as kept:
        assert isinstance(kept, Kept)
        kept.add([Part(1, 0, {}, [("x", "y")])])
        kept.finish([tmp_path / "o.csv", tmp_path / "o.json"], csv_columns(2, **COLUMNS))
    content = {"predictions": [], "skipped": {"x": "y"}}
    assert written(tmp_path) == (b"file\n", (json.dumps(content, indent=1) + "\n").encode())
