"""Folders with small masked language models of several families, and one with code of its own."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import torch

from lightning_mpo.policies.tiny import character_tokenizer
from tests.support.builders import CHARACTERS
from tests.support.masked import sharpen

SIZES = {
    "vocab_size": len(CHARACTERS) + 3,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 1,
}
FAMILIES = ["bert", "modernbert", "esm", "roberta", "llama"]
FOREIGN = """
import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import MaskedLMOutput


class ForeignConfig(PretrainedConfig):
    model_type = "foreign"


class ForeignModel(PreTrainedModel):
    config_class = ForeignConfig

    def __init__(self, config):
        super().__init__(config)
        D, V = config.hidden_size, config.vocab_size
        self.embed = nn.Embedding(V, D)
        self.query, self.value = nn.Linear(D, D), nn.Linear(D, D)
        self.norm = nn.LayerNorm(D)
        self.head = nn.Linear(D, V, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.embed

    def get_output_embeddings(self):
        return self.head

    def forward(self, input_ids, attention_mask=None):
        hidden = self.embed(input_ids)
        place = torch.arange(input_ids.shape[1], device=input_ids.device)
        logits = self.query(hidden) @ hidden.mT / 8 - 0.3 * (place[:, None] - place).abs()
        if self.config.takes == "causal":
            logits = logits.masked_fill(place[:, None] < place, -1e9)
        elif self.config.takes == "keys" and attention_mask is not None:
            assert attention_mask.ndim == 2
            logits = logits.masked_fill(attention_mask[:, None] == 0, -1e9)
        elif self.config.takes == "pairs" and attention_mask is not None:
            assert attention_mask.ndim == 4
            logits = logits.masked_fill(~attention_mask[:, 0], -1e9)
        hidden = self.norm(hidden + logits.softmax(-1) @ self.value(hidden))
        return MaskedLMOutput(logits=self.head(hidden))
"""


def write_family(family: str, folder: Path) -> None:
    """Write a model with random weights, its tokenizer and its configuration, dropouts included."""
    import transformers as hf

    makers: dict[str, Any] = {
        "bert": (hf.BertForMaskedLM, hf.BertConfig, {}),
        "modernbert": (
            hf.ModernBertForMaskedLM,
            hf.ModernBertConfig,
            {
                "cls_token_id": 1,
                "sep_token_id": 1,
                "num_hidden_layers": 3,
                "global_attn_every_n_layers": 3,
                "local_attention": 8,
                "embedding_dropout": 0.1,
                "mlp_dropout": 0.1,
            },
        ),
        "esm": (
            hf.EsmForMaskedLM,
            hf.EsmConfig,
            {"mask_token_id": 2, "position_embedding_type": "rotary", "token_dropout": True},
        ),
        "roberta": (hf.RobertaForMaskedLM, hf.RobertaConfig, {}),
        "llama": (hf.LlamaForCausalLM, hf.LlamaConfig, {}),
    }
    network_class, config_class, options = makers[family]
    torch.manual_seed(0)
    network = sharpen(network_class(config_class(**SIZES | options)), 4.0)
    network.save_pretrained(folder)
    character_tokenizer(CHARACTERS, "<mask>").save_pretrained(folder)


def write_foreign(takes: str, folder: Path) -> None:
    """Write a model whose code is in its folder, and which takes one form of attention masks."""
    from safetensors.torch import save_file

    folder.mkdir()
    code = folder / "modeling_foreign.py"
    code.write_text(FOREIGN)
    spec: Any = importlib.util.spec_from_file_location(f"foreign_{takes}", code)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    # configuration and weights
    classes = {"AutoConfig": "ForeignConfig", "AutoModel": "ForeignModel"}
    auto_map = {name: f"modeling_foreign.{value}" for name, value in classes.items()}
    sizes = {name: SIZES[name] for name in ("vocab_size", "hidden_size", "eos_token_id")}
    content = {"model_type": "foreign", "takes": takes, "auto_map": auto_map} | sizes
    (folder / "config.json").write_text(json.dumps(content))
    torch.manual_seed(0)
    network = sharpen(module.ForeignModel(module.ForeignConfig(takes=takes, **sizes)), 2.0)
    weights = {name: value.contiguous() for name, value in network.state_dict().items()}
    save_file(weights, str(folder / "model.safetensors"), metadata={"format": "pt"})
    character_tokenizer(CHARACTERS, "<mask>").save_pretrained(folder)
