"""Files of multi-token heads: they come back, and those of other heads are refused."""

from __future__ import annotations

import pytest
import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies import SequentialHeads
from lightning_mpo.scores import ScoreRequest
from tests.support.mtp import each_family


@each_family
@pytest.mark.parametrize("own", [False, True], ids=["tied", "own"])
def test_a_file_of_heads_comes_back(policy_with_heads, family, own, tmp_path):
    policy = policy_with_heads(family, options={"own_unembedding": own})
    policy.mtp.save(tmp_path / "heads.safetensors")
    again = policy_with_heads(
        family,
        fresh=True,
        options={"own_unembedding": own, "weights_file": str(tmp_path / "heads.safetensors")},
    )
    for name, value in policy.mtp.state_dict().items():
        assert torch.equal(again.mtp.state_dict()[name], value)
    assert not again.cold_parts
    assert policy_with_heads(family, fresh=True).cold_parts == {"mtp"}


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"family": SequentialHeads}, "family sequential, `policy.mtp` has parallel"),
        ({"offsets": 2}, "offsets 2, `policy.mtp` has 3"),
        ({"options": {"own_unembedding": True}}, "own_unembedding True, `policy.mtp` has False"),
        ({"hidden_size": 16}, "hidden_size 16, `policy.mtp` has 32"),
    ],
    ids=["family", "offsets", "unembedding", "trunk"],
)
def test_a_file_of_other_heads_is_refused(policy_with_heads, other, message, tmp_path):
    policy_with_heads(**other).mtp.save(tmp_path / "heads.safetensors")
    with pytest.raises(UserError, match=message):
        policy_with_heads(options={"weights_file": str(tmp_path / "heads.safetensors")})


def test_a_file_that_is_none_is_refused(policy_with_heads, tmp_path):
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        policy_with_heads(options={"weights_file": str(tmp_path / "none.safetensors")})


def test_fewer_heads_than_offsets_are_refused(policy_with_heads, tiny_policy):
    with pytest.raises(
        UserError, match=r"blocks of 5 tokens .* need 4 future offsets, but `policy.mtp` has 3"
    ):
        policy_with_heads().check(ScoreRequest(future=4))
    with pytest.raises(UserError, match="the policy has none; give `policy.mtp`"):
        tiny_policy().check(ScoreRequest(future=1))
