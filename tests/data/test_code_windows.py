"""`CodeWindows`: windows of files with and without thoughts, and the means over their code."""

from __future__ import annotations

import itertools
import shutil

import pytest
import torch

from lightning_mpo.data import CodeLines, CodeWindows
from lightning_mpo.data.annotations import annotate_folder, read_without_thoughts
from lightning_mpo.data.code_windows import CODE, FRAME, THOUGHT
from lightning_mpo.errors import UserError
from lightning_mpo.modules import SupervisedWarmup
from tests.support.code_corpus import tiny, write_corpus
from tests.support.runs import Record, adam, make_trainer

HELD_OUT = {"validation_share": 0.3, "split_seed": 1}


def think(file):
    """Return a thought in front of every third statement, and none in some files."""
    if file.name.endswith("_2.py"):
        return {}
    return {i: f"# why {i}" for i in file.starts[1::3]}


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return write_corpus(tmp_path_factory.mktemp("plain") / "code")


@pytest.fixture(scope="module")
def annotated(plain, tmp_path_factory):
    folder = tmp_path_factory.mktemp("annotated") / "code"
    annotate_folder([str(plain)], folder, think)
    return folder


@pytest.fixture(scope="module")
def policy():
    return tiny()


def connected(folder, policy, **options):
    data = CodeWindows([str(folder)], **{"window": 50} | HELD_OUT | options)
    data.connect(policy.tokenizer, policy.end_tokens)
    return data


def content(rows):
    return [
        (row.where, row.extra["window"].before, row.extra["window"].ids, row.extra["window"].kinds)
        for row in rows
    ]


def test_an_annotated_copy_holds_out_the_files_of_the_e_step(plain, annotated, policy):
    """Thoughts change no hash: the same files, and the same windows of code."""
    lines = CodeLines([str(plain)], **HELD_OUT)
    names = {row.extra["file"] for row in lines.load().validation}
    splits = {
        folder: CodeWindows([str(folder)], **HELD_OUT).load() for folder in (plain, annotated)
    }
    for split in splits.values():
        assert {row.extra["file"] for row in split.validation} == names
    assert any(row.extra["thoughts"] for row in splits[annotated].validation)
    assert [row.prompt for row in splits[plain].train] == [
        row.prompt for row in splits[annotated].train
    ]
    first, second = (connected(folder, policy) for folder in (plain, annotated))
    count = len(first.validation_rows)
    assert content(first.validation_rows) == content(second.validation_rows[:count])


def test_windows_without_thoughts_are_those_of_the_plain_files(plain, annotated, policy):
    first = content(connected(plain, policy).splits.train)
    assert first == content(connected(annotated, policy, thoughts=False).splits.train)
    assert first != content(connected(annotated, policy).splits.train)


def test_files_without_thoughts_have_no_mean_over_thoughts(plain, annotated, policy):
    for folder, names in (
        (plain, {"code"}),
        (annotated, {"code", "code_behind_thoughts", "thoughts"}),
    ):
        data = connected(folder, policy)
        assert set(data.token_parts(data.validation_rows[:2])) == names


@pytest.mark.parametrize("thoughts", [False, True])
def test_windows_to_train_on_are_the_files_in_a_row(annotated, policy, thoughts):
    data = connected(annotated, policy, thoughts=thoughts)
    rows = data.splits.train
    windows = [row.extra["window"] for row in rows]
    assert {len(window.ids) for window in windows} == {50}, "equal numbers of tokens in all updates"
    end = policy.end_tokens[0]
    ids = [windows[0].before, *(i for window in windows for i in window.ids)]
    kinds = [FRAME, *(kind for window in windows for kind in window.kinds)]
    for before, after in itertools.pairwise(windows):
        assert after.before == before.ids[-1], "each token is predicted from the one before"
    # a character is a token: the texts of files, an end token behind each
    texts = [policy.token_texts[i] for i in ids]
    splits = CodeWindows([str(annotated)], **HELD_OUT).load()
    expected = [policy.token_texts[end]]
    for row in splits.train:
        path = annotated / row.extra["file"]
        expected += [*(path.read_text() if thoughts else row.prompt), policy.token_texts[end]]
    assert texts == expected[: len(texts)]
    assert 0 <= len(expected) - len(texts) <= 50
    marked = "".join(t for t, kind in zip(texts, kinds, strict=True) if kind == THOUGHT)
    assert ("# why" in marked) is thoughts
    assert all(line.strip().startswith("# why") for line in marked.splitlines()[:-1])


