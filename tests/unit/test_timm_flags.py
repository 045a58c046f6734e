"""Every flag of timm's train.py is ours or gets an answer, and docs/from_timm.md tells the truth about it."""

from __future__ import annotations

import inspect
import re
from pathlib import Path
from typing import Any

import pytest
import timm.optim
import timm.scheduler

from data_prep.errors import UserError
from lowrank_vit.config import leaves, parse
from lowrank_vit.options import Config
from lowrank_vit.timm_flags import INSTEAD, check_flags

ROOT = Path(__file__).parents[2]
DOC = (ROOT / "docs" / "from_timm.md").read_text(encoding="utf-8")

# The parser of timm's train.py, read at huggingface/pytorch-image-models commit 7dff2940671f (there named
# legacy_train.py), and the distillation flags (--kd-..., --...-loss-weight) that train.py has had since.
SHARED: dict[str, Any] = {
    "data-dir": None, "dataset": "", "train-split": "train", "val-split": "validation", "dataset-download": False,
    "model": "resnet50", "pretrained": False, "pretrained-path": None, "initial-checkpoint": "", "resume": "",
    "num-classes": None, "img-size": None, "crop-pct": None, "batch-size": 128, "validation-batch-size": None,
    "grad-accum-steps": 1, "grad-checkpointing": False, "model-kwargs": {}, "device": "cuda", "amp": False,
    "amp-dtype": "float16", "opt": "sgd", "opt-eps": None, "opt-betas": None, "momentum": 0.9, "weight-decay": 2e-5,
    "clip-grad": None, "clip-mode": "norm", "layer-decay": None, "sched": "cosine", "sched-on-updates": False,
    "lr": None, "lr-base": 0.1, "lr-base-size": 256, "lr-base-scale": "", "warmup-lr": 1e-5, "min-lr": 0,
    "epochs": 300, "warmup-epochs": 5, "cooldown-epochs": 0, "scale": [0.08, 1.0], "ratio": [3 / 4, 4 / 3],
    "hflip": 0.5, "vflip": 0.0, "color-jitter": 0.4, "aa": None, "bce-loss": False, "bce-sum": False,
    "bce-target-thresh": None, "reprob": 0.0, "remode": "pixel", "recount": 1, "resplit": False, "mixup": 0.0,
    "cutmix": 0.0, "cutmix-minmax": None, "mixup-prob": 1.0, "mixup-switch-prob": 0.5, "mixup-mode": "batch",
    "mixup-off-epoch": 0, "smoothing": 0.1, "train-interpolation": "random", "drop": 0.0, "drop-path": None,
    "model-ema": False, "model-ema-decay": 0.9998, "model-ema-warmup": False, "seed": 42, "log-interval": 50,
    "val-interval": 1, "checkpoint-hist": 10, "workers": 4, "output": "", "experiment": "", "eval-metric": "top1",
    "tta": 0, "log-wandb": False, "wandb-project": None, "wandb-tags": [], "wandb-resume-id": "",
}  # fmt: skip
"""Flags that are here too, with timm's defaults."""
OTHERS = """
train-num-samples val-num-samples class-map input-img-mode input-key target-key dataset-trust-remote-code no-resume-opt
gp in-chans input-size mean std interpolation channels-last fuser fast-norm head-init-scale head-init-bias
torchcompile-mode torchscript torchcompile model-dtype no-ddp-bb synchronize-step local-rank device-modules
layer-decay-min-scale layer-decay-no-opt-scale opt-kwargs lr-noise lr-noise-pct lr-noise-std lr-cycle-mul
lr-cycle-decay lr-cycle-limit lr-k-decay epoch-repeats start-epoch decay-milestones decay-epochs warmup-prefix
patience-epochs decay-rate dr no-aug train-crop-mode color-jitter-prob grayscale-prob gaussian-blur-prob aug-repeats
aug-splits jsd-loss bce-pos-weight drop-connect drop-block bn-momentum bn-eps sync-bn dist-bn split-bn
model-ema-force-cpu worker-seeding recovery-interval save-images pin-mem no-prefetcher use-multi-epochs-loader
naflex-loader naflex-train-seq-lens naflex-max-seq-len naflex-patch-sizes naflex-patch-size-probs naflex-loss-scale
kd-model-name kd-distill-type kd-loss-type distill-loss-weight task-loss-weight kd-temperature kd-student-feature-dim
kd-teacher-feature-dim kd-token-distill-type
""".split()
OLDER = "amp-impl native-amp apex-amp prefetcher".split()
"""Of earlier versions and of code derived from them."""
OF_THE_LIBRARY = "lr-decay-fn lr-stable-timescale".split()
"""Options that timm's scheduler factory reads from the parsed flags."""

OURS = {name: value for name, _, value in leaves(Config())}


def test_every_flag_of_timm_is_ours_or_gets_an_answer_and_none_both():
    assert set(SHARED) <= set(OURS)
    assert set(INSTEAD) == set(OTHERS) | set(OLDER) | set(OF_THE_LIBRARY)
    assert not set(INSTEAD) & set(OURS)
    aliases = {"--data", "--wd", "--data-dir"}
    assert not {f"--{name}" for name in INSTEAD} & aliases


