"""Has Lightning write and read checkpoints through `storage`: whole or not there, and as data."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_only

from lightning_mpo.errors import UserError
from lightning_mpo.storage import (
    PART,
    Disk,
    Part,
    load_folder,
    locate,
    read_checkpoint,
    reading,
    remove,
    write_file,
    write_folder,
)

Check = Callable[[Any, dict[str, Any]], None]


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint under a temporary name, flushes it to disk, and renames it.

    A run that is killed meanwhile, or a full disk, leaves the checkpoint before as it was.
    (Lightning's own writer goes through the folder for temporary files, from which a file on
    another disk is copied to its place.) What is read must be what was written, and is loaded
    without running any code of the file's.

    Args:
        check: called with path and content of what was read, to refuse it before anything is
            restored.
        part: what is read of a folder.
    """

    def __init__(self, check: Check | None = None, part: Part = "all") -> None:
        self.check, self.part, self.disk = check, part, Disk()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Write a checkpoint as one file.

        Raises:
            UserError: the disk is full or the folder cannot be written.
        """
        write_file(checkpoint, Path(path), self.disk)

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return a checkpoint, of a file or a folder.

        Raises:
            UserError: it is damaged, is no checkpoint, or holds objects other than tensors and
                plain values.
        """
        return self.checked(path, read_checkpoint(path, part=self.part))

    def checked(self, path: Any, content: dict[str, Any]) -> dict[str, Any]:
        """Return the content of a checkpoint if it may be restored."""
        if self.check is not None:
            self.check(path, content)
        return content

    def remove_checkpoint(self, path: Any) -> None:
        """Remove a checkpoint; a kill meanwhile leaves it whole or without its name."""
        remove(Path(path))


def save_whole(strategy: Strategy, check: Check | None, part: Part = "all") -> None:
    """Install `AtomicCheckpointIO` in a strategy, unless a plugin has set another `CheckpointIO`.

    Args:
        strategy: strategy of the trainer.
        check: as in `AtomicCheckpointIO`.
        part: as in `AtomicCheckpointIO`.
    """
    if type(strategy.checkpoint_io) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    io = strategy.checkpoint_io
    if not isinstance(io, AtomicCheckpointIO):
        return
    io.check, io.part = check, part
    if isinstance(strategy, ModelParallelStrategy) and "load_checkpoint" not in vars(strategy):
        _save_shards_whole(strategy, io)


def _save_shards_whole(strategy: ModelParallelStrategy, io: AtomicCheckpointIO) -> None:
    """Replace the strategy's own methods, which ask no `CheckpointIO` about folders."""
    load_one_file = strategy.load_checkpoint

    def save_checkpoint(
        checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        path = Path(strategy.broadcast(filepath))
        if not strategy._save_distributed_checkpoint:
            if strategy.is_global_zero:
                io.save_checkpoint(checkpoint, path)
            return
        # weights and moments in shards, all else in one file
        rest = dict(checkpoint)
        shards = {"state_dict": rest.pop("state_dict")}
        shards |= {
            f"optimizer_{i}": state for i, state in enumerate(rest.pop("optimizer_states", []))
        }
        write_folder(shards, rest, path, io.disk)

    def load_checkpoint(checkpoint_path: Any, weights_only: bool | None = None) -> dict[str, Any]:
        # everything but tensors, checked
        path = locate(strategy.broadcast(checkpoint_path))
        rest = io.checked(path, read_checkpoint(path, part="outline"))
        if not path.is_dir():
            return load_one_file(path, weights_only=True)
        # tensors, each process its shards
        module = strategy.lightning_module
        assert module is not None
        with reading(f"the checkpoint {str(path)!r}"):
            load_folder(path, module, strategy.optimizers, strict=module.strict_loading)
        return {key: value for key, value in rest.items() if key != "state_dict"}

    methods: Any = strategy
    methods.save_checkpoint, methods.load_checkpoint = save_checkpoint, load_checkpoint


@rank_zero_only
def check_folders(folders: Iterable[str | Path]) -> None:
    """Refuse folders that cannot be written; missing ones are made.

    Raises:
        UserError: a folder cannot be made or written.
    """
    for folder in folders:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            probe = Path(folder) / f".writable{PART}"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise UserError(
                f"the folder {str(folder)!r} cannot be written ({error.strerror}): give another "
                "`trainer.default_root_dir`, `dirpath` of the checkpoints or `save_dir` of the "
                "logger"
            ) from error
