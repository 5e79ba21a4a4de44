"""A small BERT with a character-level tokenizer: it learns in minutes and downloads nothing."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lightning_mpo.errors import UserError
from lightning_mpo.policies.masked import MaskedPolicy
from lightning_mpo.policies.tiny import alphabet, character_tokenizer, check_sizes

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

MASK = "<mask>"


class TinyMaskedPolicy(MaskedPolicy):
    """A BERT with random weights, or with those of a checkpoint.

    It has learned positions and no dropout. Its symbols are PAD, END, MASK and the characters.

    Args:
        characters: the alphabet; each character is one token.
        hidden_size: D; a multiple of `heads`.
        layers: number of layers of the encoder.
        heads: number of attention heads.
        intermediate_size: width of the MLPs; None: 4·D.
        max_length: number of positions.
        initializer_range: standard deviation of the weights at random initialisation; a narrow
            model learns faster from about `1 / sqrt(hidden_size)`.
        checkpoint: a Lightning checkpoint to start from.
        vocabulary: number of characters; ideographs follow `characters`. None: `characters` alone.
    """

    def __init__(
        self,
        characters: str = "0123456789+-*=;, ",
        hidden_size: int = 128,
        layers: int = 3,
        heads: int = 4,
        intermediate_size: int | None = None,
        max_length: int = 256,
        initializer_range: float = 0.02,
        checkpoint: str | None = None,
        vocabulary: int | None = None,
    ) -> None:
        super().__init__(source="tiny", checkpoint=checkpoint)
        self.characters = alphabet("TinyMaskedPolicy", characters, vocabulary)
        check_sizes(
            "TinyMaskedPolicy",
            {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "heads": heads},
            layers=layers,
            max_length=max_length,
            initializer_range=initializer_range,
        )
        if hidden_size % heads:
            raise UserError(
                f"`TinyMaskedPolicy.hidden_size` must be a multiple of `heads` = {heads}, got "
                f"{hidden_size}"
            )
        self.hidden_size, self.layers, self.heads = hidden_size, layers, heads
        self.intermediate_size = intermediate_size or 4 * hidden_size
        self.max_length, self.initializer_range = max_length, initializer_range

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return character_tokenizer(self.characters, MASK)

    @cached_property
    def config(self) -> PretrainedConfig:
        from transformers import BertConfig

        return BertConfig(
            vocab_size=len(self.characters) + 3,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            max_position_embeddings=self.max_length,
            initializer_range=self.initializer_range,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            type_vocab_size=1,
            pad_token_id=0,
            eos_token_id=1,
        )

    def load_network(self) -> PreTrainedModel:
        from transformers import BertForMaskedLM

        config: Any = self.config
        network: Any = BertForMaskedLM(config)
        return network.to(torch.float32)
