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
    """Set by the program when --model names a hub model: its source and commit. Do not set it yourself."""
    model_kwargs: tuple[str, ...] = ()
    """Extra arguments for the model's constructor, as NAME=VALUE ..."""
    num_classes: Annotated[int | None, Range(2)] = None
    """Number of classes; default: that of the data. More than that needs --larger-head."""
    larger_head: bool = False
    """Allow --num-classes to exceed the classes of the data; the extra outputs have no class."""
    trust_labels: Annotated[bool, MAY_CHANGE] = False
    """If class names cannot be matched, take label N of one set as label N of the other and as output N of the
    initial weights."""
    class_order: Annotated[Literal["timm", "code-point"], MAY_CHANGE] = "timm"
    """Class order of initial weights that do not name their classes: timm's order of folders, or torchvision's."""
    head_init_scale: Annotated[float | None, Range(), MAY_CHANGE] = None
    """Multiply the classifier's initial weights and bias by this factor."""
    head_init_bias: Annotated[float | None, Range(), MAY_CHANGE] = None
    """Initial bias of the classifier."""
    fix_init: Annotated[bool, MAY_CHANGE] = False
    """Redraw (by --seed) single initial weights that are more than 10 standard deviations from the mean."""
    sync_bn: Annotated[bool, MAY_CHANGE] = False
    """Synchronise BatchNorm across GPUs. ViTs have none, so nothing changes; models with BatchNorm are refused."""
    drop: Annotated[float, SHARE_BELOW_1] = 0.0
    """Dropout rate before the classifier."""
    drop_path: Annotated[float | None, SHARE_BELOW_1] = None
    """Stochastic depth rate of the last block."""
    pretrained: Annotated[bool, MAY_CHANGE] = False
    """Start from the weights that timm publishes for the model."""
    pretrained_path: Annotated[Path | None, MAY_CHANGE, PER_RANK] = None
    """Start from weights in a local file; position embedding and classifier are adapted to the model."""
    initial_checkpoint: Annotated[Path | None, MAY_CHANGE, PER_RANK] = None
    """Start from the weights of this checkpoint, with a new optimizer, at epoch 0."""
    grad_checkpointing: Annotated[bool, MAY_CHANGE] = False
    """Recompute activations in the backward pass: less memory, about a third more time."""
    model_ema: bool = True
    """Keep an exponential moving average (EMA) of the weights, and validate it too."""
    model_ema_decay: Annotated[float, SHARE_BELOW_1] = 0.9998
    """Decay of the EMA per update."""
    model_ema_warmup: Annotated[bool | None, arg(metavar="")] = None
    """Increase the EMA's decay from 0 over the first updates, as timm's ModelEmaV3 does; default: on in runs of fewer
    than 10 / (1 - decay) updates (50,000 at 0.9998)."""


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
    """Extra arguments for the optimizer's constructor, as NAME=VALUE ..."""
    muon_fallback: bool = True
    """With timm's Muon optimizers: train the first layer, embeddings and classifier with AdamW, as Muon's authors
    advise."""
    momentum: Annotated[float, SHARE_BELOW_1] = 0.9
    """Momentum of sgd-like optimizers."""
    weight_decay: Annotated[float, arg(aliases=["--wd"]), NOT_NEGATIVE] = 2e-5
    """Weight decay."""
    lr: Annotated[float | None, ABOVE_0] = None
    """Learning rate, used unchanged; default: --lr-base scaled with the global batch."""
    lr_base: Annotated[float, ABOVE_0] = 0.1
    """Without --lr: learning rate for a global batch of --lr-base-size images."""
    lr_base_size: Annotated[int, POSITIVE] = 256
    """Without --lr: the global batch to which --lr-base belongs."""
    lr_base_scale: Literal["", "linear", "sqrt"] = ""
    """Without --lr: how the learning rate scales with the batch; default: sqrt for ada* and lamb, otherwise linear."""
    layer_decay: Annotated[float | None, Range(0, 1, open_low=True)] = None
    """Multiply the learning rate by this factor for each layer towards the input."""
    layer_decay_min_scale: Annotated[float, SHARE] = 0.0
    """With --layer-decay: lower limit of a layer's factor."""
    layer_decay_no_opt_scale: Annotated[float | None, SHARE] = None
    """With --layer-decay: freeze layers whose factor is below this."""
    clip_grad: Annotated[float | None, ABOVE_0] = None
    """Limit for gradient clipping, see --clip-mode; default: no clipping."""
    clip_mode: Literal["norm", "value", "agc"] = "norm"
    """What --clip-grad limits: norm, the norm of all gradients together; value, each entry; agc, each unit's gradient
    norm relative to its weight norm (adaptive clipping)."""
    grad_accum_steps: Annotated[int, POSITIVE, MAY_CHANGE] = 1
    """Batches per update. Their gradients are averaged, so the update is that of one batch as large as all of them."""
    global_batch_size: Annotated[int | None, POSITIVE, MAY_CHANGE] = None
    """Images per update, over all GPUs. --batch-size is then the largest batch of one GPU, and the number of
    accumulation steps follows."""
    sched: Annotated[
        Literal["cosine", "tanh", "step", "multistep", "poly", "wsd", "rsqrt", "constant", "none"], _NO_PLATEAU
    ] = "cosine"
    """timm learning-rate schedule. constant: constant after the warm-up. none: no warm-up and no --layer-decay
    either."""
    sched_on_updates: bool = False
    """Change the learning rate at every update instead of every epoch."""
    epochs: Annotated[int, POSITIVE, MAY_CHANGE] = 300
    """Training epochs, warm-up included."""
    warmup_epochs: Annotated[int, NOT_NEGATIVE] = 5
    """Epochs of linear warm-up."""
    warmup_prefix: bool = False
    """Add the warm-up before --epochs instead of counting it among them."""
    warmup_lr: Annotated[float, NOT_NEGATIVE] = 1e-5
    """Learning rate at the start of the warm-up."""
    min_lr: Annotated[float, NOT_NEGATIVE] = 0.0
    """Learning rate at the end of the schedule."""
    cooldown_epochs: Annotated[int, NOT_NEGATIVE, MAY_CHANGE] = 0
    """Epochs at --min-lr after the schedule."""
    decay_epochs: Annotated[float | None, ABOVE_0] = None
    """--sched step: epochs between two decays, default 90. wsd and rsqrt: length of the final decay, default a fifth
    (0.2) of all epochs."""
    decay_rate: Annotated[float, arg(aliases=["--dr"]), ABOVE_0] = 0.1
    """--sched step and multistep: factor of each decay. poly: the power."""
    decay_milestones: Annotated[tuple[int, ...], POSITIVE] = (90, 180, 270)
    """--sched multistep: epochs (counted from 1) at whose start the learning rate decays."""
    lr_decay_fn: Literal["", "linear", "1-sqrt", "cosine", "power", "exp"] = ""
    """--sched wsd and rsqrt: shape of the final decay; default: 1-sqrt for wsd, linear for rsqrt."""
    lr_stable_timescale: Annotated[float | None, ABOVE_0] = None
    """--sched rsqrt: time scale in epochs; default: --warmup-epochs."""
    lr_cycle_mul: Annotated[float, ABOVE_0] = 1.0
    """--sched cosine, tanh, poly: each cycle is this many times as long as the one before."""
    lr_cycle_decay: Annotated[float, ABOVE_0] = 0.5
    """--sched cosine, tanh, poly: each cycle starts at this many times the learning rate of the one before."""
    lr_cycle_limit: Annotated[int, POSITIVE] = 1
    """--sched cosine, tanh, poly: number of cycles; --epochs is the length of the first."""
    lr_k_decay: Annotated[float, ABOVE_0] = 1.0
    """--sched cosine, poly: exponent k of k-decay (arXiv 2004.05909); larger k keeps the learning rate high for
    longer."""
    lr_noise: Annotated[tuple[float, ...] | None, NOT_NEGATIVE] = None
    """Add noise to the learning rate from this share of --epochs on; a second number says where it ends."""
    lr_noise_pct: Annotated[float, ABOVE_0] = 0.67
    """With --lr-noise: largest noise, as a share of the learning rate."""
    lr_noise_std: Annotated[float, NOT_NEGATIVE] = 1.0
    """With --lr-noise: standard deviation of the noise before it is limited."""


