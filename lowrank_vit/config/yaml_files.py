"""Flat YAML files whose keys are the flags; their values are checked like those of a command line."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lowrank_vit.common.errors import UserError, did_you_mean
from lowrank_vit.common.program import CONFIGS, bundled_names, find_bundled
from lowrank_vit.config import meaning
from lowrank_vit.config.command_line import LIST, read, refuse
from lowrank_vit.config.option_types import (
    UNSET,
    Hints,
    aliases,
    expanded,
    kind_of,
    value_of,
    without_dashes,
    wrong_value,
)
from lowrank_vit.config.other_flags import OTHERS
from lowrank_vit.config.timm_flags import FLAGS, Holds
from lowrank_vit.config.timm_line import foreign, is_foreign, of_other


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is given twice, of which YAML would silently take the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for n, key in enumerate(keys) if key in keys[:n]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(problem=f"`{twice}` is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def config_files(argv: Iterable[str]) -> tuple[list[Path], list[str]]:
    """Split `argv` into the files of its `--config FILE`s and all other tokens.

    A file that ships with the program may be named without its folder: `--config quickstart`.
    """
    paths: list[Path] = []
    own: list[str] = []
    tokens = iter(argv)
    for token in tokens:
        flag, equals, value = token.partition("=")
        if flag != "--config":
            own.append(token)
            continue
        path = value if equals else next(tokens, None)
        if not path:
            raise UserError(f"--config needs a file, or one of {', '.join(bundled_names(CONFIGS))}.")
        paths.append(find_bundled(expanded(path, "--config"), CONFIGS))
    return paths, own


@dataclass
class FromFile:
    """The options in a flat YAML file."""

    values: dict[str, Any] = field(default_factory=dict)
    """By option; `UNSET` for one whose value is null, which means its default."""
    held: list[str] = field(default_factory=list)
    """timm's options for things that this program always does."""
    num_skipped: int = 0
    """How many of timm's options do not exist here and have values that change nothing."""
    notes: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    """For each change since an older run's file: words, and the option values that keep its meaning, if any can."""


def read_config(path: Path, hints: Hints) -> FromFile:
    """The options that a flat YAML file names; `hints` has all known options.

    timm's own args.yaml is such a file. Raises `UserError` naming file and all keys that cannot be taken.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}.{_others(path)}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must be a flat mapping of flag names to values, e.g. `epochs: 300`.")
    found, seen, refused = FromFile(), dict[str, str](), list[UserError]()
    names = {without_dashes(alias): name for alias, name in aliases(hints).items()}
    number = meaning.number_in(content, f"--config {path}")
    for key, value in content.items():
        if key == meaning.KEY or (key == "config" and not value):
            continue
        name = without_dashes(str(key))
        name = names.get(name, name)
        shown = f"--config {path}: `{key}`"
        try:
            if is_foreign(name):
                _foreign(found, name, value, shown, hints)
                continue
            if name in OTHERS:
                raise of_other(name, shown)
            if name not in hints:
                near = did_you_mean(name, [*hints, *(other for other in names if len(other) > 1)])
                raise UserError(f"{shown} is not an option.{near or f' {LIST}'}")
            if name in seen and value is not None and found.values[name] is not UNSET:
                raise UserError(f"{shown} and `{seen[name]}` are the same option. Keep one of them.")
            if name not in seen or value is not None:
                found.values[name] = UNSET if value is None else _value(shown, name, hints[name], value)
                seen[name] = str(key)
        except UserError as error:
            refused.append(error)
    refuse(refused)
    if number is None and _is_whole(found, hints):
        number = meaning.FIRST
    if number is not None:
        args = {str(key).replace("_", "-"): value for key, value in content.items()}
        _take_as_meant(found, number, args, hints, f"--config {path}")
    return found


def _others(path: Path) -> str:
    """A sentence that lists the files that a missing file's name may mean."""
    bundled = bundled_names(CONFIGS)
    if path.parent == Path() and (near := did_you_mean(path.name.removesuffix(CONFIGS), bundled)):
        return near
    there = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
    return f" That folder has: {', '.join(there)}." if there else f" Bundled configurations: {', '.join(bundled)}."


def _is_whole(found: FromFile, hints: Hints) -> bool:
    """Whether a file has a run's whole options, as its args.yaml does, and not only some that a user chose."""
    return "spec-every" in found.values and len(found.values) > len(hints) / 2


def _take_as_meant(found: FromFile, number: int, args: Mapping[str, Any], hints: Hints, source: str) -> None:
    """Set options that are newer than a run's file to the values that keep the run's old behaviour."""
    before = meaning.values_before(number, args)
    for change in meaning.changes_since(number, args):
        new = [name for name in change.before if found.values.get(name, UNSET) is UNSET]
        for name in new:
            found.values[name] = _value(f"{source}: `{name}`", name, hints[name], before[name])
        if new:
            as_then = {name: found.values[name] for name in new}
            found.notes.append((f"{source} is of an older run: {change.what}. Its old meaning is kept:", as_then))
        elif change.cannot:
            lost = f"{source} is of an older run: {change.what}. A new run has the new meaning: {change.cannot}"
            found.notes.append((lost, {}))


def _foreign(found: FromFile, name: str, value: Any, shown: str, hints: Hints) -> None:
    """Take an option of timm's that the parser does not know. Raises `UserError`."""
    flag = FLAGS[name]
    if (not value and not flag.means_something_at_0) or value is None or flag.has_switch:
        found.num_skipped += 1
        return
    values = [str(one) for one in value] if isinstance(value, list) else [] if value is True else [str(value)]
    tokens = foreign(name, values, shown)
    if tokens:
        found.values |= read(tokens, hints)
    elif isinstance(flag.train, Holds) and value != (flag.written or None):
        found.held.append(name)
    else:
        found.num_skipped += 1


def _value(shown: str, name: str, hint: Any, value: Any) -> Any:
    """The value of an option from its value in YAML. Raises `UserError`, which calls the option `shown`."""
    kind = kind_of(hint)
    if isinstance(value, bool) and kind.element is bool:
        return value
    if isinstance(value, dict) and name.endswith("-kwargs"):  # model-kwargs: {patch_size: 2}
        value = [f"{key}={one}" for key, one in value.items()]
    values = value if isinstance(value, list) and kind.is_tuple else [value]
    wrong = [one for one in values if one is None or kind.element is bool or isinstance(one, (bool, list, dict))]
    if wrong:
        raise wrong_value(hint, [_as_written(one) for one in wrong], shown)
    return value_of(hint, [str(one) for one in values], shown)


def _as_written(value: Any) -> str:
    return yaml.safe_dump(value, default_flow_style=True, width=10**6).removesuffix("\n...\n").strip()
