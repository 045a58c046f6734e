"""Policy strings: the frequencies and magnitudes are timm's own, by chi-square over what timm itself draws."""

from __future__ import annotations

import random
from collections import Counter

import numpy as np
import pytest
from scipy import stats
from timm.data import auto_augment as timms
from torchvision.transforms import ColorJitter

from data_prep.errors import UserError
from lowrank_vit.augment.policy import parse_policy
from lowrank_vit.data.plan import TrainPlan, TrainRules
from lowrank_vit.data.plan_ops import BICUBIC, BILINEAR, ImageOps, Kind

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
UNLIKELY = 1e-5  # there are about 200 comparisons with fixed seeds


def timms_draws(text: str) -> list[list[tuple[Kind, float, int]]]:
    """What timm's own transform draws: for each sample the applied operations, their arguments and interpolations."""
    random.seed(1)
    np.random.seed(1)
    parse = timms.rand_augment_transform if text.startswith("rand") else timms.auto_augment_transform
    transform = parse(text, {"translate_const": 100, "img_mean": (124, 116, 104)})
    rows = transform.policy if hasattr(transform, "policy") else [transform.ops]
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
    for kinds, args, kernels in zip(planned.kinds, planned.args, planned.kernels, strict=True):
        draws.append([(Kind(k), float(a), int(i)) for k, a, i in zip(kinds, args, kernels, strict=True) if k])
    return draws


def planned_ops(rules: TrainRules) -> ImageOps:
    sides = np.full(SAMPLES, 256)
    plan = TrainPlan(sides, sides, rules, seed=3, img_size=IMG_SIZE, batch_size=1)
    planned = plan.ops(0, np.arange(SAMPLES))
    assert planned is not None
    return planned


def assert_same_distribution(ours: list, theirs: list, what: object) -> None:
    """Two samples of hashable outcomes, by a chi-square test of homogeneity; rare outcomes count as one."""
    counts = Counter(ours), Counter(theirs)
    total = counts[0] + counts[1]
    common = [key for key in total if total[key] >= 20]
    table = np.array([[c[key] for key in common] for c in counts])
    rare = np.array([[len(ours) - table[0].sum()], [len(theirs) - table[1].sum()]])
    table = np.concatenate([table, rare], axis=1) if rare.sum() >= 20 else table
    assert rare.sum() < 0.2 * (len(ours) + len(theirs)), what
    if table.shape[1] > 1:
        assert stats.chi2_contingency(table).pvalue > UNLIKELY, what


@pytest.mark.parametrize("text", POLICIES)
def test_frequencies_and_magnitudes_are_timms(text):
    ours, theirs = our_draws(TrainRules(policy=parse_policy(text))), timms_draws(text)
    # which operations come together, in which order; and how many of them
    assert_same_distribution(*([tuple(o[0] for o in sample[:2]) for sample in d] for d in (ours, theirs)), text)
    assert_same_distribution(*([len(sample) for sample in draws] for draws in (ours, theirs)), text)
    by_kind = [{}, {}]
    for found, draws in zip(by_kind, (ours, theirs), strict=True):
        for kind, arg, kernel in (op for sample in draws for op in sample):
            found.setdefault(kind, []).append((arg, kernel))
    assert by_kind[0].keys() == by_kind[1].keys()
    for kind in by_kind[0]:
        args = [np.array([arg for arg, _ in found[kind]]) for found in by_kind]
        for sign in (-1, 1):
            sizes = [(sign * a > 0).sum() for a in args]
            assert (
                stats.chi2_contingency([[sizes[0] + 1, len(args[0])], [sizes[1] + 1, len(args[1])]]).pvalue > UNLIKELY
            )
        # magnitudes, in up to twenty bins with the same number of draws; rounded, since both divide in another order
        edges = np.unique(
            np.quantile(np.concatenate(args).round(9), np.linspace(0, 1, 1 + min(20, len(args[0]) // 40)))
        )
        binned = [np.digitize(a.round(9), edges).tolist() for a in args]
        assert_same_distribution(*binned, (text, kind.name))
        if kind in (Kind.ROTATE, Kind.SHEAR_X, Kind.TRANSLATE_Y):
            assert_same_distribution(*([k for _, k in found[kind]] for found in by_kind), (text, kind.name, "kernels"))


def test_order_and_factors_of_colour_jitter_are_torchvisions():
    planned = planned_ops(TrainRules(color_jitter=(0.4, 0.2, 1.5)))
    jitter = ColorJitter(0.4, 0.2, 1.5)
    orders, factors = [], []
    for _ in range(SAMPLES):
        order, *drawn, _ = ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, None)
        orders.append(tuple(int(i) for i in order if i != 3))
        factors.append(drawn)
    kinds = (Kind.BRIGHTNESS, Kind.CONTRAST, Kind.COLOR)
    assert_same_distribution([tuple(kinds.index(k) for k in row) for row in planned.kinds], orders, "order")
    for i, kind in enumerate(kinds):
        ours = planned.args[planned.kinds == kind]
        assert len(ours) == SAMPLES
        assert stats.ks_2samp(ours, np.array(factors, float)[:, i]).pvalue > UNLIKELY


def test_interpolation_can_be_fixed():
    policy = parse_policy("rand-m9")
    assert set(planned_ops(TrainRules(policy=policy)).kernels.flat) == {BILINEAR, BICUBIC}
    assert set(planned_ops(TrainRules(policy=policy, kernel=BICUBIC)).kernels.flat) == {BICUBIC}


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
