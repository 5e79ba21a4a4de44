"""`lightning-mpo export`: a checkpoint's policy as a Hugging Face folder."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from lightning_mpo.cli.guard import guarded
from lightning_mpo.cli.parser import CLI, OPTIONS
from lightning_mpo.data.base import PromptDataModule
from lightning_mpo.errors import UserError
from lightning_mpo.export import Origin, Sampling, check_form, check_target, export, part_of
from lightning_mpo.export.origin import read_summary
from lightning_mpo.export.verify import Check
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.reference import SOURCE
from lightning_mpo.recipes import find
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.storage import read_checkpoint
from lightning_mpo.types import PromptBatch, PromptRow

COMPARED = 8
"""Prompts on which policy and reloaded model are compared."""


class Reader(CLI):
    """Builds module and data of a configuration, but no trainer: devices may be missing here."""

    def before_instantiate_classes(self) -> None:
        config = self.config[self.subcommand]
        config["ckpt_path"] = None
        for name in ("callbacks", "logger", "plugins", "profiler"):
            config["trainer"][name] = None
        super().before_instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Any:
        return None

    def _run_subcommand(self, subcommand: str) -> None:
        return

    @property
    def configuration(self) -> dict[str, Any]:
        """The complete configuration as plain values."""
        return yaml.safe_load(
            self._parser(self.subcommand).dump(self.config[self.subcommand], skip_none=False)
        )


def main(arguments: Sequence[str]) -> int:
    """Run `lightning-mpo export`.

    Returns:
        The exit code: 1 if the written folder differs from the policy, 2 after a mistake.
    """
    outcome: list[int] = []

    def action() -> None:
        options, rest = _parser().parse_known_args(arguments)
        missing = [f"--{name}" for name in ("checkpoint", "to") if getattr(options, name) is None]
        if missing:
            raise UserError(
                f"`export` needs {' and '.join(missing)}: lightning-mpo export -c CONFIG "
                "--checkpoint FILE --to FOLDER"
            )
        outcome.append(_export(options, rest))

    return guarded(action) or outcome[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lightning-mpo export",
        description="Write a checkpoint's policy as a Hugging Face folder, load it again as a user "
        "would, and compare log-probs and greedy texts.",
        epilog="Options of the configuration go on the command line as for the other verbs, such "
        "as --model.temperature 0.7.",
        exit_on_error=False,
        allow_abbrev=False,
    )
    # the run
    parser.add_argument(
        "--checkpoint",
        type=Path,
        metavar="FILE",
        help="a Lightning checkpoint, a file or a folder, such as runs/…/last.ckpt",
    )
    parser.add_argument(
        "-c",
        "--config",
        action="append",
        metavar="FILE",
        help="configuration of the run: config.yaml in its folder. It is code: read it first",
    )
    # the folder to write
    parser.add_argument(
        "--to", type=Path, metavar="FOLDER", help="the folder to write; it must be empty or new"
    )
    parser.add_argument(
        "--form",
        choices=("adapter", "merged", "full"),
        help="adapter: for peft; merged: added to the unquantised base; full: all weights. "
        "Default: adapter with LoRA, else full",
    )
    parser.add_argument(
        "--dtype",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="type of merged weights (default: bfloat16)",
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace the files of an earlier export"
    )
    return parser


def _export(options: argparse.Namespace, rest: list[str]) -> int:
    """Export a policy and compare it with the written folder; return the exit code."""
    # module and data of the configuration, with the weights of the checkpoint
    stored = read_checkpoint(options.checkpoint, "`--checkpoint`", part="outline")
    configs = options.config or no_config("export", options.checkpoint)
    cli, policy = read_run("export", configs, options.checkpoint, rest)
    form: Any = options.form or ("full" if policy.lora is None else "adapter")
    check_form(policy, form)
    # refuse a wrong folder before the model is loaded
    try:
        policy.check()
        prompts, data = _prompts(policy, cli.datamodule)
        check_target(options.to, options.overwrite, "add --overwrite")
        policy.build(device=torch.device("cpu"), reference=False)
    except UserError as error:
        raise UserError(str(error).replace("`policy.checkpoint`", "`--checkpoint`")) from error
    # write, load again and compare
    origin = Origin(
        cli.configuration,
        stored.get("global_step"),
        _rollouts(stored),
        read_summary(find(configs[-1]).parent),
    )
    check, notes = export(
        policy,
        options.to,
        form,
        prompts,
        dtype=options.dtype,
        sampling=sampling_of(cli),
        origin=origin,
        data=data,
    )
    return _report(check, notes, form, options.to)


def read_run(
    verb: str,
    configs: Sequence[str],
    checkpoint: Path | None,
    rest: Sequence[str],
    reference: bool = False,
) -> tuple[Reader, LoadedPolicy]:
    """Return the parts of a configuration, and its policy with a checkpoint to load.

    Args:
        verb: for messages.
        configs: files or names of recipes.
        checkpoint: its weights are loaded when the policy is built. None: the model without
            training.
        rest: further options of the configuration.
        reference: whether the verb builds the reference where a support ranks with it.

    Raises:
        UserError: the policy is of another kind.
    """
    arguments = ["predict", *(part for path in configs for part in ("-c", path)), *rest]
    cli = Reader(**OPTIONS | {"args": arguments})
    policy = cli.model.policy
    if not isinstance(policy, LoadedPolicy):
        raise UserError(
            f"`{verb}` takes a `CausalPolicy` or a `MaskedPolicy`, got {type(policy).__name__}: "
            "save the weights of another policy yourself"
        )
    # the reference of the run is what it was before the checkpoint; else its file may be gone
    first = policy.reference_checkpoint or policy.checkpoint or SOURCE
    policy.reference_checkpoint = first if reference and _ranks_with_one(cli.model) else None
    policy.checkpoint = None if checkpoint is None else str(checkpoint)
    policy.critic = None
    return cli, policy


def _ranks_with_one(module: Any) -> bool:
    """Return whether the support of a run ranks with a reference."""
    support = getattr(getattr(module, "objective", None), "support", None)
    return support is not None and support.from_reference


def sampling_of(cli: Reader) -> Sampling:
    """Return the sampling options of the run."""
    rollout = cli.config_init[cli.subcommand].get("rollout")
    # a supervised stage of a masked policy has a canvas
    canvas = getattr(getattr(cli.model, "likelihood", None), "canvas", None) or 256
    return Sampling(
        temperature=getattr(cli.model, "temperature", 1.0),
        max_new_tokens=rollout.max_new_tokens if rollout else canvas,
        support=getattr(getattr(cli.model, "objective", None), "support", None),
        sampler=rollout.sampler if rollout else None,
        stop=tuple(rollout.stop) if rollout else (),
    )


def _report(check: Check, notes: Sequence[str], form: str, to: Path) -> int:
    """Print the result of an export; return the exit code."""
    folder = part_of(to) if check.problems else to
    size = sum(path.stat().st_size for path in folder.iterdir())
    print(f"written    {form} form, {size / 2**20:.1f} MB, into {folder}")
    for note in notes:
        print(f"warning    {note}")
    if check.problems:
        print(
            f"lightning-mpo: the export in {folder} differs from the policy: {check.problems[0]}; "
            f"{to} is unchanged",
            file=sys.stderr,
        )
        return 1
    print(f"checked    loaded again and compared: {check}")
    return 0


def no_config(verb: str, checkpoint: Path) -> list[str]:
    """Ask for the configuration: it is code, and a file beside a checkpoint may be anybody's."""
    beside = [
        folder / "config.yaml"
        for folder in checkpoint.parents[:2]
        if (folder / "config.yaml").is_file()
    ]
    hint = f"-c {beside[0]}, if you trust it" if beside else "there is no config.yaml beside it"
    raise UserError(
        f"`{verb}` needs the configuration of the run that made {str(checkpoint)!r}: {hint}"
    )


