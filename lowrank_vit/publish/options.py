"""The options of `export`; nothing heavy is imported, so that a wrong one is told at once."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from lowrank_vit.common.errors import UserError

NONE = "(default: none)"


@dataclass(frozen=True)
class ExportOptions:
    """Write the weights of RUN as timm and the Hugging Face hub know them: config.json, model.safetensors, README.md.

    One of --local-dir and --hub says where to. timm makes the model again by the name local-dir:DIR or hf-hub:NAME.
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """A run's directory, of which the best weights are taken, else the last; or one of its checkpoints."""
    local_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint=NONE)] = None
    """A folder to write, which is made. A former export there is replaced, unless its README.md was edited."""
    hub: Annotated[str, arg(metavar="NAME", help_behavior_hint=NONE)] = ""
    """A repository of the hub, OWNER/NAME, or NAME of your own; it is made if it is not there."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """The EMA's or the model's own; auto: those that scored higher in that epoch."""
    merge: bool = True
    """Layers in factors, or with adapters, become the layers that they stand for, which is all that timm can load."""
    overwrite: Annotated[bool, FlagCreatePairsOff] = False
    """Replace files of these names in a folder that holds other things, or an edited README.md; others stay."""
    license: Annotated[str, arg(metavar="ID", help_behavior_hint="(default: a line to fill in)")] = ""
    """Of the weights, for the card: one of the hub's identifiers, such as apache-2.0."""
    private: Annotated[bool, FlagCreatePairsOff] = False
    """Make a new repository of --hub private."""
    revision: Annotated[str, arg(metavar="BRANCH", help_behavior_hint="(default: main)")] = ""
    """A branch of --hub to write to."""
    commit_message: Annotated[str, arg(metavar="TEXT")] = "Add model"
    """Of the commit to --hub."""

    def check(self) -> None:
        """Raise `UserError` where options contradict or say nothing."""
        if bool(self.hub) == (self.local_dir is not None):
            raise UserError("Give one of --local-dir DIR, a folder to write, and --hub NAME, a repository of the hub.")
        of_hub = {"--private": self.private, "--revision": self.revision}
        if not self.hub and (given := [name for name, value in of_hub.items() if value]):
            raise UserError(f"{given[0]} is about --hub, which is not there. Leave it out.")
        if not re.fullmatch(r"[A-Za-z0-9.+-]*", self.license):
            raise UserError(f"--license {self.license} is no identifier of a license, such as apache-2.0 or cc-by-4.0.")
        if not self.run.exists():
            raise UserError(f"{self.run} does not exist. Give a run's directory, or one of its checkpoints.")
