"""The benches `step` and `end-to-end`: their cases run and do what they say. No test asserts a time."""

from __future__ import annotations

import json
from functools import partial
from itertools import islice
from typing import Any

import pytest
import timm
import torch

from benchmarks import step
from benchmarks.__main__ import main
from benchmarks.selection import CUDA
from benchmarks.training import end_to_end
from benchmarks.training.timed_steps import PHASES, Phases, Timer
from lowrank_vit.common.errors import UserError
from lowrank_vit.model.low_rank import LowRankLinear
from lowrank_vit.ranks.world import World

TINY = "--model test_vit -b 4 --img-size 32 --steps 2 --device cpu --repeats 1".split()


def test_step_smoke(tmp_path, capsys):
    path = tmp_path / "step.json"
    main(["step", *TINY, "--no-compile", "--json", str(path)])
    result = json.loads(path.read_text())
    assert list(result["cases"]) == ["ours_eager", "timm_eager", "product_limit", "update_limit"]
    shares = {f"{kind}_{case}" for kind in ("mfu", "update_share") for case in ("ours_eager", "timm_eager")}
    assert set(result["ratios"]) == {"eager_vs_timm_eager", *shares}
    assert result["peers"] == ["timm_eager"]
    num_weights = sum(p.numel() for p in timm.create_model("test_vit", img_size=32).parameters())
    assert 0.95 * num_weights * 40 < result["update_bytes"] < 1.02 * num_weights * 40
    assert 0 < result["ratios"]["mfu_ours_eager"]["median"] < 1.5
    assert result["workload"] == {"model": "test_vit", "img_size": 32, "batch_size": 4, "steps": 2}
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_both_steps_train_the_same_model():
    """As many weights in as many groups with the same decay, and after a round none is as it was."""
    cpu = torch.device("cpu")
    load = step.Workload("test_vit", 32, 4, 1)
    config = step.config_of(load, cpu, "eager")
    parts = step.set_up(config, None)
    timms = step.timm_case(load, cpu, "eager", config)
    assert isinstance(timms.run, partial)
    run: Any = timms.run.func
    cells = dict(zip(run.__code__.co_freevars, run.__closure__ or (), strict=True))
    optimizer = cells["optimizer"].cell_contents

    def groups(of: torch.optim.Optimizer) -> list[tuple[float, int]]:
        return sorted((g["weight_decay"], sum(p.numel() for p in g["params"])) for g in of.param_groups)

    assert groups(optimizer) == groups(parts.optimizer)
    for case, ema, model in (
        (step._our_case(parts, load, "eager", config), parts.ema, parts.model),
        (timms, cells["task"].cell_contents.trainable_module_ema, cells["task"].cell_contents.trainable_module),
    ):
        assert ema is not None
        before = [p.detach().clone() for p in model.parameters()]
        case.run()
        case.run()
        assert all(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
        moved = [not torch.equal(a, b) for a, b in zip(before, ema.module.parameters(), strict=True)]
        assert any(moved)
        assert case.items == 4


def test_only_compiled_steps_are_warmed_up_and_by_enough():
    ran: list[int] = []
    load = step.Workload("test_vit", 32, 4, 3)
    for way, expected in (("eager", [3]), ("compiled", [20, 3])):
        ran.clear()
        case = step._case(ran.append, load, way, "")
        case.first()
        case.run()
        assert ran == expected
        assert case.items == 12


def test_the_steps_forms_compute_the_same(monkeypatch):
    """Each is a step of its own, compiled, which is left out here; and their losses are the same up to rounding."""
    made: list[step.Setup] = []
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(step, "_our_case", lambda parts, *_: made.append(parts) or step.Case(step.nothing, 1))
    options = step.Options(parts=True, modes=("reduce-overhead",))
    load = step.Workload("test_vit", 32, 4, 1)
    forms = step._forms(options, load, torch.device("cpu"), step.nothing)
    assert list(forms) == ["ours_reduce_overhead", "ours_convolution", "ours_product", "ours_normalized_before"]
    are_products = [type(parts.model.patch_embed.proj) is not torch.nn.Conv2d for parts in made]  # type: ignore[union-attr]
    assert are_products == [False, False, True, True]
    losses = []
    for parts in made:
        parts.model.train()
        for batch in islice(step.endless(parts.train_loader), 2):  # type: ignore[arg-type]
            parts.step(batch)
        losses.append(parts.step.meter.read(World()).loss)
    assert losses == pytest.approx(losses[:1] * 4, rel=1e-5)


def test_full_rank_and_factors_are_two_steps_of_the_same_model(monkeypatch):
    """Compiled in the bench; here they run as they are, of a smaller model."""
    made: list[step.Setup] = []
    make = step.set_up

    def noted(config: step.Config, resumed: None) -> step.Setup:
        made.append(make(config, resumed))
        return made[-1]

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(step, "set_up", noted)
    monkeypatch.setattr(step, "FACTORISED", {"cpu": step.Workload("vit_tiny_patch16_224", 32, 4, 1)})
    monkeypatch.setattr(step, "OF_FACTORISED", ("--model-kwargs", "depth=2", "embed_dim=48", "num_heads=3"))
    cases, ratios, sizes = step._factorised_cases(torch.device("cpu"), step.nothing)
    assert ratios["lowrank_vs_full"] == ("low_rank", "full_rank")
    assert all(set(pair) <= set(cases) for pair in ratios.values())
    full, low = ([n for n in one.model.modules() if isinstance(n, LowRankLinear)] for one in made)
    assert (len(full), len(low)) == (0, 8)
    weights = 12 * 48**2 * 2
    kept = sum(layer.up.numel() + layer.down.numel() for layer in low)
    assert 0.2 * weights < kept <= 0.25 * weights
    assert sizes["full_rank"]["params"] - sizes["low_rank"]["params"] == weights - kept
    for name in ("full_rank", "low_rank"):
        cases[name].run()
        assert cases[name].items == 4
    assert cases["low_rank"].setting.endswith("--lowrank-init 0.25")


def test_ours_alone_is_the_compiled_step_and_its_forms(monkeypatch):
    """As the selection for a GPU asks for them by flags."""
    monkeypatch.setattr(step, "_our_case", lambda *_: step.Case(step.nothing, 1))
    found: dict[str, set[str]] = {}

    def noted(bench: str, cases: dict[str, step.Case], ratios: dict[str, tuple[str, str]], **_: object) -> step.Result:
        assert all(name in cases for pair in ratios.values() for name in pair)
        found[name] = {one for one in cases if one.startswith(("ours", "timm"))}
        return step.Result(bench, {}, {}, {})

    monkeypatch.setattr(step, "measure", noted)
    tiny = ["--model", "test_vit", "--img-size", "32", "-b", "2", "--device", "cpu"]
    for name in ("reduce-overhead", "batch-512", "parts", "max-autotune"):
        entry = CUDA[name]
        main([entry.bench, *entry.flags, *tiny])
    assert found == {
        "reduce-overhead": {"ours_compiled", "ours_reduce_overhead"},
        "batch-512": {"ours_compiled"},
        "parts": {"ours_compiled", "ours_convolution", "ours_product", "ours_normalized_before"},
        "max-autotune": {"ours_compiled", "ours_max_autotune"},
    }


def test_the_limit_of_the_update_moves_its_bytes():
    case = step.update_case(1000, step.Workload("", 32, 4, 3), torch.device("cpu"))
    case.run()
    cells = dict(zip(case.run.__code__.co_freevars, case.run.__closure__ or (), strict=True))
    source, target = cells["source"].cell_contents, cells["target"].cell_contents
    assert torch.equal(source, target)
    assert 2 * source.nbytes == 1000 * step.UPDATE_BYTES
    assert (case.items, case.unit) == (12, "img/s")


def test_a_peer_that_breaks_leaves_our_figures(monkeypatch):
    def broken(*_args: object) -> None:
        raise AttributeError("timm has changed")

    monkeypatch.setattr(step, "timm_case", broken)
    options = step.Options(img_size=32, batch_size=4, steps=1, device="cpu", compile=False, repeats=1)
    result = step.run(options)
    assert result.failed == {"timm_eager": "AttributeError: timm has changed"}
    assert "ours_eager" in result.cases
    assert not result.is_broken


def test_end_to_end_smoke(tmp_path, capsys):
    path = tmp_path / "end.json"
    data = "--count 24 --loader ffcv --workers 1 --spec-every 2".split()
    main(["end-to-end", *TINY, *data, "--scratch", str(tmp_path / "scratch"), "--json", str(path)])
    result = json.loads(path.read_text())
    assert list(result["cases"]) == ["end_to_end", "synthetic", "product_limit", *(f"phase_{n}" for n in PHASES)]
    assert all(case["median"] > 0 for case in result["cases"].values())
    assert sum(result["shares"].values()) == pytest.approx(1)
    assert result["bottleneck"] in PHASES
    # The phases are the round: nothing of a step is left out or counted twice.
    step_ms = sum(result["cases"][f"phase_{name}"]["samples"][0] for name in PHASES)
    assert step_ms == pytest.approx(1e3 * 4 / result["cases"]["end_to_end"]["samples"][0], rel=0.2)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_phases():
    rounds = [dict.fromkeys(PHASES, 0.0) | {"forward": 1.0, "backward": 2.0, "augment": 9.0}] * 2
    inside = Phases.of(rounds, 4)
    assert inside.ms["backward"] == (500, 500)
    assert (inside.bottleneck(), inside.shares()["augment"]) == ("augment", 0.75)
    beside = Phases.of(rounds, 4, frozenset({"augment"}))
    assert (beside.bottleneck(), beside.shares()["forward"]) == ("backward", pytest.approx(1 / 3))


def test_the_timer_gives_each_phase_its_own_time(monkeypatch):
    # round 0..9: data 1..4 with augment 2..3 inside, forward 4..6
    moments = iter([0.0, 1.0, 2.0, 3.0, 4.0, 4.0, 6.0, 9.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(moments))
    timer = Timer(torch.device("cpu"))
    timer.begin_round()
    timer.begin("data")
    timer.begin("augment")
    timer.end("augment")
    timer.end("data")
    timer.begin("step")  # not told apart
    timer.begin("forward")
    timer.end("forward")
    timer.end_round()
    seconds = timer.seconds()
    assert {name: s for name, s in seconds.items() if s} == {"data": 2.0, "augment": 1.0, "forward": 2.0, "other": 4.0}


def test_wrong_options(tmp_path):
    with pytest.raises(UserError, match="--steps is 0, expected 1 or more"):
        step.run(step.Options(device="cpu", steps=0))
    with pytest.raises(UserError, match="--spec-every is 0, expected 1 or more"):
        end_to_end.run(end_to_end.Options(device="cpu", spec_every=0))
    with pytest.raises(UserError, match=r"nothing\.beton is not a file"):
        end_to_end.run(end_to_end.Options(device="cpu", data=tmp_path / "nothing.beton"))
