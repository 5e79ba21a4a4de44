"""`lightning-mpo predict --model FOLDER --data FILE`: complete prompts with a model folder.

No code of the folder is run.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L

from lightning_mpo.callbacks import Predictions, RolloutLoop
from lightning_mpo.cli.guard import guarded
from lightning_mpo.cli.settings import ORDERS, SHOW_ORDER
from lightning_mpo.cli.suggestions import suggest
from lightning_mpo.data import PromptFile
from lightning_mpo.errors import UserError
from lightning_mpo.export.usage import TOP, USAGE, Usage, prompt_options
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.objective.action_spaces import TokenActions
from lightning_mpo.objective.advantages import GroupRelative, ReturnToGo
from lightning_mpo.objective.likelihoods import Denoising
from lightning_mpo.objective.objective import Objective
from lightning_mpo.objective.reductions import TokenMean
from lightning_mpo.objective.selection import AllTokens
from lightning_mpo.objective.supports import FullVocabulary
from lightning_mpo.objective.surrogates import PolicyGradient


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo predict --model`; return the exit code, 2 after a mistake."""
    parser = _parser()

    def action() -> None:
        options, rest = parser.parse_known_args(arguments)
        if rest:
            known = [name for option in parser._actions for name in option.option_strings]
            name = rest[0].partition("=")[0]
            raise UserError(f"`predict --model` has no option `{name}`{suggest(name, known)}")
        missing = [f"--{name}" for name in ("model", "data") if not getattr(options, name)]
        if missing:
            raise UserError(
                f"`predict` needs {' and '.join(missing)}: lightning-mpo predict --model FOLDER "
                "--data FILE.jsonl (or a configuration of your own: -c FILE)"
            )
        predict(options)

    return guarded(action)


def _parser() -> argparse.ArgumentParser:
    # model and prompts
    parser = argparse.ArgumentParser(
        prog="lightning-mpo predict",
        description="Complete the prompts of a file with an exported folder or another model "
        "folder. No code of the folder is run. With a configuration of your own (-c FILE), "
        "`predict` uses that instead; `predict -c FILE --help` lists its options.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="an exported folder, or another model as in `policy.source`",
    )
    parser.add_argument("--data", metavar="FILE", help='JSON lines: {"prompt": "…"}')
    parser.add_argument(
        "--out", metavar="FILE", help="file to write (default: completions/predictions.jsonl)"
    )
    parser.add_argument(
        "--prompt",
        default="prompt",
        metavar="COLUMN",
        help="column of the prompts (default: prompt)",
    )
    parser.add_argument(
        "--base",
        metavar="SOURCE",
        help="base model of adapters, in place of the one that the folder names",
    )
    parser.add_argument("--show-order", action="store_true", help=SHOW_ORDER)
    # sampling
    parser.add_argument(
        "--rollout.max_new_tokens", "--max_new_tokens", dest="max_new_tokens", type=int, metavar="N"
    )
    parser.add_argument(
        *("--rollout.validation_completions", "--completions"),
        dest="completions",
        type=int,
        default=1,
        metavar="N",
        help="completions per prompt (default: 1)",
    )
    parser.add_argument("--temperature", type=float, metavar="T")
    parser.add_argument("--seed_everything", "--seed", dest="seed", type=int, metavar="N")
    parser.add_argument(
        "--batch_size", type=int, default=32, metavar="N", help="prompts at a time (default: 32)"
    )
    parser.add_argument(
        "--accelerator", default="auto", choices=("auto", "cpu", "gpu", "cuda", "mps")
    )
    return parser


