"""The top k of the full head is a sort by value and id."""

import pytest
import torch

from tests.support.head_options import full_top_k
from tests.support.heads import V, loop_logits, problem


@pytest.mark.parametrize("k", [1, 4, V])
@pytest.mark.parametrize("chunk_size", [None, 3])
def test_the_full_top_k_is_a_sort_by_value_and_id(k, chunk_size):
    hidden, weight, bias, _, _, mask = problem(seed=14)
    hidden, weight, bias = (x.round() for x in (hidden, weight, bias))  # many equal logits
    hidden = torch.where(mask.unsqueeze(-1), hidden, torch.nan)
    ids = full_top_k(hidden, weight, k, mask_BT=mask, bias_V=bias, chunk_size=chunk_size)
    assert ids.dtype == torch.int32
    assert (ids[~mask] == 0).all()
    for b, t in mask.nonzero().tolist():
        z = loop_logits(hidden[b, t], weight, bias)
        assert ids[b, t].tolist() == sorted(range(V), key=lambda v: (-z[v], v))[:k]
