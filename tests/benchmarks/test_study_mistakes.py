"""Mistakes in a study file, its results and its choices end in one line."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import pytest
import yaml

from tests.support.study_scripts import study

CONTENT = {
    "runs": "runs",
    "results": "results",
    "tasks": {"t": {"config": "t.yaml"}},
    "cells": {"base": {"config": "b.yaml"}, "one": {"config": "o.yaml"}},
    "screen": {"seeds": [9], "learning_rates": [0.1, 0.2]},
    "confirm": {"seeds": [0], "comparisons": [{"task": "t", "cell": "one", "against": "base"}]},
}

UNFINISHED = '{"stage":"screen","task":"t","cell":"one","seed":9,"learning_rate":0.1}\n'

CASES = {
    "there is no study file 'none.yaml'": {"file": None},
    "study.yaml is not YAML": {"file": "a: ["},
    "must be a mapping with `tasks` and `cells`": {"file": ""},
    "the study needs `seeds`": {"file": "runs: r\n"},
    "the study needs `results`": {"without": ["results"]},
    "`screen` needs `learning_rates`": {"without": ["screen", "learning_rates"]},
    "`confirm` needs `seeds`": {"without": ["confirm", "seeds"]},
    "`screen` must be a mapping, got None": {"set": ["screen", None]},
    "`tasks.t` must be a mapping, got None": {"set": ["tasks", "t", None]},
    "`screen.seeds` must be a list of int, got 3": {"set": ["screen", "seeds", 3]},
    "`screen.learning_rates` must be a list of float": {"set": ["screen", "learning_rates", ["x"]]},
    "the task t needs at least one of `learning_rates`": {"set": ["screen", "learning_rates", []]},
    "`confirm.comparisons[0]` names no cell": {"set": ["confirm", "comparisons", 0, "cell", []]},
    "the study has no key 'confirms'": {"set": ["confirms", {}]},
    "`screen` has no key 'seed'": {"set": ["screen", "seed", [1]]},
    "the study has no seed 99; it has 9, 0": {"arguments": ["--seeds", "99"]},
    "the study has no 'zz'": {"arguments": ["--cells", "zz"]},
    "`study.jobs` must be at least 1, got 0": {"arguments": ["--jobs", "0"]},
    "line 1 of results/results.jsonl is not JSON": {"results": '{"stage"\n{}\n'},
    "line 1 of results/results.jsonl is not a finished run": {"results": "[1]\n"},
    "line 1 of results/results.jsonl is not a finished run; delete": {"results": UNFINISHED},
    "results/chosen.json is not JSON": {"chosen": "{"},
    "results/chosen.json does not hold a choice": {"chosen": '{"t": {"cells": {"one": 0.1}}}'},
    "results/chosen.json does not hold a choice of": {"chosen": "[]"},
    "a comparison of gone on t is stored": {
        "chosen": json.dumps({"t": {"cells": {}, "comparisons": [{"cell": "gone", "against": "base"}]}})
    },
}  # fmt: skip


@pytest.mark.parametrize("message", CASES)
def test_one_line_that_says_what_is_wrong(message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    case, content = CASES[message], copy.deepcopy(CONTENT)
    # the study file, with one mistake
    *path, last = case.get("without", [""])
    place = content
    for key in path:
        place = place[key]
    place.pop(last, None)
    if "set" in case:
        *path, last, value = case["set"]
        place = content
        for key in path:
            place = place[key]
        place[last] = value
    text = case.get("file", yaml.safe_dump(content))
    if text is not None:
        Path("study.yaml").write_text(text)
    # its results
    Path("results").mkdir()
    for name, key in (("results.jsonl", "results"), ("chosen.json", "chosen")):
        if key in case:
            (Path("results") / name).write_text(case[key])
    file = "none.yaml" if text is None else "study.yaml"
    assert study.main([file, "--list", *case.get("arguments", [])]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert message in lines[0]
