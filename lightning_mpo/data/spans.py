"""Generated problems whose response is a row of decisions of several tokens each.

A response names one entity after the other, without separators. No two entities share a character.
The first token of a decision is thus a choice, and the first token determines the others.

Each option tests a claim:

* `length`: number of tokens of a decision. MPO (arXiv:2602.14386) takes N consecutive tokens as one
  action, and says that credit then reaches the unit of a decision [P, abstract]. With blocks of
  `length` tokens, the ratio of a block is the ratio of a decision [I]. `length=1` is the control:
  no token determines another. A block then holds several decisions, and MPO should gain nothing
  [I].
* `decisions`: number of decisions. A response has `decisions * length` tokens. Compare lengths in
  responses of equal length: 24 decisions of 3 tokens, and 72 decisions of 1.
* `SpanShare.noise`: noise of each token's reward, which sums to 0 over a decision. The advantage of
  a block averages this noise away. The advantage of a token does not [I].
* `careless_share`: share of wrong decisions in the demonstrations. It sets how good the policy is
  before training, and tests no claim of a paper.
"""

from __future__ import annotations

import random
import string
from typing import Any

from lightning_mpo.checks import at_least, within
from lightning_mpo.data.generated import GeneratedProblems
from lightning_mpo.errors import UserError
from lightning_mpo.rewards.spans import LENGTH

CHARACTERS = string.ascii_letters + string.digits
"""Characters that spell entities."""


class Spans(GeneratedProblems):
    """Sums of neighbouring symbols modulo `entities`; each sum is an entity of `length` characters.

    The prompt has `decisions` symbols x_i. It repeats each of them `length` times, as in
    `cccaaafff=`, so that each decision is equally far from its symbol. The entity of decision i has
    the number (x_i + x_{i-1}) mod `entities`, with 0 before the first symbol. A careless decision of
    a demonstration is the entity x_i: it drops the sum.

    Args:
        decisions: number of decisions of a response.
        length: number of characters of an entity; each is a token of `TinyPolicy`.
        entities: number of entities, and of symbols.
        careless_share: probability that a decision of a demonstration is careless.
        train_problems: distinct training problems.
        kwargs: as for `GeneratedProblems`.

    Raises:
        UserError: an option is out of range, or leaves too few characters or problems.
    """

    def __init__(
        self,
        decisions: int = 24,
        length: int = 3,
        entities: int = 8,
        careless_share: float = 0.6,
        train_problems: int = 10_000,
        **kwargs: Any,
    ) -> None:
        super().__init__(train_problems=train_problems, **kwargs)
        name = type(self).__name__
        at_least(name, 1, most=10_000, decisions=decisions)
        at_least(name, 1, most=len(CHARACTERS), length=length)
        at_least(name, 2, most=len(CHARACTERS), entities=entities)
        within(name, "[0, 1]", careless_share=careless_share)
        if entities * length > len(CHARACTERS):
            raise UserError(
                f"`{name}.length` = {length} needs {entities * length} characters for `entities` = "
                f"{entities}, over the {len(CHARACTERS)} letters and digits; lower one of them"
            )
        self.check_count(entities ** min(decisions, 60), "decisions", decisions)
        self.decisions, self.length, self.entities = decisions, length, entities
        self.careless_share = careless_share

    def spell(self, entity: int) -> str:
        """Return the characters of an entity, which no other entity uses."""
        return CHARACTERS[entity : self.entities * self.length : self.entities]

    def draw(self, random_numbers: random.Random) -> list[int]:
        return [random_numbers.randrange(self.entities) for _ in range(self.decisions)]

    def write(self, problem: list[int]) -> str:
        return "".join(CHARACTERS[x] * self.length for x in problem) + "="

    def solve(self, problem: list[int], random_numbers: random.Random) -> tuple[str, str]:
        before = [0, *problem]
        right = [(x + y) % self.entities for x, y in zip(problem, before, strict=False)]
        shown = [
            x if random_numbers.random() < self.careless_share else entity
            for x, entity in zip(problem, right, strict=True)
        ]
        return "".join(map(self.spell, right)), "".join(map(self.spell, shown))

    def columns(self, problem: list[int]) -> dict[str, Any]:
        return {LENGTH: self.length}

    def check_response(self, max_new_tokens: int) -> None:
        needed = self.decisions * self.length + 1
        if max_new_tokens < needed:
            raise UserError(
                f"`{type(self).__name__}` with `decisions` = {self.decisions} and `length` = "
                f"{self.length} needs responses of {needed} tokens with the end token, over "
                f"`rollout.max_new_tokens` = {max_new_tokens}; raise it or lower one of them"
            )
