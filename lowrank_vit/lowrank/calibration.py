"""Moments of layers' inputs and of the gradients at their outputs, which weight the methods of truncation.

Letters of shapes: N images, T tokens, R rows and C columns of a layer's weight (y = W x + b), P pieces of its rows.
Gradients are those of the true Fisher: of the summed cross-entropy with labels drawn from the model's own softmax
(Kunstner, Hennig & Balles, "Limitations of the empirical Fisher approximation", NeurIPS 2019). The set's own labels are
not needed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from lowrank_vit.common.devices import to_device
from lowrank_vit.common.errors import UserError
from lowrank_vit.lowrank.targets import check_finite
from lowrank_vit.plan.operations import uniform_table
from lowrank_vit.plan.philox import Stream

_CHUNK = 2**24
"""Entries of one float64 copy; 128 MB."""
_BLOCK = 256
"""Rows of a symmetric matrix summed at a time."""
_ROOM_BYTES = 2 << 30
"""Memory that the images of one forward pass may keep for gradients: 11 images for a ViT-B at 224 pixels."""
_Seen = Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]
"""A forward hook, which takes a layer, its arguments and its output."""


@dataclass(frozen=True)
class Moments:
    """Statistics of a calibration set for one layer; float64, on the layer's device."""

    images: int
    tokens: int
    """Number of tokens of all images together."""
    input_CC: Tensor
    """S, the mean over tokens of x x^T."""
    mean_C: Tensor
    """The mean over tokens of x."""
    magnitude_C: Tensor
    """The mean over tokens of |x|."""
    gradient_RR: Tensor
    """G, the mean over images of the sum over an image's tokens of g g^T; g is the gradient at y."""
    fisher_PC: Tensor
    """The mean over images of the squared gradient of each weight, summed over the rows of each of P equal pieces."""

    @property
    def covariance_CC(self) -> Tensor:
        """S about the mean: S - E[x] E[x]^T."""
        return self.input_CC - torch.outer(self.mean_C, self.mean_C)

    def rows(self, low: int, high: int) -> Moments:
        """The moments of a layer with only these rows. Raises `ValueError` unless they are whole pieces."""
        size, rest = divmod(len(self.gradient_RR), len(self.fisher_PC))
        assert not rest, "pieces are equal"
        if low % size or high % size:
            raise ValueError(f"rows {low} to {high} are not whole pieces of {size}; calibrate with more pieces")
        gradient = self.gradient_RR[low:high, low:high]
        fisher = self.fisher_PC[low // size : high // size]
        return Moments(
            self.images, self.tokens, self.input_CC, self.mean_C, self.magnitude_C, gradient, fisher.contiguous()
        )


def calibrate(
    model: nn.Module,
    batches: Iterable[Tensor],
    targets: Mapping[str, nn.Linear],
    *,
    seed: int = 0,
    pieces: Mapping[str, int] | None = None,
    progress: Callable[[int], object] | None = None,
) -> dict[str, Moments]:
    """The moments of layers over a calibration set. Memory depends neither on the set's size nor on the batch size.

    Products are computed in float64 on the layers' device. With float32 products, the noise of S would exceed its
    damping wherever a few directions carry most of S.

    Args:
        model: float32 or float64, maps images to logits (N, classes). It is evaluated without dropout and drop path, in
        its own precision, and left unchanged.
        batches: images (N, 3, height, width), normalised, on any device. A forward pass takes as many of them as fit in
        memory.
        targets: layers of the model by name.
        seed: for the drawn labels, which depend on an image's position in the stream, not on the batch size.
        pieces: by name, into how many equal pieces of rows a layer may be split, see `Moments.rows`; 1 if not listed.
        progress: called after each forward pass with the number of images done.

    Raises:
        UserError: there is no image or no target, the model is in half precision, logits are not finite, a layer's
            forward is not called, or a layer does not get the tokens of an image together.
    """
    if not targets:
        raise UserError("There is no layer to calibrate: the targets match nothing.")
    for name, tensor in model.named_parameters():
        if tensor.is_floating_point() and tensor.dtype not in (torch.float32, torch.float64):
            kind = str(tensor.dtype).removeprefix("torch.")
            raise UserError(f"Calibration needs a model in float32, but {name} is {kind}. Call model.float() first.")
    device = next(iter(targets.values())).weight.device
    sums = {name: _Sums(name, layer, (pieces or {}).get(name, 1)) for name, layer in targets.items()}
    done, room = 0, 0
    with _at_rest(model), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        for batch in batches:
            if not len(batch):
                continue
            room = room or max(1, _ROOM_BYTES // _bytes_of_one(model, targets, batch[:1].detach().to(device)))
            for images in batch.detach().split(room):
                with _hooked(targets, {name: partial(one.see, len(images)) for name, one in sums.items()}):
                    _back_and_forth(model, images.to(device, copy=True), seed, done)
                done += len(images)
                if progress:
                    progress(done)
    if not done:
        raise UserError("The calibration set is empty. Give at least one image.")
    return {name: each.moments(done) for name, each in sums.items()}


def calibrate_in_turn(
    model: nn.Module,
    batches: Callable[[], Iterable[Tensor]],
    targets: Mapping[str, nn.Linear],
    compress: Callable[[dict[str, Moments]], object],
    *,
    seed: int = 0,
    pieces: Mapping[str, int] | None = None,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Calibrate block after block, with all blocks before it already compressed (SVD-LLM's sequential update).

    Makes one pass over the set for each of `blocks_of`. `batches` returns the calibration set anew. `compress` gets the
    moments of a block's layers and puts their factors into the model. The rest is as for `calibrate`; targets must be
    in the order of the forward pass.
    """
    done = 0
    for names in blocks_of(targets):
        block, so_far = {name: targets[name] for name in names}, done
        seen = [0]

        def tell(images: int, so_far: int = so_far, seen: list[int] = seen) -> None:
            seen[0] = images
            if progress:
                progress(so_far + images)

        compress(calibrate(model, batches(), block, seed=seed, pieces=pieces, progress=tell))
        done += seen[0]


def blocks_of(names: Iterable[str]) -> list[list[str]]:
    """Group layers by block, in order: a block is a name up to its last number, such as "blocks.3"."""
    blocks: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        last = max((i for i, part in enumerate(parts) if part.isdecimal()), default=len(parts) - 1)
        blocks.setdefault(".".join(parts[: last + 1]), []).append(name)
    return list(blocks.values())


def _back_and_forth(model: nn.Module, images: Tensor, seed: int, first: int) -> None:
    """A forward and a backward pass; images are numbered from `first`.

    This is a separate function so that the graph, whose hooks hold every layer's inputs, is freed at its end.
    """
    logits: Tensor = model(images.requires_grad_())
    check_finite(model, images, logits)
    labels = _draw_labels(logits.detach(), seed, first)
    torch.autograd.grad(functional.cross_entropy(logits, labels, reduction="sum"), images)


def _bytes_of_one(model: nn.Module, targets: Mapping[str, nn.Linear], image: Tensor) -> int:
    """Bytes that a forward pass of one image (1, 3, height, width) keeps for gradients, or slightly more.

    Raises `UserError` for a layer whose input for the image, or its position, changes when another image follows:
    gradients at its outputs cannot be assigned to images.
    """
    kept: dict[int, int] = {}
    inputs: dict[str, list[Tensor]] = {name: [] for name in targets}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # the tensor itself may be the output of the node that saves it: a cycle that is never
        # freed

    def see(name: str, _layer: nn.Module, given: tuple[Tensor, ...], _output: Tensor) -> None:
        inputs[name].append(keep(given[0]))

    with _hooked(targets, {name: partial(see, name) for name in targets}):
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits: Tensor = model(image.requires_grad_())
        check_finite(model, image, logits)
        of_model = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        found = sum(size for pointer, size in kept.items() if pointer not in of_model)
        with torch.no_grad():
            model(torch.cat([image, image.flip(-1)]))
    for name, seen in inputs.items():
        half = len(seen) // 2
        for alone, both in zip(seen[:half], seen[half:], strict=True):
            if not _comes_first(alone, both):
                raise UserError(
                    f"{name} does not take one image's tokens after another's, as its moments need. Leave it out."
                )
    return max(found, 1)


def _comes_first(alone: Tensor, both: Tensor) -> bool:
    """Whether the tokens (..., C) of one image are the first half of those of two images, up to rounding."""
    if both.numel() != 2 * alone.numel():
        return False
    alone_TC, both_TC = alone.flatten(0, -2), both.flatten(0, -2)
    off, spread = (both_TC[: len(alone_TC)] - alone_TC).norm(), (both_TC - both_TC.mean(dim=0)).norm()
    return float(off) <= 0.01 * float(spread) + 1e-4 * float(alone_TC.norm())


def _draw_labels(logits_NK: Tensor, seed: int, first: int) -> Tensor:
    """Draw a label (N,) for each image from its softmax; images are numbered from `first`."""
    positions = np.arange(first, first + len(logits_NK))
    uniforms = uniform_table(np.uint64(seed), 0, positions, Stream.LABEL, 1)[:, 0]
    cumulative = logits_NK.double().softmax(dim=1).cumsum(dim=1)
    below = cumulative < to_device(uniforms, logits_NK)[:, None]
    return below.sum(dim=1).clamp_(max=logits_NK.shape[1] - 1)


@contextmanager
def _hooked(targets: Mapping[str, nn.Linear], hooks: Mapping[str, _Seen]) -> Generator[None]:
    """Put a forward hook on each layer, by name; remove them at the end."""
    with ExitStack() as stack:
        for name, layer in targets.items():
            stack.callback(layer.register_forward_hook(hooks[name]).remove)
        yield


@contextmanager
def _at_rest(model: nn.Module) -> Generator[None]:
    """Set the model to evaluation mode, without gradients of its parameters; undo this at the end."""
    modes = {module: module.training for module in model.modules()}
    learned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with ExitStack() as stack:
        stack.callback(lambda: [setattr(module, "training", mode) for module, mode in modes.items()])
        stack.callback(lambda: [parameter.requires_grad_() for parameter in learned])
        model.eval()
        for parameter in learned:
            parameter.requires_grad_(False)  # a backward pass without them takes two thirds of the time
        yield


class _Sums:
    """Sums over one layer's tokens, from which its moments are computed."""

    def __init__(self, name: str, layer: nn.Linear, pieces: int) -> None:
        rows, cols = layer.weight.shape
        if pieces < 1 or rows % pieces:
            raise UserError(f"{name} has {rows} rows, which cannot be split into {pieces} equal pieces.")
        zeros = partial(torch.zeros, dtype=torch.float64, device=layer.weight.device)
        self._name, self._tokens = name, 0
        self._input_CC, self._gradient_RR = zeros(cols, cols), zeros(rows, rows)
        self._mean_C, self._magnitude_C, self._fisher_PC = zeros(cols), zeros(cols), zeros(pieces, cols)

    def see(self, images: int, _layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        """Add the inputs of a forward pass of `images` images, and its gradients when the backward pass runs."""
        x = inputs[0].detach()
        x_NTC = x.reshape(images, -1, x.shape[-1])
        self._tokens += x_NTC.shape[0] * x_NTC.shape[1]
        for part in x_NTC.reshape(-1, x.shape[-1]).split(max(_CHUNK // x.shape[-1], 1)):
            chunk = part.double()
            _add_products(self._input_CC, chunk)
            self._mean_C += chunk.sum(dim=0)
            self._magnitude_C += chunk.abs().sum(dim=0)
        output.register_hook(partial(self._see_gradient, x_NTC))

    def _see_gradient(self, x_NTC: Tensor, gradient: Tensor) -> None:
        g_NTR = gradient.detach().reshape(len(x_NTC), -1, gradient.shape[-1])
        tokens, rows, cols = g_NTR.shape[1], g_NTR.shape[2], x_NTC.shape[2]
        size = max(_CHUNK // (tokens * (tokens + rows + cols)), 1)
        for x, g in zip(x_NTC.split(size), g_NTR.split(size), strict=True):
            x64, g64 = x.double(), g.double()
            _add_products(self._gradient_RR, g64.reshape(-1, rows))
            self._fisher_PC += squared_gradients(x64, g64, len(self._fisher_PC))

    def moments(self, images: int) -> Moments:
        if not self._tokens:
            raise UserError(
                f"{self._name} cannot be calibrated: the model's forward pass does not call it, but reads its weight "
                "directly or does not use it. Leave this layer out."
            )
        of_tokens, of_images = (self._input_CC, self._mean_C, self._magnitude_C), (self._gradient_RR, self._fisher_PC)
        for total, count in (*((one, self._tokens) for one in of_tokens), *((one, images) for one in of_images)):
            total.div_(count)  # in place: the sums are gigabytes
        for upper in (self._input_CC, self._gradient_RR):
            upper.copy_(upper.triu() + upper.triu(1).mT)
        return Moments(images, self._tokens, *of_tokens, *of_images)


def _add_products(total_NN: Tensor, vectors_TN: Tensor) -> None:
    """Add the sum over vectors of v v^T, only in the upper triangle of blocks, which is half of the work."""
    for low in range(0, len(total_NN), _BLOCK):
        block = slice(low, low + _BLOCK)
        total_NN[block, low:].addmm_(vectors_TN[:, block].T, vectors_TN[:, low:])


def squared_gradients(x_NTC: Tensor, g_NTR: Tensor, pieces: int) -> Tensor:
    """The squared gradient of each weight, summed over images and over the rows of each piece: (P, C).

    An image's gradient is g^T x (R, C). With few tokens this product is avoided: the sum over rows of its squares is
    the diagonal of x^T (g g^T) x, which costs T (R + C) instead of R C for each token.
    """
    (images, tokens, rows), cols = g_NTR.shape, x_NTC.shape[2]
    g_NPTR = g_NTR.reshape(images, tokens, pieces, -1).transpose(1, 2)
    if tokens * (rows + pieces * cols) < rows * cols:
        inner_NPTT = g_NPTR @ g_NPTR.transpose(2, 3)
        return torch.einsum("nptc,ntc->pc", inner_NPTT @ x_NTC[:, None], x_NTC)
    total = torch.zeros(pieces, cols, dtype=x_NTC.dtype, device=x_NTC.device)
    size = max(_CHUNK // (rows * cols), 1)
    for x, g in zip(x_NTC.split(size), g_NPTR.split(size), strict=True):
        total += (g.transpose(2, 3) @ x[:, None]).square_().sum(dim=(0, 2))
    return total
