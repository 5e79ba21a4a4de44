"""A language model behind an OpenAI-compatible endpoint as the judge of responses."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from urllib.request import Request, urlopen

from lightning_mpo.checks import at_least, finite, not_below, positive
from lightning_mpo.errors import UserError
from lightning_mpo.rewards.base import Completion, Reward, RewardError

PROMPT = """Rate the response to the task from 0 to 10, where 10 is best.

Task:
{prompt}

Response:
{response}

Write the rating as: Score: <number>"""


@dataclass(frozen=True)
class Endpoint:
    """An OpenAI-compatible endpoint for chats, and the manner of requests to it.

    Args:
        url: such as `http://localhost:8000/v1`.
        model: name of the model at the endpoint.
        seconds: most seconds of one try.
        retries: tries after the first one, if the endpoint is busy or does not answer.
        pause: seconds before the second try; the pause doubles with each try.
        parallel: requests at the same time.
        max_tokens: most tokens of an answer.
        key_variable: environment variable with the key; an unset one sends no key.

    Raises:
        UserError: an option is out of range.
    """

    url: str
    model: str
    seconds: float = 60.0
    retries: int = 3
    pause: float = 1.0
    parallel: int = 16
    max_tokens: int = 1024
    key_variable: str = "OPENAI_API_KEY"

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise UserError(f"`Endpoint.url` must begin with http:// or https://, got {self.url!r}")
        positive("Endpoint", most=86_400, seconds=self.seconds)
        not_below("Endpoint", 0, most=86_400, pause=self.pause)
        at_least("Endpoint", 0, most=100, retries=self.retries)
        at_least("Endpoint", 1, most=1000, parallel=self.parallel)
        at_least("Endpoint", 1, max_tokens=self.max_tokens)

    def request(self, content: str) -> bytes:
        """Return the body of a request with one message of a user."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": self.max_tokens,
        }
        return json.dumps(body, sort_keys=True).encode()

    def answer(self, request: bytes) -> str:
        """Send a request, again after a pause if the endpoint is busy or does not answer.

        Raises:
            OSError, HTTPException: no try was answered.
            ValueError, LookupError, TypeError: the answer is no chat.
        """
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.key_variable):
            headers["Authorization"] = f"Bearer {key}"
        for attempt in range(self.retries + 1):
            if attempt:
                time.sleep(self.pause * 2 ** (attempt - 1))
            try:
                sent = Request(f"{self.url.rstrip('/')}/chat/completions", request, headers)
                with urlopen(sent, timeout=self.seconds) as reply:
                    return str(json.load(reply)["choices"][0]["message"]["content"])
            except (OSError, HTTPException) as error:
                code = getattr(error, "code", None)
                refused = isinstance(code, int) and code < 500 and code not in (408, 429)
                if refused or attempt == self.retries:
                    raise
        raise RuntimeError("the last try returns or raises")


class LlmJudge(Reward):
    """The score that a language model gives a response, scaled to the range from 0 to 1.

        R = (score - low) / (high - low)

    The judge is asked with temperature 0. If it does not answer, or writes no score from `low` to
    `high`, the reward fails on this response (`rollout.failed_reward`).

    Args:
        endpoint: where the judge is, and how often and how long it is asked.
        prompt: text of the request; `{prompt}`, `{response}` and `{target}` are filled in.
        pattern: regular expression; the group of its last match is the score.
        low: lowest score.
        high: highest score.
        cache: folder of answers by request, so that no request is sent twice; None: no cache.
        weight: factor of this reward in the sum.

    Raises:
        UserError: an option is out of range or does not fit the others.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        prompt: str = PROMPT,
        pattern: str = r"[Ss]core:\s*(-?\d+(?:\.\d+)?)",
        low: float = 0.0,
        high: float = 10.0,
        cache: str | None = None,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        finite("LlmJudge", low=low, high=high)
        if low >= high:
            raise UserError(f"`LlmJudge.low` must be below `high` = {high:g}, got {low:g}")
        if "{response}" not in prompt:
            raise UserError("`LlmJudge.prompt` must contain `{response}`, the text to judge")
        self.endpoint, self.prompt, self.pattern = endpoint, prompt, _with_group(pattern)
        self.low, self.high = low, high
        self.cache = None if cache is None else Path(cache).expanduser()

    def score(self, completions: Sequence[Completion]) -> list[float | RewardError | None]:
        with ThreadPoolExecutor(self.endpoint.parallel) as pool:
            return list(pool.map(self._judged, completions))

    def _judged(self, completion: Completion) -> float | RewardError:
        # a request, or the answer to an equal one
        request = self.endpoint.request(self._content(completion))
        place = self._place(request)
        try:
            answer = place.read_text() if place is not None and place.exists() else None
            fresh = answer is None
            answer = self.endpoint.answer(request) if answer is None else answer
        except (OSError, HTTPException, ValueError, LookupError, TypeError) as error:
            reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
            return RewardError(f"`LlmJudge` raised {reason} ({self.endpoint.url})")
        # the score
        matches = self.pattern.findall(answer)
        score = _number(matches[-1]) if matches else None
        if score is None or not self.low <= score <= self.high:
            return RewardError(
                f"`LlmJudge` returned no score from {self.low:g} to {self.high:g}: "
                f"{answer.strip()[-80:]!r}"
            )
        if fresh and place is not None:
            _write(place, answer)
        return (score - self.low) / (self.high - self.low)

    def _content(self, completion: Completion) -> str:
        fields = {
            "prompt": completion.prompt,
            "response": completion.text,
            "target": completion.target,
        }
        return re.sub(r"\{(prompt|response|target)\}", lambda m: fields[m[1]], self.prompt)

    def _place(self, request: bytes) -> Path | None:
        if self.cache is None:
            return None
        name = hashlib.sha256(self.endpoint.url.encode() + b"\0" + request).hexdigest()
        return self.cache / name[:2] / f"{name}.txt"


def _with_group(pattern: str) -> re.Pattern[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"`LlmJudge.pattern` must be a regular expression, got {pattern!r:.60}: {error}"
        ) from None
    if compiled.groups != 1:
        raise UserError(
            f"`LlmJudge.pattern` must have one group, around the score, got {compiled.groups}"
        )
    return compiled


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _write(place: Path, answer: str) -> None:
    """Write an answer whole or not at all, as several processes may share a cache."""
    place.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=place.parent, delete=False) as file:
        file.write(answer)
    Path(file.name).replace(place)
