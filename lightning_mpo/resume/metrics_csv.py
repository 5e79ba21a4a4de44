"""Lightning's CSV logger, extended for resumed runs."""

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
    """Writes `metrics.csv`: a new file, unless `rewind` was called before the first save.

    The file is never half-written. For a new column it is written anew under another name, then
    renamed.
    """

    def __init__(self, log_dir: str) -> None:
        super().__init__(log_dir)
        self.path = Path(self.metrics_file_path)
        self.rows = 0
        """Rows of the file, including rows not written yet."""
        self._afresh = True

    def _check_log_dir_exists(self) -> None:
        """Do not delete the file here, as Lightning's writer does."""

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
        """Cut the file to at most its first `rows` rows, to append to them; return their number."""
        columns, all_rows = self._read() if self.path.is_file() else ([], [])
        first_rows = all_rows[:rows]
        if first_rows:
            self._replace(columns, first_rows)
        # go on from these rows
        self.metrics, self.metrics_keys = [], sorted(columns) if first_rows else []
        self.rows, self._afresh = len(first_rows), not first_rows
        return len(first_rows)

    def _read(self) -> tuple[list[str], list[dict[str, str]]]:
        with self.path.open(newline="") as file:
            reader = csv.DictReader(file)
            # a kill may cut the last line
            rows = [row for row in reader if None not in row.values()]
        return list(reader.fieldnames or []), rows

    def _replace(self, columns: list[str], rows: list[dict[str, str]]) -> None:
        unfinished = self.path.with_name(f".{self.path.name}{PART}")
        with unfinished.open("w", newline="") as file:
            writer = csv.DictWriter(file, fieldnames=columns)
            writer.writeheader()
            writer.writerows(rows)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, self.path)

    def mark(self) -> int:
        """Flush the logged rows to disk; return their number."""
        self.save()
        if self.path.is_file() and not self._afresh:
            with self.path.open("rb") as file:
                os.fsync(file.fileno())
            sync_folder(self.path.parent)
        return self.rows


class MetricsCSV(CSVLogger):
    """`CSVLogger` for resumed runs, which cut `metrics.csv` at the checkpoint and append to it.

    The command line uses it in place of Lightning's `CSVLogger`, which deletes a `metrics.csv` that
    is already in its folder. Verbs other than `fit` write to `metrics_VERB.csv`. The arguments are
    those of `CSVLogger`.
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
