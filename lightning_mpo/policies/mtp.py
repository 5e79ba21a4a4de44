"""Multi-token-prediction heads: at position t they predict the tokens behind the next one.

The trunk's hidden state h_t predicts o_t; head n predicts o_{t+n}, n = 1 … M. Three families:

==============  ==================================================================================
parallel        one decoder layer of the trunk's own class per offset, all on h_t
                (arXiv:2404.19737; the family that MPO's reported parameter counts point to [I];
                docs/algorithms.md 11.1)
sequential      a chain: depth n also reads the embeddings of o_t … o_{t+n-1} (DeepSeek-V3,
                arXiv:2412.19437)
Medusa          a residual linear layer with SiLU per offset, zero at the start (arXiv:2401.10774)
==============  ==================================================================================

Parallel and Medusa heads give marginals q_n(o_{t+n} | o_{<t}), which do not see the tokens in
between. Only the sequential family gives conditionals, whose product is a joint probability. Heads
are float32 whatever the trunk is. They start as the trunk's own next-token distribution, as their
last projections are zero (sequential: up to the random projection that mixes the embedding in).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.policies.trunk import Trunk, TrunkStates

if TYPE_CHECKING:
    from transformers import PretrainedConfig


MOST_OFFSETS = 64
"""Most heads: each is a layer of its own."""


class MTPHeads(nn.Module, ABC):
    """Heads for the offsets 1 … M. Constructing makes no weights; `build` does.

    Args:
        offsets: M, the future tokens that are predicted; blocks may be up to 1 + M long.
        own_unembedding: give every head its own unembedding, started as a copy of the trunk's; else
            all share it.
        detach_trunk: keep the policy loss of future offsets out of the trunk. Weights that heads
            share still get it: the unembedding and, for parallel heads, the final norm [V]. False by
            default: otherwise future terms would train the heads alone [I] (docs/algorithms.md
            11.1).
        support: ids of the distribution of offset n, if rollouts store a support: "stored" for the
            support that the sampler stored at t+n, "full" for the whole vocabulary.
        checkpointing: recompute a head's activations in the backward pass.
        weights_file: a file of `save` to load; None starts afresh, or from `policy.checkpoint`.
    """

    family: ClassVar[str]
    reads_ahead: ClassVar[bool] = False
    """True if a head reads response tokens behind t, so that responses cannot share a prompt."""

    def __init__(
        self,
        offsets: int = 2,
        own_unembedding: bool = False,
        detach_trunk: bool = False,
        support: Literal["stored", "full"] = "stored",
        checkpointing: bool = False,
        weights_file: str | None = None,
    ) -> None:
        super().__init__()
        at_least(type(self).__name__, 1, most=MOST_OFFSETS, offsets=offsets)
        self.offsets = offsets
        self.own_unembedding = own_unembedding
        self.detach_trunk = detach_trunk
        self.support = support
        self.checkpointing = checkpointing
        self.weights_file = weights_file
        self.unembeddings: nn.ModuleList | None = None
        self._trunk: Trunk | None = None

    # --- weights ----------------------------------------------------------------------------------

    def build(self, trunk: Trunk) -> None:
        """Make the weights."""
        # not a submodule: the policy holds the same network
        object.__setattr__(self, "_trunk", trunk)
        self._make(trunk)
        if self.own_unembedding:
            self.unembeddings = nn.ModuleList(trunk.new_unembedding() for _ in range(self.offsets))
        if self.weights_file is not None:
            self.load(self.weights_file)

    @abstractmethod
    def _make(self, trunk: Trunk) -> None:
        """Make the weights of the family."""

    @property
    def trunk(self) -> Trunk:
        """The decoder that the heads build on."""
        if self._trunk is None:
            raise RuntimeError("`build` was not called")
        return self._trunk

    def describe(self, config: PretrainedConfig) -> dict[str, Any]:
        """Return the facts in which heads and a file of them must agree."""
        return {
            "family": self.family,
            "offsets": self.offsets,
            "own_unembedding": self.own_unembedding,
            "trunk": config.model_type,
            "hidden_size": config.hidden_size,
            "vocabulary": config.vocab_size,
        }

    def save(self, path: str | Path) -> None:
        """Write the heads as safetensors, with `describe` as metadata (docs/mtp_heads.md)."""
        from safetensors.torch import save_file

        metadata = {key: str(value) for key, value in self.describe(self.trunk.config).items()}
        state = {name: value.contiguous() for name, value in self.state_dict().items()}
        save_file(state, str(path), metadata={"format": "pt"} | metadata)

    def load(self, path: str | Path) -> None:
        """Load the weights of a file that `save` wrote.

        Raises:
            UserError: there is no such file, or it holds heads of another family, size or trunk.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as file:
                metadata = file.metadata() or {}
                state = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"`mtp.weights_file` {str(path)!r} cannot be read as safetensors: {error}"
            ) from error
        for key, value in self.describe(self.trunk.config).items():
            if metadata.get(key) != str(value):
                raise UserError(
                    f"`mtp.weights_file` {str(path)!r} holds heads with {key} {metadata.get(key)}, "
                    f"`policy.mtp` has {value}"
                )
        self.load_state_dict(state)

    # --- prediction -------------------------------------------------------------------------------

    @abstractmethod
    def _chain(self, states: TrunkStates, offsets: int) -> Iterator[Tensor]:
        """Yield hidden states of offsets 1 … `offsets` behind the final norm, each `[R, L, D]`."""

    def hidden(self, states: TrunkStates, offsets: int) -> Iterator[Tensor]:
        """Yield the hidden states whose unembedding predicts o_{t+n}, one offset at a time.

        Args:
            states: of the trunk; detach them to keep gradients in the heads.
            offsets: how many, at most M.
        """
        dtype = states.after_norm_RLD.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        chain = self._chain(states, offsets)
        for _ in range(offsets):
            # over a half-precision base; over float32 the precision of the trainer holds
            with (
                torch.autocast(states.after_norm_RLD.device.type, dtype) if half else nullcontext()
            ):
                hidden_RLD = next(chain)
            yield hidden_RLD.to(dtype)

    def unembedding(self, n: int) -> nn.Module:
        """Return the unembedding of offset n."""
        return self.trunk.unembedding if self.unembeddings is None else self.unembeddings[n - 1]

    def _run(self, layer: nn.Module, hidden_RLD: Tensor, states: TrunkStates) -> Tensor:
        """Put one decoder layer over the lines."""
        if self.checkpointing and torch.is_grad_enabled():
            from torch.utils.checkpoint import checkpoint

            return checkpoint(self._layer, layer, hidden_RLD, states, use_reentrant=False)
        return self._layer(layer, hidden_RLD, states)

    def _layer(self, layer: nn.Module, hidden_RLD: Tensor, states: TrunkStates) -> Tensor:
        from transformers.masking_utils import create_causal_mask

        lines = states.lines
        mask = create_causal_mask(
            config=self.trunk.config,
            inputs_embeds=hidden_RLD,
            attention_mask=lines.attention_mask(),
            past_key_values=None,
            position_ids=lines.position_ids_RL,
        )
        output = layer(
            hidden_RLD,
            attention_mask=mask,
            position_ids=lines.position_ids_RL,
            position_embeddings=self.trunk.positions(hidden_RLD, lines.position_ids_RL),
            past_key_values=None,
            use_cache=False,
        )
        return output[0] if isinstance(output, tuple) else output