@dataclass(frozen=True)
class Augment:
    """Augmentation on the device; names and meanings are timm's."""

    aa: str = "none"
    """Augmentation policy: timm's RandAugment (such as rand-m9-mstd0.5-inc1), AutoAugment (original, originalr, v0,
    v0r), 3a (3-Augment), or none."""
    color_jitter: Annotated[tuple[float, ...], NOT_NEGATIVE] = (0.4,)
    """Strength of colour jitter: one number, or one each for brightness, contrast, saturation. Any --aa except 3a
    switches it off, as in timm."""
    aug_repeats: Annotated[float, Range(0, 2**16), arg(metavar="INT")] = 0.0
    """Repeated augmentation: show each image N times per epoch, cropped and augmented anew each time. The epoch stays
    as long, so it holds fewer different images. 0 or 1: off."""
    reprob: Annotated[float, SHARE] = 0.0
    """Probability of random erasing."""
    remode: Literal["const", "rand", "pixel"] = "pixel"
    """What random erasing fills a box with: zeros (const), one random colour (rand), or noise (pixel)."""
    recount: Annotated[int, POSITIVE] = 1
    """Random erasing: largest number of boxes per image."""
    erase_first: bool = False
    """Erase before mixup and cutmix, as timm does without its prefetcher; default: after them."""
    resplit: bool = False
    """Do not erase in the first augmentation split. There are no splits here, so nothing changes; accepted for timm's
    command lines."""
    smoothing: Annotated[float, SHARE_BELOW_1] = 0.1
    """Label smoothing."""
    bce_loss: bool = False
    """Use binary cross entropy for each class instead of softmax cross entropy."""
    bce_sum: bool = False
    """With --bce-loss: sum over the classes instead of averaging."""
    bce_target_thresh: Annotated[float | None, SHARE] = None
    """With --bce-loss: set targets above this to 1 and all others to 0."""
    mixup: Annotated[float, NOT_NEGATIVE] = 0.0
    """Mixup alpha; 0 switches it off."""
    cutmix: Annotated[float, NOT_NEGATIVE] = 0.0
    """Cutmix alpha; 0 switches it off."""
    mixup_prob: Annotated[float, SHARE] = 1.0
    """Probability that mixup or cutmix is applied."""
    mixup_switch_prob: Annotated[float, SHARE] = 0.5
    """If both are on: probability of cutmix rather than mixup."""
    mixup_mode: Literal["batch", "pair", "elem"] = "batch"
    """How often mixing is drawn: once per block of --mix-block images (batch), per pair of images, or per image
    (elem)."""
    mix_block: Annotated[int, NOT_NEGATIVE] = 128
    """Images of the global batch that are mixed with one another; 0: all of them. With an even --batch-size the
    result does not depend on GPUs or accumulation: it is that of timm with this batch size on each GPU."""
    cutmix_minmax: Annotated[tuple[float, float] | None, SHARE] = None
    """Smallest and largest side of the cutmix box, as shares of the image; replaces --cutmix."""
    mixup_off_epoch: Annotated[int, NOT_NEGATIVE] = 0
    """Stop mixup and cutmix after so many epochs; 0: never."""


