"""Generated addition whose demonstrations leave mass in the tail of a large vocabulary.

Promising tokens (RLPT, arXiv:2602.03195) restrict sampling and ratios to the tokens that the model
itself ranks first. The paper says that this makes the policy gradient less noisy and training
stable, as most of a vocabulary never helps [P, abstract].

The dials and the claims that they test:

* `tail`: the probability mass outside the promising tokens. A sample over the whole vocabulary is
  spoilt by one tail token in its answer; a sample from a support is not. RLPT should gain more, the
  more mass the tail has, and nothing if it has none [I].
* `vocabulary`: over how many tokens that mass is spread. A policy gradient over all of them meets
  each too rarely to push it down; it should make no difference to RLPT [I].

Tail characters are drawn uniformly, so each has `tail / (vocabulary - 14)` of the mass. No tail
character is ever among the first tokens of a trained policy. A Zipf law would put a few of them
into each support, so that the two dials would not be apart.
"""

from __future__ import annotations

import random
from typing import Any

from lightning_mpo.characters import extend_alphabet
from lightning_mpo.checks import above, within
from lightning_mpo.data.arithmetic import Arithmetic

BASE = "0123456789+=,;"
"""The characters of prompts and careful solutions."""


class Tails(Arithmetic):
    """Column addition with noise in its demonstrations.

    Each character of a demonstration is replaced with probability `tail` by a character that is
    drawn uniformly from the tail. The tail consists of `vocabulary - 14` characters that neither
    prompts nor right answers use. A policy that imitates the demonstrations gives the tail a mass
    of `tail` at each step. The policy needs the same alphabet:
    `TinyPolicy(characters="0123456789+=,;", vocabulary=2000)`.

    Args:
        tail: probability that a character of a demonstration comes from the tail.
        vocabulary: characters in all, those of the tail included.
        digits: of both operands.
        train_problems: distinct training problems.
        held_out_problems: distinct validation problems.
        kwargs: as for `Arithmetic`.

    Raises:
        UserError: an option is out of range, or the vocabulary has no tail.
    """

    def __init__(
        self,
        tail: float = 0.1,
        vocabulary: int = 2000,
        digits: int = 2,
        train_problems: int = 3000,
        held_out_problems: int = 300,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            digits=digits,
            train_problems=train_problems,
            held_out_problems=held_out_problems,
            **kwargs,
        )
        name = type(self).__name__
        within(name, "(0, 1)", tail=tail)
        above(name, len(BASE), vocabulary=vocabulary)
        self.alphabet = extend_alphabet(BASE, vocabulary, name)
        self.tail, self.vocabulary = tail, vocabulary

    def solve(self, problem: tuple[int, int], random_numbers: random.Random) -> tuple[str, str]:
        target, solution = super().solve(problem, random_numbers)
        # noise has a stream of its own for each problem, so it changes no problem and no habit
        noise = random.Random(f"{self.problem_seed} {self.write(problem)}")
        tail = self.alphabet[len(BASE) :]
        replaced = [
            noise.choice(tail) if noise.random() < self.tail else character
            for character in solution
        ]
        return target, "".join(replaced)
