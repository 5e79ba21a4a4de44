"""Models and requests that a masked policy refuses, each in one line before weights load."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.modules.head_warmup import HeadWarmup
from lightning_mpo.modules.rollout_setup import check_likelihood
from lightning_mpo.objective.action_spaces import SequenceActions
from lightning_mpo.objective.likelihoods import CoupledElbo
from lightning_mpo.policies import MaskedPolicy, TinyMaskedPolicy, TinyPolicy
from lightning_mpo.policies.tiny import character_tokenizer
from lightning_mpo.scores import ScoreRequest
from tests.support.builders import CHARACTERS
from tests.support.runs import make_objective


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ScoreRequest(future=2), "a masked policy has no next token"),
        (ScoreRequest(values=True), "`ValueLoss` fits a critic"),
        (ScoreRequest(candidates=True), "scores the tokens of a response alone"),
        (ScoreRequest(support_logits=True), "scores the tokens of a response alone"),
    ],
)
def test_scores_of_causal_models_are_refused(request_, message):
    with pytest.raises(UserError, match=message):
        TinyMaskedPolicy().check(request_)


@pytest.fixture
def changed(masked_folder, tmp_path):
    """Return a copy of a folder with options of its configuration changed."""

    def copy(family: str, **options) -> str:
        folder = tmp_path / "changed"
        shutil.copytree(masked_folder(family), folder)
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | options))
        return str(folder)

    return copy


def refused(policy: MaskedPolicy, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        policy.check()
    assert "\n" not in str(caught.value)
    assert policy.network is None


def test_a_model_without_mask_token_is_refused(changed):
    folder = changed("bert")
    character_tokenizer(CHARACTERS).save_pretrained(folder)
    refused(MaskedPolicy(folder), "names no mask token, .* give `policy.mask_token`")
    policy = MaskedPolicy(folder, mask_token="7")
    assert policy.mask_id == CHARACTERS.index("7") + 2
    with pytest.warns(UserWarning, match="`policy.mask_token` '7' is an ordinary token"):
        policy.check()
    refused(MaskedPolicy(folder, mask_token="<none>"), "`policy.mask_token` '<none>' is no token")
    refused(MaskedPolicy(folder, mask_token="<end>"), "ends responses as well")


def test_a_mask_token_that_the_configuration_names_is_taken(changed):
    folder = changed("bert", mask_token_id=7)
    character_tokenizer(CHARACTERS).save_pretrained(folder)
    assert MaskedPolicy(folder).mask_id == 7
    refused(
        MaskedPolicy(folder),
        r"mask token '\S' \(7\) .*, which its configuration names, is an ordin",
    )


@pytest.mark.parametrize(
    ("role", "message"),
    [("bos_token", "begins prompts"), ("cls_token", "begins prompts"), ("unk_token", "unknown")],
)
def test_a_mask_with_another_role_is_refused(changed, role, message):
    folder = Path(changed("bert"))
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {role: "<mask>"}))
    refused(MaskedPolicy(str(folder)), f"{message} .*as well; give `policy.mask_token`")


def test_the_separator_ends_responses_where_no_token_is_named_an_end(changed):
    folder = changed("bert", eos_token_id=None)
    path = Path(folder) / "tokenizer_config.json"
    content = json.loads(path.read_text()) | {"eos_token": None, "sep_token": "<end>"}
    path.write_text(json.dumps(content))
    policy = MaskedPolicy(folder)
    assert policy.end_tokens == [1]
    policy.check()


def test_models_that_do_not_see_the_whole_row_are_refused(changed, masked_folder):
    refused(MaskedPolicy(changed("bert", is_decoder=True)), "does not attend to all tokens")


def test_windows_of_causal_models_are_refused(changed):
    layers = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4}
    refused(MaskedPolicy(changed("llama", **layers)), "does not attend to all tokens")


def test_soft_caps_are_refused(changed):
    refused(MaskedPolicy(changed("llama", final_logit_softcapping=30.0)), "caps its logits")


def test_a_head_that_computes_something_else_is_refused(masked_folder):
    policy = MaskedPolicy(masked_folder("bert"))
    load = policy.load_network

    def doubled():
        network = load()
        network.cls.register_forward_hook(lambda module, args, out: 2 * out)
        return network

    policy.load_network = doubled
    with pytest.raises(UserError, match="the logits of `BertForMaskedLM` are not"):
        policy.build(device=torch.device("cpu"), reference=False)


def test_policy_and_objective_are_of_one_kind():
    chain = make_objective()
    noise = make_objective(actions=SequenceActions(), likelihood=CoupledElbo())
    check_likelihood(TinyPolicy(), chain)
    check_likelihood(TinyMaskedPolicy(), noise)
    with pytest.raises(UserError, match="`objective.likelihood` is not set"):
        check_likelihood(TinyMaskedPolicy(), chain)
    with pytest.raises(UserError, match="`objective.likelihood: CoupledElbo` hides tokens"):
        check_likelihood(TinyPolicy(), noise)


def test_heads_are_not_warmed_up():
    with pytest.raises(UserError, match="`HeadWarmup` trains multi-token heads of a causal model"):
        HeadWarmup(TinyMaskedPolicy())
