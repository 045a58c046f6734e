"""An installation without some packages, in this process: their modules cannot be found while it lasts."""

from __future__ import annotations

import sys
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from importlib.abc import MetaPathFinder
from types import ModuleType


class _Hides(MetaPathFinder):
    def __init__(self, names: Sequence[str]) -> None:
        self.names, self.asked = names, list[str]()

    def find_spec(self, fullname: str, path: object = None, target: ModuleType | None = None) -> None:
        if _is_of(fullname, self.names):
            self.asked.append(fullname)
            raise ModuleNotFoundError(f"No module named {fullname!r}", name=fullname)


def _is_of(module: str, names: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{name}.") for name in names)


@contextmanager
def hidden_packages(*names: str) -> Generator[list[str]]:
    """Hide packages by the names under which they are imported; yields what has been asked for of them.

    Modules of theirs that were imported before are back afterwards. What other modules hold of them stays theirs.
    """
    finder = _Hides(names)
    away = {name: sys.modules.pop(name) for name in [*sys.modules] if _is_of(name, names)}
    sys.meta_path.insert(0, finder)
    try:
        yield finder.asked
    finally:
        sys.meta_path.remove(finder)
        sys.modules.update(away)
