"""`NextLineLikelihood`: thoughts earn the log-likelihood of the next line, less their cost."""

from __future__ import annotations

import itertools

import lightning as L
import pytest
import torch

from lightning_mpo import Objective, PolicyOptimization, RolloutLoop
from lightning_mpo.data.code_lines import CodeLines
from lightning_mpo.errors import UserError
from lightning_mpo.functional.thoughts import thought_rewards
from lightning_mpo.objective.advantages import GroupRelative
from lightning_mpo.objective.first_tokens import FirstTokens
from lightning_mpo.objective.outcome import Outcome
from lightning_mpo.policies import CausalPolicy, Lora
from lightning_mpo.rewards.base import Completion
from lightning_mpo.rewards.next_line import (
    NextLineLikelihood,
    Thinks,
    UsableThought,
    copied_share,
)
from lightning_mpo.rewards.reference import Reference, continuation_rows
from lightning_mpo.types import Finish
from tests.support.code_corpus import tiny, write_corpus

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def policy():
    made = tiny()
    torch.manual_seed(0)
    made.build(device=CPU, reference=True)
    return made


@pytest.fixture(scope="module")
def data(tmp_path_factory, policy):
    folder = write_corpus(tmp_path_factory.mktemp("corpus") / "code")
    made = CodeLines([str(folder)], validation_share=0.3, split_seed=1, max_prompt_tokens=80)
    made.connect(policy.tokenizer)
    return made


def connected(reward, policy):
    def score(rollout):
        with torch.no_grad():
            return policy.score(
                rollout, rollout.response_mask_BT, temperature=1.0, reference=True
            ).logprobs_BT

    reward.reference = Reference(score, CPU)
    return reward


def completion(row, text: str, policy, finished: bool = True) -> Completion:
    ids = tuple(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Completion(row.prompt, text, row.target, len(ids), finished, row.extra, token_ids=ids)


def likelihood(policy, before: str, line: str, total: bool = False) -> float:
    """Return the log-likelihood of a line in float64, token by token, from the network's own logits."""
    ids = policy.tokenizer(before + line, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logits = policy.network(torch.tensor([ids])).logits[0].double()
    rows = logits.log_softmax(-1)
    first = len(before)
    terms = [rows[i - 1, ids[i]].item() for i in range(first, len(ids))]
    return sum(terms) / (1 if total else len(terms))


@pytest.mark.parametrize("total", [False, True])
def test_acts_and_thoughts_against_the_networks_own_logits(policy, data, total):
    """One character is one token, so texts may be joined here."""
    rows = data.prompts(0, 3).rows
    reward = connected(NextLineLikelihood(cost=0.07, total=total), policy)
    texts = ["\n", "# add one\n", "# then work\n\n", ""]
    completions = [completion(row, text, policy) for row in rows for text in texts]
    values = reward.score(completions)
    for done, value in zip(completions, values, strict=True):
        row = done.row
        # the indentation is given: one character is one token
        indent, line = row["indentation"], row["line"].removeprefix(row["indentation"])
        if done.text.strip():
            before = done.prompt + done.text + indent
            expected = likelihood(policy, before, line, total) - 0.07
        else:  # an act: the likelihood of the line alone
            expected = likelihood(policy, done.prompt, line, total)
        assert value == pytest.approx(expected, abs=1e-5 * (50 if total else 1))
    assert values[0] == values[3], "equal responses of a group have exactly equal rewards"
    assert connected(Thinks(), policy).score(completions)[:4] == [0, 1, 1, 0]
    assert UsableThought().score(completions)[:4] == [None, 1, 1, None]


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        ("# value and so on without an end", False),
        ("# a thought with the end token", True),
        ("x = 1\n", True),
        ("#\n", True),
        ("# \n", True),
        ("# two\n    lines\n", True),
        ("copy", True),
    ],
)
def test_thoughts_that_cannot_be_used(policy, data, text, finished):
    row = data.prompts(0, 1).rows[0]
    text = f"# now {row.target} !\n" if text == "copy" else text
    reward = connected(NextLineLikelihood(cost=0.05, penalty=0.2), policy)
    act, thought = completion(row, "\n", policy), completion(row, text, policy, finished)
    values = reward.score([act, thought])
    assert values[1] == pytest.approx(values[0] - 0.05 - 0.2, abs=1e-12)
    assert reward.answered([act, thought]) == [True, False]
    assert UsableThought().score([act, thought]) == [None, 0]


