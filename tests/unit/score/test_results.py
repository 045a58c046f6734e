"""What is written of scores: a row for each class, and the intervals of shares."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from lowrank_vit.score.confusions import Confusions
from lowrank_vit.score.evaluate import Scores
from lowrank_vit.score.results import class_rows, interval, rows_to_csv, with_suffix_of


def test_a_class_without_samples_has_no_share():
    scores = Scores(2, 0.0, 100.0, 100.0, Confusions(2, np.array([0]), np.array([2]), np.array([2, 0])))
    rows = class_rows(scores, ["a", "b"])
    assert (rows[0]["top1"], rows[1]["top1"], rows[1]["taken_for"]) == (100.0, None, "")
    assert rows_to_csv(rows).splitlines()[2] == "1,b,0,,,,0"


@pytest.mark.parametrize(("hits", "total"), [(0, 10), (10, 10), (7, 10), (41_000, 50_000)])
def test_intervals_are_wilsons(hits, total):
    """The closed form, with z = 1.96."""
    z, share = 1.959963984540054, hits / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * (share * (1 - share) / total + z * z / (4 * total * total)) ** 0.5
    assert interval(100 * share, total) == pytest.approx((100 * (middle - half), 100 * (middle + half)), abs=1e-9)


def test_a_results_file_gets_a_suffix():
    assert with_suffix_of(Path("a/b.csv"), "json") == Path("a/b.csv")
    assert with_suffix_of(Path("a/vit.augreg"), "json") == Path("a/vit.augreg.json")
