"""From a command line to the file of its verb."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import lightning_mpo
from lightning_mpo.cli.verbs import TRAINER_VERBS, VERBS
from lightning_mpo.errors import print_mistake

HELP = """\
usage: lightning-mpo {fit,validate,test,predict} -c NAME [-c NAME ...] [--key value ...]
       lightning-mpo predict --model FOLDER --data FILE.jsonl [--out FILE] [--show-order]
       lightning-mpo evaluate --model FOLDER --benchmarks NAME ... [--out DIR] [--against DIR]
       lightning-mpo compare FILE.jsonl FILE.jsonl
       lightning-mpo shift BASE TRAINED [--reward NAME --threshold X] [--benchmark NAME]
       lightning-mpo sift FILE.jsonl --problems NAME --to FILE.jsonl [--most N]
       lightning-mpo dissect FILE.jsonl --model FOLDER [--analyses NAME ...] [--out DIR]
       lightning-mpo dissect --annotate gsm8k --to FILE.jsonl [--path DIR]
       lightning-mpo configs [copy NAME [DEST] | show NAME]
       lightning-mpo export -c NAME --checkpoint FILE --to FOLDER [--form adapter|merged|full]
       lightning-mpo verify-resume -c NAME [...] [--updates N] [--kill PHASE:N | --kills N]
       lightning-mpo methods [--configs DIR] [--page FILE]
       lightning-mpo plan -c NAME [--gpu-gib GIB] [--check]
       lightning-mpo annotate {-c NAME --checkpoint FILE --to FOLDER | --strip FOLDER --to FOLDER}
       lightning-mpo rewards-check -c NAME [--rows N] [--seconds S] [--share X] [--form TEXT]

RL post-training of language models. One action may be a token, a block of tokens or a whole
response.

  fit            train
  validate       sample completions of held-out prompts and report pass@k with intervals
  test           do the same under the name `test`
  predict        sample completions and write them to a file
  evaluate       answer benchmarks with an exported folder, a hub model or a checkpoint
  sift           write the problems that no try of an evaluation solved as rows to train on
  dissect        measure plans, knowledge and chains of subproblems on annotated problems
  compare        print the paired difference of two evaluations
  shift          print which problems training won and lost, from answers or two checkpoints
  configs        list the recipes of the package, print one, or copy one to change it
  export         write a checkpoint's policy as a Hugging Face folder, load it again and compare
  verify-resume  kill a run, resume it, and compare it bit for bit with an undisturbed run
  methods        print the algorithms as a table: choices, papers, values and their sources
  plan           predict the peak memory of a run, and whether it fits a GPU
  annotate       write thoughts of a model into Python files, or take them out again
  rewards-check  try the rewards of a run on right, wrong, cut-off and hostile answers

  -c NAME           a recipe or a YAML file. Later files win over earlier ones, key by key, and an
                    option wins over the files in front of it. A file names classes that are built,
                    so it is code: run only files that you have read. Exported folders are data.
  --print_config    show the resulting configuration and stop
  --help            after a verb: list its options

examples:
  lightning-mpo fit -c quickstart
  lightning-mpo fit -c quickstart -c gspo
  lightning-mpo fit -c smollm2_svamp --trainer.max_steps 80
"""
LAUNCHER_VARIABLES = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"),
    *("JSM_NAMESPACE_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS"),
)
"""Environment variables of launchers. Each holds a whole number."""
CONFIGURATION_OPTIONS = (
    *("-c", "--config", "--model.", "--data.", "--trainer"),
    *("--ckpt_path", "--include", "--print_config"),
)
"""Beginnings of options that belong to a configuration."""


def main(arguments: Sequence[object] | None = None) -> int:
    """Run a command line as `run` does; after Ctrl-C, one line is printed.

    Args:
        arguments: such as `["fit", "-c", "quickstart"]`; None: those of the process.
    """
    try:
        return run(arguments)
    except KeyboardInterrupt:  # a fit that has begun handles it before
        print("lightning-mpo: stopped by Ctrl-C", file=sys.stderr)
        return 130


def run(arguments: Sequence[object] | None = None) -> int:
    """Run a command line.

    Args:
        arguments: such as `["fit", "-c", "quickstart"]`; None: those of the process.

    Returns:
        The exit code: 2 after a mistake of the user, for which one line is printed.
    """
    words = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    make_working_folder_importable()
    # answers that need no import
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if words[0] == "--version":
        print(f"lightning-mpo {lightning_mpo.__version__}")
        return 0
    # variables on which the import of Lightning would end in a traceback
    invalid = next(
        (name for name in LAUNCHER_VARIABLES if not os.environ.get(name, "0").isdecimal()), None
    )
    if invalid is not None:
        return print_mistake(
            f"the environment variable {invalid} is {os.environ[invalid]!r}, which is not the "
            "number of a process: unset it, or start the run with a launcher, such as torchrun or "
            "srun, which sets it"
        )
    if words[0] not in VERBS:
        from lightning_mpo.cli.suggestions import suggest

        hint = suggest(words[0], VERBS) or f"; there are {', '.join(VERBS)}"
        return print_mistake(f"no verb {words[0]!r}{hint}")
    # a verb is imported when it is called, as torch and Lightning take seconds
    if words[0] == "predict" and takes_model_folder(words[1:]):
        from lightning_mpo.cli import predict

        return predict.main(words[1:])
    if words[0] in TRAINER_VERBS:
        from lightning_mpo.cli import fit

        return fit.main(words)
    verb = importlib.import_module(f"lightning_mpo.cli.{words[0].replace('-', '_')}")
    return int(verb.main(words[1:]))


def takes_model_folder(arguments: Sequence[str]) -> bool:
    """Return whether `predict` has no option of a configuration, so that it needs `--model`."""
    return not any(argument.startswith(CONFIGURATION_OPTIONS) for argument in arguments)


def make_working_folder_importable() -> None:
    """Make modules of the working folder importable, as `python -m` does.

    Rewards are given by import path. An empty entry of `sys.path` is not enough, as a file is
    parsed in its own folder.
    """
    try:
        here = os.getcwd()
    except OSError:  # the folder was deleted
        return
    if not sys.flags.safe_path and here not in sys.path:
        sys.path.insert(0, here)
