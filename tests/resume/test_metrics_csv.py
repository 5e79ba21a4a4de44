"""`metrics.csv` of a run that goes on is that of a run that was never interrupted."""

from __future__ import annotations

from lightning_mpo.resume.metrics_csv import MetricsCSV

ROWS = [
    {"loss": 0.1},
    {"loss": 0.2, "accuracy": 1.0},
    {"loss": 1 / 3},
    {"other": 2.0},
    {"loss": 5e-324},
]


def logger(folder) -> MetricsCSV:
    return MetricsCSV(folder, name="", version="")


def write(made, rows, first=0):
    for step, row in enumerate(rows, first):
        made.log_metrics(row, step)
        made.save()
    return (made.experiment.path).read_bytes()


def test_it_goes_on_behind_the_rows_of_the_checkpoint(tmp_path):
    whole = write(logger(tmp_path / "whole"), ROWS)
    for kept in range(len(ROWS) + 1):
        folder = tmp_path / str(kept)
        write(logger(folder), ROWS)
        resumed = logger(folder)
        assert resumed.experiment.rewind(kept) == kept
        assert write(resumed, ROWS[kept:], kept) == whole if kept < len(ROWS) else True
        assert (folder / "metrics.csv").read_bytes() == whole


def test_a_line_that_a_kill_cut_off_is_dropped(tmp_path):
    whole = write(logger(tmp_path), ROWS)
    (tmp_path / "metrics.csv").write_bytes(whole[:-6])
    resumed = logger(tmp_path)
    assert resumed.experiment.rewind(4) == 4
    assert write(resumed, ROWS[4:], 4) == whole


def test_a_new_run_begins_a_new_file_with_its_first_row(tmp_path):
    before = write(logger(tmp_path), ROWS)
    made = logger(tmp_path)
    assert made.experiment.rows == 0
    made.save()
    assert (tmp_path / "metrics.csv").read_bytes() == before, (
        "a run that is refused must not delete the file"
    )
    assert write(made, ROWS[:1]) != before
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2


def test_rows_that_are_not_there_any_more_are_counted(tmp_path):
    assert logger(tmp_path).experiment.rewind(3) == 0
    write(logger(tmp_path), ROWS[:2])
    assert logger(tmp_path).experiment.rewind(3) == 2


def test_a_new_column_never_leaves_half_a_file(tmp_path, monkeypatch):
    made = logger(tmp_path)
    before = write(made, ROWS[:1])
    seen = []
    real = type(made.experiment)._replace

    def watch(self, names, rows):
        seen.append(self.path.read_bytes())
        real(self, names, rows)
        assert not list(tmp_path.glob(".*"))

    monkeypatch.setattr(type(made.experiment), "_replace", watch)
    write(made, ROWS[1:2], 1)
    assert seen == [before]


def test_marking_writes_what_was_logged(tmp_path):
    made = logger(tmp_path)
    made.log_metrics(ROWS[0], 0)
    assert made.experiment.mark() == 1
    assert len((tmp_path / "metrics.csv").read_text().splitlines()) == 2
