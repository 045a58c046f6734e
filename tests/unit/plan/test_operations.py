"""Policy strings: the frequencies and magnitudes are timm's own, by chi-square over what timm itself draws."""

from __future__ import annotations

import random

import numpy as np
import pytest
from scipy import stats
from timm.data import auto_augment as timms
from torchvision.transforms import ColorJitter

from lowrank_vit.common.errors import UserError
from lowrank_vit.common.filters import BICUBIC, BILINEAR
from lowrank_vit.plan.operations import ImageOps, Kind, parse_policy
from lowrank_vit.plan.plans import TrainPlan, TrainRules
from tests.distributions import UNLIKELY, assert_same_distribution

SAMPLES = 20_000
IMG_SIZE = 224
KINDS = {
    "auto_contrast": Kind.AUTOCONTRAST,
    "equalize": Kind.EQUALIZE,
    "invert": Kind.INVERT,
    "posterize": Kind.POSTERIZE,
    "solarize": Kind.SOLARIZE,
    "solarize_add": Kind.SOLARIZE_ADD,
    "brightness": Kind.BRIGHTNESS,
    "contrast": Kind.CONTRAST,
    "color": Kind.COLOR,
    "desaturate": Kind.COLOR,
    "sharpness": Kind.SHARPNESS,
    "rotate": Kind.ROTATE,
    "shear_x": Kind.SHEAR_X,
    "shear_y": Kind.SHEAR_Y,
    "translate_x_rel": Kind.TRANSLATE_X,
    "translate_y_rel": Kind.TRANSLATE_Y,
    "gaussian_blur": Kind.BLUR,
    "gaussian_blur_rand": Kind.BLUR,
}
POLICIES = [
    "rand-m9-mstd0.5-inc1",
    "rand-m9-mstd0.5",
    "rand-m7-n3-p0.8-mstd101-inc1",
    "rand-m15-n1-mstd1.5-mmax20",
    "rand",
    "rand-mstd1-tweights",
    "rand-m6-n4-t3aw",
    "rand-m5-t3a-mstd2",
    "original",
    "original-mstd0.5",
    "originalr",
    "v0",
    "v0r-mstd1",
    "3a",
]


def timms_draws(text: str) -> list[list[tuple[Kind, float, int]]]:
    """What timm's own transform draws: for each sample the applied operations, their arguments and interpolations."""
    random.seed(1)
    np.random.seed(1)
    parse = timms.rand_augment_transform if text.startswith("rand") else timms.auto_augment_transform
    transform = parse(text, {"translate_const": 100, "img_mean": (124, 116, 104)})
    rows = transform.policy if isinstance(transform, timms.AutoAugment) else [transform.ops]
    drawn: list[tuple[Kind, float, int]] = []

    def record(function):
        kind = KINDS[function.__name__]

        def recorded(image, *args, **kwargs):
            arg = float(args[0]) if args else 0.0
            if function is timms.desaturate:
                arg = min(1.0, max(0.0, 1.0 - arg))
            if function is timms.gaussian_blur_rand:
                arg = random.uniform(0.1, 2.0 * arg)
            if kind in (Kind.TRANSLATE_X, Kind.TRANSLATE_Y):
                arg *= IMG_SIZE
            drawn.append((kind, arg, int(timms._interpolation(kwargs)) - 1))  # PIL: bilinear 2, bicubic 3
            return image

        return recorded

    for op in [op for row in rows for op in row]:
        op.aug_fn = record(op.aug_fn)
    draws = []
    for _ in range(SAMPLES):
        drawn.clear()
        transform("image")
        draws.append(list(drawn))
    return draws


def our_draws(rules: TrainRules) -> list[list[tuple[Kind, float, int]]]:
    planned = planned_ops(rules)
    draws = []
    for kinds, args, interpolations in zip(planned.kinds, planned.args, planned.interpolations, strict=True):
        draws.append([(Kind(k), float(a), int(i)) for k, a, i in zip(kinds, args, interpolations, strict=True) if k])
    return draws


def planned_ops(rules: TrainRules) -> ImageOps:
    sides = np.full(SAMPLES, 256)
    plan = TrainPlan(sides, sides, rules, seed=3, img_size=IMG_SIZE, batch_size=1)
    planned = plan.ops(0, np.arange(SAMPLES))
    assert planned is not None
    return planned


