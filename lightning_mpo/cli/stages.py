"""`stages:`, a list of stages that run one after another, in rounds, each as a process."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning_mpo.cli.stage_entry import Entry
from lightning_mpo.errors import UserError
from lightning_mpo.recipes import call, find, read, stages_of, with_includes, words_of

KEYS = ("stages", "rounds", "folder")
"""Keys of a file that lists stages; `include` may be there as well."""
STAGE_KEYS = ("name", "config", "verb", "from", "reference", "when", "options")
VERBS, TIMES = ("fit", "annotate"), ("every", "first", "last")
CHECKPOINT = "--model.init_args.policy.init_args.checkpoint"
REFERENCE_CHECKPOINT = "--model.init_args.policy.init_args.reference_checkpoint"
FOLDER = "--trainer.default_root_dir"
VARIABLE = re.compile(r"\$\{(round|stages\.[^}]*)\}")
"""Matches `${round}` and `${stages.NAME}` in the options of a stage."""


@dataclass(frozen=True)
class Stage:
    """A stage of a list.

    Args:
        name: of its folder.
        config: its configuration, as an argument of `-c`.
        verb: `fit`, or `annotate`, which writes thoughts into files.
        start: stages whose checkpoint it starts from (`from`): that of the one that ran last before
            it, in this round or the round before. If none ran, it starts as its configuration says.
        reference: stages whose checkpoint is its reference, likewise.
        when: the rounds in which it runs: `every`, the `first` or the `last`.
        options: further words of its command line.
    """

    name: str
    config: str
    verb: str
    start: tuple[str, ...]
    reference: tuple[str, ...]
    when: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class StageList:
    """Stages with their rounds.

    Args:
        stages: in their order.
        rounds: how often they run.
        folder: of the run; a stage has the folder `round_N/NAME` in it.
        rest: words of the command line that go to every stage.
        prints: whether the commands of the stages are printed instead of run.
    """

    stages: tuple[Stage, ...]
    rounds: int
    folder: Path
    rest: tuple[str, ...]
    prints: bool = False

    def entries(self, checkpoints: dict[str, Path], rounds: int) -> Iterator[tuple[Stage, Entry]]:
        """Yield the stages of some rounds with their commands, in order.

        Args:
            checkpoints: by stage, the path of its checkpoint in its folder. It may grow meanwhile:
                a command needs those of earlier stages alone.
            rounds: number of rounds.
        """
        latest: dict[str, Path] = {}
        for number in range(1, rounds + 1):
            for stage in self.stages:
                if number != {"first": 1, "last": rounds}.get(stage.when, number):
                    continue
                folder = self.folder / f"round_{number}" / stage.name
                words = [stage.verb, "-c", stage.config]
                words += [_filled(word, stage, number, latest) for word in stage.options]
                words += [*self.rest]
                # the checkpoint that it starts from, and its folder
                start, reference = (
                    next((name for name in reversed(latest) if name in names), None)
                    for names in (stage.start, stage.reference)
                )
                if start is None and stage.verb == "annotate":
                    raise UserError(
                        f"stage {stage.name!r} needs `from`, a stage before it that trains"
                    )
                if start is not None:
                    option = "--checkpoint" if stage.verb == "annotate" else CHECKPOINT
                    words += [option, str(latest[start] / checkpoints[start])]
                if reference is not None:
                    words += [REFERENCE_CHECKPOINT, str(latest[reference] / checkpoints[reference])]
                words += ["--to", str(folder)] if stage.verb == "annotate" else []
                words += [FOLDER, str(folder)]
                result = str(folder / checkpoints.get(stage.name, ""))
                name = f"round_{number}/{stage.name}"
                yield stage, Entry("stage", name, tuple(words), result, repr(result))
                latest.pop(stage.name, None)  # the last one comes last
                latest[stage.name] = folder


def _filled(word: str, stage: Stage, number: int, latest: dict[str, Path]) -> str:
    """Replace `${round}` and `${stages.NAME}` in an option of a stage."""

    def value(match: re.Match[str]) -> str:
        name = match[1].removeprefix("stages.")
        if match[1] != "round" and name not in latest:
            raise UserError(
                f"stage {stage.name!r} uses {match[0]} in round {number}, and no stage of that "
                "name has run before it"
            )
        return str(number) if match[1] == "round" else str(latest[name])

    return VARIABLE.sub(value, word)


# --- reading --------------------------------------------------------------------------------------


def find_list(arguments: Sequence[str]) -> StageList | None:
    """Return the list of stages that a command line names; None: it names none.

    Args:
        arguments: of `fit`, without the verb.

    Raises:
        UserError: the list, or a word beside it, has a mistake.
    """
    content: dict[str, Any] = {}
    rest: list[str] = []
    configs: dict[str, Path] = {}
    # keys of the list, and the other words
    for word, is_name in words_of(arguments):
        if not is_name:
            rest.append(word)
            continue
        for path in with_includes(find(word)):
            options = read(path)
            if not options.keys() & set(KEYS):
                rest += ["-c", call(path)]
                continue
            if others := options.keys() - {*KEYS, "include"}:
                raise UserError(
                    f"{path} has stages and `{min(others)}`: give such options to the "
                    "configurations of its stages"
                )
            content |= options
            configs |= stages_of(path)
    if "stages" not in content:
        return None
    return _stage_list(content, configs, rest)


def _stage_list(content: dict[str, Any], configs: dict[str, Path], rest: list[str]) -> StageList:
    """Make a list of stages of the keys of files and the words of the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--rounds", default=content.get("rounds", 1))
    parser.add_argument("--folder", default=content.get("folder"))
    parser.add_argument("--ckpt_path")
    parser.add_argument("--print_config", action="store_true")
    options, rest = parser.parse_known_args(rest)
    if options.ckpt_path is not None:
        raise UserError("stages continue by themselves: leave out `--ckpt_path`")
    rounds, folder = options.rounds, options.folder
    if not re.fullmatch("[1-9][0-9]{0,3}", str(rounds)):
        raise UserError(f"`rounds` must be a number from 1 to 9999, got {rounds!r}")
    if not isinstance(folder, str) or not folder:
        raise UserError(f"`folder` must be the folder of the run with stages, got {folder!r}")
    listed = content["stages"]
    if not isinstance(listed, list) or not listed:
        raise UserError(f"`stages` must be a list of stages, got {listed!r}")
    stages = [_stage(i, entry, configs) for i, entry in enumerate(listed, start=1)]
    _check_names(stages)
    return StageList(tuple(stages), int(rounds), Path(folder), tuple(rest), options.print_config)


