"""Every flag of timm's validate.py and inference.py is ours, taken without a use, or answered; the document agrees."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from lowrank_vit import inference, validate
from lowrank_vit.common.errors import UserError
from lowrank_vit.config.command_line import read_options
from lowrank_vit.config.timm_flags import Instead, Unused, answers
from lowrank_vit.config.timm_line import fit_flags
from lowrank_vit.score.options import PredictOptions, ValidateOptions

DOC = (Path(__file__).parents[3] / "docs" / "from_timm.md").read_text(encoding="utf-8")
# The parsers of timm's scripts, read at huggingface/pytorch-image-models commit 0041cb7ba4ab.
SHARED = """
data-dir model workers batch-size img-size in-chans input-size use-train-size crop-pct crop-mode mean std interpolation
num-classes class-map log-freq checkpoint pretrained num-gpu test-pool channels-last device amp amp-dtype model-dtype
fuser model-kwargs torchcompile-mode torchscript torchcompile aot-autograd dataset split results-file results-format
""".split()
VALIDATE = """
num-samples dataset-download input-key input-img-mode target-key dataset-trust-remote-code crop-border-pixels gp
no-prefetcher pin-mem tf-preprocessing use-ema fast-norm reparam real-labels valid-labels retry seed metrics-avg
naflex-loader naflex-max-seq-len
""".split()
INFERENCE = """
results-dir results-separate-col topk fullname filename-col index-col label-col output-col output-type label-type
include-index exclude-output no-console-results
""".split()
COMMANDS = {
    "validate": (ValidateOptions, answers("validate", Instead), answers("validate", Unused), {*SHARED, *VALIDATE}),
    "inference": (
        PredictOptions,
        answers("inference", Instead),
        answers("inference", Unused),
        {*SHARED, *INFERENCE},
    ),
}
REWRITTEN = {"data-dir", "input-size", "num-gpu"}
EARLIER = {"device-modules"}
"""Of other versions of timm."""


@pytest.mark.parametrize("command", COMMANDS)
def test_every_flag_of_timm_is_known_in_one_way(command):
    options, instead, unused, theirs = COMMANDS[command]
    ours = {field.name.replace("_", "-") for field in dataclasses.fields(options)}
    assert theirs | EARLIER <= ours | set(instead) | set(unused) | REWRITTEN
    assert set(instead) | set(unused) <= theirs | EARLIER
    assert not ours & (set(instead) | set(unused))
    assert not set(instead) & set(unused)
    for answer in instead.values():
        flags = set(re.findall(r"--[a-z][a-z-]*", answer))
        assert flags <= {f"--{name}" for name in ours}
        assert flags or "leave it out" in answer


@pytest.mark.parametrize("command", COMMANDS)
def test_an_answer_is_one_line(command):
    module = {"validate": validate, "inference": inference}[command]
    for name in COMMANDS[command][1]:
        with pytest.raises(UserError, match=rf"^--{name} is timm's; here: .+\.$"):
            module.main([f"--{name}", "1", "--checkpoint", "x"])


@pytest.mark.parametrize("command", COMMANDS)
def test_the_document_says_the_same(command):
    section = DOC.split(f"## {command}.py\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("| `--")]
    answered = {flag: cells[1].strip() for cells in rows for flag in re.findall(r"`--([\w-]+)`", cells[0])}
    assert answered == COMMANDS[command][1]
    (line,) = (line for line in section.split("\n\n") if line.startswith("Accepted, without effect"))
    assert set(re.findall(r"`--([a-z-]+)", line)) == {*COMMANDS[command][2], "num-gpu"}


def test_flags_without_effect_go_with_their_values():
    said: list[str] = []
    line = (
        "photos --channels-last --log-freq 10 --no-prefetcher --pin_mem --fuser te --torchcompile --num-gpu 1 -b 8 "
        "--torchcompile inductor --torchcompile-mode=default --input-size 3 96 96 --seed 1"
    )
    assert fit_flags(line.split(), "validate", said.append).tokens == "photos -b 8 --img-size=96".split()
    (note,) = said
    assert note.startswith("note: --channels-last, --log-freq, --no-prefetcher, --pin_mem, --fuser")
    assert note.endswith("change nothing here")
    assert fit_flags(["-b", "8"], "validate", said.append).tokens == ["-b", "8"]
    assert len(said) == 1


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--input-size 1 28 28", "images are RGB and square"),
        ("--input-size 3 224 196", "images are RGB and square"),
        ("--input-size 3", "images are RGB and square"),
        ("--num-gpu 2", "one GPU scores"),
        ("--num-gpu", "one GPU scores"),
    ],
)
def test_what_cannot_be_done(line, message):
    (error,) = fit_flags(line.split(), "validate", print).refused
    assert message in str(error)


@pytest.mark.parametrize(
    "line",
    [
        "a.jpg b --checkpoint F --use-ema",
        "--checkpoint F --use-ema a.jpg b",
        "--checkpoint F a.jpg --use-ema b",
        "--input a.jpg b --checkpoint F --use-ema",
        "--data-dir=a.jpg --checkpoint F --use-ema b",
        "--data_dir a.jpg b --checkpoint F --use-ema",
    ],
)
def test_images_may_stand_anywhere(line):
    options = read_options(PredictOptions, line.split(), "inference", word="input")
    assert set(options.input) == {Path("a.jpg"), Path("b")}
    assert (options.checkpoint, options.use_ema) == (Path("F"), True)


def test_values_are_not_taken_for_images():
    line = (
        "-m vit --model-kwargs depth=1 num_heads=2 x.png --mean 0.5 0.5 0.5 y.png -b 8 --topk=3 z.png --no-amp w.png "
        "--results-format csv json v.png"
    )
    options = read_options(PredictOptions, line.split(), "inference", word="input")
    assert [str(path) for path in options.input] == "x.png y.png z.png w.png v.png".split()
    assert (options.model, options.model_kwargs, options.mean) == ("vit", ("depth=1", "num_heads=2"), (0.5, 0.5, 0.5))
    assert (options.batch_size, options.topk, options.results_format) == (8, 3, ("csv", "json"))
