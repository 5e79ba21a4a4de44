"""Annotated problems: plans, knowledge and chains of subproblems, and the prompts made of them.

docs/sparkle.md has the schema of the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_mpo.data.reading import read_rows
from lightning_mpo.data.tables import target_cell, text_cell
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow

CALCULATION = re.compile(r"(?:[\d.,$%()+\-*/x= ]*[\d)%=] ?\$?)?<<[^<>=]*=([^<>]*)>>[\d.,]*\d")
"""Matches a calculation of GSM8K in its text, such as `48/2 = <<48/2=24>>24`."""
NUMBER = re.compile(r"\d+(?:[.,]\d+)*")
"""Matches a number in a text."""
BLANK = "…"
"""Stands for a number in a plan or a question."""


@dataclass(frozen=True)
class Annotated:
    """An annotated problem.

    Args:
        problem: its text.
        answer: the right answer.
        plan: skeleton of a solution; None: not annotated, empty: there is nothing to say.
        knowledge: facts that it needs; None: not annotated.
        chain: questions and answers of its subproblems, in their order; None: not annotated.
        difficulty: its level; None: not known.
    """

    problem: str
    answer: str
    plan: str | None = None
    knowledge: tuple[str, ...] | None = None
    chain: tuple[tuple[str, str], ...] | None = None
    difficulty: int | float | str | None = None

    def prompts(self) -> dict[str, list[tuple[str, str]]]:
        """Return (prompt, right answer) by analysis; an analysis without annotation is left out."""
        prompts = {"plain": [(self.problem, self.answer)]}
        if self.plan is not None:
            plan = f"\n\nPlan:\n{self.plan.strip()}" if self.plan.strip() else ""
            prompts["plan"] = [(self.problem + plan, self.answer)]
        if self.knowledge is not None:
            facts = "".join(f"\n- {fact.strip()}" for fact in self.knowledge if fact.strip())
            text = f"{self.problem}\n\nFacts that help:{facts}" if facts else self.problem
            prompts["knowledge"] = [(text, self.answer)]
        if self.chain:
            prompts["chain"] = [self._step(j) for j in range(len(self.chain))]
        return prompts

    def _step(self, j: int) -> tuple[str, str]:
        """Return the prompt of subproblem j, with the right answers to the earlier ones.

        Its last words limit the response to this subproblem, as models like to solve the whole.
        """
        chain = self.chain or ()
        earlier = "".join(
            f"Question {i}: {question}\nAnswer: {answer}\n"
            for i, (question, answer) in enumerate(chain[:j], start=1)
        )
        question, answer = chain[j]
        prompt = (
            f"{self.problem}\n\nThe problem is split into small questions, one after the other.\n"
            f"{earlier}Question {j + 1}: {question}\n\n"
            f"Answer question {j + 1} alone. Do not solve the rest of the problem."
        )
        return prompt, answer


def read_annotated(path: str) -> list[Annotated]:
    """Read a file of annotated problems.

    Raises:
        UserError: it is missing or empty, or a field is missing or of another type.
    """
    example = ', such as {"problem": "…", "answer": "…", "plan": "…"}'
    problems = [
        _annotated(record, where)
        for where, record in read_rows(path, option="dissect FILE", example=example)
    ]
    if not problems:
        raise UserError(f"{path} holds no problem")
    return problems


def _annotated(record: Any, where: str) -> Annotated:
    """Return the problem of a line."""
    if not isinstance(record, Mapping):
        raise UserError(f"{where} must be an object, got {type(record).__name__}")
    knowledge, chain = record.get("knowledge"), record.get("chain")
    plan, difficulty = record.get("plan"), record.get("difficulty")
    if isinstance(knowledge, str):
        knowledge = [knowledge]
    _check(plan, str, f"{where}: 'plan' must be text")
    _check(difficulty, (str, int, float), f"{where}: 'difficulty' must be a number or text")
    _check(knowledge, list, f"{where}: 'knowledge' must be a list of texts")
    _check(chain, list, f"{where}: 'chain' must be a list of questions with answers")
    for fact in knowledge or ():
        _check(fact, str, f"{where}: 'knowledge' must be a list of texts")
    for part in chain or ():
        _check(part, Mapping, f"{where}: 'chain' must hold objects with 'question' and 'answer'")
    return Annotated(
        text_cell(record, "problem", where),
        target_cell(record, "answer", where),
        plan,
        None if knowledge is None else tuple(knowledge),
        None
        if chain is None
        else tuple(
            (text_cell(part, "question", where), target_cell(part, "answer", where))
            for part in chain
        ),
        difficulty,
    )


def _check(value: Any, kind: Any, sentence: str) -> None:
    """Refuse a value of another type; None is no value."""
    if value is not None and not isinstance(value, kind):
        raise UserError(f"{sentence}, got {type(value).__name__}")


def annotate_gsm8k(rows: Iterable[PromptRow]) -> tuple[list[dict[str, Any]], int]:
    """Make annotations of the calculations in GSM8K's solutions.

    A line with `<<48/2=24>>` is a step. The plan has the steps with a blank in place of their
    calculations, and of earlier results that the problem does not state. The chain asks for the
    result of each step. The difficulty is the number of steps. There is no knowledge.

    Args:
        rows: of `Gsm8k(calculator=True)`.

    Returns:
        Records of a file of annotated problems, and the number of rows without a calculation.
    """
    records, without = [], 0
    for row in rows:
        steps = [step for line in (row.solution or "").splitlines() if (step := _step(line))]
        if not steps:
            without += 1
            continue
        plan = "\n".join(f"{j}. {text}" for j, text in enumerate(_plan(row.prompt, steps), start=1))
        chain = [
            {"question": f"Which number is missing: {text}", "answer": result}
            for text, result in steps
        ]
        problem = {"problem": row.prompt, "answer": row.target, "plan": plan, "chain": chain}
        records.append({**problem, "difficulty": len(steps)})
    return records, without


def _step(line: str) -> tuple[str, str] | None:
    """Return a line with blanks for its calculations, and the last result; None: it has none.

    Example:
        >>> _step("She sold 48/2 = <<48/2=24>>24 clips in May.")
        ('She sold … clips in May.', '24')
    """
    results = CALCULATION.findall(line)
    if not results or not results[-1].strip():
        return None
    spaced = CALCULATION.sub(lambda match: " " * match[0].startswith(" ") + BLANK, line)
    return " ".join(spaced.split()), results[-1].strip()


def _plan(problem: str, steps: Sequence[tuple[str, str]]) -> list[str]:
    """Return the texts of steps without the results of the steps before them.

    Example:
        >>> _plan("Ann has 2 bags of 6.", [("She has … nuts.", "12"), ("12 and 2 are ….", "14")])
        ['She has … nuts.', '… and 2 are ….']
    """
    texts, hidden = list[str](), set[str]()
    for text, result in steps:
        for number in set(NUMBER.findall(text)) & hidden:
            text = re.sub(rf"(?<![\d.,]){re.escape(number)}(?![.,]?\d)", BLANK, text)
        texts.append(text)
        hidden |= {result} - set(NUMBER.findall(problem))
    return texts


def rows_of(problems: Sequence[Annotated], analysis: str) -> list[dict[str, Any]]:
    """Return the rows of an analysis, with the number of their problem and step.

    Where a plan or the knowledge is empty, the prompt is the problem, which is answered already:
    there is no row, and the gain is 0.

    Args:
        problems: all problems.
        analysis: "plain", "plan", "knowledge" or "chain".
    """
    return [
        {"prompt": prompt, "target": answer, "number": number, "step": step}
        for number, problem in enumerate(problems)
        for step, (prompt, answer) in enumerate(problem.prompts().get(analysis, []), start=1)
        if analysis == "plain" or prompt != problem.problem
    ]
