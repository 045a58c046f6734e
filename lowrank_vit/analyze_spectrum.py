"""`python -m lowrank_vit.analyze_spectrum`: the spectra of saved or pretrained weights as tables, JSON and arrays."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from rich.console import Console
from tyro.conf import FlagCreatePairsOff, arg

from lowrank_vit.common.arguments import POSITIVE
from lowrank_vit.common.errors import UserError, exit_cleanly
from lowrank_vit.common.program import check_versions, require_one_process, usage_name
from lowrank_vit.common.terminal import output_is_in_files, say, say_beside
from lowrank_vit.config.command_line import read_options
from lowrank_vit.config.option_types import Alone

if TYPE_CHECKING:
    from torch import Tensor

    from lowrank_vit.spectral.analyze import Analysis
    from lowrank_vit.spectral.measures.circuits import BlockCircuits

# Modules that load torch are imported where they are used, so that a wrong option is reported before.
NONE = "(default: none)"
"""Shown for options without a default."""


@dataclass(frozen=True)
class Source:
    """Give one of --checkpoint, --model with --pretrained, or --compare."""

    checkpoint: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=NONE)] = None
    """A run's last.pth.tar or model_best.pth.tar, or a file of weights of timm, DeiT or MAE."""
    use_ema: Annotated[bool, FlagCreatePairsOff] = False
    """Analyse a checkpoint's EMA weights instead of the model's own."""
    model: Annotated[str, arg(metavar="NAME", help_behavior_hint="(default: the checkpoint's)")] = ""
    """timm model name, hf-hub:OWNER/NAME or local-dir:DIR. With --pretrained, its published weights are analysed.
    Without, it names the model of a file of weights that does not."""
    pretrained: Annotated[bool, FlagCreatePairsOff] = False
    """Fetch timm's weights of --model (needs a network or timm's cache), or read those of local-dir:DIR."""
    compare: Annotated[tuple[Path, Path] | None, arg(metavar="BEFORE AFTER", help_behavior_hint=NONE)] = None
    """Compare two checkpoints of one model instead; writes <save-dir>/<model>_drift.json."""


@dataclass(frozen=True)
class Matrices:
    """Which matrices, and what is recorded of each."""

    targets: Annotated[str, arg(metavar="NAMES")] = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
    """Names of modules, or their endings, separated by commas. all-linear: every 2-D weight, which is also what a model
    without all four default names gets."""
    split_qkv: Annotated[bool, FlagCreatePairsOff] = False
    """Take Q, K and V as three matrices."""
    circuits: Annotated[Literal["none", "raw", "folded"], Alone("raw")] = "none"
    """Also analyse the circuits of each head, W_Q^T W_K and W_O W_V, and how blocks compose. folded: include the norm's
    weight and LayerScale."""
    topk: Annotated[int, arg(metavar="N"), POSITIVE] = 8
    """How many singular values and vectors to record from each end of a spectrum."""
    interval: Annotated[int, arg(metavar="N"), POSITIVE] = 1
    """Step between the recorded indices: 1 lists 1, 2, 3, ...; 10 lists 1, 11, 21, ..."""
    statistics: Annotated[bool, FlagCreatePairsOff] = False
    """Also test the fits: the power law's p-value and its rivals, spikes against noise, and a shuffled copy."""
    bootstraps: Annotated[int, arg(metavar="N"), POSITIVE] = 100
    """With --statistics: number of random spectra for the power law's p-value; its standard error is at most 0.5 /
    sqrt(N)."""


@dataclass(frozen=True)
class Solving:
    """How spectra are computed."""

    solver: Literal["gram64", "svd"] = "gram64"
    """gram64: float64 Gram matrix with proven error bounds. svd: float64 SVD, the slow reference."""
    dtype: Literal["float64", "float32"] = "float64"
    """float32: a plain float32 SVD, to see what it loses."""
    svd_on_cpu: Annotated[bool, FlagCreatePairsOff] = False
    """Use the CPU even if there is a GPU."""


@dataclass(frozen=True)
class Files:
    """What is written."""

    full: Annotated[bool, FlagCreatePairsOff] = False
    """Save all singular values, and with --save-vectors all vectors, to <save-dir>/<model>_vectors.<format>."""
    save_vectors: Annotated[bool, FlagCreatePairsOff] = False
    """Save the recorded vectors there."""
    format: Literal["npz", "pt"] = "npz"
    """Format of the saved arrays."""
    save_dir: Annotated[Path | None, arg(metavar="DIR", help_behavior_hint="(default: no files are written)")] = None
    """Folder for the files, created if missing. Files of other checkpoints or weights are never replaced."""


