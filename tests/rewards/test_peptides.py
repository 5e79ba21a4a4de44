"""Rewards of peptides: pure functions of the residues, and a classifier that no update sees."""

from __future__ import annotations

import math
import random
from pathlib import Path

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.peptide_files import RESIDUES
from lightning_mpo.rewards import (
    Completion,
    DesignSolved,
    PeptideClassifier,
    PeptideDesign,
    score_all,
)
from lightning_mpo.rewards.peptides import Range, features, properties

MAGAININ = "GIGKFLHSAKKFGKAFVGEIMNS"
"""An antimicrobial peptide of a frog."""


def completion(text: str, prompt: str = "") -> Completion:
    return Completion(prompt, text, "", len(text), True, {})


def peptide(seed: int, letters: str = RESIDUES, length: int = 20) -> str:
    return "".join(random.Random(seed).choices(letters, k=length))


@pytest.fixture
def files(tmp_path):
    """Two classes that differ in their composition."""
    for name, letters in (("positive", "KRLAG"), ("negative", "DESTPG")):
        lines = [f">{i}\n{peptide(i, letters)}\n" for i in range(40)]
        (tmp_path / f"{name}.fasta").write_text("".join(lines))
    return {f"{name}s": str(tmp_path / f"{name}.fasta") for name in ("positive", "negative")}


def test_properties_are_those_of_the_package_and_of_loops():
    from peptides import Peptide

    for letters in (MAGAININ, "K", "AAAAKKKK", peptide(3)):
        values = properties(letters)
        n = len(letters)
        assert values["charge"] == pytest.approx(Peptide(letters).charge(7))
        assert values["ratio"] == sum(letters.count(x) for x in "ACFILMV") / n
        counts = [letters.count(x) / n for x in set(letters)]
        entropy = -sum(p * math.log2(p) for p in counts)
        largest = math.log2(min(n, 20)) or 1.0
        assert values["entropy"] == pytest.approx(entropy / largest, abs=1e-9)
        assert 0 <= values["entropy"] <= 1 + 1e-9
    assert properties("AAAAKKK")["run"] == 4
    assert properties(MAGAININ)["moment"] == pytest.approx(Peptide(MAGAININ).hydrophobic_moment())


def test_a_design_is_the_geometric_mean_of_five_scores():
    reward = PeptideDesign()
    for letters in (MAGAININ, peptide(1), peptide(2), "ACDEFGHIKLMNPQRS"):
        values = properties(letters)
        plain = min(reward.entropy.score([values["entropy"]]), reward.run.score([values["run"]]))
        scores = [
            *(getattr(reward, name).score([values[name]]) for name in ("charge", "moment")),
            *(getattr(reward, name).score([values[name]]) for name in ("ratio", "length")),
            plain,
        ]
        expected = math.prod(map(float, scores)) ** (1 / 5)
        assert reward.design_scores([letters])[0] == pytest.approx(expected)
    assert reward.design_scores([MAGAININ])[0] > 0.85
    assert reward.design_scores(["K" * 20])[0] == 0


def test_a_design_depends_on_the_residues_alone():
    """Neither on where the context ends, nor on the batch, white space or the order."""
    reward = PeptideDesign()
    whole = reward.score([completion(MAGAININ)])
    assert reward.score([completion(MAGAININ[4:], MAGAININ[:4])]) == whole
    assert reward.score([completion(f"{MAGAININ[4:9]}\n{MAGAININ[9:]} ", MAGAININ[:4])]) == whole
    batch = [completion(peptide(i)) for i in range(6)] + [completion(MAGAININ)]
    assert reward.score(batch) == [reward.score([one])[0] for one in batch]
    assert all(0 <= score <= 1 for score in reward.score(batch))


@pytest.mark.parametrize("text", ["", "ACDX", "ACD-", "acd", "AC1"])
def test_a_response_with_other_letters_gets_0_and_is_not_answered(text, files):
    for reward in (PeptideDesign(), DesignSolved(), PeptideClassifier(**files)):
        batch = [completion(text), completion(MAGAININ)]
        assert reward.score(batch)[0] == 0.0
        assert list(reward.answered(batch)) == [False, True]


