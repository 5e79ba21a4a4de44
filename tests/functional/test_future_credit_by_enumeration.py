"""Laws of advantages of future tokens, over all sequences of 3 tokens from 4 letters, in float64.

A head for the next token but one is a table of logits for each state (the tokens so far). Expected gradients of these
logits are exact sums over the 64 sequences. Whatever computes the logits has the chain rule's product with them.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from lightning_mpo.functional.future_credit import bound_negatives, prefix_advantages
from tests.support.builders import seeded

V, T = 4, 3
SEQUENCES = torch.tensor(list(itertools.product(range(V), repeat=T)))
STATES = {
    state: i
    for i, state in enumerate(s for n in range(T) for s in itertools.product(range(V), repeat=n))
}


def states_of(tokens_BT: Tensor) -> Tensor:
    """Return the number of the state before each token, [B, T]."""
    rows = tokens_BT.tolist()
    return torch.tensor([[STATES[tuple(row[:t])] for t in range(T)] for row in rows])


STATES_BT = states_of(SEQUENCES)


def policy(seed: int) -> Tensor:
    """Return logits of the next token, [states, V]."""
    return torch.randn(len(STATES), V, generator=seeded(seed), dtype=torch.float64)


def probabilities(logits_SV: Tensor) -> Tensor:
    """Return the probability of each sequence, one number a row."""
    chosen_BT = logits_SV.log_softmax(-1)[STATES_BT].gather(-1, SEQUENCES[..., None])[..., 0]
    return chosen_BT.sum(1).exp()


def two_ahead(logits_SV: Tensor) -> Tensor:
    """Return the true log-probabilities of the next token but one, [states of up to T - 2 tokens, V]."""
    p_SV = logits_SV.softmax(-1)
    rows = []
    for state, number in STATES.items():
        if len(state) < T - 1:
            after = torch.stack([p_SV[STATES[(*state, v)]] for v in range(V)])
            rows.append(p_SV[number] @ after)
    return torch.stack(rows).log()


def expected_gradient(
    head_SV: Tensor, offset: int, weights_B: Tensor, advantages_BT: Tensor
) -> Tensor:
    """Return E[Σ_t A_t ∇log q(o_{t+offset} | s_t)] for the table of logits."""
    leaf = head_SV.clone().requires_grad_()
    steps = slice(0, T - offset)
    logprobs_BTV = leaf.log_softmax(-1)[STATES_BT[:, steps]]
    chosen_BT = logprobs_BTV.gather(-1, SEQUENCES[:, offset:, None])[..., 0]
    (weights_B[:, None] * advantages_BT[:, steps] * chosen_BT).sum().backward()
    return leaf.grad


def rewards() -> Tensor:
    return torch.randn(len(SEQUENCES), generator=seeded(7), dtype=torch.float64)


def baseline() -> Tensor:
    """Return a number for each state, at each position of each sequence."""
    return torch.randn(len(STATES), generator=seeded(8), dtype=torch.float64)[STATES_BT]


def test_a_baseline_is_free_for_the_token_itself_and_for_a_calibrated_head():
    logits_SV = policy(0)
    weights_B, advantages_BT = probabilities(logits_SV), rewards()[:, None].expand(-1, T)
    for head_SV, offset in ((logits_SV, 0), (two_ahead(logits_SV), 1)):
        plain = expected_gradient(head_SV, offset, weights_B, advantages_BT)
        moved = expected_gradient(head_SV, offset, weights_B, advantages_BT - baseline())
        torch.testing.assert_close(plain, moved, rtol=0, atol=1e-12)
        assert plain.abs().max() > 1e-3


def test_a_baseline_trains_a_head_that_is_not_calibrated_by_cross_entropy():
    """E[b ∇log q] = -b ∇CE(p, q): the head learns to predict better or worse, whatever the reward says."""
    logits_SV = policy(0)
    weights_B, head_SV = probabilities(logits_SV), policy(1)[: len(two_ahead(logits_SV))]
    plain = expected_gradient(head_SV, 1, weights_B, rewards()[:, None].expand(-1, T))
    moved = expected_gradient(head_SV, 1, weights_B, rewards()[:, None] - baseline())
    assert (plain - moved).abs().max() > 1e-2
    ones_BT = torch.ones(len(SEQUENCES), T, dtype=torch.float64)
    reach_S = torch.zeros(len(head_SV), dtype=torch.float64)
    for t in range(T - 1):
        reach_S.index_add_(0, STATES_BT[:, t], weights_B)
    leaf = head_SV.clone().requires_grad_()
    cross_entropy_S = -(two_ahead(logits_SV).exp() * leaf.log_softmax(-1)).sum(-1)
    (reach_S * cross_entropy_S).sum().backward()
    torch.testing.assert_close(expected_gradient(head_SV, 1, weights_B, ones_BT), -leaf.grad)


def test_the_mean_over_shared_prefixes_takes_the_baseline_out():
    """Under a uniform policy all sequences are a group with the right frequencies."""
    uniform_B = torch.full((len(SEQUENCES),), 1 / len(SEQUENCES), dtype=torch.float64)
    mask_BT, head_SV = torch.ones_like(SEQUENCES, dtype=torch.bool), policy(1)

    def gradient(rewards_B: Tensor) -> Tensor:
        advantages_BT = prefix_advantages(SEQUENCES, mask_BT, rewards_B, len(SEQUENCES))
        return expected_gradient(head_SV, 1, uniform_B, advantages_BT)

    first_letter_B = torch.randn(V, generator=seeded(9), dtype=torch.float64)[SEQUENCES[:, 0]]
    plain = gradient(rewards())
    assert plain.abs().max() > 1e-3
    torch.testing.assert_close(plain, gradient(rewards() + 5.0), rtol=0, atol=1e-12)
    # a state whose end is certain teaches nothing: all that follows the first letter has one reward
    certain = gradient(first_letter_B)
    later = [number for state, number in STATES.items() if len(state) == 1]
    assert certain[later].abs().max() < 1e-12
    same = expected_gradient(
        head_SV, 1, uniform_B, (first_letter_B - first_letter_B.mean())[:, None].expand(-1, T)
    )
    assert same[later].abs().max() > 1e-2, (
        "one advantage for the block pushes heads at such a state"
    )


@pytest.mark.parametrize("share", [1e-2, 1e-4, 1e-8])
def test_a_bounded_push_down_ends_with_the_probability_of_the_head(share):
    """The policy draws the token for certain; the head gives it `share`."""
    gradients = []
    for bounded in (False, True):
        leaf = torch.tensor([share, 1 - share], dtype=torch.float64).log().requires_grad_()
        logprob = leaf.log_softmax(-1)[0]
        advantage = torch.tensor([[[-1.0]]], dtype=torch.float64)
        if bounded:
            zero = torch.zeros(1, 1, 1, dtype=torch.float64)
            advantage = bound_negatives(advantage, logprob.detach().view(1, 1, 1), zero)
        (advantage.squeeze() * logprob).backward()
        gradients.append(leaf.grad.norm().item())
    assert gradients[0] > 1, "without a bound it stays near √2 for ever"
    assert gradients[1] < 2 * share
