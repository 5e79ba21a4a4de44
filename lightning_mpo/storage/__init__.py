"""Checkpoints as one file or a folder: written completely or not at all, and read as data."""

from lightning_mpo.storage.disk import (
    PART,
    Disk,
    find,
    locate,
    remove,
    sync_folder,
    unfinished_mark,
    write_text,
)
from lightning_mpo.storage.files import is_sealed, write_file
from lightning_mpo.storage.reading import Part, read_checkpoint, reading
from lightning_mpo.storage.shard_reading import load_folder
from lightning_mpo.storage.shards import is_shards, write_folder

__all__ = [
    "PART",
    "Disk",
    "Part",
    "find",
    "is_sealed",
    "is_shards",
    "load_folder",
    "locate",
    "read_checkpoint",
    "reading",
    "remove",
    "sync_folder",
    "unfinished_mark",
    "write_file",
    "write_folder",
    "write_text",
]
