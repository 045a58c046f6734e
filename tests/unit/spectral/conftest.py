"""What tests of monitors share."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from lowrank_vit.spectral.watching import refresh as refresh_module
from tests.monitors import Gate


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    gate = Gate()
    monkeypatch.setattr(refresh_module, "solve_stack", gate)
    yield gate
    gate.open.set()


@pytest.fixture
def no_thread_is_left() -> Iterator[None]:
    """Fail a test that leaves the thread of a monitor behind."""
    before = set(threading.enumerate())
    yield
    assert [t.name for t in set(threading.enumerate()) - before if t.name == "spectral-monitor"] == []
