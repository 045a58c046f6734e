"""Compiled code is kept where the user says, and found again by the next process."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.config.options import Config
from lowrank_vit.model.low_rank import LowRankLinear
from lowrank_vit.training import setup
from lowrank_vit.training.setup import _with_full_every, keep_compiled_code, set_float32_policy

CODE = """
import sys, torch
from pathlib import Path
from lowrank_vit.training.setup import keep_compiled_code
keep_compiled_code(Path(sys.argv[1]))
model = torch.nn.Linear(8, 8)
torch.compile(lambda x: model(x).relu().sum())(torch.ones(4, 8)).backward()
counters = torch._dynamo.utils.counters
print(counters["inductor"]["fxgraph_cache_hit"] + counters["aot_autograd"]["autograd_cache_hit"])
"""


@pytest.mark.slow
def test_a_second_start_finds_the_first_ones_code(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != "TORCHINDUCTOR_CACHE_DIR"}
    hits = []
    for _ in range(2):
        command = [sys.executable, "-c", CODE, str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
        hits.append(int(done.stdout))
    assert hits[0] == 0
    assert hits[1] > 0
    assert list((tmp_path / "cache").iterdir())


def test_where_it_is_kept(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert keep_compiled_code(None) == tmp_path / "xdg" / "lowrank-vit"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", f"{tempfile.gettempdir()}/torchinductor_me")  # torch's own doing
    assert keep_compiled_code(None) == tmp_path / "xdg" / "lowrank-vit"
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path / "own"))
    assert keep_compiled_code(None) == tmp_path / "own"  # the user's
    assert keep_compiled_code(tmp_path / "flag") == tmp_path / "flag"
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == str(tmp_path / "flag")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"file/x, the folder for compiled code.*--compile-cache"):
        keep_compiled_code(tmp_path / "file" / "x")


def test_float32_policy_is_for_cuda_alone():
    before = torch.get_float32_matmul_precision()
    set_float32_policy(torch.device("cpu"), tf32=True)
    assert torch.get_float32_matmul_precision() == before


def test_code_for_a_cpu_is_compiled_for_a_cpu_alone(monkeypatch, on_cuda_path):
    monkeypatch.setattr(setup, "must_compile", lambda *functions: True)
    assert setup._must_compile(Config(), "resident", torch.device("cpu"))
    with on_cuda_path():
        assert not setup._must_compile(Config(), "resident", torch.device("cpu"))


@pytest.mark.parametrize("tf32", [True, False])
def test_float32_policy_is_explicit(on_cuda_path, tf32):
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark
    try:
        with on_cuda_path():
            set_float32_policy(torch.device("cpu"), tf32=tf32)
        assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest")
        assert torch.backends.cudnn.allow_tf32 == tf32
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = before[1:]


@pytest.mark.parametrize(
    ("flags", "rank", "expected"), [("", 0, 2), ("", 8, 1), ("", 9, 2), ("--spec-full-every 4", 8, 4)]
)
def test_whole_refreshes_alone_where_no_matrix_has_a_value_behind_the_block(flags, rank, expected):
    layer = LowRankLinear(torch.randn(192, rank), torch.randn(rank, 64)) if rank else torch.nn.Linear(64, 192)
    model = torch.nn.ModuleDict({"qkv": layer})
    config = parse(["--spec-monitor", "--spec-targets", "qkv", "--device", "cpu", *flags.split()])
    assert _with_full_every(config, model, torch.device("cpu")).spectra.spec_full_every == expected
