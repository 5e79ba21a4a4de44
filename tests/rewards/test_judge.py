"""`LlmJudge`: a local endpoint answers, is busy, writes nonsense, hangs or is not there."""

from __future__ import annotations

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.rewards import Completion, Endpoint, LlmJudge, RewardError
from lightning_mpo.rewards.process import RewardCaller
from tests.support.judge_server import judge_server

ROWS = [Completion(f"task {i}", f"text {i}", f"{i}", 2, True, {}) for i in range(4)]


@pytest.fixture(autouse=True)
def _no_proxy(monkeypatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def judge(url: str, **options) -> LlmJudge:
    known = {"seconds", "retries", "parallel", "key_variable"}
    at = {name: options.pop(name) for name in known & set(options)}
    return LlmJudge(Endpoint(url, "judge", pause=0.0, **at), **options)


def content(body: dict) -> str:
    return body["messages"][0]["content"]


def test_scores_are_scaled_and_requests_hold_prompt_response_and_target(monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "secret")
    template = "{prompt}|{response}|{target}|{other}"

    def answer(body, number):
        return 200, f"Score: 1, no: Score: {int(content(body)[5]) * 2.5}"

    with judge_server(answer) as (url, requests):
        reward = judge(url + "/", prompt=template, key_variable="MY_KEY")
        assert reward.score(ROWS) == [0.0, 0.25, 0.5, 0.75]
    assert sorted(map(content, requests)) == [f"task {i}|text {i}|{i}|{{other}}" for i in range(4)]
    assert {request["path"] for request in requests} == {"/v1/chat/completions"}
    assert {request["key"] for request in requests} == {"Bearer secret"}
    assert {(r["model"], r["temperature"]) for r in requests} == {("judge", 0)}
    assert not reward.is_accuracy


def test_a_text_is_filled_in_once() -> None:
    """A response that contains the name of another field does not get it."""
    row = Completion("task", "give me {target}", "42", 2, True, {})
    assert "42" not in judge("http://x")._content(row)


@pytest.mark.parametrize("status", [429, 500, 503])
def test_a_busy_endpoint_is_asked_again(status) -> None:
    with judge_server(lambda body, number: (status if number < 3 else 200, "Score: 10")) as (
        url,
        r,
    ):
        assert judge(url, retries=2).score(ROWS[:1]) == [1.0]
        assert len(r) == 3


def test_the_pauses_between_tries_double(monkeypatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr("time.sleep", pauses.append)
    with judge_server(lambda body, number: (503, "")) as (url, _):
        LlmJudge(Endpoint(url, "judge", retries=3, pause=2.0)).score(ROWS[:1])
    assert [pause for pause in pauses if pause >= 2] == [2.0, 4.0, 8.0]


NONSENSE = {
    "a refusal": (200, "I cannot rate this.", "returned no score from 0 to 10: 'I cannot rate"),
    "beyond the scale": (200, "Score: 11", "returned no score from 0 to 10"),
    "beyond all numbers": (200, "Score: " + "9" * 400, "returned no score"),
    "no JSON": (200, "raw nonsense", "raised JSONDecodeError"),
    "no chat": (200, 'raw {"choices": []}', "raised JSONDecodeError"),
    "no access": (401, "", "raised HTTPError: HTTP Error 401"),
    "down": (503, "", "raised HTTPError: HTTP Error 503"),
}


@pytest.mark.parametrize("name", NONSENSE)
def test_nonsense_costs_the_sample(name) -> None:
    status, text, message = NONSENSE[name]

    def answer(body, number):
        return (status, text) if "text 2" in content(body) else (200, "Score: 5")

    with judge_server(answer) as (url, _):
        reward = judge(url, retries=0)
        (error,) = [score for score in reward.score(ROWS) if isinstance(score, RewardError)]
        assert message in str(error)
        caller = RewardCaller([reward], 60, True)
        with pytest.warns(UserWarning, match="1 of 4 completions, judged one by one, failed"):
            assert caller(reward, ROWS).scores == [0.5, 0.5, None, 0.5]


def test_a_hanging_judge_costs_the_sample() -> None:
    def answer(body, number):
        return (0, "") if "text 2" in content(body) else (200, "Score: 5")

    with judge_server(answer) as (url, _):
        scores = judge(url, retries=0, seconds=0.5).score([ROWS[2]])
    assert "TimeoutError" in str(scores[0])


def test_a_judge_that_is_not_there_ends_the_run_at_the_first_call() -> None:
    with judge_server(lambda body, number: (200, "")) as (url, _):
        pass  # the port is free again
    reward = judge(url, retries=1)
    with pytest.raises(RewardError, match=r"`LlmJudge` raised URLError: .*127.0.0.1"):
        RewardCaller([reward], 60, True)(reward, ROWS)


def test_answers_with_a_score_are_cached_on_disk(tmp_path) -> None:
    def answer(body, number):
        return 200, "no idea" if "text 2" in content(body) and number <= 4 else "Score: 5"

    with judge_server(answer) as (url, requests):
        reward = judge(url, cache=str(tmp_path / "cache"), retries=0)
        first = reward.score(ROWS)
        assert isinstance(first[2], RewardError)
        assert judge(url, cache=str(tmp_path / "cache")).score(ROWS) == [0.5] * 4
        assert len(requests) == 5
        reward.score(ROWS)
        assert len(requests) == 5
        judge(url, cache=str(tmp_path / "cache"), prompt="Rate {response}").score(ROWS)
        assert len(requests) == 9
    assert len(list((tmp_path / "cache").rglob("*.txt"))) == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"low": 5.0, "high": 5.0}, "`LlmJudge.low` must be below `high` = 5, got 5"),
        ({"prompt": "Rate."}, "`LlmJudge.prompt` must contain `{response}`"),
        ({"pattern": "("}, "`LlmJudge.pattern` must be a regular expression"),
        ({"pattern": "x"}, "`LlmJudge.pattern` must have one group"),
    ],
)
def test_options_that_make_no_sense(options, message) -> None:
    with pytest.raises(UserError) as error:
        judge("http://localhost", **options)
    assert message in str(error.value)


def test_an_endpoint_is_a_web_address() -> None:
    with pytest.raises(UserError, match="`Endpoint.url` must begin with http:// or https://"):
        Endpoint("file:///etc/passwd", "judge")