def _stage(number: int, entry: Any, configs: dict[str, Path]) -> Stage:
    """Return a stage of a list, after a check of its keys."""
    if not isinstance(entry, dict):
        raise UserError(f"stage {number} of `stages` must be a mapping, got {entry!r}")
    name = entry.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"\w+", name):
        raise UserError(f"stage {number} of `stages` needs `name`, a word, got {name!r}")
    if unknown := [key for key in entry if key not in STAGE_KEYS]:
        raise UserError(
            f"stage {name!r} has no option `{unknown[0]}`; it takes {', '.join(STAGE_KEYS)}"
        )
    config = entry.get("config")
    options = entry.get("options") or []
    if not isinstance(config, str) or config not in configs:
        raise UserError(f"stage {name!r} needs `config`, its configuration, got {config!r}")
    choices = {"verb": VERBS, "when": TIMES}
    for key, values in choices.items():
        if (value := entry.get(key, values[0])) not in values:
            raise UserError(
                f"`{key}` of stage {name!r} must be one of {', '.join(values)}, got {value!r}"
            )
    if not isinstance(options, list) or not all(isinstance(word, str) for word in options):
        raise UserError(
            f"`options` of stage {name!r} must be a list of texts, such as "
            f"[--trainer.max_steps, '40'], got {options!r}"
        )
    verb, when = (entry.get(key, values[0]) for key, values in choices.items())
    earlier = (entry.get(key) or [] for key in ("from", "reference"))
    start, reference = (tuple(names if isinstance(names, list) else [names]) for names in earlier)
    return Stage(name, call(configs[config]), verb, start, reference, when, tuple(options))


def _check_names(stages: Sequence[Stage]) -> None:
    """Refuse two stages of one name, and names of stages that do not exist or do not train."""
    verbs: dict[str, str] = {}
    for stage in stages:
        if stage.name in verbs:
            raise UserError(f"two stages are called {stage.name!r}: give each a name")
        verbs[stage.name] = stage.verb
    for stage in stages:
        variables = [name for word in stage.options for name in VARIABLE.findall(word)]
        names = [name.removeprefix("stages.") for name in variables if name != "round"]
        for name in (*stage.start, *stage.reference, *names):
            if not isinstance(name, str) or name not in verbs:
                raise UserError(
                    f"stage {stage.name!r} names {name!r}, which is no stage; there are "
                    f"{', '.join(verbs)}"
                )
        for name in (*stage.start, *stage.reference):
            if verbs[name] != "fit":
                takes = "starts from" if name in stage.start else "has the reference"
                raise UserError(
                    f"stage {stage.name!r} {takes} {name!r}, which writes no checkpoint: its "
                    f"verb is `{verbs[name]}`"
                )
