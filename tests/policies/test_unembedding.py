"""A head under LoRA against the wrapped layer's own forward; and what is refused by name."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from lightning_mpo.errors import UserError
from lightning_mpo.policies import CausalPolicy, Lora
from lightning_mpo.policies.unembedding import Unembedding
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import make_rollout, naive_logprobs, relative_error, seeded

CPU = torch.device("cpu")
PROMPTS, RESPONSES = [4, 6], [5, 2, 4, 3]


def adapted(folder: str, *, tied: bool = True, dtype: str = "float32", **lora) -> CausalPolicy:
    """A policy with an adapter on its head and in its trunk that is not zero."""
    options = {"rank": 3, "alpha": 6, "targets": ["lm_head", "q_proj"]} | lora
    policy = CausalPolicy(folder, lora=Lora(**options), dtype=dtype)
    load = policy.load_network

    def untie():
        network = load()
        if not tied:
            network.config.tie_word_embeddings = False
            old = network.lm_head.weight
            network.lm_head = nn.Linear(old.shape[1], old.shape[0], bias=False, dtype=old.dtype)
            network.lm_head.weight.data.copy_(old.data + 0.1)
        return network

    policy.load_network = untie
    policy.build(device=CPU, reference=True)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_" in name:
                weight.add_(0.3 * torch.randn(weight.shape, generator=seeded(8)))
    policy.eval()
    return policy


def flat(rows: list[Tensor]) -> Tensor:
    return torch.cat(rows)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("support", [None, 6])
@pytest.mark.parametrize(
    ("dtype", "near", "close"), [("float32", 1e-4, 1e-4), ("bfloat16", 0.15, 0.03)]
)
def test_an_adapted_head_scores_as_the_network_itself(
    tiny_folder, tied, support, dtype, near, close
):
    policy = adapted(tiny_folder, tied=tied, dtype=dtype)
    head, network = policy.network.get_output_embeddings(), policy.network
    assert (head.weight is network.get_input_embeddings().weight) == tied
    rollout = make_rollout(PROMPTS, RESPONSES, support=support)
    mask = rollout.response_mask_BT
    scores = policy.score(rollout, mask, temperature=0.8, request=ScoreRequest(entropy_grad=True))
    logprobs, entropies = naive_logprobs(network, rollout, temperature=0.8)
    torch.testing.assert_close(scores.logprobs_BT[mask], flat(logprobs).float(), rtol=0, atol=near)
    torch.testing.assert_close(scores.entropy_BT[mask], flat(entropies).float(), rtol=0, atol=near)
    trained = [p for p in policy.parameters() if p.requires_grad]
    assert len(trained) == 6  # A and B of the head and of two q_proj
    upstream = torch.randn(2, int(mask.sum()), generator=seeded(3))
    mine = (upstream[0] * scores.logprobs_BT[mask] + upstream[1] * scores.entropy_BT[mask]).sum()
    naive = (upstream[0] * flat(logprobs) + upstream[1] * flat(entropies)).sum()
    pairs = zip(
        torch.autograd.grad(mine, trained), torch.autograd.grad(naive, trained), strict=True
    )
    assert all(relative_error(one, other) < close for one, other in pairs)


@pytest.mark.parametrize("support", [None, 6])
def test_the_reference_has_no_adapter_on_its_head(tiny_folder, support):
    policy, plain = adapted(tiny_folder), CausalPolicy(tiny_folder)
    plain.build(device=CPU, reference=False)
    rollout = make_rollout(PROMPTS, RESPONSES, support=support)
    with torch.no_grad():
        expected = plain.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT
        before = policy.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT
        off = policy.score(
            rollout, rollout.response_mask_BT, temperature=1.0, reference=True
        ).logprobs_BT
        after = policy.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT
    torch.testing.assert_close(off, expected, rtol=0, atol=1e-6)
    assert torch.equal(before, after)
    assert (before - off).abs().max() > 0.01


def test_sampling_and_ranks_see_the_adapter(tiny_folder):
    policy = adapted(tiny_folder)
    rollout = make_rollout(PROMPTS, RESPONSES)
    with torch.no_grad():
        hidden = policy.decoder()(input_ids=rollout.responses_BT).last_hidden_state[:, -1]
        torch.testing.assert_close(
            policy.logits(hidden), policy.network.lm_head(hidden), rtol=0, atol=1e-4
        )
        ranks = policy.ranks(rollout, rollout.response_mask_BT)[..., 0]
        for b, n in enumerate(RESPONSES):
            prompt = rollout.tokens_BL[b, : rollout.prompt_length][
                rollout.attention_mask_BL[b, : rollout.prompt_length]
            ]
            row = torch.cat([prompt, rollout.responses_BT[b, :n]])
            table = policy.network(input_ids=row[None]).logits[0, len(prompt) - 1 : -1]
            expected = (table > table.gather(1, row[len(prompt) :, None])).sum(1)
            assert torch.equal(ranks[b, :n], expected)


def wrapped(bias: bool = False, **config) -> nn.Module:
    """A linear head under a LoRA adapter of random weights."""
    from peft import LoraConfig, get_peft_model

    network = nn.ModuleDict({"head": nn.Linear(6, 9, bias=bias)})
    model = get_peft_model(network, LoraConfig(**{"r": 2, "target_modules": ["head"]} | config))
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=seeded(4)))
    return model.base_model.model["head"]


@pytest.mark.parametrize(
    "config", [{}, {"lora_bias": True}, {"use_rslora": True}, {"lora_dropout": 0.4}]
)
@pytest.mark.parametrize("bias", [False, True])
def test_what_is_read_of_an_adapter_is_the_layer_itself(config, bias):
    head = wrapped(bias=bias or "lora_bias" in config, **config)
    hidden = torch.randn(4, 6)
    read = Unembedding.of(head.eval())
    torch.testing.assert_close(read.raw_logits(hidden), head(hidden))
    assert Unembedding.of(head.train()).adapter.dropout == config.get("lora_dropout", 0.0)
    head.enable_adapters(False)
    assert Unembedding.of(head).adapter is None
    torch.testing.assert_close(Unembedding.of(head).raw_logits(hidden), head.base_layer(hidden))


def test_what_a_head_may_not_be_is_said_by_name():
    from peft.utils.other import ModulesToSaveWrapper

    merged = wrapped()
    merged.merge()
    two = wrapped()
    two.update_layer("other", 2, lora_alpha=1, config=_config())
    two.set_adapter(["default", "other"])
    for head, message in (
        (
            wrapped(use_dora=True),
            r"the adapter 'default' of the head is a Dora\w+; .* only plain LoRA",
        ),
        (two, r"the head has 2 active adapters \(default, other\)"),
        (merged, "the head's adapter is merged .* `unmerge_adapter"),
        (
            ModulesToSaveWrapper(nn.Linear(6, 9), "default"),
            "peft's ModulesToSaveWrapper .* `lora.targets`",
        ),
        (
            SimpleNamespace(weight=torch.zeros(9, 6, dtype=torch.uint8)),
            "must be a linear layer in floating point",
        ),
        (nn.Identity(), "must be a linear layer in floating point, got Identity"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            Unembedding.of(head)
        assert "\n" not in str(caught.value)


def _config():
    from peft import LoraConfig

    return LoraConfig(r=2, target_modules=["head"])
