"""`rollout.stop`: tokens that end a response besides the end tokens of the policy."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo import RolloutLoop
from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.sampling import LocalSampler
from lightning_mpo.sampling.base import Sampler, SamplingRequest
from lightning_mpo.types import Finish
from tests.support.builders import make_prompts, seeded


@pytest.mark.parametrize("batch_size", [None, 4])
@pytest.mark.parametrize("support", [FullVocabulary(), TopK(4)])
def test_a_response_ends_with_the_first_stop_token(tiny_policy, batch_size, support):
    policy, stop = tiny_policy(), (4, 7)
    request = SamplingRequest(support, 1.0, 12)
    plain, short = (
        LocalSampler(batch_size).sample(
            policy,
            make_prompts([4, 6, 3]),
            4,
            SamplingRequest(support, 1.0, 12, stop=ids),
            generator=seeded(0),
        )
        for ids in ((), stop)
    )
    assert request.stop == ()
    cut = 0
    for b in range(12):
        whole = plain.responses_BT[b][plain.response_mask_BT[b]].tolist()
        first = next((t for t, token in enumerate(whole) if token in stop), None)
        expected = whole if first is None else whole[: first + 1]
        assert short.responses_BT[b][short.response_mask_BT[b]].tolist() == expected
        ended = first is not None or plain.finish_B[b] == Finish.STOP
        assert short.finish_B[b] == (Finish.STOP if ended else Finish.LENGTH)
        cut += first is not None
        T = len(expected)
        torch.testing.assert_close(
            short.behaviour_logprobs_BT[b, :T], plain.behaviour_logprobs_BT[b, :T]
        )
    assert cut


def test_a_text_stands_for_all_tokens_that_contain_it(tiny_policy):
    policy = tiny_policy()
    text = policy.token_texts[4]
    assert RolloutLoop(stop=[text]).stop_ids(policy) == (4,)
    assert RolloutLoop(stop=[5, text]).stop_ids(policy) == (4, 5)
    assert RolloutLoop().stop_ids(policy) == ()
    with pytest.raises(
        UserError, match=r"`rollout.stop` holds 'xyz', which is not the text of one"
    ):
        RolloutLoop(stop=["xyz"]).stop_ids(policy)
    with pytest.raises(UserError, match="`rollout.stop` must hold ids or texts of tokens, got 1.5"):
        RolloutLoop(stop=[1.5])


def test_a_sampler_that_does_not_heed_it_is_refused():
    class Other(Sampler):
        def sample(self, *args, **kwargs):
            raise NotImplementedError

    Other().check_stop([])
    LocalSampler().check_stop(["#"])
    with pytest.raises(UserError, match="`rollout.sampler` Other does not end responses with"):
        Other().check_stop(["#"])
