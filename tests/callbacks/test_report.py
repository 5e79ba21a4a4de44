"""The report: both stages are sampled alike, and everything lands in the run folder."""

from __future__ import annotations

import io
import json

import pytest
import rich
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from rich.console import Console
from rich.progress import Progress

from lightning_mpo.callbacks import KillAt, Report, Samples
from lightning_mpo.callbacks.report import VALIDATION
from lightning_mpo.errors import UserError
from lightning_mpo.functional.divergences import k3
from lightning_mpo.functional.evaluation import mean_interval, pass_at_k
from lightning_mpo.modules.hooks import RolloutCallback
from lightning_mpo.objective.supports import FullVocabulary, TopK
from lightning_mpo.rewards.scoring import completions_of, score_all
from lightning_mpo.rollout.learning_curve import draw_learning_curve
from lightning_mpo.rollout.stages_table import print_stages
from lightning_mpo.sampling.base import SamplingRequest
from lightning_mpo.seeding import Stream, generator_of
from tests.support.runs import Digits, adam, fit, make_objective

REPORT = {"problems": 4, "completions": 3, "initial": "before", "batch_size": 6}  # two batches
NAMES = ("pass_at_1", "pass_at_3", "reward", "judged", "answered", "length", "truncated")
KEYS = {key for name in NAMES for key in (name, f"{name}_interval")}


class Some(Digits):
    """Right with at least three digits below 5."""

    is_accuracy = True

    def score(self, completions):
        return [float(sum(c in "01234" for c in done.text) >= 3) for done in completions]


def report(folder, *, lr=0.0, steps=4, objective=None, arguments=None, callbacks=(), **options):
    callback = Report(**(REPORT | (arguments or {})))
    run = fit(
        folder,
        callbacks=[callback, *callbacks],
        rollout={"rewards": [Some()], "max_new_tokens": 6},
        objective=objective or make_objective(support=TopK(5)),
        module={"optimizer": adam(lr), "temperature": 0.8},
        max_steps=steps,
        **options,
    )
    return run, callback, json.loads((folder / "summary.json").read_text())


def test_the_summary_has_its_keys(tmp_path, capsys):
    _, _, summary = report(tmp_path)
    others = ("seconds", "peak_rss_mb", "problems", "updates", "curve", "difference")
    assert summary.keys() == {"before", "final", *others}
    stage = KEYS | {f"support_{key}" for key in KEYS}
    stage |= {"greedy_accuracy", "greedy_accuracy_interval", "kl"}
    assert summary["before"].keys() == stage
    assert summary["difference"].keys() == stage - {"kl"}
    assert summary["final"].keys() == stage | {"clip_fraction"}
    assert summary["seconds"].keys() == {"evaluation_before", "training", "evaluation_final"}
    assert (summary["problems"], summary["updates"]) == (4, 4)
    assert 50 < summary["peak_rss_mb"] < 50_000
    shown = capsys.readouterr().out
    assert "4 held-out problems, 95 % intervals" in shown
    assert "before" in shown
    assert "final" in shown
    assert f"{summary['final']['pass_at_1']:.3f}" in shown


def test_without_a_support_of_its_own_there_are_two_decodings(tmp_path):
    _, _, summary = report(tmp_path, objective=make_objective(), steps=1)
    assert not any(key.startswith("support") for key in summary["before"])


def test_a_support_of_the_report_is_judged_as_a_training_support_is(tmp_path):
    own = {"objective": make_objective(), "arguments": {"support": TopK(5)}}
    given = report(tmp_path / "given", steps=1, **own)[2]
    trained = report(tmp_path / "trained", steps=1, arguments={"support": TopK(2)})[2]
    assert given["before"] == trained["before"]


def test_without_learning_both_stages_are_equal_to_the_last_digit(tmp_path):
    _, _, summary = report(tmp_path)
    final = dict(summary["final"])
    assert final.pop("clip_fraction") == 0
    assert final == summary["before"]
    assert 0 < final["pass_at_1"] < final["pass_at_3"]
    assert final["kl"] == 0
    before, after = (
        (tmp_path / "completions" / f"{stage}.jsonl").read_text().splitlines()
        for stage in ("before", "final")
    )
    assert json.loads(before[0])["step"] == 0
    assert json.loads(after[0])["step"] == 4
    assert before[1:] == after[1:]
    assert len(before) == 1 + 4, "a line for each problem"
    low, high = summary["difference"]["pass_at_1_interval"]
    assert summary["difference"]["pass_at_1"] == 0
    assert low < 0 < high, "four problems do not show that nothing changed"


