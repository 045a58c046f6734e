"""The table on a terminal."""

from __future__ import annotations

import io

import pytest
import torch
from rich.console import Console

from lowrank_vit.lowrank.curve import Point, SampleScores
from lowrank_vit.lowrank.results import Result, print_points


@pytest.mark.parametrize(("samples", "shown"), [(1, "100.00 +0.00 0.2000 +0.1000"), (2, "100.00 +0.00±0.00 0.2000")])
def test_a_single_sample_has_no_error(samples: int, shown: str):
    hits_N, losses_N = torch.ones(samples, dtype=torch.bool), torch.full((samples,), 0.1, dtype=torch.float64)
    result = Result(SampleScores(losses_N, hits_N), {"params": 100, "flops": 100}, [])
    made = Point("kfac", "greedy", 0.5, {}, 50, 50, 0.1, {}, scores=SampleScores(2 * losses_N, hits_N))
    text = io.StringIO()
    print_points(result, [made], Console(file=text, width=80))
    assert shown in " ".join(text.getvalue().split())
    assert "nan" not in text.getvalue()
