"""Peptides: FASTA files and tables, the split by contexts, and every kind of bad file."""

from __future__ import annotations

import pytest

from lightning_mpo.data import Peptides
from lightning_mpo.errors import UserError
from lightning_mpo.peptide_files import RESIDUES, Peptide, read_fasta, read_table, select
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.seeding import is_held_out
from tests.support.peptides import drawn, write_modlamp


@pytest.fixture
def fasta(tmp_path):
    def write(*sequences: str, name: str = "peptides.fasta") -> str:
        file = tmp_path / name
        file.write_text("".join(f">p{i}\n{letters}\n" for i, letters in enumerate(sequences)))
        return str(file)

    return write


@pytest.fixture
def modlamp(tmp_path, monkeypatch):
    """Put a package on the path that looks like modlamp, and raises if it is imported."""
    monkeypatch.syspath_prepend(str(write_modlamp(tmp_path)))


def test_a_context_is_on_one_side_only_and_held_out_contexts_are_there_once(fasta):
    data = Peptides(fasta(*drawn(300)), held_out_share=0.3)
    train = [row.prompt for row in data.splits.train]
    held_out = [row.prompt for row in data.splits.validation]
    assert len(train) > len(set(train))  # each peptide is a demonstration
    assert len(held_out) == len(set(held_out)) > 5
    assert not set(train) & set(held_out)
    assert all(is_held_out(context, 0.3) for context in held_out)
    assert {len(context) for context in train + held_out} == {4}
    rows = [*data.splits.train, *data.splits.validation]
    assert all(len(row.prompt + row.solution) == 12 for row in rows)
    other = Peptides(fasta(*reversed(drawn(300)), name="other.fasta"), held_out_share=0.3)
    assert {row.prompt for row in other.splits.validation} == set(held_out)


def test_a_fasta_file_is_read_with_wrapped_lines_small_letters_and_stops(tmp_path):
    file = tmp_path / "a.fasta"
    file.write_text(">one\nACDE\n\nfghi\n>empty\n>two description\nKLMN*\n")
    assert read_fasta(str(file), "data.fasta") == [Peptide("ACDEFGHI"), Peptide("KLMN")]


def test_peptides_that_cannot_be_used_are_counted_by_reason():
    sequences = ["ACDEFGHIK", "ACDEFGHIK", "ACDEXGHIK", "ACDEF-HIK", "ACD", "A" * 50]
    chosen = select([Peptide(letters) for letters in sequences], 8, 48)
    assert [peptide.residues for peptide in chosen.peptides] == ["ACDEFGHIK"]
    assert chosen.describe() == (
        "1 of 6 peptides; left out: 2 with letters outside the 20, 2 outside 8 to 48 residues, "
        "1 repeated"
    )


def test_the_numbers_are_printed(fasta, capsys, caplog):
    with caplog.at_level("INFO", logger="lightning.pytorch.utilities.rank_zero"):
        _ = Peptides(fasta(*drawn(60), "AXAXAXAXAX")).splits
    assert "60 of 61 peptides; left out: 1 with letters outside the 20" in caplog.text


def test_a_table_of_modlamp_is_read_without_running_its_code(modlamp):
    peptides = read_table("AMPvsUniProt", "data.table")
    assert [peptide.residues for peptide in peptides] == drawn(40)
    assert [peptide.kind for peptide in peptides[:2]] == ["UniProt", "AMP"]
    data = Peptides(kind="AMP", held_out_share=0.4)
    rows = [*data.splits.train, *data.splits.validation]
    assert {row.extra["kind"] for row in rows} == {"AMP"}


def test_rows_fit_a_tiny_policy_of_residues(fasta):
    data, policy = Peptides(fasta(*drawn(80))), TinyPolicy(characters=RESIDUES + "BJOUXZ")
    data.connect(policy.tokenizer, policy.end_tokens)
    row = data.splits.train[0]
    solution = data.solutions([row])
    texts = [policy.token_texts[id] for id in solution.tokens_BL[0].tolist()]
    assert texts == [*row.prompt, *row.solution, "<end>"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("", {}, "holds no sequence"),
        (">only a name\n", {}, "holds no sequence"),
        ("ACDE\n>name\n", {}, "line 1 comes before a line that begins with `>`"),
        (">a\nACD\n", {}, "`Peptides` has no peptide to use: 0 of 1 peptides; left out: 1 outside"),
        (">a\nACDEFGHIKL\n", {}, "`Peptides` has no context to (train on|hold out)"),
        (">a\nACDEFGHIKX\n", {"foreign": "refuse"}, "has the letter 'X' outside the 20"),
        (">a\nACDEFGHIKL\n", {"kind": "AMP"}, "FASTA files have none"),
        (">a\n", {"prefix": 8}, "`Peptides.prefix` = 8 residues leave nothing to complete"),
        (">a\n", {"longest": 5}, "`Peptides.longest` must be at least 8"),
        (">a\n", {"held_out_share": 1.0}, r"`Peptides.held_out_share` must be in \(0, 1\)"),
        (">a\n", {"foreign": "keep"}, "`Peptides.foreign` must be"),
    ],
)
def test_mistakes_end_in_one_line(tmp_path, text, options, message):
    (tmp_path / "bad.fasta").write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        _ = Peptides(str(tmp_path / "bad.fasta"), **options).splits
    assert "\n" not in str(caught.value)


def test_missing_files_and_packages_end_in_one_line(monkeypatch, modlamp):
    with pytest.raises(UserError, match="`data.fasta` 'no.fasta' cannot be read: No such file"):
        _ = Peptides("no.fasta").splits
    with pytest.raises(UserError, match="`data.table` must be one of AMPvsUniProt"):
        _ = Peptides(table="other").splits
    with pytest.raises(UserError, match="`Peptides.kind` must be one of AMP, UniProt, got 'TM'"):
        _ = Peptides(kind="TM").splits
    with pytest.raises(UserError, match="needs a residue and an end token"):
        Peptides().check_response(1)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'lightning-mpo\[proteins\]'"):
        _ = Peptides().splits
