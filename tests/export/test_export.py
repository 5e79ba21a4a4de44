"""What is written is the policy: each form is loaded again here too, and damage that a check should see is done on purpose."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
import yaml

from lightning_mpo.errors import UserError
from lightning_mpo.export import (
    Origin,
    Sampling,
    check_form,
    check_target,
    export,
    forms,
    part_of,
    verify,
)
from lightning_mpo.export.folder import begin, finish
from lightning_mpo.export.usage import Usage
from lightning_mpo.objective.supports import FullVocabulary, MinP, TopK
from lightning_mpo.policies import CausalPolicy, Lora, MedusaHeads, ParallelHeads
from lightning_mpo.policies.checkpoints import HEADS, read_safetensors
from lightning_mpo.scores import ScoreRequest
from lightning_mpo.storage import PART, Disk
from tests.support.builders import make_prompts, make_rollout

PROMPTS = make_prompts([5, 3, 4])
TEMPERATURE = 0.7
SAMPLING = Sampling(TEMPERATURE, 30, FullVocabulary())


LORA = Lora(rank=4, alpha=8)


def adapted(folder: str, *, scale: float = 0.1, lora: Lora = LORA, **options) -> CausalPolicy:
    """Return a policy whose adapters moved it away from its base."""
    policy = CausalPolicy(folder, lora=lora, **options)
    policy.build(device=torch.device("cpu"), reference=False)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in policy.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=scale)
    return policy


def state_of(policy: CausalPolicy) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in policy.state_dict().items()}


def logits_of(network: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return network(input_ids=torch.tensor([[3, 7, 5, 2, 9]])).logits.float()


def test_adapters_are_loaded_by_peft_and_the_policy_comes_back_as_it_was(tiny_folder, tmp_path):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    policy = adapted(tiny_folder, dtype="bfloat16")
    before, mode = state_of(policy), policy.network.training
    check, notes = export(policy, tmp_path, "adapter", PROMPTS, sampling=SAMPLING)
    assert not check.problems
    assert not notes
    assert check.largest < 1e-4
    assert (check.same_texts, check.texts) == (3, 3)
    assert check.moved > 0.05
    assert abs(check.kept - 1) < 1e-3
    after = state_of(policy)
    assert {name: value.dtype for name, value in after.items()} == {
        name: value.dtype for name, value in before.items()
    }
    assert all(torch.equal(value, before[name]) for name, value in after.items())
    assert policy.network.training is mode
    network = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(tiny_folder, dtype="bfloat16"), tmp_path
    )
    assert (
        f'from_pretrained("{Path(tiny_folder).name}", dtype="bfloat16")'
        in (tmp_path / "README.md").read_text()
    )
    with verify.in_float32(policy.network), verify.in_float32(network):
        torch.testing.assert_close(
            logits_of(network), logits_of(policy.network), rtol=1e-4, atol=1e-4
        )
    assert (
        json.loads((tmp_path / "adapter_config.json").read_text())["base_model_name_or_path"]
        == tiny_folder
    )
    assert not list(tmp_path.glob("*.bin"))


@pytest.mark.parametrize("base", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_base_plus_adapters_rounded_once(tiny_folder, tmp_path, base, dtype):
    from transformers import AutoModelForCausalLM

    policy = adapted(tiny_folder, dtype=base)
    check, (note,) = export(policy, tmp_path, "merged", PROMPTS, sampling=SAMPLING, dtype=dtype)
    assert not check.problems
    assert "the unquantised base plus the adapters" in note
    assert ("rounded to bfloat16" in note) == (dtype == "bfloat16")
    network = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert network.dtype == getattr(torch, dtype)
    own = policy.network.model.layers[1].mlp.up_proj
    delta = own.lora_B["default"].weight @ own.lora_A["default"].weight * 2
    expected = (own.base_layer.weight.float() + delta).to(getattr(torch, dtype))
    found = network.model.layers[1].mlp.up_proj.weight
    assert (found != expected).float().mean() < 1e-2, (
        "a sum at the edge of two roundings may fall otherwise"
    )
    torch.testing.assert_close(
        found, expected, rtol=1e-2 if dtype == "bfloat16" else 1e-6, atol=1e-6
    )
    assert check.largest < (1e-3 if dtype == "float32" else 0.5)


def test_an_adapted_head_is_untied_from_the_embedding(tiny_folder, tmp_path):
    from transformers import AutoModelForCausalLM

    policy = adapted(tiny_folder, lora=Lora(rank=4, alpha=8, targets=["lm_head", "q_proj"]))
    assert policy.config.get_text_config().tie_word_embeddings
    check, _ = export(policy, tmp_path, "merged", PROMPTS, sampling=SAMPLING, dtype="float32")
    assert not check.problems
    network = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert not torch.equal(network.lm_head.weight, network.model.embed_tokens.weight)
    assert torch.equal(network.model.embed_tokens.weight, policy.network.model.embed_tokens.weight)


def test_all_weights_of_a_small_model(tiny_policy, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    policy = tiny_policy()
    check, notes = export(policy, tmp_path, "full", PROMPTS, sampling=SAMPLING)
    assert not check.problems
    assert not notes
    assert check.moved is check.kept is None
    assert check.largest < 1e-4
    torch.testing.assert_close(
        logits_of(AutoModelForCausalLM.from_pretrained(tmp_path)), logits_of(policy.network)
    )
    assert (
        AutoTokenizer.from_pretrained(tmp_path)("12+3")["input_ids"]
        == policy.tokenizer("12+3")["input_ids"]
    )


# --- what a check must see ----------------------------------------------------------------------------------------------


def test_a_merge_that_lost_the_adapters_is_seen_though_log_probs_are_near(
    tiny_folder, tmp_path, monkeypatch
):
    """The known failure of exports: what is written is the base."""

    def forget(policy, folder, dtype):
        policy._adapters.unload().to(dtype).save_pretrained(folder)

    monkeypatch.setattr(forms, "write_merged", forget)
    check, (note,) = export(
        adapted(tiny_folder, scale=0.005), tmp_path, "merged", PROMPTS, sampling=SAMPLING
    )
    assert check.mean < verify.MEAN, "within what rounding may do"
    assert 0.001 < check.moved < 0.06
    assert check.kept < 0.2
    assert any("of what training changed is there" in problem for problem in check.problems)
    assert "lost" in note


def test_bfloat16_loses_small_updates_and_says_so(tiny_folder, tmp_path):
    policy = adapted(tiny_folder, scale=3e-4, dtype="bfloat16")
    kept = {}
    for dtype in ("bfloat16", "float32"):
        check, _ = export(
            policy, tmp_path / dtype, "merged", PROMPTS, sampling=Sampling(0.1, 30), dtype=dtype
        )
        kept[dtype] = check.kept
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


# --- beside the weights -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("support", "top_k", "whole"),
    [
        (FullVocabulary(), 0, True),
        (TopK(8), 8, True),
        (TopK(8, from_reference=True), 0, False),
        (MinP(), 0, False),
    ],
)
def test_generation_is_that_of_training(tiny_policy, tmp_path, support, top_k, whole):
    from transformers import GenerationConfig

    from lightning_mpo.export.folder import generation_config

    sampling = Sampling(0.7, 30, support)
    generation_config(tiny_policy(), sampling).save_pretrained(tmp_path)
    found = GenerationConfig.from_pretrained(tmp_path)
    assert (found.temperature, found.max_new_tokens, found.do_sample) == (0.7, 30, True)
    assert (found.top_k, found.top_p, found.eos_token_id, found.pad_token_id) == (
        top_k,
        1.0,
        [1],
        0,
    )
    assert sampling.is_whole is whole


@pytest.mark.parametrize("lora", [None, Lora(rank=4, alpha=8)])
def test_heads_are_loaded_again(tiny_folder, tmp_path, lora):
    def heads(**options) -> ParallelHeads:
        return ParallelHeads(offsets=2, **options)

    policy = (
        adapted(tiny_folder, lora=lora, mtp=heads())
        if lora
        else CausalPolicy(tiny_folder, mtp=heads())
    )
    policy.build(device=torch.device("cpu"), reference=False)
    with torch.no_grad():
        for weight in policy.mtp.parameters():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    check, _ = export(policy, tmp_path, "adapter" if lora else "full", PROMPTS, sampling=SAMPLING)
    assert not check.problems
    described = json.loads((tmp_path / "mtp_heads.json").read_text())
    assert described["class_path"] == "lightning_mpo.policies.ParallelHeads"
    assert described["heads"] == policy.describe_heads()
    assert read_safetensors(tmp_path / HEADS, "it").keys() == policy.mtp.state_dict().keys()
    again = (
        CausalPolicy(tiny_folder, lora=lora, mtp=heads(), checkpoint=str(tmp_path))
        if lora
        else CausalPolicy(str(tmp_path), mtp=heads(weights_file=str(tmp_path / HEADS)))
    )
    again.check()
    again.build(device=torch.device("cpu"), reference=False)
    assert "mtp" not in again.cold_parts
    rollout = make_rollout([4, 3], [5, 4, 3, 5])
    said = [
        p.score(rollout, rollout.response_mask_BT, temperature=1.0, request=ScoreRequest(future=2))
        for p in (policy, again)
    ]
    torch.testing.assert_close(said[0].future_BTM, said[1].future_BTM, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(said[0].logprobs_BT, said[1].logprobs_BT, rtol=1e-5, atol=1e-5)


CONFIGURED = {
    "seed_everything": 3,
    "model": {
        "class_path": "lightning_mpo.modules.PolicyOptimization",
        "init_args": {
            "policy": {
                "class_path": "CausalPolicy",
                "init_args": {"source": "x", "critic": {"class_path": "ValueHead"}},
            },
            "objective": {
                "support": {
                    "class_path": "lightning_mpo.objective.supports.TopK",
                    "init_args": {"k": 8},
                },
                "actions": {"class_path": "lightning_mpo.objective.action_spaces.TokenActions"},
                "advantage": {"class_path": "GroupRelative", "init_args": {"scale": "std"}},
                "surrogate": {
                    "class_path": "ClippedRatio",
                    "init_args": {"low": 0.2, "high": 0.2, "dual": None},
                },
                "selection": {"class_path": "AllTokens"},
                "reduction": {"class_path": "SequenceMean"},
            },
            "temperature": 0.7,
        },
    },
    "data": {"class_path": "Svamp", "init_args": {"path": "/home/me/secret/SVAMP.json"}},
    "rollout": {
        "rewards": [{"class_path": "MathAnswer"}],
        "prompts": 8,
        "completions": 4,
        "max_new_tokens": 30,
    },
}
SUMMARY = {
    "initial": {"pass_at_1": 0.25, "pass_at_1_interval": [0.2, 0.3], "kl": 0.0},
    "final": {"pass_at_1": 0.5, "pass_at_1_interval": [0.45, 0.55], "kl": 0.02},
    "problems": 200,
}


def test_the_card_says_what_is_known_and_what_is_not(tiny_folder, tmp_path):
    origin = Origin(CONFIGURED, updates=40, rollouts=20, summary=SUMMARY)
    export(
        adapted(tiny_folder),
        tmp_path,
        "merged",
        PROMPTS,
        sampling=Sampling(0.7, 30, TopK(8)),
        origin=origin,
    )
    _, front, body = (tmp_path / "README.md").read_text().split("---\n", 2)
    front = yaml.safe_load(front)
    assert front["base_model"] == Path(tiny_folder).name
    assert front["base_model_relation"] == "merge"
    assert front["library_name"] == "transformers"
    assert "rlpt" in front["tags"]
    for said in (
        "closest method file: rlpt",
        "paper: arXiv:2602.03195",
        "support.k = 8 (file: 16)",
        "rank 4, alpha 8, on all-linear",
        "temperature 0.7, at most 30 tokens",
        "rewards: `MathAnswer`",
        "20 of 8 prompts x 4 completions; 40 updates",
        "Svamp(path SVAMP.json)",
        "| pass@1 | 0.25 [0.200, 0.300] | 0.5 [0.450, 0.550] |",
        "On 200 held-out problems",
        "greedy texts are equal",
        "rounded to bfloat16",
        "## Not known",
    ):
        assert said in body, said
    assert "/home/me" not in body


def test_a_card_without_a_run_claims_nothing(tiny_policy, tmp_path):
    export(tiny_policy(), tmp_path, "full", PROMPTS, sampling=Sampling(support=MinP()))
    text = (tmp_path / "README.md").read_text()
    assert "method" not in text
    assert "the configuration of the run" in text
    assert "no evaluation was kept" in text
    assert "`MinP` support, which `generation_config.json` cannot say" in text
    assert "base_model" not in text
    assert not list(tmp_path.glob("*.yaml"))


@pytest.mark.parametrize("form", ["adapter", "merged", "full"])
def test_how_a_folder_is_used_stands_beside_the_weights_as_data(tiny_folder, tmp_path, form):
    lora = {} if form == "full" else {"lora": Lora(rank=4, alpha=8, targets=["q_proj"])}
    policy = CausalPolicy(tiny_folder, **lora)
    policy.build(device=torch.device("cpu"), reference=False)
    data = Mock(
        control_tokens=None,
        instruction="Add: ",
        chat_template=False,
        max_prompt_tokens=99,
        system=None,
        suffix="",
        template_arguments=None,
    )
    export(
        policy,
        tmp_path,
        form,
        PROMPTS,
        sampling=SAMPLING,
        data=data,
        origin=Origin({"seed_everything": 5}),
    )
    assert not list(tmp_path.glob("*.yaml"))
    usage = Usage.read(tmp_path)
    assert (usage.form, usage.temperature, usage.max_new_tokens, usage.seed) == (
        form,
        TEMPERATURE,
        30,
        5,
    )
    assert usage.dtype == ("bfloat16" if form == "merged" else "float32")
    assert usage.prompt["instruction"] == "Add: "
    assert usage.prompt["chat_template"] is False
    again = usage.policy(str(tmp_path))
    if form == "adapter":
        assert (again.source, again.checkpoint, again.lora) == (
            tiny_folder,
            str(tmp_path),
            policy.lora,
        )
        assert usage.policy(str(tmp_path), "other").source == "other"
    else:
        assert (again.source, again.checkpoint, again.lora) == (str(tmp_path), None, None)


# --- a quantised base ---------------------------------------------------------------------------------------------------


def test_a_merge_for_a_quantised_base_is_checked_against_the_unquantised_one_and_warned_of(
    tiny_folder, tmp_path
):
    policy = adapted(tiny_folder)
    policy.quantization = "4-bit"
    with torch.no_grad():  # as quantisation would
        for name, weight in policy.named_parameters():
            if "base_layer" in name:
                weight.add_(torch.randn_like(weight), alpha=0.05)
    check, (note,) = export(policy, tmp_path, "merged", PROMPTS, sampling=SAMPLING, dtype="float32")
    assert not check.problems
    assert check.largest < 1e-3
    assert "the policy was trained on a 4-bit base, from which they differ by" in note
    assert float(note.split("differ by ")[1].split()[0]) > 0.01


def test_a_base_that_is_only_there_quantised_is_refused(tiny_folder):
    policy = CausalPolicy(tiny_folder, lora=Lora())
    policy.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(
        UserError,
        match=r"is stored quantised, and adapters are only merged into unquantised weights: give",
    ):
        check_form(policy, "merged")
    check_form(policy, "adapter")


# --- forms and folders --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lora", "form", "said"),
    [
        (
            None,
            "adapter",
            "the form 'adapter' needs adapters and the policy has no `policy.lora`: take the form 'full'",
        ),
        (None, "merged", "the form 'merged' needs adapters"),
        (
            Lora(),
            "full",
            "the form 'full' is for policies without `policy.lora`: take 'adapter', or 'merged'",
        ),
        (Lora(), "gguf", "the form must be one of adapter, merged, full, got 'gguf'"),
    ],
)
def test_forms_that_a_policy_does_not_have(tiny_folder, lora, form, said):
    with pytest.raises(UserError, match=said):
        check_form(CausalPolicy(tiny_folder, lora=lora), form)


def test_a_folder_that_is_in_use(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"is not empty \(it holds 'adapter_config.json'\); name another, or pray"
    ):
        check_target(tmp_path, False, "pray")
    check_target(tmp_path, True, "pray")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter_config.json", "thesis.txt"]


@pytest.fixture
def earlier(tmp_path) -> Path:
    """A folder with an earlier export and other files."""
    (tmp_path / "out" / "mine" / "deep").mkdir(parents=True)
    (tmp_path / "out" / "mine" / "deep" / "thesis.txt").write_text("mine")
    (tmp_path / "out" / "notes.txt").write_text("mine too")
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    return tmp_path / "out"


def write(folder: Path) -> None:
    (begin(folder) / "config.json").write_text("new")
    finish(folder)


def files(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


KEPT = {"mine/deep/thesis.txt": "mine", "notes.txt": "mine too"}


@pytest.mark.parametrize("links", [True, False])
def test_what_exports_wrote_is_replaced_and_nothing_else(earlier, monkeypatch, links):
    if not links:
        monkeypatch.setattr(
            "os.link", Mock(side_effect=PermissionError(1, "Operation not permitted"))
        )
    write(earlier)
    assert files(earlier) == KEPT | {"config.json": "new"}, (
        "an adapter must not stay beside a whole model"
    )
    assert [path.name for path in earlier.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("renamed", [0, 1, 2])
def test_a_kill_at_any_renaming_loses_nothing(earlier, monkeypatch, renamed):
    class Killed(BaseException):
        pass

    rename, left = Disk.rename, [renamed]

    def dying(self, source, target):
        if left[0] == 0:
            raise Killed
        left[0] -= 1
        rename(self, source, target)
        if left[0] == 0 and source.name.endswith(PART):
            raise Killed

    before = files(earlier)
    with monkeypatch.context() as patch:
        patch.setattr(Disk, "rename", dying)
        with pytest.raises(Killed):
            write(earlier)
    check_target(earlier, True, "")
    assert files(earlier) == (before if renamed < 2 else KEPT | {"config.json": "new"})
    write(earlier)
    assert files(earlier) == KEPT | {"config.json": "new"}
    assert [path.name for path in earlier.parent.iterdir()] == ["out"]


def test_a_link_to_a_folder_stays_one(earlier):
    link = earlier.with_name("link")
    link.symlink_to(earlier)
    write(link)
    assert link.is_symlink()
    assert files(earlier) == KEPT | {"config.json": "new"}


def test_folders_that_cannot_be_replaced(tmp_path, monkeypatch):
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for folder in (Path(), tmp_path):
        with pytest.raises(
            UserError,
            match=rf"'{folder}' is the working folder and cannot be replaced; name one inside",
        ):
            check_target(folder, True, "")
    with pytest.raises(UserError, match="'/' is mounted and cannot be replaced"):
        check_target(Path("/"), True, "")
    begin(tmp_path / "out")
    monkeypatch.setattr("os.replace", Mock(side_effect=OSError(16, "Device or resource busy")))
    with pytest.raises(
        UserError,
        match=r"the export in .*/\.out\.part could not take the place of .*/out: Device or",
    ):
        finish(tmp_path / "out")


def test_folders_that_cannot_be_written_to(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "inside", Path("/proc/nowhere")):
        with pytest.raises(
            UserError, match=rf"the target folder '{folder}' cannot be written to: \w+"
        ):
            check_target(folder, False, "")
    (tmp_path / "closed").mkdir()

    def refuse(**options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("lightning_mpo.export.folder.tempfile.TemporaryFile", refuse)
    with pytest.raises(UserError, match="cannot be written to: Permission denied"):
        check_target(tmp_path / "closed", False, "")