def test_held_out_windows_have_the_same_code_with_thoughts_and_without(annotated, policy):
    data = connected(annotated, policy, validation_prompts=None)
    rows = data.validation_rows
    held_out = data.splits.validation
    plain, behind = rows[: len(held_out)], rows[len(held_out) :]
    assert 0 < len(behind) < len(plain)
    by_name = {row.where: row.extra["window"] for row in plain}
    for row in behind:
        window, other = row.extra["window"], by_name[row.where]
        pairs = [pair for pair in zip(window.ids, window.kinds, strict=True) if pair[1] != THOUGHT]
        assert tuple(i for i, _ in pairs) == other.ids
        assert (window.before, len(window.ids) > len(other.ids)) == (other.before, True)
    # all of a file, once
    for row in CodeWindows([str(annotated)], **HELD_OUT).load().validation:
        mine = [w for w in plain if w.where.rpartition(":")[0] == row.where]
        mine.sort(key=lambda w: int(w.where.rpartition(":")[2]))
        ids = [i for w in mine for i in w.extra["window"].ids]
        assert "".join(policy.token_texts[i] for i in ids) == row.prompt
        assert all(len(w.extra["window"].ids) == 50 for w in mine[:-1])
        before = [w.extra["window"].before for w in mine]
        assert before == [policy.end_tokens[0], *(w.extra["window"].ids[-1] for w in mine[:-1])]
    assert content(connected(annotated, policy, validation_prompts=3).validation_rows[:3]) == (
        content(plain[:3])
    )


def test_validation_means_are_over_code_tokens_alone(annotated, tmp_path):
    """Against the network's own logits in float64, window by window."""
    policy = tiny(initializer_range=0.3)
    data = CodeWindows(
        [str(annotated)], window=40, validation_prompts=9, validation_batch_size=4, **HELD_OUT
    )
    record = Record()
    module = SupervisedWarmup(policy, batch_size=2, batches_per_epoch=2, optimizer=adam(0.0))
    trainer = make_trainer(
        tmp_path, [], logger=record, max_steps=1, limit_val_batches=1.0, val_check_interval=1
    )
    trainer.fit(module, datamodule=data)
    sums = {"code": [0.0, 0], "code_behind_thoughts": [0.0, 0], "thoughts": [0.0, 0]}
    for row in data.validation_rows:
        window = row.extra["window"]
        ids = [window.before, *window.ids]
        with torch.no_grad():
            rows = policy.network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        code = "code_behind_thoughts" if THOUGHT in window.kinds else "code"
        names = {CODE: code, THOUGHT: "thoughts"}
        for t, kind in enumerate(window.kinds):
            sums[names[kind]][0] -= rows[t, ids[t + 1]].item()
            sums[names[kind]][1] += 1
    for name, (total, count) in sums.items():
        assert count > 0
        assert record.column(f"val/{name}_nats")[-1] == pytest.approx(total / count, rel=1e-5)
        assert record.column(f"val/{name}_tokens")[-1] == count
    # the loss of an update is of all tokens
    windows = [row.extra["window"] for row in data.training_rows(0, 2)]
    total = 0.0
    for window in windows:
        ids = [window.before, *window.ids]
        with torch.no_grad():
            rows = policy.network(torch.tensor([ids])).logits[0].double().log_softmax(-1)
        total -= sum(rows[t, ids[t + 1]].item() for t in range(40))
    assert record.column("loss")[0] == pytest.approx(total / 80, rel=1e-5)


def test_thoughts_are_found_by_any_path_and_changed_files_refused(annotated, plain, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(annotated, folder)
    whole = read_without_thoughts([str(folder)])
    inner = read_without_thoughts([str(folder / "inner")])
    pattern = read_without_thoughts([f"{folder}/**/*.py"])
    assert [file.thoughts for file in pattern.files] == [file.thoughts for file in whole.files]
    by_name = {file.name: file for file in whole.files}
    for file in inner.files:
        assert file.thoughts == by_name[f"inner/{file.name}"].thoughts
        assert file.text == (plain / "inner" / file.name).read_text()
    path = folder / "file_4.py"
    path.write_text(path.read_text() + "x = 1\n")
    with pytest.raises(UserError, match=r"file_4.py' has changed since it was annotated"):
        CodeWindows([str(folder)], **HELD_OUT).load()


def test_identities_differ_by_thoughts_and_windows(plain, annotated):
    def identity(folder, **options):
        return CodeWindows([str(folder)], **HELD_OUT | options).identity()

    first = identity(annotated)
    assert first == identity(annotated)
    for other in (identity(plain), identity(annotated, thoughts=False)):
        assert first != other
    assert first != identity(annotated, window=9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 1}, "`CodeWindows.window` must be at least 2, got 1"),
        ({"window": 100_000}, "has no window to train on .*lower `data.window`"),
        ({"validation_share": 0.001}, "12 files and none to validate on"),
        ({"validation_share": 0.999}, "12 files and none to train on"),
        ({"paths": []}, "`CodeWindows.paths` must be a list of folders or patterns"),
        ({"max_files": 0}, "`CodeWindows.max_files` must be at least 1, got 0"),
    ],
)
def test_mistakes_are_one_line(annotated, policy, options, message):
    def make():
        data = CodeWindows(**{"paths": [str(annotated)]} | HELD_OUT | options)
        data.connect(policy.tokenizer, policy.end_tokens)

    with pytest.raises(UserError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_windows_longer_than_the_model_reads_are_refused(annotated, policy):
    data = connected(annotated, policy)
    data.check_solutions(200)
    with pytest.raises(
        UserError, match="a window with its thoughts has up to .* tokens, more than"
    ):
        data.check_solutions(52)
    with pytest.raises(UserError, match="is for a causal policy"):
        data.check_solutions(200, canvas=8)
