"""The plan of a masked policy: rows and copies, and no KV cache."""

from __future__ import annotations

from dataclasses import replace

from lightning_mpo.objective.likelihoods import CoupledElbo, Denoising, Elbo
from lightning_mpo.plan.masked_passes import tokens_of_block, tokens_of_step
from lightning_mpo.plan.predict import Planner
from lightning_mpo.sampling import DiffusionSampler, LocalSampler
from tests.support.masked_runs import planned


def test_tokens_of_a_step_and_of_a_block_are_counted():
    sampler = DiffusionSampler(8, 2)
    assert (tokens_of_step(sampler, 16), tokens_of_block(sampler, 16)) == (2, 8)
    assert (tokens_of_step(LocalSampler(), 16), tokens_of_block(LocalSampler(), 16)) == (1, 16)


def test_rows_grow_with_the_samples_and_an_update_does_not(tmp_path):
    few, many = (Planner(*planned(tmp_path, Elbo(n), accumulate=n)) for n in (2, 8))
    assert (few.sizes.trained_rows, many.sizes.trained_rows) == (32, 128)
    assert few.sizes.micro_rows == many.sizes.micro_rows == 16
    parts = [planner.predict().phases for planner in (few, many)]
    update = [part["update"] for part in parts]
    assert update[0]["activations"] == update[1]["activations"] > 0
    assert update[1]["rollout buffer"] == 4 * update[0]["rollout buffer"]
    assert few.cache(few.sizes) == 0
    assert set(parts[0]["rollout"]) - set(few.held) == {"activations", "head"}


def test_copies_of_one_row_cost_masks_and_not_activations(tmp_path):
    one, more = (Planner(*planned(tmp_path, CoupledElbo(n))) for n in (1, 4))
    assert (one.copies, more.copies) == (2, 8)
    parts = [planner.predict().phases["update"] for planner in (one, more)]
    assert parts[0]["activations"] == parts[1]["activations"]
    growth = parts[1]["rollout buffer"] - parts[0]["rollout buffer"]
    sizes = one.sizes
    assert growth == 6 * sizes.trained_rows * (sizes.prompt + 5 * sizes.response)
    assert more.update(micro_rows=8) < more.update(micro_rows=16)
    # the second copy is computed again beside the gradients of the first
    trunk = one.passes.peak(sizes.micro_rows, 8, head=False, backward=True, passes=2)
    assert parts[0]["activations"] + parts[0]["gradients"] == trunk
    # a sum over the copies stands beside the gradients of the first micro-batch
    gradients = [one._update(replace(sizes, accumulate=on))["gradients"] for on in (False, True)]
    assert gradients[1] == 2 * gradients[0]


def test_passes_of_a_step_read_fewer_states(tmp_path):
    """The head of `Denoising` scores the tokens of one step."""
    elbo, denoising = (
        Planner(*planned(tmp_path, kind(2), accumulate=2)) for kind in (Elbo, Denoising)
    )
    assert elbo.passes.tokens(4, 8) == 32
    assert denoising.passes.tokens(4, 8) == 8
    sizes = replace(elbo.sizes, together=8)
    assert sum(elbo._reveal(sizes).values()) > 0
