"""Generated addition whose demonstrations leave mass in the tail of a large vocabulary.

Promising tokens (RLPT, arXiv:2602.03195) restrict sampling and ratios to the tokens that the model
itself finds most probable. The paper says that most of a vocabulary never helps, and that the
restriction makes the policy gradient less noisy and training stable [P, abstract].

Each option tests a claim:

* `tail`: probability mass of the tail. One tail token in the answer makes a response wrong, and a
  support excludes almost all of them. The gain of RLPT should grow with this mass, and be 0
  without it [I].
* `vocabulary`: number of tokens over which this mass is spread. A policy gradient over the whole
  vocabulary samples each of them too rarely to lower its probability. RLPT should not depend on
  this number [I].

Tail characters are drawn uniformly, so each has `tail / (vocabulary - 14)` of the mass. A support
of eight tokens contains some of them, but with less than a twentieth of the tail's mass [V, after
two supervised stages]. Under a Zipf law these few would have much of the mass, so that `tail` and
`vocabulary` could not be varied separately.
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

    The tail consists of `vocabulary - 14` characters that neither prompts nor right answers use.
    Each character of a demonstration becomes, with probability `tail`, a random character of the
    tail. A policy that imitates the demonstrations gives the tail a mass of `tail` at each token.
    The policy needs the same alphabet: `TinyPolicy(characters="0123456789+=,;", vocabulary=2000)`.

    Args:
        tail: probability that a character of a demonstration comes from the tail.
        vocabulary: number of all characters, those of the tail included.
        digits: number of digits of both operands.
        train_problems: number of distinct training problems.
        held_out_problems: number of distinct validation problems.
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
        # noise has its own stream for each problem, so it changes neither problems nor carries
        noise = random.Random(f"{self.problem_seed} {self.write(problem)}")
        tail = self.alphabet[len(BASE) :]
        replaced = [
            noise.choice(tail) if noise.random() < self.tail else character
            for character in solution
        ]
        return target, "".join(replaced)