@dataclass(frozen=True)
class Options:
    """Print spectra of weight matrices; --save-dir also writes them to <save-dir>/<model>_spectral.json."""

    source: Source = field(default_factory=Source)
    matrices: Matrices = field(default_factory=Matrices)
    solving: Solving = field(default_factory=Solving)
    files: Files = field(default_factory=Files)


def main(argv: list[str] | None = None) -> None:
    """Run the command with `argv` (default: the process's arguments).

    Raises:
        UserError: the weights cannot be read, a target matches nothing, flags contradict, or output cannot be written.
    """
    require_one_process("lowrank_vit.analyze_spectrum")
    argv = sys.argv[1:] if argv is None else argv
    options = read_options(Options, argv, usage_name("lowrank_vit.analyze_spectrum"))
    source = options.source
    if sum([bool(source.checkpoint), source.pretrained, bool(source.compare)]) != 1:
        raise UserError("Give one of --checkpoint FILE, --model NAME --pretrained, or --compare BEFORE AFTER.")
    if source.compare and options.matrices.statistics:
        raise UserError("--statistics is about one state of the weights; leave it out with --compare.")
    if source.compare and options.matrices.circuits != "none":
        raise UserError("--circuits is about one state of the weights; leave it out with --compare.")
    files = options.files
    if files.save_dir is None and (files.full or files.save_vectors):
        raise UserError(
            f"--{'full' if files.full else 'save-vectors'} saves arrays: give their folder with --save-dir."
        )
    check_versions()
    console = Console(highlight=False)
    if source.compare:
        _compare(options, source.compare, console)
    else:
        _analyze(options, console)


def _analyze(options: Options, console: Console) -> None:
    from lowrank_vit.spectral.analyze import arrays_of, as_json, free_stem, write_arrays, write_json
    from lowrank_vit.spectral.measures.circuits import as_arrays
    from lowrank_vit.spectral.measures.initial import warning_of
    from lowrank_vit.spectral.printed import print_analysis

    if options.source.checkpoint:
        weights, meta, made_with = _read(options, options.source.checkpoint)
    else:
        weights, meta, made_with = _fetch(options)
    analysis, name = _solve(options, weights, meta), meta["model"]
    if options.matrices.circuits != "none":
        analysis = replace(analysis, circuits=_circuits(options, weights, name, made_with))
    epoch = f"epoch {meta['epoch'] + 1}, " if meta["epoch"] >= 0 else ""
    say(f"{name}, {epoch}{'EMA' if options.source.use_ema else 'raw'} weights")
    if analysis.far_entries:
        say(f"warning: {warning_of(analysis.far_entries)}.")
    print_analysis(analysis, console)  # before files are written, which may fail
    files = options.files
    if files.save_dir is None:
        return
    stem = free_stem(files.save_dir, meta)
    path = files.save_dir / f"{stem}_spectral.json"
    write_json(as_json(analysis, meta | _settings(options)), path)
    output_is_in_files()
    say(f"wrote {path}")
    if analysis.circuits:
        path = files.save_dir / f"{stem}_circuits.npz"
        write_arrays(as_arrays(analysis.circuits, options.matrices.circuits), path)
        say(f"wrote {path}")
    if files.full or files.save_vectors:
        path = files.save_dir / f"{stem}_vectors.{files.format}"
        write_arrays(arrays_of(analysis, vectors=files.save_vectors, full=files.full), path)
        say(f"wrote {path}")


def _compare(options: Options, paths: tuple[Path, Path], console: Console) -> None:
    from lowrank_vit.spectral.analyze import compare, drift_as_json, write_json
    from lowrank_vit.spectral.printed import print_drift

    (before, old, _), (after, new, _) = (_read(options, path) for path in paths)
    drift = compare(_solve(options, before, old), _solve(options, after, new))
    meta = {"model": new["model"], "before": old, "after": new, **_settings(options)}
    content = drift_as_json(drift, meta | {"topk": options.matrices.topk, "interval": options.matrices.interval})
    weights = "EMA weights" if options.source.use_ema else "raw weights"
    epochs = f", epoch {old['epoch'] + 1} to {new['epoch'] + 1}" if min(old["epoch"], new["epoch"]) >= 0 else ""
    say(f"{new['model']}, {weights}{epochs}")
    print_drift(drift, console)
    if options.files.save_dir is not None:
        path = options.files.save_dir / f"{new['model']}_drift.json"
        write_json(content, path)
        output_is_in_files()
        say(f"wrote {path}")


