"""Messages of the heads, and options that change no value."""

import pytest
import torch

from lightning_mpo.functional import head_gradients
from tests.support.head_options import full_logprobs, support_logits, support_logprobs
from tests.support.heads import B, D, K, T, V, problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "`temperature` must be above 0, got 0.0"),
        ({"softcap": -1.0}, "`softcap` must be above 0, got -1.0"),
        ({"chunk_size": 0}, "`chunk_size` must be at least 1, got 0"),
        (
            {"weight_VD": torch.zeros(V, D + 1)},
            rf"`weight_VD` must have shape \[V, D={D}\].*got \[{V}, {D + 1}\]",
        ),
        ({"tokens_BT": torch.zeros(B, T + 1).long()}, r"`tokens_BT` must have shape \[2, 4\]"),
        ({"bias_V": torch.zeros(V + 1)}, r"`bias_V` must have shape \[V=11\]"),
        (
            {"mask_BT": torch.ones(B, T + 1, dtype=torch.bool)},
            r"`mask_BT` must have shape \[2, 4\]",
        ),
        (
            {"candidates_BTK": torch.full((B, T, 2), V)},
            r"`candidates_BTK` must be in \[0, 11\).*got \[11, 11\]",
        ),
        ({"tokens_BT": torch.full((B, T), -1)}, r"`tokens_BT` must be in \[0, 11\)"),
    ],
)
def test_messages_of_the_full_head_name_the_argument(change, message):
    hidden, weight, _, tokens, _, _ = problem()
    arguments = {"hidden_BTD": hidden, "weight_VD": weight, "tokens_BT": tokens, **change}
    with pytest.raises(ValueError, match=message):
        full_logprobs(**arguments)


def test_messages_of_the_support_head_name_the_argument():
    hidden, weight, _, tokens, support, mask = problem()
    with pytest.raises(ValueError, match=r"`support_BTK` must be in \[0, 11\)"):
        support_logits(hidden, weight, support + V)
    with pytest.raises(ValueError, match=r"`support_mask_BTK` must have shape \[2, 4, K=3\]"):
        support_logprobs(
            hidden, weight, tokens, support, support_mask_BTK=torch.ones(B, T, 4, dtype=torch.bool)
        )
    with pytest.raises(TypeError, match=r"`mask_BT` must be bool, got torch.float64"):
        support_logprobs(hidden, weight, tokens, support, mask_BT=mask.double())
    with pytest.raises(TypeError, match=r"`support_BTK` must be int32 or int64"):
        support_logits(hidden, weight, support.double())


@pytest.mark.parametrize("frozen", [False, True])
def test_leaving_the_entropy_out_changes_no_logprob_and_no_gradient(frozen):
    hidden = torch.randn(7, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weight = torch.randn(11, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids = torch.arange(7)
    results = []
    for entropy in (True, False):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_(not frozen)
        logprobs, entropies = full_logprobs(h, w, ids, softcap=3.0, entropy=entropy, chunk_size=3)
        logprobs.sum().backward()
        assert bool(entropies.any()) == entropy
        results.append((logprobs.detach(), h.grad, w.grad))
    for plain, lean in zip(*results, strict=True):
        assert plain is lean is None or torch.equal(plain, lean)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(
    "form", [{}, {"softcap": 1.5, "temperature": 0.7}], ids=["plain", "capped"]
)
def test_candidates_without_gradient_change_no_value_and_leave_the_tokens_theirs(trained, form):
    hidden, weight, bias, tokens, support, mask = problem()
    options = {"mask_BT": mask, "bias_V": bias, "chunk_size": 3, **form}
    gradients = []
    for candidates in ({}, {"candidates_BTK": support, "candidates_grad": False}):
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_(trained)]
        scores = full_logprobs(*leaves, tokens, entropy_grad=True, **options, **candidates)
        loss = scores[0].sin().sum() + scores[1].square().sum()
        gradients.append((loss, torch.autograd.grad(loss, leaves[: 1 + trained])))
    assert not scores[2].requires_grad
    learnt = full_logprobs(hidden, weight, tokens, candidates_BTK=support, **options)[2]
    assert torch.equal(scores[2], learnt)
    for (loss, own), (other, their) in [gradients]:
        assert torch.equal(loss, other)
        assert all(map(torch.equal, own, their))


def test_a_backward_pass_reads_no_rows_of_candidates_without_gradient(monkeypatch):
    hidden, weight, _, tokens, support, _ = problem()
    rows, read = head_gradients._rows, []
    monkeypatch.setattr(
        head_gradients,
        "_rows",
        lambda w, ids, dtype: read.append(ids.shape[1]) or rows(w, ids, dtype),
    )
    for wanted, width in ((True, 1 + K), (False, 1)):
        scores = full_logprobs(
            hidden.requires_grad_(), weight, tokens, candidates_BTK=support, candidates_grad=wanted
        )
        scores[0].sum().backward()
        assert read.pop() == width
