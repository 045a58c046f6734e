"""A run's options: one frozen dataclass a group; to each field a docstring, its `Range`, and whether it `MAY_CHANGE`.

What may differ between the ranks of a run says `PER_RANK`; all else is compared between them when they start.
Groups do not show in the flags, so every field's name is unique over all of them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import arg

from lowrank_vit.common.arguments import ABOVE_0, NOT_NEGATIVE, POSITIVE, SHARE, SHARE_BELOW_1, Range
from lowrank_vit.config.data_options import Data
from lowrank_vit.config.low_rank_options import LowRank
from lowrank_vit.config.option_types import AUTO, MAY_CHANGE, PER_RANK, Alone, NotHere
from lowrank_vit.config.tracking_options import Tracking

_NO_PLATEAU = NotHere(
    "plateau",
    "it would follow a validation score, which a run resumed within an epoch does not have. Use --sched multistep with "
    "--decay-milestones, or --sched cosine",
)


_AUTO_OR_COUNT = arg(metavar="auto|INT", help_behavior_hint="(default: auto)")
_ON_WITH_CUDA = arg(help_behavior_hint="(default: on with CUDA)")


def has_cuda() -> bool:
    """Whether torch finds a GPU."""
    from lowrank_vit.common import devices  # torch takes seconds, which --help or a wrong option must not cost

    return devices.has_cuda()


@dataclass(frozen=True)
class Model:
    """The network: any timm model."""

    model: str = "vit_small_patch16_224"
    """timm model name, or hf-hub:OWNER/NAME, or local-dir:DIR in timm's hub layout."""
    model_from: Annotated[str, MAY_CHANGE] = ""
    """Set by such a --model, with the hub's commit: whose weights --pretrained reads; --model is then its timm name."""
    model_kwargs: tuple[str, ...] = ()
    """Arguments for the model's constructor: NAME=VALUE ..."""
    num_classes: Annotated[int | None, Range(2)] = None
    """Must be the number of classes of the data, which is the default; see --larger-head."""
    larger_head: bool = False
    """Let --num-classes be more than the data have: outputs without a class."""
    trust_labels: Annotated[bool, MAY_CHANGE] = False
    """Where names cannot be matched, label N is label N of the other set and output N of the weights to start from."""
    class_order: Annotated[Literal["timm", "code-point"], MAY_CHANGE] = "timm"
    """Of the outputs of weights that name no classes: timm's order of the class folders, or torchvision's."""
    head_init_scale: Annotated[float | None, Range(), MAY_CHANGE] = None
    """Multiply the classifier's first weights and bias by this."""
    head_init_bias: Annotated[float | None, Range(), MAY_CHANGE] = None
    """First bias of the classifier."""
    fix_init: Annotated[bool, MAY_CHANGE] = False
    """Draw single entries of fresh weights anew that are more than 10 standard deviations out, from --seed."""
    sync_bn: Annotated[bool, MAY_CHANGE] = False
    """As in timm, for models without BatchNorm, of which it is true; for others it is refused."""
    drop: Annotated[float, SHARE_BELOW_1] = 0.0
    """Dropout rate before the classifier."""
    drop_path: Annotated[float | None, SHARE_BELOW_1] = None
    """Stochastic depth rate of the last block."""
    pretrained: Annotated[bool, MAY_CHANGE] = False
    """Start from the weights that timm publishes for the model."""
    pretrained_path: Annotated[Path | None, MAY_CHANGE, PER_RANK] = None
    """The same from a local file; position embedding and classifier are made to fit."""
    initial_checkpoint: Annotated[Path | None, MAY_CHANGE, PER_RANK] = None
    """Start from the weights of this checkpoint (no optimizer, epoch 0)."""
    grad_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Compute activations anew in the backward pass: less memory, a third more time."""
    model_ema: bool = True
    """Keep an exponential moving average of the weights, and validate it."""
    model_ema_decay: Annotated[float, SHARE_BELOW_1] = 0.9998
    """Decay of the moving average a step."""
    model_ema_warmup: Annotated[bool | None, arg(metavar="")] = None
    """Let the decay grow from 0 over the first steps, as timm's ModelEmaV3 does; default: in runs of fewer than
    10 / (1 - decay) updates, 50,000 at 0.9998."""


@dataclass(frozen=True)
class Optim:
    """Optimizer and learning rate; names and meanings are timm's."""

    opt: str = "sgd"
    """timm optimizer name, e.g. adamw, or lookahead_adamw."""
    opt_eps: Annotated[float | None, ABOVE_0] = None
    """Optimizer epsilon; default: the optimizer's own."""
    opt_betas: Annotated[tuple[float, ...] | None, SHARE_BELOW_1] = None
    """Optimizer betas, two or more; default: the optimizer's own."""
    opt_kwargs: tuple[str, ...] = ()
    """Other arguments for the optimizer's constructor: NAME=VALUE ..."""
    muon_fallback: bool = True
    """timm's Muon family: leave first layer, embeddings and classifier to its AdamW, as Muon's authors advise."""
    momentum: Annotated[float, SHARE_BELOW_1] = 0.9
    """Momentum of sgd-like optimizers."""
    weight_decay: Annotated[float, arg(aliases=["--wd"]), NOT_NEGATIVE] = 2e-5
    """Weight decay."""
    lr: Annotated[float | None, ABOVE_0] = None
    """Learning rate, taken as it is; default: --lr-base scaled by the global batch."""
    lr_base: Annotated[float, ABOVE_0] = 0.1
    """Learning rate at a global batch of --lr-base-size."""
    lr_base_size: Annotated[int, POSITIVE] = 256
    """Global batch that --lr-base is meant for."""
    lr_base_scale: Literal["", "linear", "sqrt"] = ""
    """How --lr-base grows with the batch; default: sqrt for ada* and lamb, else linear."""
    layer_decay: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Learning-rate factor from each layer to the one before it."""
    layer_decay_min_scale: Annotated[float, SHARE] = 0.0
    """With --layer-decay: least factor of a layer."""
    layer_decay_no_opt_scale: Annotated[float | None, SHARE] = None
    """With --layer-decay: layers whose factor is below this are not trained."""
    clip_grad: Annotated[float | None, ABOVE_0] = None
    """Clip gradients at this value; default: no clipping."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What --clip-grad bounds."""
    grad_accum_steps: Annotated[int, POSITIVE, MAY_CHANGE] = 1
    """Batches an update; the same update as one batch as large as all of them."""
    global_batch_size: Annotated[int | None, POSITIVE, MAY_CHANGE] = None
    """Images an update, of all devices however many: --batch-size is then the most that one takes at once, and the
    accumulation follows."""
    sched: Annotated[
        Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"], _NO_PLATEAU
    ] = "cosine"
    """timm learning-rate schedule; constant: after the warm-up; none: no warm-up either, nor --layer-decay."""
    sched_on_updates: bool = False
    """Move the schedule at every update instead of every epoch."""
    epochs: Annotated[int, POSITIVE, MAY_CHANGE] = 300
    """Training epochs, warm-up included."""
    warmup_epochs: Annotated[int, NOT_NEGATIVE] = 5
    """Epochs of linear warm-up."""
    warmup_prefix: bool = False
    """Put the warm-up before --epochs, which are then all the schedule's."""
    warmup_lr: Annotated[float, NOT_NEGATIVE] = 1e-5
    """Learning rate at the start of the warm-up."""
    min_lr: Annotated[float, NOT_NEGATIVE] = 0.0
    """Learning rate at the end."""
    cooldown_epochs: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 0
    """Epochs at --min-lr after the schedule."""
    decay_epochs: Annotated[float | None, ABOVE_0] = None
    """step: epochs between two decays, default 90; wsd and rsqrt: length of the decay, default a fifth (0.2) of all."""
    decay_rate: Annotated[float, arg(aliases=["--dr"]), ABOVE_0] = 0.1
    """step and multistep: factor of a decay; poly: the power."""
    decay_milestones: Annotated[tuple[int, ...], POSITIVE] = (90, 180, 270)
    """multistep: epochs, counted from 1, that begin with a decay."""
    lr_decay_fn: Literal["", "linear", "1-sqrt", "cosine", "power", "exp"] = ""
    """wsd and rsqrt: form of the decay; default: 1-sqrt for wsd, linear for rsqrt."""
    lr_stable_timescale: Annotated[float | None, ABOVE_0] = None
    """rsqrt: its time scale, epochs; default: --warmup-epochs."""
    lr_cycle_mul: Annotated[float, ABOVE_0] = 1.0
    """cosine, tanh, poly: length of each cycle by that before it."""
    lr_cycle_decay: Annotated[float, ABOVE_0] = 0.5
    """cosine, tanh, poly: peak learning rate of each cycle by that before it."""
    lr_cycle_limit: Annotated[int, POSITIVE] = 1
    """cosine, tanh, poly: number of cycles; --epochs is the length of the first."""
    lr_k_decay: Annotated[float, ABOVE_0] = 1.0
    """cosine, poly: k of k-decay."""
    lr_noise: Annotated[tuple[float, ...] | None, NOT_NEGATIVE] = None
    """Noise on the learning rate: where it begins, and where it ends, as shares of --epochs."""
    lr_noise_pct: Annotated[float, ABOVE_0] = 0.67
    """Greatest noise, as a share of the learning rate."""
    lr_noise_std: Annotated[float, NOT_NEGATIVE] = 1.0
    """Standard deviation of the noise."""


