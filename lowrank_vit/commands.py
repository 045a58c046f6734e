"""The commands of `lowrank-vit`, in the order in which they are shown."""

from __future__ import annotations

COMMANDS = {
    "train": ("lowrank_vit.train", "train a ViT from .beton files and watch its spectra"),
    "validate": ("lowrank_vit.validate", "score a checkpoint on a validation set"),
    "inference": ("lowrank_vit.inference", "what a checkpoint says of some images"),
    "analyze-spectrum": ("lowrank_vit.analyze_spectrum", "singular values of a checkpoint's weights"),
    "report": ("lowrank_vit.report.__main__", "a run directory as one HTML page and PNGs"),
    "augment": ("lowrank_vit.augment.__main__", "draw what the training flags do to images"),
    "bench": ("lowrank_vit.bench.__main__", "measure this project beside its peers"),
    "prep": ("data_prep.__main__", "write .beton files (also: python -m data_prep)"),
    "completion": ("lowrank_vit.completion", "a script for the shell: TAB completes all of this"),
}
"""Name to the module whose `main(argv)` it is, and what it does."""
