"""Problems with a reference solution and a way to judge another one: GSM8K, SVAMP and HumanEval."""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from execute import passes
from torch import Tensor

from lightning_mpo.data.base import PromptDataModule, Splits
from lightning_mpo.data.svamp import Svamp
from lightning_mpo.data.tables import text_cell
from lightning_mpo.errors import UserError
from lightning_mpo.rewards import MathAnswer
from lightning_mpo.rewards.scoring import completions_of
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import PromptRow, Rollout

LONGEST_PROMPT = 4096


class Problems(PromptDataModule):
    """Serves rows that are given."""

    def __init__(self, rows: Sequence[PromptRow], **kwargs: Any) -> None:
        super().__init__(max_prompt_tokens=LONGEST_PROMPT, **kwargs)
        self.rows = rows

    def load(self) -> Splits:
        return Splits(self.rows, [])


@dataclass(frozen=True)
class Domain:
    """A data set: how its file is read, and whether its answers are programs."""

    read: Callable[[Path], Sequence[PromptRow]]
    code: bool = False


# --- reading ------------------------------------------------------------------------------------------------------


def read_gsm8k(path: Path) -> list[PromptRow]:
    """The reference is the `answer` column as it stands, with its calculator notes `<<2+3=5>>`."""
    rows = []
    for line, where in json_lines(path):
        question, answer = text_cell(line, "question", where), text_cell(line, "answer", where)
        if "####" not in answer:
            raise UserError(f"{where}: 'answer' must end with '#### NUMBER', got {answer[-40:]!r}")
        rows.append(PromptRow(question, answer.rpartition("####")[2].strip(), answer))
    return rows


def read_gsm8k_plain(path: Path) -> list[PromptRow]:
    """GSM8K without the calculator notes, which no model writes by itself."""
    return [
        replace(row, solution=re.sub(r"<<[^>]*>>", "", row.solution or ""))
        for row in read_gsm8k(path)
    ]


def read_svamp(path: Path) -> list[PromptRow]:
    """The reference is the equation and its result, as in "76 - 25 = 51"."""
    rows = Svamp(path=str(path), validation_share=0).splits.train
    return [replace(row, solution=equation(row)) for row in rows]


def equation(row: PromptRow) -> str:
    """Write SVAMP's equation as people do: no outer brackets, no ".0"."""
    text = text_cell(row.extra, "Equation", f"the row {row.prompt[:40]!r}").strip()
    text = re.sub(r"(\d)\.0\b", r"\1", re.sub(r"^\((.*)\)$", r"\1", text)).strip()
    return f"{re.sub(r'(?<=[(]) | (?=[)])', '', text)} = {row.target}"


def read_humaneval(path: Path) -> list[PromptRow]:
    """The reference is `canonical_solution`; white space at the end of the prompt is counted as its beginning.

    Tokenizers join a line break with the indentation behind it, so that a prompt cut between them is one that the model
    has never seen.
    """
    rows = []
    for line, where in json_lines(path):
        prompt, test = text_cell(line, "prompt", where), text_cell(line, "test", where)
        kept = prompt.rstrip()
        solution = prompt[len(kept) :] + text_cell(line, "canonical_solution", where)
        rows.append(
            PromptRow(kept, f"{test}\ncheck({text_cell(line, 'entry_point', where)})\n", solution)
        )
    return rows


DOMAINS = {
    "gsm8k": Domain(read_gsm8k),
    "gsm8k_plain": Domain(read_gsm8k_plain),
    "svamp": Domain(read_svamp),
    "humaneval": Domain(read_humaneval, code=True),
}


def json_lines(path: Path) -> Iterator[tuple[Any, str]]:
    """Yield the objects of a `.jsonl` or `.jsonl.gz` file, and where they stand."""
    opened: Any = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8") as file:
            lines = file.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    for number, line in enumerate(lines, start=1):
        where = f"line {number} of {path}"
        try:
            if line.strip():
                yield json.loads(line), where
        except ValueError as error:
            raise UserError(f"{where} is not JSON: {error}") from error


def load_problems(text: str, count: int, seed: int) -> tuple[str, list[PromptRow]]:
    """Read `NAME=PATH` and draw problems.

    Raises:
        UserError: an unknown name, a missing or broken file.
    """
    name, found, path = text.partition("=")
    if not found or name not in DOMAINS:
        raise UserError(
            f"cannot read `--data {text}`; write NAME=PATH, where NAME is one of {', '.join(DOMAINS)}"
        )
    file = Path(path).expanduser()
    if not file.exists():
        raise UserError(
            f"there is no file {path!r}, which `--data {text}` names (seen from {Path.cwd()})"
        )
    rows = DOMAINS[name].read(file)
    if not rows:
        raise UserError(f"{path} holds no problems")
    order = torch.randperm(len(rows), generator=generator_of(seed, Stream.SHUFFLE)).tolist()
    return name, [rows[i] for i in order[:count]]


def serve(name: str, rows: Sequence[PromptRow], tokenizer: Any, instruction: str) -> Problems:
    """Return problems that can be encoded: word problems in the chat template if there is one, programs without."""
    if DOMAINS[name].code:
        problems = Problems(rows, chat_template=False)
    elif getattr(tokenizer, "chat_template", None):
        problems = Problems(rows, instruction=instruction)
    else:
        lines = [replace(row, prompt=row.prompt + "\n") for row in rows]
        problems = Problems(lines, instruction=instruction, chat_template=False)
    problems.connect(tokenizer)
    return problems


# --- judging ------------------------------------------------------------------------------------------------------


def right_answers(rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Return which responses `MathAnswer` finds right `[B]`, and the tokens that count: all of them `[B, T]`."""
    scores = MathAnswer().score(completions_of(rollout))
    return torch.tensor([score == 1.0 for score in scores]), rollout.response_mask_BT


def right_programs(rollout: Rollout, tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Run the functions of a rollout; return which pass `[B]`, and the tokens up to the end of the function `[B, T]`."""
    mask_BT = rollout.response_mask_BT.clone()
    correct = []
    for b, (row, text) in enumerate(zip(rollout.rows, rollout.texts, strict=True)):
        body = function_body(text)
        correct.append(bool(body.strip()) and passes(f"{row.prompt}{body}\n\n{row.target}"))
        if correct[-1]:
            ids = rollout.responses_BT[b][mask_BT[b]].tolist()
            mask_BT[b, tokens_within(tokenizer, ids, len(body)) :] = False
    return torch.tensor(correct), mask_BT


def function_body(text: str) -> str:
    r"""Cut a continuation of a function before the first line that is not indented.

    >>> function_body("\n    return 1\n\ndef g():\n    pass")
    '\n    return 1\n'
    """
    return re.split(r"\n(?=\S)", text, maxsplit=1)[0]


def tokens_within(tokenizer: Any, ids: Sequence[int], length: int) -> int:
    """Count the leading tokens whose text stays within `length` characters."""
    for n in range(len(ids)):
        if len(tokenizer.decode(ids[: n + 1], skip_special_tokens=True)) > length:
            return n
    return len(ids)