@dataclass(frozen=True)
class Augment:
    """Augmentation on the device; names and meanings are timm's."""

    aa: str = "none"
    """Policy: rand-m9-mstd0.5-inc1 and all of timm's RandAugment, original, originalr, v0, v0r, 3a, or none."""
    color_jitter: Annotated[tuple[float, ...], NOT_NEGATIVE] = (0.4,)
    """Strength of colour jitter, one number or brightness, contrast, saturation; off with any --aa but 3a."""
    aug_repeats: Annotated[float, Range(0, 2**16)] = 0.0
    """How often an image comes in an epoch, cropped and augmented anew each time; an epoch is as long, with fewer
    images; 0 and 1: once."""
    reprob: Annotated[float, SHARE] = 0.0
    """Random erasing probability."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """Random erasing fill: zeros, one normal colour a box, or normal noise."""
    recount: Annotated[int, POSITIVE] = 1
    """Random erasing: greatest number of boxes an image."""
    erase_first: bool = False
    """Erase before mixing, as timm does without its prefetcher; default: after it."""
    resplit: bool = False
    """Leave the first augmentation split unerased; without splits it changes nothing, as in timm."""
    smoothing: Annotated[float, SHARE_BELOW_1] = 0.1
    """Label smoothing."""
    bce_loss: bool = False
    """Binary cross entropy of each class instead of cross entropy."""
    bce_sum: bool = False
    """With --bce-loss: sum over the classes instead of their mean."""
    bce_target_thresh: Annotated[float | None, SHARE] = None
    """With --bce-loss: targets above this count as 1, others as 0."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.0
    """Mixup alpha; 0: no mixup."""
    cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
    """Cutmix alpha; 0: no cutmix."""
    mixup_prob: Annotated[float, SHARE] = 1.0
    """Probability that a block is mixed at all."""
    mixup_switch_prob: Annotated[float, SHARE] = 0.5
    """Probability of cutmix where both are on."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """One draw for each block of --mix-block images, for each pair, or for each image."""
    mix_block: Annotated[int, NOT_NEGATIVE] = 128
    """Images of the global batch that mix among themselves, with one draw, whatever the ranks and the accumulation; 0:
    all. As timm with batches of that many on each GPU."""
    cutmix_minmax: Annotated[tuple[float, float] | None, SHARE] = None
    """Least and greatest side of cutmix's box as a share of the image; replaces --cutmix."""
    mixup_off_epoch: Annotated[int, NOT_NEGATIVE] = 0
    """Epoch from which nothing is mixed; 0: never."""


