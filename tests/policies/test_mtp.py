"""Multi-token heads against one row at a time; what they see, where gradients go, and what files of them must say."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_mpo.errors import UserError
from lightning_mpo.functional.actions import window
from lightning_mpo.policies import (
    CausalPolicy,
    Lora,
    MedusaHeads,
    MTPHeads,
    ParallelHeads,
    SequentialHeads,
)
from lightning_mpo.policies.packing import lay_out
from lightning_mpo.policies.trunk import Trunk, TrunkStates, record_norm_input
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import END, VOCABULARY, make_rollout, seeded, subclasses

PROMPTS, RESPONSES = [6, 9, 4], [5, 1, 3, 2, 1, 7, 4, 4, 1]
FAMILIES = [ParallelHeads, SequentialHeads, MedusaHeads]
each_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)
M = 3
REQUEST = ScoreRequest(future=M)


def scramble(heads: MTPHeads, size: float = 0.4) -> None:
    """Give every weight of the heads a value that matters."""
    generator = seeded(7)
    with torch.no_grad():
        for weight in heads.parameters():
            weight.add_(
                size
                * torch.randn(weight.shape, generator=generator, dtype=torch.float64).to(
                    weight.dtype
                )
            )


@pytest.fixture
def make(tiny_policy):
    def build(family=ParallelHeads, *, fresh=False, offsets=M, options=None, **rest):
        policy = tiny_policy(mtp=family(offsets=offsets, **(options or {})), double=True, **rest)
        if not fresh:
            scramble(policy.mtp)
        return policy

    return build


def naive(policy: CausalPolicy, rollout, *, temperature: float = 1.0) -> Tensor:
    """Score one row at a time with plain transformers: no padding, packing, chunks or masks of ours."""
    heads, decoder = policy.mtp, policy.decoder()
    S, (B, T) = rollout.prompt_length, rollout.response_mask_BT.shape
    future = torch.zeros(B, T, M, dtype=torch.float64)
    for b in range(B):
        prompt = rollout.tokens_BL[b, :S][rollout.attention_mask_BL[b, :S]]
        response = rollout.responses_BT[b][rollout.response_mask_BT[b]]
        ids = torch.cat([prompt, response])[None]
        L, s = ids.shape[1], len(prompt)
        with record_norm_input(decoder) as before:
            after = decoder(input_ids=ids, use_cache=False).last_hidden_state
        positions = torch.arange(L)[None]
        causal = torch.full((L, L), -torch.inf, dtype=torch.float64).triu(1)[None, None]

        def layer(module, hidden, positions=positions, causal=causal):
            return module(
                hidden,
                attention_mask=causal,
                position_ids=positions,
                position_embeddings=decoder.rotary_emb(hidden, positions),
            )

        chain = after
        for n in range(1, M + 1):
            if heads.family == "parallel":
                hidden = decoder.norm(layer(heads.layers[n - 1], before[0]))
            elif heads.family == "medusa":
                hidden = after + torch.nn.functional.silu(after @ heads.residual[n - 1].weight.T)
            else:
                ahead = torch.zeros_like(ids)
                ahead[:, : L - n] = ids[:, n:]
                embedded = heads.enorm[n - 1](decoder.embed_tokens(ahead))
                pair = torch.cat([embedded, heads.hnorm[n - 1](chain)], -1)
                chain = layer(heads.layers[n - 1], heads.eh_proj[n - 1](pair))
                hidden = heads.norm[n - 1](chain)
            table = (hidden[0] @ heads.unembedding(n).weight.T / temperature).log_softmax(-1)
            for t in range(len(response) - n):
                future[b, t, n - 1] = table[s - 1 + t, response[t + n]]
    return future


def test_the_list_has_every_family():
    assert subclasses(MTPHeads) == set(FAMILIES)


@each_family
@pytest.mark.parametrize("share", [True, False], ids=["shared", "apart"])
@pytest.mark.parametrize("own", [False, True], ids=["tied", "own"])
def test_equals_the_naive_loop(make, family, share, own):
    policy = make(family, share_prompts=share, options={"own_unembedding": own})
    rollout = make_rollout(PROMPTS, RESPONSES, left=2, right=3, order=[3, 0, 8, 5, 1, 2, 7, 4, 6])
    scores = policy.score(rollout, rollout.response_mask_BT, temperature=1.3, request=REQUEST)
    torch.testing.assert_close(
        scores.future_BTM.double(), naive(policy, rollout, temperature=1.3), rtol=1e-9, atol=1e-9
    )
    plain = policy.score(rollout, rollout.response_mask_BT, temperature=1.3)
    torch.testing.assert_close(scores.logprobs_BT, plain.logprobs_BT)
    assert plain.future_BTM is None


@each_family
def test_starts_as_the_trunks_next_token_distribution(make, family):
    """Sequential heads mix an embedding in at random, and start near it only."""
    policy = make(family, fresh=True)
    rollout = make_rollout([4], [6])
    future = policy.score(
        rollout, rollout.response_mask_BT, temperature=1.0, request=REQUEST
    ).future_BTM
    ids = rollout.tokens_BL
    table = policy.network(input_ids=ids, use_cache=False).logits[0].log_softmax(-1)
    expected = [
        [table[3 + t, ids[0, 4 + t + n]] if t + n < 6 else 0.0 for n in (1, 2, 3)] for t in range(6)
    ]
    if family is SequentialHeads:
        assert torch.isfinite(future).all()
    else:
        torch.testing.assert_close(future[0], torch.tensor(expected, dtype=torch.float64))


@each_family
def test_only_sequential_heads_see_the_tokens_in_between(make, family):
    policy = make(family)
    rollout = make_rollout([4], [6])
    other = make_rollout([4], [6])
    other.tokens_BL[0, 4] = (
        rollout.tokens_BL[0, 4] + 1
    ) % VOCABULARY  # o_0, which lies between h_0 and o_1, o_2, …
    here, there = (
        policy.score(r, r.response_mask_BT, temperature=1.0, request=REQUEST).future_BTM[0, 0]
        for r in (rollout, other)
    )
    assert (not torch.allclose(here, there)) == (family is SequentialHeads)


@each_family
def test_windows_stop_at_gaps_of_the_mask_and_at_the_end(make, family):
    policy = make(family)
    rollout = make_rollout([3], [7, 4])
    whole = rollout.response_mask_BT
    gap = whole.clone()
    gap[0, 3] = False
    full, cut = (
        policy.score(rollout, m, temperature=1.0, request=REQUEST).future_BTM for m in (whole, gap)
    )
    for n in range(1, M + 1):
        alive = window(gap, n)
        assert torch.equal(cut[..., n - 1] != 0, alive)
        torch.testing.assert_close(cut[..., n - 1][alive], full[..., n - 1][alive])


@each_family
def test_gradients_go_where_they_are_told(make, family):
    rollout = make_rollout(PROMPTS, RESPONSES)
    ask = ScoreRequest(future=M, upkeep=True)

    def reached(policy, which):
        policy.zero_grad()
        scores = policy.score(rollout, rollout.response_mask_BT, temperature=1.0, request=ask)
        getattr(scores, which).sum().backward()
        parts = (policy.network.parameters(), policy.mtp.parameters())
        return tuple(any(p.grad is not None and bool(p.grad.any()) for p in part) for part in parts)

    open_, closed = make(family), make(family, options={"detach_trunk": True})
    assert reached(open_, "future_BTM") == (True, True)
    for policy in (
        open_,
        closed,
    ):  # the shared unembedding and norm belong to the trunk: frozen in this test
        policy.network.get_output_embeddings().weight.requires_grad_(False)
        policy.decoder().norm.requires_grad_(False)
    assert reached(open_, "upkeep_BTM") == (False, True)
    assert reached(closed, "future_BTM") == (False, True)
    scores = open_.score(rollout, rollout.response_mask_BT, temperature=1.0, request=ask)
    torch.testing.assert_close(scores.future_BTM, scores.upkeep_BTM)


@each_family
@pytest.mark.parametrize("kept", ["stored", "full"])
def test_the_support_of_offset_n_is_the_one_stored_there(make, family, kept):
    policy = make(family, options={"support": kept})
    rollout = make_rollout(PROMPTS, RESPONSES, support=4, slots=True)
    future = policy.score(
        rollout, rollout.response_mask_BT, temperature=1.0, request=REQUEST
    ).future_BTM
    free = make_rollout(PROMPTS, RESPONSES, support=4, slots=True)
    full = naive(policy, make_rollout(PROMPTS, RESPONSES))
    if kept == "full":
        torch.testing.assert_close(future.double(), full, rtol=1e-8, atol=1e-8)
        return
    for n in range(
        1, M + 1
    ):  # renormalise by hand: the ids of t+n under the distribution of offset n at t
        for b, t in window(free.response_mask_BT, n).nonzero().tolist():
            ids = free.support_BTK[b, t + n].long()[free.support_mask_BTK[b, t + n]]
            swapped = [_with(free, b, t + n, int(i)) for i in ids]
            if family is not SequentialHeads or n == 1:
                mass = torch.stack([naive_at(policy, s, b, t, n) for s in swapped]).logsumexp(0)
                expected = naive_at(policy, free, b, t, n) - mass
                torch.testing.assert_close(
                    future[b, t, n - 1].double(), expected, rtol=1e-7, atol=1e-7
                )
            break


def _with(rollout, b, t, token):
    from dataclasses import replace

    tokens = rollout.tokens_BL.clone()
    tokens[b, rollout.prompt_length + t] = token
    return replace(rollout, tokens_BL=tokens)


def naive_at(policy, rollout, b, t, n):
    from lightning_mpo.types import take_rows

    return naive(policy, take_rows(rollout, torch.tensor([b])))[0, t, n - 1]


@each_family
def test_works_with_adapters_and_saves_what_is_trained(tiny_folder, family):
    policy = CausalPolicy(tiny_folder, lora=Lora(rank=2), dtype="bfloat16", mtp=family(offsets=2))
    policy.build(device=torch.device("cpu"), reference=True)
    assert all(weight.dtype == torch.float32 for weight in policy.mtp.parameters())
    rollout = make_rollout(PROMPTS, RESPONSES)
    request = ScoreRequest(future=2)
    scores = policy.score(rollout, rollout.response_mask_BT, temperature=1.0, request=request)
    scores.future_BTM.sum().backward()
    assert set(policy.parts()) == {"policy", "mtp"}
    kept = policy.trained_state(policy.state_dict())
    assert all("lora_" in key or key.startswith("mtp.") for key in kept)
    assert {key for key in kept if key.startswith("mtp.")} == {
        f"mtp.{key}" for key in policy.mtp.state_dict()
    }
    reference = policy.score(rollout, rollout.response_mask_BT, temperature=1.0, reference=True)
    assert reference.future_BTM is None


@each_family
def test_works_over_a_4_bit_trunk(tiny_policy, family):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    policy = tiny_policy(hidden_size=64)
    for module in list(policy.network.modules()):
        for name, child in module.named_children():
            if isinstance(child, torch.nn.Linear) and name != "lm_head":
                quantised = bitsandbytes.nn.Linear4bit(
                    child.in_features,
                    child.out_features,
                    bias=False,
                    quant_type="nf4",
                    compute_dtype=torch.float32,
                )
                quantised.load_state_dict(child.state_dict())
                setattr(module, name, quantised.to("cpu"))
    policy.network.requires_grad_(False)
    heads = family(offsets=2)
    heads.build(Trunk(policy.decoder(), policy.config, policy.network.get_output_embeddings()))
    policy.mtp = heads
    rollout = make_rollout(PROMPTS, RESPONSES)
    scores = policy.score(
        rollout, rollout.response_mask_BT, temperature=1.0, request=ScoreRequest(future=2)
    )
    scores.future_BTM.sum().backward()
    assert torch.isfinite(scores.future_BTM).all()
    assert any(bool(weight.grad.any()) for weight in heads.parameters() if weight.grad is not None)


SIZES = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}


@pytest.mark.parametrize(
    "model", ["llama", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "mistral"]
)
@pytest.mark.parametrize(
    "family", [ParallelHeads, SequentialHeads], ids=lambda family: family.family
)
def test_layers_of_the_trunks_own_class(model, family):
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(model, **SIZES)
    network = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    heads = family(offsets=2)
    heads.build(
        Trunk(
            network.get_decoder(), network.config.get_text_config(), network.get_output_embeddings()
        )
    )
    assert type(heads.layers[0]) is type(network.get_decoder().layers[0])
    rollout = make_rollout([5], [6, 6])
    lines = lay_out(rollout, share=False, hidden_size=32)
    with record_norm_input(network.get_decoder()) as before:
        after = network.get_decoder()(
            input_ids=lines.input_ids_RL, position_ids=lines.position_ids_RL, use_cache=False
        ).last_hidden_state
    states = TrunkStates(before[0], after, lines)
    for hidden in heads.hidden(states, 2):
        assert hidden.shape == after.shape
        if family is ParallelHeads:
            torch.testing.assert_close(hidden, after)
    scramble(heads, 0.1)
    hidden = list(heads.hidden(states, 2))
    sum(part.square().sum() for part in hidden).backward()
    unreached = [name for name, weight in heads.named_parameters() if weight.grad is None]
    assert not unreached
    cut = lay_out(make_rollout([5], [3, 3]), share=False, hidden_size=32)
    assert cut.input_ids_RL.shape[1] < lines.input_ids_RL.shape[1]
    if family is ParallelHeads:  # causal: a shorter line has the same hidden states
        width = 4
        with record_norm_input(network.get_decoder()) as before:
            short = network.get_decoder()(
                input_ids=lines.input_ids_RL[:, :width], use_cache=False
            ).last_hidden_state
        from dataclasses import replace

        short_lines = replace(
            lines,
            input_ids_RL=lines.input_ids_RL[:, :width],
            position_ids_RL=lines.position_ids_RL[:, :width],
        )
        for part, whole in zip(
            heads.hidden(TrunkStates(before[0], short, short_lines), 2), hidden, strict=True
        ):
            torch.testing.assert_close(part, whole[:, :width], rtol=1e-4, atol=1e-5)


def test_a_trunk_whose_layers_cannot_be_reached_is_refused():
    from transformers import GPT2Config, GPT2LMHeadModel

    network = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=16, n_head=2, vocab_size=20))
    with pytest.raises(UserError, match="GPT2Model has no layers, norm, rotary_emb, embed_tokens"):
        Trunk(network.get_decoder(), network.config, network.get_output_embeddings())


@each_family
def test_checkpointing_changes_no_gradient(make, family):
    rollout = make_rollout(PROMPTS, RESPONSES)
    gradients = []
    for flag in (False, True):
        policy = make(family, options={"checkpointing": flag})
        policy.score(
            rollout, rollout.response_mask_BT, temperature=1.0, request=REQUEST
        ).future_BTM.sum().backward()
        gradients.append([weight.grad for weight in policy.parameters() if weight.grad is not None])
    for plain, again in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, again)


@each_family
@pytest.mark.parametrize("own", [False, True], ids=["tied", "own"])
def test_a_file_of_heads_comes_back(make, family, own, tmp_path):
    policy = make(family, options={"own_unembedding": own})
    policy.mtp.save(tmp_path / "heads.safetensors")
    again = make(
        family,
        fresh=True,
        options={"own_unembedding": own, "weights_file": str(tmp_path / "heads.safetensors")},
    )
    for name, value in policy.mtp.state_dict().items():
        assert torch.equal(again.mtp.state_dict()[name], value)
    assert not again.cold_parts
    assert make(family, fresh=True).cold_parts == {"mtp"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"family": SequentialHeads}, "family sequential, `policy.mtp` has parallel"),
        ({"offsets": 2}, "offsets 2, `policy.mtp` has 3"),
        ({"options": {"own_unembedding": True}}, "own_unembedding True, `policy.mtp` has False"),
        ({"hidden_size": 16}, "hidden_size 16, `policy.mtp` has 32"),
    ],
    ids=["family", "offsets", "unembedding", "trunk"],
)
def test_a_file_of_other_heads_is_refused(make, other, message, tmp_path):
    make(**other).mtp.save(tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match=message):
        make(options={"weights_file": str(tmp_path / "heads.safetensors")})


def test_a_file_that_is_none_is_refused(make, tmp_path):
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        make(options={"weights_file": str(tmp_path / "none.safetensors")})


def test_fewer_heads_than_offsets_are_refused(make, tiny_policy):
    with pytest.raises(
        UserError, match=r"blocks of 5 tokens .* need 4 future offsets, but `policy.mtp` has 3"
    ):
        make().check(ScoreRequest(future=4))
    with pytest.raises(UserError, match="the policy has none; give `policy.mtp`"):
        tiny_policy().check(ScoreRequest(future=1))


def test_ranks_count_what_is_more_probable(make):
    policy = make()
    rollout = make_rollout([4, 2], [5, 3])
    mask = rollout.response_mask_BT
    ranks = policy.ranks(rollout, mask, M)
    assert ranks.shape == (*mask.shape, M + 1)
    best = naive_best(policy, rollout)
    for n in range(M + 1):
        alive = window(mask, n)
        assert torch.equal((ranks[..., n] == 0)[alive], best[..., n][alive])
        assert not ranks[..., n][~alive].any()


def naive_best(policy, rollout):
    """Tell where the true token is the most probable one, by trying every other token in its place."""
    mask = rollout.response_mask_BT
    best = torch.zeros(*mask.shape, M + 1, dtype=torch.bool)
    tables = []
    for token in range(VOCABULARY):
        tables.append(_forced(policy, rollout, token))
    tables = torch.stack(tables, -1)  # [B, T, 1 + M, V]
    for n in range(M + 1):
        for b, t in window(mask, n).nonzero().tolist():
            best[b, t, n] = tables[b, t, n].argmax() == rollout.responses_BT[b, t + n]
    return best


def _forced(policy, rollout, token):
    """Log-prob of one token at every offset; parallel heads do not read what they predict."""
    B, T = rollout.response_mask_BT.shape
    values = torch.full((B, T, M + 1), -torch.inf, dtype=torch.float64)
    for n in range(M + 1):
        for b, t in window(rollout.response_mask_BT, n).nonzero().tolist():
            swapped = _with(rollout, b, t + n, token)
            scores = policy.score(
                swapped, swapped.response_mask_BT, temperature=1.0, request=REQUEST
            )
            values[b, t, n] = (scores.logprobs_BT if n == 0 else scores.future_BTM[..., n - 1])[
                b, t
            ].detach()
    return values


class Largest(TorchDispatchMode):
    """The largest tensor that is made."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, tuple | list) else [result]:
            if isinstance(tensor, Tensor):
                self.size = max(self.size, tensor.numel())
        return result


