"""The parity gate names randomness as a cause, and advises no option that is set already."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from lightning_mpo.policies import CausalPolicy, Lora
from lightning_mpo.rollout.parity import ParityError, check_parity
from tests.support.builders import make_rollout


def test_the_gate_names_randomness_as_such(tiny_folder):
    policy = CausalPolicy(tiny_folder, lora=Lora(rank=4, alpha=8, dropout=0.5))
    policy.build(device=torch.device("cpu"), reference=False)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_()
    with pytest.raises(
        ParityError, match=r"scoring the same rows twice differs too .* set its dropouts to 0"
    ):
        check_parity(policy, make_rollout([5, 3], [4, 4]), temperature=1.0, exact=True)


def test_the_gate_does_not_advise_what_is_set_already():
    class Padded:
        share_prompts = False
        masked = False

        def score(self, rollout, mask_BT, **_):
            width = float(rollout.tokens_BL.shape[1])
            return SimpleNamespace(logprobs_BT=torch.full(mask_BT.shape, -width))

    with pytest.raises(
        ParityError, match="positions or attention of this model depend on padding$"
    ):
        check_parity(Padded(), make_rollout([5, 3], [4, 2]), temperature=1.0, exact=True)
