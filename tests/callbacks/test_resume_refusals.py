"""A checkpoint of another run is refused before anything is restored."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import ExactResume, KLTracking, Samples, Watchdog
from lightning_mpo.errors import UserError
from lightning_mpo.objective.supports import TopK
from lightning_mpo.rewards import ExactAnswer
from lightning_mpo.rollout import DynamicSampling
from lightning_mpo.sampling import LocalSampler
from tests.support.runs import Digits, Probe, Run, adam, fit, make_data, make_objective, make_policy


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
            "saved with the objective support FullVocabulary()",
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
