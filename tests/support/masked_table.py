"""A masked policy that is a table: sums of few binary digits, exact in any order and batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_mpo.policies.base import Policy
from lightning_mpo.scores import ScoreRequest, TokenScores
from tests.support.bigram import Letters
from tests.support.builders import END, PAD, VOCABULARY, seeded

MASK = VOCABULARY


class MaskedTable(Policy):
    """Logits of a position are a sum over its neighbours, which count half as much a place away.

    Args:
        end: added to the logits of END.
        flat: all logits are 0.
        seed: of the tables.
        ends: ids that end a response.
    """

    masked = True
    mask_id, vocabulary, tokenizer = MASK, VOCABULARY + 1, Letters()
    device = torch.device("cpu")

    def __init__(
        self, end: float = 0.0, flat: bool = False, seed: int = 0, ends: Sequence[int] = (END,)
    ) -> None:
        super().__init__()
        V, g = VOCABULARY + 1, seeded(seed)
        tables = [torch.randint(-8, 9, (n, V), generator=g) / 8 for n in (V, V, 16)]
        self.initial, self.table, self.place = (0 * t if flat else t for t in tables)
        self.place[:, END] += end
        self.ends = list(ends)
        self.passes = 0
        """Calls of `states`."""

    @property
    def end_tokens(self) -> list[int]:
        return self.ends

    @property
    def barred(self) -> tuple[int, ...]:
        return PAD, MASK

    def check(self, request: ScoreRequest = ScoreRequest()) -> None:  # noqa: B008  frozen
        pass

    def build(self, *, device: torch.device, reference: bool) -> None:
        pass

    def trained_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return state

    def states(self, ids_BL, attention_mask_BL, *, reference=False) -> Tensor:
        self.passes += 1
        place_BL = (attention_mask_BL.long().cumsum(1) - 1).clamp(min=0)
        distance_BLL = (place_BL[:, :, None] - place_BL[:, None]).abs()
        weights_BLL = 0.5 ** distance_BLL.clamp(max=5) * attention_mask_BL[:, None]
        table = self.initial if reference else self.table
        return weights_BLL @ table[ids_BL] + self.place[place_BL % 16]

    def logits(self, hidden_nD, reference=False) -> Tensor:
        return hidden_nD.index_fill(1, torch.tensor(self.barred), -torch.inf)

    def score(self, rollout, mask_BT, *, temperature, request=None, reference=False) -> TokenScores:
        S, total_BT = rollout.prompt_length, torch.zeros(mask_BT.shape)
        for c in range(rollout.hidden_BCL.shape[1]):
            ids_BL = rollout.tokens_BL.masked_fill(rollout.hidden_BCL[:, c], MASK)
            states = self.states(ids_BL, rollout.attention_mask_BL, reference=reference)[:, S:]
            logits_BTV = self.logits(states.flatten(0, 1)).view(states.shape) / temperature
            logits_BTV = inside(rollout, logits_BTV)
            logprobs_BT = logits_BTV.log_softmax(-1).gather(2, rollout.responses_BT[..., None])
            scored_BT = mask_BT & (rollout.copy_weights_BCT[:, c] != 0)
            part_BT = rollout.copy_weights_BCT[:, c] * logprobs_BT[..., 0]
            total_BT = total_BT + torch.where(scored_BT, part_BT, 0)
        return TokenScores(total_BT, torch.zeros_like(total_BT))


def inside(rollout, logits_BTV: Tensor) -> Tensor:
    """Return logits that are -inf outside the stored supports."""
    if rollout.support_BTK is None:
        return logits_BTV
    slots = rollout.support_mask_BTK
    held = torch.ones_like(rollout.support_BTK) if slots is None else slots
    counts = torch.zeros_like(logits_BTV)
    counts = counts.scatter_add(2, rollout.support_BTK.long(), held.float())
    return logits_BTV.masked_fill(counts == 0, -torch.inf)
