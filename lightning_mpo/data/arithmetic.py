"""Generated arithmetic with the steps written out."""

from __future__ import annotations

import hashlib
import random
from typing import Any

from lightning_mpo.data.base import PromptDataModule, Splits
from lightning_mpo.types import PromptRow


class Arithmetic(PromptDataModule):
    """Three-digit addition, column by column: `477+298=` -> `7+8+0=15,7+9+1=17,4+2+1=7;775`."""

    def __init__(self, train_problems: int = 20_000, held_out_share: float = 0.1, **kwargs: Any) -> None:
        super().__init__(**{"chat_template": False, "instruction": ""} | kwargs)
        self.train_problems = train_problems
        self.held_out_share = held_out_share

    def load(self) -> Splits:
        generator = random.Random(0)
        train, validation = [], []
        while len(train) < self.train_problems or len(validation) < 2000:
            a, b = generator.randrange(100, 1000), generator.randrange(100, 1000)
            row = _addition(a, b)
            (validation if _held_out(row.prompt, self.held_out_share) else train).append(row)
        return Splits(train[: self.train_problems], validation[:2000])


def _held_out(prompt: str, share: float) -> bool:
    return int(hashlib.sha256(prompt.encode()).hexdigest(), 16) % 10_000 < share * 10_000


def _addition(a: int, b: int) -> PromptRow:
    carry, steps = 0, []
    for x, y in zip(reversed(str(a)), reversed(str(b)), strict=True):
        total = int(x) + int(y) + carry
        steps.append(f"{x}+{y}+{carry}={total}")
        carry = total // 10
    return PromptRow(f"{a}+{b}=", str(a + b), f"{','.join(steps)};{a + b}")
