"""Cross-entropy of held-out code: the means of `validate`, intervals by hand, and the command."""

from __future__ import annotations

import json
import os
from types import SimpleNamespace

import pytest
import torch

from lightning_mpo.cli.export import read_run
from lightning_mpo.data import CodeWindows
from lightning_mpo.data.annotations import annotate_folder
from lightning_mpo.errors import UserError
from lightning_mpo.modules import SupervisedWarmup
from lightning_mpo.policies import TinyPolicy
from tests.support.code_corpus import CHARACTERS, tiny, write_corpus
from tests.support.ra3_scripts import checkpoints, held_out, records
from tests.support.runs import make_trainer

WINDOWS = {
    **{"window": 90, "validation_share": 0.3, "split_seed": 1},
    **{"validation_prompts": 9, "validation_batch_size": 4},
}
CONFIG = """
model:
  class_path: SupervisedWarmup
  init_args:
    policy: {class_path: TinyPolicy, init_args: {characters: CHARACTERS, hidden_size: 16, layers: 1,
             heads: 2, max_length: 1024, initializer_range: 0.3}}
data: {class_path: CodeWindows, init_args: WINDOWS}
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A configuration, checkpoints of two policies, and files of which some have thoughts."""
    made = tmp_path_factory.mktemp("held_out")
    plain = write_corpus(made / "plain")

    def think(file):
        return {} if file.name.endswith("_2.py") else {i: f"# why {i}" for i in file.starts[1::5]}

    annotate_folder([str(plain)], made / "annotated", think)
    windows = json.dumps(WINDOWS | {"paths": [str(made / "annotated")]})
    text = CONFIG.replace("WINDOWS", windows).replace("CHARACTERS", json.dumps(CHARACTERS))
    (made / "run.yaml").write_text(text)
    for seed in (0, 1):
        policy = tiny(initializer_range=0.3)
        torch.manual_seed(seed)
        policy.build(device=torch.device("cpu"), reference=False)
        state = {f"policy.{name}": value for name, value in policy.state_dict().items()}
        torch.save({"state_dict": state, "global_step": 3}, made / f"{seed}.ckpt")
    return made


def words(folder, out, *names):
    """Return a command; a name is that of a checkpoint, and that of its policy with an `x`."""
    given = [word for name in names for word in ("--checkpoint", f"x{name}={folder}/{name}.ckpt")]
    return ["-c", str(folder / "run.yaml"), *given, "--out", str(out)]