@dataclass(frozen=True)
class Step:
    """How a step is computed."""

    device: Annotated[str, MAY_CHANGE, PER_RANK] = "auto"
    """auto (cuda where there is one), cpu, cuda, or cuda:N; with torchrun each process has the GPU of its rank."""
    amp: Annotated[bool, _ON_WITH_CUDA, MAY_CHANGE] = field(default_factory=has_cuda)
    """Mixed precision."""
    amp_dtype: Annotated[Literal["bfloat16", "float16"], MAY_CHANGE] = "bfloat16"
    """What --amp computes in; float16 scales the loss."""
    tf32: Annotated[bool, MAY_CHANGE] = True
    """Without --amp: TF32 in matrix products on CUDA, as in timm. Spectra never use it."""
    compile: Annotated[bool, _ON_WITH_CUDA, MAY_CHANGE] = field(default_factory=has_cuda)
    """torch.compile the step, which takes about a minute."""
    compile_mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"], MAY_CHANGE
    ] = "default"
    """torch.compile's mode."""
    compile_cache: Annotated[Path | None, MAY_CHANGE, PER_RANK] = None
    """Where compiled code is kept for the next start; default: ~/.cache/lowrank-vit, or TORCHINDUCTOR_CACHE_DIR."""


@dataclass(frozen=True)
class Spectra:
    """The spectral monitor: singular values of the weights while they train."""

    spec_monitor: Annotated[bool, MAY_CHANGE] = False
    """Record spectra of the model and of its EMA."""
    spec_every: Annotated[int, POSITIVE, MAY_CHANGE] = 100
    """Optimizer updates between two refreshes."""
    spec_full_every: Annotated[int | None, POSITIVE, AUTO, _AUTO_OR_COUNT, MAY_CHANGE] = None
    """One in so many refreshes computes the whole spectra, the others the first values and vectors alone; 1: all do;
    auto: such that it costs as much as the others until the next."""
    spec_topk: Annotated[int, POSITIVE, MAY_CHANGE] = 8
    """How many singular values and vectors to record from each end."""
    spec_interval: Annotated[int, POSITIVE, MAY_CHANGE] = 1
    """Distance between the recorded indices: 1, 1+i, 1+2i, ..."""
    spec_targets: Annotated[str, MAY_CHANGE] = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
    """Endings of the modules to watch, separated by commas."""
    spec_split_qkv: Annotated[bool, MAY_CHANGE] = False
    """Watch Q, K and V as three matrices."""
    spec_circuits: Annotated[Literal["none", "raw", "folded"], Alone("raw"), MAY_CHANGE] = "none"
    """Also of each head W_Q^T W_K, W_O W_V and how blocks compose; folded: with the norm's weight and LayerScale."""
    spec_solver: Annotated[Literal["gram64", "svd"], MAY_CHANGE] = "gram64"
    """float64 Gram matrix, certified, or the slow reference: float64 SVD."""
    spec_on_cpu: Annotated[bool, MAY_CHANGE] = False
    """Compute on CPU threads even when the model is on a GPU."""
    spec_cpu_threads: Annotated[int | None, POSITIVE, MAY_CHANGE, PER_RANK] = None
    """Cores that the monitor may use of a CPU; default: a quarter of them, at least 1."""
    spec_store_gb: Annotated[float, ABOVE_0, MAY_CHANGE] = 2.0
    """Size limit of the run's spectra/, 10^9 bytes; beyond it older refreshes are thinned out evenly."""
    spec_log: Annotated[Literal["means", "all"], MAY_CHANGE] = "means"
    """What metrics.jsonl gets of them: means by type, or every number, about 1 MB a refresh of ViT-B, without limit."""
    spec_updates: Annotated[bool, MAY_CHANGE] = False
    """Also record the spectra of the model's changes between refreshes and of the optimizer's direction."""
    spec_flows: Annotated[bool, MAY_CHANGE] = False
    """At each validation: spectra of the blocks' outputs, and entropies of attention, on some of its images."""
    spec_flow_images: Annotated[int, POSITIVE, MAY_CHANGE] = 256
    """How many images --spec-flows takes; the same ones each time."""


