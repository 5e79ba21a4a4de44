"""TRL's own trainers as an oracle: gradients and advantages equal ours, and every difference is accounted for."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

SCRIPTS = Path(__file__).parents[2] / "benchmarks" / "oracles"
sys.path.insert(0, str(SCRIPTS))
import oracle_batches  # noqa: E402
import trl_bridge  # noqa: E402
import trl_differences  # noqa: E402
import trl_losses  # noqa: E402
import trl_whole  # noqa: E402

sys.path.remove(str(SCRIPTS))

CASES = {case.name: case for case in trl_losses.CASES}
DIFFERENCES = {d.name: d for d in (*trl_differences.DIFFERENCES, *trl_whole.DIFFERENCES)}
BOUND, BOUND_32 = 1e-6, 1e-5


def by_name(items):
    return pytest.mark.parametrize("item", items, ids=lambda item: item.name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    with trl_bridge.quiet():  # here, so that nobody else waits for its import
        pytest.importorskip(
            "trl", reason="compares with TRL: pip install -c constraints.txt -e '.[dev]'"
        )
    return trl_bridge.tiny_model(tmp_path_factory.mktemp("trl"))


@by_name(trl_losses.CASES)
def test_gradients_of_a_table_of_logits_equal_trls(item, folder):
    result = trl_losses.compare(item, folder)
    assert result.gradient < BOUND
    assert result.loss is None or result.loss < BOUND
    least, most = result.clipped
    assert 0 < least <= most < 1  # both branches were compared, on every batch


def test_every_loss_that_both_have_is_compared():
    types = {case.trl.get("loss_type", "rloo") for case in trl_losses.CASES}
    assert types == {"grpo", "dr_grpo", "dapo", "bnpo", "cispo", "rloo"}
    assert {case.config for case in trl_losses.CASES} >= {
        "grpo",
        "dr_grpo",
        "dapo",
        "cispo",
        "gspo",
        "gspo_token",
        "rloo",
    }


@pytest.mark.parametrize(
    ("name", "other"),
    [
        ("grpo", "dapo (clip-higher)"),
        ("grpo", "grpo, epsilon_high"),
        ("grpo", "grpo, delta"),
        ("grpo", "grpo, beta"),
        ("dr_grpo", "bnpo"),
        ("cispo, cap 1.2", "cispo"),
        ("dapo, sequence", "dapo (clip-higher)"),
        ("dapo (clip-higher)", "dapo, entropy_coef"),
    ],
)
def test_the_oracle_tells_neighbours_apart(name, other, folder):
    wrong = replace(CASES[name], objective=CASES[other].objective)
    assert trl_losses.compare(wrong, folder).gradient > 1e-3


@pytest.mark.parametrize("seed", range(3))
def test_dpo_equals_trls_on_the_pairs_of_a_rollout(seed, folder):
    """Loss and gradient, with each pair as a group of two; TRL's own code computes the other side."""
    objective, pairs = oracle_batches.algorithm("dpo"), 3
    batch = oracle_batches.draw(seed, pairs, 2)
    advantages_B = torch.tensor([1.0, -1.0]).double().repeat(pairs)
    made = replace(batch, advantages_B=advantages_B).experience()
    group_B = torch.arange(pairs).repeat_interleave(2)
    made = replace(made, rollout=replace(made.rollout, group_B=group_B))
    leaf = batch.logits_BTV.clone().requires_grad_()
    scores = batch.scores(leaf)
    loss = objective.loss(made, scores, objective.denominators(made))[0]
    order = [*range(0, 2 * pairs, 2), *range(1, 2 * pairs, 2)]  # better ones first
    expected = trl_bridge.pairs_loss(
        scores.logprobs_BT[order],
        batch.reference_BT[order],
        batch.mask_BT[order],
        objective.surrogate.beta,
    )
    gradient, wanted = (
        torch.autograd.grad(x, leaf, retain_graph=True)[0] for x in (loss, expected)
    )
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9)
    assert oracle_batches.deviation(gradient, wanted) < BOUND
    assert wanted.abs().max() > 1e-4


@pytest.mark.parametrize("double", [True, False], ids=["float64", "float32"])
@by_name(trl_whole.PATHS)
def test_the_whole_path_gives_the_weights_trls_gradient(item, double, folder):
    assert trl_whole.compare_paths(item, folder, double=double) < BOUND_32


@by_name(trl_whole.ADVANTAGES)
def test_advantages_equal_trls(item, folder):
    assert trl_whole.compare_advantages(item, folder) < BOUND


@by_name(DIFFERENCES.values())
def test_a_difference_is_there_and_accounted_for(item, folder):
    before, after = item.measure(folder)
    assert before > 1e-3
    assert after < BOUND
    assert "|" not in item.name + item.why  # they are cells of a table


def test_the_command_prints_three_tables_and_fails_where_a_bound_is_exceeded(
    folder, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "argv", ["trl_losses.py"])
    monkeypatch.setattr(trl_losses, "tiny_model", lambda _: folder)
    for name in ("PATHS", "ADVANTAGES", "DIFFERENCES"):
        monkeypatch.setattr(trl_whole, name, getattr(trl_whole, name)[:1])
    monkeypatch.setattr(trl_differences, "DIFFERENCES", trl_differences.DIFFERENCES[:1])
    monkeypatch.setattr(trl_losses, "CASES", (CASES["grpo"],))
    with pytest.raises(SystemExit) as right:
        trl_losses.main()
    assert not right.value.code
    printed = capsys.readouterr().out
    assert printed.count("\n| ---") == 3
    assert "| grpo | `grpo.yaml` | 9 |" in printed
    monkeypatch.setattr(
        trl_losses, "CASES", (replace(CASES["grpo"], objective=CASES["bnpo"].objective),)
    )
    with pytest.raises(SystemExit, match=r"a bound was exceeded by a factor of \d+"):
        trl_losses.main()
