"""The command line: `lightning-mpo fit -c quickstart`."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import lightning_mpo

HELP = """\
usage: lightning-mpo {fit,validate,test,predict} -c NAME [-c NAME ...] [--key value ...]
       lightning-mpo predict --model FOLDER --data FILE.jsonl [--out FILE]
       lightning-mpo configs [copy NAME [DEST] | show NAME]
       lightning-mpo export -c NAME --checkpoint FILE --to FOLDER [--form adapter|merged|full]
       lightning-mpo verify-resume -c NAME [...] [--updates N] [--kill PHASE:N | --kills N]
       lightning-mpo methods [--configs DIR] [--readme FILE]
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

  -c NAME           a recipe, or a YAML file; later ones win, key by key, and the command line wins over files. A file
                    names classes to build, so it is code: run only files that you have read. Exported folders are data.
  --print_config    show the resulting configuration and stop
  --help            after a verb: every option

examples:
  lightning-mpo fit -c quickstart
  lightning-mpo fit -c quickstart -c gspo
  lightning-mpo fit -c smollm2_svamp --trainer.max_steps 80
"""

PROCESS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "JSM_NAMESPACE_RANK"),
    *("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID", "SLURM_NTASKS"),
)
"""Variables of the environment that launchers set, all of them whole numbers."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command line, of this process or as given; return the exit code."""
    try:
        return _main(arguments)
    except KeyboardInterrupt:  # a fit that has begun says more, and exits by itself
        print("lightning-mpo: stopped by Ctrl-C", file=sys.stderr)
        return 130


def _main(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    import_from_here()
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if arguments[0] == "--version":
        print(f"lightning-mpo {lightning_mpo.__version__}")
        return 0
    wrong = next((name for name in PROCESS if not os.environ.get(name, "0").isdecimal()), None)
    if wrong is not None:  # the import of Lightning would end in a traceback
        print(
            f"lightning-mpo: the environment variable {wrong} is {os.environ[wrong]!r}, which is no number of a process: "
            "unset it, or start the run with a launcher, such as torchrun or srun, which sets it",
            file=sys.stderr,
        )
        return 2
    if arguments[0] == "methods":
        from lightning_mpo import methods

        return methods.main(arguments[1:])
    if arguments[0] == "configs":
        from lightning_mpo import recipes_command

        return recipes_command.main(arguments[1:])
    if arguments[0] == "export":
        from lightning_mpo import export_command

        return export_command.main(arguments[1:])
    if arguments[0] == "verify-resume":
        from lightning_mpo import verify_resume

        return verify_resume.main(arguments[1:])
    if arguments[0] == "plan":
        from lightning_mpo.plan import command

        return command.main(arguments[1:])
    if arguments[0] == "predict":
        from lightning_mpo import predict_command

        if predict_command.wanted(arguments[1:]):
            return predict_command.main(arguments[1:])
    from lightning_mpo.cli import run

    return run(arguments)


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


if __name__ == "__main__":
    sys.exit(main())
