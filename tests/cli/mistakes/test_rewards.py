"""Mistakes in rewards, and in dynamic sampling by their accuracy, end in one line."""

from __future__ import annotations

import pytest

from lightning_mpo.rewards.base import Reward, TokenReward
from tests.support.mistakes import OBJECTIVE, OVERLAY, Case, check_message


class Raises(Reward):
    def score(self, completions):
        return [1 / 0 for _ in completions]


class ReturnsNan(Reward):
    def score(self, completions):
        return [float("nan")] * len(completions)


class ReturnsTooFew(Reward):
    def score(self, completions):
        return [1.0]


class ReturnsText(Reward):
    def score(self, completions):
        return ["good"] * len(completions)


class OfTokens(TokenReward):
    def token_scores(self, completions):
        return [[0.0] * len(c.token_ids) for c in completions]


class OfTooFewTokens(TokenReward):
    def token_scores(self, completions):
        return [[0.0] for _ in completions]


def penalty(options: str) -> dict[str, str]:
    """Overlay: an overlong penalty with these options."""
    return {
        "o.yaml": f"rollout: {{rewards: [ExactAnswer, {{class_path: OverlongPenalty, init_args: {options}}}]}}"
    }


def judge(endpoint: str) -> dict[str, str]:
    """Overlay: a judge at this endpoint, and further options."""
    options = f"{{endpoint: {endpoint}}}"
    return {"o.yaml": f"rollout: {{rewards: [{{class_path: LlmJudge, init_args: {options}}}]}}"}


