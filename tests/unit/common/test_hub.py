"""What the hub's errors become: one line that says what to do, told apart as far as they can be."""

from __future__ import annotations

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
        (http(errors.RepositoryNotFoundError, 404), "is not on the hub, or is private and no token is there"),
        (http(errors.RevisionNotFoundError, 404), "not in that revision"),
        (http(errors.HfHubHTTPError, 401), "no token is there"),
        (http(errors.HfHubHTTPError, 403), "the hub refuses your token"),
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
    missing = http(errors.RepositoryNotFoundError, 404)
    assert "your token may not read it" in hub_message("a/b", missing, "model", "x")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    message = hub_message("a/b", wrapped(errors.OfflineModeIsEnabled("x")), "dataset", "take a copy")
    assert "HF_HUB_OFFLINE forbids to ask the hub: unset it, or take a copy" in message


def test_without_a_network_only_the_cache_is_asked(monkeypatch):
    def refuse(*_: object, **__: object) -> None:
        raise OSError

    monkeypatch.setattr(hub.socket, "create_connection", refuse)
    monkeypatch.setattr(hub.urllib.request, "getproxies", dict)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with quick_without_network():
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
