"""Counts the passes of a masked model over a response: in sampling, without and with gradient.

    lightning-mpo fit -c diffusion -c espo --trainer.max_steps 4 --trainer.val_check_interval 1000 \
        --trainer.callbacks+ benchmarks.masked.passes.CountPasses

Start it in the root folder of the repository. At the end it prints the passes for each sampled
response: rows that went through the policy's network, divided by responses. The first rollout is
left out, as the parity gate follows it. A pass with gradient has a backward pass behind it, unless
it is the first of two under recomputation.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import lightning as L
import torch

from lightning_mpo.callbacks import RolloutLoop


class CountPasses(L.Callback):
    """Counts the rows that go through the policy's network during training."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self.sampling = False
        self.rollouts = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Begin to count, after the report."""
        loop = next(c for c in trainer.callbacks if isinstance(c, RolloutLoop))
        sample = loop.sampler.sample

        def count_responses(*arguments: Any, **options: Any) -> Any:
            self.rollouts += 1
            if self.rollouts == 2:
                self.rows.clear()
            self.sampling = True
            rollout = sample(*arguments, **options)
            self.sampling = False
            self.rows["responses"] += len(rollout.rows)
            return rollout

        def count_rows(network: Any, arguments: Any, options: dict[str, Any]) -> None:
            ids = arguments[0] if arguments else options["input_ids"]
            kind = "update" if torch.is_grad_enabled() else "scoring"
            self.rows["sampling" if self.sampling else kind] += len(ids)

        loop.sampler.sample = count_responses  # type: ignore[method-assign]
        policy: Any = pl_module.policy
        policy.network.register_forward_pre_hook(count_rows, with_kwargs=True)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Print passes per response."""
        responses = self.rows.pop("responses")
        for kind, rows in self.rows.items():
            print(f"passes     {kind}: {rows / responses:.2f} for each response")
