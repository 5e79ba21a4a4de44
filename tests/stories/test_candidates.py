"""Candidates of a sampler: served, missing, and more than there are ids."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.objective.divergence_mask import DivergenceMask
from lightning_mpo.sampling.local import LocalSampler
from tests.support.runs import fit, make_objective, make_policy


class Plain(LocalSampler):
    """Records no candidates."""

    records_candidates = False


def test_a_sampler_without_candidates_serves_whoever_asks_for_none(tmp_path):
    fit(
        tmp_path,
        objective=make_objective(surrogate=DivergenceMask()),
        rollout={"sampler": Plain()},
        max_steps=1,
    )
    policy = make_policy()
    objective = make_objective(surrogate=DivergenceMask(top_k=4))
    with pytest.raises(
        UserError, match="`rollout.sampler` Plain records no candidates, .* compares 4"
    ):
        fit(tmp_path, objective=objective, rollout={"sampler": Plain()}, policy=policy, max_steps=1)
    assert policy.network is None  # refused before any weights were loaded


def test_a_sampler_that_takes_the_argument_and_records_nothing_is_refused(tmp_path):
    class Forgetful(LocalSampler):
        def sample(self, policy, prompts, completions, request, **options):
            return super().sample(
                policy, prompts, completions, replace(request, candidates=0), **options
            )

    objective = make_objective(surrogate=DivergenceMask(top_k=4))
    with pytest.raises(UserError, match="the rollout has no `candidates_BTK` with log-probs"):
        fit(tmp_path, objective=objective, rollout={"sampler": Forgetful()}, max_steps=1)


def test_more_candidates_than_ids_are_refused_before_weights_are_loaded(tmp_path):
    policy = make_policy()
    message = (
        f"`DivergenceMask.top_k` must be at most the vocabulary size {policy.vocabulary}, got 20"
    )
    with pytest.raises(UserError, match=message):
        fit(
            tmp_path,
            objective=make_objective(surrogate=DivergenceMask(top_k=20)),
            policy=policy,
            max_steps=1,
        )
    assert policy.network is None
