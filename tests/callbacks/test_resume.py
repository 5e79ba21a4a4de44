"""What Lightning's checkpoints leave out is there again, and a killed run ends as if it had not been."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import timedelta
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import (
    ExactResume,
    KLTracking,
    PromptOrder,
    Samples,
    SupportOverlap,
    Watchdog,
)
from lightning_mpo.errors import UserError
from lightning_mpo.objective.kl import AdaptiveCoefficient, KLPenalty
from lightning_mpo.objective.supports import TopK
from lightning_mpo.policies import CausalPolicy, Lora
from lightning_mpo.resume.comparison import compare, compare_runs
from lightning_mpo.resume.metrics_csv import MetricsCSV
from lightning_mpo.rewards import ExactAnswer
from lightning_mpo.rollout import DynamicSampling
from lightning_mpo.sampling import LocalSampler
from tests.support.runs import (
    Digits,
    Probe,
    Run,
    adam,
    fit,
    make_data,
    make_objective,
    make_policy,
    same,
    sgd,
)

STEPS = 8


def train(
    folder: Path, source: str, *, ckpt_path: str | None = None, callbacks=(), save=None, **options
) -> Run:
    """Three rollouts of two updates make an epoch; a validation every third update; dropout, so that chance matters."""
    torch.manual_seed(3 if ckpt_path is None else 4)
    often = {
        "save_last": True,
        "every_n_train_steps": 1,
        "save_top_k": -1,
        "enable_version_counter": False,
    }
    save = save or ModelCheckpoint(folder / "checkpoints", "{step}", **often)
    return fit(
        folder,
        **{
            "policy": CausalPolicy(source, lora=Lora(rank=2, alpha=4, dropout=0.2)),
            "objective": make_objective(
                support=TopK(6), kl=KLPenalty(AdaptiveCoefficient(0.01, horizon=16))
            ),
            "rollout": {"minibatches": 2},
            "module": {
                "optimizer": adam(3e-3),
                "scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(
                    optimizer, 1.0, 0.1, STEPS
                ),
            },
            "callbacks": [
                KLTracking(),
                Watchdog(),
                Samples(every=1, show=False),
                SupportOverlap(every=2, rows=4),
                PromptOrder(),
                ExactResume(),
                *callbacks,
                save,
            ],
            "logger": MetricsCSV(folder, name="", version=""),
            "max_steps": STEPS,
            "val_check_interval": 3,
            "check_val_every_n_epoch": None,
            "limit_val_batches": 1,
            "ckpt_path": ckpt_path,
        }
        | options,
    )


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tiny_folder) -> Path:
    """An undisturbed run that saved after each update."""
    folder = tmp_path_factory.mktemp("whole")
    train(folder, tiny_folder)
    return folder


@pytest.fixture
def interrupted(whole, tmp_path) -> Path:
    """Its folder, as a killed run may leave it: with more than the checkpoint knows of."""
    return shutil.copytree(whole, tmp_path / "run")


@pytest.mark.parametrize(
    "at", [3, 5, 6, 8], ids=["validation due", "within an epoch", "epoch end", "last update"]
)
def test_everything_is_as_in_an_undisturbed_run(whole, interrupted, tiny_folder, at):
    train(interrupted, tiny_folder, ckpt_path=f"{interrupted}/checkpoints/step={at}.ckpt")
    found = compare_runs(whole, interrupted)
    assert [part.difference for part in found if part.difference] == []
    counts = {part.part: part.count for part in found}
    assert all(counts[part] > 0 for part in counts), counts
    assert (interrupted / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    samples = "completions/rollouts.jsonl"
    assert (interrupted / samples).read_bytes() == (whole / samples).read_bytes()


class PowerCutError(Exception):
    pass


def test_a_validation_that_is_made_up_for_is_not_made_twice(whole, tmp_path, tiny_folder):
    """The run dies right behind it, with a checkpoint that it wrote itself."""

    def save(trainer, module, outputs, batch, batch_idx):
        if trainer.global_step == 3:
            trainer.save_checkpoint(tmp_path / "before.ckpt")

    def die(*_):
        raise PowerCutError

    at_validation = ModelCheckpoint(
        tmp_path / "checkpoints", save_last=True, enable_version_counter=False
    )
    probe = Probe(on_train_batch_end=save, on_validation_start=die)
    with pytest.raises(PowerCutError):
        train(tmp_path, tiny_folder, callbacks=[probe], save=at_validation)
    probe = Probe(on_train_batch_start=die)
    with pytest.raises(PowerCutError):
        train(
            tmp_path,
            tiny_folder,
            ckpt_path=f"{tmp_path}/before.ckpt",
            callbacks=[probe],
            save=at_validation,
        )
    last = f"{tmp_path}/checkpoints/last.ckpt"
    train(tmp_path, tiny_folder, ckpt_path=last)
    assert (tmp_path / "metrics.csv").read_bytes() == (whole / "metrics.csv").read_bytes()
    assert [part.difference for part in compare_runs(whole, tmp_path) if part.difference] == []


def test_the_comparison_sees_what_differs(whole, interrupted, tiny_folder):
    def disturb(trainer, module):
        torch.manual_seed(99)

    path = f"{interrupted}/checkpoints/step=5.ckpt"
    train(interrupted, tiny_folder, ckpt_path=path, callbacks=[Probe(on_train_epoch_end=disturb)])
    differ = [part.part for part in compare_runs(whole, interrupted) if part.difference]
    assert {"weights", "optimiser", "random numbers", "metrics.csv"} <= set(differ)
    found = compare("part", {"a": [1, torch.ones(3)]}, {"a": [1, torch.tensor([1.0, 2.0, 1.0])]})
    assert found.difference == "part[a][1]: 1 of 3 values, the first 1.0 and 2.0"
    assert compare("part", {"a": float("nan")}, {"a": float("nan")}).difference is None
    assert compare("part", {}, {"a": 1}).difference == "part[a]: nothing and 1"


@pytest.mark.slow
def test_twenty_runs_that_are_killed_anywhere(tmp_path, tiny_folder):
    """Rollout, micro-batch, update, validation, a checkpoint half-written, without its name, and just saved."""
    shutil.copytree(tiny_folder, tmp_path / "model")
    script = str(Path(__file__).parents[1] / "support" / "killed_runs.py")
    done = subprocess.run(
        [sys.executable, script, str(tmp_path), "20", "1"],
        stdout=subprocess.PIPE,
        text=True,
        timeout=1800,
        check=False,
    )
    print(done.stdout)
    lines = done.stdout.splitlines()
    assert [line.endswith("bit for bit") for line in lines] == [True] * 20, done.stdout
    assert done.returncode == 0
    assert sum("resumed at  0" not in line for line in lines) >= 12, (
        "most kills came before any save"
    )


# --- the configuration and the checkpoint ---------------------------------------------------------------------------


def test_the_configuration_wins_over_the_checkpoint_and_says_so(tmp_path, caplog):
    def run(folder, lr, steps, ckpt_path=None, seed=1):
        return fit(
            folder,
            rollout={"seed": seed},
            module={
                "optimizer": sgd(lr),
                "scheduler": lambda optimizer: torch.optim.lr_scheduler.LinearLR(
                    optimizer, 0.5, 1.0, 10 + steps
                ),
            },
            callbacks=[ExactResume(), ModelCheckpoint(folder, save_last=True)],
            max_steps=steps,
            ckpt_path=ckpt_path,
        )

    run(tmp_path, 0.05, 2)
    with caplog.at_level("INFO"):
        resumed = run(tmp_path, 0.1, 3, f"{tmp_path}/last.ckpt", seed=2)
    group = resumed.trainer.optimizers[0].param_groups[0]
    scheduler = resumed.trainer.lr_scheduler_configs[0].scheduler
    assert group["initial_lr"] == 0.1
    assert 0.05 < group["lr"] < 0.1
    assert scheduler.total_iters == 13
    for said in (
        "lr was 0.025 and is 0.05",
        "scheduler total_iters was 12 and is 13",
        "rollout.seed was 1 and is 2",
    ):
        assert f"{said}: the configuration wins" in caplog.text.replace("optimizer ", ""), said


def test_the_configuration_wins_within_schedules_of_schedules(tmp_path, caplog):
    def run(period, steps, ckpt_path=None):
        def schedule(optimizer):
            warm = torch.optim.lr_scheduler.ConstantLR(optimizer, 0.5, 1)
            rest = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, period)
            return torch.optim.lr_scheduler.SequentialLR(optimizer, [warm, rest], [1])

        save = ModelCheckpoint(tmp_path, save_last=True)
        module = {"optimizer": sgd(0.1), "scheduler": schedule}
        return fit(
            tmp_path, module=module, callbacks=[ExactResume(), save], max_steps=steps, ckpt_path=ckpt_path,
        )  # fmt: skip

    run(10, 2)
    with caplog.at_level("INFO"):
        resumed = run(100, 3, f"{tmp_path}/last.ckpt")
    assert resumed.trainer.lr_scheduler_configs[0].scheduler._schedulers[1].T_max == 100
    assert "scheduler T_max was 10 and is 100: the configuration wins" in caplog.text


@pytest.mark.parametrize("change", ["optimizer", "scheduler"])
def test_another_optimiser_or_schedule_is_refused_before_its_state_is_read(tmp_path, change):
    constant = torch.optim.lr_scheduler.ConstantLR
    module = {"optimizer": adam(1e-3), "scheduler": constant}
    fit(
        tmp_path,
        module=module,
        callbacks=[ExactResume(), ModelCheckpoint(tmp_path, save_last=True)],
        max_steps=1,
    )
    other = {
        "optimizer": sgd(1e-3),
        "scheduler": lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
    }
    said = {
        "optimizer": "the optimiser AdamW? of 1 groups, and the configuration has SGD of 1 groups",
        "scheduler": "the schedule ConstantLR, and the configuration has ExponentialLR",
    }[change]
    never = Probe(on_train_start=lambda *_: pytest.fail("began"))
    with pytest.raises(
        UserError, match=f"{said}: a run goes on as it began; .* give `policy.checkpoint`"
    ):
        fit(
            tmp_path, module=module | {change: other[change]}, callbacks=[ExactResume(), never], max_steps=2,
            ckpt_path=f"{tmp_path}/last.ckpt", enable_checkpointing=False,
        )  # fmt: skip


@pytest.mark.filterwarnings("ignore:stopping")
def test_a_run_that_was_stopped_for_its_divergence_stays_stopped(tmp_path):
    """Killed behind its last save, while it evaluates, say."""

    def run(steps=12, ckpt_path=None, bound=1e-3):
        save = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=1, save_top_k=-1)
        callbacks = [KLTracking(stop_above=bound), ExactResume(), save]
        return fit(
            tmp_path, callbacks=callbacks, module={"optimizer": adam(2e-2)}, max_steps=steps, ckpt_path=ckpt_path,
        )  # fmt: skip

    whole = run()
    last = whole.trainer.global_step
    assert 1 < last < 12
    resumed = run(ckpt_path=f"{tmp_path}/step={last}.ckpt")
    assert resumed.trainer.global_step == last
    assert same(resumed.weights, whole.weights)
    again = run(ckpt_path=f"{tmp_path}/step={last - 1}.ckpt")
    assert again.trainer.global_step == last
    assert run(last + 1, f"{tmp_path}/step={last}.ckpt", bound=10.0).trainer.global_step == last + 1


def test_nothing_is_said_where_nothing_has_changed(tmp_path, caplog):
    callbacks = [ExactResume(), ModelCheckpoint(tmp_path, save_last=True)]
    fit(tmp_path, callbacks=callbacks, max_steps=1)
    with caplog.at_level("INFO"):
        fit(tmp_path, callbacks=callbacks, max_steps=2, ckpt_path=f"{tmp_path}/last.ckpt")
    assert "the configuration wins" not in caplog.text


class Letters(Digits):
    def __init__(self, weight=1.0, share=0.5):
        super().__init__(weight)
        self.share = share


@pytest.fixture(scope="module")
def short(tmp_path_factory) -> Path:
    """A run of one update, with what `changed` changes."""
    folder = tmp_path_factory.mktemp("short")
    save = ModelCheckpoint(folder, save_last=True)
    rollout = {"rewards": [Letters()]}
    fit(folder, callbacks=[KLTracking(), ExactResume(), save], rollout=rollout, max_steps=1)
    return folder / "last.ckpt"


def go_on(folder: Path, path: Path, *callbacks, rollout=None, **options) -> Run:
    return fit(
        folder,
        callbacks=[*callbacks, ExactResume()],
        rollout={"rewards": [Letters()]} | (rollout or {}),
        max_steps=2,
        ckpt_path=str(path),
        enable_checkpointing=False,
        **options,
    )


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"objective": make_objective(support=TopK(4))},
            "saved with the objective support FullVocabulary",
        ),
        ({"rollout": {"completions": 2}}, r"`rollout\.completions` 4, and the configuration has 2"),
        (
            {"accumulate_grad_batches": 2},
            r"`trainer\.accumulate_grad_batches` 1, and the configuration has 2",
        ),
        (
            {"rollout": {"rewards": [Digits()]}},
            r"`rollout\.rewards\[0\]` Letters, and the configuration has Digits",
        ),
        (
            {"rollout": {"rewards": [Letters(2.0)]}},
            r"`rollout\.rewards\[0\]\.weight` 1\.0, and .* has 2\.0",
        ),
        (
            {"rollout": {"rewards": [Letters(share=0.1)]}},
            r"`rollout\.rewards\[0\]\.share` 0\.5, and .* has 0\.1",
        ),
        (
            {"rollout": {"rewards": [Letters(), Digits()]}},
            r"`rollout\.rewards\[1\]` nothing, and .* has Digits",
        ),
        (
            {"rollout": {"mask_truncated": True}},
            r"`rollout\.mask_truncated` False, and .* has True",
        ),
        (
            {"rollout": {"rewards": [Letters(), ExactAnswer()], "dynamic": DynamicSampling(2)}},
            r"`rollout\.dynamic` None and the `rollout\.rewards\[1\]` nothing, and .* has DynamicSampling and ExactAnswer:",
        ),
        (
            {"data": make_data(train_problems=11)},
            r"`data\.digest` \w+ and the `data\.rows\.train` 12, and .* and 11:",
        ),
        ({"data": make_data(held_out_problems=3)}, r"`data\.rows\.validation` 4, and .* and 3:"),
        (
            {"data": make_data(order="file")},
            r"`data\.order` shuffled, and the configuration has file",
        ),
        (
            {"data": make_data(instruction="1+")},
            r"`data\.instruction` '', and the configuration has 1\+:",
        ),
        ({"data": make_data(digits=2)}, r"`data\.digits` 1 and the .*`data\.digest` \w+"),
        (
            {"rollout": {"completions": 2, "mask_truncated": True}, "accumulate_grad_batches": 2},
            r"`rollout\.completions` 4 and the `trainer\.accumulate_grad_batches` 1 and the `rollout\.mask_truncated` "
            r"False, and the configuration has 2 and 2 and True: a run goes on as it began",
        ),
    ],
)
def test_another_run_is_refused_before_anything_is_restored(tmp_path, short, options, said):
    never = Probe(
        on_load_checkpoint=lambda *_: pytest.fail("restored"),
        on_train_start=lambda *_: pytest.fail("began"),
    )
    with pytest.raises(UserError, match=said) as caught:
        go_on(tmp_path, short, never, KLTracking(), **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            {"rollout": {"max_new_tokens": 6}},
            "rollout.max_new_tokens was 8 and is 6: the configuration wins",
        ),
        ({"rollout": {"sampler": LocalSampler(4)}}, "rollout.sampler.batch_size was None and is 4"),
        (
            {"rollout": {"validation_completions": 2}},
            "rollout.validation_completions was 1 and is 2",
        ),
        ({"rollout": {"parity_gate": False}}, "rollout.parity_gate was True and is False"),
        (
            {"module": {"optimizer": adam(), "score_tokens": 64}},
            "model.score_tokens was 16384 and is 64",
        ),
        (
            {"module": {"optimizer": adam(), "temperature": 0.9}},
            "model.temperature was 1.0 and is 0.9",
        ),
        (
            {"policy": make_policy(share_prompts=False)},
            "model.policy.share_prompts was True and is False",
        ),
        ({"gradient_clip_val": 0.5}, "trainer.gradient_clip_val was None and is 0.5"),
        ({"precision": "bf16-mixed"}, "trainer.precision was 32-true and is bf16-mixed"),
        ({"data": make_data(max_prompt_tokens=99)}, "data.max_prompt_tokens was 512 and is 99"),
        ({"data": make_data(validation_prompts=3)}, "data.validation_prompts was None and is 3"),
    ],
)
def test_what_moves_numbers_and_may_change_is_told(tmp_path, short, caplog, options, said):
    with caplog.at_level("INFO"):
        go_on(tmp_path, short, KLTracking(), **options)
    lines = [line for line in caplog.text.splitlines() if "resume     " in line]
    assert any(said in line for line in lines), lines
    assert all(said.split(" was ")[0].rsplit(".", 1)[0] in line for line in lines), lines


def test_callbacks_that_are_gone_or_new_and_other_versions_are_told(tmp_path, short, caplog):
    content = torch.load(short, weights_only=True)
    content["callbacks"]["ExactResume"]["options"]["versions.torch"] = "1.0"
    torch.save(content, tmp_path / "old.ckpt")
    with caplog.at_level("INFO"):
        go_on(tmp_path, tmp_path / "old.ckpt", Watchdog(), Samples(show=False))
    lines = [
        line.split("resume     ", 1)[1]
        for line in caplog.text.splitlines()
        if "resume     " in line
    ]
    assert lines == [
        f"torch was 1.0 and is {version('torch')}: the configuration wins",
        "KLTracking was there and is gone",
        "Watchdog is new and begins afresh",
        "Samples is new and begins afresh",
    ]


def test_a_checkpoint_of_weights_alone_is_refused_in_one_line(tmp_path):
    save = ModelCheckpoint(tmp_path, save_last=True, save_weights_only=True)
    fit(tmp_path, callbacks=[ExactResume(), save], max_steps=1)
    with pytest.raises(
        UserError, match="holds weights alone.* give `policy.checkpoint` instead of `--ckpt_path`"
    ):
        go_on(tmp_path, tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("error:the checkpoint was saved in the middle")
@pytest.mark.parametrize("kind", [True, "link", False])
def test_the_end_of_a_run_is_saved_as_last(tmp_path, kind):
    def end(steps, path=None):
        save = ModelCheckpoint(
            tmp_path, "{step}", save_last=kind, every_n_train_steps=2, enable_version_counter=False
        )
        return fit(tmp_path, callbacks=[ExactResume(), save], max_steps=steps, ckpt_path=path)

    last = tmp_path / "last.ckpt"
    run = end(3)
    assert last.exists() == bool(kind)
    if kind:
        found = torch.load(last, weights_only=True)
        assert found["global_step"] == 3
        weights = run.module.state_dict()
        assert found["state_dict"]
        assert all(torch.equal(value, weights[name]) for name, value in found["state_dict"].items())
        end(5, str(last))
        assert torch.load(last, weights_only=True)["global_step"] == 5, "of a run that went on, too"
    names = {path.name for path in tmp_path.glob("step*.ckpt")}
    assert names <= {"step=2.ckpt", "step=4.ckpt"}


def test_a_save_that_the_clock_asks_for_waits_for_the_end_of_the_update(tmp_path):
    saved: list[int] = []
    watch = Probe(
        on_save_checkpoint=lambda trainer, *_: saved.append(trainer.fit_loop.epoch_loop.batch_idx)
    )
    save = ModelCheckpoint(tmp_path, "{step}", train_time_interval=timedelta(0), save_top_k=-1)
    shared = {"accumulate_grad_batches": 4, "max_steps": 4}
    whole = fit(tmp_path, callbacks=[ExactResume(), watch, save], **shared)
    assert saved[:4] == [3, 7, 11, 3]
    resumed = fit(
        tmp_path, callbacks=[ExactResume()], ckpt_path=f"{tmp_path}/step=2.ckpt", **shared
    )
    assert same(resumed.weights, whole.weights)


@pytest.mark.filterwarnings("error:the checkpoint was saved in the middle")
def test_a_resumed_run_saves_at_the_ends_of_updates_only(tmp_path):
    """Lightning forgets which step is saved, and would save it again at the first micro-batch."""
    saved: list[tuple[int, int]] = []
    watch = Probe(
        on_save_checkpoint=lambda trainer, *_: saved.append(
            (trainer.global_step, trainer.fit_loop.epoch_loop.batch_idx)
        )
    )

    def run(folder, steps, ckpt_path=None):
        save = ModelCheckpoint(folder, "{step}", every_n_train_steps=1, save_top_k=-1)
        return fit(
            folder, callbacks=[ExactResume(), watch, save], accumulate_grad_batches=2, max_steps=steps, ckpt_path=ckpt_path,
        )  # fmt: skip

    whole = run(tmp_path / "whole", 3)
    undisturbed = list(saved)
    run(tmp_path, 1)
    saved.clear()
    resumed = run(tmp_path, 3, f"{tmp_path}/step=1.ckpt")
    assert saved == [at for at in undisturbed if at[0] > 1] == [(2, 3), (3, 5)]
    assert same(resumed.weights, whole.weights)


def test_where_the_numbers_lie_is_the_same_after_a_resume(whole, tmp_path, tiny_folder):
    """Matrix libraries round differently where memory is aligned otherwise; strides and offsets are part of it."""

    def lie(trainer, module, batch, batch_idx):
        if trainer.global_step != 5 or places:
            return
        source, optimizer = module.source, trainer.optimizers[0]
        experience = source.experience
        tensors = {f"weights {n}": w for n, w in module.policy.named_parameters()}
        tensors |= {
            f"rollout {n}": t
            for n, t in vars(experience.rollout).items()
            if isinstance(t, torch.Tensor)
        }
        tensors |= {
            f"experience {n}": t for n, t in vars(experience).items() if isinstance(t, torch.Tensor)
        }
        for i, state in enumerate(optimizer.state.values()):
            tensors |= {f"optimiser {i} {n}": t for n, t in state.items()}
        places.update(
            {
                n: (t.data_ptr() % 64, t.stride(), t.storage_offset(), t.dtype)
                for n, t in tensors.items()
            }
        )

    places: dict[str, object] = {}
    train(tmp_path / "again", tiny_folder, callbacks=[Probe(on_train_batch_start=lie)], max_steps=6)
    expected, places = dict(places), {}
    train(tmp_path, tiny_folder, ckpt_path=f"{whole}/checkpoints/step=5.ckpt", callbacks=[Probe(on_train_batch_start=lie)],
          max_steps=6)  # fmt: skip
    assert len(places) > 40
    assert places == expected


def test_a_save_within_an_update_is_named_when_the_run_goes_on(tmp_path):
    def save(trainer, module, outputs, batch, batch_idx):
        if batch_idx == 5:
            trainer.save_checkpoint(tmp_path / "within.ckpt")

    shared = {"accumulate_grad_batches": 4, "max_steps": 3}
    fit(tmp_path, callbacks=[ExactResume(), Probe(on_train_batch_end=save)], **shared)
    with pytest.warns(UserWarning, match="saved in the middle of an update"):
        fit(tmp_path, callbacks=[ExactResume()], ckpt_path=f"{tmp_path}/within.ckpt", **shared)
