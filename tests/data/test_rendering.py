"""From rows to tokens: templates, unknown characters, lengths and the end of a response."""

from __future__ import annotations

from typing import Any

import pytest

from lightning_mpo.errors import UserError
from lightning_mpo.policies import TinyPolicy
from lightning_mpo.sampling.base import decode_tokens
from lightning_mpo.types import PromptRow
from tests.support.chats import TEMPLATE, Rows, dotted, make_tokenizer, render

THINKING = TEMPLATE.replace(
    "assistant\n",
    "assistant\n{% if enable_thinking is not defined or enable_thinking %}<think>\n{% endif %}",
)


def chat(*messages: tuple[str, str]) -> PromptRow:
    return PromptRow(
        messages[-1][1],
        "1",
        messages=tuple({"role": role, "content": text} for role, text in messages),
    )


OPEN = ("<|im_start|>", "assistant\n")
USER = ("<|im_start|>", "user\n")
END = ("<|im_end|>", "\n")


def test_system_message_instruction_and_suffix() -> None:
    (text,) = render("1", system="be", instruction="a ", suffix=" z")
    assert text == dotted("<bos>", "<|im_start|>", "system\nbe", *END, *USER, "a 1 z", *END, *OPEN)
    (text,) = render("1", instruction="a ", suffix=" z", chat_template=False)
    assert text == dotted("<bos>", "a 1 z")


def test_history() -> None:
    row = chat(("user", "a"), ("assistant", "b"), ("user", "c"))
    (text,) = render(row, suffix="!")
    turns = (*USER, "a", *END, "<|im_start|>", "assistant\nb", *END, *USER, "c!", *END)
    assert text == dotted("<bos>", *turns, *OPEN)
    assert render(chat(("system", "x"), ("user", "a")), system="y") == [
        dotted("<bos>", "<|im_start|>", "system\nx", *END, *USER, "a", *END, *OPEN)
    ], "a row's own system message stands"
    assert row.messages[-1]["content"] == "c"
    with pytest.raises(
        UserError, match="'c' is a chat, which needs a template; set `data.chat_template: true`"
    ):
        render(row, chat_template=False)


@pytest.mark.parametrize(
    ("arguments", "thinking"), [({}, True), ({"enable_thinking": False}, False)]
)
def test_template_arguments_and_opened_thoughts(arguments: dict[str, Any], thinking: bool) -> None:
    data = Rows("1", template_arguments=arguments)
    data.connect(make_tokenizer(THINKING))
    (row,) = data.encode(data.splits.train).rows
    assert row.thinking == thinking
    assert row == data.splits.train[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"template_arguments": {"enable_thinkin": False}},
            "sets `enable_thinkin`, which the chat template of .* does",
        ),
        (
            {"template_arguments": {"tokenize": False}},
            "`data.template_arguments` cannot set `tokenize`",
        ),
        (
            {"template_arguments": {"messages": []}},
            "`data.template_arguments` cannot set `messages`",
        ),
        ({"system": "x", "chat_template": False}, "`data.system` is for a chat template"),
        (
            {"template_arguments": {"x": 1}, "chat_template": False},
            "`data.template_arguments` is for a chat template",
        ),
    ],
)
def test_options_that_templates_do_not_take(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        render("1", tokenizer=make_tokenizer(THINKING), **options)


# --- characters and lengths


@pytest.mark.parametrize("unknown", [None, "<pad>"])
@pytest.mark.parametrize("chat_template", [True, False])
def test_unknown_characters_are_refused(unknown: str | None, chat_template: bool) -> None:
    tokenizer = make_tokenizer(unknown=unknown)
    row = PromptRow("1Ä", "1", where="line 7 of a.jsonl")
    with pytest.raises(UserError, match=r"the prompt '1Ä' \(line 7 of a.jsonl\)"):
        render("1", row, tokenizer=tokenizer, chat_template=chat_template)
    data = Rows(PromptRow("1", "1", solution="Ö"), chat_template=chat_template)
    data.connect(tokenizer)
    with pytest.raises(
        UserError,
        match="the prompt '1'.*(does not know|cannot encode)|cannot encode the prompt '1'",
    ):
        data.solutions(data.splits.train)


def test_unknown_characters_of_the_tiny_policy() -> None:
    with pytest.raises(
        UserError, match="'ÄÖ€0=' holds characters that the tokenizer does not know, such as 'Ä'"
    ):
        render("ÄÖ€0=", tokenizer=TinyPolicy("0123456789+=").tokenizer, chat_template=False)
    for control in ("<end>", "<pad>"):
        with (
            pytest.warns(UserWarning, match="contain control"),
            pytest.raises(UserError, match="does not know"),
        ):
            render(
                f"1{control}", tokenizer=TinyPolicy("0123456789+=").tokenizer, chat_template=False
            )


def test_characters_that_a_tokenizer_leaves_out() -> None:
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE({"a": 0, "b": 1, "<eos>": 2}, []))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    assert render("ab", tokenizer=tokenizer, chat_template=False) == ["a.b"]
    with pytest.raises(
        UserError, match="the prompt 'c' holds characters that the tokenizer does not know"
    ):
        render("c", tokenizer=tokenizer, chat_template=False)