def test_solved_is_the_design_from_its_threshold_on():
    scores = PeptideDesign().score([completion(peptide(seed)) for seed in range(30)])
    seed, score = next((i, score) for i, score in enumerate(scores) if 0.1 < score < 0.9)
    for threshold, expected in ((score, 1.0), (score + 1e-9, 0.0)):
        assert DesignSolved(threshold=threshold).score([completion(peptide(seed))]) == [expected]
    assert DesignSolved.is_accuracy
    assert not PeptideDesign.is_accuracy


def test_the_classifier_is_fitted_without_luck_and_tells_the_classes_apart(files):
    first, second = PeptideClassifier(**files), PeptideClassifier(**files)
    assert torch.equal(first.weights, second.weights)
    new = [completion(peptide(99, "KRLAG")), completion(peptide(98, "DESTPG"))]
    high, low = first.score(new)
    assert high > 0.9
    assert low < 0.1
    assert first.score(new[::-1]) == [low, high]


def test_the_classifier_sees_no_held_out_context(files, tmp_path):
    """Peptides of held-out contexts change no weight."""
    from lightning_mpo.seeding import is_held_out

    reward = PeptideClassifier(**files, held_out_share=0.5)
    text = Path(files["positives"]).read_text()
    parts = [part for part in text.split(">") if part]
    parts = [part for part in parts if not is_held_out(part.split()[1][:4], 0.5)]
    assert 5 < len(parts) < 35
    (tmp_path / "fewer.fasta").write_text("".join(f">{part}" for part in parts))
    fewer = PeptideClassifier(
        positives=str(tmp_path / "fewer.fasta"), negatives=files["negatives"], held_out_share=0.5
    )
    assert torch.equal(reward.weights, fewer.weights)


def test_an_evaluator_of_weight_0_is_logged_and_changes_no_reward(files):
    batch = [completion(peptide(i)) for i in range(5)]
    plain = score_all([PeptideDesign()], batch)
    both = score_all([PeptideDesign(), PeptideClassifier(**files, weight=0.0)], batch)
    assert torch.equal(both.rewards_B, plain.rewards_B)
    assert torch.equal(both.valid_B, plain.valid_B)
    assert torch.equal(both.decided_B, plain.decided_B)
    assert both.by_reward["peptide_classifier"].std() > 0


def test_features_are_shares_of_the_residues():
    rows = features(["AAC", "Y"])
    assert rows.sum(1).tolist() == pytest.approx([1, 1])
    assert rows[0, :2].tolist() == pytest.approx([2 / 3, 1 / 3])
    assert rows[1, -1] == 1


@pytest.mark.parametrize(
    ("act", "message"),
    [
        (lambda f: Range(2, 1), "`Range.low` must be at most `high`, got 2 and 1"),
        (lambda f: Range(1, 2, 0), "`Range.margin` must be"),
        (lambda f: DesignSolved(threshold=0), "`DesignSolved.threshold` must be in"),
        (lambda f: PeptideClassifier(positives="a.fasta"), "needs both `positives` and"),
        (lambda f: PeptideClassifier(ridge=0.0), "`PeptideClassifier.ridge` must be"),
        (lambda f: PeptideClassifier(positives="no", negatives="no").check(9), "cannot be read"),
        (
            lambda f: PeptideClassifier(**f, held_out_share=0.9999).check(9),
            "`PeptideClassifier` cannot be fitted: .* peptides are left to train on",
        ),
    ],
)
def test_mistakes_end_in_one_line(files, act, message):
    with pytest.raises(UserError, match=message) as caught:
        act(files)
    assert "\n" not in str(caught.value)


def test_a_missing_package_ends_in_one_line(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "peptides", None)
    with pytest.raises(UserError, match="`PeptideDesign` needs the package peptides"):
        PeptideDesign().check(30)
