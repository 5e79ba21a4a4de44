"""Damage that is done on purpose to an export is seen by its check."""

from __future__ import annotations

import json

import pytest

from lightning_mpo.export import Sampling, export, forms, part_of, verify
from lightning_mpo.policies import MedusaHeads
from tests.support.exports import PROMPTS, SAMPLING, TEMPERATURE, adapted


def test_a_merge_that_lost_the_adapters_is_seen_though_log_probs_are_near(
    tiny_folder, tmp_path, monkeypatch
):
    """The known failure of exports: what is written is the base."""

    def forget(policy, folder, dtype):
        policy.adapters.unload().to(dtype).save_pretrained(folder)

    monkeypatch.setattr(forms, "write_merged", forget)
    check, (note,) = export(
        adapted(tiny_folder, scale=0.005), tmp_path, "merged", PROMPTS, sampling=SAMPLING
    )
    assert check.mean < verify.MEAN, "within what rounding may do"
    assert 0.001 < check.moved < 0.06
    assert check.recovered < 0.2
    assert any("of what training changed is there" in problem for problem in check.problems)
    assert "lost" in note


def test_bfloat16_loses_small_updates_and_says_so(tiny_folder, tmp_path):
    policy = adapted(tiny_folder, scale=3e-4, dtype="bfloat16")
    kept = {}
    for dtype in ("bfloat16", "float32"):
        check, _ = export(
            policy, tmp_path / dtype, "merged", PROMPTS, sampling=Sampling(0.1, 30), dtype=dtype
        )
        kept[dtype] = check.recovered
    assert kept["float32"] == pytest.approx(1, abs=0.05)
    assert kept["bfloat16"] < 0.8


def test_other_adapters_are_seen(tiny_folder, tmp_path, monkeypatch):
    write = forms.write_adapter

    def damage(policy, folder):
        write(policy, folder)
        path = folder / "adapter_config.json"
        path.write_text(path.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))

    monkeypatch.setattr(forms, "write_adapter", damage)
    check, _ = export(adapted(tiny_folder), tmp_path, "adapter", PROMPTS, sampling=SAMPLING)
    assert any("log-probs differ by up to" in problem for problem in check.problems)
    assert not list(tmp_path.iterdir())
    assert "This is not the policy" in (part_of(tmp_path) / "README.md").read_text()


def test_other_end_tokens_tokenizer_template_and_heads_are_seen(tiny_policy, tmp_path, monkeypatch):
    from lightning_mpo.export import folder as folder_module

    policy = tiny_policy(mtp=MedusaHeads(offsets=1))
    write = folder_module.write_extras

    def damage(policy, folder, sampling):
        write(policy, folder, sampling)
        path = folder / "generation_config.json"
        common = int(verify.observe(policy, PROMPTS, TEMPERATURE).greedy.responses_BT[0, 0])
        path.write_text(json.dumps(json.loads(path.read_text()) | {"eos_token_id": [common]}))
        policy.mtp.residual[0].weight.data.add_(1)
        policy.tokenizer.chat_template = "{{ messages }}"

    monkeypatch.setattr(folder_module, "write_extras", damage)
    check, _ = export(policy, tmp_path, "full", PROMPTS, sampling=SAMPLING)
    said = " | ".join(check.problems)
    assert "the greedy text of prompt 0 is" in said
    assert "the head's weight 'residual.0.weight' is not what was written" in said
    assert "the chat template is not the policy's" in said


def test_a_near_tie_may_fall_either_way(tiny_policy):
    policy = tiny_policy(sharp=1.0)
    greedy = verify.observe(policy, PROMPTS, 1.0, tokens=4).greedy
    tokens = greedy.responses_BT[0][greedy.response_mask_BT[0]].tolist()
    said = greedy.candidate_logprobs_BTK[0, 0].sort(descending=True).values
    assert verify._margin(greedy, 0, [99, *tokens[1:]], tokens) == pytest.approx(
        (said[0] - said[1]).item()
    )
    assert verify._margin(greedy, 0, tokens[:-1], tokens) == float("inf"), "one of them ends early"
