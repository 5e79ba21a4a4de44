"""The example classes and functions of CONTRIBUTING.md and docs/from_trl.md work."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import fields

import pytest
import torch

from lightning_mpo.functional.advantages import at_last_token
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.rollout.admission import check_rollout
from lightning_mpo.rollout.parity import ParityError, check_parity
from lightning_mpo.sampling import LocalSampler, SamplingRequest
from lightning_mpo.scores import ScoreRequest, TokenScores
from lightning_mpo.types import Finish, PromptBatch, Rollout
from tests.support.builders import make_prompts, seeded
from tests.support.pages import FROM_TRL, ROOT, blocks


@pytest.fixture(scope="module")
def examples() -> dict:
    names: dict = {}
    for page in (ROOT / "CONTRIBUTING.md", FROM_TRL):
        for block in blocks(page, "python"):
            exec(compile(block, str(page), "exec"), names)
    return names


def test_the_reward_of_both_pages(examples):
    given = examples["right_and_short"](["4 ", "five", "6"], ["4", "5", ""])
    assert given == [pytest.approx(0.98), pytest.approx(-0.04), None]


def test_the_advantage(examples):
    mask_BT = torch.ones(4, 2, dtype=torch.bool)
    rewards_BT = at_last_token(torch.tensor([1.0, 2.0, 9.0, 5.0]), mask_BT)
    valid_B = torch.tensor([True, True, True, False])
    estimate = examples["MedianRelative"](0.5).estimate(Outcome(rewards_BT, mask_BT, 4, valid_B))
    assert estimate.advantages_BT.tolist() == [[-2.0, -2.0], [0.0, 0.0], [14.0, 14.0], [0.0, 0.0]]


def test_the_sampler_on_a_server(examples, tiny_policy):
    """The server is the policy itself, one prompt at a time: the gate passes, and fails at another temperature."""
    policy, prompts = tiny_policy(), make_prompts([4, 6, 3])

    def serve(scale):
        def complete(prompt_ids, count, temperature, max_tokens, seed):
            ids = torch.tensor([prompt_ids])
            batch = PromptBatch(ids, torch.ones_like(ids, dtype=torch.bool), prompts.rows[:1])
            request = SamplingRequest(FullVocabulary(), scale * temperature, max_tokens)
            drawn = LocalSampler().sample(policy, batch, count, request, generator=seeded(seed))
            masks, logprobs = drawn.response_mask_BT, drawn.behaviour_logprobs_BT
            return [
                (row[mask].tolist(), values[mask].tolist())
                for row, mask, values in zip(drawn.responses_BT, masks, logprobs, strict=True)
            ]

        return complete

    request = SamplingRequest(FullVocabulary(), 0.7, 8)
    sampler = examples["ServerSampler"]()
    for scale, outcome in ((1.0, nullcontext()), (2.0, pytest.raises(ParityError))):
        examples["complete"] = serve(scale)
        rollout = sampler.sample(policy, prompts, 3, request, generator=seeded(0))
        rollout = check_rollout(rollout, FullVocabulary(), policy.vocabulary, True, completions=3)
        with outcome:
            check_parity(policy, rollout, temperature=0.7, exact=True)
    ends = [
        row[mask][-1].item() in policy.end_tokens
        for row, mask in zip(rollout.responses_BT, rollout.response_mask_BT, strict=True)
    ]
    assert [finish == Finish.STOP for finish in rollout.finish_B] == ends
    assert len(rollout.texts) == len(rollout.rows) == 9


@pytest.mark.parametrize("kind", [Rollout, TokenScores, ScoreRequest, SamplingRequest, Outcome])
def test_every_field_of_the_interface_is_listed(kind):
    table = (ROOT / "CONTRIBUTING.md").read_text()
    assert [item.name for item in fields(kind) if f"`{item.name}`" not in table] == []


def test_the_callback(examples):
    assert issubclass(examples["LongestResponse"], RolloutCallback)