@pytest.mark.parametrize(
    ("thought", "line", "run", "share"),
    [
        ("# return names", "    return names", 3, 1.0),
        ("# names return", "    return names", 3, 0.0),
        ("# a.b(c)", "x = a.b(c)", 3, 4 / 6),
        ("# x=a.b(c)", "x = a . b ( c )", 3, 1.0),
        ("# something else", "x = a.b(c)", 3, 0.0),
        ("# a", "a", 3, 1.0),
    ],
)
def test_share_of_copied_runs(thought, line, run, share):
    assert copied_share(thought, line, run) == pytest.approx(share)


def test_relative_rewards_are_gains_over_an_act(policy, data):
    rows = data.prompts(0, 3).rows
    texts = ["\n", "# add one\n", "x = 1\n", "# then work\n"]
    completions = [completion(row, text, policy) for row in rows for text in texts]
    plain, gains = (
        torch.tensor(
            connected(NextLineLikelihood(cost=0.07, relative=relative), policy).score(completions)
        ).view(3, 4)
        for relative in (False, True)
    )
    assert (gains[:, 0] == 0).all()
    torch.testing.assert_close(gains, plain - plain[:, :1])
    torch.testing.assert_close(gains[:, 2], torch.full((3,), -0.07))


def test_there_is_no_policy(data, policy):
    row = data.prompts(0, 1).rows[0]
    with pytest.raises(UserError, match="`NextLineLikelihood` reads log-probs .* and there is no"):
        NextLineLikelihood().score([completion(row, "\n", policy)])


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: NextLineLikelihood(cost=-1), "`NextLineLikelihood.cost` must"),
        (
            lambda: NextLineLikelihood(overlap=0),
            r"`NextLineLikelihood.overlap` must be in \(0, 1\]",
        ),
        (lambda: NextLineLikelihood(run=0), "`NextLineLikelihood.run` must be at least 1, got 0"),
        (lambda: NextLineLikelihood().check_columns(["x"]), "needs the column 'line', which the"),
        (lambda: Thinks().check_columns(["line"]), "`Thinks` needs the column 'indentation'"),
    ],
)
def test_mistakes(make, message):
    with pytest.raises(UserError, match=message):
        make()


# --- the equations of an E-step, by enumeration ---------------------------------------------------


def expected_gradient(logits, rewards):
    """Return E[Σ_g A_g ∇ log q(z_g)] / G over all groups of two, with the group's mean as baseline."""
    q, gradient = logits.softmax(0), torch.zeros_like(logits)
    for pair in itertools.product(range(len(q)), repeat=2):
        outcome = Outcome(
            rewards[list(pair)][:, None],
            torch.ones(2, 1, dtype=torch.bool),
            2,
            torch.ones(2, dtype=torch.bool),
            None,
            torch.tensor(pair)[:, None],
            rewards[list(pair)],
        )
        advantages = GroupRelative("none").estimate(outcome).advantages_BT[:, 0]
        for z, advantage in zip(pair, advantages, strict=True):
            score = torch.nn.functional.one_hot(torch.tensor(z), len(q)) - q
            gradient += q[pair[0]] * q[pair[1]] * advantage * score / 2
    return gradient


def test_a_reward_that_does_not_depend_on_the_thought_gives_no_gradient():
    logits = torch.tensor([0.3, -1.0, 0.5, 0.1], dtype=torch.float64)
    constant = torch.full((4,), -1.7, dtype=torch.float64)
    assert expected_gradient(logits, constant).abs().max() < 1e-12
    # else half of the gradient of the expected reward: the mean of a group holds each member
    rewards = torch.tensor([-1.0, -2.0, -0.5, -1.5], dtype=torch.float64)
    q = logits.softmax(0)
    exact = q * (rewards - (q * rewards).sum())
    torch.testing.assert_close(expected_gradient(logits, rewards), exact / 2, atol=1e-9, rtol=1e-9)


