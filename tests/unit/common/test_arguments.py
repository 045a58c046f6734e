"""An argument that a function does not take is told by its name, with what it takes and what it got."""

from __future__ import annotations

import math

import numpy as np
import pytest

from lowrank_vit.common.arguments import (
    ABOVE_0,
    POSITIVE,
    SHARE,
    Range,
    check_ascending,
    check_choice,
    check_number,
    check_numbers,
    check_type,
    check_whole,
)
from lowrank_vit.common.errors import UserError


@pytest.mark.parametrize("value", [0, -1, 2.0, 2.5, "8", None, True, math.nan, (8,), np.float32(3)])
def test_what_is_no_whole_number_of_the_range_is_refused(value):
    with pytest.raises(UserError, match=r"^steps takes a whole number of at least 1, not ") as raised:
        check_whole(POSITIVE, others=1, steps=value)
    assert repr(value) in str(raised.value)


@pytest.mark.parametrize("value", [-0.1, 1.1, "0.5", None, False, math.nan, math.inf, (0.5, 0.5), np.float64(2)])
def test_what_is_no_number_of_the_range_is_refused(value):
    with pytest.raises(UserError, match=r"^chance takes a number from 0 to 1, not "):
        check_number(SHARE, chance=value)


@pytest.mark.parametrize("value", [(0.5, 0), (1,), (1, 2, 3), 3, None, "12", (1, "2"), (1, math.inf), (True, 1)])
def test_what_is_no_pair_of_the_range_is_refused(value):
    with pytest.raises(UserError, match=r"^ratio takes 2 numbers, each above 0, not "):
        check_ascending(ABOVE_0, ratio=value)
    with pytest.raises(UserError, match=r"^ratio takes the smaller number first, not \(2, 1\)"):
        check_ascending(ABOVE_0, ratio=(2, 1))


@pytest.mark.parametrize("value", ["", "CONST", None, 0, ["const"]])
def test_what_is_no_choice_is_refused(value):
    with pytest.raises(UserError, match=r"^mode takes one of 'const', 'rand', not "):
        check_choice(("const", "rand"), mode=value)


def test_a_long_value_is_shown_in_part():
    with pytest.raises(UserError, match=r"^name takes a text, not \[0, 1, .*\.\.\.\.$") as raised:
        check_type(str, "a text", name=list(range(10_000)))
    assert len(str(raised.value)) < 150


def test_what_is_in_range_is_taken_in_numpys_types_too():
    check_whole(Range(0, 3), a=0, b=3, c=np.int64(2), d=np.uint8(1))
    check_number(SHARE, a=0, b=1.0, c=np.float32(0.5))
    check_numbers(Range(), 3, a=(-1, 0, 2.5), b=[np.float64(1), 2, 3])
    check_ascending(ABOVE_0, a=(1, 1), b=[0.5, 2])
    check_choice((True, False), a=True)
