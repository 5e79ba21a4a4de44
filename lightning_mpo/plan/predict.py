"""Predicts the peak memory of each phase of a run, by part, from its configuration.

Weights, optimiser state, the KV cache and rollout buffers are counted. Activations and the head are
measured: a shallow copy of the model, its adapters and this package's own head run on tensors
without data. Every response is taken to reach `rollout.max_new_tokens`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import lightning as L
import torch

from lightning_mpo.callbacks import KLTracking, ReferenceUpdate, Report, RolloutLoop
from lightning_mpo.errors import UserError
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.fitting import check_fit
from lightning_mpo.modules.precision import check_precision
from lightning_mpo.modules.rollout_setup import check_policy
from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.plan.masked_passes import MaskedPasses, tokens_of_block
from lightning_mpo.plan.passes import Passes, support_size
from lightning_mpo.plan.sizes import Sizes, schedule_of
from lightning_mpo.plan.weights import count_weights, state_per_number
from lightning_mpo.policies.loaded import LoadedPolicy
from lightning_mpo.policies.reference import SOURCE
from lightning_mpo.sampling.cache import ROOM

SAMPLING_COPIES = 5
"""Float32 rows of logits in a step of the sampler: old, new, shifted, exponentiated, summed."""
PARITY_ROWS = 32
"""Rows that the parity gate scores at once."""


@dataclass(frozen=True)
class Prediction:
    """Bytes by part, in each phase."""

    phases: dict[str, dict[str, int]]
    sizes: Sizes

    def peak(self, phase: str) -> int:
        """Return the sum of the parts in a phase."""
        return sum(self.phases[phase].values())

    @property
    def peaks(self) -> dict[str, int]:
        """The peak of each phase."""
        return {phase: self.peak(phase) for phase in self.phases}


class Planner:
    """Predicts the memory of one configuration; nothing is loaded.

    Attributes:
        gpu: predict the memory of a GPU; at first True if the trainer runs on one.
        sizes: sizes of the configuration.
    """

    def __init__(self, module: PolicyOptimization, data: Any, trainer: L.Trainer) -> None:
        if not isinstance(module, PolicyOptimization) or not isinstance(
            module.policy, LoadedPolicy
        ):
            raise UserError(
                "`plan` needs `PolicyOptimization` with a `CausalPolicy` or a `MaskedPolicy`"
            )
        self.module, self.policy, self.trainer = module, module.policy, trainer
        self.config = self.policy.config.get_text_config()
        self.gpu = trainer.strategy.root_device.type == "cuda"
        # sizes of rollouts and updates
        self.callbacks = callbacks_of(trainer)
        self.rollout = next(c for c in self.callbacks if isinstance(c, RolloutLoop))
        # what a run refuses
        check_precision(trainer.precision)
        likelihood = module.objective.likelihood
        self.rollout.check(self.policy, module.objective, data, "fit")
        check_policy(self.policy, module.objective)
        data.connect(self.policy.tokenizer)
        rows = [*data.validation_rows, *data.splits.train]
        check_fit(self.policy, data, rows, self.rollout.max_new_tokens)
        schedule = schedule_of(
            self.rollout, module.objective, trainer.accumulate_grad_batches, trainer.world_size
        )
        prompts = data.encode(data.training_rows(0, self.rollout.prompts, 0))
        prompt = prompts.input_ids_PS.shape[1]
        self.sizes = Sizes.of(self.rollout, schedule, prompt)
        self.minibatches = schedule.minibatches
        # bytes of weights, and a way to measure passes
        self.weights = count_weights(self.policy)
        self.state = round(state_per_number(module) * self.weights.trained_numbers)
        passes = Passes if likelihood is None else MaskedPasses
        self.passes = passes(self.policy, module.objective, prompt, self.rollout, trainer)
        self.copies = 0 if likelihood is None else likelihood.copies
        """Noised copies that a row holds; 0: the policy is causal."""

    def predict(self) -> Prediction:
        """Predict each phase."""
        sizes, weights = self.sizes, self.weights
        spare = 2 * (weights.trained if self.gpu else weights.largest_trained)
        gradients = weights.trained + sum(weights.extras.values())
        held = self.held | {"rollout buffer": self.buffer(sizes)}
        return Prediction(
            {
                "rollout": self._rollout(sizes),
                "score": held | {"activations": self._score(sizes) + weights.unpacked},
                "update": self._update(sizes),
                "optimiser": held | {"gradients": gradients, "activations": spare},
            },
            sizes,
        )

    def update(self, **changes: Any) -> int:
        """Return the peak of an update at other sizes."""
        return sum(self._update(replace(self.sizes, **changes)).values())

    def rolling(self, **changes: Any) -> int:
        """Return the peak of sampling at other sizes."""
        return sum(self._rollout(replace(self.sizes, **changes)).values())

    def notes(self) -> list[str]:
        """Return lines on memory that is not in the numbers."""
        parts = [name for name in ("mtp", "critic") if getattr(self.policy, name) is not None]
        return [f"not counted: activations of `policy.{name}`" for name in parts]

    # --- parts ------------------------------------------------------------------------------------

    @property
    def held(self) -> dict[str, int]:
        """Bytes that are held in every phase, from the second update on."""
        return {
            "base weights": self.weights.base,
            "reference copy": self._reference(),
            "adapters": self.weights.adapters,
            **self.weights.extras,
            "optimiser state": self.state,
        }

    def _reference(self) -> int:
        """Return the bytes of a frozen copy or frozen adapters; 0: the base with adapters off."""
        if not (self.module.keep_reference or self._has(KLTracking, Report)):
            return 0
        if self.policy.lora is None:
            return self.weights.base
        start = self.policy.reference_checkpoint or self.policy.checkpoint
        frozen_adapters = self._has(ReferenceUpdate) or start not in (None, SOURCE)
        return self.weights.adapters if frozen_adapters else 0

    def _has(self, *kinds: type[L.Callback]) -> bool:
        return any(isinstance(callback, kinds) for callback in self.callbacks)

    def cache(self, sizes: Sizes) -> int:
        """Return the bytes of the KV cache at its longest, on a GPU with its spare room.

        On the CPU spare room is address space without pages until a token is written there.
        """
        if self.copies:  # each step computes whole rows
            return 0
        config = self.config
        # heads and their size
        attention_heads = config.num_attention_heads
        head_size = getattr(config, "head_dim", None) or config.hidden_size // attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or attention_heads
        # tokens of a row
        written = sizes.prompt + sizes.response
        allocated = sizes.prompt
        while allocated < written:
            allocated += ROOM + 1
        length = allocated if self.gpu else written
        # keys and values of all layers, of the layer that grows once more, and repeated ones
        item = torch.empty(0, dtype=self.policy.dtype).element_size()
        per_token = 2 * sizes.together * head_size * item
        layers = per_token * kv_heads * length * (config.num_hidden_layers + 1)
        grouped = kv_heads != attention_heads
        return layers + (per_token * attention_heads * written if grouped else 0)

    def buffer(self, sizes: Sizes) -> int:
        """Return the bytes of a rollout and its experience."""
        per_token = 8 + 12 * 4 + support_size(self.module.objective.support) * 5
        # masks of a row's copies, and weights of their tokens
        hidden = self.copies * (sizes.prompt + 5 * sizes.response)
        rows = sizes.trained_rows * sizes.passes
        return rows * (sizes.prompt * 9 + sizes.response * per_token + hidden)

    # --- phases -----------------------------------------------------------------------------------

    def _rollout(self, sizes: Sizes) -> dict[str, int]:
        if self.copies:
            return self.held | self._reveal(sizes)
        prompts = -(-sizes.together // sizes.completions)
        return self.held | {
            "KV cache": self.cache(sizes),
            "activations": self.passes.peak(prompts, 1, head=False) + self.weights.unpacked,
            "head": SAMPLING_COPIES * 4 * sizes.together * self.policy.vocabulary,
        }

    def _reveal(self, sizes: Sizes) -> dict[str, int]:
        """Return the parts of a step over whole rows, with logits for the tokens of a block."""
        states = self.passes.peak(sizes.together, sizes.response, head=False)
        tokens = sizes.together * tokens_of_block(self.rollout.sampler, sizes.response)
        head = SAMPLING_COPIES * 4 * tokens * self.policy.vocabulary
        # the activations are gone when the logits are there
        return {"activations": states + self.weights.unpacked, "head": max(0, head - states)}

    def _score(self, sizes: Sizes) -> int:
        rows = max(1, self.module.score_tokens // (sizes.prompt + sizes.response))
        rows = max(rows, PARITY_ROWS if self.rollout.parity_gate else 1)
        return self.passes.peak(min(sizes.trained_rows, rows), sizes.response)

    def _update(self, sizes: Sizes) -> dict[str, int]:
        rows, response = sizes.micro_rows, sizes.response
        # with gradients of an earlier micro-batch, or of another copy that was computed again
        passes = 2 if sizes.accumulate or self.copies > 1 else 1
        trunk = self.passes.peak(rows, response, head=False, backward=True, passes=passes)
        with_head = self.passes.peak(rows, response, backward=True, passes=passes)
        gradients = min(self.weights.trained, trunk)
        # autograd sums over the copies of rows beside the gradients of earlier micro-batches
        sums = self.weights.trained if sizes.accumulate and self.copies > 1 else 0
        return self.held | {
            "rollout buffer": self.buffer(sizes),
            "gradients": gradients + sums + sum(self.weights.extras.values()),
            "activations": trunk - gradients + self.weights.unpacked,
            "head": max(0, with_head - trunk),
        }
