"""A small network that sees tokens on both sides, in float64, and a scorer of noised rows that loops over copies."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lightning_mpo.scores import TokenScores
from lightning_mpo.types import Experience, Rollout
from tests.support.builders import seeded


class BothSides(nn.Module):
    """Log-probs of letters at each position, from all positions of a row.

    Args:
        letters: size of the vocabulary; MASK is the id behind it.
        width: positions of a row.
        hidden: width of the states.
        seed: of the weights.
    """

    def __init__(self, letters: int, width: int, hidden: int = 8, seed: int = 0) -> None:
        super().__init__()
        g = seeded(seed)

        def weights(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.randn(*shape, generator=g, dtype=torch.float64))

        self.mask = letters
        self.embedding, self.mixture = weights(letters + 1, hidden), weights(width, width)
        self.first, self.head = weights(hidden, hidden), weights(hidden, letters)

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Return log-probs, `[B, L, V]`."""
        states = torch.tanh(self.embedding[ids_BL] @ self.first)
        return (torch.tanh(self.mixture @ states) @ self.head).log_softmax(-1)

    def flat_gradient(self, loss: Tensor) -> Tensor:
        """Return the gradient of all weights in one vector."""
        parts = torch.autograd.grad(loss, list(self.parameters()), allow_unused=True)
        return torch.cat(
            [
                (torch.zeros_like(p) if g is None else g).flatten()
                for p, g in zip(self.parameters(), parts, strict=True)
            ]
        )


class NoisedScorer:
    """Scores rows under the noise that they hold, one copy after another.

    Args:
        network: of the policy.
        reference: of the reference.
    """

    def __init__(self, network: BothSides, reference: BothSides) -> None:
        self.network, self.reference = network, reference

    def score(self, rollout: Rollout, *, reference: bool = False) -> TokenScores:
        """Return log-probs with gradient, and no entropies."""
        network = self.reference if reference else self.network
        hidden_BCL, weights_BCT = rollout.hidden_BCL, rollout.copy_weights_BCT
        assert hidden_BCL is not None
        assert weights_BCT is not None
        T, total_BT = weights_BCT.shape[2], torch.zeros((), dtype=torch.float64)
        for c in range(hidden_BCL.shape[1]):
            table = network(rollout.tokens_BL.masked_fill(hidden_BCL[:, c], network.mask))
            logprobs_BL = table.gather(2, rollout.tokens_BL[..., None])[..., 0]
            total_BT = total_BT + weights_BCT[:, c] * logprobs_BL[:, -T:]
        return TokenScores(total_BT, torch.zeros_like(total_BT.detach()))

    def detached(self, rollout: Rollout, *, reference: bool = False) -> Tensor:
        """Return log-probs without gradient."""
        return self.score(rollout, reference=reference).logprobs_BT.detach()


def logprobs_of(
    network: BothSides, row_L: Tensor, hidden: set[int], width: int
) -> dict[int, Tensor]:
    """Return the log-prob of each hidden token of the last `width` columns, by its place there."""
    ids_L = row_L.clone()
    first = len(row_L) - width
    for place in hidden:
        ids_L[first + place] = network.mask
    table = network(ids_L[None])[0]
    return {place: table[first + place, row_L[first + place]] for place in sorted(hidden)}


def copies_of(made: Experience, b: int) -> list[set[int]]:
    """Return the places that each copy of a row hides in the canvas."""
    hidden_BCL, T = made.rollout.hidden_BCL, made.mask_BT.shape[1]
    assert hidden_BCL is not None
    return [set(hidden_L[-T:].nonzero()[:, 0].tolist()) for hidden_L in hidden_BCL[b]]
