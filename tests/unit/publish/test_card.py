"""The card's texts: nothing private, nothing that Markdown or HTML would take for its own."""

from __future__ import annotations

import shlex

import pytest

from lowrank_vit.config.flags import parse
from lowrank_vit.config.option_types import leaves
from lowrank_vit.publish.card import code, command, fenced, plain, private


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("/home/ann/data/digits", "digits"),
        ("~/models/x", "x"),
        ("local-dir:/home/ann/model", "local-dir:model"),
        ("hf-hub:timm/vit@0123456789abcdef0123456789abcdef01234567",) * 2,
        ("hf_AbCdEfGhIjKlMnOpQrSt", "***"),
        ("https://ann:pass@host/x", "https://***@host/x"),
        ("api_key=abc, x", "api_key=*** x"),
        ("WANDB_API_KEY=0123", "WANDB_API_KEY=***"),
        ("patch_size=4",) * 2,
        *((pair, pair) for pair in ("class_token=False", "class_token=True", "use_key=None", "a_token=2")),
        ("'class_token=False' x",) * 2,
        ("my_token=abc", "my_token=***"),
        ("key=12345678", "key=***"),
        ("token=1-2f3", "token=***"),
        ("password=1", "password=***"),
        ("rand-m9-mstd0.5-inc1",) * 2,
    ],
)
def test_paths_and_secrets_are_not_shown(text, shown):
    assert private(text) == shown


def test_texts_of_others_are_shown_as_they_are():
    assert plain("a_b *c* <script>\n# [x](y) | `z`") == r"a\_b \*c\* &lt;script\> \# \[x\](y) \| \`z\`"
    assert code("a`b") == "``a`b``"
    assert code("`a`\nb") == "`` `a` b ``"
    assert fenced("x\n````\ny", "bash") == ["`````bash", "x", "````", "y", "`````"]


def test_the_command_has_what_was_chosen_and_trains_so_again():
    typed = "--data-dir /home/ann/digits --model-kwargs patch_size=4 class_token=False 'norm_layer=a b' --opt adamw"
    typed += " --opt-betas 0.9 0.95"
    typed += " --no-model-ema --output /home/ann/out --experiment mine --wandb-project private --workers 3 --seed 7"
    config = parse(shlex.split(typed))
    args = {name: list(v) if isinstance(v, tuple) else v for name, _, v in leaves(config)}
    line = command(args)
    assert not any(one in line for one in ("ann", "mine", "private", "workers", "--output"))
    words = shlex.split(line.replace("\\\n", " "))
    assert words[:2] == ["lowrank-vit", "train"]
    again = {name: value for name, _, value in leaves(parse(words[2:]))}
    chosen = {name: value for name, _, value in leaves(config)}
    for name in ("model-kwargs", "opt", "opt-betas", "model-ema", "seed"):
        assert again[name] == chosen[name]
