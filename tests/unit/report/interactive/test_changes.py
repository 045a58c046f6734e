"""What is said of a change holds for each block that is named, and of every block something is said."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lowrank_vit.report.interactive.changes import blocks_of, change_in_words, plain
from lowrank_vit.report.language import in_language

_FACTORS = st.one_of(st.sampled_from([0.01, 0.37, 0.5, 0.951, 0.96, 1.0, 1.049, 1.051, 2.9, 3.0, 150.0]),
                     st.floats(-4, 4).map(lambda power: 10.0**power))  # fmt: skip
_PROFILES = st.one_of(
    st.lists(_FACTORS, min_size=1, max_size=24),
    st.lists(st.tuples(_FACTORS, st.integers(1, 6)), min_size=1, max_size=4).map(
        lambda runs: [factor for factor, count in runs for _ in range(count)]
    ),
)
_CLAUSE = re.compile(
    r"(?P<what>grew|fell to) (?P<by>[\d.,-]+) (?:times|%)(?: in (?P<where>all \d+ blocks|blocks? [\d, -]+))? "
    r"\((?:mean )?(?P<before>[\d.,]+) → (?P<after>[\d.,]+)\)"
    r"(?:, most in blocks? (?P<most>[\d, -]+) \((?P<most_by>[\d.,-]+) (?:times|%)\))?"
)
_STILL = re.compile(r"changed by less than 5 % in (?P<where>the other \d+|blocks? [\d, -]+)$")


def words(factors: list[float], first: list[float] | None = None) -> str:
    names = [f"blocks.{i}.attn.proj" for i in range(len(factors))]
    first_N = np.array(first or [1.0] * len(factors))
    return change_in_words(names, first_N, first_N * np.array(factors))[0]


def numbered(text: str | None, count: int) -> list[int]:
    if text is None or text.startswith("all"):
        return list(range(count))
    ends = [one.split("-") for one in re.findall(r"\d+-\d+|\d+", text)]
    return [i for one in ends for i in range(int(one[0]), int(one[-1]) + 1)]


def ends_of(text: str) -> tuple[float, float]:
    ends = [float(one.replace(",", "")) for one in text.split("-")]
    return ends[0], ends[-1]


@settings(max_examples=300, deadline=None)
@given(_PROFILES, st.data())
def test_each_claim_holds_in_each_block_it_names_and_no_block_is_left_out(
    factors: list[float], data: st.DataObject
) -> None:
    starts = data.draw(st.lists(st.sampled_from([0.01, 1.0, 40.0]), min_size=len(factors), max_size=len(factors)))
    said, first, ratios = words(factors, starts), np.array(starts), np.array(factors)
    told: list[int] = []
    left = said
    for found in _CLAUSE.finditer(said):
        at = numbered(found["where"], len(factors))
        told += at
        has_grown = found["what"] == "grew"
        of = ratios[at] if has_grown else 100 * ratios[at]
        np.testing.assert_allclose(ends_of(found["by"]), (of.min(), of.max()), rtol=6e-3)
        assert all(ratios[at] >= 1.05 * (1 - 1e-9) if has_grown else ratios[at] <= (1 + 1e-9) / 1.05)
        means = [float(found[name].replace(",", "")) for name in ("before", "after")]
        np.testing.assert_allclose(means, [first[at].mean(), (first * ratios)[at].mean()], rtol=6e-3)
        if found["most"]:
            most = numbered(found["most"], len(factors))
            others = sorted(set(at) - set(most))
            size = np.abs(np.log(ratios))
            assert set(most) < set(at)
            assert size[most].min() > size[others].max()
            of = ratios[most] if has_grown else 100 * ratios[most]
            np.testing.assert_allclose(ends_of(found["most_by"]), (of.min(), of.max()), rtol=6e-3)
        left = left.replace(found[0], "")
    still = sorted(set(range(len(factors))) - set(told))
    assert len(told) == len(set(told))
    assert all(ratios[i] * (1 + 1e-9) >= 1 / 1.05 and ratios[i] <= 1.05 * (1 + 1e-9) for i in still)
    if found := _STILL.search(said):
        where = found["where"]
        assert where == f"the other {len(still)}" or numbered(where, len(factors)) == still
        left = left.replace(found[0], "")
    assert bool(found) == bool(said and still)
    assert left in ("", ", and ", ", , and ")
    assert "e+" not in said


@pytest.mark.parametrize(
    ("factors", "said"),
    [
        ([2.7] * 6 + [0.37] * 6,
         "fell to 37 % in blocks 6-11 (mean 1 → 0.37), and grew 2.7 times in blocks 0-5 (mean 1 → 2.7)"),
        ([1.0] * 5 + [10.0] + [1.0] * 6,
         "grew 10 times in block 5 (1 → 10), and changed by less than 5 % in the other 11"),
        ([3.0] * 3 + [1.0] * 6 + [2.9] * 3,
         "grew 2.9-3 times in blocks 0-2, 9-11 (mean 1 → 2.95), and changed by less than 5 % in the other 6"),
        ([150.0] * 12, "grew 150 times in all 12 blocks (mean 1 → 150)"),
        ([0.94] * 12, "fell to 94 % in all 12 blocks (mean 1 → 0.94)"),
        (list(np.linspace(1.5, 2.2, 12)),
         "grew 1.5-2.2 times in all 12 blocks (mean 1 → 1.85), most in block 11 (2.2 times)"),
        ([1.1] * 9 + [4.4] * 3,
         "grew 1.1-4.4 times in all 12 blocks (mean 1 → 1.93), most in blocks 9-11 (4.4 times)"),
        ([3.1], "grew 3.1 times (1 → 3.1)"),
        ([1.0, 1.04], ""),
    ],
)  # fmt: skip
def test_planted_changes_are_told_as_they_are(factors: list[float], said: str) -> None:
    assert words(factors) == said


def test_means_are_of_the_blocks_that_are_named() -> None:
    assert words([3.0] * 3 + [1.0] * 9, [0.01] * 3 + [1.0] * 9).startswith(
        "grew 3 times in blocks 0-2 (mean 0.01 → 0.03), "
    )


def test_of_a_type_with_matrices_that_are_not_known_no_more_is_said_than_of_the_others() -> None:
    names = [f"blocks.{i}.mlp.fc1" for i in (0, 1, 3, 4)]
    ones = np.ones(4)
    assert change_in_words(names, ones, 2 * ones, is_all=False)[0] == "grew 2 times in blocks 0-1, 3-4 (mean 1 → 2)"
    said, _ = change_in_words(names, ones, np.array([2.0, 1, 1, 1]), is_all=False)
    assert said == "grew 2 times in block 0 (1 → 2), and changed by less than 5 % in blocks 1, 3-4"


def test_blocks_of_stages_and_matrices_without_numbers_are_named() -> None:
    stages = [f"layers.{stage}.blocks.{block}.attn.qkv" for stage, block in ((0, 0), (0, 1), (2, 0), (2, 3), (2, 4))]
    assert blocks_of(stages) == "blocks 0.0-0.1, 2.0, 2.3-2.4"
    assert blocks_of(["head", "stem.proj"]) == "head, stem.proj"
    with in_language("zh"):
        assert blocks_of(["blocks.0.fc", "blocks.2.fc", "blocks.3.fc"]) == "第 0、2-3 块"


def test_a_number_has_three_digits_and_no_exponent() -> None:
    shown = {150.2: "150", 1e-5: "0.00001", 999.6: "1,000", 1234567.0: "1,234,567", 2.0: "2", 0.36789: "0.368"}
    assert {value: plain(value) for value in shown} == shown
