"""The order in which tokens were revealed, as data and as lines."""

from __future__ import annotations

import re

import pytest

from lightning_mpo.sampling.reveal_order import order_lines, reveal_orders
from tests.support.builders import END
from tests.support.masked_table import MaskedTable
from tests.support.revealed import T, reveal

PLAIN = re.compile(r"\x1b\[[0-9;]*m")


def cells(lines: list[str]) -> list[tuple[str, int]]:
    """Read tokens and steps back from the lines, by their columns."""
    pairs = []
    for above, below in zip(lines[::3], lines[1::3], strict=True):
        starts = [match.start() for match in re.finditer(r"\S+", below)]
        for start, stop in zip(starts, [*starts[1:], None], strict=True):
            pairs.append((above[start:stop].strip(), int(below[start:stop])))
    return pairs


def test_orders_hold_tokens_and_steps_up_to_the_first_end_token():
    policy = MaskedTable(end=3.0)
    rollout = reveal(policy)
    orders = reveal_orders(policy.tokenizer, rollout)
    lengths = {len(order["tokens"]) for order in orders}
    assert len(lengths) > 2
    for b, order in enumerate(orders):
        ids = rollout.responses_BT[b].tolist()
        length = ids.index(END) + 1 if END in ids else T
        assert order["tokens"] == [chr(97 + id) for id in ids[:length]]
        assert order["steps"] == rollout.reveal_BT[b, :length].tolist()


def test_a_step_stands_below_its_token():
    assert order_lines(["4", "12", "<end>"], [1, 100, 0]) == ["4 12  <end>", "1 100 0"]
    assert order_lines([" the", "\n", "\x07", ""], [0, 1, 2, 3]) == [
        "_the \\n ? ?",
        "0    1  2 3",
    ]
    assert order_lines([], []) == ["", ""]


@pytest.mark.parametrize("width", [10, 40, 80])
def test_lines_wrap_at_the_width_and_lose_nothing(width):
    tokens = [str(3**t)[:5] for t in range(60)]
    steps = [(37 * t) % 60 for t in range(60)]
    lines = order_lines(tokens, steps, width=width)
    assert max(map(len, lines)) <= width
    assert not any(lines[2::3])
    assert cells(lines) == list(zip(tokens, steps, strict=True))


def test_wide_characters_take_two_columns_and_long_tokens_are_cut():
    assert order_lines(["漢", "字"], [0, 11]) == ["漢 字", "0  11"]
    (above, below) = order_lines(["x" * 100], [5])
    assert above == "x" * 39 + "~"
    assert below == "5"


def test_colours_go_from_the_first_step_to_the_last_and_move_nothing():
    tokens, steps = ["a", "bb", "c"], [0, 5, 2]
    plain, colored = order_lines(tokens, steps), order_lines(tokens, steps, color=True)
    assert [PLAIN.sub("", line) for line in colored] == plain
    assert re.findall(r"38;5;(\d+)m", colored[0]) == ["39", "196", "148"]
