"""The progress bar shows a line for the rollout while tokens are sampled."""

from __future__ import annotations

from types import SimpleNamespace

from lightning_mpo.callbacks import RolloutProgressBar
from lightning_mpo.modules import PolicyOptimization
from tests.support.runs import Probe, fit


class Fake:
    """Stands for rich's progress display."""

    def __init__(self):
        self.tasks, self.said = {}, []

    def add_task(self, description, total, visible):
        self.tasks[len(self.said)] = {"total": total, "description": description}
        self.said.append(("add", total, visible))
        return len(self.said) - 1

    def update(self, task, *, completed, description):
        self.tasks[task] |= {"completed": completed, "description": description}
        self.said.append(("update", completed, description))

    def refresh(self):
        self.said.append(("refresh",))

    def remove_task(self, task):
        del self.tasks[task]
        self.said.append(("remove",))


def test_a_task_lives_while_tokens_are_sampled():
    bar, fake = RolloutProgressBar(), Fake()
    bar.progress = fake
    bar.on_rollout_start(None, None, 8, 40)
    assert fake.said == [("add", 8, True)]
    bar.on_rollout_tokens(8, 8)
    bar.on_rollout_tokens(8, 5)
    assert fake.tasks == {0: {"total": 8, "completed": 3, "description": "  rollout 16 tokens"}}
    assert fake.said[-1] == ("refresh",)
    bar.on_rollout_end(None, None, None)
    assert fake.tasks == {}
    bar.on_rollout_tokens(8, 5)  # of validation: no task, no line
    assert fake.said[-1] == ("remove",)
    bar.on_rollout_start(None, None, 8, 40)
    bar.on_rollout_tokens(2, 7)
    (task,) = fake.tasks.values()
    assert task["description"] == "  rollout 2 tokens", "the count starts anew"


def test_without_a_display_nothing_happens():
    bar = RolloutProgressBar()
    bar.on_rollout_start(None, None, 8, 40)
    bar.on_rollout_tokens(8, 8)
    bar.on_rollout_end(None, None, None)


def test_it_runs_with_lightnings_bar_and_names_metrics_shortly(tmp_path):
    bar, shown, lines = RolloutProgressBar(), [], []

    class Watch(RolloutProgressBar):
        def on_rollout_tokens(self, tokens, running):
            super().on_rollout_tokens(tokens, running)
            lines.append([task.description for task in self.progress.tasks])

        def on_rollout_end(self, trainer, module, event):
            super().on_rollout_end(trainer, module, event)
            lines.append([task.description for task in self.progress.tasks])

        def get_metrics(self, trainer, module):
            metrics = super().get_metrics(trainer, module)
            shown.append(set(metrics))
            return metrics

    bar = Watch()
    counts = []
    count = Probe(
        on_train_batch_end=lambda trainer, *_: counts.append(
            [
                (task.completed, task.total)
                for task in bar.progress.tasks
                if "Updates" in task.description
            ]
        )
    )
    fit(
        tmp_path,
        callbacks=[bar, count],
        max_steps=2,
        accumulate_grad_batches=2,
        enable_progress_bar=True,
    )
    assert counts == [[(0, 2)], [(1, 2)], [(1, 2)], [(2, 2)]], "updates, and not micro-batches"
    assert any("rollout" in text for text in lines[0])
    assert not any("rollout" in text for text in lines[-1])
    assert {"reward", "accuracy"} <= shown[-1]
    assert "v_num" not in shown[-1]
    assert not any("/" in name for name in shown[-1])


def test_metrics_without_a_short_name_stay(monkeypatch):
    from lightning.pytorch.callbacks import RichProgressBar

    monkeypatch.setattr(
        RichProgressBar, "get_metrics", lambda *_: {"v_num": 1, "val/pass_at_1": 0.5, "loss": 2.0}
    )
    assert RolloutProgressBar().get_metrics(SimpleNamespace(), SimpleNamespace()) == {
        "val pass@1": 0.5,
        "loss": 2.0,
    }


def test_it_counts_updates_and_a_warm_ups_epochs():
    bar = RolloutProgressBar()
    bar._trainer = SimpleNamespace(lightning_module=PolicyOptimization.__new__(PolicyOptimization))
    assert bar._get_train_description(0) == "Updates   "
    bar._trainer = SimpleNamespace(lightning_module=SimpleNamespace())
    assert bar._get_train_description(3) == "Epoch 3   "