@dataclass(frozen=True)
class Step:
    """How a step is computed."""

    device: Annotated[str, MAY_CHANGE, PER_RANK] = "auto"
    """auto (cuda if there is one), cpu, cuda, or cuda:N. With torchrun, each process uses the GPU of its rank."""
    amp: Annotated[bool, _ON_WITH_CUDA, MAY_CHANGE] = field(default_factory=has_cuda)
    """Mixed precision."""
    amp_dtype: Annotated[Literal["bfloat16", "float16"], MAY_CHANGE] = "bfloat16"
    """Number type of --amp. float16 also scales the loss."""
    tf32: Annotated[bool, MAY_CHANGE] = True
    """Without --amp: use TF32 for matrix products on CUDA, as timm does. Spectra never use it."""
    compile: Annotated[bool, _ON_WITH_CUDA, MAY_CHANGE] = field(default_factory=has_cuda)
    """Compile the training step with torch.compile, which takes about a minute."""
    compile_mode: Annotated[
        Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"], MAY_CHANGE
    ] = "default"
    """torch.compile's mode."""
    compile_cache: Annotated[Path | None, MAY_CHANGE, PER_RANK] = None
    """Folder for compiled code, for the next start; default: TORCHINDUCTOR_CACHE_DIR, or ~/.cache/lowrank-vit."""


