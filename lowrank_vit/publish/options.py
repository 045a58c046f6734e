"""The options of `export`; nothing heavy is imported, so that a wrong option is reported at once."""

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
    """Write the weights of RUN in timm's layout of the Hugging Face hub: config.json, model.safetensors, README.md.

    Give --local-dir or --hub. timm then loads the model under the name local-dir:DIR or hf-hub:NAME.
    """

    run: Positional[Annotated[Path, arg(metavar="RUN")]]
    """A run's directory, for its best weights, else the last; or one of its checkpoints."""
    local_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint=NONE)] = None
    """Folder to write, created if missing. An earlier export there is replaced, unless its README.md was edited."""
    hub: Annotated[str, arg(metavar="NAME", help_behavior_hint=NONE)] = ""
    """Repository of the hub, OWNER/NAME, or NAME of your own; created if missing."""
    weights: Literal["auto", "ema", "raw"] = "auto"
    """Export the EMA's weights or the model's own; auto: those that scored higher in that epoch."""
    merge: bool = True
    """Merge factors and adapters into plain layers, the only ones that timm can load."""
    overwrite: Annotated[bool, FlagCreatePairsOff] = False
    """Replace files of these names in a folder that holds other things, or an edited README.md; others stay."""
    license: Annotated[str, arg(metavar="ID", help_behavior_hint="(default: a line to fill in)")] = ""
    """License of the weights, for the card: one of the hub's identifiers, such as apache-2.0."""
    private: Annotated[bool, FlagCreatePairsOff] = False
    """Make a new repository of --hub private."""
    revision: Annotated[str, arg(metavar="BRANCH", help_behavior_hint="(default: main)")] = ""
    """Branch of --hub to write to."""
    commit_message: Annotated[str, arg(metavar="TEXT")] = "Add model"
    """Message of the commit to --hub."""

    def check(self) -> None:
        """Raise `UserError` if options contradict one another, or if none says where to write."""
        if bool(self.hub) == (self.local_dir is not None):
            raise UserError("Give one of --local-dir DIR, a folder to write, and --hub NAME, a repository of the hub.")
        of_hub = {"--private": self.private, "--revision": self.revision}
        if not self.hub and (given := [name for name, value in of_hub.items() if value]):
            raise UserError(f"{given[0]} needs --hub, which is not given. Leave it out.")
        if not re.fullmatch(r"[A-Za-z0-9.+-]*", self.license):
            raise UserError(f"--license {self.license} is not a license identifier, such as apache-2.0 or cc-by-4.0.")
        if not self.run.exists():
            raise UserError(f"{self.run} does not exist. Give a run's directory, or one of its checkpoints.")
