"""Pictures as sketches: a layout takes half of a picture's time."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def _sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have tests draw without a layout until they call `monkeypatch.undo()`; fixtures of a module draw with one."""
    monkeypatch.setattr("matplotlib.layout_engine.ConstrainedLayoutEngine.execute", lambda *_: None)