@dataclass(frozen=True)
class Spectra:
    """The spectral monitor: singular values of the weights while they train."""

    spec_monitor: Annotated[bool, MAY_CHANGE] = False
    """Record spectra of the model and of its EMA."""
    spec_every: Annotated[int, POSITIVE, MAY_CHANGE] = 100
    """Updates between two measurements (refreshes) of the spectra."""
    spec_full_every: Annotated[int | None, POSITIVE, AUTO, _AUTO_OR_COUNT, MAY_CHANGE] = None
    """Every N-th refresh computes all singular values, the others only the largest with their vectors. 1: all do. auto:
    so that the complete refresh costs as much as the others together."""
    spec_topk: Annotated[int, POSITIVE, MAY_CHANGE] = 8
    """How many singular values and vectors to record from each end of a spectrum."""
    spec_interval: Annotated[int, POSITIVE, MAY_CHANGE] = 1
    """Step between the recorded indices: 1, 1+i, 1+2i, ..."""
    spec_targets: Annotated[str, MAY_CHANGE] = "attn.qkv,attn.proj,mlp.fc1,mlp.fc2"
    """Names of the modules to watch, or their endings, separated by commas."""
    spec_split_qkv: Annotated[bool, MAY_CHANGE] = False
    """Watch Q, K and V as three matrices."""
    spec_circuits: Annotated[Literal["none", "raw", "folded"], Alone("raw"), MAY_CHANGE] = "none"
    """Also watch the circuits of each head, W_Q^T W_K and W_O W_V, and how blocks compose. folded: include the norm's
    weight and LayerScale."""
    spec_solver: Annotated[Literal["gram64", "svd"], MAY_CHANGE] = "gram64"
    """gram64: float64 Gram matrix with proven error bounds. svd: float64 SVD, the slow reference."""
    spec_on_cpu: Annotated[bool, MAY_CHANGE] = False
    """Compute spectra on CPU threads even if the model is on a GPU."""
    spec_cpu_threads: Annotated[int | None, POSITIVE, MAY_CHANGE, PER_RANK] = None
    """CPU cores that the monitor may use; default: a quarter of them, at least 1."""
    spec_store_gb: Annotated[float, ABOVE_0, MAY_CHANGE] = 2.0
    """Size limit of the run's spectra/ folder in GB (10^9 bytes). Above it, older refreshes are thinned out evenly."""
    spec_log: Annotated[Literal["means", "all"], MAY_CHANGE] = "means"
    """What metrics.jsonl gets: means by type, or every number (about 1 MB per refresh of ViT-B)."""
    spec_updates: Annotated[bool, MAY_CHANGE] = False
    """Also record spectra of how the weights changed between refreshes, and of the optimizer's direction."""
    spec_flows: Annotated[bool, MAY_CHANGE] = False
    """At each validation, record spectra of the blocks' outputs and entropies of attention on some of its images."""
    spec_flow_images: Annotated[int, POSITIVE, MAY_CHANGE] = 256
    """Number of images for --spec-flows; the same ones each time."""


@dataclass(frozen=True)
class Run:
    """Where results go and how much is said."""

    output: Annotated[Path, MAY_CHANGE] = Path("output")
    """Parent of the run directories."""
    experiment: Annotated[str, MAY_CHANGE] = ""
    """Name of the run directory; default: configuration or model, and time."""
    resume: Annotated[Path | None, MAY_CHANGE] = None
    """Continue the run of this last.pth.tar in its own run directory."""
    seed: Annotated[int, Range(0, 2**63 - 1)] = 42
    """Seed of everything random: data order, augmentation, initial weights, dropout."""
    seeds: Annotated[
        tuple[int, ...] | None, arg(metavar="INT INT ...", help_behavior_hint=""), Range(0, 2**63 - 1), MAY_CHANGE
    ] = None
    """Train with each of these seeds in turn, in EXPERIMENT-seedN. The same command again continues the series."""
    log_interval: Annotated[int, POSITIVE, MAY_CHANGE] = 50
    """Updates between two lines of training figures, on the console and in metrics.jsonl."""
    val_interval: Annotated[int, POSITIVE, MAY_CHANGE] = 1
    """Epochs between two validations. The last epoch is always validated."""
    eval_metric: Literal["top1", "top5", "loss"] = "top1"
    """Validation score that decides which checkpoint is best. The better of model and EMA counts."""
    tta: Annotated[Literal[0, 2], MAY_CHANGE] = 0
    """2: average the scores of each validation image and its mirror image."""
    checkpoint_hist: Annotated[int, POSITIVE, MAY_CHANGE] = 10
    """How many of the best epochs to keep as checkpoint-EPOCH.pth.tar."""
    checkpoint_interval: Annotated[str, MAY_CHANGE] = ""
    """Also save last.pth.tar every N updates (500) or minutes (10m); default: only after each epoch and
    before each validation."""
    rank_timeout: Annotated[float, Range(1, 1e8), MAY_CHANGE] = 600.0
    """Several ranks: end the run, naming the rank, if one makes no progress for so many seconds."""
    init_timeout: Annotated[float, Range(1, 1e8), MAY_CHANGE] = 3600.0
    """The same limit before the first update is done, while data are opened and code is compiled."""


@dataclass(frozen=True)
class Config:
    """Train a ViT from folders of images or .beton files, and watch its spectra."""

    data: Data = field(default_factory=Data)
    model: Model = field(default_factory=Model)
    optim: Optim = field(default_factory=Optim)
    augment: Augment = field(default_factory=Augment)
    step: Step = field(default_factory=Step)
    spectra: Spectra = field(default_factory=Spectra)
    lowrank: LowRank = field(default_factory=LowRank)
    run: Run = field(default_factory=Run)
    tracking: Tracking = field(default_factory=Tracking)
