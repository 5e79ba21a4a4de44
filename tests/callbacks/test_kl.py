"""KL tracking: mean, maximum, the controller, and the early stop."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import KLTracking
from lightning_mpo.errors import UserError
from lightning_mpo.functional.divergences import k3
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.objective.kl import AdaptiveCoefficient, ConstantCoefficient, KLPenalty
from lightning_mpo.rollout.experience import mean_over_ranks
from tests.support.runs import adam, fit, make_objective


class Keep(RolloutCallback):
    def __init__(self):
        self.events, self.references = [], []

    def on_rollout_end(self, trainer, module, event):
        self.events.append(event)
        self.references.append(module.score(event.experience.rollout, reference=True).logprobs_BT)


@pytest.mark.parametrize("epochs", [1, 2])
def test_mean_and_maximum_are_over_the_response_tokens_of_a_rollout(tmp_path, epochs):
    keep = Keep()
    run = fit(
        tmp_path, callbacks=[KLTracking(), keep], rollout={"epochs": epochs}, max_steps=3 * epochs,
        module={"optimizer": adam(2e-2)},
    )  # fmt: skip
    means, largest = (
        run.record.column("kl/rollout_mean")[::epochs],
        run.record.column("kl/rollout_max")[::epochs],
    )
    assert means[0] == pytest.approx(0, abs=1e-6)
    assert means[1] > 1e-4
    for i, (event, reference_BT) in enumerate(zip(keep.events, keep.references, strict=True)):
        rollout = event.experience.rollout
        values = k3(rollout.behaviour_logprobs_BT, reference_BT)[rollout.response_mask_BT]
        assert means[i] == pytest.approx(values.mean().item(), rel=1e-3, abs=1e-6)
        assert largest[i] == pytest.approx(values.max().item(), rel=1e-3, abs=1e-6)
    assert "kl/coefficient" not in run.record.lines[0][1]


def test_the_reference_is_kept_only_where_someone_asks(tmp_path):
    assert fit(tmp_path, max_steps=1).module.policy.reference_network is None
    watched = fit(tmp_path, callbacks=[KLTracking()], max_steps=1)
    assert watched.module.policy.reference_network is not None
    assert watched.record.column("kl/reference") == [pytest.approx(0, abs=1e-6)]


def test_tracking_changes_no_weight(tmp_path):
    plain, watched = (
        fit(tmp_path, max_steps=3),
        fit(tmp_path, callbacks=[KLTracking()], max_steps=3),
    )
    assert all(torch.equal(plain.weights[n], watched.weights[n]) for n in plain.weights)


def test_it_moves_an_adaptive_coefficient_by_the_measured_divergence(tmp_path):
    controller = AdaptiveCoefficient(target=1e-3, coefficient=0.1, horizon=64)
    run = fit(
        tmp_path, callbacks=[KLTracking()], objective=make_objective(terms=[KLPenalty(controller)]), max_steps=4,
        module={"optimizer": adam(2e-2)},
    )  # fmt: skip
    expected, coefficient = [], 0.1
    for mean in run.record.column("kl/rollout_mean"):
        coefficient *= 1 + min(max(mean / 1e-3 - 1, -0.2), 0.2) * 16 / 64
        expected.append(coefficient)
    assert run.record.column("kl/coefficient") == pytest.approx(expected, rel=1e-5)
    assert expected[0] < 0.1 < expected[-1], "down while below the target, up above it"


def test_it_moves_when_nobody_watches(tmp_path):
    kl = [
        KLPenalty(AdaptiveCoefficient(target=1e-3, coefficient=0.1, horizon=64)) for _ in range(2)
    ]
    module = {"optimizer": adam(2e-2)}
    watched = fit(
        tmp_path,
        callbacks=[KLTracking()],
        objective=make_objective(terms=[kl[0]]),
        max_steps=4,
        module=module,
    )
    alone = fit(tmp_path, objective=make_objective(terms=[kl[1]]), max_steps=4, module=module)
    assert kl[0].controller.coefficient == kl[1].controller.coefficient != 0.1
    assert alone.record.column("kl/coefficient") == watched.record.column("kl/coefficient")


def test_a_constant_coefficient_stays(tmp_path):
    objective = make_objective(terms=[KLPenalty(ConstantCoefficient(0.3))])
    run = fit(tmp_path, callbacks=[KLTracking()], objective=objective, max_steps=2)
    assert run.record.column("kl/coefficient") == pytest.approx([0.3, 0.3])


def test_it_stops_above_a_bound_at_the_end_of_an_update(tmp_path):
    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    with pytest.warns(
        UserWarning,
        match=r"nats per token from its reference, over `KLTracking.stop_above` \(0.001\)",
    ):
        run = fit(
            tmp_path, callbacks=[KLTracking(stop_above=1e-3), save], max_steps=50, accumulate_grad_batches=2,
            module={"optimizer": adam(2e-2)},
        )  # fmt: skip
    means = run.record.column("kl/rollout_mean")
    assert all(mean <= 1e-3 for mean in means[:-1])
    assert means[-1] > 1e-3
    assert run.trainer.global_step == len(means) < 50
    state = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert state["loops"]["fit_loop"]["epoch_loop.batch_progress"]["total"]["completed"] == 2 * len(
        means
    )


@pytest.mark.parametrize("bound", [0, -1.0])
def test_a_bound_is_positive(bound):
    with pytest.raises(UserError, match="stop_above"):
        KLTracking(stop_above=bound)


def test_ranks_of_other_lengths_count_by_their_tokens():
    """Ten tokens at 0.1 and ninety at 0.01 are 0.019 in the mean, not 0.055."""
    ranks = [torch.full((10,), 0.1), torch.full((90,), 0.01)]
    sums = sum(
        torch.stack([part.double().sum(), torch.tensor(len(part)).double()]) for part in ranks
    )

    class Module:
        def over_ranks(self, own):
            assert own.tolist() == pytest.approx([1.0, 10.0])
            return sums

    assert mean_over_ranks(Module().over_ranks, ranks[0]) == pytest.approx(0.019)
