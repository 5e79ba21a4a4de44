"""Exports of masked policies: loaded again by their own class and compared under fixed noise."""

from __future__ import annotations

import json

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.export import Sampling, check_form, export, forms, part_of, samples
from lightning_mpo.export.usage import Usage
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.policies import MaskedPolicy
from lightning_mpo.sampling import DiffusionSampler
from tests.support.exports import LORA, PROMPTS
from tests.support.masked import MASK, make_masked, masked_rollout
from tests.support.masked_folders import write_family, write_foreign

SAMPLER = DiffusionSampler(block=4, tokens_per_step=2, remasking="entropy")
SAMPLING = Sampling(0.7, 12, FullVocabulary(), SAMPLER)


def score(policy) -> torch.Tensor:
    rollout = masked_rollout()
    with torch.no_grad():
        return policy.score(rollout, rollout.response_mask_BT, temperature=1.0).logprobs_BT


def built(policy) -> MaskedPolicy:
    policy.check()
    policy.build(device=torch.device("cpu"), reference=False)
    return policy


def test_all_weights_of_a_small_policy_are_exported_with_their_use(tmp_path):
    from transformers import AutoModelForMaskedLM

    policy = make_masked()
    check, notes = export(policy, tmp_path, "full", PROMPTS, sampling=SAMPLING)
    assert not check.problems
    assert not notes
    assert check.largest < 1e-4
    assert (check.tokens, check.same_texts, check.texts) == (3 * 12, 3, 3)
    network = AutoModelForMaskedLM.from_pretrained(tmp_path)
    assert type(network).__name__ == "BertForMaskedLM"
    usage = Usage.read(tmp_path)
    assert (usage.max_new_tokens, usage.temperature) == (12, 0.7)
    assert usage.masked == {
        "mask_token": "<mask>",
        "shift": False,
        "block": 4,
        "tokens_per_step": 2,
        "remasking": "entropy",
    }
    assert vars(usage.sampler()) == vars(SAMPLER)
    again = built(usage.policy(str(tmp_path)))
    assert (again.mask_id, again.barred) == (policy.mask_id, policy.barred)
    torch.testing.assert_close(score(again), score(policy), rtol=1e-5, atol=1e-5)
    card = (tmp_path / "README.md").read_text()
    assert 'model = AutoModelForMaskedLM.from_pretrained("' in card
    assert "pipeline_tag: fill-mask" in card
    assert "at most 12 tokens (the canvas); blocks of 4 from the left, tokens a step 2" in card
    assert "AutoModelForCausalLM" not in card


@pytest.mark.parametrize(
    ("family", "form", "shift"),
    [("bert", "adapter", False), ("bert", "merged", False), ("llama", "merged", True)],
)
def test_adapters_of_a_masked_model_are_exported(tmp_path, family, form, shift):
    write_family(family, tmp_path / "base")
    policy = built(MaskedPolicy(str(tmp_path / "base"), lora=LORA, shift=shift))
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.1)
    out = tmp_path / "out"
    check, _ = export(policy, out, form, PROMPTS, sampling=SAMPLING, dtype="float32")
    assert not check.problems
    assert check.moved > 0.01
    assert abs(check.recovered - 1) < 1e-2
    again = built(Usage.read(out).policy(str(out)))
    assert (again.shift, again.lora) == (shift, LORA if form == "adapter" else None)
    torch.testing.assert_close(score(again), score(policy), rtol=1e-4, atol=1e-4)
    card = (out / "README.md").read_text()
    assert ("mask of ones" in card) == ("predict the next token" in card) == shift
    name = "AutoModelForCausalLM" if family == "llama" else "AutoModelForMaskedLM"
    assert f"{name}.from_pretrained" in card


def test_other_weights_are_seen(tmp_path, monkeypatch):
    def damage(policy, folder):
        with torch.no_grad():
            policy.network.cls.predictions.bias[5:9].add_(3.0)
        policy.network.save_pretrained(folder)
        with torch.no_grad():
            policy.network.cls.predictions.bias[5:9].sub_(3.0)

    monkeypatch.setattr(forms, "write_full", damage)
    support = Sampling(0.7, 12, TopK(4), SAMPLER)
    check, _ = export(make_masked(), tmp_path / "out", "full", PROMPTS, sampling=support)
    assert any("log-probs differ by up to" in problem for problem in check.problems)
    assert any("the greedy text of prompt" in problem for problem in check.problems)
    card = (part_of(tmp_path / "out") / "README.md").read_text()
    assert "from a `TopK` support, which `lightning_mpo.json` cannot say" in card


def test_each_token_is_compared_once_in_a_copy_that_hides_it():
    rollout = masked_rollout()
    noised = samples.with_copies(rollout)
    hidden_BCT = noised.hidden_BCL[:, :, rollout.prompt_length :]
    assert noised.response_mask_BT.all()
    assert torch.equal(hidden_BCT.sum(1), torch.ones_like(rollout.responses_BT))
    assert torch.equal(noised.copy_weights_BCT, hidden_BCT.float())
    assert not noised.hidden_BCL[:, :, : rollout.prompt_length].any()
    assert torch.equal(samples.with_copies(rollout).hidden_BCL, noised.hidden_BCL)


def test_candidates_are_those_of_the_step_that_revealed_a_token():
    policy = make_masked()
    sampled, greedy = samples.draw(policy, PROMPTS, 0.7, 8, SAMPLER)
    assert sampled.responses_BT.shape == greedy.responses_BT.shape == (3, 8)
    assert (greedy.reveal_BT[:, :4] < 2).all(), "a block of 4 in steps of 2"
    mask_BT = greedy.response_mask_BT
    assert torch.equal(greedy.candidates_BTK[..., 0][mask_BT], greedy.responses_BT[mask_BT])
    assert (greedy.candidate_logprobs_BTK.diff(dim=2) <= 0).all()
    unknown, _ = samples.draw(policy, PROMPTS, 0.7, 6, None)
    assert unknown.responses_BT.shape == (3, 6), "one block without a sampler of the run"
    assert MASK not in sampled.responses_BT


@pytest.mark.parametrize(
    ("masked", "said"),
    [
        ({"block": 0}, "masked.block must be a whole number of at least 1, got 0"),
        ({"remasking": "os"}, "masked.remasking must be one of low_confidence, random, entropy"),
        ({"mask_token": ""}, "masked.mask_token must be text or null"),
        ({"shift": None}, "masked.shift must be true or false"),
        ({"remote_code": True}, "masked.remote_code is not known"),
        ({"shift": True}, "`masked.mask_token` is missing"),
    ],
)
def test_each_value_of_a_masked_folder_is_checked(tmp_path, masked, said):
    content = {"version": 1, "form": "full", "masked": masked}
    (tmp_path / "lightning_mpo.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as error:
        Usage.read(tmp_path)
    assert said in str(error.value)


def test_code_of_a_repository_is_not_exported(tmp_path, monkeypatch):
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    write_foreign("keys", tmp_path / "model")
    policy = MaskedPolicy(str(tmp_path / "model"), remote_code=True)
    with pytest.raises(UserError, match="is code of its repository, which an exported folder"):
        check_form(policy, "full")