@pytest.mark.parametrize("to_kwargs", [timm.optim.optimizer_kwargs, timm.scheduler.scheduler_kwargs])
def test_flags_that_the_installed_timm_reads_are_known(to_kwargs):
    read = set(re.findall(r"getattr\(cfg, '(\w+)'|cfg\.(\w+)", inspect.getsource(to_kwargs)))
    names = {(a or b).replace("_", "-") for a, b in read} - {"opt-args", "opt-foreach"}  # set by no flag
    assert len(names) >= 8
    assert names <= set(OURS) | set(INSTEAD)


@pytest.mark.parametrize("name", [*OTHERS, *OLDER, *OF_THE_LIBRARY])
def test_typing_a_flag_that_is_not_here_is_one_line_with_the_way_out(name, tmp_path):
    for argv in ([f"--{name}"], [f"--{name}", "1"], [f"--{name}=1"], ["-b", "8", f"--{name.replace('-', '_')}", "x"]):
        with pytest.raises(UserError, match=rf"^--{name.replace('-', '[-_]')} is timm's; here: .+\.$") as caught:
            parse(argv)
        assert "\n" not in str(caught.value)
    path = tmp_path / "timm.yaml"
    path.write_text(f"{name.replace('-', '_')}: 1\n")
    with pytest.raises(UserError, match=r"--config .*timm.yaml: `\w+` is timm's; here: "):
        parse(["--config", str(path)])


def test_what_to_use_instead_is_there():
    known = {f"--{name}" for name in OURS} | {f"--{name}" for name in ("classes", "preview")}  # of other commands
    for name, instead in INSTEAD.items():
        flags = set(re.findall(r"--[a-z][a-z-]*", instead))
        assert flags <= known, name
        assert flags or "leave it out" in instead, name


def test_the_way_out_of_no_aug_parses():
    config = parse(INSTEAD["no-aug"].split())
    assert (config.data.scale, config.data.ratio, config.data.hflip) == ((1, 1), (1, 1), 0)
    assert config.augment.color_jitter == (0,)


@pytest.mark.parametrize(
    "line",
    ["-c FILE -d digits -b 8 -vb 4 -j 2 --wd 0.1", "-c=FILE -d=digits -b=8 -vb=4 -j=2 --wd=0.1"],
)
def test_short_forms(line, tmp_path):
    path = tmp_path / "c.yaml"
    path.write_text("epochs: 7\n")
    config = parse(line.replace("FILE", str(path)).split())
    assert (config.data.dataset, config.data.batch_size, config.data.validation_batch_size) == ("digits", 8, 4)
    assert (config.data.workers, config.optim.weight_decay, config.optim.epochs) == (2, 0.1, 7)


def test_underscores_are_dashes():
    config = parse(["--data_dir", "x", "--batch_size", "8", "--no_model_ema"])
    assert (config.data.data_dir, config.data.batch_size, config.model.model_ema) == (Path("x"), 8, False)


def test_values_are_not_taken_for_flags():
    check_flags(["--experiment", "gp", "--model-kwargs", "fuser=1"])


def table(title: str) -> dict[str, list[str]]:
    """The rows below a heading of the document: the cells behind the first one by the flag in that."""
    section = DOC.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `--")]
    return {cells[0].strip(" `-"): [cell.strip() for cell in cells[1:]] for cells in rows}


def listed(title: str) -> list[str]:
    section = DOC.split(f"## {title}\n")[1].split("\n## ")[0]
    return re.findall(r"`--([a-z0-9-]+)`", section)


def test_the_document_sorts_all_flags():
    same, differs = listed("Same meaning"), table("Same name, some difference")
    assert len(same) == len(set(same))
    assert set(same) | set(differs) == set(SHARED)
    assert not set(same) & set(differs)
    only_here = listed("Only here")
    assert len(only_here) == len(set(only_here))
    assert set(only_here) == set(OURS) - set(SHARED)


def test_the_documents_answers_are_the_programs():
    assert {name: cells[0] for name, cells in table("Not here").items()} == INSTEAD


def plain(value: Any) -> Any:
    """One spelling of a default: nothing is None, a tuple is its list, one number alone is itself."""
    if isinstance(value, tuple | list):
        return plain(value[0]) if len(value) == 1 else [plain(item) for item in value] or None
    if isinstance(value, dict):
        return value or None
    if isinstance(value, Path):
        return str(value)
    return None if value == "" or value == "none" else value


def test_the_document_lists_the_defaults_that_differ(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    ours = {name: value for name, _, value in leaves(Config())}
    other = {name for name, default in SHARED.items() if plain(ours[name]) != plain(default)}
    listed_defaults = table("Other defaults")
    assert set(listed_defaults) == other
    for name, (theirs, here, *_) in listed_defaults.items():
        assert theirs.strip("`") == in_words(SHARED[name]), name
        assert here.strip("`") == in_words(ours[name]), name


def in_words(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    return str(plain(value)) if plain(value) is not None else "nothing"
