"""Truncated responses carry no loss, while their rewards count."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from lightning_mpo.functional.advantages import group_relative
from lightning_mpo.objective.reductions import ConstantLength, SequenceMean, TokenMean
from lightning_mpo.rewards.scoring import completions_of
from lightning_mpo.sampling import LocalSampler
from lightning_mpo.types import Finish
from tests.support.dynamic import train
from tests.support.runs import Digits, Probe, adam, distance, make_objective, same


@pytest.mark.parametrize(
    "reduction", [TokenMean(), SequenceMean(), ConstantLength(8)], ids=["tokens", "rows", "length"]
)
def test_truncated_responses_carry_no_loss_while_their_rewards_count(tmp_path, reduction):
    seen = []

    def look(trainer, module, batch, batch_idx):
        seen.append((module.source.experience, batch["denominators"]))

    options = {
        "objective": make_objective(reduction=reduction),
        "callbacks": [Probe(on_train_batch_start=look)],
    }
    masked, _ = train(
        tmp_path, [Digits()], rounds=None, rollout={"mask_truncated": True}, max_steps=1, **options
    )
    plain, _ = train(tmp_path, [Digits()], rounds=None, max_steps=1, **options)
    (experience, denominators), (other, _) = seen
    whole_B = experience.rollout.finish_B == Finish.STOP
    assert 0 < whole_B.sum() < 16
    assert torch.equal(experience.rollout.tokens_BL, other.rollout.tokens_BL)
    assert torch.equal(experience.advantages_BT, other.advantages_BT), (
        "rewards of truncated responses count"
    )
    advantages_B = group_relative(
        torch.tensor(Digits().score(completions_of(experience.rollout))), 4
    )
    for b in range(16):
        mask = experience.rollout.response_mask_BT[b]
        assert experience.mask_BT[b].tolist() == (mask & whole_B[b]).tolist()
        torch.testing.assert_close(
            experience.advantages_BT[b][mask], advantages_B[b].expand(int(mask.sum()))
        )
    tokens = int(experience.rollout.response_mask_BT[whole_B].sum())
    expected = {
        TokenMean: tokens,
        SequenceMean: int(whole_B.sum()),
        ConstantLength: 8 * int(whole_B.sum()),
    }
    assert denominators.actions == denominators.tokens == expected[type(reduction)]
    assert distance(masked.weights, plain.weights) > 1e-4


def test_a_rollout_of_truncated_responses_alone_changes_nothing(tmp_path):
    class CutOff(LocalSampler):
        def sample(self, *arguments, **options):
            rollout = super().sample(*arguments, **options)
            return replace(rollout, finish_B=torch.full_like(rollout.finish_B, int(Finish.LENGTH)))

    def run(lr, **rollout):
        options = {"module": {"optimizer": adam(lr)}, "max_steps": 2, "rounds": None}
        return train(tmp_path, [Digits()], rollout={"sampler": CutOff(), **rollout}, **options)[0]

    still = run(0.0, mask_truncated=True).weights
    assert same(run(1e-2, mask_truncated=True).weights, still)
    assert not same(run(1e-2).weights, still)