def test_no_tensor_grows_with_offsets_times_vocabulary(monkeypatch, make):
    from lightning_mpo.functional import heads as functional

    monkeypatch.setattr(functional, "FULL_CHUNK_BYTES", 4 * VOCABULARY * 2)
    rollout = make_rollout(PROMPTS, RESPONSES)
    sizes = []
    for offsets in (1, 3):
        policy = make(offsets=3)
        with Largest() as largest:
            scores = policy.score(
                rollout,
                rollout.response_mask_BT,
                temperature=1.0,
                request=ScoreRequest(future=offsets),
            )
            scores.future_BTM.sum().backward()
        sizes.append(largest.size)
    assert sizes[0] == sizes[1]


def test_a_response_may_end_with_any_token(make):
    """Masks are carried: an end token inside a response is a token like others."""
    policy = make()
    rollout = make_rollout([4], [5])
    rollout.tokens_BL[0, 6] = END
    future = policy.score(
        rollout, rollout.response_mask_BT, temperature=1.0, request=REQUEST
    ).future_BTM
    torch.testing.assert_close(future.double(), naive(policy, rollout), rtol=1e-9, atol=1e-9)


@each_family
def test_autocast_of_the_trainer_reaches_the_heads(tiny_policy, family):
    """`bf16-mixed` over a float32 base computes the heads' products in bfloat16, as it does the trunk's."""
    policy = tiny_policy(mtp=family(offsets=1))
    scramble(policy.mtp)
    seen = []
    product = next(module for module in policy.mtp.modules() if isinstance(module, torch.nn.Linear))
    product.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    rollout = make_rollout(PROMPTS, RESPONSES)
    for dtype in (None, torch.bfloat16):
        with torch.autocast("cpu", dtype=dtype or torch.bfloat16, enabled=dtype is not None):
            policy.score(
                rollout, rollout.response_mask_BT, temperature=1.0, request=ScoreRequest(future=1)
            )
    assert seen == [torch.float32, torch.bfloat16]
