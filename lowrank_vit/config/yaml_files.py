"""Flat YAML files as command-line tokens, so that one parser judges both."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.program import CONFIGS, bundled_names, find_bundled
from lowrank_vit.config import meaning
from lowrank_vit.config.option_types import Hints, aliases, kind_of, tokens_of, without_dashes
from lowrank_vit.config.timm_flags import FLAGS, Holds
from lowrank_vit.config.timm_line import foreign, is_foreign


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for n, key in enumerate(keys) if key in keys[:n]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(problem=f"`{twice}` is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def config_files(argv: list[str]) -> tuple[list[Path], list[str]]:
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
        paths.append(find_bundled(Path(path), CONFIGS))
    return paths, own


@dataclass
class FromFile:
    """What a flat YAML file says, as command-line tokens."""

    tokens: dict[str, list[str]] = field(default_factory=dict)
    """By option; none for one whose value is null, which means its default."""
    held: list[str] = field(default_factory=list)
    """Options of timm's whose effect is there without them."""
    num_skipped: int = 0
    """Options of timm's that are not here, at values that change nothing."""
    notes: list[tuple[str, dict[str, list[str]]]] = field(default_factory=list)
    """What an older run's file is taken to mean, in words, and the tokens of that by option; none for what is lost."""


def read_config(path: Path, hints: Hints) -> FromFile:
    """The options that a flat YAML file names; `hints` are all that there are.

    timm's own args.yaml is such a file. Raises `UserError` naming file and key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except OSError as error:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" That folder has: {', '.join(near)}." if near else f" There are: {', '.join(bundled_names(CONFIGS))}."
        raise UserError(f"--config {path}: {error.strerror}.{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must be a flat mapping of flag names to values, e.g. `epochs: 300`.")
    found, seen = FromFile(), dict[str, str]()
    names = {without_dashes(alias): name for alias, name in aliases(hints).items()}
    number = meaning.number_in(content, f"--config {path}")
    for key, value in content.items():
        if key == meaning.KEY:
            continue
        name = without_dashes(str(key))
        name = names.get(name, name)
        shown = f"--config {path}: `{key}`"
        if is_foreign(name):
            _foreign(found, name, value, shown)
            continue
        if name not in hints:
            near = difflib.get_close_matches(name, [*hints, *names], n=1, cutoff=0.5)
            hint = f" Did you mean `{near[0]}`?" if near else " See --help for all names."
            raise UserError(f"{shown} is not an option.{hint}")
        if name in seen and value is not None and found.tokens[name]:
            raise UserError(f"{shown} and `{seen[name]}` are the same option. Keep one of them.")
        if name not in seen or value is not None:
            found.tokens[name] = [] if value is None else _option_tokens(shown, name, hints[name], value)
            seen[name] = str(key)
    if number is None and _is_whole(found, hints):
        number = meaning.FIRST
    if number is not None:
        args = {str(key).replace("_", "-"): value for key, value in content.items()}
        _take_as_meant(found, number, args, hints, f"--config {path}")
    return found


def _is_whole(found: FromFile, hints: Hints) -> bool:
    """Whether these are all options of a run of ours, as in its args.yaml, and not those that someone has chosen."""
    return "spec-every" in found.tokens and len(found.tokens) > len(hints) / 2


def _take_as_meant(found: FromFile, number: int, args: Mapping[str, Any], hints: Hints, source: str) -> None:
    """Give options that an older run knew nothing of the values with which everything is as it was then."""
    before = meaning.values_before(number, args)
    for change in meaning.changes_since(number, args):
        new = [name for name in change.before if not found.tokens.get(name)]
        for name in new:
            found.tokens[name] = _option_tokens(f"{source}: `{name}`", name, hints[name], before[name])
        if new:
            as_then = {name: found.tokens[name] for name in new}
            found.notes.append((f"{source} is an older run's: {change.what}. It is taken as it was meant:", as_then))
        elif change.cannot:
            lost = f"{source} is an older run's: {change.what}. A new run does as now: {change.cannot}"
            found.notes.append((lost, {}))


def _foreign(found: FromFile, name: str, value: Any, shown: str) -> None:
    """An option of timm's under a name that the parser does not know."""
    flag = FLAGS[name]
    if (not value and not flag.means_something_at_0) or value is None or flag.has_switch:
        found.num_skipped += 1
        return
    values = [str(one) for one in value] if isinstance(value, list) else [] if value is True else [str(value)]
    tokens = foreign(name, values, shown)
    if tokens:
        found.tokens[name] = tokens
    elif isinstance(flag.train, Holds) and value != (flag.written or None):
        found.held.append(name)
    else:
        found.num_skipped += 1


def _option_tokens(shown: str, name: str, hint: Any, value: Any) -> list[str]:
    """An option and its value as tokens none of which can be taken for another flag, or for the data directory."""
    kind = kind_of(hint)
    if kind.element is bool:
        if not isinstance(value, bool):
            raise UserError(f"{shown[:-1]}: {value}` must be true or false.")
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, bool):
        raise UserError(f"{shown[:-1]}: {str(value).lower()}` must be a value, not true or false.")
    if value == "" and kind.element is Path:
        return []
    return tokens_of(name, hint, _texts(shown, name, value) if kind.is_tuple else [_text(shown, value)], shown)


def _text(shown: str, value: Any) -> str:
    if isinstance(value, (list, dict)):
        what = "a list" if isinstance(value, list) else "a mapping"
        raise UserError(f"{shown} is {what}, but takes one value.")
    return str(value)


def _texts(shown: str, name: str, value: Any) -> list[str]:
    if isinstance(value, dict):
        if not name.endswith("-kwargs"):
            raise UserError(f"{shown} is a mapping, but takes a list of values.")
        return [f"{key}={one}" for key, one in value.items()]  # model-kwargs: {patch_size: 2}
    values = value if isinstance(value, list) else [value]
    if any(one is None or isinstance(one, (bool, list, dict)) for one in values):
        raise UserError(f"{shown} is a list of which each element must be one value.")
    return [str(one) for one in values]
