"""The policy as a folder when `fit` ends: the same as `lightning-mpo export` writes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_mpo.callbacks import Export
from lightning_mpo.errors import UserError
from lightning_mpo.export import forms
from lightning_mpo.export.forms import reload
from lightning_mpo.policies import CausalPolicy
from tests.support.runs import Probe, fit, make_policy


def test_what_was_trained_is_exported(tmp_path):
    run = fit(tmp_path, callbacks=[Export()], module={"temperature": 0.5})
    policy = CausalPolicy(str(tmp_path / "export"))
    policy.build(device=torch.device("cpu"), reference=False)
    again = dict(policy.named_parameters())
    assert again.keys() == run.weights.keys()
    assert all(torch.equal(again[name], run.weights[name]) for name in again)
    first = make_policy()
    first.build(device=torch.device("cpu"), reference=False)
    assert not all(torch.equal(again[name], weight) for name, weight in first.named_parameters()), (
        "trained"
    )
    card = (tmp_path / "export" / "README.md").read_text()
    assert "temperature 0.5, at most 8 tokens" in card
    assert "This is not the policy" not in card


def test_a_folder_in_use_is_refused_before_anything_is_trained(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("")
    policy = make_policy()
    policy.load_network = lambda: pytest.fail("loaded")
    with pytest.raises(
        UserError, match=r"is not empty \(it holds 'thesis.txt'\); .* set `Export.overwrite: true`"
    ):
        fit(tmp_path, callbacks=[Export(str(tmp_path / "mine"))], policy=policy)
    with pytest.raises(UserError, match="the form 'adapter' needs adapters"):
        fit(tmp_path, callbacks=[Export(form="adapter")], policy=policy)


def test_what_is_not_the_policy_is_told(tmp_path, monkeypatch):
    def damage(policy, folder: Path):
        with torch.no_grad():
            policy.network.model.norm.weight.mul_(2)
        policy.network.save_pretrained(folder)

    monkeypatch.setattr(forms, "write_full", damage)
    with pytest.raises(
        UserError,
        match=r"the export in .*\.part differs from the policy: log-probs differ by up to",
    ):
        fit(tmp_path, callbacks=[Export()], max_steps=1)
    assert not (tmp_path / "export").exists()


def test_a_run_that_was_killed_in_its_export_goes_on(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def half(policy, folder: Path):
        (folder / "config.json").write_text("{}")
        raise Killed

    save = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    with monkeypatch.context() as patch:
        patch.setattr(forms, "write_full", half)
        with pytest.raises(Killed):
            fit(tmp_path, callbacks=[Export(), save], max_steps=1)
    fit(tmp_path, callbacks=[Export()], max_steps=2, ckpt_path=f"{tmp_path}/last.ckpt")
    CausalPolicy(str(tmp_path / "export")).build(device=torch.device("cpu"), reference=False)
    assert not list(tmp_path.glob(".export*"))


def test_an_earlier_export_stays_until_the_new_one_is_there(tmp_path, monkeypatch):
    fit(tmp_path, callbacks=[Export()], max_steps=1)

    def files() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in (tmp_path / "export").iterdir()}

    earlier, seen = files(), []
    monkeypatch.setattr(forms, "reload", lambda *given: (seen.append(files()), reload(*given))[1])
    started = Probe(on_train_start=lambda *_: seen.append(files()))
    fit(tmp_path, callbacks=[Export(overwrite=True), started], max_steps=2)
    assert seen == [earlier, earlier]
    assert files().keys() == earlier.keys()
    assert files() != earlier


def test_fast_dev_run_exports_nothing(tmp_path):
    fit(tmp_path, callbacks=[Export()], fast_dev_run=True)
    assert not (tmp_path / "export").exists()


def test_at_least_one_prompt():
    with pytest.raises(UserError, match="`Export.prompts` must be at least 1, got 0"):
        Export(prompts=0)
