"""A run that is asked to go saves at the end of its update, exits with 0, and comes back."""

from __future__ import annotations

import os
import signal

import pytest
import torch
from lightning.fabric.plugins.environments import SLURMEnvironment
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import ExactResume, Preemption
from lightning_mpo.callbacks.preemption import STAGE_CODE
from tests.support.runs import Probe, fit, same


def run(folder, *, probe=None, **options):
    save = ModelCheckpoint(
        folder, save_last=True, every_n_train_steps=100, enable_version_counter=False
    )
    return fit(
        folder,
        rollout={"minibatches": 2},
        accumulate_grad_batches=2,
        max_steps=6,
        callbacks=[*([probe] if probe else []), ExactResume(), Preemption(), save],
        **options,
    )


def asked(number: int, at: int) -> Probe:
    """Send a signal in the slot `at`, in the middle of an update."""

    def send(trainer, module, batch, batch_idx):
        if trainer.fit_loop.epoch_loop.total_batch_idx == at:
            os.kill(os.getpid(), number)

    return Probe(on_train_batch_start=send)


@pytest.fixture
def scontrol(tmp_path, monkeypatch):
    """A stand-in for SLURM's command, which writes down what it is asked for."""
    said = tmp_path / "said"
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {said}\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:{os.environ['PATH']}")
    return said


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_it_saves_at_the_end_of_the_update_and_goes_on(tmp_path, monkeypatch, scontrol, number):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    whole = run(tmp_path / "whole")
    handlers = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)]
    with pytest.raises(SystemExit) as stop:
        run(tmp_path / "asked", probe=asked(number, 4))
    assert stop.value.code == 0
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGUSR1)] == handlers
    last = tmp_path / "asked" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    resumed = run(tmp_path / "asked", ckpt_path=str(last))
    assert same(resumed.weights, whole.weights)
    assert scontrol.exists() == (number == signal.SIGUSR1), (
        "SIGTERM may mean that the job is cancelled"
    )
    if scontrol.exists():
        assert scontrol.read_text() == "requeue 123\n"


def test_a_signal_before_the_first_update_waits_for_it(tmp_path):
    with pytest.raises(SystemExit) as stop:
        run(tmp_path, probe=Probe(on_train_start=lambda *_: os.kill(os.getpid(), signal.SIGTERM)))
    assert stop.value.code == 0
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == 1


def test_a_job_of_an_array_is_requeued_by_its_own_number(tmp_path, monkeypatch, scontrol):
    monkeypatch.setenv("SLURM_JOB_ID", "125")
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "123")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "2")
    with pytest.raises(SystemExit):
        run(tmp_path, probe=asked(signal.SIGUSR1, 0))
    assert scontrol.read_text() == "requeue 123_2\n"


def test_a_requeue_that_fails_is_said(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "123")
    monkeypatch.setenv("PATH", str(tmp_path))
    said = r"`scontrol requeue 123` failed .*submit the job again with `--ckpt_path last`"
    with pytest.warns(UserWarning, match=said), pytest.raises(SystemExit):
        run(tmp_path, probe=asked(signal.SIGUSR1, 0))


@pytest.mark.parametrize("saved", [True, False])
def test_ctrl_c_says_what_there_is_to_go_on_from(tmp_path, caplog, saved):
    def press(trainer, module, batch, batch_idx):
        if trainer.global_step == 3:
            if saved:
                trainer.save_checkpoint(tmp_path / "last.ckpt")
            raise KeyboardInterrupt

    with caplog.at_level("INFO"), pytest.raises(SystemExit):
        run(tmp_path, probe=Probe(on_train_batch_start=press))
    (line,) = [message for message in caplog.messages if message.startswith("stopped")]
    last = f"goes on with `--ckpt_path last` from {tmp_path / 'last.ckpt'}, update 3"
    assert line.startswith("stopped    at update 3: ")
    assert line.endswith(last) == saved
    assert ("there is no checkpoint to go on from" in line) != saved


@pytest.mark.parametrize("value", [None, "75"])
def test_a_stage_that_another_run_waits_for_ends_with_a_code_of_its_own(
    tmp_path, monkeypatch, caplog, value
):
    if value:
        monkeypatch.setenv(STAGE_CODE, value)
    with caplog.at_level("INFO"), pytest.raises(SystemExit) as stop:
        run(tmp_path, probe=asked(signal.SIGTERM, 0))
    assert stop.value.code == int(value or 0)
    assert ("--ckpt_path" in caplog.text) == (value is None), "the other run goes on with it"


def test_lightnings_own_requeue_is_off(tmp_path):
    environment = SLURMEnvironment(auto_requeue=True)

    def put(trainer, module, stage):
        trainer._accelerator_connector.cluster_environment = environment

    run(tmp_path, probe=Probe(setup=put))
    assert environment.auto_requeue is False
