"""`lowrank-vit completion bash`: a script with which TAB completes commands, flags and choices.

The script contains every word that it may propose, so TAB never starts Python. If no word fits, the shell completes
file names.
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import io
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lowrank_vit.common.errors import UserError, did_you_mean, exit_cleanly
from lowrank_vit.common.program import CLASSES, COMMANDS, CONFIGS, bundled_names, usage_name
from lowrank_vit.common.terminal import HELP_FLAGS

MODULE = "lowrank_vit.config.completion"
SHELLS = ("bash", "zsh")
HELP = """usage: lowrank-vit completion {bash,zsh}

Print a script that makes TAB complete the commands of lowrank-vit, their flags
and their choices. For this shell:

  source <(lowrank-vit completion bash)

For every shell, without waiting for Python at each start:

  lowrank-vit completion bash > ~/.lowrank-vit-completion
  echo 'source ~/.lowrank-vit-completion' >> ~/.bashrc

In zsh say zsh and .zshrc instead.
"""


class _Several(tuple[str, ...]):
    """Values of which a flag takes several."""


Words = dict[str, dict[str, tuple[str, ...]]]
"""Command ("train", "prep digits") to its flags; each flag to its choices, if it has any."""

_SCRIPT = """# TAB completion of lowrank-vit. Made by `lowrank-vit completion`; make it anew after an update.
_lowrank_vit() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" name="${{COMP_WORDS[1]//_/-}}" words=""
  COMPREPLY=()
  # bash takes --flag=value apart.
  if [[ $cur == "=" ]]; then cur=""; elif [[ $before == "=" ]]; then before="${{COMP_WORDS[COMP_CWORD-2]}}"; fi
  if ((COMP_CWORD == 1)); then
    COMPREPLY=($(compgen -W "{commands}" -- "$cur"))
    return
  fi
  case "$name" in
{groups}
  esac
  local key="$name $before" at=$COMP_CWORD
  # Behind a flag that takes several values comes another one.
  while ((at > 2)) && [[ ${{COMP_WORDS[at]}} != -* ]]; do at=$((at - 1)); done
  if [[ $before != -* && $cur != -* ]]; then key="$name ${{COMP_WORDS[at]}} +"; fi
  case "$key" in
{choices}
  *)
    [[ $cur == -* ]] || return 0
    case "$name" in
{flags}
    esac ;;
  esac
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _lowrank_vit lowrank-vit
"""
_GROUP = """  {name})
    if ((COMP_CWORD == 2)); then COMPREPLY=($(compgen -W "{subcommands}" -- "$cur")); return; fi
    name="$name ${{COMP_WORDS[2]}}" ;;"""
_OF_ZSH = "autoload -U +X compinit && compinit\nautoload -U +X bashcompinit && bashcompinit\n"


def all_words() -> Words:
    """All words to complete, of all commands; takes seconds, since it imports them."""
    words: Words = {}
    for command, (module, _) in COMMANDS.items():
        if command == "completion":
            words |= {f"completion {shell}": {} for shell in SHELLS}
        elif command == "augment":  # takes train's flags
            words["train"]["--config"] = bundled_names(CONFIGS)
            words["augment"] = words["train"] | {"--preview": ()}
        else:
            words |= _of_parser(command, _parser(module))
    words["prep imagefolder"]["--classes"] = bundled_names(CLASSES)
    return words


def script(shell: str, words: Words) -> str:
    """The script for a shell."""
    nested: dict[str, list[str]] = {}
    for command in words:
        first, _, second = command.partition(" ")
        nested.setdefault(first, []).extend([second] if second else [])
    groups = (_GROUP.format(name=name, subcommands=" ".join(found)) for name, found in nested.items() if found)
    choices = (
        f'  "{command} {flag}"{several}) words="{" ".join(values)}" ;;'
        for command, flags in words.items()
        for flag, values in flags.items()
        for several in [f' | "{command} {flag} +"' if isinstance(values, _Several) else ""]
        if values
    )
    flags = (f'    "{command}") words="{" ".join([*flags, "--help"])}" ;;' for command, flags in words.items())
    parts = {"groups": groups, "choices": choices, "flags": flags}
    text = _SCRIPT.format(commands=" ".join(nested), **{name: "\n".join(lines) for name, lines in parts.items()})
    return _OF_ZSH + text if shell == "zsh" else text


def _parser(module: str) -> dict[str, Any]:
    """The description of a command's options that tyro writes into its own scripts."""
    command = importlib.import_module(module).main
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        path = Path(folder) / "completion"
        with contextlib.suppress(SystemExit):
            command(["--tyro-write-completion", "bash", str(path)])
        text = path.read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("COMPLETION_SPEC = "))
    return ast.literal_eval(line.partition(" = ")[2])


def _of_parser(command: str, parser: dict[str, Any]) -> Words:
    if not parser["subcommands"]:
        return {command: dict(_flags(parser["options"]))}
    return {f"{command} {name}": dict(_flags(inner["options"])) for name, inner in parser["subcommands"].items()}


def _flags(options: list[dict[str, Any]]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for option in options:
        for flag in option["flags"]:
            if flag.startswith("--") and flag != "--help":
                choices = [choice for choice in option.get("choices", ()) if choice]
                yield flag, (_Several if option.get("nargs") == "*" else tuple)(choices)


def main(argv: list[str] | None = None) -> None:
    """Print the script of the shell that `argv` (default: the process's own) names. Raises `UserError`."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or HELP_FLAGS & set(argv):
        print(HELP, end="")
        return
    shell, *others = argv
    if shell not in SHELLS:
        near = did_you_mean(shell, SHELLS)
        raise UserError(f"`{shell}` is not a shell of {usage_name(MODULE)}.{near} There are: {', '.join(SHELLS)}.")
    if others:
        raise UserError(f"`{others[0]}` belongs to no option. {usage_name(MODULE)} takes one shell, which is {shell}.")
    print(script(shell, all_words()), end="")


if __name__ == "__main__":
    exit_cleanly(main)