def test_the_share_that_thinks_falls_as_the_cost_rises():
    """Act, and thoughts of which some help, after 300 exact steps; without helpful ones it vanishes."""
    thinks = torch.tensor([False, True, True, True])
    gains = torch.tensor([0.0, 0.3, 0.08, -0.4], dtype=torch.float64)
    shares = []
    for cost in (0.0, 0.01, 0.05, 0.2, 0.5, 1e6):
        act = torch.full((4,), -2.0, dtype=torch.float64)
        rewards = thought_rewards(act + gains, act, thinks, thinks, cost=cost)
        logits = torch.zeros(4, dtype=torch.float64)
        for _ in range(300):
            q = logits.softmax(0)
            logits = logits + 0.1 * (q * (rewards - (q * rewards).sum())).clamp(-1, 1)
        shares.append(logits.softmax(0)[thinks].sum().item())
    assert all(more > less for more, less in itertools.pairwise(shares))
    assert shares[0] > 0.9
    assert shares[-1] < 0.05


# --- runs ---------------------------------------------------------------------------------------


def run(data_of, policy, tokens, steps=2):
    objective = Objective.from_file("ra3_e_step")
    objective = type(objective)(**{**vars(objective), "support": FirstTokens(tokens)})
    module = PolicyOptimization(policy, objective, optimizer=lambda w: torch.optim.SGD(w, lr=0.1))
    loop = RolloutLoop(
        rewards=[NextLineLikelihood(), Thinks(), UsableThought()],
        prompts=2,
        completions=4,
        max_new_tokens=10,
        stop=["\n"],
        seed=3,
    )
    trainer = L.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[loop],
    )
    L.seed_everything(0)
    trainer.fit(module, datamodule=data_of)
    return loop, trainer, module


@pytest.mark.parametrize("lora", [False, True])
def test_an_e_step_with_a_tiny_model(data, policy, tmp_path, lora):
    """The reference is the model at the start, under LoRA without a second model."""
    policy.network.save_pretrained(tmp_path)
    policy.tokenizer.save_pretrained(tmp_path)
    adapters = Lora(rank=2, targets=["q_proj", "v_proj"]) if lora else None
    loop, trainer, module = run(data, CausalPolicy(str(tmp_path), lora=adapters), ["\n", "#"])
    assert 0 < trainer.callback_metrics["reward/thinks"] < 1
    experience, texts = loop.experience, policy.token_texts
    rollout = experience.rollout
    newline, mark = texts.index("\n"), texts.index("#")
    assert {*rollout.responses_BT[:, 0].tolist()} == {newline, mark}
    acts = rollout.responses_BT[:, 0] == newline
    assert (rollout.response_mask_BT.sum(1)[acts] == 1).all(), "an act ends at once"
    assert (rollout.finish_B[acts] == Finish.STOP).all()
    # after an update the reference is still the model at the start
    rows = data.prompts(1, 2).rows
    before, lines = ([row.extra[f"{name}_ids"] for row in rows] for name in ("before", "line"))
    parts = before, [()] * len(before), lines
    found, mask = loop.rewards[0].reference.continuations(*parts)
    expected, _ = connected(NextLineLikelihood(), policy).reference.continuations(*parts)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    moved = module.policy.score(continuation_rows(*parts), mask, temperature=1.0)
    assert not torch.allclose(moved.logprobs_BT, expected, atol=1e-5)


def test_a_forced_act_changes_nothing(data):
    """There is one first token, so each group has one reward, and no weight moves."""
    loop, trainer, module = run(data, tiny(), ["\n"])
    assert trainer.callback_metrics["rollout/groups_flat"] == 1
    assert trainer.callback_metrics["optim/idle"] == 1
    rollout = loop.experience.rollout
    assert not rollout.behaviour_logprobs_BT.any()
    scores = [module.score(rollout, reference=reference).logprobs_BT for reference in (True, False)]
    assert torch.equal(*scores)
