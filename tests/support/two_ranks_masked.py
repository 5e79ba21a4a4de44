"""Run by `test_masked_ddp.py`: masked policies on one process and on two.

python two_ranks_masked.py FOLDER
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch

from lightning_mpo.modules import SupervisedWarmup
from lightning_mpo.modules.masked_tokens import MaskedTokens
from lightning_mpo.objective.likelihoods import CoupledElbo, Denoising, Noise
from lightning_mpo.objective.objective import Objective
from lightning_mpo.policies import TinyMaskedPolicy
from lightning_mpo.rollout import join_rollouts
from lightning_mpo.sampling.diffusion import DiffusionSampler
from lightning_mpo.types import PromptBatch, take_rows
from tests.support.builders import seeded
from tests.support.runs import Record, fit, make_data, make_policy, make_trainer, sgd


class ByPrompt(DiffusionSampler):
    """Reveals each prompt's completions with a generator of its own, so that they are the same on every rank."""

    def sample(self, policy, prompts, completions, request, *, generator, **options):
        parts = []
        for p in range(len(prompts)):
            one = PromptBatch(
                prompts.input_ids_PS[p : p + 1],
                prompts.attention_mask_PS[p : p + 1],
                prompts.rows[p : p + 1],
            )
            numbers = seeded(int(one.input_ids_PS.sum() * 1000 + one.input_ids_PS[0, 0]))
            parts.append(
                super().sample(policy, one, completions, request, generator=numbers, **options)
            )
        return join_rollouts(parts)


class ByRow:
    """Draws each row's noise from a generator of its own."""

    def draw(self, rollout, generator):
        places = torch.arange(1, rollout.tokens_BL.shape[1] + 1)
        parts = [
            super(ByRow, self).draw(
                take_rows(rollout, torch.tensor([b])),
                seeded(int((rollout.tokens_BL[b].cpu() * places).sum())),
            )
            for b in range(len(rollout.group_B))
        ]
        return Noise(*(torch.cat(values) for values in list(zip(*parts, strict=True))[:2]))


class CoupledByRow(ByRow, CoupledElbo):
    """ESPO's copies, the same on every rank."""


class DenoisingByRow(ByRow, Denoising):
    """AGRPO's steps, the same on every rank."""


CASES = {"espo": CoupledByRow(pairs=2), "agrpo": DenoisingByRow(steps=3)}


def train(folder: Path, case: str, devices: int):
    """Train for six updates, three rollouts of two passes each."""
    return fit(
        folder,
        policy=make_policy(TinyMaskedPolicy),
        objective=replace(Objective.from_file(case), likelihood=CASES[case]),
        rollout={"sampler": ByPrompt(block=4, tokens_per_step=2), "epochs": 2},
        module={"optimizer": sgd(0.05)},
        accumulate_grad_batches=2,
        max_steps=6,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
    )


def warm_up(folder: Path, devices: int) -> dict[str, torch.Tensor]:
    """Train on eight demonstrations a step, over all processes; noise needs no help to agree."""
    module = SupervisedWarmup(
        make_policy(TinyMaskedPolicy),
        batch_size=8 // devices,
        batches_per_epoch=4,
        optimizer=sgd(0.05),
        likelihood=MaskedTokens(12),
    )
    machine = make_trainer(
        folder,
        (),
        logger=Record(),
        max_steps=6,
        devices=devices,
        strategy="ddp" if devices > 1 else "auto",
    )
    machine.fit(module, datamodule=make_data())
    return {name: weight.detach().clone() for name, weight in module.policy.named_parameters()}


def main() -> None:
    folder = Path(sys.argv[1])
    rank = int(os.environ.get("LOCAL_RANK", 0))
    logged = {}
    for name in CASES:
        run = train(folder, name, 2)
        logged[name] = run.record.without_clocks()
        torch.save(run.weights, folder / f"{name}-{rank}.pt")
    torch.save(warm_up(folder, 2), folder / f"stage-{rank}.pt")
    (folder / f"rank{rank}.json").write_text(json.dumps(logged))


if __name__ == "__main__":
    main()
