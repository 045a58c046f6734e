"""Run directories as a training leaves them, for tests of what reads them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from lowrank_vit.spectral.solving.extremes import Solved, Triplets
from lowrank_vit.spectral.watching.files import write_spectra
from lowrank_vit.spectral.watching.store import SpectraStore
from tests.spectra import tiny_vit

KINDS = {"attn.qkv": 6, "attn.proj": 6, "mlp.fc1": 6, "mlp.fc2": 6}


def add_summary(run: Path, *, ema: bool = True) -> None:
    header = "epoch,update,train_loss,eval_loss,eval_top1,eval_top5"
    header += ",eval_ema_loss,eval_ema_top1,eval_ema_top5" if ema else ""
    rows = [header + ",lr,img_per_s,data_wait"]
    for epoch, top1 in enumerate([10.0, 61.25, 60.5]):
        averaged = f",2.5,{top1 + 1},88.0" if ema else ""
        rows.append(f"{epoch},{10 * epoch + 10},{3 - epoch},{2.9 - epoch},{top1},90.0{averaged},0.001,3210.0,0.02")
    (run / "summary.csv").write_text("\n".join(rows) + "\n")


def train_line(update: int, loss: float | None) -> str:
    event = {"kind": "train", "epoch": 0, "update": update, "loss": loss, "lr": 1e-4 * update}
    return json.dumps(event | {"img_per_s": 3000 + update, "data_wait": 0.01}) + "\n"


def add_metrics(run: Path, *, end: str = "") -> None:
    lines = [train_line(update, 5 / update) for update in range(1, 31)]
    (run / "metrics.jsonl").write_text("".join(lines) + '{"kind": "eval", "epoch": 0}\n' + end)


def add_spectra(run: Path, refreshes: int = 3, *, scale: float = 1.0) -> None:
    (run / "spectra").mkdir(exist_ok=True)
    for i in range(refreshes):
        spectra = {
            f"{kind}/blocks.{block}.{name}": scale * np.linspace(1 + i + block, 0.1, k)
            for kind in ("spec", "spec_ema")
            for block in range(3)
            for name, k in KINDS.items()
        }
        write_spectra(run / "spectra", 10 * i, spectra)


def solved(seed: int) -> Solved:
    rng = np.random.default_rng(seed)

    def end() -> Triplets:
        u, v = (np.linalg.qr(rng.standard_normal((n, 3)))[0] for n in (12, 6))
        return Triplets(np.array([3.0, 2, 1]), u, v, np.zeros(3))

    return Solved(np.linspace(3, 0.1, 6), end(), end(), 0.0, "gram64")


def add_monitor(run: Path, refreshes: int = 3) -> None:
    """What a monitor leaves: spectra, vectors, the index and the logged scalars."""
    names = [f"blocks.{block}.{kind}" for block in range(3) for kind in KINDS]
    index = {"matrices": {name: {"shape": [12, 6]} for name in names}}
    store = SpectraStore(run / "spectra", 1e9, index)
    store.begin()
    lines = []
    for i in range(refreshes):
        keys = [f"{kind}/{name}" for kind in ("spec", "spec_ema") for name in names]
        store.save(10 * i, {key: solved(100 * i + n) for n, key in enumerate(keys)})
        values = {f"{key}/{m}": 1 + i for key in keys for m in ("sigma_max", "stable_rank", "alpha", "sv1")}
        values |= {f"spec/type/attn.qkv/{m}": 9.0 for m in ("sigma_max", "cos_u_mean")}
        values |= {f"spec/{name}/{m}": 0.5 for name in names for m in ("ema_cos_u_mean", "chance_u")}
        if i:
            cosines = ("cos_u_mean", "cos_v_mean", "cos0_u_mean", "cos0_v_mean")
            values |= {f"{key}/{m}": 1 - 0.1 * i for key in keys for m in cosines}
        lines.append(json.dumps({"kind": "spec", "update": 10 * i, **values}) + "\n")
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(lines)


def fill(run: Path) -> Path:
    add_summary(run)
    add_metrics(run)
    add_monitor(run)
    add_spectra(run)
    args = "meaning: 9\nmodel: vit_small_patch16_224\nscale: [0.35, 1.0]\nnote: <script>alert(1)</script>\n"
    (run / "args.yaml").write_text(args)
    (run / "environment.json").write_text(json.dumps({"torch": "2.14.1", "gpu": {"name": "none"}}))
    return run


def analysis_file(folder: Path, *flags: str) -> Path:
    """What `analyze_spectrum` writes of a tiny model."""
    import torch

    from lowrank_vit.analyze_spectrum import main as analyze

    checkpoint = folder / "model.pth"
    torch.save({"state_dict": tiny_vit().state_dict(), "arch": "vit", "epoch": 4}, checkpoint)
    analyze(["--checkpoint", str(checkpoint), "--save-dir", str(folder), "--topk", "3", *flags])
    return folder / "vit_spectral.json"
