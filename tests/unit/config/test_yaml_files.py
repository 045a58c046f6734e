"""Options in YAML files: how they are read, the round trip through args.yaml, and the published files."""

from __future__ import annotations

import dataclasses
import shlex
from pathlib import Path

import pytest
import yaml

from lowrank_vit.common.errors import UserError
from lowrank_vit.config import meaning
from lowrank_vit.config.flags import parse, to_yaml
from lowrank_vit.config.low_rank_options import parse_schedule
from lowrank_vit.config.option_types import leaves
from lowrank_vit.config.options import Config
from tests.unit.config.test_flags import FLAGS

LOWRANK = "_lowrank"
CONFIGS = sorted((Path(__file__).parents[3] / "configs").glob("*.yaml"))


def test_yaml_comes_first_and_the_command_line_wins(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(
        "lr: 1e-3\nepochs: 7\nspec-monitor: true\nmodel_kwargs: {depth: 2, embed_dim: 32}\nscale: [0.5, 1]\n"
    )
    for argv in (["--epochs", "9", "--config", str(path)], [f"--config={path}", "--epochs", "9"]):
        config = parse(argv)
        assert config.optim.lr == 1e-3  # a string to YAML 1.1
        assert config.optim.epochs == 9
        assert config.spectra.spec_monitor
        assert config.model.model_kwargs == ("depth=2", "embed_dim=32")
        assert config.data.scale == (0.5, 1.0)


def test_args_yaml_repeats_the_configuration(tmp_path):
    argv = shlex.split("-b 3 --model-kwargs a=1 b=x --opt-betas 0.9 0.95 --no-compile --output x --lr 1e-5")
    config = parse(argv)
    (tmp_path / "args.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "args.yaml")]) == config


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("mixupp: 0.8", r"`mixupp` is not an option. Did you mean mixup\?"),
        ("amp: 1", "`amp` takes true or false, not `1`"),
        ("epochs: true", "`epochs` takes a whole number of at least 1, not `true`"),
        ("- epochs", "must be a flat mapping"),
        ("epochs: [", "not valid YAML"),
        ("lr: 1\nepochs: 3\nlr: 2", "not valid YAML: .*`lr` is given twice"),
        ("model-kwargs: {depth: 1, depth: 2}", "not valid YAML: .*`depth` is given twice"),
        ("batch_size: 8\nbatch-size: 8", "`batch-size` and `batch_size` are the same option"),
        ("lr: [1, 2]", r"`lr` takes a number above 0, not `\[1, 2\]`"),
        ("experiment: [a]", r"`experiment` takes a text, not `\[a\]`"),
        ("experiment: {a: 1}", "`experiment` takes a text, not `{a: 1}`"),
        ("scale: {a: 1}", "`scale` takes 2 numbers above 0, up to 1, not `{a: 1}`"),
        ("scale: [0.1, 0.5, DIR]", "`scale` takes 2 numbers above 0, up to 1, not `DIR`"),
        ("scale: [0.1, 0.5, 1]", "`scale` takes 2 numbers above 0, up to 1, not `0.1 0.5 1`"),
        ("scale: 0.5", "`scale` takes 2 numbers above 0, up to 1, not only `0.5`"),
        ("scale: [0.1, null]", "`scale` takes 2 numbers above 0, up to 1, not `null`"),
        ("scale: [0.5, 0.1]", "--scale 0.5 0.1: the smaller number comes first. `scale` is set in --config"),
        ("opt-betas: [0.9]", "`opt-betas` takes 2 or more numbers from 0 to below 1, not only `0.9`"),
        (
            "model-kwargs: {--lr: 3}",
            "--model-kwargs takes NAME=VALUE.*, not `--lr=3`. `model-kwargs` is set in --config",
        ),
        ("model-kwargs: {img_size: 1, -b: 3}", "--model-kwargs takes NAME=VALUE, e.g. patch_size=2, not `-b=3`"),
        ("img-size: x", "`img-size` takes a whole number of at least 1, not `x`"),
        ("weight-decai: 1", r"Did you mean weight-decay\?"),
        ("data: a\ndata_dir: b", "`data_dir` and `data` are the same option"),
        ("sched: plateau", "`sched`: plateau is not supported"),
    ],
)
def test_bad_yaml_names_file_and_key(tmp_path, line, message):
    path = tmp_path / "bad.yaml"
    path.write_text(line + "\n")
    with pytest.raises(UserError, match=message) as caught:
        parse(["--config", str(path)])
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        {"experiment": "--no-amp"},
        {"experiment": "-b"},
        {"experiment": "a b"},
        {"wandb-project": "--epochs=1"},
        {"wandb-resume-id": "-"},
        {"spec-targets": "-1"},
        {"wandb-tags": ["a", "--no-amp"]},
        {"model-kwargs": {"a": "--lr 3"}},
        {"model-kwargs": ["a=1"]},
        {"opt-kwargs": {}},
    ],
)
def test_nothing_in_a_file_becomes_another_flag_or_the_data_directory(content, tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text(yaml.safe_dump(content))
    config = parse(["--config", str(path)])
    ((name, value),) = content.items()
    if isinstance(value, dict):
        value = [f"{k}={v}" for k, v in value.items()]
    changed = {n: v for n, _, v in leaves(config) if v != {n: v for n, _, v in leaves(Config())}[n]}
    assert changed == ({name: tuple(value) if isinstance(value, list) else value} if value else {})
    assert parse(["DIR", "--config", str(path)]).data.data_dir == Path("DIR")  # right behind the file's own values


def test_names_in_a_file_may_be_aliases(tmp_path):
    path = tmp_path / "a.yaml"
    path.write_text("data: x\nb: 8\nvb: 4\nj: 2\nwd: 0.1\ndr: 0.5\n")
    config = parse(["--config", str(path)])
    assert config == parse(shlex.split("--data-dir x -b 8 -vb 4 -j 2 --wd 0.1 --dr 0.5"))


def test_null_in_a_file_means_the_default(tmp_path):
    path, other = tmp_path / "a.yaml", tmp_path / "b.yaml"
    nulls = "".join(f"{name}: null\n" for name in [*FLAGS, "gp", "no-aug", "data", "wd"])
    path.write_text(f"{meaning.KEY}: {meaning.now()}\n{nulls}")
    assert parse(["--config", str(path)]) == parse([])
    other.write_text("epochs: 7\nmodel-kwargs: {depth: 2}\n")
    assert parse(["--config", str(other), "--config", str(path)]) == parse([])


@pytest.mark.parametrize(
    "name", "resume initial-checkpoint pretrained-path data-dir beton-dir stage-dir compile-cache output".split()
)
def test_an_empty_text_for_a_path_means_that_none_is_given(name, tmp_path):
    assert parse([f"--{name}", ""]) == parse([f"--{name}="]) == Config()
    assert parse([f"--{name}", "", "DIR"]).data.data_dir == Path("DIR")
    path = tmp_path / "a.yaml"
    path.write_text(f'{name}: ""\n')
    assert parse(["--config", str(path)]) == Config()
    if name != "output":
        path.write_text(f"{name}: x\n")
        assert parse(["--config", str(path), f"--{name}="]) == Config()


def test_missing_yaml_lists_its_neighbours(tmp_path):
    (tmp_path / "there.yaml").write_text("epochs: 1\n")
    with pytest.raises(UserError, match=r"absent.yaml: No such file.*there.yaml"):
        parse(["--config", str(tmp_path / "absent.yaml")])
    with pytest.raises(UserError, match="--config needs a file"):
        parse(["--config"])


@pytest.mark.parametrize("path", CONFIGS, ids=[path.stem for path in CONFIGS])
def test_every_config_file_parses(path):
    """The published recipes name augmentation that is still to come; without it they are complete."""
    config = parse(["--config", str(path)])
    keys = set(yaml.safe_load(path.read_text()))
    assert keys <= set(FLAGS)
    assert dataclasses.is_dataclass(config)


def test_the_pair_of_optimizers_differs_in_nothing_else():
    adamw, muon = (yaml.safe_load((CONFIGS[0].parent / f"quickstart{end}.yaml").read_text()) for end in ("", "_muon"))
    assert {key for key in adamw | muon if adamw.get(key) != muon.get(key)} == {"opt"}
    assert (adamw["opt"], muon["opt"]) == ("adamw", "muon")


def test_recipes_that_become_low_rank_differ_from_others_in_nothing_else():
    found = [path for path in CONFIGS if path.stem.endswith(LOWRANK)]
    assert {path.stem.partition("_")[0] for path in found} == {"quickstart", "cifar100", "imagenet100", "imagenet1k"}
    for path in found:
        whole = yaml.safe_load(path.with_stem(path.stem.removesuffix(LOWRANK)).read_text())
        flat = yaml.safe_load(path.read_text())
        assert {key: value for key, value in flat.items() if not key.startswith("lowrank-")} == whole
        low_rank = parse(["--config", str(path)]).lowrank
        assert low_rank.lowrank_train == "kfac"
        scheduled = {"quickstart": {8: 0.15}, "imagenet1k": {50: 0.25}}
        assert parse_schedule(low_rank.lowrank_schedule) == scheduled.get(path.stem.partition("_")[0], {})


def test_six_published_recipes():
    published = {
        path.stem: yaml.safe_load(path.read_text())
        for path in CONFIGS
        if not path.stem.startswith("quickstart") and not path.stem.endswith(LOWRANK)
    }
    assert len(published) == 6
    for name, flat in published.items():
        base = "base" in name
        assert flat["epochs"] == 300
        assert (flat["batch-size"], float(flat["lr"])) == ((64, 3e-4) if base else (128, 5e-4))
        assert flat["aa"] == "rand-m9-mstd0.5-inc1"
        assert flat["drop-path"] == (0.1 if not base else 0.3 if "imagenet1k" in name else 0.2)
        assert flat.get("layer-decay") == (0.65 if name == "imagenet1k_vit_base" else None)


def test_a_recipe_can_be_measured_without_its_data(tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text("dataset: digits\ndata-dir: data/digits\n")
    config = parse(["--config", str(path), "--synthetic"])
    assert config.data.synthetic
    (tmp_path / "args.yaml").write_text(to_yaml(config))
    assert parse(["--config", str(tmp_path / "args.yaml")]) == config


def test_a_wrong_type_in_a_file_names_the_file(tmp_path):
    good, bad = tmp_path / "good.yaml", tmp_path / "bad.yaml"
    good.write_text("epochs: 3\n")
    bad.write_text("epochs: fast\n")
    with pytest.raises(UserError, match=f"^--config {bad}: `epochs` takes a whole number"):
        parse(["--config", str(good), "--config", str(bad)])
    with pytest.raises(UserError, match=r"^--epochs takes a whole number"):
        parse(["--config", str(good), "--epochs", "fast"])


def test_merge_keys_of_yaml_work(tmp_path):
    path = tmp_path / "merge.yaml"
    path.write_text("model-kwargs: {<<: {depth: 2}, embed_dim: 32}\n")
    assert set(parse(["--config", str(path)]).model.model_kwargs) == {"depth=2", "embed_dim=32"}
