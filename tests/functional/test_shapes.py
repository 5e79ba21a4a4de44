"""The checks name the argument, what it must be and what it is."""

import pytest
import torch

from lightning_mpo.functional.shapes import check, same


def test_sizes_are_read_from_the_names():
    sizes = check(
        {"V": 7}, hidden_BTD=torch.zeros(2, 3, 4), weight_VD=torch.zeros(7, 4), bias_V=None
    )
    assert sizes == {"B": 2, "T": 3, "D": 4, "V": 7}


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (
            {"x_BU": torch.zeros(2, 3), "y_BU": torch.zeros(2, 4)},
            r"`y_BU` must have shape \[B=2, U=3\].*got \[2, 4\]",
        ),
        (
            {"x_BU": torch.zeros(2, 3), "y_B": torch.zeros(3)},
            r"`y_B` must have shape \[B=2\] \(as `x_BU`\), got \[3\]",
        ),
        ({"x_BU": torch.zeros(2)}, r"`x_BU` must have shape \[B, U\], got \[2\]"),
    ],
)
def test_a_wrong_shape_is_named(tensors, message):
    with pytest.raises(ValueError, match=message):
        check(**tensors)


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"mask_B": torch.zeros(2)}, "`mask_B` must be bool, got torch.float32"),
        (
            {"support_mask_BK": torch.zeros(2, 2).int()},
            "`support_mask_BK` must be bool, got torch.int32",
        ),
        ({"valid_B": torch.zeros(2)}, "`valid_B` must be bool"),
        ({"tokens_B": torch.zeros(2)}, "`tokens_B` must be int32 or int64, got torch.float32"),
        (
            {"support_logits_BK": torch.zeros(2, 2).int()},
            "`support_logits_BK` must be floating point",
        ),
        (
            {"rewards_B": torch.zeros(2).long()},
            "`rewards_B` must be floating point, got torch.int64",
        ),
        ({"rewards_B": [1.0]}, "`rewards_B` must be a tensor, got list"),
    ],
)
def test_a_wrong_dtype_is_named(tensors, message):
    with pytest.raises(TypeError, match=message):
        check(**tensors)


def test_batch_letters_stand_for_any_leading_shape():
    for lead in [(), (5,), (2, 3), (2, 3, 4)]:
        sizes = check(
            batch="BT", hidden_BTD=torch.zeros(*lead, 6), tokens_BT=torch.zeros(lead).long()
        )
        assert sizes == {"D": 6}
    with pytest.raises(
        ValueError, match=r"`tokens_BT` must have shape \[2, 3\] \(as `hidden_BTD`\), got \[3, 2\]"
    ):
        check(batch="BT", hidden_BTD=torch.zeros(2, 3, 6), tokens_BT=torch.zeros(3, 2).long())
    with pytest.raises(ValueError, match=r"`weight_VD` must have shape \[V, D=6\]"):
        check(batch="BT", hidden_BTD=torch.zeros(2, 3, 6), weight_VD=torch.zeros(9, 5))


def test_same_names_the_model():
    same(logprobs=torch.zeros(2, 1), reference_logprobs=torch.ones(2, 1))
    with pytest.raises(ValueError, match=r"`b` must have the shape of `a`, \[2\], got \[2, 1\]"):
        same(a=torch.zeros(2), b=torch.zeros(2, 1))
