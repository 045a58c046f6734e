"""Large sets on a machine that allows little: few open files, a /dev/shm that an index does not fit into."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from benchmarks.harness.simulated import Options, simulate
from lowrank_vit.data.choose import open_loader
from lowrank_vit.data.decode.backend import LoaderOptions
from lowrank_vit.data.sets.beton import Beton
from lowrank_vit.plan.plans import EvalPlan, TrainPlan
from tests.photos import BACKENDS

FILES = 100
SPARE = 40
"""Descriptors beside those that the process has already: libraries and a loader's own."""


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    """A set of `FILES` files of 4 samples each."""
    return simulate(Options(tmp_path_factory.mktemp("many"), 4 * FILES, FILES, classes=10))


@pytest.fixture
def few_descriptors():
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    highest = max(int(link.name) for link in Path("/proc/self/fd").iterdir())
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + SPARE, limits[1]))
    with ExitStack() as taken:  # numbers that are free below the highest
        for number in range(highest):
            if not Path(f"/proc/self/fd/{number}").exists():
                taken.callback(os.close, os.dup(0))
        yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("kind", BACKENDS)
@pytest.mark.usefixtures("few_descriptors")
def test_a_set_of_more_files_than_may_be_open_is_read_in_full(path, kind):
    beton = Beton(path)
    assert len(beton.parts) == FILES > SPARE
    for of in (TrainPlan.of, EvalPlan.of):
        plan = of(beton, img_size=16, batch_size=8)
        with closing(open_loader(beton, plan, "cpu", LoaderOptions(kind, 2))[0]) as loader:
            ids = [i for batch in loader.batches(0) for i in batch.plan.ids.tolist()]
        assert sorted(ids) == list(range(4 * FILES))
    with ExitStack() as stack, pytest.raises(OSError, match="Too many open files"):
        _ = [stack.enter_context(part.open("rb")) for part in beton.parts]


OPENS = """
import sys, tempfile
from pathlib import Path
from lowrank_vit.data.sets import published
from lowrank_vit.data.sets.beton import Beton
published.PUBLISHED_FROM = 1
assert tempfile.gettempdir() == "/dev/shm"
beton = Beton(sys.argv[1])
print([len(beton.sample(i)) for i in range(beton.num_samples)] == beton.sizes.tolist())
print(beton._index.why_private)
print([entry.name for entry in Path("/dev/shm").iterdir()])
"""
MOUNTS = 'mount -t tmpfs -o size=16k tmpfs /dev/shm && mount --bind "$1" "$1" && mount -o remount,ro,bind "$1"'


def test_a_shm_that_is_too_small_leaves_each_process_its_own_index(path):
    """A /dev/shm of four pages and a folder that is not writable, in a name space where they are mounted for real."""
    start = ["unshare", "-rm", "sh", "-c"]
    if subprocess.run([*start, MOUNTS, "sh", str(path.parent)], capture_output=True, check=False).returncode:
        pytest.skip("no mounts of one's own here")
    script = f'{MOUNTS} && export TMPDIR=/dev/shm && exec "$2" -c "$3" "$1/{path.name}"'
    words = [*start, script, "sh", str(path.parent), sys.executable, OPENS]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    is_read, why, left = done.stdout.splitlines()
    assert is_read == "True"
    assert "Read-only file system" in why
    assert "/dev/shm: No space left on device" in why
    assert left == "[]"
    assert not [file for file in Path(path.parent).iterdir() if ".index" in file.name]