def predict(options: argparse.Namespace) -> None:
    """Write completions of prompts.

    Args:
        options: parsed options of the command line.

    Raises:
        UserError: an option, the folder or the file is wrong.
    """
    # the folder's options, and those of the command line, which win
    folder = Path(options.model).expanduser()
    usage = read_usage(folder, options.model)
    temperature = number_of(options, "temperature", usage.temperature)
    max_new_tokens = number_of(options, "max_new_tokens", usage.max_new_tokens)
    seed = number_of(options, "seed", usage.seed)
    for name in ("completions", "batch_size"):
        if getattr(options, name) < 1:
            raise UserError(f"`--{name}` must be at least 1, got {getattr(options, name)}")
    _check_out(options)
    # the policy and the prompts
    policy = usage.policy(str(folder) if folder.is_dir() else options.model, options.base)
    if usage.form == "adapter":
        print(f"base       {policy.source}{'' if options.base else ', as the folder says'}")
    known = prompt_options()
    prompts = PromptFile(
        options.data,
        prompt=options.prompt,
        validation_batch_size=options.batch_size,
        **{name: value for name, value in usage.prompt.items() if name in known},
    )
    # sample
    L.seed_everything(seed, verbose=False)
    loop = RolloutLoop(
        max_new_tokens=max_new_tokens,
        validation_completions=options.completions,
        sampler=usage.sampler(),
    )
    predictions = Predictions(options.out, ORDERS if options.show_order else 0)
    trainer = _trainer(options.accelerator, [loop, predictions])
    trainer.predict(
        PolicyOptimization(policy, _plain_objective(policy.masked), temperature=temperature),
        datamodule=prompts,
        return_predictions=False,
    )


def read_usage(folder: Path, name: str) -> Usage:
    """Return the options of an exported folder; other model folders and hub ids have defaults."""
    if not folder.is_dir():
        return Usage()
    usage = Usage.read(folder)
    if (folder / USAGE).exists():
        return usage
    if (folder / "adapter_config.json").is_file():
        raise UserError(
            f"`--model` {name!r} holds adapters without {USAGE}: export it again, or give `-c` "
            "with a configuration of your own and `policy.checkpoint`"
        )
    has_old_file = (folder / "lightning_mpo.yaml").exists()
    old = " (lightning_mpo.yaml is a configuration, and is not read)" if has_old_file else ""
    print(
        f"note       {folder} has no {USAGE}{old}: sampling at temperature 1, at most 256 tokens, "
        "unless options set others"
    )
    return usage


def _plain_objective(masked: bool) -> Objective:
    """Return an objective that samples from the whole vocabulary; nothing is trained with it."""
    return Objective(
        FullVocabulary(),
        TokenActions(),
        GroupRelative() if masked else ReturnToGo(),
        PolicyGradient(),
        AllTokens(),
        TokenMean(),
        likelihood=Denoising() if masked else None,
    )


def _trainer(accelerator: str, callbacks: list[L.Callback]) -> L.Trainer:
    """Return a trainer on one device, without logger and checkpoints."""
    try:
        return L.Trainer(
            accelerator=accelerator,
            devices=1,
            logger=False,
            enable_checkpointing=False,
            default_root_dir=os.curdir,
            callbacks=callbacks,
        )
    except (ValueError, RuntimeError) as error:  # MisconfigurationException is one of the two
        raise UserError(f"`--accelerator {accelerator}`: {str(error).splitlines()[0]}") from error


def number_of(options: argparse.Namespace, name: str, default: Any) -> Any:
    """Return an option of the command line, or the default if it is not given."""
    value = getattr(options, name)
    check, kind = TOP[name]
    if value is not None and not check(value):
        raise UserError(f"`--{name}` must be {kind}, got {value}")
    return default if value is None else value


def _check_out(options: argparse.Namespace) -> None:
    """Refuse an output that is a folder, the file of the prompts, or not a regular file."""
    if options.out is None:
        return
    out = Path(options.out)
    if out.is_dir():
        raise UserError(f"`--out` {options.out!r} is a folder; name a file")
    if out.resolve() == Path(options.data).expanduser().resolve():
        raise UserError(f"`--out` {options.out!r} is the file of the prompts; name another")
    if out.exists() and not out.is_file():
        raise UserError(f"`--out` {options.out!r} is not a regular file; name another")