def test_the_numbers_are_those_of_the_policy(tmp_path):
    run, _, summary = report(tmp_path, lr=2e-2)
    module, rollout, data = run.module, run.rollout, run.trainer.datamodule
    rows = data.splits.validation
    for prefix, support, greedy, completions in (
        ("", FullVocabulary(), False, 3),
        ("support_", TopK(5), False, 3),
        ("greedy_", FullVocabulary(), True, 1),
    ):
        right, lengths, divergences, size = [], [], [], 6 // completions
        for start in range(0, 4, size):
            part = rollout.sampler.sample(
                module.policy,
                data.encode(rows[start : start + size]),
                completions,
                SamplingRequest(support, 0.8, 6, greedy),
                generator=generator_of(1, Stream.REPORT, start),
            )
            scores = score_all(rollout.rewards, completions_of(part))
            right.append(scores.correct_B.view(-1, completions).double().sum(1))
            lengths.append(part.response_mask_BT.sum(1).float())
            now, reference = (
                module.score(part, reference=flag).logprobs_BT for flag in (False, True)
            )
            divergences.append(k3(now, reference)[part.response_mask_BT])
        final, right_P = summary["final"], torch.cat(right)
        for k in {1, completions}:
            name = "greedy_accuracy" if greedy else f"{prefix}pass_at_{k}"
            expected = mean_interval(pass_at_k(right_P, torch.full_like(right_P, completions), k))
            shown = [final[name], *final[f"{name}_interval"]]
            assert shown == pytest.approx(expected.tolist())
        if greedy:
            continue
        assert final[f"{prefix}length"] == pytest.approx(torch.cat(lengths).mean().item())
        if not prefix:
            assert final["kl"] == pytest.approx(divergences[0].mean().item(), rel=1e-4)
            assert final["kl"] > 1e-3
    assert summary["final"]["pass_at_1"] != summary["before"]["pass_at_1"]


def test_the_clip_fraction_is_the_mean_over_updates(tmp_path):
    run, _, summary = report(tmp_path, lr=2e-2, accumulate_grad_batches=2)
    assert run.rollout.schedule.updates == 1
    callback = Report(**REPORT)
    other = fit(
        tmp_path, callbacks=[callback], rollout={"rewards": [Some()], "epochs": 2, "max_new_tokens": 6}, max_steps=4,
        module={"optimizer": adam(5e-2)}, accumulate_grad_batches=2,
    )  # fmt: skip
    clipped = other.record.column("ratio/clip_fraction")
    assert max(clipped) > 0
    assert callback.stages["final"]["clip_fraction"] == pytest.approx(sum(clipped) / 4, rel=1e-5)
    assert summary["final"]["clip_fraction"] == 0


def test_evaluating_changes_no_training(tmp_path):
    plain = fit(
        tmp_path, rollout={"rewards": [Some()], "max_new_tokens": 6}, max_steps=4,
        objective=make_objective(support=TopK(5)), module={"optimizer": adam(1e-2), "temperature": 0.8},
    )  # fmt: skip
    watched, _, _ = report(tmp_path, lr=1e-2)
    assert all(torch.equal(plain.weights[name], watched.weights[name]) for name in plain.weights)


def test_its_sampling_is_told_and_is_no_rollout(tmp_path):
    told = []

    class Listener(RolloutCallback):
        def on_rollout_phase(self, phase):
            told.append(phase)

        def on_rollout_tokens(self, tokens, running):
            assert told[-1] == "sampling", (
                "KillAt counts these, and MemoryAccounting begins a phase"
            )

        def on_evaluation_tokens(self, tokens, running):
            assert told[-1] == "evaluation"
            drawn.append(tokens)

    drawn = []
    _, callback, _ = report(
        tmp_path, steps=1, callbacks=[Listener(), KillAt("rollout", 7)]
    )  # a rollout has 6 steps
    batches = 2 + 2 + 1  # of each decoding: sampled, of the support, greedy
    assert told[:batches] == told[-batches:] == ["evaluation"] * batches
    assert told.count("evaluation") == 2 * batches
    stages = callback.stages.values()
    lengths = sum(12 * stage["length"] + 12 * stage["support_length"] for stage in stages)
    assert lengths < sum(drawn) <= lengths + 2 * 4 * 6, "and the greedy ones"


