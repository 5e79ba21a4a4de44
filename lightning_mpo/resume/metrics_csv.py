"""Lightning's CSV logger, for runs that go on."""

from __future__ import annotations

import csv
import os
from pathlib import Path
from typing import Any

from lightning.fabric.loggers.logger import rank_zero_experiment
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.csv_logs import ExperimentWriter

from lightning_mpo.checks import at_least
from lightning_mpo.storage import PART, sync_folder


class MetricsWriter(ExperimentWriter):
    """Writes `metrics.csv`, afresh unless `rewind` was called before the first saved row.

    The file is never half-written: a new column rewrites it beside its place.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        self.rows = 0
        """Rows of the file, including those not written yet."""
        self._afresh = True

    def _check_log_dir_exists(self) -> None:
        """Leave the file alone: Lightning's writer deletes it at once."""

    def set_aside(self, verb: str) -> None:
        """Write to `metrics_VERB.csv`, so that the file of training stays as it is."""
        self.path = self.path.with_name(f"metrics_{verb}.csv")
        self.metrics_file_path = str(self.path)

    def log_metrics(self, metrics_dict: dict[str, float], step: int | None = None) -> None:
        super().log_metrics(metrics_dict, step)
        self.rows += 1

    def save(self) -> None:
        if self._afresh and self.metrics:
            self.path.unlink(missing_ok=True)
            self._afresh = False
        super().save()

    def _rewrite_with_new_header(self, fieldnames: list[str]) -> None:
        self._replace(fieldnames, self._read()[1])

    def rewind(self, rows: int) -> int:
        """Keep the first rows of the file and append to them; return how many there were."""
        names, kept = self._read() if self.path.is_file() else ([], [])
        kept = kept[:rows]
        if kept:
            self._replace(names, kept)
        self.metrics, self.metrics_keys, self.rows = [], sorted(names) if kept else [], len(kept)
        self._afresh = not kept
        return len(kept)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            rows = [
                row for row in reader if None not in row.values()
            ]  # a kill may cut the last line
        return list(reader.fieldnames or []), rows

    def _replace(self, names: list[str], rows: list[dict[str, str]]) -> None:
        part = self.path.with_name(f".{self.path.name}{PART}")
        with part.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=names)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, self.path)

    def mark(self) -> int:
        """Flush the logged rows to disk; return their number."""
        self.save()
        if self.path.is_file() and not self._afresh:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            sync_folder(self.path.parent)
        return self.rows


class MetricsCSV(CSVLogger):
    """`CSVLogger` whose `metrics.csv` a resumed run cuts at the checkpoint and appends to.

    The command line takes it wherever a configuration names Lightning's `CSVLogger`, which deletes
    the file of a folder that is used again. Verbs other than `fit` write to `metrics_VERB.csv`.
    Arguments are those of `CSVLogger`.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        at_least("MetricsCSV", 1, flush_logs_every_n_steps=self._flush_logs_every_n_steps)
        if not isinstance(self._version, str):
            at_least("MetricsCSV", 0, version=self._version)

    @property
    @rank_zero_experiment
    def experiment(self) -> MetricsWriter:
        if self._experiment is None:
            self._fs.makedirs(self.root_dir, exist_ok=True)
            self._experiment = MetricsWriter(log_dir=self.log_dir)
        assert isinstance(self._experiment, MetricsWriter)
        return self._experiment
