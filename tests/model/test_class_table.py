"""model.class_table: classes are matched by name, and what cannot be matched is said."""

from __future__ import annotations

import pytest
import torch

from star_fast.errors import UserError
from star_fast.model.class_table import ClassMatch, match_classes


@pytest.mark.parametrize(
    ("theirs", "ours", "rows", "told"),
    [
        (["a", "b"], ["a", "b"], (0, 1), ""),
        (["a", "b", "c"], ["c", "a"], (2, 0), "class embeddings: 2 of 2 taken by name"),
        (["a", "b"], ["b", "x", "y"], (1, None, None), "class embeddings: 1 of 3 taken by name, 2 fresh: x, y"),
        (
            ["a"],
            [str(n) for n in range(9)],
            (None,) * 9,
            "class embeddings: 0 of 9 taken by name, 9 fresh: 0, 1, 2, 3, 4, 5, and 3 more",
        ),
        (
            ["crane", "b", "crane"],
            ["b", "crane", "crane", "crane"],
            (1, 0, 2, None),
            "class embeddings: 3 of 4 taken by name, 1 fresh: crane",
        ),
        (None, ["a", "b"], (0, 1), "class embeddings: all 2 taken by number, since names are not known"),
        (
            ["class 0", "class 1"],
            ["a", "b"],
            (0, 1),
            "class embeddings: all 2 taken by number, since names are not known",
        ),
        (
            ["a", "b"],
            ["class 0", "class 1"],
            (0, 1),
            "class embeddings: all 2 taken by number, since names are not known",
        ),
        (["a", "b"], None, (0, 1), ""),
    ],
)
def test_matching(theirs: list[str] | None, ours: list[str] | None, rows: tuple[int | None, ...], told: str) -> None:
    assert match_classes("x.pt", len(theirs or rows), theirs, len(rows), ours) == ClassMatch(rows, told)


def test_what_cannot_be_matched() -> None:
    with pytest.raises(
        UserError,
        match=r"x\.pt: weights of 2 classes, the data here has 3: give the names of its 2 classes with "
        r"--init-class-names FILE",
    ):
        match_classes("x.pt", 2, None, 3, ["a", "b", "c"])
    with pytest.raises(UserError, match="the data here has no class names, so none can be matched"):
        match_classes("x.pt", 2, ["a", "b"], 3, ["class 0", "class 1", "class 2"])


def test_the_table() -> None:
    fresh, stored = -torch.ones(4, 2), torch.arange(6.0, dtype=torch.float64).view(3, 2)
    table = ClassMatch((1, None, 0), "").table(fresh, stored)
    assert table.tolist() == [[2, 3], [-1, -1], [0, 1], [4, 5]] and table.dtype == torch.float32
    assert (fresh == -1).all()
    assert ClassMatch((None,), "").table(fresh[:2], stored).tolist() == [[-1, -1], [4, 5]]
