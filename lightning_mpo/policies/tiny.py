"""A small Llama with a character-level tokenizer: it learns in minutes and downloads nothing."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from lightning_mpo.characters import extend_alphabet
from lightning_mpo.checks import at_least, positive
from lightning_mpo.errors import UserError
from lightning_mpo.policies.causal import CausalPolicy
from lightning_mpo.policies.mtp import MTPHeads
from lightning_mpo.policies.value import Critic

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

PAD, END = "<pad>", "<end>"


WIDEST, DEEPEST = 65_536, 1024
"""Most units of a layer, and most layers: a tiny model has a few hundred and a handful."""


class TinyPolicy(CausalPolicy):
    """A Llama with random weights, or with those of a checkpoint of `SupervisedWarmup`.

    Args:
        characters: the alphabet; each character is one token.
        hidden_size: D.
        layers: decoder layers.
        heads: attention heads.
        intermediate_size: of the MLPs; None: 4·D.
        max_length: positions.
        initializer_range: standard deviation of the weights at random initialisation, as in
            `LlamaConfig`; a narrow model learns faster from about `1 / sqrt(hidden_size)`.
        share_prompts: compute a prompt once for all of its responses in a micro-batch.
        mtp: multi-token-prediction heads.
        critic: estimates the values of states.
        checkpoint: a Lightning checkpoint to start from.
        reference_checkpoint: of the reference, as for `LoadedPolicy`.
        vocabulary: number of characters; ideographs follow `characters`, as in the data `Tails`.
            None: `characters` alone.
    """

    def __init__(
        self,
        characters: str = "0123456789+-*=;, ",
        hidden_size: int = 192,
        layers: int = 3,
        heads: int = 4,
        intermediate_size: int | None = None,
        max_length: int = 256,
        initializer_range: float = 0.02,
        share_prompts: bool = True,
        mtp: MTPHeads | None = None,
        critic: Critic | None = None,
        checkpoint: str | None = None,
        vocabulary: int | None = None,
        reference_checkpoint: str | None = None,
    ) -> None:
        super().__init__(
            source="tiny",
            share_prompts=share_prompts,
            mtp=mtp,
            critic=critic,
            checkpoint=checkpoint,
            reference_checkpoint=reference_checkpoint,
        )
        self.characters = alphabet("TinyPolicy", characters, vocabulary)
        check_sizes(
            "TinyPolicy",
            {"hidden_size": hidden_size, "intermediate_size": intermediate_size, "heads": heads},
            layers=layers,
            max_length=max_length,
            initializer_range=initializer_range,
        )
        if hidden_size % (2 * heads):
            raise UserError(
                f"`TinyPolicy.hidden_size` must be a multiple of 2 x `heads` = {2 * heads}, as a "
                f"head's width is even, got {hidden_size}"
            )
        self.initializer_range = initializer_range
        self.hidden_size, self.layers, self.heads, self.max_length = (
            hidden_size,
            layers,
            heads,
            max_length,
        )
        self.intermediate_size = intermediate_size or 4 * hidden_size

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return character_tokenizer(self.characters)

    @cached_property
    def config(self) -> PretrainedConfig:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=len(self.characters) + 2,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=self.max_length,
            initializer_range=self.initializer_range,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=None,
            eos_token_id=1,
        )

    def load_network(self) -> PreTrainedModel:
        from transformers import LlamaForCausalLM

        config: Any = self.config
        network: Any = LlamaForCausalLM(config)
        return network.to(torch.float32)


def alphabet(owner: str, characters: str, vocabulary: int | None) -> str:
    """Return the characters of a tiny policy.

    Args:
        owner: class of the policy, for messages.
        characters: the first ones.
        vocabulary: number of characters; ideographs follow the first ones. None: no others.

    Raises:
        UserError: a character is repeated, or the number is too small or too large.
    """
    if len(set(characters)) != len(characters):
        raise UserError(f"`{owner}.characters` must not repeat a character, got {characters!r}")
    return characters if vocabulary is None else extend_alphabet(characters, vocabulary, owner)


def check_sizes(
    owner: str,
    widths: Mapping[str, int | None],
    *,
    layers: int,
    max_length: int,
    initializer_range: float,
) -> None:
    """Refuse sizes of a tiny policy that are out of range.

    Args:
        owner: class of the policy, for messages.
        widths: sizes of layers by option.
        layers: number of layers.
        max_length: positions.
        initializer_range: standard deviation of the weights.

    Raises:
        UserError: names the option.
    """
    at_least(owner, 1, most=WIDEST, **widths)
    at_least(owner, 1, most=DEEPEST, layers=layers)
    at_least(owner, 1, max_length=max_length)
    positive(owner, most=10, initializer_range=initializer_range)


def character_tokenizer(characters: str, mask: str | None = None) -> PreTrainedTokenizerBase:
    """Return a tokenizer whose tokens are PAD, END, MASK if there is one, and each character.

    Args:
        characters: the alphabet.
        mask: the text of MASK; None: there is none.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    symbols = [PAD, END, *([] if mask is None else [mask]), *characters]
    core = Tokenizer(
        models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token=PAD)
    )
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    special = {} if mask is None else {"mask_token": mask}
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=PAD, eos_token=END, unk_token=PAD, **special
    )
