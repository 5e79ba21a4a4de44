"""Pages for newcomers: links open, options exist on both sides, files of a run exist in the code, examples run."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
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
from lightning_mpo.cli.other_names import OPTIONS
from lightning_mpo.data import JsonLines, PromptDataModule
from lightning_mpo.functional.advantages import at_last_token
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.objective.advantages import Outcome
from lightning_mpo.objective.objective import Objective
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.seeding import Stream

ROOT = Path(__file__).parents[2]
TOP = [ROOT / f"{name}.md" for name in ("README", "CONTRIBUTING", "RESULTS")]
PAGES = [*TOP, *sorted((ROOT / "docs").glob("*.md"))]
FROM_TRL = ROOT / "docs" / "from_trl.md"
RUN_FOLDER = ROOT / "docs" / "run_folder.md"
LIGHTNINGS = ("hparams.yaml", "events.out.tfevents", "last.ckpt")
"""Files that Lightning and TensorBoard name, not this package."""
TOP = ("seed_everything", "ckpt_path")
"""Options beside the sections, of LightningCLI."""


def without_code(text: str) -> str:
    return re.sub(r"`[^`]*`", "", re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL))


def anchors(page: Path) -> set[str]:
    """Return GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def rows(page: Path, heading: str) -> list[list[str]]:
    """Return the cells of the tables below a heading, without the first row of each."""
    section = page.read_text().split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [
        line.strip().strip("|").split(" | ")
        for line in section.splitlines()
        if line.startswith("|")
    ]
    return [[cell.strip() for cell in cells] for cells in lines if not cells[0].startswith("---")][
        1:
    ]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


# --- links ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_open(page):
    broken = []
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text())):
        if link.startswith(("http:", "https:")):
            continue
        name, _, place = link.partition("#")
        target = page.parent / name if name else page
        if not target.exists() or (
            place and target.suffix == ".md" and place not in anchors(target)
        ):
            broken.append(link)
    assert broken == []


def test_the_pages_are_linked_from_the_readme():
    readme = (ROOT / "README.md").read_text()
    for page in ("CONTRIBUTING.md", "docs/from_trl.md", "docs/run_folder.md", "docs/glossary.md"):
        assert f"]({page})" in readme, page


def test_every_page_is_two_clicks_from_the_readme():
    """The README links a page, or a page that it links does."""

    def linked(page: Path) -> set[Path]:
        links = re.findall(r"\]\(([^)#\s]+\.md)", without_code(page.read_text()))
        return {(page.parent / link).resolve() for link in links if not link.startswith("http")}

    first = linked(ROOT / "README.md")
    reached = first | {page for near in first for page in linked(near)}
    assert [page.name for page in PAGES[1:] if page.resolve() not in reached] == []


def test_the_glossary_is_in_alphabetical_order():
    text = (ROOT / "docs" / "glossary.md").read_text()
    words = [
        word.strip("`").lower() for word in re.findall(r"^\| ([^|]+) \|", text, re.MULTILINE)[2:]
    ]
    assert len(words) > 40
    assert words == sorted(set(words))


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


def test_the_random_streams_are_listed():
    table = rows(ROOT / "docs" / "architecture.md", "Random numbers")
    assert [row[0].strip("`") for row in table] == [stream.name for stream in Stream]
    for stream, row in zip(Stream, table, strict=True):
        assert [row[1], row[2]] == [*stream.value.split(": "), "none"][:2]


# --- files of a run -------------------------------------------------------------------------------------------------


@cache
def literals() -> str:
    """Return every string of the package, one a line."""
    paths = [
        path for folder in ("lightning_mpo", "callbacks") for path in (ROOT / folder).rglob("*.py")
    ]
    paths = [path for path in paths if "lightning_mpo/callbacks" not in path.as_posix()]
    nodes = [node for path in paths for node in ast.walk(ast.parse(path.read_text()))]
    docs = {id(node.value) for node in nodes if isinstance(node, ast.Expr)}
    return "\n".join(
        node.value
        for node in nodes
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs
    )


def test_files_of_the_run_folder_are_named_in_the_code():
    named = re.findall(r"`([^`]+)`", " ".join(row[0] for row in rows(RUN_FOLDER, "Files")))
    assert len(named) > 15
    for name in named:
        if name.startswith(LIGHTNINGS):
            continue
        # placeholders stand for what a run names: `metrics_validate.csv` is f"metrics_{verb}.csv"
        parts = [
            part for part in re.split(r"<\w+>|/|_(?:validate|test)(?=\.)", name) if part.strip(".")
        ]
        assert all(part in literals() for part in parts), name


def test_keys_of_the_run_folder_are_named_in_the_code():
    text = RUN_FOLDER.read_text()
    keys = {
        row[0] for heading in ("summary.json", "memory.json") for row in rows(RUN_FOLDER, heading)
    }
    names = {name for key in keys for name in re.findall(r"`([^`<]+?)_?(?=[`<])", key)}
    fragments = {"pass_at_1": "pass_at_", "greedy_accuracy": "greedy_"}
    assert {"peak_rss_mb", "baseline", "undecided"} <= names
    fields_of = {
        "weights",
        "support",
        "gradients",
        "optimiser",
    }  # put together from names of fields, or as a prefix
    assert [n for n in names - fields_of if fragments.get(n, n) not in literals()] == []
    for name in ("rollouts.jsonl", "predictions.jsonl", "manifest.json", "meta.pt", "events.json"):
        assert f"`{name}`" in text
        assert name in literals()


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


def test_the_callback(examples):
    assert issubclass(examples["LongestResponse"], RolloutCallback)


def test_the_configuration_of_a_run_is_parsed(tmp_path, monkeypatch, capsys):
    """With what the page says of merging: a list is replaced, another class keeps arguments of the same name."""
    monkeypatch.chdir(tmp_path)
    for name, block in zip(("mine", "reward", "heads"), blocks(FROM_TRL, "yaml"), strict=True):
        Path(f"{name}.yaml").write_text(block)
    Path("my_rewards.py").write_text(blocks(FROM_TRL, "python")[0])
    monkeypatch.syspath_prepend(tmp_path)
    made = {}
    for names in (
        ("mine.yaml",),
        ("mine.yaml", "reward.yaml"),
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
    assert len(made[("mine.yaml", "reward.yaml")]["rollout"]["rewards"]) == 2
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
    skipped = ("include", "callbacks+", "logger", "rewards", "class_path")
    for key, value in written.items():
        if not any(part in key for part in skipped):
            assert made[key] == value, key


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
