"""Options on the pages exist here and in TRL, and their examples run."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import json
import re
import string
from contextlib import nullcontext
from dataclasses import fields
from functools import cache
from pathlib import Path

import lightning as L
import pytest
import torch
import yaml
from lightning.pytorch.callbacks import ModelCheckpoint

import lightning_mpo
from lightning_mpo import cli
from lightning_mpo.callbacks import RolloutLoop
from lightning_mpo.cli.other_libraries import OPTIONS
from lightning_mpo.data import JsonLines, PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.functional.advantages import at_last_token
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.objective.kl import AdaptiveCoefficient, ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.rollout.admission import check_rollout
from lightning_mpo.rollout.parity import ParityError, check_parity
from lightning_mpo.sampling import LocalSampler, SamplingRequest
from lightning_mpo.scores import ScoreRequest, TokenScores
from lightning_mpo.types import Finish, PromptBatch, Rollout
from tests.support.builders import make_prompts, seeded
from tests.support.pages import ROOT, rows

TOP = ("seed_everything", "ckpt_path")
"""Options beside the sections, of LightningCLI."""
FROM_TRL = ROOT / "docs" / "from_trl.md"


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


# --- options --------------------------------------------------------------------------------------------------------


@cache
def arguments(owner: type) -> set[str]:
    return set(inspect.signature(owner.__init__).parameters) - {"self"}


def is_option(path: str) -> bool:
    """Whether a short path of the table is an option: of a section, or of a class that it names."""
    section, _, name = path.partition(".")
    owners = {
        "rollout": arguments(RolloutLoop),
        "trainer": arguments(L.Trainer),
        "model": arguments(PolicyOptimization),
        "data": arguments(JsonLines) | arguments(PromptDataModule),
        "policy": arguments(CausalPolicy),
        "objective": {item.name for item in fields(Objective)},
    }
    if not name:
        return section in TOP or hasattr(lightning_mpo, section)
    if section in owners:
        return name in owners[section]
    owner = (
        ModelCheckpoint if section == "ModelCheckpoint" else getattr(lightning_mpo, section, None)
    )
    return owner is not None and name in arguments(owner)


def test_a_wrong_option_is_seen():
    assert not any(
        map(is_option, ["rollout.temperature", "ClippedRatio.epsilon", "NoClass.low", "seed"])
    )


def test_options_of_the_table_exist_here():
    table = rows(FROM_TRL, "Option names")
    assert len(table) > 50
    assert [ours for _, ours, _ in table if not is_option(ours.strip("`"))] == []
    spans = {span for _, _, note in table for span in re.findall(r"`(\w+\.\w+)`", note)}
    assert [span for span in spans if not is_option(span) and not span.startswith("torch.")] == []


def test_options_of_trl_point_to_the_same_place_on_the_command_line():
    """A wrong option prints `OPTIONS`: what that names last must be what the table names last."""
    for theirs, ours, _ in rows(FROM_TRL, "Option names"):
        name, last = theirs.strip("`"), ours.strip("`").rpartition(".")[2]
        same = {"temperature", "max_steps"}  # the table has them, a wrong place has another message
        assert name in OPTIONS or name in same, name
        assert name in same or last in OPTIONS[name], f"{name}: {OPTIONS[name]}"


def test_options_of_trl_exist_there():
    trl, transformers = importlib.util.find_spec("trl"), importlib.util.find_spec("transformers")
    if trl is None:
        pytest.skip("TRL is not installed")
    known: set[str] = {
        "max_prompt_length",
        "model_name_or_path",
    }  # of its command line, and of earlier releases
    for spec, file in (
        (trl, "trainer/grpo_config.py"),
        (trl, "trainer/grpo_trainer.py"),
        (trl, "trainer/base_config.py"),
        (transformers, "training_args.py"),
    ):
        for node in ast.walk(ast.parse((Path(spec.origin).parent / file).read_text())):
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                known.add(node.target.id)
            elif isinstance(node, ast.FunctionDef) and node.name == "__init__":
                known |= {argument.arg for argument in node.args.args}
    names = {theirs.strip("`") for theirs, _, _ in rows(FROM_TRL, "Option names")}
    assert names - known == set()


# --- examples -------------------------------------------------------------------------------------------------------


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
    estimate = examples["MedianRelative"](2.0).estimate(Outcome(rewards_BT, mask_BT, 4, valid_B))
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


def test_the_configuration_of_a_run_is_parsed(tmp_path, monkeypatch, capsys):
    """With what the page says of merging: a list is replaced, another class keeps arguments of the same name."""
    monkeypatch.chdir(tmp_path)
    for name, block in zip(("mine", "own", "heads"), blocks(FROM_TRL, "yaml"), strict=True):
        Path(f"{name}.yaml").write_text(block)
    Path("my_rewards.py").write_text(blocks(FROM_TRL, "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    made = {}
    for names in (
        ("mine.yaml",),
        ("own.yaml",),
        ("heads.yaml",),
        ("smollm2_svamp", "chat"),
    ):
        arguments = [part for name in names for part in ("-c", name)]
        with pytest.raises(SystemExit) as ended:
            cli.run(["fit", *arguments, "--print_config"])
        assert not ended.value.code
        made[names] = yaml.safe_load(capsys.readouterr().out)
    whole = made[("mine.yaml",)]
    policy = whole["model"]["init_args"]["policy"]["init_args"]
    assert (policy["source"], policy["lora"]["rank"], policy["dtype"]) == (
        "Qwen/Qwen2.5-0.5B-Instruct",
        32,
        "bfloat16",
    )
    assert whole["rollout"]["rewards"] == ["my_rewards.py:right_and_short"]
    assert [part["class_path"].rsplit(".", 1)[-1] for part in whole["trainer"]["callbacks"]][
        -1
    ] == "ModelCheckpoint"
    assert whole["data"]["init_args"]["instruction"] == ""
    heads = made[("heads.yaml",)]["model"]["init_args"]["policy"]["init_args"]
    assert (heads["source"], heads["lora"], heads["dtype"]) == (
        policy["source"],
        policy["lora"],
        policy["dtype"],
    )
    prompts = ("train", "validation", "instruction", "suffix", "system", "template_arguments")
    theirs, ours = (made[(name,)]["data"]["init_args"] for name in ("heads.yaml", "mine.yaml"))
    assert [theirs[name] for name in prompts] == [ours[name] for name in prompts]
    assert len(made[("own.yaml",)]["rollout"]["rewards"]) == 2
    assert "few short steps" in made[("smollm2_svamp", "chat")]["data"]["init_args"]["instruction"]


@pytest.mark.parametrize(
    ("page", "first"),
    [("configuration", ()), ("rewards", ("quickstart",)), ("training", ("quickstart", "critic"))],
)
def test_the_configurations_of_another_page_are_parsed(page, first, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "docs" / f"{page}.md").read_text()
    given = re.findall(r"^```yaml\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    for number, block in enumerate(given):
        Path(f"{number}.yaml").write_text(
            block.replace("WandbLogger", "CSVLogger").replace("project", "save_dir")
        )
    Path("rewards.py").write_text("\n".join(blocks(ROOT / "docs" / f"{page}.md", "python")))
    names = [*first, *(f"{number}.yaml" for number in range(len(given)))]
    with pytest.raises(SystemExit) as ended:
        cli.run(["fit", *(part for name in names for part in ("-c", name)), "--print_config"])
    assert not ended.value.code
    made = flat(yaml.safe_load(capsys.readouterr().out))
    written = {key: value for block in given for key, value in flat(yaml.safe_load(block)).items()}
    skipped = ("include", "callbacks+", "logger", "rewards", "class_path", "terms")
    for key, value in written.items():
        if not any(part in key for part in skipped):
            assert made[key] == value, key


def test_the_kl_penalties_of_the_training_page(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    page = ROOT / "docs" / "training.md"
    given = [block for block in blocks(page, "yaml") if "KLPenalty" in block]
    penalties = [Objective.from_file("grpo", written(block)).term(KLPenalty) for block in given]
    assert [(kl.place, kl.estimator) for kl in penalties] == [("loss", "k3"), ("reward", "k1")]
    assert penalties[0].controller == ConstantCoefficient(0.04)
    assert vars(penalties[1].controller) == vars(AdaptiveCoefficient(0.05, 0.1, 10_000))
    # none by default, and the table of estimators
    assert Objective.from_file("grpo").terms == ()
    for estimator, places, _ in rows(page, "Reference and KL penalty"):
        for name in re.findall(r"`(\w+)`", estimator):
            for place in ("loss", "reward"):
                allowed = f"`{place}`" in places
                with nullcontext() if allowed else pytest.raises(UserError):
                    KLPenalty(ConstantCoefficient(), name, place)


def test_the_complete_files_train(tmp_path, monkeypatch):
    """With a tiny model and one rollout: rows, reward and validation are those of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    first, second = blocks(FROM_TRL, "json")[0].splitlines()
    Path("train.jsonl").write_text(first + "\n")
    Path("held_out.jsonl").write_text(second + "\n")
    Path("my_rewards.py").write_text(blocks(FROM_TRL, "python")[0])
    Path("own.yaml").write_text(next(b for b in blocks(FROM_TRL, "yaml") if "runs/own" in b))
    Path("small.yaml").write_text(
        "model: {init_args: {policy: {class_path: TinyPolicy, init_args: {hidden_size: 32, layers: 1, heads: 2,\n"
        f"  characters: {json.dumps(string.printable[:95])}}}}}}}}}\n"
        "data: {init_args: {chat_template: false}}\n"
        "rollout: {prompts: 1, max_new_tokens: 4, minibatches: 1}\n"
        "trainer: {max_steps: 1, accumulate_grad_batches: 1, val_check_interval: 1}\n"
    )
    assert not cli.run(["fit", "-c", "own.yaml", "-c", "small.yaml"])
    metrics = Path("runs/own/metrics.csv").read_text()
    assert {"reward/right_and_short", "val/pass_at_1"} <= set(metrics.splitlines()[0].split(","))
    assert Path("runs/own/checkpoints/last.ckpt").is_file()


def written(block: str) -> Path:
    """Write a configuration into the working folder."""
    path = Path("written.yaml")
    path.write_text(block)
    return path


def flat(tree: dict, *above: str) -> dict[str, object]:
    """Return the leaves of a configuration by their path."""
    leaves: dict[str, object] = {}
    for key, value in tree.items():
        inner = (
            flat(value, *above, key)
            if isinstance(value, dict)
            else {".".join((*above, key)): value}
        )
        leaves |= inner
    return leaves
