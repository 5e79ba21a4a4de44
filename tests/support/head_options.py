"""The head functions with the options of `Head` beside the others, so that a test names only what it changes."""

from collections.abc import Callable
from dataclasses import fields
from typing import Any

from torch import Tensor

from lightning_mpo.functional import heads, ranking
from lightning_mpo.functional.head_logits import Head

OPTIONS = [field.name for field in fields(Head) if field.name != "weight_VD"]


def with_flat_options(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that takes a weight and the options of `Head` in place of a head."""

    def call(hidden_BTD: Tensor, weight_VD: Tensor, *arguments: Any, **options: Any) -> Any:
        of_head = {name: options.pop(name) for name in OPTIONS if name in options}
        return function(hidden_BTD, Head(weight_VD, **of_head), *arguments, **options)

    return call


full_logprobs = with_flat_options(heads.full_logprobs)
support_logits = with_flat_options(heads.support_logits)
support_logprobs = with_flat_options(heads.support_logprobs)
full_ranks = with_flat_options(ranking.full_ranks)
full_top_k = with_flat_options(ranking.full_top_k)
