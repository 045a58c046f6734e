"""An installation without some packages, in this process: their modules cannot be found while it lasts."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from typing import Any


class _Without:
    """A finder of modules that does not find some packages, nor what is known of their installation."""

    def __init__(self, finder: Any, modules: Sequence[str], distributions: set[str]) -> None:
        self._finder, self._modules, self._distributions = finder, modules, distributions

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return None if _is_of(name, self._modules) else self._finder.find_spec(name, path, target)

    def find_distributions(self, *context: Any) -> Iterable[metadata.Distribution]:
        find = getattr(self._finder, "find_distributions", lambda *_: ())
        return (one for one in find(*context) if canonical(one.metadata["Name"]) not in self._distributions)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._finder, name)


def _is_of(module: str, packages: Sequence[str]) -> bool:
    return any(f"{module}.".startswith(f"{package}.") for package in packages)


def canonical(distribution: str) -> str:
    """One of the spellings under which a package index knows a distribution."""
    return distribution.lower().replace("_", "-").replace(".", "-")


@cache
def owners() -> Mapping[str, Sequence[str]]:
    """The distributions that bring a module of the top level."""
    return metadata.packages_distributions()


@contextmanager
def hidden_packages(*modules: str) -> Generator[None]:
    """Hide packages, named as they are imported: "sklearn", "nvidia.dali".

    Modules of theirs that were imported before are back afterwards. What other modules hold of them stays theirs.
    """
    distributions = {canonical(one) for module in modules if "." not in module for one in owners().get(module, ())}
    away = {name: sys.modules.pop(name) for name in [*sys.modules] if _is_of(name, modules)}
    finders = sys.meta_path[:]
    sys.meta_path[:] = [_Without(finder, modules, distributions) for finder in finders]
    try:
        yield
    finally:
        sys.meta_path[:] = finders
        sys.modules.update(away)
