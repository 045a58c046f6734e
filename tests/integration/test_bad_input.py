"""Every wrong input is one paragraph that names the thing and the next step, and leaves nothing half-written."""

from __future__ import annotations

import shutil

import pytest
import torch

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.training.trainer import Trainer


def refused(argv: list[str]) -> str:
    """The message with which training these arguments is refused; it is one paragraph."""
    with pytest.raises(UserError) as caught:
        Trainer(parse(argv), "x")
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def data(digits_dir, tmp_path):
    """A copy of the digits that a test may spoil."""
    return shutil.copytree(digits_dir, tmp_path / "data")


def test_wrong_paths(small, tmp_path):
    message = refused([*small(), "--dataset", "", "--data-dir", str(tmp_path / "no")])
    assert "neither train.beton nor a folder of images" in message
    assert "python -m data_prep" in message
    assert "does not exist" in refused(small("--resume", str(tmp_path / "no.pth.tar")))
    assert "does not exist" in refused(small("--initial-checkpoint", str(tmp_path / "no.pth.tar")))


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda content: content[:-1000], "cut short or damaged"),
        (lambda content: content[:1000], "holds 2 fields in 1000 bytes"),
        (lambda content: content[:10], "too few for a .beton header"),
        (lambda content: b"", "too few for a .beton header"),
        (lambda content: b"PK\x03\x04" + content[4:], "not an FFCV .beton file"),
        (lambda content: content[:16] + bytes(8) + content[24:], "unfinished"),
        (lambda content: content[:3000] + bytes(3000) + content[6000:], "damaged"),
    ],
)
def test_damaged_beton(small, data, spoil, said):
    path = data / "train.beton"
    path.write_bytes(spoil(path.read_bytes()))
    message = refused([*small(), "--dataset", "", "--data-dir", str(data)])
    assert said in message
    assert "train.beton" in message


def test_counts_that_do_not_fit(small):
    assert "--num-classes 5 is too small" in refused(small("--num-classes", "5"))
    assert "larger than the training set of 1437" in refused(small("--batch-size", "2000"))
    assert "Use --batch-size 718 or less" in refused(small("--batch-size", "800", "--grad-accum-steps", "2"))
    assert "fewer --grad-accum-steps than 2000" in refused(small("--batch-size", "1", "--grad-accum-steps", "2000"))


def test_names_that_do_not_exist(small):
    assert "Did you mean vit_tiny_patch16_224" in refused(small("--model", "vit_tiny_patch16_24"))
    assert "Did you mean adamw" in refused(small("--opt", "adamww"))
    assert "takes NAME=VALUE" in refused(small("--model-kwargs", "depth"))
    assert "cannot be built" in refused(small("--model-kwargs", "dpeth=3"))


def test_checkpoint_of_another_model(small, train, tmp_path):
    train("--experiment", "a", "--epochs", "1", "--warmup-epochs", "0", "--no-spec-monitor")
    last = str(tmp_path / "a" / "last.pth.tar")
    message = refused(small("--initial-checkpoint", last, "--model-kwargs", "depth=1", "embed_dim=24", "num_heads=2"))
    assert "does not fit --model vit_tiny_patch16_224" in message
    assert "another shape" in message
    assert "--num-classes 12 is too large" in refused(small("--initial-checkpoint", last, "--num-classes", "12"))
    message = refused(
        small(
            *("--initial-checkpoint", last, "--model-kwargs", "depth=1", "embed_dim=24", "num_heads=2"),
            *("--num-classes", "12", "--larger-head"),
        )
    )
    assert "another shape" in message
    assert "--opt was adamw, now sgd" in refused(small("--resume", last, "--opt", "sgd"))


def test_files_that_are_no_checkpoint(small, tmp_path):
    path = tmp_path / "x.pth.tar"
    path.write_text("not a checkpoint")
    assert "cannot be read" in refused(small("--resume", str(path)))
    torch.save({"epoch": 3}, path)
    assert "has no `state_dict`" in refused(small("--resume", str(path)))
    torch.save({"model": {"w": torch.zeros(1)}, "optimizer": {}, "epoch": 3}, path)  # as DeiT saves it
    assert "cannot be resumed: it lacks `progress`" in refused(small("--resume", str(path)))
    torch.save({"state_dict": {"w": torch.zeros(1)}, "args": parse([])}, path)  # a class: code could run
    assert "cannot be read" in refused(small("--resume", str(path)))


def test_output_directory_in_use(small, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    message = refused(small("--experiment", "mine"))
    assert "mine is in use: thesis.txt is not a run's file" in message
    assert "--experiment" in message
    first = Trainer(parse(small("--experiment", "run")), "x")
    assert "is in use" in refused(small("--experiment", "run"))
    first.run_dir.close()
    (tmp_path / "file").write_text("")
    assert "cannot be made" in refused([*small(), "--output", str(tmp_path / "file")])


def test_a_refused_run_leaves_no_directory(small, tmp_path):
    refused(small("--experiment", "never", "--batch-size", "2000"))
    assert not (tmp_path / "never").exists()


def test_missing_cuda(small):
    if torch.cuda.is_available():
        pytest.skip("there is a CUDA device")
    assert "torch sees no CUDA device" in refused(small("--device", "cuda"))


def test_spectral_targets_that_match_nothing(small):
    message = refused(small("--spec-targets", "attn.qvk"))
    assert "attn.qvk" in message
    assert "attn.qkv" in message
