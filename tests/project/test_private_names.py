"""Private names of other packages that this one reads: each is there, so that a break under a new version names itself.

Every test is called after the name it looks for. Another test walks the code and sees that the list is whole.
"""

from __future__ import annotations

import ast
import importlib
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch

ROOT = Path(__file__).parents[2]
FILES = sorted(
    [path for path in (ROOT / "lightning_mpo").rglob("*.py") if "callbacks" not in path.parts]
)
FILES += sorted((ROOT / "callbacks").glob("*.py"))
FOREIGN = (
    "torch",
    "lightning",
    "transformers",
    "peft",
    "jsonargparse",
    "bitsandbytes",
    "datasets",
    "torchmetrics",
)
STANDARD = {"_replace", "_exit", "_current_frames", "_actions", "_asdict", "_run_exitfuncs"}
"""Of the standard library."""


def trainer() -> Any:
    return L.Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
    )


def model_parallel() -> Any:
    from lightning.pytorch.strategies import ModelParallelStrategy

    return ModelParallelStrategy()


def config() -> Any:
    from transformers import LlamaConfig

    return LlamaConfig(attn_implementation="sdpa")


def decoder() -> Any:
    from transformers import PreTrainedModel

    return PreTrainedModel


def checkpoint() -> Any:
    from lightning.pytorch.callbacks import ModelCheckpoint

    return ModelCheckpoint()


def csv_logger() -> Any:
    from lightning.pytorch.loggers import CSVLogger

    return CSVLogger("none")


def schedule() -> Any:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    constant = torch.optim.lr_scheduler.ConstantLR(optimizer)
    return torch.optim.lr_scheduler.SequentialLR(optimizer, [constant, constant], [1])


def metadata() -> Any:
    from torch.distributed.checkpoint import metadata

    return metadata


def progress_bar() -> Any:
    from lightning.pytorch.callbacks import RichProgressBar

    return RichProgressBar


def command_line() -> Any:
    from lightning.pytorch.cli import LightningCLI

    return LightningCLI


ATTRIBUTES: dict[str, tuple[str, Callable[[], Any], str]] = {
    "_MEM_FORMAT_ENCODING": ("torch", metadata, "_MEM_FORMAT_ENCODING"),
    "_accelerator_connector": ("lightning", trainer, "_accelerator_connector.cluster_environment"),
    "_attn_implementation": ("transformers", config, "_attn_implementation"),
    "_supports_sdpa": ("transformers", decoder, "_supports_sdpa"),
    "_is_stateful": ("transformers", decoder, "_is_stateful"),
    "_callback_metrics": ("lightning", trainer, "_logger_connector._callback_metrics"),
    "_cdata": ("torch", lambda: torch.zeros(1).untyped_storage(), "_cdata"),
    "_checkpoint_connector": ("lightning", trainer, "_checkpoint_connector.restore_training_state"),
    "_data_fetcher": ("lightning", trainer, "fit_loop._data_fetcher"),
    "_experiment": ("lightning", csv_logger, "_experiment"),
    "_flush_logs_every_n_steps": ("lightning", csv_logger, "_flush_logs_every_n_steps"),
    "_fs": ("lightning", csv_logger, "_fs"),
    "_get_default_store": (
        "torch",
        lambda: torch.distributed,
        "distributed_c10d._get_default_store",
    ),
    "_get_train_description": ("lightning", progress_bar, "_get_train_description"),
    "_is_mkldnn_bf16_supported": ("torch", lambda: torch.ops.mkldnn, "_is_mkldnn_bf16_supported"),
    "_is_mkldnn_fp16_supported": ("torch", lambda: torch.ops.mkldnn, "_is_mkldnn_fp16_supported"),
    "_keys_to_ignore_on_load_unexpected": (
        "transformers",
        decoder,
        "_keys_to_ignore_on_load_unexpected",
    ),
    "_last_checkpoint_saved": ("lightning", checkpoint, "_last_checkpoint_saved"),
    "_last_global_step_saved": ("lightning", checkpoint, "_last_global_step_saved"),
    "_loaded_checkpoint": ("lightning", trainer, "_checkpoint_connector._loaded_checkpoint"),
    "_local_scalar_dense": ("torch", lambda: torch.ops.aten, "_local_scalar_dense.default"),
    "_logger_connector": ("lightning", trainer, "_logger_connector.log_metrics"),
    "_monitor_candidates": ("lightning", checkpoint, "_monitor_candidates"),
    "_no_split_modules": ("transformers", decoder, "_no_split_modules"),
    "_parse_ckpt_path": ("lightning", command_line, "_parse_ckpt_path"),
    "_parser": ("lightning", command_line, "_parser"),
    "_results": ("lightning", trainer, "fit_loop.epoch_loop._results"),
    "_run_subcommand": ("lightning", command_line, "_run_subcommand"),
    "_save_checkpoint": ("lightning", checkpoint, "_save_checkpoint"),
    "_save_distributed_checkpoint": ("lightning", model_parallel, "_save_distributed_checkpoint"),
    "_save_last_checkpoint": ("lightning", checkpoint, "_save_last_checkpoint"),
    "_schedulers": ("torch", schedule, "_schedulers"),
    "_should_accumulate": (
        "lightning",
        trainer,
        "fit_loop._should_accumulate fit_loop.epoch_loop._should_accumulate",
    ),
    "_should_check_val_fx": ("lightning", trainer, "fit_loop.epoch_loop._should_check_val_fx"),
    "_should_skip_saving_checkpoint": ("lightning", checkpoint, "_should_skip_saving_checkpoint"),
    "_signal_connector": ("lightning", trainer, "_signal_connector.received_sigterm"),
    "_version": ("lightning", csv_logger, "_version"),
}
"""By name: the package, something that has it, and the paths from there."""


