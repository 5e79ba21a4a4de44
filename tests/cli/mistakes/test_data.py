"""Mistakes in files of rows and in options of the data end in one line."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest

from tests.support.mistakes import OVERLAY, Case, check_message

DATA = ["--data", "JsonLines", "--data.train", "rows.jsonl", "--data.chat_template", "false"]
TABLE = ["--data", "Table", *DATA[2:]]
CSV = ["--data", "Table", "--data.train", "rows.csv", "--data.chat_template", "false"]
ROW = '{"prompt": "1+1=", "target": "2"}'


def jsonl(*lines: str) -> dict[str, str]:
    return {"rows.jsonl": "\n".join(lines)}


CASES = {
    "missing data file": Case("there is no file rows.jsonl", DATA),
    "a row without the target": Case(
        "line 2 of rows.jsonl has no 'target'", DATA, jsonl(ROW, '{"prompt": "1+2="}')
    ),
    "a row that is not JSON": Case("line 2 of rows.jsonl is not JSON", DATA, jsonl(ROW, "{")),
    "no rows": Case("no training rows", DATA, jsonl("")),
    "rows in Latin-1": Case(
        "line 1 of rows.jsonl is not JSON in UTF-8: byte 0xe9",
        DATA,
        {"rows.jsonl": b'{"prompt": "caf\xe9"}'},
    ),
    "rows in Parquet": Case(
        "rows.jsonl is Parquet and cannot be read behind row 0", DATA, {"rows.jsonl": b"PAR1"}
    ),
    "a template with a syntax error": Case(
        "`data.prompt` is not a valid Jinja template: …(line 1)",
        [*TABLE, "--data.prompt", "{{ prompt"],
        jsonl(ROW),
    ),
    "a template of a missing column": Case(
        "line 1 of rows.jsonl has no 'promt'; its columns are 'prompt', 'target'; did you mean 'prompt'?; the template",
        [*TABLE, "--data.prompt", "{{ promt }}"],
        jsonl(ROW),
    ),
    "more examples than rows": Case(
        "`data.few_shot` = 9 takes all 1 rows to train on; lower it",
        [*TABLE, "--data.few_shot", "9"],
        jsonl(ROW),
    ),
    "an example without a solution": Case(
        "the prompt '1+1=' (line 1 of rows.jsonl) has no solution for `data.few_shot`; name its column",
        [*TABLE, "--data.few_shot", "1", "--data.validation_share", "0"],
        jsonl(ROW, ROW.replace("1+1", "1+2")),
    ),
    "an id twice": Case(
        "line 2 of rows.jsonl: 'target' is '2', as in line 1 of rows.jsonl; ids must differ",
        [*TABLE, "--data.id", "target"],
        jsonl(ROW, ROW),
    ),
    "a prompt that is a number in some rows": Case(
        "line 2 of rows.jsonl: 'prompt' must be text, got int",
        TABLE,
        jsonl(ROW, '{"prompt": 3, "target": "2"}'),
    ),
    "CSV in UTF-16": Case(
        "rows.csv is UTF-16, not CSV; convert it: iconv -f UTF-16 -t UTF-8 rows.csv",
        CSV,
        {"rows.csv": "prompt,target\n1,2\n".encode("utf-16")},
    ),
    "CSV in Latin-1": Case(
        "line 2 of rows.csv is not CSV in UTF-8: byte 0xe9 at column 4; if it is Latin-1, convert it",
        CSV,
        {"rows.csv": b"prompt,target\ncaf\xe9,2\n"},
    ),
    "CSV without rows": Case(
        "`Table` found no training rows in rows.csv", CSV, {"rows.csv": "prompt,target\n"}
    ),
    "a file to validate on without rows": Case(
        "`Table` found no rows to validate on in none.jsonl",
        [*TABLE, "--data.validation", "none.jsonl"],
        {**jsonl(ROW), "none.jsonl": ""},
    ),
    "streaming without an end": Case(
        "`data.streaming` needs `data.max_rows`", [*TABLE, "--data.streaming", "true"], jsonl(ROW)
    ),
    "a hub id that is a path": Case(
        "`data.hub` must be an id of the Hugging Face hub",
        [*TABLE, "--data.hub", "./rows.jsonl"],
        jsonl(ROW),
    ),
    "a target of null": Case(
        "line 1 of rows.jsonl: 'target' is null", DATA, jsonl('{"prompt": "1", "target": null}')
    ),
    "an empty prompt": Case(
        "line 2 of rows.jsonl: 'prompt' is empty",
        DATA,
        jsonl(ROW, '{"prompt": " ", "target": "2"}'),
    ),
    "characters that the tokenizer does not know": Case(
        "'1Ä=' (line 2 of rows.jsonl) holds characters that the tokenizer does not know, such as 'Ä'",
        DATA,
        jsonl(ROW, '{"prompt": "1Ä=", "target": "2"}'),
    ),
    "a chat without a template": Case(
        "'1+1=' (line 2 of rows.jsonl) is a chat, but the tokenizer of the policy has no chat template; take a model that",
        DATA,
        jsonl(ROW, '{"messages": [{"role": "user", "content": "1+1="}], "target": "2"}'),
    ),
    "a chat without a template, which is applied": Case(
        "'1+1=' (line 1 of rows.jsonl) is a chat, but the tokenizer of the policy has no chat template",
        [*DATA[:-1], "true", "--data.system", "x"],
        jsonl('{"messages": [{"role": "user", "content": "1+1="}], "target": "2"}', ROW),
    ),
    "text without a template, which is applied": Case(
        "the tokenizer of the policy has no chat template; set `data.chat_template: false` for prompts that are text",
        [*DATA[:-1], "true"],
        jsonl(ROW, ROW.replace("1+1", "1+2")),
    ),
    "a system message without a template": Case(
        "`data.system` is for a chat template",
        [*DATA, "--data.system", "x"],
        jsonl(ROW, ROW.replace("1+1", "1+2")),
    ),
    "an unknown way with overlong rows": Case(
        "data", [*DATA, "--data.overlong", "drop"], jsonl(ROW)
    ),
    "a prompt over the limit": Case(
        "prompt '1+1=1+1=…over `data.max_prompt_tokens` (16)",
        [*DATA, "--data.validation_share", "0", "--data.max_prompt_tokens", "16"],
        jsonl('{"prompt": "1+1=1+1=1+1=1+1=1+1=", "target": "2"}'),
    ),
    "a chat template that is none": Case(
        "`data.chat_template: false`", ["--data.chat_template", "true"]
    ),
    "too few problems": Case("`Arithmetic.digits` = 1", ["--data.train_problems", "99999"]),
    "too few letters for a star": Case(
        "`StarGraphs.alphabet` = 6 has too few letters for the 7 nodes…raise `alphabet`",
        ["--data", "StarGraphs", "--data.alphabet", "6"],
    ),
    "a star with one arm": Case(
        "`StarGraphs.degree` must be at least 2, got 1",
        ["--data", "StarGraphs", "--data.degree", "1"],
    ),
    "an arm without nodes": Case(
        "`StarGraphs.length` must be at least 1",
        ["--data", "StarGraphs", "--data.length", "0"],
    ),
    "a policy without letters for a star": Case(
        "characters that the tokenizer does not know, such as '",
        ["--data", "StarGraphs"],
    ),
    "a span of no token": Case(
        "`Spans.length` must be at least 1, got 0", ["--data", "Spans", "--data.length", "0"]
    ),
    "spans beyond the completion": Case(
        "`Spans`…needs responses of 73 tokens…over `rollout.max_new_tokens` = ",
        ["--data", "Spans"],
    ),
    "a tail of nothing": Case("`Tails.tail`…0", ["--data", "Tails", "--data.tail", "0"]),
    "a tail of everything": Case("`Tails.tail`…1", ["--data", "Tails", "--data.tail", "1"]),
    "a vocabulary without a tail": Case(
        "`Tails.vocabulary` must be above 14, got 14",
        ["--data", "Tails", "--data.vocabulary", "14"],
    ),
    "a prompt without the target": Case(
        "`Countdown.prompt` must contain {numbers} and {target}, got '{numbers}='",
        ["--data", "Countdown", "--data.prompt", "{numbers}="],
    ),
    "a reward of other problems": Case(
        "`CountdownAnswer` needs the column 'nums' with the given numbers, and the data has no fur",
        ["--rollout.rewards", "[CountdownAnswer]"],
    ),
    "a curriculum and the order of the file": Case(
        "`data.order: file` and `data.curriculum` contradict each other",
        ["--data.order", "file", "--data.curriculum", "SuccessRate"],
    ),
    "a curriculum without right and wrong": Case(
        "`data.curriculum: SuccessRate` needs a reward that says what is right…`ExactAnswer`",
        ["--data.curriculum", "SuccessRate", "--rollout.rewards", "[Finished]"],
    ),
    "a curriculum that nothing weighs": Case(
        "`SuccessRate.floor` must be in (0, 1], got 0.0",
        ["--data.curriculum", "SuccessRate", "--data.curriculum.floor", "0"],
    ),
    "levels of no column": Case(
        "`data.curriculum` reads levels from the column 'level', and the prompt '",
        ["--data.curriculum", "EasyToHard", "--data.curriculum.rollouts", "9"],
    ),
    "stages without a beginning": Case(
        "`Stages.stages` must have a stage that begins at rollout 0, got stages that begin at 5",
        OVERLAY,
        {
            "o.yaml": "data: {init_args: {curriculum: {class_path: Stages, init_args: {stages: {5: [1]}}}}}"
        },
    ),
    "an argument before the class": Case(
        "`data` sets `validation_prompts` before its class: write `class_path` beside it, or put",
        OVERLAY,
        {"o.yaml": "data: {init_args: {validation_prompts: 4}}"},
        without="data",
    ),
    "more digits than there are": Case("`Arithmetic.digits`", ["--data.digits", "0"]),
}


def test_a_hub_that_is_out_of_reach_or_has_no_such_data(tmp_path, monkeypatch):
    class DatasetNotFoundError(Exception):
        """Stands for the class of that name in `datasets`."""

    for error, message in (
        (ConnectionError("x"), "cannot load a/b, train from the hub, which is out of reach (Connection…name files in `data.train`"),
        (DatasetNotFoundError("x"), "there is no data set 'a/b' on the hub, or it needs a login"),
    ):  # fmt: skip

        def refuse(*names, error=error, **options):
            raise error

        monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
        options = ["--data", "Table", "--data.hub", "a/b", "--data.train", "train"]
        check_message(Case(message, options), tmp_path)


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_says_what_to_write(tmp_path, name):
    check_message(CASES[name], tmp_path)
