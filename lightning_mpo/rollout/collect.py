"""The way from prompts to the updates on them: sample, judge, score, plan. No trainer is needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Protocol

import torch
from torch import Tensor

from lightning_mpo.objective.kl import KLPenalty
from lightning_mpo.objective.objective import Objective
from lightning_mpo.rewards.scoring import Scores
from lightning_mpo.rollout.admission import check_rollout
from lightning_mpo.rollout.dynamic import DynamicSampling, SamplingCounts
from lightning_mpo.rollout.events import Listener, RolloutEvent
from lightning_mpo.rollout.experience import (
    build_experience,
    divergence_from_reference,
    mean_over_ranks,
)
from lightning_mpo.rollout.noised import noise_metrics, score_noised, with_noise
from lightning_mpo.rollout.parity import check_parity
from lightning_mpo.rollout.ranks import Ranks
from lightning_mpo.rollout.schedule import Schedule
from lightning_mpo.rollout.scorer import Scorer
from lightning_mpo.rollout.state import RolloutBuffer
from lightning_mpo.rollout.successes import Successes
from lightning_mpo.sampling.barring import bar_tokens
from lightning_mpo.sampling.base import Sampler, SamplingRequest
from lightning_mpo.sampling.replay import PrefixReplay
from lightning_mpo.scores import Denominators
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import Experience, Finish, PromptBatch, PromptRow, Rollout, take_rows


class Prompts(Protocol):
    """Serves training prompts; a `PromptDataModule` does."""

    def training_rows(self, counter: int, count: int, round: int = 0) -> list[PromptRow]:
        """Return the rows of a rollout over all ranks: a pure function of its number and round."""

    def encode(self, rows: Sequence[PromptRow]) -> PromptBatch:
        """Tokenise prompts and pad them on the left."""


@dataclass(frozen=True)
class Collected:
    """A rollout, ready to be trained on."""

    buffer: RolloutBuffer
    event: RolloutEvent
    metrics: dict[str, float]

    @property
    def experience(self) -> Experience:
        """All rows of this rank."""
        return self.buffer.experience

    @property
    def plan(self) -> list[list[Tensor]]:
        """Row numbers: `plan[update][micro_batch]`."""
        return self.buffer.plan

    @property
    def denominators(self) -> list[Denominators]:
        """Denominators of each update, summed over ranks."""
        return self.buffer.denominators


@dataclass
class Collector:
    """Makes rollouts: `collect` goes from prompts to an experience and the plan of its updates.

    Args:
        scorer: policy, temperature and precision of scoring; sampling uses the same.
        objective: gives the support to sample from and the scores that updates need.
        prompts: serves the prompts.
        sampler: draws responses.
        judge: calls the rewards.
        schedule: how a rollout is spent in updates.
        max_new_tokens: longest response.
        seed: of sampling, token selection and the order of rows.
        ranks: the processes that share a rollout.
        listener: is called for phases and tokens.
        replay: restarts some completions inside others; None: all are sampled from the prompt.
        dynamic: replaces prompts that all completions answer right, or none; None: every prompt is
            trained on.
        mask_truncated: responses that `max_new_tokens` cut off carry no loss.
        parity_gate: compare sampler and trainer on the next samples; False once they agreed.
        learn: is called with the number of a rollout, and with the right and judged completions of
            its prompts over all ranks, shape `[rounds, P, 2]`; None: they are not counted.
        stop: ids that end a response besides the policy's end tokens.
    """

    scorer: Scorer
    objective: Objective
    prompts: Prompts
    sampler: Sampler
    judge: Callable[[Rollout], Scores]
    schedule: Schedule
    max_new_tokens: int
    seed: int = 0
    ranks: Ranks = field(default_factory=Ranks)
    listener: Listener = field(default_factory=Listener)
    replay: PrefixReplay | None = None
    dynamic: DynamicSampling | None = None
    mask_truncated: bool = False
    parity_gate: bool = True
    learn: Callable[[int, Tensor], None] | None = None
    stop: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        bar_tokens(self.scorer.policy, self.objective.support)

    def collect(self, counter: int, *, reference: bool = False) -> Collected:
        """Return rollout number `counter`.

        Args:
            counter: rollouts before this one; prompts and random numbers are functions of it.
            reference: score with the reference policy as well.

        Raises:
            ParityError: sampler and trainer disagree.
        """
        # prompts -> samples -> rewards
        started = time.perf_counter()
        rollout, scores, counts, sample_seconds = self._fill(counter)
        # samples -> experience, once and at the weights that sampled
        self.listener.phase("scoring")
        draws = generator_of(self.seed, Stream.PLAN, counter, self.ranks.rank)
        experience = build_experience(
            self.scorer,
            self.objective,
            rollout,
            scores,
            draws,
            updates=self.schedule.updates,
            reference=reference,
            total=self.ranks.sum,
        )
        # responses that were cut off count within their group and carry no loss
        if self.mask_truncated:
            finished_B = (rollout.finish_B == Finish.STOP).to(experience.valid_B.device)
            experience = replace(experience, valid_B=experience.valid_B & finished_B)
        trained = self._noised(experience, counter, reference)
        # experience -> updates and their denominators
        plan = self._plan(trained, draws)
        self.listener.phase("all-reduce")
        denominators = self._denominators(trained, plan)
        # metrics
        prepare_seconds = time.perf_counter() - started - sample_seconds
        seconds = sample_seconds, prepare_seconds
        levels = getattr(self.prompts, "reported_levels", None)  # of a `PromptDataModule`
        event = RolloutEvent(counter, experience, scores, *seconds, counts, trained, levels)
        metrics = self._steer_penalty(trained)
        metrics |= event.metrics(self.ranks.sum, [*self.scorer.policy.end_tokens, *self.stop])
        metrics |= noise_metrics(self.objective, trained, self.ranks.sum)
        return Collected(RolloutBuffer(trained, plan, denominators), event, metrics)

    def _fill(self, counter: int) -> tuple[Rollout, Scores, SamplingCounts | None, float]:
        """Sample and judge the rows of a rollout; the last value is the seconds of sampling."""
        groups, seconds = self.schedule.local_prompts, 0.0
        G, first = self.schedule.completions, self.ranks.rank * groups
        successes = None if self.learn is None else Successes(self.schedule.prompts, first, G)

        def draw(round: int, count: int) -> tuple[Rollout, Scores]:
            nonlocal seconds
            compare = self.parity_gate
            # sample
            self.listener.phase("sampling")
            started = time.perf_counter()
            rollout = self._sample(counter, round, count, check_behaviour=compare)
            seconds += time.perf_counter() - started
            self.listener.sampled()
            if compare:
                self._check_parity(rollout)
            # judge
            self.listener.phase("reward function")
            scores = self.judge(rollout)
            if successes is not None:
                successes.add(round, scores)
            return rollout, scores

        def total(counts: Tensor) -> Tensor:
            self.listener.phase("all-reduce")
            return self.ranks.sum(counts)

        collected: tuple[Rollout, Scores, SamplingCounts | None]
        if self.dynamic is None:
            collected = (*draw(0, groups), None)
        else:
            others, warn = self.scorer.policy.lockstep, self.listener.warn
            collected = self.dynamic.collect(draw, groups, G, total, others, warn)
        # a curriculum learns from all that was sampled
        if self.learn is not None and successes is not None:
            rounds = 1 if collected[2] is None else collected[2].rounds
            self.learn(counter, successes.total(rounds, total))
        return *collected, seconds

    def _sample(self, counter: int, round: int, count: int, check_behaviour: bool) -> Rollout:
        """Sample the first `count` prompts of this rank's share of a round."""
        # prompts and random numbers
        objective, policy, rank = self.objective, self.scorer.policy, self.ranks.rank
        first = rank * self.schedule.local_prompts
        rows = self.prompts.training_rows(counter, self.schedule.prompts, round)
        rows = rows[first : first + count]
        draws = generator_of(self.seed, Stream.SAMPLE, counter, rank)
        if round:
            draws = generator_of(self.seed, Stream.RESAMPLE, counter, rank, round)
        # sample, under the precision of scoring: autocast is not active outside of `training_step`
        candidates = objective.surrogate.candidates
        request = SamplingRequest(
            objective.support,
            self.scorer.temperature,
            self.max_new_tokens,
            candidates=candidates,
            stop=self.stop,
        )
        replay, sampler = self.replay, self.sampler
        sample = sampler.sample if replay is None else partial(replay.sample, sampler)
        with policy.lockstep(), self.scorer.context():
            rollout = sample(
                policy,
                self.prompts.encode(rows),
                self.schedule.completions,
                request,
                generator=draws,
                progress=self.listener.tokens,
            )
        # groups, ids, supports and log-probs
        return check_rollout(
            rollout,
            objective.support,
            policy.vocabulary,
            behaviour=objective.needs_behaviour or check_behaviour,
            candidates=candidates,
            completions=self.schedule.completions,
            barred=policy.barred,
        )

    def _noised(self, experience: Experience, counter: int, reference: bool) -> Experience:
        """Repeat and score the rows of a masked policy with noise; leave those of a causal one."""
        if self.objective.likelihood is None:
            return experience
        noise = generator_of(self.seed, Stream.NOISE, counter, self.ranks.rank)
        noised = with_noise(
            experience,
            self.objective.likelihood,
            noise,
            passes=self.schedule.epochs,
            drop_outside=self.objective.support.outside == "drop",
        )
        return score_noised(
            self.scorer, self.objective, noised, updates=self.schedule.updates, reference=reference
        )

    def _plan(self, trained: Experience, draws: torch.Generator) -> list[list[Tensor]]:
        """Deal the rows of a rollout out to updates."""
        rollout = trained.rollout
        rows = self.schedule.rows if self.schedule.copies is not None else len(rollout.group_B)
        tokens_B = rollout.attention_mask_BL.sum(1)
        return self.schedule.plan(rollout.group_B[:rows], tokens_B[:rows], draws)

    def _check_parity(self, rollout: Rollout) -> None:
        """Compare the log-probs of sampler and trainer."""
        scorer = self.scorer
        with scorer.policy.lockstep(), scorer.context():
            parity = check_parity(
                scorer.policy, rollout, temperature=scorer.temperature, exact=scorer.exact
            )
        self.listener.note(f"parity     sampler against trainer: {parity.describe()}")
        self.parity_gate = False

    def _denominators(self, experience: Experience, plan: list[list[Tensor]]) -> list[Denominators]:
        """Sum the denominators of each update over ranks, in one all-reduce per rollout."""
        device = experience.rewards_B.device
        parts = [
            self.objective.denominators(take_rows(experience, torch.cat(update).to(device)))
            for update in plan
        ]
        sums = torch.stack(
            [torch.stack([part.actions, part.tokens, part.credited]) for part in parts]
        )
        return [Denominators(*update) for update in self.ranks.sum(sums)]

    def _steer_penalty(self, experience: Experience) -> dict[str, float]:
        """Update the controller of a KL penalty by the divergence; return its coefficient."""
        kl = self.objective.term(KLPenalty)
        values = divergence_from_reference(experience, self.objective.likelihood)
        if kl is None or values is None:
            return {}
        kl.controller.update(
            mean_over_ranks(self.ranks.sum, values), len(experience.rewards_B) * self.ranks.size
        )
        return {"kl/coefficient": kl.controller.coefficient}
