"""A run with --global-batch-size that goes on with more or fewer ranks: the same samples, the same losses."""

from __future__ import annotations

import numpy as np
import pytest

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.training.trainer import Trainer
from tests.forked import Forked
from tests.runs import losses, records, stop_after

UPDATES = 11
"""An epoch's, of 120 of 1,437 images each."""
RECIPE = """
--global-batch-size 120 -b 40 --epochs 2 --log-interval 1 --mixup 0.8 --cutmix 1 --reprob 0.25
--aa rand-m9-mstd0.5-inc1 --drop-path 0 --no-spec-monitor
""".split()

RANKS = """
import os, sys
from lowrank_vit import train
from lowrank_vit.training.trainer import Trainer
from tests.forked import Forked
from tests.runs import stop_after
from tests.waiting import free_port
made = Trainer.__init__
def make(trainer, *args):
    made(trainer, *args)
    plan = trainer.setup.plan
    print(f"{plan.batch_size} x {plan.world_size} x {plan.accum_steps}", flush=True)
    stop_after(trainer, stop)
Trainer.__init__ = make
stop = 0
for size, stop in ((4, 4), (3, 11), (2, 17)):
    port = free_port()
    children = []
    for rank in range(size):
        if not (pid := os.fork()):
            place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "MASTER_PORT": port}
            os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
            code = 1
            try:
                train.main(argv)
                code = 0
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(pid)
    codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in children]
    assert codes == [0] * size, codes
"""


def test_a_run_of_one_process_goes_on_with_four_three_two_and_one(small, tmp_path):
    whole = Trainer(parse(small(*RECIPE, "-b", "120")), "whole").run().run_dir
    last = tmp_path / "e" / "last.pth.tar"
    first = Trainer(parse(small(*RECIPE, "--experiment", "e")), "e")
    stop_after(first, 2)
    first.run()
    argv = small(*RECIPE, "--experiment", "e", "--resume", str(last))
    ranks = Forked(exec, RANKS, {"argv": argv})
    out, err = ranks.communicate(timeout=500)
    assert ranks.returncode == 0, err
    for size, batches in ((4, "30 x 4 x 1"), (3, "40 x 3 x 1"), (2, "30 x 2 x 2")):
        assert out.count(batches) == size
    assert "batch 120 (30 x 2 ranks x 2 accumulation steps)" in out
    assert out.count("peak learning rate") == 3
    again = Trainer(parse(argv), "e")
    assert (again.setup.plan.batch_size, again.setup.plan.accum_steps) == (40, 3)
    again.run()
    found, expected = losses(last.parent), losses(whole)
    assert list(found) == list(expected) == list(range(1, 2 * UPDATES + 1))
    np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=2e-4)
    for kind, name in (("train", "lr"), ("train", "grad_norm"), ("eval", "eval_loss")):
        values = [[record[name] for record in records(run, kind)] for run in (last.parent, whole)]
        np.testing.assert_allclose(*values, rtol=5e-4)


def test_a_run_may_take_the_global_batch_up_and_leave_it_again(small):
    flags = ["--warmup-epochs", "0", "--lr-base", "0.1"]
    first = Trainer(parse(small(*flags, "-b", "64", "--grad-accum-steps", "2")), "x")
    stop_after(first, 1)
    last = str(first.run().run_dir / "last.pth.tar")
    with pytest.raises(UserError, match=r"global batch was 128, now it is 64\. .*--global-batch-size keeps that"):
        Trainer(parse(small(*flags, "-b", "64", "--resume", last)), "x")
    second = Trainer(parse(small(*flags, "-b", "50", "--global-batch-size", "128", "--resume", last)), "x")
    assert (second.setup.plan.batch_size, second.setup.plan.accum_steps) == (32, 4)
    assert second.setup.step.lr == first.setup.step.lr


def test_more_images_an_update_than_there_are_is_refused(small):
    with pytest.raises(UserError, match="--global-batch-size 1500 is larger than the training set of 1437 samples"):
        Trainer(parse(small("--global-batch-size", "1500")), "x")
