"""Every flag of timm's train.py is ours or gets an answer, and docs/from_timm.md tells the truth about it."""

from __future__ import annotations

import dataclasses
import inspect
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import timm
import timm.data
import timm.optim
import timm.scheduler
import yaml

from lowrank_vit.common.errors import UserError
from lowrank_vit.config.flags import parse
from lowrank_vit.config.option_types import leaves
from lowrank_vit.config.options import Config
from lowrank_vit.config.timm_flags import FLAGS, HIDDEN, Holds, Instead, Renamed, answers

ROOT = Path(__file__).parents[3]
DOC = (ROOT / "docs" / "from_timm.md").read_text(encoding="utf-8")

OURS = {name: value for name, _, value in leaves(Config())}
TIMMS: dict[str, Any] = {
    name.replace("_", "-"): default
    for name, default in yaml.safe_load((Path(__file__).parent / "timm_train_flags.yaml").read_text()).items()
    if name != "data"  # which is --data-dir without its flag
}
SHARED = {name: default for name, default in TIMMS.items() if name in OURS}
"""Flags that are here too, with timm's defaults."""
OTHERS = {name: default for name, default in TIMMS.items() if name not in OURS}
"""The others, with timm's defaults."""
OLDER = "amp-impl native-amp apex-amp prefetcher".split()
"""Of earlier versions and of code derived from them."""
NEWER = ["task"]
"""Of its development branch."""
OF_DATA_CONFIG = "chans crop-mode test-input-size test-crop-pct".split()
"""Keys of timm's data configuration for which train.py has no flag."""
OTHER_NAMES = ["train-steps-per-epoch"]
"""Of flags under which args.yaml does not have them."""
OF_THE_LIBRARY = "lr-decay-fn lr-stable-timescale".split()
"""Options that timm's scheduler factory reads from the parsed flags."""

INSTEAD, HOLDS, RENAMED = answers("train", Instead), answers("train", Holds), answers("train", Renamed)
WITHOUT = (
    "--train-crop-mode whole --train-interpolation model --hflip 0 --vflip 0 --color-jitter 0 --aa none --reprob 0"
)


def test_every_flag_of_timm_is_ours_or_gets_an_answer_and_none_both():
    assert set(SHARED) <= set(OURS)
    answered = [*INSTEAD, *HOLDS, *RENAMED]
    assert len(answered) == len(set(answered))
    assert set(answered) == {*OTHERS, *OLDER, *NEWER, *OF_DATA_CONFIG, *OTHER_NAMES}
    assert not set(answered) & set(OURS)
    assert set(OF_THE_LIBRARY) <= set(OURS)
    aliases = {"--data", "--wd", "--data-dir", "--dr"}
    assert not {f"--{name}" for name in answered} & aliases
    assert set(HIDDEN) <= set(RENAMED)
    assert set(answered) == {name for name, flag in FLAGS.items() if flag.train}


@pytest.mark.parametrize("to_kwargs", [timm.optim.optimizer_kwargs, timm.scheduler.scheduler_kwargs])
def test_flags_that_the_installed_timm_reads_are_known(to_kwargs):
    read = set(re.findall(r"getattr\(cfg, '(\w+)'|cfg\.(\w+)", inspect.getsource(to_kwargs)))
    names = {(a or b).replace("_", "-") for a, b in read} - {"opt-args", "opt-foreach"}  # set by no flag
    assert len(names) >= 8
    assert names <= set(OURS) | set(INSTEAD)  # patience-epochs


def test_keys_of_the_installed_timms_data_configuration_are_known():
    source = inspect.getsource(timm.data.resolve_data_config)
    keys = {key.replace("_", "-") for key in re.findall(r"(?:args|pretrained_cfg)\.get\('(\w+)'", source)}
    assert {"input-size", "crop-pct", "interpolation", "crop-mode", "chans"} <= keys
    assert keys <= {*OURS, *INSTEAD, *HOLDS, *RENAMED}


def test_a_key_of_a_data_configuration_at_its_models_own_value_stops_no_run(tmp_path):
    path = tmp_path / "data.yaml"
    model = timm.create_model("vit_tiny_patch16_224")
    own = {key: list(v) if isinstance(v, tuple) else v for key, v in timm.data.resolve_data_config(model=model).items()}
    path.write_text(yaml.safe_dump(own | {"in_chans": 3, "chans": 3, "test_input_size": None, "config": ""}))
    data = parse(["--config", str(path)]).data
    assert (data.img_size, data.crop_pct, data.mean) == (224, 0.9, (0.5, 0.5, 0.5))