def _solve(options: Options, state: dict[str, Tensor], meta: dict[str, Any]) -> Analysis:
    from lowrank_vit.common.devices import pick_device
    from lowrank_vit.common.resources import available_cores
    from lowrank_vit.spectral.analyze import analyze_weights, choose_weights
    from lowrank_vit.spectral.fused import is_named_qkv
    from lowrank_vit.spectral.watching.refresh import SpectralSettings

    matrices, solving = options.matrices, options.solving
    device = pick_device("cpu" if solving.svd_on_cpu else "auto")
    targets = None if matrices.targets == Matrices.targets else matrices.targets
    weights, fused = choose_weights(state, targets, matrices.split_qkv, device, meta["model"])
    if unknown := [name for name in weights if is_named_qkv(name) and name not in fused]:
        say(
            f"note: it is not known whether the rows of {unknown[0]} in {meta['model']} are Q, K and V, a third each: "
            "it is compared with noise as one matrix."
        )
    threads = available_cores()
    settings = SpectralSettings(matrices.topk, matrices.interval, solving.solver, solving.svd_on_cpu, threads)
    bootstraps = matrices.bootstraps if matrices.statistics else 0
    return analyze_weights(weights, settings, solving.dtype, bootstraps, fused, say_beside)


def _circuits(
    options: Options, state: dict[str, Tensor], name: str, made_with: dict[str, Any]
) -> dict[str, BlockCircuits]:
    """The circuits of each block. The weights do not tell the number of heads: the run's model is made to know it."""
    from timm import is_model

    from lowrank_vit.common.resources import available_cores
    from lowrank_vit.model.create import create_model, outline
    from lowrank_vit.spectral.heads import circuits_of_state

    if not is_model(name):
        raise UserError(f"--circuits: how many heads {name} has is not in the file. Give its timm name with --model.")
    model = outline(lambda: create_model(name, 0, say=lambda line: None, **made_with))
    return circuits_of_state(model, state, options.matrices.circuits, "--circuits", available_cores())


def _read(options: Options, path: Path) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """The weights, facts about them, and for --circuits the arguments that the run's model was made with."""
    from lowrank_vit.model.hub import find_model, is_of, source_of
    from lowrank_vit.model.weights import read_checkpoint

    checkpoint = read_checkpoint(path)
    own, given = re.sub(r"[^\w.:-]", "_", checkpoint.arch), options.source.model
    flags: dict[str, Any] = {}
    if source_of(given):
        is_own = is_of(given, str(checkpoint.args.get("model-from", "")))
        flags = {} if is_own else find_model(given).flags()
        given = own if is_own else flags["model"]
    if own and given and own != given:
        say(f"note: {path} says that its model is {own}, not --model {given}.")
    # A bare state dict does not tell its model.
    name = own or given or path.name.split(".")[0]
    meta = {"model": name, "checkpoint": str(path), "epoch": checkpoint.epoch, "use_ema": options.source.use_ema}
    made_with: dict[str, Any] = {}
    if options.matrices.circuits != "none":
        args = flags | {k: v for k, v in checkpoint.checked_args("model-kwargs", "img-size").items() if v is not None}
        made_with = {"model_kwargs": tuple(args.get("model-kwargs") or ()), "img_size": args.get("img-size")}
    return checkpoint.weights(options.source.use_ema), meta, made_with


def _fetch(options: Options) -> tuple[dict[str, Tensor], dict[str, Any], dict[str, Any]]:
    """As `_read`, for published weights."""
    from timm import is_model
    from timm.models import get_pretrained_cfg

    from lowrank_vit.model.create import create_model
    from lowrank_vit.model.hub import find_model, source_of

    name = options.source.model
    if not name:
        raise UserError("--pretrained: give the timm model's name too, e.g. --model vit_small_patch16_224.")
    if options.source.use_ema:
        raise UserError("--use-ema reads a checkpoint's averaged weights; leave it out with --pretrained.")
    meta = {"model": name, "checkpoint": "pretrained", "epoch": -1, "use_ema": False}
    if source_of(name):
        found = find_model(name)
        meta |= {"model": found.architecture, "checkpoint": found.source}
        flags = found.flags()
        made_with = {"model_kwargs": flags["model-kwargs"], "img_size": flags["img-size"]}
        return found.weights().weights(use_ema=False), meta, made_with
    published = get_pretrained_cfg(name) if is_model(name) else None
    num_classes = published.num_classes if published else 0  # with its own head there is none to replace
    try:
        model = create_model(name, num_classes, pretrained=True, say=lambda line: None)
    except UserError as error:
        raise UserError(str(error).replace("--pretrained-path FILE", "--checkpoint FILE")) from error
    return model.state_dict(), meta, {}


def _settings(options: Options) -> dict[str, Any]:
    import torch

    matrices, solving = options.matrices, options.solving
    chosen: dict[str, Any] = {"targets": matrices.targets, "split_qkv": matrices.split_qkv}
    if matrices.circuits != "none":
        chosen["circuits"] = matrices.circuits
    if matrices.statistics:
        chosen["bootstraps"] = matrices.bootstraps
    return chosen | {"solver": solving.solver, "dtype": solving.dtype, "torch": torch.__version__}


if __name__ == "__main__":
    exit_cleanly(main)
