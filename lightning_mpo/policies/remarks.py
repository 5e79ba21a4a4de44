"""Lines that tell a user about a model before its weights are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def remarks_on(
    tokenizer: PreTrainedTokenizerBase,
    end_tokens: Sequence[int],
    dropouts: Sequence[str],
    unembedded: dict[str, int],
) -> list[str]:
    """Return one line on end tokens, and one each on dropouts and tokens without embedding.

    Args:
        tokenizer: of the model.
        end_tokens: ids that end a response.
        dropouts: names of the model's dropouts that were set to 0.
        unembedded: texts and ids of tokens that the model has no embedding for.
    """
    ends = ", ".join(f"{tokenizer.convert_ids_to_tokens(end)!r} ({end})" for end in end_tokens)
    lines = [f"ends       a response ends with {ends}"]
    if dropouts:
        lines.append(
            f"dropout    {', '.join(dropouts)} of the model set to 0: sampler and trainer must "
            "agree"
        )
    if unembedded:
        text = min(unembedded, key=unembedded.__getitem__)
        lines.append(
            f"tokens     {len(unembedded)} of the tokenizer have no embedding ({text!r}, say): "
            "no prompt may hold them"
        )
    return lines
