"""The offline analysis: the monitor's numbers from a checkpoint file, as a table that fits and files that read back."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.cells import cell_len

from lowrank_vit.analyze_spectrum import main
from lowrank_vit.common.errors import UserError
from lowrank_vit.spectral.analyze import analyze_weights, as_json, compare
from lowrank_vit.spectral.select import DEFAULT_TARGETS
from lowrank_vit.spectral.watching.monitor import SpectralMonitor
from lowrank_vit.spectral.watching.refresh import SpectralSettings
from tests.spectra import tiny_vit, with_spectrum

ARCH = "vit_tiny_patch16_224"


def save(path: Path, *, epoch: int = 3, seed: int = 0) -> Path:
    states = {"state_dict": tiny_vit(seed).state_dict(), "state_dict_ema": tiny_vit(seed + 1).state_dict()}
    torch.save({"arch": ARCH, "epoch": epoch, **states}, path)
    return path


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "last.pth.tar")


def analyze(checkpoint: Path, *flags: str) -> dict[str, Any]:
    out = checkpoint.parent / "out"
    main(["--checkpoint", str(checkpoint), "--save-dir", str(out), *flags])
    return json.loads((out / f"{ARCH}_spectral.json").read_text())


def same(found: float | None, expected: float) -> bool:
    return found == expected if np.isfinite(expected) else found is None


@pytest.mark.parametrize("split", [False, True])
@pytest.mark.parametrize("kind", ["spec", "spec_ema"])
def test_numbers_are_the_monitors_bit_for_bit(checkpoint: Path, tmp_path: Path, kind: str, split: bool) -> None:
    with SpectralMonitor(
        tiny_vit(0),
        tiny_vit(1),
        targets=DEFAULT_TARGETS,
        every=1,
        settings=SpectralSettings(topk=4, interval=3),
        split_qkv=split,
        store_dir=tmp_path / "spectra",
    ) as monitor:
        monitor.observe(0)
    (record,) = monitor.records()
    flags = [*(["--use-ema"] if kind == "spec_ema" else []), *(["--split-qkv"] if split else [])]
    content = analyze(checkpoint, "--topk", "4", "--interval", "3", *flags)
    assert content["meta"]["epoch"] == 3
    assert content["meta"]["model"] == ARCH
    assert content["meta"]["use_ema"] is (kind == "spec_ema")
    assert len(content["layers"]) == (12 if split else 8)
    compared = 0
    for key, expected in record.values.items():
        of_kind, _, rest = key.partition("/")
        name, _, metric = rest.rpartition("/")
        if of_kind != kind or "ema_cos" in metric or name == "refresh":
            continue
        group, _, label = name.partition("/")
        if group in ("type", "depth"):
            found = content[f"{group}s"][label][metric]
        else:
            layer = content["layers"][name]
            assert layer["sigma_min"] == layer["sv_lastk"][0]
            if metric.startswith("sv"):
                ends, digits = ("sv_lastk", metric[7:]) if "last" in metric else ("sv_topk", metric[2:])
                found = layer[ends][int(digits) - 1]
            else:
                found = layer[metric]
        assert same(found, expected), key
        compared += 1
    assert compared > 300


def test_numbers_agree_with_numpy_and_shapes_are_right(checkpoint: Path) -> None:
    weights = tiny_vit(0).state_dict()
    content = analyze(checkpoint, "--targets", "mlp.fc1", "--topk", "3")
    assert list(content["layers"]) == ["blocks.0.mlp.fc1", "blocks.1.mlp.fc1"]
    for name, layer in content["layers"].items():
        expected = np.linalg.svd(weights[f"{name}.weight"].double().numpy(), compute_uv=False)
        assert layer["shape"] == [64, 16]
        assert layer["solver"] == "gram64"
        assert (layer["indices_top"], layer["indices_last"]) == ([1, 2, 3], [16, 15, 14])
        np.testing.assert_allclose(layer["sv_topk"], expected[:3], rtol=1e-12)
        np.testing.assert_allclose(layer["sv_lastk"], expected[::-1][:3], rtol=1e-9)
    mean = np.mean([layer["sigma_max"] for layer in content["layers"].values()])
    assert content["types"]["mlp.fc1"]["sigma_max"] == pytest.approx(mean)


@pytest.mark.parametrize("format_", ["npz", "pt"])
@pytest.mark.parametrize("full", [False, True])
def test_saved_vectors_read_back_and_belong_to_the_values(checkpoint: Path, format_: str, full: bool) -> None:
    flags = ["--targets", "attn.proj", "--topk", "2", "--interval", "2", "--save-vectors", "--format", format_]
    content = analyze(checkpoint, *flags, *(["--full"] if full else []))
    path = checkpoint.parent / "out" / f"{ARCH}_vectors.{format_}"
    arrays = dict(np.load(path)) if format_ == "npz" else {k: v.numpy() for k, v in torch.load(path).items()}
    for name, layer in content["layers"].items():
        a = tiny_vit(0).state_dict()[f"{name}.weight"].double().numpy()
        np.testing.assert_allclose(arrays[f"{name}:s"], np.linalg.svd(a, compute_uv=False), rtol=1e-6)
        if full:
            product = (arrays[f"{name}:u"] * arrays[f"{name}:s"]) @ arrays[f"{name}:v"].T
            np.testing.assert_allclose(product, a, atol=1e-12)
        else:
            for end, values in (("top", layer["sv_topk"]), ("last", layer["sv_lastk"])):
                u, v = arrays[f"{name}:{end}:u"], arrays[f"{name}:{end}:v"]
                np.testing.assert_allclose(a @ v, u * values, atol=1e-10)


def test_full_without_vectors_saves_the_values_alone(checkpoint: Path) -> None:
    analyze(checkpoint, "--full", "--targets", "attn.proj")
    arrays = np.load(checkpoint.parent / "out" / f"{ARCH}_vectors.npz")
    assert arrays.files == [f"blocks.{b}.attn.proj:s" for b in (0, 1)]
    assert arrays["blocks.0.attn.proj:s"].shape == (16,)


def test_comparing_two_checkpoints_says_what_the_monitor_would_have(tmp_path: Path) -> None:
    before, after = save(tmp_path / "a.pth.tar"), save(tmp_path / "b.pth.tar", epoch=7, seed=5)
    model = tiny_vit(0)
    with SpectralMonitor(
        model,
        None,
        targets=DEFAULT_TARGETS,
        every=1,
        settings=SpectralSettings(topk=3, interval=2),
        store_dir=tmp_path / "s",
    ) as monitor:
        monitor.observe(0)
        monitor.wait()
        model.load_state_dict(tiny_vit(5).state_dict())
        monitor.observe(1)
    record = monitor.records()[-1]
    main(["--compare", str(before), str(after), "--topk", "3", "--interval", "2", "--save-dir", str(tmp_path)])
    content = json.loads((tmp_path / f"{ARCH}_drift.json").read_text())
    assert (content["meta"]["before"]["epoch"], content["meta"]["after"]["epoch"]) == (3, 7)
    for name, numbers in content["layers"].items():
        assert {"delta_sv_rel", "update_norm2", "update_normF", "cos_u1", "cos_v_last3", "cos_u_mean"} <= set(numbers)
        assert {"block_cos_u_mean", "block_cos_v_overlap", "block_energy", "turn_bound"} <= set(numbers)
        for metric, value in numbers.items():
            if metric == "update_rel":  # the monitor logs the norms
                continue
            expected = record.values[f"spec/{name}/{metric}"]
            assert value == (expected if math.isfinite(expected) else None)
    main(["--compare", str(before), str(before), "--save-dir", str(tmp_path)])
    same_weights = json.loads((tmp_path / f"{ARCH}_drift.json").read_text())["layers"]["blocks.0.mlp.fc1"]
    assert same_weights["update_normF"] == same_weights["delta_sv_rel"] == 0
    assert same_weights["cos_u8"] == pytest.approx(1.0)


def test_a_mean_that_is_infinite_has_no_number_in_the_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    others = [save(tmp_path / f"{seed}.pth.tar", seed=seed) for seed in (0, 1)]
    main(["--compare", *map(str, others), "--save-dir", str(tmp_path)])
    types = json.loads((tmp_path / f"{ARCH}_drift.json").read_text())["types"]
    assert None in {of_type["turn_bound"] for of_type in types.values()}
    _, _, by_type = capsys.readouterr().out.partition("Drift by type, means")
    assert " none " in by_type
    assert "nan" not in by_type


def test_checkpoints_of_different_models_are_not_compared(tmp_path: Path) -> None:
    before, after = save(tmp_path / "a.pth.tar"), tmp_path / "b.pth.tar"
    torch.save({"blocks.0.attn.qkv.weight": torch.ones(3, 4)}, after)
    with pytest.raises(UserError, match="different models: blocks"):
        main(["--compare", str(before), str(after), "--targets", "attn.qkv", "--save-dir", str(tmp_path)])


def test_float32_shows_what_it_loses() -> None:
    weights = {"head": with_spectrum(np.geomspace(1, 1e-7, 40), 60, 40)}
    exact, usual = (analyze_weights(weights, SpectralSettings(topk=4), p) for p in ("float64", "float32"))
    assert exact.values["head"]["sv_last1"] == pytest.approx(1e-7, rel=1e-6)
    error = abs(usual.values["head"]["sv_last1"] - 1e-7)
    assert error > 1e-9
    assert error <= usual.solved["head"].last.certificate[0]
    assert usual.values["head"]["certificate_max"] > 1e3 * exact.values["head"]["certificate_max"]


def test_tables_fit_80_columns_also_for_the_names_and_shapes_of_a_large_vit(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # room enough: the table itself must be narrow
    weights = {
        "blocks.23.attn.proj.weight": torch.randn(1024, 16) * 1.2345e-7,
        "blocks.23.mlp.fc1.weight": torch.randn(4096, 16) * 1234.5,
    }
    path = tmp_path / "large.pth.tar"
    torch.save({"arch": ARCH, "epoch": 0, "state_dict": weights}, path)
    flags = ["--save-dir", str(tmp_path), "--targets", "attn.proj,mlp.fc1", "--topk", "2"]
    main(["--checkpoint", str(path), *flags])
    main(["--compare", str(path), str(path), *flags])
    output = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("wrote")]
    assert any(line.startswith("blocks.23.attn.proj  1024x16") for line in output)
    assert any(line.startswith("mlp.fc1 ") for line in output)
    assert max(cell_len(line.rstrip()) for line in output) <= 80


def test_nan_is_null_in_the_json_and_does_not_spread() -> None:
    weights = {"blocks.0.head": torch.diag(torch.tensor([2.0, 1.0])), "blocks.1.head": torch.full((3, 2), torch.nan)}
    content = json.loads(json.dumps(as_json(analyze_weights(weights, SpectralSettings(topk=2)), {}), allow_nan=False))
    assert content["layers"]["blocks.1.head"]["sv_topk"] == [None, None]
    assert content["layers"]["blocks.1.head"]["stable_rank"] is None
    assert content["layers"]["blocks.0.head"]["sv_topk"] == [2.0, 1.0]
    assert content["types"]["head"]["sigma_max"] == 2.0


def test_comparing_needs_nothing_but_the_analyses() -> None:
    weights = {"head": torch.randn(30, 20, generator=torch.Generator().manual_seed(0))}
    moved = {"head": weights["head"] * 1.5}
    drift = compare(
        analyze_weights(weights, SpectralSettings(topk=2)), analyze_weights(moved, SpectralSettings(topk=2))
    )["head"]
    assert drift["delta_sv_rel"] == pytest.approx(0.5)
    assert drift["cos_u2"] == pytest.approx(1.0)
    assert drift["update_rel"] == pytest.approx(0.5)
    zero, some = {"head": torch.zeros(3, 2)}, {"head": torch.ones(3, 2)}
    of = [analyze_weights(one, SpectralSettings(topk=1)) for one in (zero, some)]
    assert math.isnan(compare(*of)["head"]["update_rel"])


def test_statistics_are_written_and_shown_where_they_are_asked_for(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain = analyze(checkpoint)
    assert all("statistics" not in layer for layer in plain["layers"].values())
    assert "worth" not in capsys.readouterr().out
    content = analyze(checkpoint, "--statistics", "--bootstraps", "9", "--topk", "2")
    assert content["meta"]["bootstraps"] == 9
    for layer in content["layers"].values():
        assert layer["statistics"].keys() >= {"alpha_p", "lr_lognormal", "lr_lognormal_p", "spike_p2", "shuffled_alpha"}
        assert layer["statistics"]["alpha_p"] * 9 == pytest.approx(round(layer["statistics"]["alpha_p"] * 9))
    shown = capsys.readouterr().out
    layer = content["layers"]["blocks.1.mlp.fc1"]
    assert f"{layer['alpha']:.3g}±{layer['alpha_sigma']:.0f}" in shown or f"±{layer['alpha_sigma']:.1g}" in shown
    assert f"{layer['statistics']['alpha_p']:.3g}±{layer['statistics']['alpha_p_error']:.1g}" in shown
    assert max(cell_len(line) for line in shown.splitlines() if "out" not in line) <= 80
    with pytest.raises(UserError, match="leave it out with --compare"):
        main(["--compare", str(checkpoint), str(checkpoint), "--statistics"])


def test_wrong_use_is_one_clear_error(checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.pth"):
        main(["--checkpoint", str(tmp_path / "nowhere.pth")])
    with pytest.raises(UserError, match=r"meant 'attn\.qkv'"):
        main(["--checkpoint", str(checkpoint), "--targets", "attn.qvk"])
    with pytest.raises(UserError, match="--topk takes a whole number of at least 1, not `0`"):
        main(["--checkpoint", str(checkpoint), "--topk", "0"])
    with pytest.raises(UserError, match="--save-dir"):
        main(["--checkpoint", str(checkpoint), "--save-dir", str(checkpoint / "under-a-file")])
    with pytest.raises(UserError, match="Give one of --checkpoint"):
        main([])
    with pytest.raises(UserError, match="Give one of --checkpoint"):
        main(["--checkpoint", str(checkpoint), "--pretrained", "--model", ARCH])
    with pytest.raises(UserError, match="timm model's name"):
        main(["--pretrained"])
    with pytest.raises(UserError, match=r"is not a timm model\. Did you mean .*vit_tiny"):
        main(["--pretrained", "--model", "vit_tiny_patch17"])


def test_pretrained_weights_are_timms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("timm.create_model", lambda name, pretrained=False, **_: tiny_vit(4) if pretrained else None)
    main(["--model", ARCH, "--pretrained", "--save-dir", str(tmp_path), "--topk", "2"])
    content = json.loads((tmp_path / f"{ARCH}_spectral.json").read_text())
    weight = tiny_vit(4).state_dict()["blocks.0.mlp.fc1.weight"].double().numpy()
    assert content["layers"]["blocks.0.mlp.fc1"]["sigma_max"] == pytest.approx(np.linalg.norm(weight, 2))
    assert content["meta"]["checkpoint"] == "pretrained"

    def offline(*_: object, **__: object) -> None:
        raise ConnectionError("no route to host")  # as the hub's errors, an OSError

    monkeypatch.setattr("timm.create_model", offline)
    with pytest.raises(UserError, match=r"cannot be fetched from the Hugging Face hub.*--checkpoint FILE"):
        main(["--model", ARCH, "--pretrained", "--save-dir", str(tmp_path)])


def test_asking_for_an_ema_that_is_not_there_is_a_user_error(tmp_path: Path) -> None:
    path = tmp_path / "no_ema.pth.tar"
    torch.save({"arch": ARCH, "epoch": 0, "state_dict": tiny_vit(0).state_dict()}, path)
    with pytest.raises(UserError, match="EMA"):
        main(["--checkpoint", str(path), "--use-ema", "--save-dir", str(tmp_path / "out")])


def test_a_bare_state_dict_is_named_after_its_file_or_by_the_user(tmp_path: Path) -> None:
    path = tmp_path / "deit.pth"
    torch.save(tiny_vit(0).state_dict(), path)
    main(["--checkpoint", str(path), "--save-dir", str(tmp_path / "out")])
    main(["--checkpoint", str(path), "--model", "mine", "--save-dir", str(tmp_path / "out")])
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["deit_spectral.json", "mine_spectral.json"]


@pytest.mark.parametrize("name", [f"{ARCH}_vectors.npz", f"{ARCH}_spectral.json"])
def test_what_a_killed_analysis_has_left_goes_with_the_next(checkpoint: Path, tmp_path: Path, name: str) -> None:
    left = tmp_path / f".{name}.0123abcd.part"
    left.write_bytes(b"half")
    main(["--checkpoint", str(checkpoint), "--save-dir", str(tmp_path), "--save-vectors"])
    assert (tmp_path / name).exists()
    assert not left.exists()


def test_files_are_written_only_where_a_folder_is_given(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    main(["--checkpoint", str(checkpoint), "--topk", "2"])
    main(["--compare", str(checkpoint), str(checkpoint), "--topk", "2"])
    assert "Spectra by layer" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.name]
    for flag in ("--full", "--save-vectors"):
        with pytest.raises(UserError, match=f"{flag} saves arrays.*--save-dir"):
            main(["--checkpoint", str(checkpoint), flag])


def test_each_state_has_files_of_its_own_named_after_what_the_checkpoint_is(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, out = save(tmp_path / "other.pth.tar", seed=7), tmp_path / "out"

    def write(path: Path, *flags: str) -> list[str]:
        before = {file.name: file.stat().st_ino for file in out.glob("*")}
        main(["--checkpoint", str(path), "--save-dir", str(out), "--topk", "1", "--full", *flags])
        after = {file.name: file.stat().st_ino for file in out.glob("*")}
        return sorted(name for name in after if after[name] != before.get(name))

    def of(*names: str) -> list[str]:
        return [f"{'_'.join([ARCH, *names])}_spectral.json", f"{'_'.join([ARCH, *names])}_vectors.npz"]

    assert write(checkpoint, "--model", "vit_base_patch16_224") == of()
    assert f"says that its model is {ARCH}, not --model vit_base" in " ".join(capsys.readouterr().out.split())
    assert write(checkpoint, "--use-ema") == of("ema")
    assert write(other) == of("other")
    assert write(other, "--use-ema") == of("other", "ema")
    save(checkpoint, epoch=5, seed=2)
    assert write(checkpoint) == of("last")
    save(checkpoint, epoch=6, seed=3)
    assert write(checkpoint) == of("last", "2")
    assert write(checkpoint, "--topk", "2") == of("last", "2")
    save(checkpoint, epoch=3, seed=0)
    assert write(checkpoint, "--topk", "2") == of()
    content = json.loads((out / f"{ARCH}_spectral.json").read_text())
    assert (content["meta"]["model"], content["meta"]["epoch"], content["meta"]["use_ema"]) == (ARCH, 3, False)


def test_where_the_order_of_rows_is_not_known_that_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    state = {f"stages.{key}": weight for key, weight in tiny_vit().state_dict().items()}
    torch.save(state, tmp_path / "own.pth")
    flags = ["--checkpoint", str(tmp_path / "own.pth"), "--topk", "1"]
    main(flags)
    assert "note: it is not known whether the rows of stages.blocks.0.attn.qkv in" in capsys.readouterr().out
    with pytest.raises(UserError, match=r'without --split-qkv: --targets "attn\.qkv"'):
        main([*flags, "--split-qkv", "--targets", "attn.qkv"])


def test_a_convolution_is_the_same_online_and_offline(checkpoint: Path, tmp_path: Path) -> None:
    model = tiny_vit(0).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    settings = SpectralSettings(topk=2)
    with SpectralMonitor(model, store_dir=tmp_path / "s", targets="patch_embed.proj", settings=settings) as monitor:
        monitor.observe(0)
    (record,) = monitor.records()
    layer = analyze(checkpoint, "--topk", "2", "--targets", "patch_embed.proj")["layers"]["patch_embed.proj"]
    assert layer["shape"] == [16, 192]
    assert layer["sv_topk"] == [record.values[f"spec/patch_embed.proj/sv{i}"] for i in (1, 2)]