def test_the_learning_curve_is_a_picture(tmp_path, monkeypatch):
    run, callback, summary = report(
        tmp_path, lr=1e-2, val_check_interval=2, check_val_every_n_epoch=None, limit_val_batches=1
    )
    picture = (tmp_path / "learning_curve.png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert len(picture) > 10_000
    rollouts = [point for point in callback.curve if "accuracy" in point]
    assert [point["step"] for point in rollouts] == [0, 1, 2, 3]
    assert [point["accuracy"] for point in rollouts] == pytest.approx(
        run.record.column("reward/accuracy")
    )
    validation = [point for point in callback.curve if "validation" in point]
    for key, name in VALIDATION.items():
        assert [p[key] for p in validation] == pytest.approx(run.record.column(f"val/{name}"))
    assert 0 < summary["seconds"]["validation"] < summary["seconds"]["training"]

    drawn = {}
    from matplotlib.axes import Axes

    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *a, label=None, **k: drawn.setdefault(label, (x, y)) and [None],
    )
    monkeypatch.setattr(Axes, "legend", lambda *a, **k: None)
    draw_learning_curve(callback.curve, callback.stages, tmp_path / "again.png")
    assert drawn["training rollouts (sampled with the training support)"][0] == [0, 1, 2, 3]
    assert drawn["held-out pass@1 during training"][0] == [2, 4]
    assert drawn["held-out greedy"][1] == summary["before"]["greedy_accuracy"]


def test_the_picture_of_a_short_run(tmp_path, monkeypatch):
    drawn = {}
    from matplotlib.axes import Axes

    plot, errorbar = Axes.plot, Axes.errorbar
    monkeypatch.setattr(
        Axes,
        "plot",
        lambda self, x, y, *a, **k: (
            drawn.setdefault(k.get("label"), (x, *a)) and plot(self, x, y, *a, **k)
        ),
    )
    bars = []
    monkeypatch.setattr(
        Axes, "errorbar", lambda self, x, *a, **k: bars.append(x) or errorbar(self, x, *a, **k)
    )
    stage = {"pass_at_1": 0.5, "pass_at_1_interval": [0.4, 0.6], "greedy_accuracy": 0.4}
    stages = {"before": stage, "final": stage}
    draw_learning_curve([{"step": 0, "accuracy": 0.4}], stages, tmp_path / "short.png", updates=3)
    assert drawn["training rollouts (sampled with the training support)"] == ([0], "."), (
        "a line needs two points"
    )
    assert bars == [0, 3], "the final stage stands at the last update, not at the last rollout"


@pytest.mark.parametrize("what", ["report", "samples"])
def test_tables_are_printed_above_the_bar(monkeypatch, what):
    console = Console(file=io.StringIO(), force_terminal=True, width=60)
    monkeypatch.setattr(rich, "_console", console)
    with Progress(console=console, auto_refresh=False) as bar:
        bar.add_task("bar")
        bar.refresh()
        before = len(console.file.getvalue())
        if what == "report":
            print_stages({"before": {"length": 3.0}}, "4 problems")
        else:
            Samples._print(0, [{"prompt": "p", "completion": "c", "target": "t", "reward": 1.0}])
    assert console.file.getvalue()[before:].startswith("\r\x1b[2K"), (
        "the bar's line is cleared first"
    )


def test_a_resumed_run_keeps_its_first_evaluation_and_curve(tmp_path):
    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    _, first, _ = report(tmp_path, lr=1e-2, steps=2, callbacks=[save])
    _, second, summary = report(tmp_path, lr=1e-2, steps=4, ckpt_path=f"{tmp_path}/last.ckpt")
    assert summary["before"] == first.stages["before"]
    assert [point["step"] for point in second.curve] == [0, 1, 2, 3]
    _, _, expected = report(tmp_path / "whole", lr=1e-2, steps=4)
    assert summary["final"] == expected["final"]


def test_problems_are_at_most_those_held_out(tmp_path):
    _, _, summary = report(tmp_path, steps=1, arguments={"problems": 99})
    assert summary["problems"] == 4


@pytest.mark.parametrize("arguments", [{"problems": 0}, {"completions": 0}, {"batch_size": 2}])
def test_arguments_that_make_no_sense(arguments):
    with pytest.raises(UserError, match="Report"):
        Report(**(REPORT | arguments))