CASES = {
    # --- dynamic sampling
    "no rounds": Case(
        "`DynamicSampling.rounds` must be at least 1, got 0",
        ["-c", "more.yaml"],
        {"more.yaml": "rollout: {dynamic: {class_path: DynamicSampling, init_args: {rounds: 0}}}"},
    ),
    "dynamic sampling without accuracy": Case(
        "`rollout.dynamic` needs a reward that says what is right…got Finished…`ExactAnswer`…`rollout.dynamic: null`",
        ["--rollout.dynamic", "DynamicSampling", "--rollout.rewards", "[Finished]"],
    ),
    "dynamic sampling of single completions": Case(
        "`rollout.dynamic`…`rollout.completions` must be at least 2, got 1",
        [
            *("--rollout.dynamic", "DynamicSampling", "--rollout.completions", "1"),
            *(f"{OBJECTIVE}.advantage", "ReturnToGo"),
        ],
    ),
    "a misspelt argument of dynamic sampling": Case(
        "`DynamicSampling` has no argument `round`; did you mean `rounds`",
        ["-c", "more.yaml"],
        {"more.yaml": "rollout: {dynamic: {class_path: DynamicSampling, init_args: {round: 3}}}"},
    ),
    "a misspelt dynamic sampling": Case(
        "no class `DynamicSample`; did you mean `DynamicSampling`",
        ["--rollout.dynamic", "DynamicSample"],
    ),
    "something else for dynamic sampling": Case(
        "`TokenMean` is a `Reduction`, which does not belong here",
        ["--rollout.dynamic", "TokenMean"],
    ),
    "truncated responses by a word": Case(
        "mask_truncated…bool…often", ["--rollout.mask_truncated", "often"]
    ),
    # --- rewards
    "a module of rewards that exits": Case(
        "module `exits` cannot be imported: it calls `sys.exit`",
        ["--rollout.rewards", "[exits.f]"],
        {"exits.py": "import sys\nsys.exit(3)\n"},
    ),
    "a module of a class that exits": Case(
        "module `exits_too` cannot be imported: it calls `sys.exit`",
        ["--rollout.rewards", "[{class_path: exits_too.Mine}]"],
        {"exits_too.py": "raise SystemExit\n"},
    ),
    "a file of rewards that exits": Case(
        "reward 'exits.py:f' cannot be imported: SystemExit: 3",
        ["--rollout.rewards", "['exits.py:f']"],
        {"exits.py": "import sys\nsys.exit(3)\n"},
    ),
    "a file of rewards that is not there": Case(
        "there is no file 'none.py' with rewards", ["--rollout.rewards", "['none.py:f']"]
    ),
    "a file without that reward": Case(
        "reward 'some.py:g': some.py has no `g`; it has f",
        ["--rollout.rewards", "['some.py:g']"],
        {"some.py": "def f(completions): return [1.0]\n"},
    ),
    "a function that takes what is no column": Case(
        "reward `f` takes `answers`, which it is not given",
        ["--rollout.rewards", "['columns.py:f']"],
        {"columns.py": "def f(completions, answers): return [1.0]\n"},
    ),
    "messages for a function of one response": Case(
        "`FunctionReward.messages` is for functions of lists; `f` takes `solution_str`, which is one",
        [
            "--rollout.rewards",
            "[{class_path: FunctionReward, init_args: {function: 'per_row.py:f', messages: true}}]",
        ],
        {"per_row.py": "def f(solution_str, ground_truth):\n    return 0\n"},
    ),
    "a function that reads messages and gets texts": Case(
        "string indices must be integers…; completions are texts; `messages: true` of `FunctionRew",
        ["--rollout.rewards", "['of_messages.py:f']"],
        {
            "of_messages.py": "def f(completions, **k):\n    return [c[0]['content'] for c in completions]\n"
        },
        late=True,
    ),
    "a function within a class of rewards that exits": Case(
        "reward 'exits_deep.f' cannot be imported: SystemExit",
        [
            "--rollout.rewards",
            "[{class_path: FunctionReward, init_args: {function: exits_deep.f}}]",
        ],
        {"exits_deep.py": "raise SystemExit\n"},
    ),
    "a reward of infinite weight": Case(
        "`MathAnswer.weight` must be",
        ["--rollout.rewards", "[{class_path: MathAnswer, init_args: {weight: .inf}}]"],
    ),
    "no time for programs": Case(
        "`limits.seconds` must be positive",
        ["--rollout.rewards", "[{class_path: CodeAnswer, init_args: {limits: {seconds: 0}}}]"],
    ),
    "negative memory for programs": Case(
        "`limits.memory_mib` must be at least 64",
        ["--rollout.rewards", "[{class_path: CodeAnswer, init_args: {limits: {memory_mib: -1}}}]"],
    ),
    "programs in another language": Case(
        "`CodeAnswer.language` must be 'python'",
        ["--rollout.rewards", "[{class_path: CodeAnswer, init_args: {language: rust}}]"],
    ),
    "programs without tests": Case(
        "`CodeAnswer` needs columns with tests: `test` and `entry_point`, or `test_list`",
        ["--rollout.rewards", "[{class_path: CodeAnswer, init_args: {allow_weak: true}}]"],
    ),
    "no time for rewards": Case(
        "`rollout.reward_seconds` must be positive", ["--rollout.reward_seconds", "0"]
    ),
    "a word for the score of failures": Case(
        "failed_reward…float…none at all", ["--rollout.failed_reward", "none at all"]
    ),
    "a format that is no regular expression": Case(
        "`FormatMatch.pattern` must be a regular expression, got '('",
        ["--rollout.rewards", "[{class_path: FormatMatch, init_args: {pattern: '('}}]"],
    ),
    "a reward model that is not there": Case(
        "none_here",
        ["--rollout.rewards", "[{class_path: RewardModel, init_args: {source: ./none_here}}]"],
    ),
    "a judge without an address": Case(
        "`Endpoint.url` must begin with http:// or https://, got 'localhost'",
        OVERLAY,
        judge("{url: localhost, model: m}"),
    ),
    "a judge that sees no response": Case(
        "`LlmJudge.prompt` must contain `{response}`",
        OVERLAY,
        judge("{url: 'http://localhost', model: m}, prompt: Rate."),
    ),
    "a place of answers that is none": Case(
        "extract…last",
        ["--rollout.rewards", "[{class_path: MathAnswer, init_args: {extract: last}}]"],
    ),
    "a reward that raises": Case(
        "reward `Raises` raised ZeroDivisionError",
        ["--rollout.rewards", "[tests.cli.mistakes.test_rewards.Raises]"],
        late=True,
    ),
    "a reward of nan": Case(
        "reward `ReturnsNan` returned nan",
        ["--rollout.rewards", "[tests.cli.mistakes.test_rewards.ReturnsNan]"],
        late=True,
    ),
    "a reward of a wrong count": Case(
        "reward `ReturnsTooFew` must return one number per completion (4), got 1",
        ["--rollout.rewards", "[tests.cli.mistakes.test_rewards.ReturnsTooFew]"],
        late=True,
    ),
    "a reward of text": Case(
        "reward `ReturnsText` returned 'good'",
        ["--rollout.rewards", "[tests.cli.mistakes.test_rewards.ReturnsText]"],
        late=True,
    ),
    "a reward of too few tokens": Case(
        "reward `OfTooFewTokens`, in `token_scores`, must return one number per token (…got 1",
        ["--rollout.rewards", "[tests.cli.mistakes.test_rewards.OfTooFewTokens]"],
        late=True,
    ),
    "a reward of tokens beside one action per response": Case(
        "`SequenceActions` takes one advantage for a response, and `ReturnToGo` gives its tokens "
        "different ones by the reward `OfTokens`; use `SequenceActions.form: token`",
        [
            *("--rollout.rewards", "[tests.cli.mistakes.test_rewards.OfTokens]"),
            *(f"{OBJECTIVE}.advantage", "ReturnToGo"),
            *(f"{OBJECTIVE}.actions", "SequenceActions"),
        ],
    ),
    "a check of no rows": Case(
        "`--rows` must be from 1 to 100,000, got 0", ["--rows", "0"], verb="rewards-check"
    ),
    "a check in no time": Case(
        "`--seconds` must be positive and finite, got 0", ["--seconds", "0"], verb="rewards-check"
    ),
    "a check of a form without a place": Case(
        "`--form` 'so' has no {}, which stands for the target; write 'so: {}', say",
        ["--form", "so"],
        verb="rewards-check",
    ),
    "a check of rewards that do not fit the data": Case(
        "`SpanShare` reads the column `span_length`",
        ["--rollout.rewards", "[SpanShare]"],
        verb="rewards-check",
    ),
    "a penalty over no tokens": Case(
        "`OverlongPenalty.buffer` must be between 1 and `limit` = 6, got 0",
        OVERLAY,
        penalty("{limit: 6, buffer: 0}"),
    ),
    "a penalty over more than the limit": Case(
        "`OverlongPenalty.buffer` must be between 1 and `limit` = 6, got 7",
        OVERLAY,
        penalty("{limit: 6, buffer: 7}"),
    ),
    "a penalty at no limit": Case(
        "`OverlongPenalty.limit` must be at least 1, got 0",
        OVERLAY,
        penalty("{limit: 0, buffer: 0}"),
    ),
    "a penalty that is a bonus": Case(
        "`OverlongPenalty.factor` must be positive, got -1.0: it is taken off",
        OVERLAY,
        penalty("{limit: 6, buffer: 2, factor: -1}"),
    ),
    "a penalty that no response reaches": Case(
        "`OverlongPenalty` begins after 8 tokens (`limit - buffer`), and no response is longer than "
        "`rollout.max_new_tokens` = 6; give `limit: ${rollout.max_new_tokens}`",
        OVERLAY,
        penalty("{limit: 10, buffer: 2}"),
    ),
    "a penalty without its limit": Case(
        "`OverlongPenalty` needs the argument `limit`", OVERLAY, penalty("{buffer: 2}")
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_line_that_says_what_to_write(tmp_path, name):
    check_message(CASES[name], tmp_path)
