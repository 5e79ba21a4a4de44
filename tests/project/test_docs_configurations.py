"""The example configurations of the pages are parsed, and the complete one trains."""

from __future__ import annotations

import json
import re
import string
from contextlib import nullcontext
from pathlib import Path

import pytest
import yaml

from lightning_mpo import cli
from lightning_mpo.errors import UserError
from lightning_mpo.objective.kl import AdaptiveCoefficient, ConstantCoefficient, KLPenalty
from lightning_mpo.objective.objective import Objective
from tests.support.pages import FROM_TRL, ROOT, blocks, rows


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
    assert made[("smollm2_svamp", "chat")]["data"]["init_args"]["instruction"] == ""


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
