"""Flat YAML files as command-line tokens, so that one parser judges both."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

import yaml

from data_prep.errors import UserError
from lowrank_vit.timm_flags import check_name


class _OnceLoader(yaml.SafeLoader):
    """Refuses a key that is there twice, of which YAML would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        twice = next((key for n, key in enumerate(keys) if key in keys[:n]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(problem=f"`{twice}` is there twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def config_files(argv: list[str]) -> tuple[list[Path], list[str]]:
    """Split `argv` into the files of its `--config FILE`s and all other tokens."""
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
            raise UserError("--config needs a file: --config configs/quickstart.yaml")
        paths.append(Path(path))
    return paths, own


def yaml_tokens(path: Path, hints: Mapping[str, Any]) -> list[str]:
    """The command-line tokens that a flat YAML file stands for; `hints` are all options and their types.

    Raises `UserError` naming file and key.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _OnceLoader)
    except OSError as error:
        near = sorted(str(p) for p in path.parent.glob("*.yaml")) if path.parent.is_dir() else []
        hint = f" That folder has: {', '.join(near)}." if near else ""
        raise UserError(f"--config {path}: {error.strerror}.{hint}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}.") from error
    if not isinstance(content, dict):
        raise UserError(f"--config {path} must be a flat mapping of flag names to values, e.g. `epochs: 300`.")
    tokens: list[str] = []
    seen: dict[str, str] = {}
    for key, value in content.items():
        name = str(key).replace("_", "-")
        check_name(name, f"--config {path}: `{key}`")
        if name in seen:
            raise UserError(f"--config {path}: `{key}` and `{seen[name]}` are the same option. Keep one of them.")
        seen[name] = str(key)
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1, cutoff=0.5)
            hint = f" Did you mean `{near[0]}`?" if near else " See --help for all names."
            raise UserError(f"--config {path}: `{key}` is not an option.{hint}")
        tokens += _option_tokens(path, name, hints[name], value)
    return tokens


def _option_tokens(path: Path, name: str, hint: Any, value: Any) -> list[str]:
    plain = getattr(hint, "__origin__", hint) if hasattr(hint, "__metadata__") else hint  # without its Range
    if value is None and type(None) not in get_args(plain):
        raise UserError(f"--config {path}: `{name}` has no value. Give one, or leave the line out.")
    is_flag = plain is bool
    if is_flag:
        if not isinstance(value, bool):
            raise UserError(f"--config {path}: `{name}: {value}` must be true or false.")
        return [f"--{name}" if value else f"--no-{name}"]
    if isinstance(value, bool):
        raise UserError(f"--config {path}: `{name}: {str(value).lower()}` must be a value, not true or false.")
    if isinstance(value, dict):  # model-kwargs: {patch_size: 2}
        return [f"--{name}", *(f"{k}={v}" for k, v in value.items())]
    if isinstance(value, (list, tuple)):
        return [f"--{name}", *(str(v) for v in value)]
    return [f"--{name}", str(value)]
