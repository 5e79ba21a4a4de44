"""How a masked network takes rows that are padded on the left, and the states in front of its head.

A masked network of transformers takes a mask of keys, and a causal one a mask of pairs. Code of a
repository may take either form, or none. A trial on a few tokens finds the form that works.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lightning_mpo.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MaskForm(Enum):
    """The form of attention masks that a network takes."""

    KEYS = "a mask of keys, [B, L]"
    PAIRS = "a mask of pairs, [B, 1, L, L]"
    NONE = "no mask: rows of one prompt length go together, without padding"


@dataclass(frozen=True)
class RowInputs:
    """Turns rows with padding on the left into arguments of a network.

    Args:
        form: of its attention mask.
        options: names of the arguments of its `forward`.
        first: number of the first position.
    """

    form: MaskForm
    options: frozenset[str]
    first: int = 0

    def without_positions(self) -> RowInputs:
        """Return inputs that leave the count of positions to the network."""
        return replace(self, options=self.options - {"position_ids"})

    @classmethod
    def of(cls, network: nn.Module, form: MaskForm) -> RowInputs:
        """Read the arguments of a network, and the number of its first position."""
        options = frozenset(inspect.signature(network.forward).parameters)
        return cls(form, options, first_position(network))

    def arguments(self, ids_BL: Tensor, mask_BL: Tensor) -> dict[str, Tensor | bool]:
        """Return the arguments for rows; each attends to all tokens that are no padding."""
        arguments: dict[str, Tensor | bool] = {"input_ids": ids_BL}
        # positions count from the first token, so that padding moves none
        if "position_ids" in self.options:
            position_BL = mask_BL.cumsum(1).sub(1).clamp(min=0)
            arguments["position_ids"] = position_BL + self.first
        if self.form is MaskForm.KEYS:
            arguments["attention_mask"] = mask_BL.long()
        if self.form is MaskForm.PAIRS:
            B, L = mask_BL.shape
            arguments["attention_mask"] = mask_BL[:, None, None].expand(B, 1, L, L)
        if "use_cache" in self.options:
            arguments["use_cache"] = False
        return arguments

    def states(self, network: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """Return the input of the network's head at each position. Shape `[B, L, D]`.

        The head itself computes one position of each row, so no tensor `[B, L, V]` is made.

        Args:
            network: of the policy or of the reference.
            ids_BL: tokens, with MASK at hidden positions.
            mask_BL: False for padding on the left.

        Raises:
            UserError: the network does not apply its head once to a state of each token.
        """
        if self.form is MaskForm.NONE and not bool(mask_BL.all()):
            return self._states_by_length(network, ids_BL, mask_BL)
        with record_head_input(network) as inputs:
            network(**self.arguments(ids_BL, mask_BL))
        if len(inputs) != 1 or inputs[0].shape[:2] != ids_BL.shape:
            raise UserError(
                f"`{type(network).__name__}` does not apply its head once to a state of each "
                "token, so that it cannot be scored; choose another model"
            )
        return inputs[0]

    def _states_by_length(
        self, network: PreTrainedModel, ids_BL: Tensor, mask_BL: Tensor
    ) -> Tensor:
        """Run the rows of each length without their padding, whose states are 0."""
        padding_B = (~mask_BL).sum(1)
        parts, order = [], []
        for padding in padding_B.unique().tolist():
            rows = (padding_B == padding).nonzero()[:, 0]
            hidden_RLD = self.states(network, ids_BL[rows, padding:], mask_BL[rows, padding:])
            parts.append(nn.functional.pad(hidden_RLD, (0, 0, padding, 0)))
            order.append(rows)
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())


@contextmanager
def record_head_input(network: PreTrainedModel) -> Iterator[list[Tensor]]:
    """Record the input of a network's head, which then computes the first position only."""
    inputs: list[Tensor] = []

    def record(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        inputs.append(args[0])
        return args[0][:, :1], *args[1:]

    handle = network.get_output_embeddings().register_forward_pre_hook(record)
    try:
        yield inputs
    finally:
        handle.remove()


def first_position(network: nn.Module) -> int:
    """Return the number of the first position; RoBERTa counts from behind its padding index."""
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding):
            return 0 if module.padding_idx is None else module.padding_idx + 1
    return 0


def head_bias(network: PreTrainedModel) -> Tensor | None:
    """Return the bias that the module around the head adds, as in ESM; None: it adds none.

    A bias of the head itself does not count.
    """
    head: Any = network.get_output_embeddings()
    base = getattr(head, "base_layer", head)
    if getattr(base, "bias", None) is not None:
        return None
    for module in network.modules():
        if any(child is head for child in module.children()):
            bias: Any = getattr(module, "bias", None)
            return (
                bias if isinstance(bias, Tensor) and bias.shape == base.weight.shape[:1] else None
            )
    return None


@torch.no_grad()
def find_inputs(
    network: PreTrainedModel, forms: Sequence[MaskForm], ids: Sequence[int], tolerance: float
) -> RowInputs:
    """Return the inputs with the first form of masks that a network computes correctly with.

    The state of the first token must depend on the last token, and no state on padding.

    Args:
        network: in eval mode.
        forms: to try, in this order.
        ids: at least four ids, of which the first and the last differ.
        tolerance: largest difference by rounding, relative to the largest state.

    Raises:
        UserError: no form works; the message has the reason for each.
    """
    # a row, the same with another last token, and the same with padding on the left
    row_1L = torch.tensor([ids], device=network.device)
    other_1L = torch.cat([row_1L[:, :-1], row_1L[:, :1]], 1)
    padded_1L = torch.cat([row_1L[:, 1:3], row_1L], 1)
    mask_1L = torch.arange(padded_1L.shape[1], device=network.device)[None] >= 2
    # each form in turn
    reasons = []
    for form in forms:
        inputs = RowInputs.of(network, form)
        try:
            hidden_LD, other_LD = (
                inputs.states(network, x_1L, torch.ones_like(x_1L, dtype=torch.bool))[0].float()
                for x_1L in (row_1L, other_1L)
            )
            padded_LD = inputs.states(network, padded_1L, mask_1L)[0, 2:].float()
            largest = float(hidden_LD.abs().max())
        except Exception as error:
            if len(forms) == 1:
                raise
            reasons.append(f"with {form.value}: {error}".splitlines()[0])
            continue
        if not float((hidden_LD - other_LD)[0].abs().max()) > 1e-6 * largest:
            reasons.append("its first token does not attend to the last one")
        elif not float((hidden_LD - padded_LD).abs().max()) <= tolerance * largest:
            reasons.append("its states change with padding on the left")
        else:
            return inputs
    raise UserError(
        f"`{type(network).__name__}` cannot be run as a masked language model: "
        + "; ".join(dict.fromkeys(reasons))
        + "; choose another model"
    )


def freeze_unreached(network: nn.Module, output: Tensor) -> None:
    """Freeze the weights on which an output does not depend, such as ESM's head for contacts.

    DDP would wait for their gradients.

    Args:
        network: the weights.
        output: of the network, computed with gradient.
    """
    # the graph of the output, down to the weights
    reached: set[int] = set()
    seen: set[Any] = set()
    todo: list[Any] = [output.grad_fn]
    while todo:
        node = todo.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        reached.add(id(getattr(node, "variable", None)))
        todo += [parent for parent, _ in node.next_functions]
    for weight in network.parameters():
        if id(weight) not in reached:
            weight.requires_grad_(False)
