"""Wrong command lines of training: errors in one form that names the option; and paths in every command."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any, get_args

import pytest

from lowrank_vit import analyze_spectrum
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.command_line import read, read_options
from lowrank_vit.config.data_options import LoaderName
from lowrank_vit.config.flags import parse
from lowrank_vit.config.option_types import hints_of, kind_of, leaves
from lowrank_vit.config.options import Config
from lowrank_vit.lowrank.options import CompressOptions
from lowrank_vit.report.__main__ import Options as ReportOptions
from lowrank_vit.score.options import PredictOptions, ValidateOptions

ABOVE_0, WHOLE = "a number above 0", "a whole number of at least 1"
PAIR = "2 numbers above 0, up to 1"
SCHEDULES = "one of cosine, tanh, step, multistep, poly, wsd, rsqrt, constant, none"

LINES = {
    # numbers
    "--lr abc": f"--lr takes {ABOVE_0}, not `abc`.",
    "--lr=abc": f"--lr takes {ABOVE_0}, not `abc`.",
    "--lr": f"--lr takes {ABOVE_0}, and none is given.",
    "--lr=": f"--lr takes {ABOVE_0}, not an empty text.",
    "--lr --amp": f"--lr takes {ABOVE_0}, and none is given.",
    "--lr -1": f"--lr takes {ABOVE_0}, not `-1`.",
    "--lr 1,5": f"--lr takes {ABOVE_0}, not `1,5`.",
    "--lr nan": f"--lr takes {ABOVE_0}, not `nan`.",
    "--lr 1e400": f"--lr takes {ABOVE_0}, not `1e400`.",
    "--lr 0.1=2": f"--lr takes {ABOVE_0}, not `0.1=2`.",
    "--lr 1 --lr x": f"--lr takes {ABOVE_0}, not `x`.",
    "-lr abc": f"-lr takes {ABOVE_0}, not `abc`.",
    "--wd heavy": "--wd takes a number of at least 0, not `heavy`.",
    "--hflip 200": "--hflip takes a number from 0 to 1, not `200`.",
    "--mixup \u0663x": "--mixup takes a number of at least 0, not `\u0663x`.",
    "--epochs 3.5": f"--epochs takes {WHOLE}, not `3.5`.",
    "--epochs 1e3": f"--epochs takes {WHOLE}, not `1e3`.",
    "--epochs ''": f"--epochs takes {WHOLE}, not an empty text.",
    "--epochs 0": f"--epochs takes {WHOLE}, not `0`.",
    "-b": f"-b takes {WHOLE}, and none is given.",
    "-b x": f"-b takes {WHOLE}, not `x`.",
    "--workers -1": "--workers takes a whole number of at least 0, not `-1`.",
    "--img-size 30x30": f"--img-size takes {WHOLE}, not `30x30`.",
    # switches
    "--amp=false": "--amp takes no value: it is --amp or --no-amp, not `--amp=false`.",
    "--amp False": "--amp takes no value: it is --amp or --no-amp, not `--amp False`.",
    "--no-amp=true": "--amp takes no value: it is --amp or --no-amp, not `--no-amp=true`.",
    "--no_amp 1 DIR": "--amp takes no value: it is --amp or --no-amp, not `--no_amp 1`.",
    "--model-ema-warmup=True": "--model-ema-warmup takes no value: it is --model-ema-warmup or --no-model-ema-warmup, "
    "not `--model-ema-warmup=True`.",
    "--no-lr": "--no-lr is not an option: --lr is not a switch.",
    # choices
    "--sched cosin": f"--sched takes {SCHEDULES}, not `cosin`. Did you mean cosine?",
    "--sched COSINE": f"--sched takes {SCHEDULES}, not `COSINE`. Did you mean cosine?",
    "--sched": f"--sched takes {SCHEDULES}, and none is given.",
    "--sched=": f"--sched takes {SCHEDULES}, not an empty text.",
    "--tta 1": "--tta takes one of 0, 2, not `1`.",
    "--lr-base-scale quadratic": "--lr-base-scale takes one of linear, sqrt, not `quadratic`.",
    "--loader dally": f"--loader takes one of {', '.join(get_args(LoaderName))}, not `dally`. Did you mean dali?",
    # lists
    "--scale 0.5": f"--scale takes {PAIR}, not only `0.5`.",
    "--scale 0.5 2": f"--scale takes {PAIR}, not `2`.",
    "--scale a b": f"--scale takes {PAIR}, not `a b`.",
    "--scale": f"--scale takes {PAIR}, and none is given.",
    "--scale=0.1,1": f"--scale takes {PAIR}, not `0.1,1`.",
    "--mean": "--mean takes numbers from 0 to 1, and none is given.",
    "--mean red": "--mean takes numbers from 0 to 1, not `red`.",
    "--opt-betas 0.9": "--opt-betas takes 2 or more numbers from 0 to below 1, not only `0.9`.",
    "--opt-betas 0.9 1.5": "--opt-betas takes 2 or more numbers from 0 to below 1, not `1.5`.",
    "--decay-milestones 30,60": "--decay-milestones takes whole numbers of at least 1, not `30,60`.",
    "--model-kwargs depth": "--model-kwargs takes NAME=VALUE, e.g. patch_size=2, not `depth`.",
    # texts and paths
    "--experiment": "--experiment takes a text, and none is given.",
    "--experiment -x": "--experiment takes a text, and none is given.",
    "--experiment a/b": "--experiment takes a plain name, not `a/b`; --output is its parent folder.",
    "--device gpu": "--device takes auto, cpu, cuda or cuda:N, not `gpu`.",
    "--checkpoint-interval 5h": "--checkpoint-interval takes updates, e.g. 500, or minutes, e.g. 10m, above 0, "
    "not `5h`.",
    "--resume": "--resume takes a path, and none is given.",
    "--resume --amp": "--resume takes a path, and none is given.",
    "--data-dir $NOT_THERE/x": "--data-dir $NOT_THERE/x: there is no environment variable NOT_THERE. "
    "For a plain $ write $$.",
    "--output=${NOT_THERE}": "--output ${NOT_THERE}: there is no environment variable NOT_THERE. "
    "For a plain $ write $$.",
    "--output ~no-such-user/x": "--output ~no-such-user/x: there is no such user. For that very name write "
    "./~no-such-user/x.",
    "--config quickstrt": "--config quickstrt: No such file or directory. Did you mean quickstart?",
    "--config cifar100": "--config cifar100: No such file or directory. Did you mean cifar100_vit_base, "
    "cifar100_vit_small or cifar100_vit_small_lowrank?",
    "--config $NOT_THERE/a.yaml": "--config $NOT_THERE/a.yaml: there is no environment variable NOT_THERE. "
    "For a plain $ write $$.",
    # flags that are not there
    "--mixupp 0.8": "--mixupp is not an option. Did you mean --mixup?",
    "--LR 0.1": "--LR is not an option. Did you mean --lr?",
    "--batchsize 8": "--batchsize is not an option. Did you mean --batch-size?",
    "--warmup 3": "--warmup is not an option. Did you mean --warmup-lr, --warmup-epochs or --warmup-prefix?",
    "--no-amq": "--no-amq is not an option. Did you mean --no-amp?",
    "--unknown-thing": "--unknown-thing is not an option. --help lists all.",
    "--": "-- is not an option. --help lists all.",
    "-b0": "-b takes a whole number of at least 1, not `0`.",
    "-b8x": "-b takes a whole number of at least 1, not `8x`.",
    "-j": "-j takes a whole number of at least 0, and none is given.",
    "-bs 8": "-bs is not an option. --help lists all.",
    "'--lr 0.1'": "`--lr 0.1` is one word. Did you mean --lr=0.1?",
    "--lr:0.1": "`--lr:0.1` is one word. Did you mean --lr=0.1?",
    # words
    "lr 0.1": "`0.1` belongs to no option. Only --data-dir may come without its flag, and it is lr. Did you mean "
    "--lr 0.1?",
    "epochs=3": "`epochs=3` belongs to no option. Did you mean --epochs=3?",
    "--seed 0 1 2": "`1` belongs to no option, and no file or folder has that name. --seed takes one; several go to "
    "--seeds.",
    "DIR --seed 0 1": "`1` belongs to no option. Only --data-dir may come without its flag, and it is DIR. --seed "
    "takes one; several go to --seeds.",
    "--img-size 224 224": "`224` belongs to no option, and no file or folder has that name.",
    "--scale 0.1 0.2 0.3": "`0.3` belongs to no option, and no file or folder has that name.",
    "DIR OTHER": "`OTHER` belongs to no option. Only --data-dir may come without its flag, and it is DIR. --help "
    "lists all.",
    "\u2014lr 0.1": "\u2014lr begins with the long dash that text programs make of two: write --lr.",
    "\u2013amp": "\u2013amp begins with the long dash that text programs make of two: write --amp.",
    # timm's
    "--aug-splits 3": "--aug-splits is timm's; here: leave it out, there are no augmentation splits.",
    "--train-img-sizes 128 160": "--train-img-sizes is timm's; here: leave it out, training images are of one size, "
    "--img-size, and so are batches.",
}
"""Command lines of train, and what is said to them."""


@pytest.mark.parametrize("line", LINES)
def test_a_wrong_command_line_is_told_in_one_form(line: str, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("NOT_THERE", raising=False)
    with pytest.raises(UserError) as caught:
        parse(shlex.split(line))
    assert str(caught.value) == LINES[line]
    assert capsys.readouterr().out == ""


FILES = {
    "lr: abc": f"takes {ABOVE_0}, not `abc`.",
    "lr: ''": f"takes {ABOVE_0}, not an empty text.",
    "lr: [0.1]": f"takes {ABOVE_0}, not `[0.1]`.",
    "lr: {a: 1}": f"takes {ABOVE_0}, not `{{a: 1}}`.",
    "lr: true": f"takes {ABOVE_0}, not `true`.",
    "lr: .nan": f"takes {ABOVE_0}, not `nan`.",
    "lr: -1": f"takes {ABOVE_0}, not `-1`.",
    "epochs: 3.5": f"takes {WHOLE}, not `3.5`.",
    "epochs: 0": f"takes {WHOLE}, not `0`.",
    "epochs: yes": f"takes {WHOLE}, not `true`.",
    "amp: 'false'": "takes true or false, not `'false'`.",
    "amp: 0": "takes true or false, not `0`.",
    "amp: [true]": "takes true or false, not `[true]`.",
    "model-ema-warmup: maybe": "takes true or false, not `maybe`.",
    "sched: cosin": f"takes {SCHEDULES}, not `cosin`. Did you mean cosine?",
    "sched: no": f"takes {SCHEDULES}, not `false`.",
    "tta: 1": "takes one of 0, 2, not `1`.",
    "resume: [a]": "takes a path, not `[a]`.",
    "data-dir: $NOT_THERE/x": "$NOT_THERE/x: there is no environment variable NOT_THERE. For a plain $ write $$.",
    "scale: 0.1": f"takes {PAIR}, not only `0.1`.",
    "scale: [0.1, b]": f"takes {PAIR}, not `b`.",
    "scale: [0.1, 0.2, 0.3]": f"takes {PAIR}, not `0.1 0.2 0.3`.",
    "scale: []": f"takes {PAIR}, and none is given.",
    "mean: []": "takes numbers from 0 to 1, and none is given.",
    "wandb-tags: [1, true]": "takes texts, not `true`.",
    "experiment: {a: 1}": "takes a text, not `{a: 1}`.",
    "mixupp: 1": "is not an option. Did you mean mixup?",
    "Lr: 1": "is not an option. Did you mean lr?",
    "unknown_thing: 1": "is not an option. --help lists all.",
    "123: 4": "is not an option. --help lists all.",
    "aug_splits: 3": "is timm's; here: leave it out, there are no augmentation splits.",
}
"""Files, and what is said to the value of their key."""


@pytest.mark.parametrize("text", FILES)
def test_a_wrong_file_is_told_in_the_same_form_with_file_and_key(text: str, tmp_path, monkeypatch):
    monkeypatch.delenv("NOT_THERE", raising=False)
    path = tmp_path / "my.yaml"
    path.write_text(text + "\n")
    key, said = text.partition(":")[0], FILES[text]
    with pytest.raises(UserError) as caught:
        parse(["--config", str(path)])
    assert str(caught.value) == f"--config {path}: `{key}` {said}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("scale: [1, 0.5]", "--scale 1 0.5: the smaller number comes first."),
        ("experiment: a/b", "--experiment takes a plain name, not `a/b`"),
        ("device: tpu", "--device takes auto, cpu, cuda or cuda:N, not `tpu`"),
        ("model-kwargs: [depth]", "--model-kwargs takes NAME=VALUE"),
        ("checkpoint-interval: 5h", "--checkpoint-interval takes updates"),
    ],
)
def test_what_is_wrong_about_a_value_only_by_its_meaning_names_the_file_too(text: str, said, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(text + "\n")
    with pytest.raises(UserError, match=re.escape(said)) as caught:
        parse(["--config", str(path)])
    assert str(caught.value).endswith(f" `{text.partition(':')[0]}` is set in --config {path}.")


def test_the_last_of_several_counts():
    assert parse(shlex.split("--lr 1 --lr=2 --amp --no-amp --scale 0.1 0.2 --scale 0.3 0.4")).optim.lr == 2
    assert parse(shlex.split("--scale 0.1 0.2 --scale 0.3 0.4")).data.scale == (0.3, 0.4)


def test_a_flag_alone_may_mean_one_of_its_choices(tmp_path):
    """On a command line, behind it nothing or another flag; a file names the choice."""
    (tmp_path / "own.yaml").write_text("synthetic: true\nspec-circuits: folded\n")
    for line, expected in {
        "--spec-circuits": "raw",
        "--spec-circuits --amp": "raw",
        "--spec-circuits folded": "folded",
        "--spec-circuits=none": "none",
        "--amp": "none",
        f"--config {tmp_path}/own.yaml": "folded",
        f"--config {tmp_path}/own.yaml --spec-circuits": "raw",
    }.items():
        assert parse([*line.split(), "--synthetic", "--device", "cpu"]).spectra.spec_circuits == expected


def test_a_list_leaves_what_it_cannot_take_to_the_data_directory():
    config = parse("--model-kwargs depth=2 num_heads=2 DIR --opt-betas 0.9 0.95".split())
    assert (config.model.model_kwargs, config.data.data_dir) == (("depth=2", "num_heads=2"), Path("DIR"))


@pytest.mark.parametrize(
    ("options", "line", "expected"),
    [
        (Config, "-b32 -j8 -vb64 DIR", {"batch-size": 32, "workers": 8, "validation-batch-size": 64}),
        (ValidateOptions, "DIR -b32 -j 8", {"batch-size": 32, "workers": 8}),
        (ValidateOptions, "-mvit_tiny_patch16_224 -b=32", {"model": "vit_tiny_patch16_224", "batch-size": 32}),
        (PredictOptions, "-batch_size 32 -j8 a.jpg", {"batch-size": 32, "workers": 8}),
    ],
)
def test_a_short_flag_and_its_value_may_be_one_word(options: type, line: str, expected):
    values = read(
        line.split(), hints_of(options), [{Config: "data-dir", ValidateOptions: "data"}.get(options, "input")]
    )
    assert {name: values[name] for name in expected} == expected


# paths

COMMANDS: dict[str, Any] = {
    "train": Config,
    "validate": ValidateOptions,
    "inference": PredictOptions,
    "analyze_spectrum": analyze_spectrum.Options,
    "compress": CompressOptions,
    "report": ReportOptions,
}
PATHS = [
    (command, name)
    for command, options in COMMANDS.items()
    for name, hint in hints_of(options).items()
    if kind_of(hint).element is Path
]


def test_every_command_has_options_for_paths():
    assert {command for command, _ in PATHS} == set(COMMANDS)
    assert len(PATHS) >= 20


@pytest.mark.parametrize(("command", "name"), PATHS)
@pytest.mark.parametrize("text", ["~/x", "$PLACE/x", "${PLACE}/x"])
def test_tilde_and_variables_mean_the_same_everywhere(command, name, text, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PLACE", str(tmp_path))
    hints = hints_of(COMMANDS[command])
    kind, place = kind_of(hints[name]), tmp_path / "x"
    texts = [text] * (kind.count or 1)
    expected = (place,) * len(texts) if kind.is_tuple else place
    assert read([f"--{name}", *texts], hints)[name] == expected
    if len(texts) == 1:
        assert read([f"--{name}={text}"], hints)[name] == expected
        assert read([text], hints, [name])[name] == expected
    if command == "train":
        path = tmp_path / "my.yaml"
        path.write_text(f"{name}: {text}\n")
        for argv in (["--config", str(path)], ["--config=~/my.yaml"], ["--config", "$PLACE/my.yaml"]):
            assert {n: v for n, _, v in leaves(parse(argv))}[name] == place


def test_a_file_that_is_called_so_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/elsewhere")
    for name in ("~", "$HOME.png", "price$.png", "$NOT_THERE"):
        Path(name).touch()
        options = read_options(PredictOptions, [name], "inference", word="input")
        assert options.input == (Path(name),)
    assert read_options(PredictOptions, ["new$.png"], "inference", word="input").input == (Path("new$.png"),)


def test_two_dollars_are_the_character(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PLACE", "/x$y")
    options = read_options(PredictOptions, ["$$PLACE", "$PLACE/$${a}$$"], "inference", word="input")
    assert options.input == (Path("$PLACE"), Path("/x$y/${a}$"))


def test_an_empty_path_is_none(monkeypatch):
    for argv in ([""], ["--input", ""], ["--input="], ["", ""]):
        assert read_options(PredictOptions, argv, "inference", word="input").input == ()
    assert read_options(PredictOptions, ["", "a.jpg"], "inference", word="input").input == (Path("a.jpg"),)
    with pytest.raises(UserError, match="--compare takes 2 paths, not only `b`"):
        read_options(analyze_spectrum.Options, ["--compare", "", "b"], "analyze-spectrum")
