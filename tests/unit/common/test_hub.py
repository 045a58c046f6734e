"""What the hub's errors become: one line that says what to do, told apart as far as they can be."""

from __future__ import annotations

import logging
from typing import Any

import httpx
import pytest
from huggingface_hub import constants, errors

from lowrank_vit.common import hub
from lowrank_vit.common.hub import hub_message, quick_without_network


def http(kind: type[errors.HfHubHTTPError], status: int) -> Exception:
    response: Any = httpx.Response(status, request=httpx.Request("GET", "https://huggingface.co"))
    return kind("text", response=response)


def wrapped(cause: Exception, message: str = "Couldn't reach it") -> Exception:
    error = ConnectionError(message)
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (http(errors.GatedRepoError, 403), "is gated: ask for access on https://huggingface.co/datasets/a/b"),
        (http(errors.RepositoryNotFoundError, 404), "is not on the hub, or is private and you have no token"),
        (http(errors.RevisionNotFoundError, 404), "not in that revision"),
        (http(errors.HfHubHTTPError, 401), "you have no token"),
        (http(errors.HfHubHTTPError, 403), "is private and you have no token"),
        (http(errors.HfHubHTTPError, 429), "asked too often from here (429). Wait some minutes, log in"),
        (wrapped(http(errors.HfHubHTTPError, 503)), "an error of its own (503). Try again later, or take a copy"),
        (wrapped(errors.FileMetadataError("x")), "what answers is not the Hugging Face hub"),
        (errors.HFValidationError("x"), "`a/b` is not a name of the hub"),
        (wrapped(errors.LocalEntryNotFoundError("x")), "the Hugging Face hub cannot be reached"),
        (httpx.ConnectError("x"), "the Hugging Face hub cannot be reached"),
        (wrapped(errors.OfflineModeIsEnabled("x")), "the Hugging Face hub cannot be reached"),
        (ValueError("Odd. And more"), "a/b cannot be loaded: Odd"),
    ],
)
def test_errors_are_told_apart(monkeypatch, error, said):
    monkeypatch.setattr(hub, "_has_token", lambda: False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    message = hub_message("a/b", error, "dataset", "take a copy")
    assert said in message
    assert "\n" not in message


def test_a_token_and_offline_mode_change_the_advice(monkeypatch):
    monkeypatch.setattr(hub, "_has_token", lambda: True)
    assert "the hub refuses your token" in hub_message("a/b", http(errors.HfHubHTTPError, 403), "model", "x")
    missing = http(errors.RepositoryNotFoundError, 404)
    assert "your token may not read it" in hub_message("a/b", missing, "model", "x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = hub_message("a/b", wrapped(errors.OfflineModeIsEnabled("x")), "dataset", "take a copy")
    assert "HF_HUB_OFFLINE forbids asking the hub: unset it, or take a copy" in message


def test_where_the_hub_does_not_answer_only_the_cache_is_asked(monkeypatch):
    why = OSError("silence")
    monkeypatch.setattr(hub, "why_out_of_reach", lambda: why)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    error = ValueError("x")

    def fail() -> None:
        with quick_without_network() as found:
            assert (found, constants.HF_HUB_OFFLINE) == (why, True)
            raise error

    with pytest.raises(ValueError, match="x"):
        fail()
    assert error.__cause__ is why
    assert not constants.HF_HUB_OFFLINE


def test_of_the_tries_one_line_tells(monkeypatch, capsys):
    monkeypatch.setattr(hub, "why_out_of_reach", lambda: None)
    logger = logging.getLogger("huggingface_hub.utils._http")
    with quick_without_network():
        for number in (1, 2):
            logger.warning("HTTP Error 503 thrown while requesting HEAD https://host/x")
            logger.warning(f"Retrying in 1s [Retry {number}/5].")
    assert capsys.readouterr().err.splitlines() == [
        "note: the Hugging Face hub: HTTP Error 503; asking again, for some minutes at most"
    ]
