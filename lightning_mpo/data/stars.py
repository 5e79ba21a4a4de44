"""Generated star graphs: the first node of a path depends on its last.

A path from the centre of a star to the end of an arm has one choice, the first node. Each node
determines the next one. A model that learns next tokens from right paths can copy edges and never
learns to choose (Bachmann and Nagarajan, arXiv:2403.06963 [REC]).

Each option tests a claim:

* `length`: number of edges from the start to the goal. The paper says that next-token prediction
  fails to look ahead, and that prediction of several tokens at once can learn it [REC]. MPO
  (arXiv:2602.14386) takes several tokens as one action, so a gain should show here first [I].
* `degree`: number of arms. A policy that only follows edges is right in 1 of `degree` cases. The
  paper says this of teacher forcing [REC]. After a wrong first node, all later tokens have a
  negative advantage. Heads whose log-probs fall there without bound unlearn the edges [I].
* `alphabet`: number of letters that name nodes. More letters make edges harder to learn, and graphs
  harder to memorise [I].
"""

from __future__ import annotations

import random
import string
from math import factorial, perm
from typing import Any, NamedTuple

from lightning_mpo.checks import at_least, within
from lightning_mpo.data.generated import GeneratedProblems
from lightning_mpo.errors import UserError

LETTERS = string.ascii_letters
"""Names of nodes: a to z, then A to Z."""


class Star(NamedTuple):
    """A star graph with shuffled edges, and the arm that ends in the goal."""

    start: str
    arms: tuple[str, ...]
    edges: tuple[str, ...]
    goal_arm: str


class StarGraphs(GeneratedProblems):
    """Paths in star graphs; the prompt lists the edges, then start and goal.

    The answer to `dg,ea,bc,ed,ab,gf;ef=` is `dgf`: the nodes from the neighbour of the start `e` to
    the goal `f`. A demonstration follows the arm of the goal, or with probability `careless_share` a
    random arm. The random arm is that of the goal in 1 of `degree` cases.

    Args:
        degree: number of arms of a star.
        length: number of nodes of an arm, without the start.
        alphabet: number of letters that name nodes: a to z, then A to Z.
        careless_share: probability that a demonstration follows a random arm.
        kwargs: as for `GeneratedProblems`.

    Raises:
        UserError: an option is out of range, or leaves too few letters or problems.
    """

    def __init__(
        self,
        degree: int = 2,
        length: int = 3,
        alphabet: int = 26,
        careless_share: float = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        # ranges
        name = type(self).__name__
        at_least(name, 2, most=len(LETTERS), degree=degree)
        at_least(name, 1, most=len(LETTERS), length=length)
        at_least(name, 2, most=len(LETTERS), alphabet=alphabet)
        within(name, "[0, 1]", careless_share=careless_share)
        # letters and problems must suffice
        nodes = degree * length + 1
        if nodes > alphabet:
            raise UserError(
                f"`{name}.alphabet` = {alphabet} has too few letters for the {nodes} nodes of a "
                f"star with `degree` = {degree} and `length` = {length}; raise `alphabet` (at most "
                f"{len(LETTERS)}) or lower one of them"
            )
        stars = perm(alphabet, nodes) // factorial(degree)
        self.check_count(stars * degree * factorial(nodes - 1), "alphabet", alphabet)
        self.degree, self.length, self.alphabet = degree, length, alphabet
        self.careless_share = careless_share

    def draw(self, random_numbers: random.Random) -> Star:
        start, *others = random_numbers.sample(
            LETTERS[: self.alphabet], 1 + self.degree * self.length
        )
        arms = ["".join(others[i : i + self.length]) for i in range(0, len(others), self.length)]
        edges = [a + b for arm in arms for a, b in zip(start + arm, arm, strict=False)]
        random_numbers.shuffle(edges)
        return Star(start, tuple(arms), tuple(edges), random_numbers.choice(arms))

    def write(self, problem: Star) -> str:
        return f"{','.join(problem.edges)};{problem.start}{problem.goal_arm[-1]}={problem.start}"

    def solve(self, problem: Star, random_numbers: random.Random) -> tuple[str, str]:
        careless = random_numbers.random() < self.careless_share
        any_arm = random_numbers.choice(problem.arms)
        return problem.goal_arm, any_arm if careless else problem.goal_arm
