"""Prompts that begin alike: a prefill of their beginning changes no logits."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import nn

from lightning_mpo.sampling import local
from lightning_mpo.sampling.prefix import sees_all, shared_prefix
from lightning_mpo.types import PromptBatch, PromptRow
from tests.support.builders import END
from tests.support.sampled import responses, sample

LONG = [5, 3, 7, 4, 6, 3, 5, 5, 4, 7, 3, 6]


def left_padded(prompts):
    S = max(map(len, prompts))
    ids = torch.tensor([[0] * (S - len(ids)) + ids for ids in prompts])
    return ids, torch.tensor([[False] * (S - len(ids)) + [True] * len(ids) for ids in prompts])


def joined(shared, p):
    """Return prompt p as the beginning and the end give it."""
    return [
        *shared.ids_L[: shared.lengths_P[p]].tolist(),
        *shared.ends_PU[p][shared.mask_PU[p]].tolist(),
    ]


@pytest.mark.parametrize(
    "prompts",
    [
        [[*LONG, 8], [*LONG, 9, 8], [*LONG[:9], 8]],
        [LONG[:n] for n in range(6, 13)],  # each is the beginning of the next
        [LONG, LONG, LONG[:-1]],
    ],
)
def test_beginning_and_end_are_the_prompt(prompts):
    shared = shared_prefix(*left_padded(prompts))
    assert [joined(shared, p) for p in range(len(prompts))] == prompts
    assert shared.mask_PU.any(1).all(), "the last token is read behind the beginning"
    assert shared.mask_PU[:, -1].all()
    # entries of the cache and positions, counted one by one
    for p, ids in enumerate(prompts):
        common, end = int(shared.lengths_P[p]), int(shared.mask_PU[p].sum())
        assert common + end == len(ids)
        seen = [1] * common + [0] * (len(shared.ids_L) - common)
        seen += [0] * (shared.mask_PU.shape[1] - end) + [1] * end
        assert shared.seen_PS[p].tolist() == seen
        positions = shared.positions_PU[p][shared.mask_PU[p]].tolist()
        assert positions == list(range(common, len(ids)))


@pytest.mark.parametrize(
    "prompts",
    [
        [LONG],  # alone
        [LONG, LONG[::-1]],
        [LONG, [8, *LONG]],
        [[4], [4], [4]],
        [[*LONG, *LONG], [*LONG[:3], *LONG], [*LONG[:3], 8]],  # most of it is different
    ],
)
def test_prompts_with_little_in_common_are_read_as_they_are(prompts):
    assert shared_prefix(*left_padded(prompts)) is None


def test_logits_are_those_of_whole_prompts(policy, monkeypatch):
    ids, mask = left_padded([[*LONG, 8, 4], [*LONG, 9, 8], LONG[:9], LONG])
    widths = []
    handle = policy.decoder().register_forward_pre_hook(
        lambda module, args, kwargs: widths.append(tuple(kwargs["input_ids"].shape)),
        with_kwargs=True,
    )

    def logits():
        """Return the logits behind the prompts and behind two tokens more, for each of 2 rows."""
        with torch.no_grad():
            stream = local._Stream(policy, ids, mask, 2)
            seen, position = stream.seen_BS, mask.sum(1).repeat_interleave(2)
            every = [stream.logits_BV]
            for t in range(2):
                seen = torch.cat([seen, torch.ones(8, 1, dtype=seen.dtype)], dim=1)
                stream.step(torch.arange(3, 11), seen, position + t)
                every.append(stream.logits_BV)
        return torch.stack(every)

    together = logits()
    assert widths[:2] == [(1, 13), (4, 2)], "the beginning once, then the ends"
    widths.clear()
    monkeypatch.setattr(local, "shared_prefix", lambda ids_PS, mask_PS: None)
    whole = logits()
    handle.remove()
    assert widths[0] == (4, 14)
    torch.testing.assert_close(together, whole, rtol=0, atol=1e-5)
    assert (whole[0] - whole[1]).abs().max() > 1e-2, "the check compares something"


def test_a_rollout_of_such_prompts_is_that_of_whole_prompts(policy, monkeypatch):
    ids, mask = left_padded([[*LONG, 8], [*LONG, 9], [*LONG[:10], 5, 8]])
    prompts = PromptBatch(ids, mask, tuple(PromptRow("", "") for _ in ids))
    together = sample(policy, prompts)
    monkeypatch.setattr(local, "shared_prefix", lambda ids_PS, mask_PS: None)
    whole = sample(policy, prompts)
    assert responses(together) == responses(whole)
    torch.testing.assert_close(
        together.behaviour_logprobs_BT, whole.behaviour_logprobs_BT, rtol=0, atol=1e-5
    )
    assert any(END in ids for ids in responses(whole))


class Placed(nn.Module):
    def forward(self, input_ids, position_ids=None, **options):
        return input_ids


class Counting(nn.Module):
    def forward(self, input_ids, **options):
        return input_ids


def test_models_whose_layers_forget_read_whole_prompts():
    def sees(decoder=Placed, **config):
        return sees_all(SimpleNamespace(**config), decoder())

    assert sees()
    assert sees(sliding_window=None)
    assert sees(layer_types=["full_attention"] * 2, sliding_window=64)
    assert sees(attention_layers=["global"])
    assert not sees(sliding_window=4096)
    assert not sees(layer_types=["full_attention", "sliding_attention"])
    assert not sees(layer_types=["linear_attention"])
    assert not sees(attention_layers=["global", "local"])
    assert not sees(Counting), "positions are places in the cache, as in MPT"


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("Mpt", {"d_model": 16, "n_heads": 2, "n_layers": 1}),
        ("GPTNeo", {"hidden_size": 16, "num_heads": 2, "num_layers": 2, "window_size": 4,
                    "attention_types": [[["global", "local"], 1]]}),
    ],
)  # fmt: skip
def test_families_of_transformers_that_read_whole_prompts(name, options):
    config = getattr(transformers, f"{name}Config")(vocab_size=12, **options)
    with torch.device("meta"):
        decoder = getattr(transformers, f"{name}Model")(config)
    assert not sees_all(config, decoder)
