"""What the labels of a set mean to a model: by name, by ImageNet's list, by a stated assumption, or an error."""

from __future__ import annotations

import pytest

from data_prep.sources.samples import imagenet1k
from lowrank_vit.common.errors import UserError
from lowrank_vit.model.class_match import Classes, Match, Trust, match

TWELVE = [str(n) for n in range(12)]
BY_CODE_POINT = sorted(TWELVE)


def matched(data, model, trust: Trust | None = None, *, outputs: int | None = None, labels: int | None = None) -> Match:
    """`data` and `model`: the names, or how many without names; `outputs` more than the names, `labels` likewise."""

    def classes(what: str, given, count: int | None) -> Classes:
        return Classes(
            what, count or (given if isinstance(given, int) else len(given)), None if isinstance(given, int) else given
        )

    return match(classes("DATA", data, labels), classes("MODEL", model, outputs), trust or Trust(), "DO THIS.")


def test_the_same_names_need_no_word():
    assert matched(["a", "b"], ["a", "b"]) == Match([0, 1], ["a", "b"])
    assert matched(["a", "b"], 2) == Match([0, 1], ["a", "b"])
    assert matched(2, ["a", "b"]) == Match([0, 1], ["a", "b"])
    assert matched(2, 2) == Match([0, 1], None)
    assert matched(["a", "b"], ["a", "b"], outputs=5) == Match([0, 1], ["a", "b"])  # --larger-head


def test_another_order_is_mapped_and_said():
    found = matched(TWELVE, BY_CODE_POINT)
    assert [BY_CODE_POINT[output] for output in found.outputs] == TWELVE
    assert found.names == BY_CODE_POINT
    assert "in another order: its labels are mapped by name" in found.remarks[0]


def test_fewer_classes_are_mapped_and_said():
    found = matched(["cat", "ant"], ["ant", "bee", "cat"])
    assert found.outputs == [2, 0]
    assert "DATA has 2 of the 3 classes of MODEL" in found.remarks[0]


def test_a_thousand_outputs_on_some_of_imagenets_classes():
    some = [imagenet1k()[n] for n in (3, 500, 999)]
    for model in (1000, imagenet1k()):
        found = matched(some, model)
        assert found.outputs == [3, 500, 999]
        assert found.names == list(imagenet1k())
        assert ("MODEL names no classes: its 1,000 outputs are taken as ImageNet's" in " ".join(found.remarks)) == (
            model == 1000
        )
    assert matched(list(imagenet1k()), 1000).remarks == []


def test_folders_numbered_like_imagenets_labels():
    found = matched([str(n) for n in range(1000)], imagenet1k())
    assert found.is_identity
    with pytest.raises(UserError, match="The classes do not fit"):
        matched(TWELVE, imagenet1k())


def test_without_names_timms_order_is_assumed_and_said():
    found = matched(TWELVE, 12)
    assert found.is_identity
    (line,) = found.remarks
    assert (
        "taken in timm's order (0, 1, 2, 3, ...); if they are by code point, as torchvision sorts, (0, 1, 10, 11, ...)"
        in line
    )
    older = matched(BY_CODE_POINT, 12)  # a set that an earlier version has converted
    assert [TWELVE[output] for output in older.outputs] == BY_CODE_POINT
    torchvisions = matched(TWELVE, 12, Trust(order="code-point"))
    assert [BY_CODE_POINT[output] for output in torchvisions.outputs] == TWELVE
    assert "give --class-order timm" in torchvisions.remarks[0]
    assert matched(12, TWELVE).remarks == [
        "DATA names no classes: label N is taken as output N of MODEL (0, 1, 2, 3, ...)"
    ]
    assert matched(["c", "a", "b"], 3) == Match([0, 1, 2], ["c", "a", "b"])  # an order of its own, as of an archive


@pytest.mark.parametrize(
    ("data", "model", "words"),
    [
        (TWELVE[:6], 12, ["DATA: 6 classes (0, 1, 2, 3, 4, 5)", "MODEL: 12 outputs, without names"]),
        (list(imagenet1k()[:6]), 12, ["DATA: 6 classes (n01440764,", "MODEL: 12 outputs"]),
        (["a", "b", "zoo"], 1000, ["MODEL: 1,000 outputs"]),
        (
            ["a", "zoo"],
            ["a", "b"],
            ["DATA: 2 classes (a, zoo); MODEL: 2 (a, b)", "only the former has zoo", "only the latter has b"],
        ),
        (["Dog"], ["dog"], ["only the former has Dog"]),
        (["00", "01"], ["0", "1"], ["only the former has 00, 01"]),
        (["a", "b", "c"], ["a", "b"], ["only the former has c"]),
        (5, 12, ["DATA: 5 classes, without names", "MODEL: 12 outputs"]),
        (12, 5, ["DATA: 12 classes"]),
        (["a", "b", "c"], 2, ["DATA: 3 classes (a, b, c)"]),
        (3, ["a", "b"], ["MODEL: 2 outputs (a, b)"]),
    ],
)
def test_all_else_is_an_error_with_both_lists(data, model, words):
    with pytest.raises(UserError) as caught:
        matched(data, model)
    for word in [*words, "DO THIS.", "--trust-labels"]:
        assert word in str(caught.value)


def test_the_user_may_know_better():
    found = matched(["a", "zoo"], ["a", "b", "c"], Trust(labels=True))
    assert (found.outputs, found.names) == ([0, 1], ["a", "b", "c"])
    assert found.remarks == ["label N of DATA is taken as output N of MODEL (--trust-labels)"]
    assert matched(["c", "a"], ["a", "b", "c"], Trust(labels=True)).outputs == [2, 0]  # there is nothing to trust
    with pytest.raises(UserError, match="--trust-labels: DATA has 3 classes, but MODEL has only 2"):
        matched(["a", "b", "c"], 2, Trust(labels=True))
