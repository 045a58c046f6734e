"""Tables of a run for other programs: every number, in CSV and Parquet, and what is said where that cannot be."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.report.__main__ import main
from lowrank_vit.report.export import export_run
from lowrank_vit.spectral.watching.files import StoredScalars, write_scalars
from lowrank_vit.spectral.watching.stored import open_spectra
from tests.hidden_packages import hidden_packages
from tests.reported import fill

NAME = "blocks.1.mlp.fc1"
LONG = 0.1 + 0.2
"""A number with seventeen digits."""


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Refreshes at 0, 10 and 20 as lines of an older version, and one at 30 with a metric of its own in the store."""
    run = tmp_path / "a run"
    run.mkdir()
    fill(run)
    with (run / "metrics.jsonl").open("a") as file:
        for update in (10, 20):
            flow = {"kind": "flow", "update": update, "epoch": 0, "spec/flow/blocks.0/entropy": LONG}
            file.write(json.dumps(flow) + "\n")
    values = {f"spec/{NAME}/sigma_max": LONG, f"spec/{NAME}/rank90": float("nan"), "spec/type/a,b/new": 1e-300}
    write_scalars(run / "spectra", StoredScalars.of(30, values))
    return run


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_csv_files_have_every_number_with_all_digits(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    before = sorted(run.rglob("*"))
    main([str(run), "--export", "csv", str(tmp_path / "new" / "tables")])
    assert sorted(run.rglob("*")) == before
    found = {path.name: rows(path) for path in (tmp_path / "new" / "tables").iterdir()}
    assert set(found) == {"epochs.csv", "train.csv", "flows.csv", "scalars.csv", "singular_values.csv"}
    assert "scalars.csv" in capsys.readouterr().out
    assert [row["update"] for row in found["train.csv"]] == [f"{update:.1f}" for update in range(1, 31)]
    assert [float(row["spec/flow/blocks.0/entropy"]) for row in found["flows.csv"]] == [LONG, LONG]
    assert "kind" not in found["flows.csv"][0]
    of_one = {row["update"]: row for row in found["scalars.csv"] if (row["name"], row["ema"]) == (NAME, "False")}
    assert [float(row["sigma_max"]) for row in of_one.values()] == [1, 2, 3, LONG]
    assert (of_one["30"]["rank90"], of_one["30"]["sv1"], of_one["0"]["new"]) == ("", "", "")
    assert [row["new"] for row in found["scalars.csv"] if row["name"] == "type/a,b"] == ["1e-300"]
    s = open_spectra(run).values(NAME, 20, ema=True)
    (last,) = (r for r in found["singular_values.csv"] if (r["update"], r["ema"], r["name"]) == ("20", "True", NAME))
    np.testing.assert_array_equal([float(last[f"s{k + 1}"]) for k in range(s.size)], s)


def test_parquet_has_the_same_in_columns_with_types(run: Path, tmp_path: Path) -> None:
    parquet = pytest.importorskip("pyarrow.parquet")
    export_run(run, "csv", tmp_path)
    for path in export_run(run, "parquet", tmp_path):
        table = parquet.read_table(path)
        types = {name: str(table.schema.field(name).type) for name in table.column_names}
        plain = rows(path.with_suffix(".csv"))
        assert list(types) == list(plain[0])
        assert table.num_rows == len(plain)
        if path.stem in ("scalars", "singular_values"):
            assert [types.pop(name) for name in ("update", "ema", "name")] == ["int64", "bool", "string"]
        assert set(types.values()) <= {"double", "int64"}
        for row, expected in zip(table.to_pylist(), plain, strict=True):
            assert {k: "" if v is None else v for k, v in row.items()} == {
                k: v if isinstance(row[k], str) or not v else v == "True" if isinstance(row[k], bool) else float(v)
                for k, v in expected.items()
            }


def test_without_pyarrow_it_is_said_what_to_do(run: Path, tmp_path: Path) -> None:
    said = r"--export parquet needs the package pyarrow, .*`pip install 'lowrank-vit\[tables\]'`, or use csv"
    with hidden_packages("pyarrow"), pytest.raises(UserError, match=said):
        export_run(run, "parquet", tmp_path / "tables")
    assert not (tmp_path / "tables").exists()


@pytest.mark.parametrize("part", ["metrics.jsonl", "summary.csv", "spectra"])
def test_what_a_run_does_not_have_is_left_out(run: Path, tmp_path: Path, part: str) -> None:
    (run / part).rename(tmp_path / "away")
    lacking = {
        "metrics.jsonl": {"train", "flows"},
        "summary.csv": {"epochs"},
        "spectra": {"singular_values"},  # the numbers of older refreshes are in the log
    }
    written = {path.stem for path in export_run(run, "csv", tmp_path / "tables")}
    assert written == {"epochs", "train", "flows", "scalars", "singular_values"} - lacking[part]


def test_damaged_files_are_passed_over(run: Path, tmp_path: Path) -> None:
    for name in ("scalars_00000030.npz", "update_00000010.npz"):
        (run / "spectra" / name).write_bytes(b"PK damaged")
    export_run(run, "csv", tmp_path)
    assert {row["update"] for row in rows(tmp_path / "scalars.csv")} == {"0", "10", "20"}
    assert {row["update"] for row in rows(tmp_path / "singular_values.csv")} == {"0", "20"}


def test_what_cannot_be_is_told(run: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file is a file, but tables are written into a folder"):
        export_run(run, "csv", tmp_path / "file")
    with pytest.raises(UserError, match=r"file/x/epochs\.csv cannot be written: Not a directory"):
        export_run(run, "csv", tmp_path / "file" / "x")
    with pytest.raises(UserError, match="holds no numbers of a run"):
        export_run(tmp_path, "csv", tmp_path / "tables")
    for words in (("xml", "tables"), ("tables", "csv")):
        with pytest.raises(UserError, match="--export takes csv or parquet, and a folder, not"):
            main([str(run), "--export", *words])
    with pytest.raises(UserError, match=r"^--export takes csv\|parquet DIR, not only `csv`\.$"):
        main([str(run), "--export", "csv"])
    with pytest.raises(UserError, match="--export only writes tables"):
        main([str(run), "--export", "csv", str(tmp_path), "--watch"])