def test_overlong_rows() -> None:
    rows = [PromptRow("1" * n, "1", where=f"line {n} of a.jsonl") for n in (3, 600, 4, 10_000_000)]
    with pytest.raises(
        UserError,
        match=r"line 600 of a.jsonl\) has 620 tokens, over `data.max_prompt_tokens` \(512\)",
    ):
        render(*rows)
    data = Rows(*rows, overlong="skip")
    before = data.identity()
    with pytest.warns(
        UserWarning, match=r"2 of 4 rows are longer .* and are skipped; the first is .*line 600"
    ):
        data.connect(make_tokenizer())
    assert [len(row.prompt) for row in data.splits.train] == [3, 4]
    assert data.longest_prompt == 24
    assert data.identity() == before
    data.connect(make_tokenizer())
    assert len(data.splits.train) == 2
    with pytest.raises(UserError, match="1 of 1 rows are longer .*, and none is left to train on"):
        render(rows[1], overlong="skip")


def test_rows_in_the_order_of_the_file() -> None:
    data = Rows(*"abcde", order="file")
    assert [row.prompt for i in range(4) for row in data.training_rows(i, 2)] == list("abcdeabc")
    assert {row.prompt for i in range(40) for row in data.training_rows(i, 2, round=1)} == set(
        "abcde"
    )


# --- the end of a response, and back to text


@pytest.mark.parametrize(
    ("ends", "template", "closing"),
    [
        ([2, 4], TEMPLATE, "<|im_end|>"),
        ([4], TEMPLATE, "<|im_end|>"),
        ([2], TEMPLATE, "<eos>"),
        (None, TEMPLATE, "<eos>"),
        ([2, 4], THINKING, "<|im_end|>"),
        ([2, 4], TEMPLATE.replace("<|im_end|>", "<eos>"), "<eos>"),
        ([2, 4], None, "<eos>"),
        ([2, 4], "{{ messages[-1].content }}", "<eos>"),
    ],
)
def test_solutions_end_as_the_template_ends_a_turn(
    ends: list[int] | None, template: str | None, closing: str
) -> None:
    tokenizer = make_tokenizer(template)
    data = Rows(PromptRow("1", "1", solution="a<answer>"), chat_template=template is not None)
    data.connect(tokenizer, ends)
    solutions = data.solutions(data.splits.train)
    assert tokenizer.convert_ids_to_tokens(solutions.responses_BT[0].tolist()) == [
        "a",
        "<answer>",
        closing,
    ]


def test_end_tokens_fill_a_canvas_and_belong_to_the_solution() -> None:
    tokenizer = make_tokenizer()
    rows = [PromptRow("1", "1", solution="a<answer>"), PromptRow("2", "2", solution="a")]
    data = Rows(*rows)
    data.connect(tokenizer, [2, 4])
    solutions = data.solutions(rows, 4)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    first, second = solutions.responses_BT.tolist()
    assert first[-2:] == [end, end]
    assert second == [first[0], end, end, end]
    assert solutions.response_mask_BT.all()
    assert solutions.attention_mask_BL[:, -4:].all()
    # the longest one just fits, and no row is longer than the canvas
    data.check_solutions(canvas=3)
    with pytest.raises(
        UserError,
        match="solution of .*'1'.* has 3 tokens with the end token, .* canvas of 2: raise",
    ):
        data.check_solutions(canvas=2)


def test_solutions_that_cannot_be_imitated() -> None:
    tokenizer = make_tokenizer()
    for solution, message in {
        "a<|im_end|>": "holds the end token '<|im_end|>'; leave it out",
        None: "no solution",
    }.items():
        data = Rows(PromptRow("1", "1", solution=solution))
        data.connect(tokenizer, [2, 4])
        with pytest.raises(UserError, match=message.replace("|", r"\|")):
            data.solutions(data.splits.train)
    data = Rows(PromptRow("1", "1", solution="a"))
    tokenizer = make_tokenizer()
    tokenizer.eos_token = None
    data.connect(tokenizer)
    with pytest.raises(
        UserError, match="has no token that ends a response, which a demonstration needs"
    ):
        data.solutions(data.splits.train)


def test_special_tokens_that_carry_meaning_reach_the_reward() -> None:
    tokenizer = make_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(
        ["<bos>", "<answer>", "4", "</answer>", "<|im_end|>", "<eos>", "<pad>"]
    )
    assert decode_tokens(tokenizer, [ids, []], [2, 4]) == ("<answer>4</answer>", "")
    assert decode_tokens(tokenizer, [ids], [2]) == ("<answer>4</answer><|im_end|>",)
