"""A run directory of the size that 300 epochs of ViT-B with an EMA leave, a refresh each 100 updates, after thinning.

`python -m tests.big_run FOLDER [SHARE]` writes it: 0.1 is a tenth of the refreshes.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from lowrank_vit.spectral.watching.files import StoredScalars, write_scalars, write_spectra
from tests.reported import train_line

WIDTH, BLOCKS, UPDATES = 768, 12, 1_501_200
SHAPES = {
    "attn.qkv": (3 * WIDTH, WIDTH),
    "attn.proj": (WIDTH, WIDTH),
    "mlp.fc1": (4 * WIDTH, WIDTH),
    "mlp.fc2": (WIDTH, 4 * WIDTH),
}
METRICS = [
    *"""sigma_max stable_rank effective_rank numerical_rank nuclear_norm condition alpha alpha_ks alpha_sigma
    alpha_tail mp_sigma mp_edge mp_outliers mp_ks delta_sv_rel gap_k gap_last rank90 rank95 rank99 certificate_max
    certificate_index orthogonality block_gap block_energy turn_bound update_norm2 update_norm2_low update_norm2_high
    update_normF""".split(),
    *(f"{c}_{s}_{m}" for c in ("cos", "cos0", "ema_cos") for s in "uv" for m in "max mean mean_sq overlap".split()),
    *(
        f"block_{c}_{s}_{m}"
        for c in "cos cos0 ema_cos".split()
        for s in "uv"
        for m in "mean mean_sq min overlap".split()
    ),
    *(f"chance_{s}_{m}" for s in "uv" for m in "max mean mean_sq".split()),
    *(f"block_chance_{s}_{m}" for s in "uv" for m in "mean mean_sq min".split()),
    *(f"{name}{i}" for name in "sv sv_last cos_u cos_v cos_u_last cos_v_last".split() for i in range(1, 9)),
]
REFRESHES = 1_700
"""Whose spectra 2 GB hold."""
RECORDS = 1_700
"""Of scalars, whose share of the store is 200 MB."""


def write_big_run(path: Path, share: float = 1.0, *, blocks: int = BLOCKS, seed: int = 0, **args: object) -> Path:
    """Write a finished run; `share` of its refreshes and records. `args`: options beside those of all."""
    (path / "spectra").mkdir(parents=True)
    rng = np.random.default_rng(seed)
    names = [f"blocks.{block}.{kind}" for block in range(blocks) for kind in SHAPES]
    keys = [f"{kind}/{name}" for kind in ("spec", "spec_ema") for name in names]
    matrices = {name: {"shape": list(SHAPES[name.split(".", 2)[2]])} for name in names}
    (path / "spectra" / "index.json").write_text(json.dumps({"matrices": matrices}))
    base = {key: np.sort(np.abs(rng.standard_normal(WIDTH)))[::-1] + 0.1 for key in keys}
    for update in np.linspace(0, UPDATES, max(3, int(share * REFRESHES))).astype(int).tolist():
        growth = 1 + update / UPDATES
        write_spectra(path / "spectra", update, {key: s**growth for key, s in base.items()})
    with (path / "metrics.jsonl").open("w") as file:
        for update in range(50, UPDATES, 300 if share == 1 else 3000):
            file.write(train_line(update, 7 / (1 + update / 2e5) + 0.1 * float(rng.random())))
        for update in np.linspace(0, UPDATES, max(3, int(share * RECORDS))).astype(int).tolist():
            values = rng.random((len(keys), len(METRICS)))
            write_scalars(path / "spectra", StoredScalars(update, keys, METRICS, values, True))
            event = {"kind": "spec", "update": update, "spec/refresh/full": 1.0, "spec/refresh/seconds": 2.5}
            file.write(json.dumps(event) + "\n")
    header = "epoch,update,train_loss,eval_loss,eval_top1,eval_top5,eval_ema_loss,eval_ema_top1,eval_ema_top5,lr"
    header += ",img_per_s,data_wait"
    rows = [
        f"{epoch},{(epoch + 1) * 5004},{7 - epoch / 60},{6 - epoch / 60},{epoch / 4 + noise},{epoch / 3.2},"
        f"{6 - epoch / 58},{epoch / 3.9},{epoch / 3.1},0.001,8000,0.01"
        for epoch, noise in enumerate(0.3 * rng.standard_normal(300))
    ]
    (path / "summary.csv").write_text("\n".join([header, *rows]) + "\n")
    options = {
        "model": "vit_base_patch16_224",
        "epochs": 300,
        "model-ema": True,
        "spec-every": 100,
        "seed": seed,
    } | args
    (path / "args.yaml").write_text(json.dumps(options))
    (path / "environment.json").write_text(json.dumps({"torch": "2.14.1"}))
    return path


if __name__ == "__main__":
    write_big_run(Path(sys.argv[1]), *map(float, sys.argv[2:3]))