class ParallelHeads(MTPHeads):
    """One decoder layer per offset, on the trunk's last hidden state and under its final norm."""

    family: ClassVar[str] = "parallel"

    def _make(self, trunk: Trunk) -> None:
        self.layers = nn.ModuleList(trunk.new_layer() for _ in range(self.offsets))

    def _chain(self, states: TrunkStates, offsets: int) -> Iterator[Tensor]:
        norm: Any = self.trunk.decoder.norm
        for n in range(offsets):
            yield norm(self._run(self.layers[n], states.before_norm_RLD, states))


class SequentialHeads(MTPHeads):
    """DeepSeek-V3's modules, teacher-forced: h^n = Layer(P_n [norm(e(o_{t+n-1})) ; norm(h^{n-1})]).

    The order is [embedding ; hidden], as published checkpoints have it, and not that of the paper's
    formula [S] (docs/algorithms.md 11.1). Each depth has its own final norm.
    """

    family: ClassVar[str] = "sequential"
    reads_ahead: ClassVar[bool] = True

    def _make(self, trunk: Trunk) -> None:
        D, M = trunk.config.hidden_size, self.offsets

        def norms(like: Any = None) -> nn.ModuleList:
            eps = getattr(trunk.config, "rms_norm_eps", 1e-6)
            fresh = nn.RMSNorm(D, eps=eps, dtype=trunk.dtype)
            return nn.ModuleList(copy.deepcopy(like or fresh) for _ in range(M))

        self.enorm, self.hnorm = norms(), norms()
        self.norm = norms(copy.deepcopy(trunk.decoder.norm).to(trunk.dtype))
        self.norm.requires_grad_(True)
        self.eh_proj = nn.ModuleList(
            nn.Linear(2 * D, D, bias=False, dtype=trunk.dtype) for _ in range(M)
        )
        # each projection passes the hidden state on, with a random mix of the embedding
        std = getattr(trunk.config, "initializer_range", 0.02)
        for module in self.eh_proj:
            weight: Any = module.weight
            nn.init.normal_(weight, std=std)
            with torch.no_grad():
                weight[:, D:] += torch.eye(D, dtype=trunk.dtype)
        self.layers = nn.ModuleList(trunk.new_layer() for _ in range(M))

    def _chain(self, states: TrunkStates, offsets: int) -> Iterator[Tensor]:
        hidden_RLD, ids_RL = states.after_norm_RLD, states.lines.input_ids_RL
        for n in range(offsets):
            ids_RL = nn.functional.pad(ids_RL[:, 1:], (0, 1))
            embedded_RLD = self.trunk.embed_tokens(ids_RL).detach().to(self.trunk.dtype)
            pair = [self.enorm[n](embedded_RLD), self.hnorm[n](hidden_RLD.to(self.trunk.dtype))]
            hidden_RLD = self._run(self.layers[n], self.eh_proj[n](torch.cat(pair, -1)), states)
            yield self.norm[n](hidden_RLD)


class MedusaHeads(MTPHeads):
    """`h + SiLU(W_n h)` with W_n = 0 at the start."""

    family: ClassVar[str] = "medusa"

    def _make(self, trunk: Trunk) -> None:
        D = trunk.config.hidden_size
        self.residual = nn.ModuleList(
            nn.Linear(D, D, bias=False, dtype=trunk.dtype) for _ in range(self.offsets)
        )
        for linear in self.residual:
            weight: Any = linear.weight
            nn.init.zeros_(weight)

    def _chain(self, states: TrunkStates, offsets: int) -> Iterator[Tensor]:
        hidden_RLD = states.after_norm_RLD
        for n in range(offsets):
            yield hidden_RLD + nn.functional.silu(self.residual[n](hidden_RLD.to(self.trunk.dtype)))
