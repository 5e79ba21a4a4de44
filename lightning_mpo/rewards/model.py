"""A reward model of Hugging Face: a sequence classifier that scores a prompt with its response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lightning_mpo.checks import at_least
from lightning_mpo.errors import UserError
from lightning_mpo.policies.loading import load_config, load_tokenizer, load_weights
from lightning_mpo.policies.model_kinds import ModelKind
from lightning_mpo.rewards.base import Completion, Reward

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Classifier(ModelKind):
    """A model that classifies a text."""

    def auto_class(self, config: Any) -> Any:
        import transformers

        return transformers.AutoModelForSequenceClassification


class RewardModel(Reward):
    """The number that a sequence classifier gives a prompt with its response.

    It is loaded at its first call, in the process of the run, and stays on the device of the run.
    Prompt and response are a chat if its tokenizer has a chat template, else one text. Longer texts
    lose their beginning. Weights are read as safetensors, and no code of the model is run.

    Args:
        source: a folder or an id on the hub.
        label: position of the output that is the reward.
        batch_size: responses in one forward pass.
        max_tokens: most tokens of prompt and response together.
        weight: factor of this reward in the sum.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        source: str,
        label: int = 0,
        batch_size: int = 8,
        max_tokens: int = 2048,
        weight: float = 1.0,
    ) -> None:
        super().__init__(weight)
        at_least("RewardModel", 0, most=10_000, label=label)
        at_least("RewardModel", 1, batch_size=batch_size, max_tokens=max_tokens)
        self.source, self.label = source, label
        self.batch_size, self.max_tokens = batch_size, max_tokens
        self._network: PreTrainedModel | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    def check(self, max_new_tokens: int) -> None:
        """Refuse a model that cannot be loaded, or that lacks the output."""
        outputs = int(load_config(self.source, Classifier()).num_labels or 0)
        if self.label >= outputs:
            raise UserError(
                f"`RewardModel.label` is {self.label}, and the model {self.source!r} has "
                f"{outputs} outputs, counted from 0"
            )

    @torch.no_grad()
    def score(self, completions: Sequence[Completion]) -> list[float | None]:
        network, tokenizer = self._loaded()
        scores: list[float | None] = []
        for i in range(0, len(completions), self.batch_size):
            texts = [self._text(c, tokenizer) for c in completions[i : i + self.batch_size]]
            inputs = tokenizer(
                texts,
                return_tensors="pt",
                padding=True,
                truncation=True,
                max_length=self.max_tokens,
                # a template writes the special tokens itself
                add_special_tokens=not tokenizer.chat_template,
            ).to(network.device)
            scores += network(**inputs).logits[:, self.label].float().tolist()
        return scores

    @staticmethod
    def _text(completion: Completion, tokenizer: PreTrainedTokenizerBase) -> str:
        if not tokenizer.chat_template:
            return completion.prompt + completion.text
        messages = [*completion.chat, {"role": "assistant", "content": completion.text}]
        return str(tokenizer.apply_chat_template(messages, tokenize=False))

    def _loaded(self) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        """Return model and tokenizer, which are loaded once."""
        if self._network is not None and self._tokenizer is not None:
            return self._network, self._tokenizer
        kind, cuda = Classifier(), torch.cuda.is_available()
        device = torch.device("cuda", torch.cuda.current_device()) if cuda else torch.device("cpu")
        dtype = torch.bfloat16 if cuda else torch.float32
        tokenizer = load_tokenizer(self.source, kind)
        network: Any = load_weights(self.source, None, dtype, kind)
        network = network.to(device).eval()
        # a batch is padded; the classifier looks for the last token that is no padding
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        network.config.pad_token_id = tokenizer.pad_token_id
        tokenizer.truncation_side = "left"
        self._network, self._tokenizer = network, tokenizer
        return network, tokenizer

    def __getstate__(self) -> dict[str, Any]:
        return vars(self) | {"_network": None, "_tokenizer": None}
