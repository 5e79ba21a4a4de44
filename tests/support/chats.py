"""A tokenizer of one token a character, its chat templates, and rows rendered with it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning_mpo.data import PromptDataModule, Splits
from lightning_mpo.types import PromptRow

SPECIAL = ["<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>", "<answer>", "</answer>"]
LETTERS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ <>|_/+=?.\n:!"
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer(
    template: str | None = TEMPLATE, unknown: str | None = None, end: str = "", lower: bool = False
) -> Any:
    """A token a character, special tokens, and a beginning of sequence in front of every text."""
    from tokenizers import (
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
    )
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(
        models.WordLevel(
            {text: i for i, text in enumerate([*SPECIAL, *LETTERS])}, unk_token=unknown
        )
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    if lower:
        core.normalizer = normalizers.Lowercase()
    core.post_processor = processors.TemplateProcessing(
        single=f"<bos> $A{end}", special_tokens=[("<bos>", 1), ("<eos>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        additional_special_tokens=SPECIAL[3:],
    )
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


class Rows(PromptDataModule):
    def __init__(self, *rows: str | PromptRow, **options: Any) -> None:
        super().__init__(**options)
        self.rows = [row if isinstance(row, PromptRow) else PromptRow(row, "1") for row in rows]

    def load(self) -> Splits:
        return Splits(self.rows, [])


def render(
    *rows: str | PromptRow, tokenizer: Any = None, ends: Sequence[int] | None = None, **options: Any
) -> list[str]:
    """Return the tokens of each row's prompt, with a dot between them."""
    tokenizer, data = tokenizer or make_tokenizer(), Rows(*rows, **options)
    data.connect(tokenizer, ends)
    batch = data.encode(data.splits.train)
    return [
        ".".join(tokenizer.convert_ids_to_tokens(ids[mask].tolist()))
        for ids, mask in zip(batch.input_ids_PS, batch.attention_mask_PS, strict=True)
    ]


def dotted(*parts: str) -> str:
    """Write special tokens and texts as `render` does."""
    return ".".join(part if part in (*SPECIAL, "<think>") else ".".join(part) for part in parts)
