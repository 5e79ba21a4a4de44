"""From a command line to the file of its verb."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

import lightning_mpo
from lightning_mpo.cli.verbs import TRAINER_VERBS, VERBS

HELP = """\
usage: lightning-mpo {fit,validate,test,predict} -c NAME [-c NAME ...] [--key value ...]
       lightning-mpo predict --model FOLDER --data FILE.jsonl [--out FILE]
       lightning-mpo configs [copy NAME [DEST] | show NAME]
       lightning-mpo export -c NAME --checkpoint FILE --to FOLDER [--form adapter|merged|full]
       lightning-mpo verify-resume -c NAME [...] [--updates N] [--kill PHASE:N | --kills N]
       lightning-mpo methods [--configs DIR] [--page FILE]
       lightning-mpo plan -c NAME [--gpu-gib GIB] [--check]

RL post-training of language models; one action may be a token, a block of tokens or a whole response.

  fit        train
  validate   sample held-out prompts and report pass@1
  test       the same under the name `test`
  predict    sample completions
  configs    list the recipes of the package; print one, or copy one to change it
  export     write a checkpoint's policy as a Hugging Face folder, load it again and compare
  methods    print the algorithms as a table: choices, papers, values and their sources
  plan       predict the peak memory of a run by part and whether it fits a GPU; measure two rollouts

  verify-resume
             kill a run of the configuration, resume it, and compare it bit for bit with an undisturbed one

  -c NAME           a recipe, or a YAML file; later ones win, key by key, and an option wins over the files in front
                    of it. A file names classes to build, so it is code: run only files that you have read. Exported
                    folders are data.
  --print_config    show the resulting configuration and stop
  --help            after a verb: every option

examples:
  lightning-mpo fit -c quickstart
  lightning-mpo fit -c quickstart -c gspo
  lightning-mpo fit -c smollm2_svamp --trainer.max_steps 80
"""

PROCESS = (
    *(
        "RANK",
        "LOCAL_RANK",
        "NODE_RANK",
        "GROUP_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "JSM_NAMESPACE_RANK",
    ),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS"),
)
"""Variables of the environment that launchers set, all of them whole numbers."""


OF_CONFIGURATIONS = (
    *("-c", "--config", "--model.", "--data.", "--trainer"),
    *("--ckpt_path", "--include", "--print_config"),
)
"""How options of a configuration begin."""


def main(arguments: Sequence[object] | None = None) -> int:
    """Do as `run`; Ctrl-C ends in one line."""
    try:
        return run(arguments)
    except KeyboardInterrupt:  # a fit that has begun says more, and exits by itself
        print("lightning-mpo: stopped by Ctrl-C", file=sys.stderr)
        return 130


def run(arguments: Sequence[object] | None = None) -> int:
    """Run a command line; a mistake of the user's prints one line and returns 2.

    Args:
        arguments: such as `["fit", "-c", "quickstart"]`; None: those of the process.

    Returns:
        the exit code.
    """
    words = sys.argv[1:] if arguments is None else [str(word) for word in arguments]
    import_from_here()
    # what needs no import
    if not words or words[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if words[0] == "--version":
        print(f"lightning-mpo {lightning_mpo.__version__}")
        return 0
    wrong = next((name for name in PROCESS if not os.environ.get(name, "0").isdecimal()), None)
    if wrong is not None:  # the import of Lightning would end in a traceback
        return _fail(
            f"the environment variable {wrong} is {os.environ[wrong]!r}, which is no number of a process: "
            "unset it, or start the run with a launcher, such as torchrun or srun, which sets it"
        )
    if words[0] not in VERBS:
        from lightning_mpo.cli.messages import suggest

        return _fail(
            f"no verb {words[0]!r}{suggest(words[0], VERBS) or '; there are ' + ', '.join(VERBS)}"
        )
    # each verb is imported when it is called, as torch and Lightning take seconds
    if words[0] == "predict" and takes_model_folder(words[1:]):
        from lightning_mpo.cli import predict

        return predict.main(words[1:])
    if words[0] in TRAINER_VERBS:
        from lightning_mpo.cli import fit

        return fit.main(words)
    verb = importlib.import_module(f"lightning_mpo.cli.{words[0].replace('-', '_')}")
    return int(verb.main(words[1:]))


def takes_model_folder(arguments: Sequence[str]) -> bool:
    """Return whether `predict` has no option of a configuration, and so wants `--model FOLDER`."""
    return not any(argument.startswith(OF_CONFIGURATIONS) for argument in arguments)


def import_from_here() -> None:
    """Make modules of the working folder importable, as `python -m` does, for rewards given by import path.

    An empty entry is not enough: a file is parsed in its folder.
    """
    try:
        here = os.getcwd()
    except OSError:  # the folder is gone
        return
    if not sys.flags.safe_path and here not in sys.path:
        sys.path.insert(0, here)


def _fail(message: str) -> int:
    print(f"lightning-mpo: {message}", file=sys.stderr)
    return 2
