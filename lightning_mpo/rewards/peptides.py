"""Rewards of peptides: designed properties, and a classifier that is fitted to real peptides."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mpo.checks import at_least, finite, within
from lightning_mpo.checks import positive as positive_number
from lightning_mpo.errors import UserError
from lightning_mpo.functional.design import composition, geometric_mean, range_score
from lightning_mpo.functional.logistic import fit_logistic, logistic_probabilities
from lightning_mpo.peptide_files import RESIDUES, Peptide, read_fasta, read_table, select
from lightning_mpo.rewards.base import Completion, Reward
from lightning_mpo.seeding import is_held_out

HYDROPHOBIC = frozenset("ACFILMV")
"""Residues of the hydrophobic ratio, as modlamp counts them [C]."""
PH, WINDOW, ANGLE = 7.0, 11, 100
"""Of the net charge; of the hydrophobic moment: residues, and degrees of a helix."""


@dataclass(frozen=True)
class Range:
    """A range of a property, and the distance from it at which the score is 0.

    Args:
        low: least number with the full score; None: no limit.
        high: largest number with the full score; None: no limit.
        margin: distance from the range at which the score is 0.
    """

    low: float | None = None
    high: float | None = None
    margin: float = 1.0

    def __post_init__(self) -> None:
        finite("Range", low=self.low, high=self.high)
        positive_number("Range", margin=self.margin)
        if self.low is not None and self.high is not None and self.low > self.high:
            raise UserError(f"`Range.low` must be at most `high`, got {self.low} and {self.high}")

    def score(self, values: Sequence[float]) -> Tensor:
        """Return the scores of numbers, in [0, 1]."""
        low = -math.inf if self.low is None else self.low
        high = math.inf if self.high is None else self.high
        return range_score(torch.tensor(values, dtype=torch.float64), low, high, self.margin)


def residues_of(completion: Completion) -> str | None:
    """Return the whole peptide: context and response without white space; None: no peptide."""
    letters = "".join((completion.prompt + completion.text).split())
    return letters if letters and set(letters) <= set(RESIDUES) else None


class PeptideDesign(Reward):
    """The geometric mean of the scores of five properties of the whole peptide, in [0, 1].

        R = (s_charge · s_moment · s_ratio · s_length · s_plain)^(1/5),   s_plain = min(s_H, s_run)

    The ranges of charge, ratio and length are those of antimicrobial peptides [docs listing]; the
    other ones and the mean are ours [I]. A response with other letters gets 0, and is not answered.

    Args:
        charge: net charge at pH 7, Lehninger's scale.
        moment: largest hydrophobic moment (Eisenberg) of 11 residues of a helix.
        ratio: share of the residues A, C, F, I, L, M and V.
        length: residues.
        entropy: entropy of the composition, divided by its largest value at this length.
        run: longest run of one residue.
        weight: factor of this reward in the sum.
    """

    def __init__(
        self,
        charge: Range = Range(2, 9, 2),
        moment: Range = Range(0.5, None, 0.5),
        ratio: Range = Range(0.3, 0.6, 0.15),
        length: Range = Range(10, 30, 5),
        entropy: Range = Range(0.75, None, 0.35),
        run: Range = Range(None, 2, 3),
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        self.charge, self.moment, self.ratio, self.length = charge, moment, ratio, length
        self.entropy, self.run = entropy, run

    def check(self, max_new_tokens: int) -> None:
        peptide_class()

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        peptides = [residues_of(completion) for completion in completions]
        scores = iter(self.design_scores([letters for letters in peptides if letters]))
        return [0.0 if letters is None else next(scores) for letters in peptides]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        return [residues_of(completion) is not None for completion in completions]

    def design_scores(self, peptides: Sequence[str]) -> list[float]:
        """Return the score of each peptide, a function of its residues alone."""
        if not peptides:
            return []
        values = [properties(letters) for letters in peptides]
        by_name = {name: [value[name] for value in values] for name in values[0]}
        plain_B = torch.minimum(
            self.entropy.score(by_name["entropy"]), self.run.score(by_name["run"])
        )
        scores_BF = torch.stack(
            [
                self.charge.score(by_name["charge"]),
                self.moment.score(by_name["moment"]),
                self.ratio.score(by_name["ratio"]),
                self.length.score(by_name["length"]),
                plain_B,
            ],
            1,
        )
        scores: list[float] = geometric_mean(scores_BF).tolist()
        return scores


class DesignSolved(PeptideDesign):
    """1 if the score of `PeptideDesign` reaches a threshold, else 0: the accuracy of a design.

    Args:
        threshold: least score of a solved design.
        kwargs: as for `PeptideDesign`. Give the same ranges to both.
    """

    is_accuracy = True

    def __init__(self, threshold: float = 0.85, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        within("DesignSolved", "(0, 1]", threshold=threshold)
        self.threshold = threshold

    def design_scores(self, peptides: Sequence[str]) -> list[float]:
        return [float(score >= self.threshold) for score in super().design_scores(peptides)]


class PeptideClassifier(Reward):
    """The probability that a peptide is of a class, by logistic regression on its composition.

    It is fitted at the start of a run, to the real peptides whose contexts are not held out. With
    `weight: 0.0` it is an independent evaluator: it is logged, and no update sees it. With another
    weight it is a reward. A response with other letters gets 0, and is not answered.

    Args:
        table: table of modlamp with two classes.
        positive: class whose probability is the score.
        positives: FASTA file of the class, instead of the table.
        negatives: FASTA file of other peptides, instead of the table.
        prefix: residues of a context, as for `Peptides`.
        held_out_share: share of the contexts that are held out, as for `Peptides`.
        ridge: penalty on the weights.
        weight: factor of this reward in the sum.

    Raises:
        UserError: an option is out of range, or only one of both files is given.
    """

    def __init__(
        self,
        table: str = "AMPvsUniProt",
        positive: str = "AMP",
        positives: str | None = None,
        negatives: str | None = None,
        prefix: int = 4,
        held_out_share: float = 0.2,
        ridge: float = 1e-4,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        name = type(self).__name__
        at_least(name, 1, prefix=prefix)
        within(name, "[0, 1)", held_out_share=held_out_share)
        positive_number(name, ridge=ridge)
        if (positives is None) != (negatives is None):
            raise UserError(f"`{name}` needs both `positives` and `negatives`, or neither")
        self.table, self.positive = table, positive
        self.positives, self.negatives = positives, negatives
        self.prefix, self.held_out_share, self.ridge = prefix, held_out_share, ridge

    def check(self, max_new_tokens: int) -> None:
        _ = self.weights

    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        peptides = [residues_of(completion) for completion in completions]
        features_NF = features([letters for letters in peptides if letters])
        probabilities = iter(logistic_probabilities(features_NF, self.weights).tolist())
        return [0.0 if letters is None else next(probabilities) for letters in peptides]

    def answered(self, completions: Sequence[Completion]) -> list[bool]:
        return [residues_of(completion) is not None for completion in completions]

    @cached_property
    def weights(self) -> Tensor:
        """The weights of the regression; fitted once, before a model is loaded.

        Raises:
            UserError: a file cannot be read, or a class has too few peptides.
        """
        name = type(self).__name__
        chosen = select(self._read(), 1, 10**6)
        sides: dict[bool, list[Peptide]] = {False: [], True: []}
        for peptide in chosen.peptides:
            sides[is_held_out(peptide.residues[: self.prefix], self.held_out_share)].append(peptide)
        train, held_out = sides[False], sides[True]
        counts = [sum(self._is_positive(p) is side for p in train) for side in (True, False)]
        if min(counts) < 2:
            raise UserError(
                f"`{name}` cannot be fitted: of the classes {self.positive!r} and its others, "
                f"{counts[0]} and {counts[1]} peptides are left to train on ({chosen.describe()})"
            )
        labels_N = torch.tensor([self._is_positive(peptide) for peptide in train])
        weights = fit_logistic(features([p.residues for p in train]), labels_N, self.ridge)
        if held_out:
            shares = logistic_probabilities(features([p.residues for p in held_out]), weights)
            labels = torch.tensor([self._is_positive(peptide) for peptide in held_out])
            right = ((shares > 0.5) == labels).double().mean().item()
            rank_zero_info(
                f"rewards    {name}: fitted to {len(train):,} peptides, right for {right:.1%} of "
                f"{len(held_out):,} held-out ones"
            )
        return weights

    def _is_positive(self, peptide: Peptide) -> bool:
        return peptide.kind == self.positive

    def _read(self) -> list[Peptide]:
        if self.positives is None or self.negatives is None:
            return read_table(self.table, "PeptideClassifier.table")
        files = {self.positive: self.positives, f"not {self.positive}": self.negatives}
        option = "PeptideClassifier.positives` or `negatives"
        return [
            Peptide(peptide.residues, kind)
            for kind, path in files.items()
            for peptide in read_fasta(path, option)
        ]


def features(peptides: Sequence[str]) -> Tensor:
    """Return the composition of each peptide, the shares of the 20 residues. Shape `[N, 20]`."""
    longest = max(map(len, peptides), default=1)
    ids_NT = torch.zeros(len(peptides), longest, dtype=torch.long)
    mask_NT = torch.zeros(len(peptides), longest, dtype=torch.bool)
    number = {letter: i for i, letter in enumerate(RESIDUES)}
    for i, letters in enumerate(peptides):
        ids_NT[i, : len(letters)] = torch.tensor([number[letter] for letter in letters])
        mask_NT[i, : len(letters)] = True
    return composition(ids_NT, mask_NT, len(RESIDUES))


def properties(letters: str) -> dict[str, float]:
    """Return the properties of a peptide by name, of residues alone.

    Args:
        letters: at least one of the 20 residues.
    """
    peptide = peptide_class()(letters)
    n = len(letters)
    largest = math.log2(min(n, len(RESIDUES)))
    return {
        "charge": float(peptide.charge(pH=PH, pKscale="Lehninger")),
        "moment": float(peptide.hydrophobic_moment(window=min(WINDOW, n), angle=ANGLE)),
        "ratio": sum(letter in HYDROPHOBIC for letter in letters) / n,
        "length": float(n),
        "entropy": float(peptide.entropy()) / largest if n > 1 else 0.0,
        "run": float(max(len(list(run)) for _, run in groupby(letters))),
    }


def peptide_class() -> Any:
    """Return the class `Peptide` of the package peptides.

    Raises:
        UserError: it is not installed.
    """
    try:
        from peptides import Peptide as Properties
    except ImportError as error:
        raise UserError(
            "`PeptideDesign` needs the package peptides: pip install 'lightning-mpo[proteins]'"
        ) from error
    return Properties
