"""Critics: the value V(h_t) of the state before each token, in units of reward.

==================  ==========================================================================
``ValueHead``       a head on the policy's own trunk: next to no memory, but the trunk serves
                    two losses (TRL's old PPO, trlX [C])
``SeparateCritic``  a trained copy of the initial trunk (TRL's experimental PPO, verl, OpenRLHF
                    [C]): nothing is shared, at the memory of a second fully trained model
==================  ==========================================================================

h_t is the hidden state behind the final norm that predicts token t: the state before the action.
The last layer starts at zero, so that the first values are 0. Critics are float32 whatever the
trunk is.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.policies.scoring import pick_hidden

if TYPE_CHECKING:
    from lightning_mpo.policies.trunk import TrunkStates


WIDEST = 1_048_576
"""Most units of a hidden layer."""


class Critic(nn.Module, ABC):
    """Values of response tokens. Constructing makes no weights; `build` does.

    Args:
        width: of a hidden layer (SiLU) between hidden state and value; None: the value is linear in
            the hidden state.
    """

    def __init__(self, width: int | None = None) -> None:
        super().__init__()
        at_least(type(self).__name__, 1, most=WIDEST, width=width)
        self.width = width
        self.head: nn.Module | None = None

    def build(self, decoder: nn.Module) -> None:
        """Make the weights. A second call starts afresh, from the decoder as it is by then.

        Args:
            decoder: the policy's network without its head.
        """
        like = next(decoder.parameters())
        config: Any = decoder.config
        D: int = config.get_text_config().hidden_size
        options: dict[str, Any] = {"dtype": _wide(like.dtype), "device": like.device}
        last = nn.Linear(self.width or D, 1, **options)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        hidden = [] if self.width is None else [nn.Linear(D, self.width, **options), nn.SiLU()]
        self.head = nn.Sequential(*hidden, last)

    @abstractmethod
    def _hidden(self, states: TrunkStates) -> Tensor:
        """Return the hidden states that the head reads. Shape `[R, L, D]`."""

    def values(self, states: TrunkStates, index_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Return V(h_t) of response tokens, 0 where masked. Shape `[B, T]`.

        Args:
            states: hidden states of the policy's trunk, and their lines.
            index_BT: index in the flattened lines of the hidden state that predicts each token.
            mask_BT: tokens to value.
        """
        if self.head is None:
            raise RuntimeError("`build` was not called")
        hidden_nD = pick_hidden(self._hidden(states), index_BT[mask_BT])
        dtype = next(self.head.parameters()).dtype
        with torch.autocast(hidden_nD.device.type, enabled=False):
            values_n = self.head(hidden_nD.to(dtype))[:, 0]
        return torch.zeros(mask_BT.shape, dtype=dtype, device=mask_BT.device).masked_scatter(
            mask_BT, values_n
        )


class ValueHead(Critic):
    """A head on the policy's own trunk.

    Args:
        width: of a hidden layer (SiLU) between hidden state and value; None: the value is linear in
            the hidden state.
        detach_trunk: keep the value loss out of the trunk. False by default, as in TRL's and trlX's
            shared trunks [C]: the hidden states of a language model need not contain a value, and
            `critic.coef` limits how much this loss changes them. True leaves the policy's weights
            to the policy loss alone.
    """

    def __init__(self, width: int | None = None, detach_trunk: bool = False) -> None:
        super().__init__(width)
        self.detach_trunk = detach_trunk

    def _hidden(self, states: TrunkStates) -> Tensor:
        return states.after_norm_RLD.detach() if self.detach_trunk else states.after_norm_RLD


class SeparateCritic(Critic):
    """A trained copy of the initial trunk under a value head.

    All of its weights are trained, in float32, also where the policy has LoRA over a bfloat16 base:
    16 bytes per parameter of the trunk with Adam (weight, gradient, two moments), where that base
    takes 2. Over a bfloat16 base it computes in bfloat16 by autocast. Adapters that
    `policy.checkpoint` brought are merged into the copy.

    Args:
        width: of a hidden layer (SiLU) between hidden state and value; None: the value is linear in
            the hidden state.
        checkpointing: recompute the copy's activations in the backward pass.
    """

    def __init__(self, width: int | None = None, checkpointing: bool = False) -> None:
        super().__init__(width)
        self.checkpointing = checkpointing
        self.trunk: Any = None

    def build(self, decoder: nn.Module) -> None:
        super().build(decoder)
        self.trunk = _trainable_copy(decoder)
        if self.checkpointing:
            self.trunk.gradient_checkpointing_enable({"use_reentrant": False})
        self.train()

    def _hidden(self, states: TrunkStates) -> Tensor:
        if self.trunk is None:
            raise RuntimeError("`build` was not called")
        lines, dtype = states.lines, states.after_norm_RLD.dtype
        half = dtype in (torch.bfloat16, torch.float16)
        with torch.autocast(lines.input_ids_RL.device.type, dtype) if half else nullcontext():
            return self.trunk(
                input_ids=lines.input_ids_RL,
                position_ids=lines.position_ids_RL,
                attention_mask=lines.attention_mask(),
                use_cache=False,
            ).last_hidden_state


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _trainable_copy(decoder: nn.Module) -> nn.Module:
    """Return a float32 copy with its own weights, adapters merged."""
    if not all(weight.is_floating_point() for weight in decoder.parameters()):
        raise UserError("`SeparateCritic` cannot copy a quantised trunk; use `ValueHead`")
    copied = copy.deepcopy(decoder).to(_wide(next(decoder.parameters()).dtype))
    for name, module in list(copied.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "merge"):  # an adapter of peft
            module.merge()
            copied.set_submodule(name, module.base_layer)
    return copied.requires_grad_(True)
