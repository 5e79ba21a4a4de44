"""Predicts the peak memory of each phase of a run, by part, from its configuration.

Weights, optimiser state, the KV cache and rollout buffers are counted; activations and the head come from running one
shallow copy of the model, its adapters and this package's own head on tensors without data. Every response is taken to
reach `rollout.max_new_tokens`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn

from lightning_mpo.callbacks import KLTracking, ReferenceUpdate, Report, RolloutLoop
from lightning_mpo.errors import UserError
from lightning_mpo.functional import heads
from lightning_mpo.modules import PolicyOptimization
from lightning_mpo.modules.trainer import callbacks_of
from lightning_mpo.plan.trace import extrapolate, peak_of, without_data
from lightning_mpo.policies import CausalPolicy
from lightning_mpo.policies.lora import add_adapters
from lightning_mpo.policies.packing import Lines, lay_out, sees_everything
from lightning_mpo.policies.trunk import Trunk
from lightning_mpo.rollout.schedule import Schedule
from lightning_mpo.sampling.cache import ROOM
from lightning_mpo.types import Rollout

SAMPLING_COPIES = 5
"""Float32 rows of logits that a step of the sampler holds at once: old and new ones, shifted, exponentiated, summed."""
PARITY_ROWS = 32


@dataclass(frozen=True)
class Sizes:
    """What memory depends on besides the model.

    Args:
        prompt: S, tokens of the longest prompt.
        response: T, tokens of the longest response.
        completions: G.
        rows: sequences of a rollout on one process.
        together: sequences that are sampled at once.
        micro_rows: rows of a micro-batch.
        accumulate: whether gradients of earlier micro-batches are there.
    """

    prompt: int
    response: int
    completions: int
    rows: int
    together: int
    micro_rows: int
    accumulate: bool


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
    """Predicts for one configuration; nothing is loaded.

    Attributes:
        gpu: predict what a GPU would hold; at first, whether the trainer runs on one.
    """

    def __init__(self, module: PolicyOptimization, data: Any, trainer: L.Trainer) -> None:
        if not isinstance(module, PolicyOptimization) or not isinstance(
            module.policy, CausalPolicy
        ):
            raise UserError("`plan` needs `PolicyOptimization` with a `CausalPolicy`")
        self.module, self.policy, self.trainer = module, module.policy, trainer
        self.policy.check(module.objective.request)
        self.gpu = trainer.strategy.root_device.type == "cuda"
        self.rollout: RolloutLoop = next(
            c for c in callbacks_of(trainer) if isinstance(c, RolloutLoop)
        )
        schedule = Schedule(
            self.rollout.prompts,
            self.rollout.completions,
            minibatches=self.rollout.minibatches,
            epochs=self.rollout.epochs,
            micro_batches=trainer.accumulate_grad_batches,
            world_size=trainer.world_size,
        )
        data.connect(self.policy.tokenizer)
        prompts = data.encode(data.training_rows(0, self.rollout.prompts, 0))
        self.minibatches = schedule.minibatches
        together = getattr(self.rollout.sampler, "batch_size", None) or schedule.rows
        self.sizes = Sizes(
            prompt=prompts.input_ids_PS.shape[1],
            response=self.rollout.max_new_tokens,
            completions=self.rollout.completions,
            rows=schedule.rows,
            together=min(together, schedule.rows),
            micro_rows=-(-schedule.rows // (schedule.minibatches * schedule.micro_batches)),
            accumulate=schedule.micro_batches > 1,
        )
        self.config = self.policy.config.get_text_config()
        whole = self._network(self.config.num_hidden_layers)
        weights = dict(whole.named_parameters())
        self.trained = _bytes(w for w in weights.values() if w.requires_grad)
        self.trained_numbers = sum(w.numel() for w in weights.values() if w.requires_grad)
        self.largest_trained = max(
            w.numel() * w.element_size() for w in weights.values() if w.requires_grad
        )
        extras = self._extras(whole)
        self.extras = {name: _bytes(part) for name, part in extras.items()}
        self.trained_numbers += sum(w.numel() for part in extras.values() for w in part)
        self.adapters = _bytes(w for n, w in weights.items() if "lora_" in n)
        self.base = self._base(whole)
        wanted = module.keep_reference or self._has(KLTracking, Report)
        own_adapters = self._has(ReferenceUpdate) or self.policy.checkpoint is not None
        of_lora = self.adapters if own_adapters else 0
        self.reference = 0 if not wanted else self.base if self.policy.lora is None else of_lora
        self.state = round(_state_per_number(module) * self.trained_numbers)

    # --- weights --------------------------------------------------------------------------------------------------

    def _network(self, layers: int) -> nn.Module:
        """Return the model with its adapters on the meta device, cut to so many layers."""
        from transformers import AutoModelForCausalLM

        config = copy.deepcopy(self.config)
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
        with torch.device("meta"):
            network = AutoModelForCausalLM.from_config(
                config, dtype=self.policy.dtype, trust_remote_code=False
            )
            if self.policy.lora is not None:
                network = add_adapters(network, self.policy.lora).get_base_model()
        if self.policy.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
            network.enable_input_require_grads()
        return network.train()

    def _extras(self, network: Any) -> dict[str, list[nn.Parameter]]:
        """Return the weights of multi-token heads and critic, on the meta device; all of them are trained."""
        decoder: Any = network.get_decoder()
        heads, critic = copy.deepcopy(self.policy.mtp), copy.deepcopy(self.policy.critic)
        with torch.device("meta"):
            if heads is not None:
                heads.weights_file = None
                heads.build(Trunk(decoder, self.config, network.get_output_embeddings()))
            if critic is not None:
                critic.build(decoder)
        parts = {"heads": heads, "critic": critic}
        return {name: list(part.parameters()) for name, part in parts.items() if part is not None}

    def _base(self, network: Any) -> int:
        """Return the bytes of the base, those of quantised layers as they will be stored."""
        quantised = self.policy.quantization
        decoder: Any = network.get_decoder()
        linear = {id(m.weight) for m in decoder.modules() if isinstance(m, nn.Linear)}
        total = 0.0
        for name, weight in network.named_parameters():
            if "lora_" in name:
                continue
            stored = quantised is not None and id(weight) in linear
            total += weight.numel() * (
                quantised.bytes_per_weight() if stored and quantised else weight.element_size()
            )
        return round(total)

    def _has(self, *kinds: type[L.Callback]) -> bool:
        return any(isinstance(callback, kinds) for callback in callbacks_of(self.trainer))

    @cached_property
    def _transient(self) -> int:
        """The bytes of the largest layer that is unpacked for a product."""
        if self.policy.quantization is None:
            return 0
        layer: Any = self._network(1)
        return (
            max(m.weight.numel() for m in layer.get_decoder().modules() if isinstance(m, nn.Linear))
            * 2
        )

    # --- work on tensors without data -----------------------------------------------------------------------------

    def _lines(self, rows: int, response: int) -> Lines:
        """Lay out rows of full length, the completions of a prompt side by side, as the policy would."""
        S = self.sizes.prompt
        group_B = torch.arange(rows) // self.sizes.completions
        rollout = Rollout(
            tokens_BL=torch.ones(rows, S + response, dtype=torch.long),
            attention_mask_BL=torch.ones(rows, S + response, dtype=torch.bool),
            response_mask_BT=torch.ones(rows, response, dtype=torch.bool),
            group_B=group_B,
            behaviour_logprobs_BT=torch.zeros(rows, response),
            finish_B=torch.zeros(rows, dtype=torch.long),
        )
        share = self.policy.share_prompts and sees_everything(self.config)
        return lay_out(rollout, share=share, hidden_size=self.config.hidden_size)

    def _pass(self, network: Any, lines: Lines, tokens: int, *, head: bool, backward: bool) -> None:
        """Run the trunk over lines, and the head over so many tokens of them."""
        mask = lines.attention_mask()
        shapes = [lines.input_ids_RL.shape, lines.position_ids_RL.shape]
        ids, positions = (torch.zeros(shape, dtype=torch.long) for shape in shapes)
        with self.trainer.precision_plugin.forward_context():
            hidden = network.get_decoder()(
                input_ids=ids,
                position_ids=positions,
                attention_mask=None if mask is None else torch.ones(mask.shape, dtype=mask.dtype),
                use_cache=False,
            ).last_hidden_state
            total = hidden.sum()
            if head:
                total = self._head(network, hidden.flatten(0, 1), tokens)
        if backward:
            total.backward()

    def _head(self, network: Any, hidden_nD: torch.Tensor, tokens: int) -> torch.Tensor:
        weight_VD = network.get_output_embeddings().weight
        index_n = torch.zeros(tokens, dtype=torch.long)
        hidden_nD = hidden_nD[index_n]
        k = getattr(self.module.objective.support, "k", None) or getattr(
            self.module.objective.support, "max_k", None
        )
        if k:
            support = torch.zeros(tokens, k, dtype=torch.int32)
            return heads.support_logprobs(hidden_nD, weight_VD, index_n, support)[0].sum()
        return heads.full_logprobs(hidden_nD, weight_VD, index_n)[0].sum()

    def work(
        self,
        rows: int,
        response: int,
        *,
        head: bool = True,
        backward: bool = False,
        passes: int = 1,
    ) -> int:
        """Return the bytes at the peak of a pass over rows of full length, weights not counted.

        Args:
            rows: how many.
            response: tokens of each response; 1: prompts alone.
            head: score the response tokens as well.
            backward: train.
            passes: 2: with the gradients of an earlier pass in place.
        """
        lines = self._lines(rows, response)

        def peak(layers: int) -> int:
            network = self._network(layers)
            with without_data(network):

                def several() -> None:
                    with torch.set_grad_enabled(backward):
                        for _ in range(passes):
                            self._pass(
                                network, lines, rows * response, head=head, backward=backward
                            )

                return peak_of(several, network)

        return extrapolate(peak, self.config.num_hidden_layers)

    # --- phases ---------------------------------------------------------------------------------------------------

    def cache(self, sizes: Sizes) -> int:
        """Return the bytes of the KV cache at its longest, on a GPU with the spare room that it grows by.

        On the CPU spare room is address space that no page stands behind until a token is written there.
        """
        config = self.config
        head_size = (
            getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        )
        heads_kv = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        written = sizes.prompt + sizes.response
        allocated = sizes.prompt
        while allocated < written:
            allocated += ROOM + 1
        length = allocated if self.gpu else written
        item = torch.empty(0, dtype=self.policy.dtype).element_size()
        per_token = 2 * sizes.together * head_size * item
        per_layer = per_token * heads_kv * length
        repeated = per_token * config.num_attention_heads * written  # for grouped queries
        return per_layer * (config.num_hidden_layers + 1) + (
            repeated if heads_kv != config.num_attention_heads else 0
        )

    def buffer(self, sizes: Sizes) -> int:
        """Return the bytes of a rollout and its experience."""
        k = getattr(self.module.objective.support, "k", None) or getattr(
            self.module.objective.support, "max_k", 0
        )
        per_token = 8 + 12 * 4 + (k or 0) * 5
        return sizes.rows * (sizes.prompt * 9 + sizes.response * per_token)

    @property
    def held(self) -> dict[str, int]:
        """What is there in every phase, from the second update on."""
        return {
            "base weights": self.base,
            "reference copy": self.reference,
            "adapters": self.adapters,
            **self.extras,
            "optimiser state": self.state,
        }

    def predict(self) -> Prediction:
        """Predict each phase."""
        sizes = self.sizes
        spare = 2 * (self.trained if self.gpu else self.largest_trained)
        held = self.held | {"rollout buffer": self.buffer(sizes)}
        return Prediction(
            {
                "rollout": self._rollout(sizes),
                "score": held | {"activations": self._score(sizes) + self._transient},
                "update": self._update(sizes),
                "optimiser": held
                | {"gradients": self.trained + sum(self.extras.values()), "activations": spare},
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
        """Say what is not in the numbers."""
        parts = [name for name in ("mtp", "critic") if getattr(self.policy, name) is not None]
        return [f"not counted: activations of `policy.{name}`" for name in parts]

    def _rollout(self, sizes: Sizes) -> dict[str, int]:
        prompts = -(-sizes.together // sizes.completions)
        return self.held | {
            "KV cache": self.cache(sizes),
            "activations": self.work(prompts, 1, head=False) + self._transient,
            "head": SAMPLING_COPIES * 4 * sizes.together * self.policy.vocabulary,
        }

    def _score(self, sizes: Sizes) -> int:
        at_once = max(1, self.module.score_tokens // (sizes.prompt + sizes.response))
        at_once = max(at_once, PARITY_ROWS if self.rollout.parity_gate else 1)
        return self.work(min(sizes.rows, at_once), sizes.response)

    def _update(self, sizes: Sizes) -> dict[str, int]:
        passes = 2 if sizes.accumulate else 1
        trunk = self.work(
            sizes.micro_rows, sizes.response, head=False, backward=True, passes=passes
        )
        whole = self.work(sizes.micro_rows, sizes.response, backward=True, passes=passes)
        gradients = min(self.trained, trunk)
        extra = sum(self.extras.values())
        return self.held | {
            "rollout buffer": self.buffer(sizes),
            "gradients": gradients + extra,
            "activations": trunk - gradients + self._transient,
            "head": max(0, whole - trunk),
        }


def _bytes(weights: Iterable[Tensor]) -> int:
    return sum(weight.numel() * weight.element_size() for weight in weights)


def _state_per_number(module: PolicyOptimization) -> float:
    """Return the bytes of optimiser state per trained number, of a small weight that is stepped once."""
    weight = nn.Parameter(torch.zeros(128, 64))
    optimizer = module.optimizer([weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    held: Sequence[Any] = [value for state in optimizer.state.values() for value in state.values()]
    big = [value for value in held if isinstance(value, torch.Tensor) and value.numel() > 1]
    shared = {256: 0}  # tables of quantised optimisers are one for all weights
    return (
        sum(v.numel() * v.element_size() for v in big if v.numel() not in shared) / weight.numel()
    )
