"""Barred ids: both heads and ranks against loops over the allowed ids, with all gradients."""

import pytest
import torch

from tests.support.head_options import full_logprobs, full_ranks, full_top_k, support_logprobs
from tests.support.heads import FORMS, V, dense, loop_logits, loop_score, low_rank, problem

BARRED = [0, 4, V - 1]
ALLOWED = [v for v in range(V) if v not in BARRED]


def barred_mask() -> torch.Tensor:
    return torch.isin(torch.arange(V), torch.tensor(BARRED))


def allowed_problem():
    """Return a problem whose tokens are allowed."""
    hidden, weight, bias, tokens, support, mask = problem(seed=8)
    return hidden, weight, bias, torch.tensor(ALLOWED)[tokens % len(ALLOWED)], support, mask


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_softmax_is_taken_over_the_allowed_ids(form):
    hidden, weight, bias, tokens, _, _ = allowed_problem()
    scores = full_logprobs(hidden, weight, tokens, bias_V=bias, barred_V=barred_mask(), **form)
    for place in [(b, t) for b in range(2) for t in range(4)]:
        logits = loop_logits(hidden[place], weight, bias, **form)
        expected = loop_score(logits, int(tokens[place]), ALLOWED)
        assert float(scores[0][place]) == pytest.approx(expected[0], abs=1e-9)
        assert float(scores[1][place]) == pytest.approx(expected[1], abs=1e-9)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("trained", [False, True])
def test_gradients_are_those_of_autograd_and_barred_rows_get_none(form, trained):
    hidden, weight, bias, tokens, _, _ = allowed_problem()
    results = []
    for ours in (True, False):
        leaves = [x.clone().requires_grad_() for x in (hidden, weight, bias)]
        h, w, b = leaves if trained else (leaves[0], weight, bias)
        if ours:
            options = {"bias_V": b, "barred_V": barred_mask(), "chunk_size": 3, **form}
            logprobs, entropy = full_logprobs(h, w, tokens, entropy_grad=True, **options)
        else:
            table = dense(h, w, b, **form)[..., ALLOWED].log_softmax(-1)
            slots = torch.searchsorted(torch.tensor(ALLOWED), tokens)
            logprobs = table.gather(-1, slots.unsqueeze(-1)).squeeze(-1)
            entropy = -(table.exp() * table).sum(-1)
        loss = logprobs.sin().sum() + entropy.square().sum()
        results.append(torch.autograd.grad(loss, leaves[: 3 if trained else 1]))
    for one, other in zip(*results, strict=True):
        assert torch.isfinite(one).all()
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)
    for rows in results[0][1:]:
        assert (rows[BARRED] == 0).all()
        assert (rows[ALLOWED] != 0).any()


def test_rows_of_an_adapter_get_no_gradient_where_they_are_barred():
    from lightning_mpo.functional.low_rank import LowRank

    hidden, weight, _, tokens, _, _ = allowed_problem()
    down, up = (part.requires_grad_() for part in low_rank())
    options = {"adapter": LowRank(down, up, 0.5, 0.0), "barred_V": barred_mask()}
    full_logprobs(hidden, weight, tokens, **options)[0].sum().backward()
    assert (up.grad[BARRED] == 0).all()
    assert (up.grad[ALLOWED] != 0).any()


@pytest.mark.parametrize("trained", [False, True])
def test_a_barred_token_has_log_prob_minus_infinity_and_no_gradient(trained):
    hidden, weight, _, tokens, _, _ = allowed_problem()
    tokens[0, 1] = BARRED[1]
    hidden.requires_grad_()
    weight.requires_grad_(trained)
    logprobs, _ = full_logprobs(hidden, weight, tokens, barred_V=barred_mask())
    assert logprobs[0, 1] == -torch.inf
    assert torch.isfinite(logprobs).sum() == logprobs.numel() - 1
    logprobs.exp().sum().backward()
    assert (hidden.grad[0, 1] == 0).all()
    assert torch.isfinite(hidden.grad).all()


def test_nothing_barred_changes_no_bit():
    hidden, weight, bias, tokens, _, mask = problem(seed=9)
    options = {"bias_V": bias, "mask_BT": mask, "softcap": 2.0}
    none = torch.zeros(V, dtype=torch.bool)
    plain = full_logprobs(hidden, weight, tokens, **options)
    for one, other in zip(
        plain, full_logprobs(hidden, weight, tokens, barred_V=none, **options), strict=True
    ):
        assert torch.equal(one, other)


def test_a_stored_support_leaves_barred_ids_out_and_refuses_a_barred_token():
    hidden, weight, _, _, _, _ = problem(seed=3)
    support = torch.tensor([1, 4, 6, 0, 9]).expand(2, 4, 5)
    tokens = torch.full((2, 4), 6)
    smaller = torch.tensor([1, 6, 9]).expand(2, 4, 3)
    scores = support_logprobs(hidden, weight, tokens, support, barred_V=barred_mask())
    for one, other in zip(scores, support_logprobs(hidden, weight, tokens, smaller), strict=True):
        torch.testing.assert_close(one, other)
    with pytest.raises(ValueError, match="8 of 8 tokens outside"):
        support_logprobs(hidden, weight, tokens - 2, support, barred_V=barred_mask())


def test_ranks_count_allowed_ids_and_barred_ids_come_last():
    hidden, weight, bias, tokens, _, _ = allowed_problem()
    options = {"bias_V": bias, "barred_V": barred_mask()}
    logits = dense(hidden, weight, bias)
    allowed = logits[..., ALLOWED]
    expected = (allowed > logits.gather(-1, tokens.unsqueeze(-1))).sum(-1)
    assert torch.equal(full_ranks(hidden, weight, tokens, **options), expected)
    order = full_top_k(hidden, weight, V, **options)
    assert order[..., -len(BARRED) :].tolist() == [[BARRED] * 4] * 2
    best = torch.tensor(ALLOWED)[allowed.argmax(-1)]
    assert torch.equal(order[..., 0].long(), best)
