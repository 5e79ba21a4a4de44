"""Laws of every support: which tokens a step may take."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.objective import supports
from lightning_mpo.objective.first_tokens import FirstTokens, OnlyTokens
from lightning_mpo.objective.supports import (
    AllowedTokens,
    FullVocabulary,
    MinP,
    Nucleus,
    Support,
    TopK,
)
from tests.support.builders import seeded, subclasses

V = 12
LETTERS = AllowedTokens(letters="abcd")
SUPPORTS = [
    FullVocabulary(),
    LETTERS,
    TopK(4, within=LETTERS),
    Nucleus(0.8, 6, within=LETTERS),
    MinP(0.1, 6, within=LETTERS),
    TopK(1),
    TopK(4),
    TopK(V),
    Nucleus(0.8, 6),
    Nucleus(1.0, 3),
    MinP(0.1, 6),
    MinP(1e-9, V),
    FirstTokens([3, 5]),
    FirstTokens([3, 5], TopK(4)),
]
ids = [f"{type(s).__name__}{vars(s)}" for s in SUPPORTS]
each = pytest.mark.parametrize("support", SUPPORTS, ids=ids)


def logits(rows: int = 40, seed: int = 0) -> torch.Tensor:
    return 3 * torch.randn(rows, V, generator=seeded(seed), dtype=torch.float64)


def sets(support: Support, logits_BV: torch.Tensor) -> list[set[int]]:
    """Return the chosen ids per row, whatever the form."""
    support_BK, support_mask_BK = support.select(logits_BV)
    if support_BK is None:
        assert support_mask_BK is None
        return [set(range(V))] * len(logits_BV)
    support_mask_BK = (
        torch.ones_like(support_BK, dtype=torch.bool)
        if support_mask_BK is None
        else support_mask_BK
    )
    return [set(row[kept].tolist()) for row, kept in zip(support_BK, support_mask_BK, strict=True)]


def test_the_list_has_every_support():
    assert subclasses(supports.Support) - {supports.PromisingTokens, OnlyTokens} == {
        type(s) for s in SUPPORTS
    }


@each
def test_ids_are_distinct_and_in_the_vocabulary(support):
    support_BK, support_mask_BK = support.select(logits())
    if support_BK is None:
        return
    assert support_BK.dtype == torch.int32
    assert int(support_BK.min()) >= 0
    assert int(support_BK.max()) < V
    for row, chosen in zip(support_BK, sets(support, logits()), strict=True):
        kept = len(row) if support_mask_BK is None else len(chosen)
        assert len(chosen) == kept


@each
def test_the_most_probable_token_is_inside_and_nothing_outside_beats_the_worst_inside(support):
    x = logits()
    for row, chosen in zip(x, sets(support, x), strict=True):
        assert int(row.argmax()) in chosen
        outside = [row[v].item() for v in range(V) if v not in chosen]
        assert min(row[v].item() for v in chosen) > max(outside, default=-1e9)


@each
def test_the_set_follows_a_permutation_of_the_vocabulary(support):
    x, order = logits(), torch.randperm(V, generator=seeded(3))
    moved = sets(support, x[:, order])
    assert [{int(order[v]) for v in chosen} for chosen in moved] == sets(support, x)


@each
def test_a_constant_on_all_logits_changes_nothing_and_rows_are_independent(support):
    x = logits()
    assert sets(support, x + 5) == sets(support, x)
    assert [sets(support, row[None])[0] for row in x] == sets(support, x)


@each
def test_restriction_does_not_raise_the_variance_of_the_score(support):
    """1 - |p_M|² <= 1 - |p|² (docs/algorithms.md 16.2, invariant 10)."""
    x = logits(200)
    for row, chosen in zip(x, sets(support, x), strict=True):
        index = torch.tensor(sorted(chosen))
        assert 1 - row[index].softmax(0).square().sum() <= 1 - row.softmax(0).square().sum() + 1e-12


@pytest.mark.parametrize("k", [1, 3, 7, V])
def test_top_k_holds_exactly_k_by_value_then_by_id(k):
    x = logits().round()  # many ties
    expected = [sorted(range(V), key=lambda v, row=row: (-row[v].item(), v))[:k] for row in x]
    assert TopK(k).select(x)[0].tolist() == expected


def test_top_k_is_the_same_at_any_temperature():
    assert TopK(4).select(logits() / 0.3)[0].tolist() == TopK(4).select(logits())[0].tolist()


def test_top_k_refuses_what_the_vocabulary_cannot_hold():
    TopK(V).check(V)
    FullVocabulary().check(1)
    with pytest.raises(
        UserError, match=rf"`TopK.k` must be at most the vocabulary size {V}, got {V + 1}"
    ):
        TopK(V + 1).check(V)
    with pytest.raises(UserError, match=r"`TopK.k` must be at least 1, got 0"):
        TopK(0)


@pytest.mark.parametrize("p", [0.3, 0.8, 0.95])
def test_a_nucleus_is_the_smallest_set_with_its_mass(p):
    x = logits()
    for row, chosen in zip(x.softmax(-1), sets(Nucleus(p, V), x), strict=True):
        mass = sum(row[v].item() for v in chosen)
        assert mass >= p - 1e-12
        assert mass - min(row[v].item() for v in chosen) < p


def test_min_p_keeps_what_is_nearly_as_probable():
    x = logits()
    for row, chosen in zip(x.softmax(-1), sets(MinP(0.1, V), x), strict=True):
        assert chosen == {v for v in range(V) if row[v] >= 0.1 * row.max() * (1 - 1e-12)}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Nucleus(0.0), "`Nucleus.p` must be in"),
        (lambda: Nucleus(1.5), "`Nucleus.p`"),
        (lambda: Nucleus(0.5, 0), "`Nucleus.max_k` must be at least 1, got 0"),
        (lambda: MinP(0.0), "`MinP.ratio` must be in"),
        (
            lambda: MinP(0.5, 99).check(V),
            f"`MinP.max_k` must be at most the vocabulary size {V}, got 99",
        ),
        (
            lambda: Nucleus(0.5, 99).check(V),
            f"`Nucleus.max_k` must be at most the vocabulary size {V}, got 99",
        ),
    ],
)
def test_bounds_are_refused(make, message):
    with pytest.raises(UserError, match=message):
        make()
