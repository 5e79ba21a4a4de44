"""The command line: `lightning-mpo fit -c configs/experiment/quickstart.yaml`."""

from __future__ import annotations

import sys

import lightning_mpo

HELP = """\
usage: lightning-mpo {fit,validate,test,predict} -c CONFIG [-c CONFIG ...] [--key value ...]
       lightning-mpo predict --model FOLDER --data FILE.jsonl [--out FILE]
       lightning-mpo export -c CONFIG --checkpoint FILE --to FOLDER [--form adapter|merged|full]
       lightning-mpo verify-resume -c CONFIG [...] [--updates N] [--kill PHASE:N]
       lightning-mpo methods [--configs DIR] [--readme FILE]
       lightning-mpo plan -c CONFIG [--gpu-gib GIB] [--check]

RL post-training of language models in which what counts as one action is a choice.

  fit        train
  validate   sample held-out prompts and report pass@1
  test       the same under the name `test`
  predict    sample completions
  export     write a checkpoint's policy as a Hugging Face folder, load it again and compare
  methods    print the algorithm files as a table: choices, papers, values and where they come from
  plan       predict the peak memory of a run by part; say what fits a GPU; measure two rollouts beside it

  verify-resume
             kill a run of the configuration, let it go on, and compare it with an undisturbed one, bit for bit

  -c FILE           a YAML file; later files win, key by key, and the command line wins over files. It names classes to
                    build, so it is code: run only what you have read. Exported folders hold none.
  --print_config    show the resulting configuration and stop
  --help            after a verb: every option

examples:
  lightning-mpo fit -c configs/experiment/quickstart.yaml
  lightning-mpo fit -c configs/experiment/quickstart.yaml -c configs/algorithm/gspo.yaml
  lightning-mpo fit -c configs/experiment/smollm2_svamp.yaml --trainer.max_steps 80
"""


def main() -> int:
    """Run the command line; return the exit code."""
    arguments = sys.argv[1:]
    if not arguments or arguments[0] in ("-h", "--help"):
        print(HELP)
        return 0
    if arguments[0] == "--version":
        print(f"lightning-mpo {lightning_mpo.__version__}")
        return 0
    if arguments[0] == "methods":
        from lightning_mpo import methods

        return methods.main(arguments[1:])
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

    return run()


if __name__ == "__main__":
    sys.exit(main())
