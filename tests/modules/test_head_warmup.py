"""The heads' stage: the trunk stays bit for bit, the loss is the naive one, it learns, resumes and hands over."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.strategies import SingleDeviceStrategy

from lightning_mpo.errors import UserError
from lightning_mpo.modules import HeadWarmup
from lightning_mpo.modules.head_warmup import SamplePool
from lightning_mpo.objective.block_actions import BlockActions
from lightning_mpo.objective.block_weights import FutureShare
from lightning_mpo.objective.terms import HeadUpkeep
from lightning_mpo.policies import MedusaHeads, ParallelHeads, SequentialHeads, TinyPolicy
from tests.support.runs import (
    Probe,
    Record,
    adam,
    fit,
    make_data,
    make_objective,
    make_policy,
    make_trainer,
    same,
)

FAMILIES = [ParallelHeads, SequentialHeads, MedusaHeads]


def warm_up(
    folder,
    steps,
    *,
    ckpt_path=None,
    callbacks=(),
    family=ParallelHeads,
    policy=None,
    lr=1e-2,
    **options,
):
    torch.manual_seed(0)  # of the heads' initial weights
    record = Record()
    arguments = {
        "prompts": 4,
        "completions": 2,
        "max_new_tokens": 8,
        "passes": 2,
        "batches_per_epoch": 3,
        "seed": 1,
    }
    names = [*arguments, "solutions", "temperature"]
    arguments |= {name: options.pop(name) for name in names if name in options}
    sizes = ("prompts", "completions", "max_new_tokens", "passes")
    arguments["pool"] = SamplePool(**{name: arguments.pop(name) for name in sizes})
    module = HeadWarmup(
        policy or make_policy(mtp=family(offsets=2)), optimizer=adam(lr), **arguments
    )
    machine = make_trainer(folder, callbacks, logger=record, max_steps=steps, **options)
    machine.fit(module, datamodule=make_data(), ckpt_path=ckpt_path)
    return module, record, machine


def trunk(policy):
    return {name: weight.detach().clone() for name, weight in policy.network.named_parameters()}


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.family)
@pytest.mark.parametrize("own", [False, True], ids=["tied", "own"])
@pytest.mark.parametrize("solutions", [False, True], ids=["samples", "solutions"])
def test_it_learns_and_the_trunk_stays_bit_for_bit(tmp_path, family, own, solutions):
    before = make_policy()
    before.build(device=torch.device("cpu"), reference=False)
    policy = make_policy(mtp=family(offsets=2, own_unembedding=own))
    options = {"solutions": solutions, "temperature": 0.3, "completions": 8, "lr": 3e-3}
    module, record, _ = warm_up(tmp_path, 60, policy=policy, max_epochs=-1, **options)
    assert same(trunk(module.policy), trunk(before))
    if not solutions and family is not SequentialHeads:
        return  # what a random model says next but one is hardly to be told from what it saw
    for n in (1, 2):
        values = record.column(f"cross_entropy_{n}")
        assert sum(values[-5:]) < 0.9 * sum(values[:5])


def test_the_loss_ignores_slots_without_a_target(tmp_path):
    """Depth n has no target in the last n slots: only windows inside the response count."""
    _, record, _ = warm_up(tmp_path, 1, solutions=True, lr=0.0, passes=1, completions=1)
    data, policy = make_data(), make_policy()
    policy.build(device=torch.device("cpu"), reference=False)
    data.connect(policy.tokenizer)
    total, count = [0.0, 0.0], [0, 0]
    for row in data.training_rows(0, 4):
        prompt = policy.tokenizer(row.prompt)["input_ids"]
        answer = [*policy.tokenizer(row.solution)["input_ids"], policy.tokenizer.eos_token_id]
        with torch.no_grad():  # fresh parallel heads are the trunk's next-token distribution
            table = policy.network(torch.tensor([prompt + answer])).logits[0].log_softmax(-1)
        for n in (1, 2):
            for t in range(len(answer) - n):
                total[n - 1] -= table[len(prompt) - 1 + t, answer[t + n]].item()
                count[n - 1] += 1
    for n in (1, 2):
        assert record.column(f"cross_entropy_{n}")[0] == pytest.approx(
            total[n - 1] / count[n - 1], rel=1e-5
        )
    mean = sum(t / c for t, c in zip(total, count, strict=True)) / 2
    assert record.column("loss")[0] == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("at", [1, 3, 4])
def test_resumes_exactly(tmp_path, at):
    whole, _, _ = warm_up(tmp_path / "whole", 6)
    warm_up(tmp_path, at, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)])
    resumed, _, _ = warm_up(tmp_path, 6, ckpt_path=f"{tmp_path}/last.ckpt")
    assert same(dict(resumed.policy.named_parameters()), dict(whole.policy.named_parameters()))


def test_validation_reports_accuracy_and_cross_entropy_by_offset_on_the_same_samples(tmp_path):
    _, record, _ = warm_up(tmp_path, 6, lr=0.0, limit_val_batches=1.0)
    for name in (
        "accuracy_0",
        "accuracy_1",
        "accuracy_2",
        "cross_entropy_1",
        "cross_entropy_2",
        "cross_entropy",
    ):
        first, second = record.column(f"val/{name}")
        assert first == second
    assert all(0 <= record.column(f"val/accuracy_{n}")[0] <= 1 for n in range(3))


def test_stops_on_a_plateau(tmp_path):
    stop = EarlyStopping("val/cross_entropy", patience=1)
    _, _, trainer = warm_up(
        tmp_path, 60, lr=0.0, callbacks=[stop], limit_val_batches=1.0, max_epochs=-1
    )
    assert trainer.global_step == 6


def test_its_checkpoint_starts_the_reinforcement_stage(tmp_path):
    module, _, _ = warm_up(
        tmp_path, 3, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)]
    )
    seen = []
    probe = Probe(
        on_train_start=lambda trainer, other: seen.append(
            {name: weight.detach().clone() for name, weight in other.policy.named_parameters()}
        )
    )
    blocks = make_objective(
        actions=BlockActions(FutureShare(0.2), length=3, source="mtp"), terms=[HeadUpkeep(0.1)]
    )
    policy = make_policy(mtp=ParallelHeads(offsets=2), checkpoint=f"{tmp_path}/last.ckpt")
    run = fit(tmp_path, policy=policy, objective=blocks, callbacks=[probe], max_steps=2)
    assert same(
        seen[0], {name: weight.detach() for name, weight in module.policy.named_parameters()}
    )
    moved = [name for name in run.weights if not torch.equal(run.weights[name], seen[0][name])]
    assert any(name.startswith("mtp.") for name in moved)
    assert any(name.startswith("network.") for name in moved)


@pytest.mark.parametrize(
    ("mtp", "message"),
    [
        (
            SequentialHeads(offsets=2),
            "holds multi-token heads with family 'parallel', `policy.mtp` has 'sequential'",
        ),
        (ParallelHeads(offsets=3), "with offsets 2, `policy.mtp` has 3"),
        (
            ParallelHeads(offsets=2, own_unembedding=True),
            "with own_unembedding False, `policy.mtp` has True",
        ),
    ],
    ids=["family", "offsets", "unembedding"],
)
def test_a_checkpoint_of_other_heads_is_refused_before_the_model_loads(tmp_path, mtp, message):
    warm_up(tmp_path, 1, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)])
    policy = make_policy(mtp=mtp, checkpoint=f"{tmp_path}/last.ckpt")
    with pytest.raises(UserError, match=message):
        policy.check()
    assert policy.network is None


def test_a_checkpoint_without_heads_leaves_them_cold_and_says_so(tmp_path):
    fit(tmp_path, max_steps=1, callbacks=[ModelCheckpoint(dirpath=tmp_path, save_last=True)])
    policy = make_policy(mtp=ParallelHeads(offsets=2), checkpoint=f"{tmp_path}/last.ckpt")
    blocks = make_objective(actions=BlockActions(FutureShare(0.2), length=3, source="mtp"))
    with pytest.warns(UserWarning, match="start untrained"):
        fit(tmp_path, policy=policy, objective=blocks, max_steps=1)


def test_heads_that_the_objective_does_not_use_are_frozen(tmp_path):
    run = fit(tmp_path, policy=make_policy(mtp=ParallelHeads(offsets=2)), max_steps=1)
    assert set(run.module.policy.parts()) == {"policy"}


def test_a_policy_without_heads_is_refused():
    with pytest.raises(UserError, match="the policy has none"):
        HeadWarmup(make_policy())


@pytest.mark.parametrize(
    ("world", "solutions", "rows"), [(1, False, 32), (2, False, 16), (1, True, 4), (2, True, 2)]
)
def test_passes_that_do_not_divide_the_pool_of_one_process_are_refused(world, solutions, rows):
    policy = make_policy(mtp=ParallelHeads())
    trainer = SimpleNamespace(
        world_size=world, max_steps=-1, strategy=SingleDeviceStrategy(), datamodule=make_data()
    )
    for passes in (1, 2, 3, 4, 8, 16, 32):
        module = HeadWarmup(
            policy, solutions=solutions, pool=SamplePool(prompts=4, completions=8, passes=passes)
        )
        module._trainer = trainer
        if rows % passes:
            with pytest.raises(
                UserError,
                match=rf"`HeadWarmup.pool.passes` \({passes}\) must divide the {rows} samples",
            ):
                module.setup("fit")
        else:
            module.setup("fit")


@pytest.mark.parametrize(
    ("solutions", "said"),
    [(True, "and its solution"), (False, "`HeadWarmup.pool.max_new_tokens` is 8, together")],
)
def test_rows_that_the_model_has_no_positions_for_are_refused_at_set_up(solutions, said):
    policy = TinyPolicy("0123456789+-*=;, ", max_length=5, mtp=ParallelHeads())
    module = HeadWarmup(
        policy, solutions=solutions, pool=SamplePool(4, completions=8, passes=1, max_new_tokens=8)
    )
    module._trainer = SimpleNamespace(
        world_size=1, max_steps=-1, strategy=SingleDeviceStrategy(), datamodule=make_data(digits=2)
    )
    with pytest.raises(UserError, match=f"{said}.* more than the model's 5 positions"):
        module.setup("fit")
