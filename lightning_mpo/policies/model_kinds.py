"""The kinds of language models, each with the class of transformers that loads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PretrainedConfig

MASKED_CLASSES = ("AutoModelForMaskedLM", "AutoModelForCausalLM", "AutoModel")
"""Classes under which repositories with code of their own list a masked language model."""


@dataclass(frozen=True)
class ModelKind:
    """A causal or a masked language model, of transformers or with code of its own.

    Args:
        masked: whether the model predicts hidden tokens from both sides.
        remote_code: whether code of the model's repository may run.
    """

    masked: bool = False
    remote_code: bool = False

    def auto_class(self, config: PretrainedConfig) -> Any:
        """Return the class of transformers that loads a model of this kind.

        A masked model is of the masked class if its family has one. Otherwise it is of the causal
        class, and runs with full attention. Code of a repository names its class itself.

        Args:
            config: of the model.
        """
        import transformers

        if not self.masked:
            return transformers.AutoModelForCausalLM
        listed = getattr(config, "auto_map", None) if self.remote_code else None
        for name in MASKED_CLASSES:
            if name in (listed or ()):
                return getattr(transformers, name)
        if self.masked_family(config):
            return transformers.AutoModelForMaskedLM
        return transformers.AutoModelForCausalLM

    @staticmethod
    def masked_family(config: PretrainedConfig) -> bool:
        """Return whether transformers has a masked language model of this family."""
        import transformers

        return type(config) in transformers.MODEL_FOR_MASKED_LM_MAPPING

    def foreign(self, config: PretrainedConfig) -> bool:
        """Return whether code of the model's repository defines its network."""
        return self.remote_code and bool(getattr(config, "auto_map", None))


CAUSAL = ModelKind()