@pytest.mark.parametrize("text", POLICIES)
def test_frequencies_and_magnitudes_are_timms(text):
    ours, theirs = our_draws(TrainRules(policy=parse_policy(text))), timms_draws(text)
    both = (ours, theirs)
    # which operations come together, in which order; and how many of them
    first, second = ([tuple(op[0] for op in sample[:2]) for sample in draws] for draws in both)
    assert_same_distribution(first, second, text)
    first, second = ([len(sample) for sample in draws] for draws in both)
    assert_same_distribution(first, second, text)
    by_kind: list[dict[Kind, list[tuple[float, int]]]] = [{}, {}]
    for found, draws in zip(by_kind, both, strict=True):
        for kind, arg, interpolation in (op for sample in draws for op in sample):
            found.setdefault(kind, []).append((arg, interpolation))
    assert by_kind[0].keys() == by_kind[1].keys()
    for kind in by_kind[0]:
        # Rounded, since both divide in another order.
        args = [np.array([arg for arg, _ in found[kind]]).round(9) for found in by_kind]
        # magnitudes, in up to twenty bins with the same number of draws
        edges = np.unique(np.quantile(np.concatenate(args), np.linspace(0, 1, 1 + min(20, len(args[0]) // 40))))
        first, second = (np.digitize(a, edges).tolist() for a in args)
        assert_same_distribution(first, second, (text, kind.name))
        if (args[0] < 0).any():
            first, second = (np.sign(a).tolist() for a in args)
            assert_same_distribution(first, second, (text, kind.name, "signs"))
        if kind in (Kind.ROTATE, Kind.SHEAR_X, Kind.TRANSLATE_Y):
            first, second = ([interpolation for _, interpolation in found[kind]] for found in by_kind)
            assert_same_distribution(first, second, (text, kind.name, "interpolations"))


def test_order_and_factors_of_colour_jitter_are_torchvisions():
    planned = planned_ops(TrainRules(color_jitter=(0.4, 0.2, 1.5)))
    ranges = [(0.6, 1.4), (0.8, 1.2), (0.0, 2.5)]
    jitter = ColorJitter(0.4, 0.2, 1.5)
    assert [jitter.brightness, jitter.contrast, jitter.saturation] == ranges
    orders, factors = [], []
    for _ in range(SAMPLES):
        order, *drawn, _ = ColorJitter.get_params(*ranges, None)  # type: ignore[arg-type]
        orders.append(tuple(int(i) for i in order if i != 3))
        factors.append(drawn)
    kinds = (Kind.BRIGHTNESS, Kind.CONTRAST, Kind.COLOR)
    assert_same_distribution([tuple(kinds.index(k) for k in row) for row in planned.kinds], orders, "order")
    for i, kind in enumerate(kinds):
        ours = planned.args[planned.kinds == kind]
        assert len(ours) == SAMPLES
        assert float(stats.ks_2samp(ours, np.array(factors, float)[:, i])[1]) > UNLIKELY  # type: ignore[arg-type]


def test_interpolation_can_be_fixed():
    policy = parse_policy("rand-m9")
    assert set(planned_ops(TrainRules(policy=policy)).interpolations.flat) == {BILINEAR, BICUBIC}
    assert set(planned_ops(TrainRules(policy=policy, interpolation=BICUBIC)).interpolations.flat) == {BICUBIC}


def test_the_policy_comes_before_colour_jitter():
    planned = planned_ops(TrainRules(policy=parse_policy("3a"), color_jitter=(0.3, 0.3, 0.3)))
    assert planned.kinds.shape == (SAMPLES, 4)
    assert set(planned.kinds[:, 0]) <= {Kind.SOLARIZE, Kind.COLOR, Kind.BLUR}
    assert all(set(row) == {Kind.BRIGHTNESS, Kind.CONTRAST, Kind.COLOR} for row in planned.kinds[:50, 1:])


@pytest.mark.parametrize("text", ["", "none"])
def test_no_policy(text):
    assert parse_policy(text) is None


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("augmix-m5", "`augmix`"),
        ("randaug", "`randaug`"),
        ("rand-m9-w0", "`w0`"),
        ("rand-m9-mstd", "`mstd`"),
        ("rand-p1.5", "`p1.5`"),
        ("rand-n0", "`n0`"),
        ("rand-m9-tbest", "`tbest`"),
        ("rand-m9-", "``"),
        ("original-m9", "`m9`"),
        ("3a-inc1", "`inc1`"),
    ],
)
def test_what_is_not_there_is_named_and_what_is_is_listed(text, named):
    with pytest.raises(UserError) as error:
        parse_policy(text)
    message = str(error.value)
    assert named in message
    assert all(word in message for word in ("rand", "mstd", "inc", "original", "v0r", "3a", "none"))


def test_a_weighted_choice_has_no_more_operations_than_there_are():
    with pytest.raises(UserError, match="n is 15, but none of its 14 operations is picked twice"):
        parse_policy("rand-n15-t3aw")
