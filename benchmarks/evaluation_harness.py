"""Judge the answers of `evaluate` on GSM8K as lm-evaluation-harness does, and show each difference.

python benchmarks/evaluation_harness.py --answers evaluation/gsm8k.jsonl --data FOLDER [--rows N]

The filters and the metric are those of the harness's own task `gsm8k`, on the same completions. So
differences come from the reading of answers alone. FOLDER has GSM8K's `test.jsonl`. It needs the
extra `harness`.
"""

from __future__ import annotations

import argparse
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lm_eval
import yaml
from lm_eval.api.instance import Instance
from lm_eval.api.task import ConfigurableTask

from lightning_mpo.functional.evaluation import mean_interval
from lightning_mpo.rollout.answer_file import read_answers

READINGS = {"strict-match": "the number behind ####", "flexible-extract": "the last number"}


@dataclass(frozen=True)
class Judged:
    """One completion with three verdicts.

    Args:
        target: the right number.
        completion: text of the model.
        answer: as this package reads it; None: no answer.
        right: verdict of this package.
        readings: what each filter of the harness extracts.
        verdicts: verdict of the harness on it.
    """

    target: str
    completion: str
    answer: str | None
    right: bool
    readings: dict[str, str]
    verdicts: dict[str, bool]


def task_of(folder: Path) -> ConfigurableTask:
    """Return the harness's task `gsm8k` with problems from a folder instead of the hub."""
    file = Path(lm_eval.__file__).parent / "tasks" / "gsm8k" / "gsm8k.yaml"
    config = yaml.safe_load(file.read_text(encoding="utf-8"))
    for name in ("tag", "dataset_name", "training_split", "fewshot_split"):
        config.pop(name, None)
    config |= {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder.resolve() / "test.jsonl")}},
        "num_fewshot": 0,
    }
    return ConfigurableTask(config=config)


def judge(task: ConfigurableTask, problems: list[dict[str, Any]]) -> list[Judged]:
    """Apply the filters and the metric of a task to completions.

    Args:
        task: of the harness.
        problems: `prompt` with the question in it, `target`, `completion`, `answer` and `right`.
    """
    by_question = {doc["question"].strip(): doc for doc in task.test_docs()}
    docs = [next(by_question[q] for q in by_question if q in row["prompt"]) for row in problems]
    instances = []
    for number, (doc, row) in enumerate(zip(docs, problems, strict=True)):
        instance = Instance("generate_until", doc, ("", {}), 0, ("gsm8k", number, 1))
        instance.resps = [row["completion"]]
        instances.append(instance)
    task._instances = instances
    task.apply_filters()
    judged = []
    for row, instance in zip(problems, instances, strict=True):
        readings = {name: str(instance.filtered_resps[name]) for name in READINGS}
        verdicts = {
            name: bool(task.process_results(instance.doc, [text])["exact_match"])
            for name, text in readings.items()
        }
        judged.append(
            Judged(
                row["target"],
                row["completion"],
                row["answer"],
                bool(row["right"]),
                readings,
                verdicts,
            )
        )
    return judged


def reason(row: Judged, reading: str) -> str:
    """Return why a verdict of the harness differs from ours."""
    text = row.readings[reading]
    if text == "[invalid]":
        return "the harness finds no #### or no number"
    if row.right:
        return f"another number is {READINGS[reading]}"
    return "the harness takes a number that the answer does not end with"


def report(judged: list[Judged], rows: int) -> str:
    """Return the table of accuracies, the reasons of differences, and some of the rows."""
    import torch

    def line(name: str, verdicts: list[bool]) -> str:
        mean, low, high = mean_interval(torch.tensor(verdicts, dtype=torch.float64))
        return f"| {name} | {mean:.3f} [{low:.3f}, {high:.3f}] |"

    lines = ["| judge | accuracy |", "|---|---|", line("this package", [r.right for r in judged])]
    lines += [
        line(f"harness, {name} ({meaning})", [row.verdicts[name] for row in judged])
        for name, meaning in READINGS.items()
    ]
    for name in READINGS:
        other = [row for row in judged if row.verdicts[name] != row.right]
        counts = Counter((row.right, reason(row, name)) for row in other)
        lines += ["", f"{name}: {len(other)} of {len(judged)} verdicts differ"]
        for (right, why), count in sorted(counts.items(), key=lambda item: -item[1]):
            lines.append(f"  {count}  {'right' if right else 'wrong'} for us; {why}")
        for row in other[:rows]:
            ending = " ".join(row.completion.split())[-90:]
            lines.append(
                f"    target {row.target}, ours {row.answer}, harness {row.readings[name]}: …{ending}"
            )
    return "\n".join(lines)


def main() -> None:
    """Print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--answers", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=5, help="differing rows shown for each filter")
    options = parser.parse_args()
    _, problems = read_answers(options.answers)
    flat = [
        {"prompt": problem["prompt"], "target": problem["target"]} | dict(sample)
        for problem in problems
        for sample in problem["samples"]
    ]
    print(report(judge(task_of(options.data), flat), options.rows))


if __name__ == "__main__":
    main()
