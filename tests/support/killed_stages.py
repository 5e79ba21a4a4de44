"""Run by `test_killed_stages.py`: a list of stages that nothing disturbs, and one with a kill in every stage.

python killed_stages.py FOLDER      prints a line for each stage; exits 1 if two results differ

Every stage is a fork of this process, which has imported everything and started no thread.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import peft  # noqa: F401  imported once, not by each run
import torch
import yaml
from transformers import AutoTokenizer, LlamaForCausalLM  # noqa: F401

from lightning_mpo.cli import stage_entry, stage_runs
from lightning_mpo.cli.fork_server import run_logged
from lightning_mpo.cli.main import run
from lightning_mpo.data import annotations
from lightning_mpo.resume.comparison import compare_runs
from tests.support.code_corpus import CHARACTERS, write_corpus

ROOT = "${trainer.default_root_dir}"
POLICY = {
    "class_path": "TinyPolicy",
    "init_args": {"hidden_size": 16, "layers": 1, "heads": 2, "max_length": 512, "characters": CHARACTERS},
}  # fmt: skip
TRAINER = {
    "max_steps": 4, "accelerator": "cpu", "devices": 1, "num_sanity_val_steps": 0, "limit_val_batches": 1,
    "log_every_n_steps": 1, "enable_progress_bar": False, "enable_model_summary": False,
    "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": ROOT, "name": "", "version": ""}},
    "callbacks": [{"class_path": "ModelCheckpoint", "init_args": {
        "dirpath": f"{ROOT}/checkpoints", "save_last": True, "every_n_train_steps": 1,
        "enable_version_counter": False}}],
}  # fmt: skip
ADDITION = {
    "class_path": "Arithmetic",
    "init_args": {"digits": 1, "train_problems": 12, "held_out_problems": 4},
}
CODE = {"class_path": "CodeLines", "init_args": {
    "paths": ["code"], "max_files": 6, "validation_share": 0.3, "split_seed": 1, "max_prompt_tokens": 60,
    "lines_per_file": 2, "validation_prompts": 2, "validation_batch_size": 2}}  # fmt: skip
WINDOWS = {"class_path": "CodeWindows", "init_args": {
    "paths": ["code"], "validation_share": 0.3, "split_seed": 1, "window": 48, "validation_prompts": 2}}  # fmt: skip
ROLLOUT = {"prompts": 2, "completions": 4, "max_new_tokens": 8}


def stage(kind: str, data: dict, *include: str, policy: dict | None = None, **more: object) -> dict:
    arguments = {"policy": {**POLICY, "init_args": POLICY["init_args"] | (policy or {})}, **more}
    content = {"include": [*include], "data": data, "trainer": TRAINER, "seed_everything": 1}
    content["model"] = {"class_path": kind, "init_args": arguments}
    return content | ({"rollout": ROLLOUT} if kind == "PolicyOptimization" else {})


MTP = {"mtp": {"class_path": "ParallelHeads", "init_args": {"offsets": 2}}}
CONFIGS = {
    "supervised": stage("SupervisedWarmup", ADDITION, batch_size=4),
    "heads": stage("HeadWarmup", ADDITION, policy=MTP, pool={"prompts": 4, "completions": 2, "max_new_tokens": 6, "passes": 4}),
    "rl": stage("PolicyOptimization", ADDITION, "mpo", policy=MTP),
    "e_step": stage("PolicyOptimization", CODE, "ra3_e_step", "code_lines"),
    "m_step": stage("SupervisedWarmup", WINDOWS, batch_size=2, batches_per_epoch=3),
}  # fmt: skip
CONFIGS["rl"]["rollout"] = ROLLOUT | {"rewards": ["ExactAnswer", "tests.support.runs.Digits"]}
STAGES = [
    {"name": "supervised", "config": "supervised.yaml", "from": "m_step"},
    {"name": "heads", "config": "heads.yaml", "from": "supervised"},
    {"name": "rl", "config": "rl.yaml", "from": "heads", "options": ["--rollout.seed=${round}"]},
    {"name": "e_step", "config": "e_step.yaml", "from": "supervised"},
    {"name": "notes", "config": "e_step.yaml", "verb": "annotate", "from": "e_step", "options": ["--seed=${round}"]},
    {"name": "m_step", "config": "m_step.yaml", "from": "e_step", "options": ["--data.init_args.paths=[${stages.notes}]"]},
]  # fmt: skip
KILL = "--trainer.callbacks+={class_path: KillAt, init_args: {phase: %s, count: %d}}"
PHASES = {
    "supervised": ("update", 3),
    "heads": ("saved", 2),
    "rl": ("rollout", 20),
    "e_step": ("rename", 3),
    "m_step": ("update", 3),
}


def die_at_the_third_file() -> None:
    count, check = [0], annotations._check_same_program

    def counted(*arguments: object) -> None:
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        check(*arguments)  # type: ignore[arg-type]

    annotations._check_same_program = counted


class Forks:
    """Runs the command of a stage in a fork; the first try of each is killed, if `kills`."""

    def __init__(self, kills: bool) -> None:
        self.kills, self.tried = kills, set[str]()

    def __call__(self, command: list[str]) -> int:
        words = list(command[3:])
        option = "--to" if words[0] == "annotate" else "--trainer.default_root_dir"
        folder = words[words.index(option) + 1]
        name, kill = Path(folder).name, self.kills and folder not in self.tried
        self.tried.add(folder)
        child = os.fork()
        if child:
            return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if kill and name in PHASES:
            words.append(KILL % PHASES[name])
        elif kill:
            die_at_the_third_file()
        os._exit(run_logged(lambda: run(words), words, "stages.log", os.O_APPEND))


def run_list(folder: Path, kills: bool) -> int:
    """Run the list in a folder until it has ended; return how often it was started."""
    folder.mkdir()
    os.chdir(folder)
    write_corpus(folder / "code", 6)
    for name, content in CONFIGS.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump(content))
    Path("list.yaml").write_text(yaml.safe_dump({"folder": "run", "rounds": 2, "stages": STAGES}))
    stage_entry.run_stage = Forks(kills)
    for start in range(1, 30):
        if run(["fit", "-c", "list.yaml"]) == 0:
            return start
    return 0


def difference(whole: Path, killed: Path) -> str | None:
    """Return the first difference of two results of a stage."""
    if not (whole / "thoughts.json").exists():
        return next((d for part in compare_runs(whole, killed) if (d := part.difference)), None)
    names = {str(path.relative_to(whole)) for path in whole.rglob("*.*")}
    others = {str(path.relative_to(killed)) for path in killed.rglob("*.*")}
    same = names == others and all(
        (whole / name).read_bytes() == (killed / name).read_bytes() for name in names
    )
    return None if same else "other files"


def main() -> int:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    # a stage is checked once; a configuration takes half a second
    stage_runs.check_fit = functools.cache(stage_runs.check_fit)
    stage_runs.check_annotate = functools.cache(stage_runs.check_annotate)
    starts = [
        run_list(folder / name, kills) for name, kills in (("whole", False), ("killed", True))
    ]
    names = [f"round_{n}/{stage['name']}" for n in (1, 2) for stage in STAGES]
    bad = starts != [1, 1 + len(names)]
    print(f"started {starts}")
    for name in names:
        found = difference(folder / "whole" / "run" / name, folder / "killed" / "run" / name)
        print(f"{name:20} {found or 'bit for bit'}")
        bad |= found is not None
    tables = [(folder / name / "run" / "metrics.csv").read_bytes() for name in ("whole", "killed")]
    return int(bad or tables[0] != tables[1])


if __name__ == "__main__":
    sys.exit(main())
