"""Train a small ViT from .beton files in your own loop.

The plan decides the images, their order and their crops; the library decodes and augments them.

python -m data_prep digits --out digits
python examples/loader_in_a_loop.py digits
"""

import sys

import torch
from timm.models import VisionTransformer
from torch.nn.functional import cross_entropy

from lowrank_vit import Augment, Beton, EvalPlan, TrainPlan, open_loader


def main(folder: str, epochs: int = 10, device: str = "cpu") -> float:
    """Train on `folder`/train.beton; return the accuracy on `folder`/val.beton, 0-1."""
    torch.manual_seed(0)
    train, val = Beton(f"{folder}/train.beton"), Beton(f"{folder}/val.beton")
    plan = TrainPlan.of(train, img_size=32, batch_size=32, scale=(0.8, 1.0), hflip=0.0)
    augment = Augment(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), num_classes=10).to(device)

    model = VisionTransformer(img_size=32, patch_size=8, num_classes=10, embed_dim=48, depth=2, num_heads=3).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)

    batches, line = open_loader(train, plan, device, workers=2, prepare=augment.prepare)
    print(line)  # the backend that was chosen, and why
    for epoch in range(epochs):
        for batch in batches.batches(epoch):  # uint8 (B, 3, 32, 32), decoded during the step before
            images, targets = augment.inputs(batch.images, batch.targets, batch.plan)
            loss = cross_entropy(model(images), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if (batch.plan.step + 1) % 20 == 0:
                print(f"epoch {epoch + 1}, step {batch.plan.step + 1}: loss {loss.item():.3f}")
    batches.close()

    right, model = 0, model.eval()
    held_out, _ = open_loader(val, EvalPlan.of(val, img_size=32, batch_size=100), device, workers=2)
    with torch.inference_mode():
        for batch in held_out.batches(epoch=0):
            right += int((model(augment.normalize(batch.images)).argmax(1) == batch.targets).sum())
    held_out.close()
    print(f"top-1 {100 * right / len(val.labels):.1f} %")
    return right / len(val.labels)


if __name__ == "__main__":
    main(sys.argv[1])