def _rollouts(stored: dict[str, Any]) -> int | None:
    """Return the number of rollouts before a checkpoint; None: it is not known."""
    for name, state in stored.get("callbacks", {}).items():
        if name.startswith("RolloutLoop") and isinstance(state, dict) and state.get("ranks"):
            return state["ranks"][0].get("counter")
    return None


def _prompts(policy: LoadedPolicy, data: Any) -> tuple[PromptBatch, PromptDataModule | None]:
    """Return prompts of the run's validation data; if these cannot be read, random tokens."""
    try:
        if not isinstance(data, PromptDataModule):
            raise UserError("the configuration names no data")
        data.connect(policy.tokenizer)
        return data.encode(list(data.validation_rows or data.splits.train)[:COMPARED]), data
    except UserError as error:
        print(f"note       compared on random tokens, as the run's data cannot be had: {error}")
    ids = torch.tensor([id for id in range(policy.vocabulary) if id not in policy.barred])
    ids_PS = ids[torch.randint(len(ids), (COMPARED, 8), generator=generator_of(0, Stream.CHECK))]
    rows = tuple(PromptRow(str(policy.tokenizer.decode(ids)), "") for ids in ids_PS)
    return PromptBatch(ids_PS, torch.ones_like(ids_PS, dtype=torch.bool), rows), None
