"""Exports to folders: what they hold, what timm makes of them, and what is never replaced."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import yaml
from timm.data import resolve_data_config

from lowrank_vit import export
from lowrank_vit.common.errors import UserError
from lowrank_vit.model.weights import read_checkpoint
from lowrank_vit.publish.folder import FILES, write_folder
from lowrank_vit.score.options import ModelOptions
from lowrank_vit.score.results import interval
from lowrank_vit.score.scorer import load_scorer
from tests.unit.publish.conftest import content_of, write_run

IMAGES = torch.rand(4, 3, 16, 16)


def put(run: Path, folder: Path, *more: str) -> Any:
    """Export, and make the model again as anybody would."""
    export.main([str(run), "--local-dir", str(folder), *more])
    return timm.create_model(f"local-dir:{folder}", pretrained=True).eval()


@pytest.mark.parametrize(("more", "is_ema"), [((), True), (("--weights", "raw"), False), (("--weights", "ema"), True)])
def test_timm_makes_the_same_model_of_it(run, tmp_path, more, is_ema):
    made = put(run, tmp_path / "out", *more)
    options = ModelOptions(checkpoint=run / "model_best.pth.tar", use_ema=is_ema)
    scorer = load_scorer(options, torch.device("cpu"), lambda line: None)
    own = scorer.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    with torch.no_grad():
        assert torch.equal(made(IMAGES), own(IMAGES))
    cfg = resolve_data_config({}, model=made)
    assert (cfg["input_size"], cfg["crop_pct"], cfg["interpolation"]) == ((3, 16, 16), 0.9, "bicubic")
    assert (tuple(cfg["mean"]), tuple(cfg["std"])) == (scorer.spec.mean, scorer.spec.std)
    assert list(made.pretrained_cfg["label_names"]) == ["cat", "dog", "<b>owl</b>"]
    assert "license" not in json.loads((tmp_path / "out" / "config.json").read_text())["pretrained_cfg"]


def test_a_folder_is_whole_and_readable_by_all(run, tmp_path):
    before = os.umask(0o022)
    try:
        put(run, tmp_path / "deep" / "out")
    finally:
        os.umask(before)
    there = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "deep" / "out").iterdir()}
    assert there == dict.fromkeys(("README.md", "config.json", "model.safetensors"), 0o644)
    assert [path.name for path in (tmp_path / "deep").iterdir()] == ["out"]


def test_the_card_tells_of_the_run_and_nothing_of_its_owner(run, tmp_path):
    put(run, tmp_path / "out", "--license", "cc-by-4.0")
    text = (tmp_path / "out" / "README.md").read_text()
    head = yaml.safe_load(text.split("---")[1])
    assert (head["license"], head["library_name"]) == ("cc-by-4.0", "timm")
    assert "| on 360 images |" in text
    low, high = interval(60, 360)
    assert f"| top-1 | 60.00 | {low:.2f} to {high:.2f} |" in text
    assert "timm may score a few images differently" in text
    assert "after 2 epochs, 22 updates" in text
    assert "--data-dir digits" in text
    assert "--img-size 16" in text
    assert "NVIDIA &lt;H100\\>" in text
    assert not any(one in text for one in ("/home", "ann", "secret", "train.py", "FILL IN"))


def test_without_a_license_there_is_a_line_to_fill_in(run, tmp_path, capsys):
    put(run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "license" not in yaml.safe_load(text.split("---")[1])
    assert "# license: FILL IN, such as apache-2.0" in text
    assert "no license yet" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"val_samples": None}, "| top-1 | 60.00 | not known |"),
        ({"step": {"num_updates": 30}}, "latest validation, 8 updates before these weights"),
        ({"step": {"num_updates": 5}}, "were not scored"),
        ({"class_names": None}, "Classes: 3, without names"),
    ],
)
def test_what_is_not_known_is_said_so(tmp_path, changed, said):
    put(write_run(tmp_path / "run", content_of(**changed)), tmp_path / "out")
    assert said in (tmp_path / "out" / "README.md").read_text()


def test_a_file_by_itself_is_exported_with_what_it_tells(tmp_path):
    content = content_of()
    torch.save({key: content[key] for key in ("state_dict", "arch")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="does not fit --model"):
        put(tmp_path / "x.pth", tmp_path / "out")
    torch.save({key: content[key] for key in ("state_dict", "arch", "args")}, tmp_path / "x.pth")
    put(tmp_path / "x.pth", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "were not scored" in text
    assert "does not tell how it was trained" in text
    assert "## Environment" not in text
    about = {"method": "kfac", "budget": 0.7, "top1": 50.0}
    torch.save(
        {key: content[key] for key in ("state_dict", "arch", "args")} | {"compression": about}, tmp_path / "x.pth"
    )
    put(tmp_path / "x.pth", tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert "compressed after training: method kfac, budget 0.7." in text
    assert "| top-1 | 50.00 | not known |" in text


def factors(weights: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    whole = weights.pop(f"{name}.weight")
    up = torch.randn(len(whole), 4)
    return {**weights, f"{name}.up": up, f"{name}.down": torch.randn(4, whole.shape[1])}


def test_layers_in_factors_are_merged_or_refused(tmp_path, capsys):
    name, content = "blocks.1.mlp.fc1", content_of(better="model")
    content["state_dict"] = factors(content["state_dict"], name)
    run = write_run(tmp_path / "run", content | {"lowrank_ranks": {name: 4}})
    with pytest.raises(UserError, match=r"--no-merge: .* has 1 factorised layers, which timm cannot load"):
        put(run, tmp_path / "out", "--no-merge")
    assert not (tmp_path / "out").exists()
    made = put(run, tmp_path / "out")
    product = content["state_dict"][f"{name}.up"].double() @ content["state_dict"][f"{name}.down"].double()
    assert torch.equal(made.state_dict()[f"{name}.weight"], product.float())
    said = "layers were products of two factors (rank 4)"
    assert said in (tmp_path / "out" / "README.md").read_text()
    assert said in capsys.readouterr().out


def test_adapters_are_merged_or_refused(tmp_path):
    name, content = "blocks.0.attn.qkv", content_of(better="model")
    own = content["state_dict"]
    own |= {f"{name}.base_layer.{kind}": own.pop(f"{name}.{kind}") for kind in ("weight", "bias")}
    own[f"{name}.lora_A.default.weight"], own[f"{name}.lora_B.default.weight"] = torch.randn(2, 32), torch.randn(96, 2)
    run = write_run(tmp_path / "run", content | {"lora": {"rank": 2, "alpha": 4.0, "layers": [name]}})
    with pytest.raises(UserError, match=r"--no-merge: .* has adapters at 1 layers"):
        put(run, tmp_path / "out", "--no-merge")
    made = put(run, tmp_path / "out")
    merged = read_checkpoint(run / "last.pth.tar").weights(use_ema=False)[f"{name}.weight"]
    assert torch.equal(made.state_dict()[f"{name}.weight"], merged)
    assert "tuned with LoRA: adapters of rank 2 at 1 layers" in (tmp_path / "out" / "README.md").read_text()


def damaged(**of: float) -> dict[str, Any]:
    content = content_of()
    for name, value in of.items():
        content["state_dict_ema"][name.replace("__", ".")].view(-1)[0] = value
    return content


@pytest.mark.parametrize(
    ("content", "more", "said"),
    [
        (damaged(head__weight=float("nan")), (), r"its head\.weight has values that are not finite"),
        (damaged(norm__bias=float("inf")), (), r"its norm\.bias has values"),
        (content_of(state_dict_ema=None), ("--weights", "ema"), "has no such weights. Give --weights raw"),
        (content_of(arch="vit_of_nobody"), (), "not a timm model"),
        (content_of(arch=""), (), "does not name its model"),
    ],
)
def test_a_model_that_is_worth_nothing_is_not_exported(tmp_path, content, more, said):
    run = write_run(tmp_path / "run", content)
    with pytest.raises(UserError, match=said):
        put(run, tmp_path / "out", *more)
    assert {path.name for path in tmp_path.iterdir()} == {"run"}


def test_an_export_is_not_exported_again(run, tmp_path):
    put(run, tmp_path / "out")
    for name in ("out", "out/model.safetensors"):
        with pytest.raises(UserError, match=r"is in timm's hub layout already: .*local-dir:.*/out.*hf upload NAME"):
            put(tmp_path / name, tmp_path / "again")
    (tmp_path / "out" / "config.json").unlink()
    with pytest.raises(UserError, match=r"does not name its model, .* Export a checkpoint that a run has saved"):
        put(tmp_path / "out" / "model.safetensors", tmp_path / "again")


def test_a_run_that_has_saved_nothing_says_so(run, tmp_path):
    for name in ("model_best.pth.tar", "last.pth.tar"):
        (run / name).unlink()
    with pytest.raises(UserError, match="nothing was saved there yet"):
        put(run, tmp_path / "out")
    with pytest.raises(UserError, match="does not exist"):
        put(tmp_path / "nothing", tmp_path / "out")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "Give one of --local-dir DIR"),
        (("--local-dir", "x", "--hub", "me/x"), "Give one of --local-dir DIR"),
        (("--local-dir", "x", "--private"), "--private needs --hub"),
        (("--local-dir", "x", "--revision", "dev"), "--revision needs --hub"),
        (("--local-dir", "x", "--license", "a: b"), "is not a license identifier"),
    ],
)
def test_options_that_contradict(run, argv, said):
    with pytest.raises(UserError, match=said):
        export.main([str(run), *argv])


def test_an_earlier_export_is_replaced_and_said(run, tmp_path, capsys):
    put(run, tmp_path / "out")
    first = (tmp_path / "out" / "model.safetensors").read_bytes()
    (tmp_path / "out" / ".export.0000.part").mkdir()  # of a killed one
    put(run, tmp_path / "out", "--weights", "raw")
    assert "holds an earlier export, which is replaced" in capsys.readouterr().out
    assert (tmp_path / "out" / "model.safetensors").read_bytes() != first
    assert {path.name for path in (tmp_path / "out").iterdir()} < set(FILES)


@pytest.mark.parametrize("kind", ["other files", "an edited card", "no mark", "half of an export"])
def test_what_is_no_untouched_export_stays_unless_told(run, tmp_path, kind):
    out = tmp_path / "out"
    put(run, out)
    match kind:
        case "other files":
            (out / "notes.txt").write_text("mine")
        case "an edited card":
            (out / "README.md").write_text("mine")
        case "no mark":
            (out / "config.json").write_text("{}")
        case _:
            (out / "config.json").unlink()
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(UserError, match=r"is in use and does not hold an unchanged export.*--overwrite"):
        put(run, out)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    put(run, out, "--overwrite")
    assert "## Scores" in (out / "README.md").read_text()
    assert kind != "other files" or (out / "notes.txt").read_text() == "mine"


def test_a_run_and_what_is_no_folder_are_never_written_to(run, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "odd" / "config.json").mkdir(parents=True)
    said = {"run": "directory of a run", "file": "is a file", "link": "a link to nothing", "odd": "has a folder config"}
    before = sorted(tmp_path.rglob("*"))
    for name, words in {**said, "file/out": "file is a file, not a folder"}.items():
        for more in ((), ("--overwrite",)):
            with pytest.raises(UserError, match=words):
                put(run, tmp_path / name, *more)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_link_to_a_folder_stays_and_an_empty_folder_is_filled(run, tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    put(run, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "disk" / "config.json").exists()


@pytest.mark.parametrize("is_there", [False, True])
def test_an_error_leaves_everything_as_it_was(tmp_path, is_there):
    out = tmp_path / "out"
    if is_there:
        out.mkdir()
        (out / "README.md").write_text("mine")

    def full(folder: Path) -> None:
        (folder / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        write_folder(out, full, overwrite=True, say=lambda line: None)
    assert [path.name for path in tmp_path.iterdir()] == ["out"] * is_there
    assert not is_there or [path.name for path in out.iterdir()] == ["README.md"]


def test_two_exports_to_one_folder_do_not_mix(run, tmp_path):
    put(run, tmp_path / "out")

    def meanwhile(folder: Path) -> None:
        with pytest.raises(UserError, match="another export is writing there"):
            write_folder(tmp_path / "out", lambda made: None, overwrite=True, say=lambda line: None)
        (folder / "config.json").write_text("{}")

    write_folder(tmp_path / "out", meanwhile, overwrite=True, say=lambda line: None)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
