"""Mistakes in names, types and files of a configuration end in one line."""

from __future__ import annotations

import pytest

from tests.support.mistakes import OBJECTIVE, OVERLAY, POLICY, Case, check_message

LORA = f"--{POLICY}.init_args.lora"


CASES = {
    # --- modules of one's own
    "a reward in a module that is not here": Case(
        "`rollout.rewards`: no module `my_modul` for `my_modul.EndsWithTarget`; looked in …and among the packages",
        ["--rollout.rewards", "[my_modul.EndsWithTarget]"],
    ),
    "a class that the module does not have": Case(
        "`rollout.rewards`: no `ExactAnswr` in `lightning_mpo.rewards` (…rewards/__init__.py); did you mean `ExactAnswer`?",
        ["--rollout.rewards", "[lightning_mpo.rewards.ExactAnswr]"],
    ),
    "a module that imports what is not there": Case(
        "`data`: `module_with_a_missing_import.Data` cannot be imported: no module `nowhere_to_be_seen`",
        ["--data", "module_with_a_missing_import.Data"],
        {"module_with_a_missing_import.py": "import nowhere_to_be_seen"},
    ),
    "a surrogate in a module that is not here": Case(
        "`model.objective.surrogate`: no module `not_here` for `not_here.Bounded`",
        [f"{OBJECTIVE}.surrogate", "not_here.Bounded"],
    ),
    "a recipe of nearly that name": Case(
        "no configuration file or recipe 'grop'; did you mean `grpo`?", ["-c", "grop"]
    ),
    # --- names and types
    "unknown section": Case("`rolout`…did you mean `rollout`", ["--rolout", "3"]),
    "unknown key on the command line": Case(
        "`rollout.promts`…did you mean `rollout.prompts`", ["--rollout.promts", "3"]
    ),
    "unknown key in a file": Case(
        "`rollout.promts`…did you mean `rollout.prompts`",
        ["-c", "more.yaml"],
        {"more.yaml": "rollout: {promts: 3}"},
    ),
    "unknown trainer key": Case(
        "`trainer.max_step`…did you mean",
        ["-c", "more.yaml"],
        {"more.yaml": "trainer: {max_step: 3}"},
    ),
    "unknown argument of the model": Case(
        "`PolicyOptimization` has no argument `temprature`; did you mean `temperature`",
        ["-c", "more.yaml"],
        {"more.yaml": "model: {init_args: {temprature: 3}}"},
    ),
    "unknown argument of a class": Case(
        "`ClippedRatio` has no argument `lo`; did you mean `low`",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {surrogate: {class_path: ClippedRatio, init_args: {lo: 0.1}}}}}"
        },
    ),
    "unknown argument of a callback": Case(
        "`Watchdog` has no argument `patients`; did you mean `patience`",
        ["-c", "more.yaml"],
        {"more.yaml": "trainer: {callbacks: [{class_path: Watchdog, init_args: {patients: 3}}]}"},
    ),
    "unknown class": Case(
        "no class `ClipedRatio`; did you mean `ClippedRatio`",
        [f"{OBJECTIVE}.surrogate", "ClipedRatio"],
    ),
    "unknown class in a file": Case(
        "no class `SequenceMeans`; did you mean `SequenceMean`",
        ["-c", "more.yaml"],
        {"more.yaml": "model: {init_args: {objective: {reduction: SequenceMeans}}}"},
    ),
    "unknown reward": Case(
        "no class `ExactAnser`; did you mean `ExactAnswer`", ["--rollout.rewards", "[ExactAnser]"]
    ),
    "unknown callback": Case(
        "no class `Watchdogs`; did you mean `Watchdog`", ["--trainer.callbacks", "[Watchdogs]"]
    ),
    "unknown data": Case(
        "no class `Arithmetics`; did you mean `Arithmetic`", ["--data", "Arithmetics"]
    ),
    "unknown model": Case(
        "no class `PolicyOptimisation`; did you mean `PolicyOptimization`",
        ["--model", "PolicyOptimisation"],
    ),
    "class of another axis": Case(
        "`model.objective.support`: `TokenMean` is a `Reduction`",
        [f"{OBJECTIVE}.support", "TokenMean"],
    ),
    "wrong type": Case("rollout.prompts…int…many", ["--rollout.prompts", "many"]),
    "wrong type in a class": Case(
        "high…float…wide",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {surrogate: {class_path: ClippedRatio, init_args: {high: wide}}}}}"
        },
    ),
    "a choice that is none": Case(
        "scale…std…none…median",
        ["-c", "more.yaml"],
        {
            "more.yaml": "model: {init_args: {objective: {advantage: {class_path: GroupRelative, init_args: {scale: median}}}}}"
        },
    ),
    "missing section": Case("`data` is required", without="data"),
    "missing model": Case("`model` is required", without="model"),
    "missing rewards": Case("`rollout.rewards` is empty", without="rollout"),
    "missing argument of a class": Case(
        "`model.policy`: `CausalPolicy` needs the argument `source`",
        [f"--{POLICY}", "CausalPolicy"],
    ),
    "a logger whose package is missing": Case(
        "the package `cloud` is not installed, and the configuration needs it: pip install 'cloud>=0.12'",
        ["--trainer.logger", "cloud_logger.CloudLogger"],
        {
            "cloud_logger.py": "from lightning.pytorch.loggers import CSVLogger\n"
            "class CloudLogger(CSVLogger):\n"
            "    def __init__(self):\n"
            "        raise ModuleNotFoundError(\"Requirement 'cloud>=0.12' not met. HINT: Try running `pip install`\")\n"
        },
    ),
    "a recipe without -c": Case("`quickstart` follows no option…`-c quickstart`", ["quickstart"]),
    "one reward, and no list": Case(
        "`rollout.rewards`: must be a list, got my_rewards.f; write '[my_rewards.f]'",
        ["--rollout.rewards", "my_rewards.f"],
    ),
    "a name of peft": Case(
        "`model.policy.lora`: `Lora` has no argument `target_modules`; it is `targets`",
        [
            f"--{POLICY}",
            "CausalPolicy",
            f"--{POLICY}.init_args.source",
            "x",
            LORA,
            "{target_modules: [q_proj]}",
        ],
    ),
    "an option of adapters that is none": Case(
        "`Lora` has no argument `scale`; it takes rank, alpha, targets, dropout",
        [
            f"--{POLICY}",
            "CausalPolicy",
            f"--{POLICY}.init_args.source",
            "x",
            f"--{POLICY}.init_args.lora",
            "{scale: 2}",
        ],
    ),
    "a shortened name": Case(
        "no option `rollout.completion`; did you mean `rollout.completions`?",
        ["--rollout.completion", "8"],
    ),
    "a name of TRL": Case(
        "no option `rollout.num_generations`: completions per prompt are `rollout.completions`",
        ["--rollout.num_generations", "8"],
    ),
    "a name of TRL in a file": Case(
        "no option `rollout.max_completion_length`: it is `rollout.max_new_tokens`",
        OVERLAY,
        {"o.yaml": "rollout: {max_completion_length: 8}"},
    ),
    "a verb that is none": Case("no verb 'fitt'; did you mean `fit`", verb="fitt"),
    # --- files
    "missing file": Case("no configuration file 'missing.yaml'", ["-c", "missing.yaml"]),
    "missing algorithm file": Case(
        "no configuration file 'configs/algorithm/grop.yaml'; did you mean `configs/algorithm/grpo.yaml`",
        ["-c", "configs/algorithm/grop.yaml"],
        {"configs/algorithm/grpo.yaml": "{}"},
    ),
    "missing included file": Case(
        "no configuration file 'other.yaml'",
        ["-c", "more.yaml"],
        {"more.yaml": "include: [other.yaml]"},
    ),
    "files that include each other": Case(
        "include", ["-c", "a.yaml"], {"a.yaml": "include: [b.yaml]", "b.yaml": "include: [a.yaml]"}
    ),
    "no YAML": Case(
        "bad.yaml is not valid YAML", ["-c", "bad.yaml"], {"bad.yaml": "rollout: {prompts: 3"}
    ),
    "a list for a file": Case("must hold a mapping", ["-c", "bad.yaml"], {"bad.yaml": "- 1\n- 2"}),
    "an option without its file": Case("-c", ["-c"]),
    "unknown interpolation": Case(
        "trainer.max_stepz",
        ["-c", "more.yaml"],
        {"more.yaml": 'rollout: {prompts: "${trainer.max_stepz}"}'},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_says_what_to_write(tmp_path, name):
    check_message(CASES[name], tmp_path)
