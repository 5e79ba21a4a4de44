"""Promising sets against a plain sort; ties in particular."""

import math

import pytest
import torch

from lightning_mpo.functional.supports import candidates, logprobs_at, nucleus, top_k


def ranked(row: list[float]) -> list[int]:
    """All ids, by value (highest first), then by id (lowest first)."""
    return sorted(range(len(row)), key=lambda v: (-row[v], v))


def logits(kind: str, seed: int = 0, rows: int = 40, v: int = 23) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    if kind == "distinct":
        return torch.randn(rows, v, generator=g)
    if kind == "bfloat16":
        return torch.randn(rows, v, generator=g).bfloat16()
    if kind == "equal":
        return torch.zeros(rows, v)
    return torch.randint(
        -2, 3, (rows, v), generator=g
    ).float()  # ties inside and at the boundary, everywhere


@pytest.mark.parametrize("kind", ["distinct", "bfloat16", "equal", "integers"])
@pytest.mark.parametrize("k", [1, 2, 7, 22, 23])
def test_top_k_is_a_plain_sort(kind, k):
    values = logits(kind)
    support = top_k(values, k)
    assert support.dtype == torch.int32
    assert support.tolist() == [ranked(row)[:k] for row in values.tolist()]


def test_top_k_of_banned_tokens_comes_last():
    values = torch.tensor([[-math.inf, 1.0, -math.inf, 2.0]])
    assert top_k(values, 3).tolist() == [[3, 1, 0]]


@pytest.mark.parametrize("kind", ["distinct", "integers"])
@pytest.mark.parametrize("p", [0.1, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("max_k", [1, 5, 23])
def test_nucleus_is_a_plain_loop(kind, p, max_k):
    values = logits(kind, seed=1).double()
    support, mask = nucleus(values, p, max_k)
    for row, ids, slots in zip(values.tolist(), support.tolist(), mask.tolist(), strict=True):
        total = sum(math.exp(x) for x in row)
        expected, mass = [], 0.0
        for v in ranked(row):
            if mass >= p or len(expected) == max_k:
                break
            expected.append(v)
            mass += math.exp(row[v]) / total
        assert [v for v, slot in zip(ids, slots, strict=True) if slot] == expected
        assert slots == sorted(slots, reverse=True)


def test_nucleus_of_one_keeps_all_that_are_possible():
    values = torch.tensor([[5.0, -40.0, -math.inf, 0.0]])
    support, mask = nucleus(values, 1.0, 4)
    assert support[mask].tolist() == [0, 3, 1]


@pytest.mark.parametrize("k", [0, 24])
def test_a_wrong_size_is_named(k):
    with pytest.raises(
        ValueError, match=f"`k` must be between 1 and the vocabulary size 23, got {k}"
    ):
        top_k(logits("distinct"), k)
    with pytest.raises(
        ValueError, match=f"`max_k` must be between 1 and the vocabulary size 23, got {k}"
    ):
        nucleus(logits("distinct"), 0.9, k)


@pytest.mark.parametrize("p", [0.0, 1.5])
def test_a_wrong_mass_is_named(p):
    with pytest.raises(ValueError, match=r"`p` must be in \(0, 1\], got"):
        nucleus(logits("distinct"), p, 3)


def test_nucleus_stops_as_soon_as_the_mass_is_reached():
    support, mask = nucleus(
        torch.zeros(1, 4, dtype=torch.float64), 0.5, 4
    )  # four times exactly 1/4
    assert support[mask].tolist() == [0, 1]


def naive_candidates(logits, column, k, ids):
    """Ids and logits by slot: the k best by (value, lowest id) that can be drawn, and the sampled one if it is not among them."""
    held = sorted(
        (c for c in range(len(logits)) if logits[c] > -math.inf), key=lambda c: (-logits[c], ids[c])
    )[:k]
    slots = [(ids[c], logits[c]) for c in held] + [(0, -math.inf)] * (k - len(held))
    return [*slots, (0, -math.inf) if column in held else (ids[column], logits[column])]


@pytest.mark.parametrize("k", [1, 3, 8, 12])
@pytest.mark.parametrize("stored", [False, True], ids=["vocabulary", "support"])
def test_candidates_are_the_most_probable_ids_and_the_sampled_one(k, stored):
    g = torch.Generator().manual_seed(k)
    logits = torch.randint(-2, 3, (40, 8), generator=g).float()  # many ties
    impossible = torch.rand(40, 8, generator=g) < 0.3
    impossible[:, 0] = False
    logits = logits.masked_fill(impossible, -torch.inf)
    tokens = torch.stack([torch.multinomial(row.exp(), 1, generator=g)[0] for row in logits])
    support = torch.rand(40, 50, generator=g).argsort(-1)[:, :8].int() if stored else None
    ids, found = candidates(logits, tokens, k, support)
    assert ids.dtype == torch.int32
    for b in range(40):
        names = support[b].tolist() if stored else list(range(8))
        expected = naive_candidates(logits[b].tolist(), int(tokens[b]), k, names)
        assert list(zip(ids[b].tolist(), found[b].tolist(), strict=True)) == expected
    if k == 3:
        assert (found[:, -1] > -torch.inf).any()  # both kinds of rows were there
        assert (found[:, -1] == -torch.inf).any()


def test_log_probs_are_found_at_their_ids_only():
    g = torch.Generator().manual_seed(3)
    support = torch.rand(2, 5, 9, generator=g).argsort(-1)[..., :4]
    logits, slots = (
        torch.randn(2, 5, 4, generator=g).double(),
        torch.rand(2, 5, 4, generator=g) < 0.7,
    )
    slots[..., 0] = True
    asked = torch.rand(2, 5, 9, generator=g).argsort(-1)[..., :6]
    found = logprobs_at(asked, support, logits, slots)
    for b, t, k in torch.cartesian_prod(torch.arange(2), torch.arange(5), torch.arange(6)).tolist():
        held = {
            int(v): float(z)
            for v, z, s in zip(support[b, t], logits[b, t], slots[b, t], strict=True)
            if s
        }
        total = sum(math.exp(z) for z in held.values())
        wanted = held.get(int(asked[b, t, k]))
        expected = -math.inf if wanted is None else wanted - math.log(total)
        assert float(found[b, t, k]) == pytest.approx(expected, rel=1e-12)
