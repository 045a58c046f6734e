"""What torchrun is told of an error, for the summary that comes last."""

from __future__ import annotations

import json

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from lowrank_vit import train
from lowrank_vit.common.errors import UserError, in_short
from lowrank_vit.ranks.failing import record


@pytest.fixture
def file(tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    return tmp_path / "error.json"


def raised(error: BaseException, cause: BaseException | None = None) -> BaseException:
    """The error as it comes out of a call, made of another one."""
    with pytest.raises(type(error)) as caught:
        raise error from cause
    return caught.value


def summary(file) -> str:
    """As torchrun prints it."""
    return str(ChildFailedError("train", {0: ProcessFailure(0, 1, 2, str(file))}))


def test_a_users_mistake_is_its_paragraph_and_notes(file):
    error = raised(UserError("--lr is wrong.\x1b[2J"), RuntimeError("a library's banner"))
    error.add_note("a note")
    record(error)
    assert "traceback : error: --lr is wrong.\\x1b[2J\n  a note\n" in summary(file)
    assert "banner" not in file.read_text()
    assert int(json.loads(file.read_text())["message"]["extraInfo"]["timestamp"]) > 1e9


GLOO = "[/__w/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:10375"


@pytest.mark.parametrize(
    ("text", "short"),
    [
        (
            f"{GLOO}. This is typically caused by a remote worker crashing. GLHF!",
            "Connection closed by peer [127.0.0.1]:10375",
        ),
        ("[enforce fail at /a/pair.cc:456] op.preamble.length <= op.nbytes. 8 vs 4", "op.preamble.length <= op.nbytes"),
        (
            "Ping failed, invalid value returned from server.\nException raised from pingServer",
            "Ping failed, invalid value returned from server",
        ),
        ("", "RuntimeError"),
    ],
)
def test_of_a_librarys_error_its_first_sentence_is_quoted(text, short):
    assert in_short(RuntimeError(text)) == short


def test_ctrl_c_is_no_traceback_and_anything_else_is_one(file):
    record(raised(KeyboardInterrupt()))
    assert "traceback : KeyboardInterrupt: \n" in summary(file)
    record(raised(ZeroDivisionError("oh")))
    assert "Traceback (most recent call last)" in summary(file)
    assert "ZeroDivisionError: oh" in summary(file)


def test_success_is_not_noted_nor_anything_without_torchrun(file, monkeypatch):
    record(SystemExit(0))
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE")
    record(UserError("x"))
    assert not file.exists()


def test_a_torchrun_of_one_process_is_told_too(file, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(UserError):
        train.main(["--lr", "abc"])
    assert "traceback : error: --lr takes a number above 0, not `abc`" in summary(file)
