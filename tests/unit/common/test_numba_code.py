"""A function that numba has yet to compile is known before it is called; its threads never keep a process alive."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lowrank_vit.augment import ops_cpu
from lowrank_vit.augment.__main__ import main
from lowrank_vit.common import numba_code as compiled

SOURCE = """
from numba import njit

@njit(cache=True)
def twice(x):
    return 2 * x
"""


def test_it_must_compile_until_it_was_called_and_again_when_its_source_changed(tmp_path: Path):
    path = tmp_path / "a_module.py"
    path.write_text(SOURCE)
    spec = importlib.util.spec_from_file_location("a_module", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert compiled.must_compile(module.twice)
    assert module.twice(2) == 4
    assert not compiled.must_compile(module.twice)
    later = path.stat().st_mtime + 100
    os.utime(path, (later, later))
    assert compiled.must_compile(module.twice)


@pytest.mark.parametrize("is_new", [True, False])
def test_the_preview_says_so(is_new, tmp_path, monkeypatch, capsys, sketched):
    asked = []
    monkeypatch.setattr(
        "lowrank_vit.report.augment_preview.must_compile", lambda *functions: asked.append(functions) or is_new
    )
    main(["--preview", str(tmp_path / "a.png"), "--img-size", "32", "-b", "4"])
    assert asked == [(ops_cpu.apply_ops,)]
    assert (compiled.NOTE in capsys.readouterr().out) is is_new


def test_a_process_on_one_core_ends_after_the_thread_that_has_started_numbas(tmp_path: Path):
    code = """
import os, threading
os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])
from lowrank_vit.common.numba_code import use_threads
import numba
threads = [threading.Thread(target=use_threads, args=[1000]) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(use_threads(1000) == numba.get_num_threads() == numba.config.NUMBA_NUM_THREADS)
"""
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, check=True, timeout=300, stdout=subprocess.PIPE, text=True)
    assert ended.stdout == "True\n"