@pytest.fixture(scope="module")
def measured(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("measured")
    held_out.main(words(folder, out, 0, 1))
    lines = {name: (out / f"{name}.jsonl").read_text().splitlines()[1:] for name in ("x0", "x1")}
    return {name: [json.loads(line) for line in mine] for name, mine in lines.items()}


@pytest.fixture
def given(folder, monkeypatch):
    """Policy and data of the configuration, which tests may change; reading the file is slow."""
    given = {
        "policy": {"initializer_range": 0.3},
        "data": WINDOWS | {"paths": [str(folder / "annotated")]},
    }

    def read(verb, configs, checkpoint, rest):
        data = CodeWindows(**given["data"]) if given["data"] else None
        policy = tiny(**given["policy"], checkpoint=checkpoint and str(checkpoint))
        return SimpleNamespace(datamodule=data), policy

    monkeypatch.setattr(checkpoints, "read_run", read)
    return given


def test_means_are_those_of_validate(folder, measured, tmp_path):
    rows = {(row["policy"], row["part"]): row for row in held_out.means(measured)}
    assert len(rows) == 6
    for seed in (0, 1):
        policy = tiny(initializer_range=0.3, checkpoint=str(folder / f"{seed}.ckpt"))
        data = CodeWindows([str(folder / "annotated")], **WINDOWS)
        trainer = make_trainer(tmp_path, [], limit_val_batches=1.0)
        (metrics,) = trainer.validate(SupervisedWarmup(policy), data, verbose=False)
        for part in ("code", "code_behind_thoughts", "thoughts"):
            row = rows[f"x{seed}", part]
            assert row["nats"] == pytest.approx(metrics[f"val/{part}_nats"], rel=1e-5)
            assert row["tokens"] == metrics[f"val/{part}_tokens"] > 0
    assert rows["x0", "code"]["nats"] != pytest.approx(rows["x1", "code"]["nats"], rel=1e-2)
    assert rows["x0", "code"]["windows"] == 9 > rows["x0", "thoughts"]["windows"]
    assert rows["x0", "code"]["files"] > 1
    files = {record["file"] for record in measured["x0"]}
    assert all((folder / "annotated" / file).is_file() for file in files)


def record(window, file, **parts):
    return {
        **{"window": window, "file": file},
        "nats": {name: nats for name, (nats, _) in parts.items()},
        "tokens": {name: tokens for name, (_, tokens) in parts.items()},
    }


def test_differences_by_hand():
    """Files: a has two windows, b one; only one window of a has thoughts."""
    first = [
        record("a:0", "a", code=(10.0, 4)),
        record("a:4", "a", code=(6.0, 3)),
        record("b:0", "b", code=(8.0, 5)),
        record("a:0", "a", code_behind_thoughts=(9.0, 4), thoughts=(7.0, 2)),
    ]
    other = [
        record("a:0", "a", code=(9.0, 4)),
        record("a:4", "a", code=(6.5, 3)),
        record("b:0", "b", code=(5.0, 5)),
        record("a:0", "a", code_behind_thoughts=(5.0, 4), thoughts=(7.5, 2)),
    ]
    rows = {
        (row["difference"], row["part"]): row
        for row in held_out.differences({"plain": first, "ra3": other})
    }
    assert list(rows) == [
        ("ra3 - plain", "code"),
        ("ra3 - plain", "code_behind_thoughts"),
        ("ra3 - plain", "thoughts"),
        ("plain", "code_behind_thoughts - code"),
        ("ra3", "code_behind_thoughts - code"),
    ]
    code = rows["ra3 - plain", "code"]
    assert (code["windows"], code["files"], code["tokens"]) == (3, 2, 12)
    mean = (-1.0 + 0.5 - 3.0) / 12
    assert code["mean"] == pytest.approx(mean)
    error = (2 * ((-0.5 - 7 * mean) ** 2 + (-3.0 - 5 * mean) ** 2)) ** 0.5 / 12
    assert code["mean low"] == pytest.approx(mean - 1.96 * error)
    assert code["mean high"] == pytest.approx(mean + 1.96 * error)
    assert rows["ra3 - plain", "code_behind_thoughts"]["mean"] == pytest.approx(-1.0)
    assert rows["ra3 - plain", "thoughts"]["mean"] == pytest.approx(0.25)
    # the same code behind thoughts and without
    assert rows["plain", "code_behind_thoughts - code"]["mean"] == pytest.approx(-0.25)
    assert rows["ra3", "code_behind_thoughts - code"]["mean"] == pytest.approx(-1.0)


def test_an_ended_command_goes_on_and_takes_further_policies(
    folder, given, tmp_path, capsys, monkeypatch
):
    held_out.main(words(folder, tmp_path, 0))
    path = tmp_path / "x0.jsonl"
    whole = path.read_text()
    # a kill within a batch, and within a line
    path.write_text(whole[: whole.index("\n", len(whole) // 2) + 9])
    held_out.main(words(folder, tmp_path, 0, 1))
    assert path.read_text() == whole
    printed = capsys.readouterr().out
    assert "| x1 - x0 | code | 9 |" in printed
    # what is complete needs no weights
    monkeypatch.setattr(TinyPolicy, "build", None)
    held_out.main(words(folder, tmp_path, 1, 0))
    assert "| x0 - x1 | code | 9 |" in capsys.readouterr().out
    assert (tmp_path / "differences.csv").read_text().startswith("difference,part,windows,")


def test_results_of_other_options_windows_or_checkpoints_are_refused(folder, given, tmp_path):
    command = words(folder, tmp_path, 0)
    held_out.main(command)
    refusal = "x0.jsonl' has results of other options; give another --out"
    copy = tmp_path / "0.ckpt"
    copy.write_bytes((folder / "0.ckpt").read_bytes())
    other = ["-c", str(folder / "run.yaml"), "--out", str(tmp_path), "--checkpoint", f"x0={copy}"]
    for changed in (other, [*command, "--data.x", "1"], [*command, "--dtype", "float32"]):
        with pytest.raises(UserError, match=refusal):
            held_out.main(changed)
    given["data"]["window"] = 91  # other windows by the same options, as when files have changed
    with pytest.raises(UserError, match=refusal):
        held_out.main(command)


def test_a_later_save_of_a_checkpoint_is_another_one(tmp_path):
    file = tmp_path / "last.ckpt"
    file.touch()
    os.utime(file, (1, 1))
    before = held_out.saved(file)
    os.utime(file, (2, 2))
    assert held_out.saved(file) != before
    assert held_out.saved(None) is None


def test_the_model_without_training_has_no_checkpoint(folder, given):
    option = ["--model.init_args.policy.init_args.checkpoint", str(folder / "0.ckpt")]
    _, policy = read_run("held_out.py", [str(folder / "run.yaml")], None, option)
    assert policy.checkpoint is None
    options, rest = held_out.parse(words(folder, folder, 0))
    policies, _ = held_out.load(options, held_out.named(["a=none", f"b={folder}/1.ckpt"]), rest)
    assert [policy.checkpoint for policy in policies.values()] == [None, f"{folder}/1.ckpt"]


def test_16_bits_are_for_scoring_alone(folder, given):
    """The option comes behind the checks of training, which refuse 16 bits for trained weights."""
    options, rest = held_out.parse([*words(folder, folder, 0), "--dtype", "bfloat16"])
    policies, _ = held_out.load(options, held_out.named(["a=none"]), rest)
    assert policies["a"].dtype == torch.bfloat16


def test_whole_batches_and_whole_measurements_are_kept(tmp_path):
    path = tmp_path / "rows.jsonl"
    assert records.resume(path, {"a": 1}, rows=5, batch=2) == []
    for count, kept in ((3, 2), (4, 4), (5, 5)):
        path.write_text("".join(f"{line}\n" for line in ('{"a": 1}', *range(count))))
        assert records.resume(path, {"a": 1}, rows=5, batch=2) == list(range(kept))
    path.write_text("")
    with pytest.raises(UserError, match="has results of other options"):
        records.resume(path, {"a": 1}, rows=5, batch=2)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--checkpoint", "a=none"], "give `--config`"),
        (["-c", "ra3_m_step"], "give `--checkpoint`"),
        (["-c", "x", "--checkpoint", "last.ckpt"], "takes NAME=FILE or NAME=none, got 'last.ckpt'"),
        (["-c", "x", "--checkpoint", "a="], "takes NAME=FILE or NAME=none, got 'a='"),
        (["-c", "x", "--checkpoint", "a/b=c"], "takes NAME=FILE or NAME=none, got 'a/b=c'"),
        (["-c", "x", "--checkpoint", "a=b", "--checkpoint", "a=c"], "have the name 'a'"),
        (["-c", "x", "--checkpoint", "a=missing.ckpt"], "`--checkpoint` 'missing.ckpt'"),
    ],
)
def test_mistakes_are_one_line(given, words, message, tmp_path):
    with pytest.raises(UserError, match=message) as caught:
        held_out.main([*words, "--out", str(tmp_path)])
    assert "\n" not in str(caught.value)


def test_data_that_cannot_be_scored_are_refused(folder, given, tmp_path):
    given["policy"]["max_length"] = 90
    with pytest.raises(UserError, match="more than the model's 90 positions; lower `data.window`"):
        held_out.main(words(folder, tmp_path, 0))
    given["policy"].clear()
    given["data"]["validation_share"] = 0.0
    with pytest.raises(UserError, match="there are no held-out windows; raise `data.validation_"):
        held_out.main(words(folder, tmp_path, 0))
    given["data"].clear()
    with pytest.raises(UserError, match="-c needs a `CausalPolicy` and the data `CodeWindows`"):
        held_out.main(words(folder, tmp_path, 0))
