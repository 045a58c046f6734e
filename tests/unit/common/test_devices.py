"""Which device a flag means, alone and as one of several processes."""

from __future__ import annotations

import warnings

import pytest
import torch

from lowrank_vit.common.devices import has_cuda, pick_device, why_on_cpu
from lowrank_vit.common.errors import UserError


@pytest.mark.parametrize(
    ("name", "local_rank", "index"), [("cuda", None, 0), ("cuda:1", None, 1), ("cuda:1", "2", 2), ("cuda", "3", 3)]
)
def test_which_gpu(name, local_rank, index, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    if local_rank:
        monkeypatch.setenv("LOCAL_RANK", local_rank)
    assert pick_device(name, int(local_rank or 0)) == torch.device("cuda", index)
    with (
        pytest.raises(UserError, match="--device cuda:7: there is no GPU left, torch sees 4")
        if not local_rank
        else (pytest.raises(UserError, match="process 8 of this machine has no GPU left"))
    ):
        pick_device("cuda:7", 7 if local_rank else 0)


@pytest.mark.parametrize("name", ["cpu", "cpu:0", "cuda", "cuda:3"])
def test_a_device_is_given_back_as_it_is_where_it_is_there(name, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setenv("LOCAL_RANK", "1")
    device = torch.device(name)
    assert pick_device(device) == device
    with pytest.raises(UserError, match=r"device=cuda:7: there is no GPU left, torch sees 4\. Give a smaller number"):
        pick_device(torch.device("cuda", 7), shown="device=")
    with pytest.raises(UserError, match=r"^device takes auto, cpu, cuda or cuda:N, not `meta`"):
        pick_device(torch.device("meta"), shown="device=")


def test_a_run_that_goes_a_gpus_way_needs_no_note(monkeypatch, on_cuda_path):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert why_on_cpu("auto", torch.device("cpu")).startswith("note: on the CPU, since CUDA_VISIBLE_DEVICES")
    with on_cuda_path():
        assert why_on_cpu("auto", torch.device("cpu")) == ""


@pytest.mark.parametrize("name", ["tpu", "cuda:x", "cuda:-1", "cpu:0"])
def test_devices_that_are_not_known(name):
    with pytest.raises(UserError, match=f"--device takes .*, not `{name}`"):
        pick_device(name)


OLD_DRIVER = (
    "The NVIDIA driver on your system is too old (found version 12020). Please update your GPU driver by downloading "
    "and installing a new version from the URL: http://www.nvidia.com/Download/index.aspx Alternatively, go to: "
    "https://pytorch.org to install a PyTorch version that has been compiled with your version of the CUDA driver."
)
WITHOUT_GPU = {
    "old driver": (None, OLD_DRIVER, r"the NVIDIA driver is too old for this torch: it knows CUDA 12\.2, torch needs"),
    "empty": ("", "Found no NVIDIA driver on your system.", r'CUDA_VISIBLE_DEVICES is "", which hides every GPU'),
    "minus one": ("-1", "No CUDA GPUs are available", r'CUDA_VISIBLE_DEVICES is "-1", which hides every GPU'),
    "another GPU": ("7", "No CUDA GPUs are available", r"CUDA_VISIBLE_DEVICES=7 names no GPU that is there"),
    "broken": (None, "CUDA driver initialization failed, you might not have a CUDA gpu.", "initialization failed"),
}
"""CUDA_VISIBLE_DEVICES, what torch says then, and what we make of it."""


def _without_gpu(monkeypatch, visible: str | None, said: str) -> None:
    def fail() -> None:
        raise RuntimeError(said)

    def is_available() -> bool:
        warnings.warn(f"CUDA initialization: {said} (Triggered internally at CUDAFunctions.cpp:119.)", stacklevel=1)
        return False

    monkeypatch.setattr(torch.cuda, "is_available", is_available)
    monkeypatch.setattr(torch.cuda, "init", fail)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)


@pytest.mark.parametrize("case", WITHOUT_GPU)
def test_what_keeps_torch_from_a_gpu_is_said_once_and_in_words(case, monkeypatch):
    visible, said, expected = WITHOUT_GPU[case]
    _without_gpu(monkeypatch, visible, said)
    with pytest.raises(UserError, match=rf"--device cuda: torch sees no CUDA device, since .*{expected}.*--device cpu"):
        pick_device("cuda")
    with pytest.raises(UserError, match=rf"^device=cuda: torch sees no CUDA device, since .*{expected}.*device=cpu"):
        pick_device(torch.device("cuda"), shown="device=")
    assert pick_device("auto") == torch.device("cpu")
    note = why_on_cpu("auto", torch.device("cpu"))
    assert note.startswith("note: on the CPU, since ")
    assert "Triggered internally" not in note
    assert why_on_cpu("cpu", torch.device("cpu")) == ""  # as it was asked for


def test_a_machine_without_a_driver_needs_no_note(monkeypatch):
    _without_gpu(monkeypatch, None, "Found no NVIDIA driver on your system. Please check that you have an NVIDIA GPU")
    assert not has_cuda()
    assert why_on_cpu("auto", torch.device("cpu")) == ""
    with pytest.raises(UserError, match=r"torch sees no CUDA device\. Check nvidia-smi, or use --device cpu"):
        pick_device("cuda")
