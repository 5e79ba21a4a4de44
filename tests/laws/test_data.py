"""`PromptDataModule`: which prompts a rollout gets, and how they are encoded."""

from __future__ import annotations

import warnings
from collections import Counter
from functools import cache
from typing import TYPE_CHECKING, Any

import pytest
import torch

from lightning_mpo.data import PromptDataModule, Splits
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptRow

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TEMPLATE = "{% for m in messages %}<{{ m['content'] }}>{% endfor %}{% if add_generation_prompt %}:{% endif %}"
CHARACTERS = "?<>:0123456789abc"


class Numbers(PromptDataModule):
    """`count` prompts: 0, 1, 2, ... to train on, and as many letters to validate on."""

    def __init__(self, count: int = 10, held_out: int = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.count, self.held_out, self.loads = count, held_out, 0

    def load(self) -> Splits:
        self.loads += 1
        train = [PromptRow(str(i), str(i + 1)) for i in range(self.count)]
        return Splits(train, [PromptRow("a" * (i + 1), "b") for i in range(self.held_out)])


@cache
def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerBase:
    """One token per character; `<` could be taken for a beginning of sequence that must not be doubled."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({c: i for i, c in enumerate(CHARACTERS)}, unk_token="?"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    core.post_processor = processors.TemplateProcessing(single="? $A", special_tokens=[("?", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=core, pad_token="?", bos_token="?")
    made.chat_template = template
    return made


def connected(**kwargs: Any) -> Numbers:
    data = Numbers(**kwargs)
    data.connect(tokenizer())
    return data


def texts(rows: Any) -> list[str]:
    return [row.prompt for row in rows]


def characters(ids: torch.Tensor) -> str:
    return "".join(CHARACTERS[i] for i in ids.tolist())


@pytest.mark.parametrize("round", [0, 1, 3])
def test_prompts_are_a_pure_function_of_seed_counter_and_round(round: int) -> None:
    forward, backward = Numbers(), Numbers()
    ahead = [texts(forward.training_rows(i, 4, round)) for i in range(12)]
    back = [texts(backward.training_rows(i, 4, round)) for i in reversed(range(12))]
    assert ahead == back[::-1]
    torch.manual_seed(5)
    assert texts(Numbers().training_rows(7, 4, round)) == ahead[7]
    state = torch.get_rng_state()
    Numbers().training_rows(3, 4, round)
    assert torch.equal(torch.get_rng_state(), state)
    assert [texts(Numbers(seed=1).training_rows(i, 4, round)) for i in range(12)] != ahead


@pytest.mark.parametrize("count", [1, 3, 4, 10, 23])
def test_a_pass_covers_every_row_once(count: int) -> None:
    """Also where a rollout crosses the end of a pass, or holds more than two."""
    data = Numbers(count=10)
    stream = [text for i in range(60) for text in texts(data.training_rows(i, count))]
    passes = [stream[i : i + 10] for i in range(0, len(stream) - 9, 10)]
    assert all(sorted(one) == sorted(map(str, range(10))) for one in passes)
    assert (
        len({tuple(one) for one in passes}) > len(passes) / 2
    )  # each pass has an order of its own


def test_rounds_redraw() -> None:
    data = Numbers(count=50)
    drawn = [tuple(texts(data.training_rows(4, 8, round))) for round in range(6)]
    assert len(set(drawn)) == 6
    seen = Counter(text for i in range(200) for text in texts(data.training_rows(i, 8, round=1)))
    assert len(seen) == 50
    assert max(seen.values()) < 3 * min(seen.values())


def test_rows_are_loaded_once() -> None:
    data = Numbers()
    data.setup("fit")
    data.setup("validate")
    data.training_rows(0, 2)
    assert data.loads == 1


def test_no_training_rows() -> None:
    with pytest.raises(UserError, match="`Numbers` found no training rows"):
        Numbers(count=0).setup()


def test_padding_is_on_the_left() -> None:
    data = connected(chat_template=False)
    batch = data.encode([PromptRow("1", ""), PromptRow("123", "")])
    assert batch.attention_mask_PS.tolist() == [[False, False, True, True], [True] * 4]
    assert (
        characters(batch.input_ids_PS[0][2:]) == "?1"
    )  # the tokenizer's own beginning of sequence
    assert characters(batch.input_ids_PS[1]) == "?123"
    assert batch.input_ids_PS.dtype == torch.long
    assert texts(batch.rows) == ["1", "123"]
    assert len(batch) == 2


def test_prompts_encode_the_training_rows() -> None:
    data = connected(count=12)
    batch = data.prompts(2, 4)
    assert batch.rows == tuple(data.training_rows(2, 4))
    said = [
        characters(ids[mask])
        for ids, mask in zip(batch.input_ids_PS, batch.attention_mask_PS, strict=True)
    ]
    assert said == [f"<{row.prompt}>:" for row in batch.rows]


def test_chat_template_is_applied_exactly_once() -> None:
    batch = connected(instruction="abc").encode([PromptRow("12", "")])
    assert characters(batch.input_ids_PS[0]) == "<abc12>:"  # no second beginning of sequence either


def test_without_chat_template() -> None:
    batch = connected(instruction="abc", chat_template=False).encode([PromptRow("12", "")])
    assert characters(batch.input_ids_PS[0]) == "?abc12"


def test_missing_chat_template_is_refused() -> None:
    with pytest.raises(
        UserError,
        match=r"the tokenizer of .* has no chat template; set `data.chat_template: false`",
    ):
        Numbers().connect(tokenizer(None))
    Numbers(chat_template=False).connect(tokenizer(None))


def test_too_long_prompt_is_refused_by_row() -> None:
    data = connected()
    data.max_prompt_tokens = 5
    data.encode([PromptRow("12", "")])
    with pytest.raises(
        UserError, match=r"the prompt '123' has 6 tokens, over `data.max_prompt_tokens` \(5\)"
    ):
        data.encode([PromptRow("12", ""), PromptRow("123", "")])


def test_too_long_prompts_are_refused_before_any_is_sampled() -> None:
    with pytest.raises(
        UserError, match=r"the prompt 'aaa' has 6 tokens, over `data.max_prompt_tokens` \(5\)"
    ):
        connected(max_prompt_tokens=5)


def test_connect_comes_first() -> None:
    with pytest.raises(
        UserError, match=r"`Numbers.connect\(tokenizer\)` must be called before prompts are encoded"
    ):
        Numbers().prompts(0, 2)


def test_validation_batches() -> None:
    data = connected(held_out=5, validation_prompts=4, validation_batch_size=3)
    batches = list(data.val_dataloader())
    assert [texts(batch.rows) for batch in batches] == [["a", "aa", "aaa"], ["aaaa"]]
    assert characters(batches[1].input_ids_PS[0]) == "<aaaa>:"
    assert len(connected(held_out=5).validation_rows) == 5
    assert len(data.test_dataloader()) == 2


def test_identity_tells_rows_order_and_rendering_apart() -> None:
    first = Numbers().identity()
    assert first == Numbers().identity()
    assert first["data"] == "Numbers"
    assert first["rows"] == {"train": 10, "validation": 5}
    assert Numbers(count=9).identity()["digest"] != first["digest"]
    assert Numbers(held_out=4).identity()["digest"] != first["digest"]
    for option in (
        {"seed": 1},
        {"suffix": "?"},
        {"system": "a"},
        {"order": "file"},
        {"instruction": "a"},
    ):
        other = Numbers(**option).identity()
        assert {name for name in first if first[name] != other[name]} == set(option)
    connected_one = connected()
    assert connected_one.identity() == first, "the tokenizer changes nothing"


class Own(PromptDataModule):
    """Rows as a user's own `load` returns them."""

    def __init__(self, train: list[PromptRow], validation: list[PromptRow], **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.rows = Splits(train, validation)

    def load(self) -> Splits:
        return self.rows


def test_leaks_of_an_own_load_are_told_before_training() -> None:
    data = Own(
        [PromptRow("1 ", "1"), PromptRow("2", "1")], [PromptRow(" 1", "1"), PromptRow("3", "1")]
    )
    with pytest.warns(
        UserWarning,
        match=r"^1 of 2 validation prompts are trained on as well, such as the prompt ' 1'",
    ):
        data.setup("fit")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.setup("validate")
        Numbers().setup("fit")


@pytest.mark.parametrize(
    ("solution", "message"),
    [
        (None, "has no solution to imitate"),
        (" ", "is empty"),
        ("2Ö", "characters that the tokenizer does not know"),
    ],
)
@pytest.mark.parametrize("held_out", [False, True])
def test_solutions_are_tried_before_any_is_imitated(
    solution: str | None, message: str, held_out: bool
) -> None:
    good, bad = PromptRow("1", "1", solution="2"), PromptRow("3", "1", solution=solution)
    data = Own([good], [bad]) if held_out else Own([good, bad], [good])
    data.connect(tokenizer(), [1])
    with pytest.raises(UserError, match=message) as caught:
        data.check_solutions()
    assert "'3'" in str(caught.value)
    good_alone = Own([good], [good])
    good_alone.connect(tokenizer(), [1])
    good_alone.check_solutions()


@pytest.mark.parametrize("held_out", [False, True])
def test_prompt_and_solution_must_fit_the_positions(held_out: bool) -> None:
    long, wide = PromptRow("3", "1", solution="22"), PromptRow("1111", "1", solution="2")
    data = Own([wide], [long]) if held_out else Own([long], [wide])
    data.connect(tokenizer(), [1])
    data.check_solutions(9)
    with pytest.raises(
        UserError, match=r"'1111'.* has 7 tokens and its solution 2, .* the model's 8 positions"
    ):
        data.check_solutions(8)