def parse(path: Path) -> ast.AST:
    return ast.parse(path.read_text())


def private(name: str) -> bool:
    return bool(re.match(r"_[a-zA-Z]", name))


def imported() -> set[str]:
    """Return the dotted private names that are imported from other packages."""
    found: set[str] = set()
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] in FOREIGN:
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if any(map(private, name.split(".")))}


def defined() -> set[str]:
    """Return every private name that the package itself defines."""
    found: set[str] = set()
    for path in FILES:
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found |= {node.attr} if ast.unparse(node.value) == "self" else set()
    return found


def read() -> Iterator[tuple[str, str]]:
    """Yield where a private attribute is read that the package does not define, and the attribute."""
    own = defined()
    for path in FILES:
        for node in ast.walk(parse(path)):
            if (
                isinstance(node, ast.Attribute)
                and private(node.attr)
                and node.attr not in own | STANDARD
            ):
                yield f"{path.name}:{node.lineno}", node.attr
            elif (
                isinstance(node, ast.Call)
                and ast.unparse(node.func) in ("getattr", "hasattr")
                and len(node.args) > 1
            ):
                name = node.args[1].value if isinstance(node.args[1], ast.Constant) else ""
                if private(str(name)) and name not in own:
                    yield f"{path.name}:{node.lineno}", str(name)


@pytest.mark.parametrize("name", sorted(imported()))
def test_a_private_import(name):
    module, _, attribute = name.rpartition(".")
    assert hasattr(importlib.import_module(module), attribute), f"{module} has no {attribute}"


@pytest.mark.parametrize("name", sorted(ATTRIBUTES))
def test_a_private_attribute(name):
    package, make, paths = ATTRIBUTES[name]
    for path in paths.split():
        value = make()
        for part in path.split("."):
            assert hasattr(value, part), (
                f"{package}: {type(value).__name__} has no {part} (on the way to {path})"
            )
            value = getattr(value, part)


def test_the_list_is_whole():
    missing = {name: place for place, name in read() if name not in ATTRIBUTES}
    assert not missing, f"private names of other packages that `ATTRIBUTES` lacks: {missing}"
    words = {word for path in FILES for word in re.findall(r"\w+", path.read_text())}
    assert set(ATTRIBUTES) <= words, f"nothing reads {set(ATTRIBUTES) - words}"


def test_the_walk_finds_what_is_read():
    assert "torch.serialization._get_layout" in imported()
    assert {"_signal_connector", "_schedulers", "_fs"} <= {name for _, name in read()}