@dataclass(frozen=True)
class Run:
    """Where results go and how much is said."""

    output: Annotated[Path, MAY_CHANGE] = Path("output")
    """Parent of the run directories."""
    experiment: Annotated[str, MAY_CHANGE] = ""
    """Name of the run directory; default: a name made of configuration or model and time."""
    resume: Annotated[Path | None, MAY_CHANGE] = None
    """Continue the run of this last.pth.tar, in its own run directory."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 42
    """Seed of the plan and of the model's own randomness."""
    seeds: Annotated[
        tuple[int, ...] | None, arg(metavar="INT INT ...", help_behavior_hint=""), Range(0, 2**63 - 1), MAY_CHANGE
    ] = None
    """Instead: train under each of these in turn, in EXPERIMENT-seedN; the same again goes on with what is left."""
    log_interval: Annotated[int, POSITIVE, MAY_CHANGE] = 50
    """Updates between two lines in metrics.jsonl."""
    val_interval: Annotated[int, POSITIVE, MAY_CHANGE] = 1
    """Epochs between two validations (the last epoch is always validated)."""
    eval_metric: Literal["top1", "top5", "loss"] = "top1"
    """Which validation score tells the best checkpoint, of the model or of its EMA, whichever scores higher."""
    tta: Annotated[Literal[0, 2], MAY_CHANGE] = 0
    """2: score the mean of each validation image and its mirror image."""
    checkpoint_hist: Annotated[int, POSITIVE, MAY_CHANGE] = 10
    """How many of the best validated epochs to keep as checkpoint-EPOCH.pth.tar."""
    checkpoint_interval: Annotated[str, MAY_CHANGE] = ""
    """Save last.pth.tar also every so many updates (500) or minutes (10m); default: after each epoch."""
    rank_timeout: Annotated[float, Range(1, 1e8), MAY_CHANGE] = 600.0
    """Several ranks: seconds for which they wait for one without progress, which is then named and ends the run."""
    init_timeout: Annotated[float, Range(1, 1e8), MAY_CHANGE] = 3600.0
    """The same from the start, when data are opened and code is compiled, until the first update is done."""


@dataclass(frozen=True)
class Config:
    """Train a ViT from .beton files and watch its spectra."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    augment: Augment = field(default_factory=Augment)
    step: Step = field(default_factory=Step)
    spectra: Spectra = field(default_factory=Spectra)
    lowrank: LowRank = field(default_factory=LowRank)
    run: Run = field(default_factory=Run)
    tracking: Tracking = field(default_factory=Tracking)
