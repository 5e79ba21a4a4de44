"""Files of evaluations: a line that describes the evaluation, then a line of JSON for each problem.

A file gets its name when all problems are in it. Until then it is `.<name>.part`, from which an
evaluation goes on.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.data.identity import digest_of
from lightning_mpo.errors import UserError
from lightning_mpo.policies.base import Policy
from lightning_mpo.rewards.base import Reward
from lightning_mpo.rollout.evaluation import Decoding
from lightning_mpo.storage import PART
from lightning_mpo.types import PromptRow, Splits

TEXTS = ("chat_template", "instruction", "suffix", "system", "template_arguments", "control_tokens")
"""Options of data that shape the text around a prompt."""
Problems = list[dict[str, Any]]


@dataclass(frozen=True)
class Sampled:
    """Settings by which answers were sampled, besides the policy and the problems.

    Args:
        decoding: support, completions per problem, and whether they are greedy.
        temperature: divisor of the logits.
        max_new_tokens: longest response, tokens.
        seed: of the sampling.
    """

    decoding: Decoding
    temperature: float
    max_new_tokens: int
    seed: int


def describe(
    name: str,
    policy: Policy,
    data: PromptDataModule,
    rows: Sequence[PromptRow],
    rewards: Sequence[Reward],
    sampled: Sampled,
    **more: Any,
) -> dict[str, Any]:
    """Return the first line of a file: what was evaluated, and how.

    Args:
        name: of the benchmark.
        policy: its weights need not be loaded.
        data: renders the rows.
        rows: the problems.
        rewards: judge the answers.
        sampled: settings of the sampling.
        more: further entries, such as the name of the model.
    """
    config, decoding = getattr(policy, "config", None), sampled.decoding
    shape = (
        getattr(config, key, None) for key in ("model_type", "num_hidden_layers", "hidden_size")
    )
    texts = {key: getattr(data, key) for key in TEXTS}
    shots = digest_of(Splits(list(data.shots), [])) if data.shots else None
    about = {
        "benchmark": name,
        "problems": len(rows),
        "rows": digest_of(Splits([], rows)),
        "architecture": " ".join(str(part) for part in (*shape, policy.vocabulary) if part),
        "settings": {
            "completions": decoding.completions,
            "greedy": decoding.greedy,
            "support": repr(decoding.support),
            "temperature": None if decoding.greedy else sampled.temperature,
            "max_new_tokens": sampled.max_new_tokens,
            "seed": sampled.seed,
            "rewards": [reward.title for reward in rewards],
            "few_shot": shots,
            **texts,
        },
    }
    # as it comes back from a file
    return dict(json.loads(json.dumps(about | more, default=str)))


class AnswerFile:
    """Writes a file of an evaluation, problem by problem.

    Args:
        path: the file.
        about: its first line, from `describe`.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]) -> None:
        self.path, self.about = path, about
        self.part = path.with_name(f".{path.name}{PART}")

    def resume(self, batch: int) -> Problems:
        """Return the problems that are in the file already; all of them if it is whole.

        Those of the last batch are dropped unless all are there, as a batch is sampled together.

        Args:
            batch: problems of a batch.

        Raises:
            UserError: the file is damaged, or an entry of `about` differs: it is of another model,
                another benchmark or other settings.
        """
        file = self.path if self.path.exists() else self.part
        if not file.exists():
            return []
        about, problems = _parse(file, torn=file is self.part)
        if not about:  # killed within the first line
            return []
        where = difference(self.about, {key: about.get(key) for key in self.about})
        if where is not None:
            raise UserError(
                f"{file} holds answers of another evaluation ({where}); name another `--out`, or "
                "remove the file"
            )
        complete = len(problems) == self.about["problems"]
        return problems if complete else problems[: len(problems) // batch * batch]

    def begin(self, problems: Sequence[Mapping[str, Any]] = ()) -> None:
        """Write the first line and the problems that are there already."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.part.with_name(f"{self.part.name}.new")
        fresh.write_bytes(_lines([self.about, *problems]))
        os.replace(fresh, self.part)

    def add(self, problems: Sequence[Mapping[str, Any]]) -> None:
        """Append problems, and flush them to the disk."""
        with self.part.open("ab") as file:
            file.write(_lines(problems))
            file.flush()
            os.fsync(file.fileno())

    def finish(self) -> None:
        """Give the file its name."""
        os.replace(self.part, self.path)

    def write(self, problems: Sequence[Mapping[str, Any]]) -> None:
        """Write a whole file."""
        self.begin(problems)
        self.finish()


def read_answers(path: Path) -> tuple[dict[str, Any], Problems]:
    """Return the description of an evaluation, and its problems.

    Raises:
        UserError: there is no such file, or it is not whole.
    """
    if not path.is_file():
        unfinished = path.with_name(f".{path.name}{PART}").exists()
        hint = "; the evaluation has not ended: run it again, and it goes on" if unfinished else ""
        raise UserError(f"there is no file of answers {path}{hint}")
    about, problems = _parse(path, torn=False)
    if len(problems) != about["problems"]:
        raise UserError(
            f"{path} is not whole: it holds {len(problems)} of {about['problems']} problems"
        )
    return about, problems


def check_comparable(
    first: Mapping[str, Any], second: Mapping[str, Any], path: object, other_model: bool = False
) -> None:
    """Refuse to pair answers to other problems, or answers that were sampled otherwise.

    Args:
        first: description of one evaluation.
        second: of the other.
        path: file of the other, for the message.
        other_model: whether the models may have different architectures.

    Raises:
        UserError: names the difference.
    """
    if first["rows"] != second["rows"]:
        names = [f"{part['benchmark']!r} ({part['problems']} problems)" for part in (first, second)]
        raise UserError(f"{path} is of other problems: {names[0]} here, {names[1]} there")
    where = difference(first["settings"], second["settings"])
    if where is not None:
        raise UserError(f"{path} has other settings ({where}); evaluate both in the same way")
    if not other_model and first["architecture"] != second["architecture"]:
        raise UserError(
            f"{path} is of another model ({second['architecture']}, not {first['architecture']}); "
            "add --other-model to compare two models"
        )


def difference(first: Mapping[str, Any], second: Mapping[str, Any]) -> str | None:
    """Return the first different entry of two descriptions; None: they are equal.

    Example:
        >>> difference({"settings": {"seed": 1}}, {"settings": {"seed": 2}})
        'settings.seed: 1 here, 2 there'
    """
    for key in dict.fromkeys((*first, *second)):
        mine, theirs = first.get(key), second.get(key)
        if isinstance(mine, Mapping) and isinstance(theirs, Mapping):
            inner = difference(mine, theirs)
            if inner is not None:
                return f"{key}.{inner}"
        elif mine != theirs:
            return f"{key}: {mine!r:.60} here, {theirs!r:.60} there"
    return None


def _lines(values: Sequence[Mapping[str, Any]]) -> bytes:
    """Return a line of JSON for each value."""
    text = "".join(json.dumps(value, ensure_ascii=False, default=str) + "\n" for value in values)
    return text.encode(errors="surrogatepass")


def _parse(path: Path, torn: bool) -> tuple[dict[str, Any], Problems]:
    """Return the description and the problems of a file.

    Args:
        path: the file.
        torn: whether its last line may be cut off, which is then left out.
    """
    lines = path.read_bytes().split(b"\n")
    rest = lines.pop()
    if rest and not torn:
        raise UserError(f"{path} is not whole: its last line is cut off")
    values: Problems = []
    for number, line in enumerate(lines, start=1):
        try:
            value = json.loads(line)
            missing = {"problem", "samples"} if values else {"rows", "problems", "settings"}
            if not missing <= value.keys() or (values and value["problem"] != number - 2):
                raise ValueError
        except (ValueError, AttributeError):
            raise UserError(
                f"{path} is no file of answers: line {number} is damaged; remove the file"
            ) from None
        values.append(value)
    if not values and not torn:
        raise UserError(f"{path} is no file of answers: it is empty")
    return (values[0], values[1:]) if values else ({}, [])