@pytest.mark.parametrize("name", [name for name, default in TIMMS.items() if default not in (None, False, "", [], {})])
def test_a_flag_at_timms_default_stops_no_run(name, tmp_path, capsys):
    default = TIMMS[name]
    values = [str(value) for value in default] if isinstance(default, list) else [str(default)]
    config = parse([f"--{name}", *values, "DIR"])
    assert config.data.data_dir == Path("DIR")
    if name in OTHERS:
        assert config == parse(["DIR"])
        assert f"nothing to do for --{name}" in capsys.readouterr().out
    path = tmp_path / "timm.yaml"
    path.write_text(yaml.safe_dump({name: default}))
    parse(["--config", str(path)])


@pytest.mark.parametrize("name", INSTEAD)
def test_typing_a_flag_that_is_not_here_is_one_line_with_the_way_out(name, tmp_path):
    for argv in ([f"--{name}"], [f"--{name}", "1"], [f"--{name}=1"], ["-b", "8", f"--{name.replace('-', '_')}", "x"]):
        with pytest.raises(UserError, match=rf"^--{name.replace('-', '[-_]')} is timm's; here: .+\.$") as caught:
            parse(argv)
        assert "\n" not in str(caught.value)
    path = tmp_path / "timm.yaml"
    path.write_text(f"{name.replace('-', '_')}: 1\n")
    if FLAGS[name].has_switch:
        parse(["--config", str(path)])
        return
    with pytest.raises(UserError, match=r"--config .*timm.yaml: `\w+` is timm's; here: "):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    "line",
    """--pin-mem;--prefetcher;--use-multi-epochs-loader;--channels-last;--amp-impl native
    --synchronize-step;--no-ddp-bb;--local-rank 3;--local_rank=3;--worker-seeding all;--dist-bn reduce;--dist-bn ''
    --fast-norm;--in-chans 3;--aug-splits 0;--interpolation bicubic""".replace("\n", ";").split(";"),
)
def test_flags_whose_effect_is_there_change_nothing_but_a_note(line: str, capsys):
    argv = shlex.split(line)
    assert parse([*argv, "DIR"]) == parse(["--epochs", "300", *argv, "--data-dir", "DIR"])
    assert parse([*argv]) == Config()
    assert capsys.readouterr().out.splitlines()[-1] == (
        f"note: nothing to do for {' '.join(argv).replace('=', ' ')}: this is always so here"
    )


def test_there_is_one_note_for_all_of_them_on_the_first_rank(monkeypatch, capsys):
    argv = shlex.split("--pin-mem --worker-seeding all --aug-splits 0")
    parse(argv)
    assert capsys.readouterr().out.count("note:") == 1
    monkeypatch.setenv("RANK", "1")
    parse(argv)
    assert not capsys.readouterr().out


@pytest.mark.parametrize(
    "line",
    [
        "--in-chans 1", "--amp-impl apex", "--aug-splits 2", "--bn-eps 0", "--color-jitter-prob 0",
        "--interpolation nearest", "--model-ema-force-cpu", "--recovery-interval 100", "--local-rank",
        "--torchcompile aot_eager", "--input-size 1 224 224", "--input-size 3 224 192", "--input-size 3 224",
        "--torchcompile-mode", "--sched plateau",
    ],
)  # fmt: skip
def test_what_would_change_results_is_refused(line, tmp_path):
    flag, *values = line.split()
    with pytest.raises(UserError, match=f"^{flag}") as caught:
        parse(line.split())
    assert re.search("here|not supported|needs a value", str(caught.value))
    path = tmp_path / "timm.yaml"
    numbers = [int(value) if value.isdecimal() else value for value in values]
    path.write_text(yaml.safe_dump({flag.strip("-"): numbers[0] if len(numbers) == 1 else numbers or True}))
    with pytest.raises(UserError, match=f"--config .*`{flag.strip('-')}`"):
        parse(["--config", str(path)])


@pytest.mark.parametrize(
    ("line", "ours"),
    [
        ("--torchcompile", "--compile"),
        ("--torchcompile inductor", "--compile"),
        ("--torchcompile=inductor --torchcompile-mode max-autotune", "--compile --compile-mode max-autotune"),
        ("--native-amp", "--amp"),
        ("--no-prefetcher", "--erase-first"),
        ("--drop-connect 0.2", "--drop-path 0.2"),
        ("--input-size 3 32 32 DIR", "--img-size 32 --data-dir DIR"),
        ("--gp avg", "--model-kwargs global_pool=avg"),
        ("--model-kwargs depth=2 --gp avg", "--model-kwargs depth=2 global_pool=avg"),
        ("--gp avg --model-kwargs global_pool=avg", "--model-kwargs global_pool=avg"),
        ("--dr 0.5", "--decay-rate 0.5"),
        (
            "--no-aug --aa rand-m9 --hflip 1 --vflip 1 --reprob 0.5 --mixup 0.8",
            f"{WITHOUT} --mixup 0.8",
        ),
        ("--no-aug --train-interpolation bilinear --scale 0.5 1", f"{WITHOUT} --scale 0.5 1"),
    ],
)
def test_flags_under_another_name(line, ours, tmp_path):
    assert parse(line.split()) == parse(ours.split())


