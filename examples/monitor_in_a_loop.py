"""Monitor the spectra of a small network while a plain PyTorch loop trains it.

The task is a linear map of rank 3, so three singular values of each layer outgrow the others.

    python examples/monitor_in_a_loop.py watched
    lowrank-vit report watched
"""

import sys

import torch
from torch import nn

from lowrank_vit import SpectralMonitor, SpectralSettings, open_spectra


def main(folder: str, updates: int = 300) -> None:
    """Train for `updates` updates; the spectra go to a new `folder`."""
    torch.manual_seed(0)
    task = torch.randn(48, 3) @ torch.randn(3, 32) / 6
    model = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 48))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    settings = SpectralSettings(topk=4)  # number of singular vectors from each end of a spectrum

    with SpectralMonitor(model, store_dir=folder, every=50, last_update=updates, settings=settings) as monitor:
        monitor.observe(0)  # the weights before the first update
        for update in range(1, updates + 1):
            inputs = torch.randn(128, 32)
            loss = nn.functional.mse_loss(model(inputs), inputs @ task.T)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            monitor.observe(update)  # copies the weights if a refresh is due; another thread solves them
            monitor.wait()  # leave this out of a real loop: a refresh that is due too early is skipped there
            for record in monitor.records():  # the refreshes that are ready by now, for a log of your own
                print(f"update {record.update}: stable rank {record.values['spec/0/stable_rank']:.1f}")

    spectra = open_spectra(folder)
    for name in spectra.names:
        at, values_TK = spectra.series(name)  # T refreshes, K singular values
        print(f"{name}, {spectra.shapes[name]}: updates {at.tolist()}, now {values_TK[-1, :5].round(2)}")


if __name__ == "__main__":
    main(sys.argv[1])
