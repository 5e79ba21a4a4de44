"""Optimizers and schedulers whose options cannot be are refused on a small weight."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch.optim import lr_scheduler as S

from lightning_mpo.errors import UserError
from lightning_mpo.modules.trial import make_optimizer, try_optimizer

SGD = partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize("rate", [-1e-3, float("nan"), float("inf"), 1e30])
@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.AdamW])
def test_learning_rates_that_cannot_be(kind, rate):
    with pytest.raises(
        UserError, match=r"^`model.optimizer`.*learning rate|^`model.optimizer`.*`lr`"
    ):
        try_optimizer(partial(kind, lr=rate), None)


@pytest.mark.parametrize(
    ("options", "wrong"),
    [
        ({"weight_decay": -1.0}, "weight_decay"),
        ({"weight_decay": float("nan")}, "weight_decay"),
        ({"betas": (1.5, 0.9)}, "beta"),
        ({"eps": -1.0}, "epsilon"),
        ({"momentum": 0.9}, "momentum"),
    ],
)
def test_other_options_of_an_optimizer(options, wrong):
    with pytest.raises(UserError, match=f"`model.optimizer`.*{wrong}"):
        try_optimizer(partial(torch.optim.AdamW, lr=0.1, **options), None)


@pytest.mark.parametrize(
    ("scheduler", "wrong"),
    [
        (partial(S.OneCycleLR, max_lr=0.1, total_steps=2), "ends after `total_steps` = 2 updates"),
        (partial(S.OneCycleLR, max_lr=0.1, total_steps=0), "total_steps"),
        (
            partial(S.OneCycleLR, max_lr=0.1, total_steps=10, pct_start=0.1),
            "divides by zero; with `trainer.max_steps: 4`",
        ),
        (partial(S.OneCycleLR, max_lr=[0.1, 0.1], total_steps=9), "max_lr"),
        (S.ReduceLROnPlateau, "waits for a metric"),
        (
            partial(S.ExponentialLR, gamma=-1.0),
            "`model.scheduler: ExponentialLR` sets the learning rate to -0.1",
        ),
        (partial(S.ExponentialLR, gamma=1e300), "at update"),
        (partial(S.StepLR, step_size=0), "`model.scheduler"),
        (partial(S.LambdaLR, lr_lambda=lambda step: float("nan")), "nan"),
        (
            partial(S.LinearLR, start_factor=0.0),
            "`model.scheduler`: Starting multiplicative factor",
        ),
        (lambda optimizer: optimizer, "must make a torch scheduler, got SGD"),
    ],
)
def test_schedulers_that_cannot_be(scheduler, wrong):
    with pytest.raises(UserError) as caught:
        try_optimizer(SGD, scheduler, updates=4)
    assert wrong in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_good_ones_pass_and_leave_the_random_state_alone():
    before = torch.get_rng_state()
    for scheduler in (
        None,
        partial(S.CosineAnnealingLR, T_max=4),
        partial(S.OneCycleLR, max_lr=0.1, total_steps=4),
    ):
        try_optimizer(SGD, scheduler, updates=4)
    both = partial(S.OneCycleLR, max_lr=[0.1, 0.2], total_steps=4)
    try_optimizer(SGD, both, parts=("policy", "mtp"), learning_rates={"mtp": 0.2}, updates=4)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_rate_for_a_part_that_is_not_there():
    with pytest.raises(UserError, match="`learning_rates` names 'critic', which is not trained"):
        try_optimizer(SGD, None, learning_rates={"critic": 0.1})


def test_a_failure_that_real_weights_need_not_have_passes():
    def needs_cuda(weights):
        raise RuntimeError("no kernel for the CPU")

    try_optimizer(needs_cuda, None)


def test_an_optimizer_of_matrices():
    def muon(weights):
        return torch.optim.Muon(weights, lr=0.1)

    try_optimizer(muon, None)
    with pytest.raises(
        UserError,
        match="takes no weights of one dimension, and norms have such: Muon only supports 2D",
    ):
        try_optimizer(muon, None, vectors=True)
    with pytest.raises(
        UserError, match="`model.optimizer` does not take the weights: Muon only supports 2D"
    ):
        make_optimizer(muon, [torch.nn.Parameter(torch.zeros(3))])