def test_of_two_poolings_the_one_typed_wins_over_a_files(tmp_path):
    gp, kwargs = tmp_path / "gp.yaml", tmp_path / "kwargs.yaml"
    gp.write_text("gp: avg\nmodel-kwargs: {depth: 2}\n")
    kwargs.write_text("model-kwargs: {depth: 2, global_pool: max}\n")

    def pooling(*argv: str) -> tuple[str, ...]:
        return parse([*argv]).model.model_kwargs

    assert pooling("--config", str(gp)) == ("depth=2", "global_pool=avg")
    assert pooling("--config", str(gp), "--model-kwargs", "depth=3") == ("depth=3", "global_pool=avg")
    assert pooling("--config", str(gp), "--model-kwargs", "global_pool=max") == ("global_pool=max",)
    assert pooling("--config", str(kwargs), "--gp", "avg") == ("depth=2", "global_pool=avg")
    with pytest.raises(UserError, match="--gp avg and --model-kwargs global_pool=max differ"):
        pooling("--gp", "avg", "--model-kwargs", "global_pool=max")


def timms_yaml(tmp_path: Path, **changes: Any) -> Path:
    """What timm's train.py writes into args.yaml: every option under its name with underscores."""
    flat = {name.replace("-", "_"): value for name, value in {"data": None, **SHARED, **OTHERS}.items()} | changes
    path = tmp_path / "args.yaml"
    path.write_text(yaml.safe_dump(flat, default_flow_style=False))
    return path


def test_timms_own_args_yaml_is_a_config(tmp_path, capsys):
    path = timms_yaml(tmp_path, model="vit_base_patch16_224", lr=1e-4, device="cpu")
    config = parse(["--config", str(path), "--epochs", "10"])
    assert (config.model.model, config.optim.lr, config.optim.epochs) == ("vit_base_patch16_224", 1e-4, 10)
    ours = parse(shlex.split("--model vit_base_patch16_224 --lr 1e-4 --device cpu --amp-dtype float16 --epochs 10"))
    model = dataclasses.replace(ours.model, model_ema=False, model_ema_warmup=False)
    data, optim = dataclasses.replace(ours.data, workers=4), dataclasses.replace(ours.optim, decay_epochs=90)
    assert config == dataclasses.replace(ours, data=data, model=model, optim=optim)
    (note,) = capsys.readouterr().out.splitlines()
    assert re.fullmatch(rf"note: {path}: ignored \d+ timm options .* no-op values", note)


@pytest.mark.parametrize(
    ("key", "value"),
    [("aug_splits", 3), ("jsd_loss", True), ("kd_model_name", "vit_tiny"), ("bn_eps", 0.0)],
)
def test_an_option_of_timms_that_means_something_stays_an_error(key, value, tmp_path):
    with pytest.raises(UserError, match=rf"args.yaml: `{key}` is timm's; here: "):
        parse(["--config", str(timms_yaml(tmp_path, **{key: value}))])


def test_what_timms_args_yaml_asks_for_and_is_there_is_noted(tmp_path, capsys):
    parse(["--config", str(timms_yaml(tmp_path, pin_mem=True, channels_last=True)), "--no-ddp-bb"])
    said = capsys.readouterr().out
    assert "nothing to do for channels-last, pin-mem, --no-ddp-bb: this is always so here" in said


def test_timms_names_for_the_data_in_its_args_yaml(tmp_path):
    assert parse(["--config", str(timms_yaml(tmp_path, data="DIR"))]).data.data_dir == Path("DIR")
    assert parse(["--config", str(timms_yaml(tmp_path, data_dir="DIR"))]).data.data_dir == Path("DIR")


def test_what_to_use_instead_is_there():
    known = {f"--{name}" for name in OURS} | {f"--{name}" for name in ("classes", "preview")}  # of other commands
    for name, instead in INSTEAD.items():
        flags = set(re.findall(r"--[a-z][a-z-]*", instead))
        assert flags <= known, name
        assert flags or "leave it out" in instead, name


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
    config = parse(["--experiment", "gp", "--model-kwargs", "fuser=1"])
    assert (config.run.experiment, config.model.model_kwargs) == ("gp", ("fuser=1",))


def table(title: str) -> dict[str, list[str]]:
    """The rows below a heading of the document: the cells behind the first one by each flag in that."""
    section = DOC.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `--")]
    return {
        flag: [cell.strip() for cell in cells[1:]] for cells in rows for flag in re.findall(r"`--([\w-]+)`", cells[0])
    }


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
    assert {name: cells[0] for name, cells in table("Accepted, changes nothing").items()} == HOLDS
    assert {name: cells[0] for name, cells in table("Another name here").items()} == RENAMED


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
    return str(plain(value)) if plain(value) is not None else "not set"
