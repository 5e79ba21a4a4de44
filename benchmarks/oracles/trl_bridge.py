"""Computes losses and advantages with TRL's own trainers on a tiny model, without a training loop.

Nothing of TRL is rewritten: a trainer is built from its public config, its
`_generate_and_score_completions` is given responses instead of sampling them, and its
`_compute_loss` computes the loss.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from lightning_mpo.policies import TinyPolicy
from lightning_mpo.types import Rollout

MAX_TOKENS = 12  # `max_completion_length` there, `rollout.max_new_tokens` here
CHARACTERS = "0123456789+-*=;, "
VOCABULARY = len(CHARACTERS) + 2
CPU = torch.device("cpu")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep progress bars and advice of libraries off the terminal, and let them look nothing up."""
    loggers = [logging.getLogger(name) for name in ("trl", "transformers", "lightning.pytorch")]
    levels, offline, sink = (
        [logger.level for logger in loggers],
        os.environ.get("HF_HUB_OFFLINE"),
        io.StringIO(),
    )
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    with (
        warnings.catch_warnings(),
        contextlib.redirect_stdout(sink),
        contextlib.redirect_stderr(sink),
    ):
        warnings.simplefilter("ignore")
        yield
    for logger, level in zip(loggers, levels, strict=True):
        logger.setLevel(level)
    if offline is None:
        os.environ.pop("HF_HUB_OFFLINE", None)


def tiny_model(folder: Path, sharp: float = 6.0) -> str:
    """Write a random Llama of hidden size 16 in Hugging Face's format; `sharp` scales its matrices."""
    policy = TinyPolicy(CHARACTERS, hidden_size=16, layers=2, heads=2)
    with torch.random.fork_rng(), quiet():
        torch.manual_seed(0)
        policy.build(device=CPU, reference=False)
        assert policy.network is not None
        with torch.no_grad():
            for weight in policy.network.parameters():
                weight.mul_(sharp if weight.ndim == 2 else 1.0)
        policy.network.save_pretrained(folder)
        policy.tokenizer.save_pretrained(folder)
    return str(folder)


def trainer(folder: str, *, rloo: bool = False, double: bool = True, **options: Any) -> Any:
    """Return a `GRPOTrainer`, or an `RLOOTrainer`, with options of its config, in training mode and without dropout."""
    with torch.random.fork_rng(), quiet():
        from datasets import Dataset
        from transformers import AutoTokenizer
        from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

        settings: dict[str, Any] = {
            "output_dir": folder,
            "max_completion_length": MAX_TOKENS,
            "num_iterations": 2,  # so that it scores old log-probs
            "beta": 0.0,
            "use_cpu": True,
            "bf16": False,
            "model_init_kwargs": {"dtype": "float32"},
            "report_to": "none",
            "save_strategy": "no",
            "disable_tqdm": True,
        }
        group = options.setdefault("num_generations", 2)
        options.setdefault("per_device_train_batch_size", group)
        made = (RLOOTrainer if rloo else GRPOTrainer)(
            model=folder,
            reward_funcs=lambda **_: [0.0],
            args=(RLOOConfig if rloo else GRPOConfig)(**settings | options),
            train_dataset=Dataset.from_list([{"prompt": "1+1="}] * 2),
            processing_class=AutoTokenizer.from_pretrained(folder),
        )
    made.current_gradient_accumulation_steps = (
        made.args.gradient_accumulation_steps
    )  # the training loop sets it
    for model in (made.model, getattr(made, "ref_model", None)):
        if model is not None and double:
            model.double()
    made.model.train()
    return made


def loss_of_table(trainer: Any, inputs: dict[str, Tensor], logits_BTV: Tensor) -> Tensor:
    """Return TRL's loss where log-probs and entropies are those of a table of logits."""
    logprobs_BTV = logits_BTV.log_softmax(-1)
    logprobs_BT = logprobs_BTV.gather(2, inputs["completion_ids"][..., None])[..., 0]
    entropy_BT = -(logprobs_BTV.exp() * logprobs_BTV).sum(-1)
    scored_BT = inputs["completion_mask"].bool()  # what TRL does not score is 0 there, too
    scores = (
        torch.where(scored_BT, logprobs_BT, 0.0),
        torch.where(scored_BT, entropy_BT, 0.0),
        None,
    )
    trainer._get_per_token_logps_and_entropies = lambda *_, **__: scores
    loss: Tensor = trainer._compute_loss(trainer.model, inputs)
    return loss


def pairs_loss(logprobs_BT: Tensor, reference_BT: Tensor, mask_BT: Tensor, beta: float) -> Tensor:
    """Return the loss of TRL's `DPOTrainer` on log-probs of tokens.

    Args:
        logprobs_BT: of the policy; first the better responses, then the worse ones in the same order.
        reference_BT: the same under the reference.
        mask_BT: tokens of responses.
        beta: its `beta`.
    """
    with quiet():
        from trl import DPOTrainer

    B = len(logprobs_BT)
    summed = (reference_BT * mask_BT).sum(1).chunk(2)
    zeros_BT = torch.zeros_like(logprobs_BT)
    outputs = SimpleNamespace(
        log_probs=logprobs_BT * mask_BT, entropy=zeros_BT, mean_logits=zeros_BT, is_top1=mask_BT
    )
    accelerator = SimpleNamespace(
        device=CPU, gather=lambda values: values, gather_for_metrics=lambda values: values
    )
    options = {
        "ld_alpha": None,
        "precompute_ref_logps": True,
        "f_divergence_type": "reverse_kl",
        "loss_types": ["sigmoid"],
        "loss_weights": [1.0],
        "use_weighting": False,
        "aux_loss_enabled": False,
        "beta": beta,
    }
    state = {"_metrics": {"train": defaultdict(list)}, "_total_train_tokens": 0, "_tp_size": 1}
    made: Any = SimpleNamespace(
        model=SimpleNamespace(training=True), accelerator=accelerator, **options, **state
    )
    # a token of a prompt stands before each response
    inputs = {
        "input_ids": torch.zeros(B, mask_BT.shape[1] + 1, dtype=torch.long),
        "attention_mask": torch.ones(B, mask_BT.shape[1] + 1, dtype=torch.long),
        "completion_mask": torch.nn.functional.pad(mask_BT, (1, 0)),
        "ref_chosen_logps": summed[0],
        "ref_rejected_logps": summed[1],
    }
    loss: Tensor = DPOTrainer._compute_loss(made, lambda **_: outputs, inputs, False)
    return loss


def score_completions(
    trainer: Any, rollout: Rollout, rewards: Sequence[float | None]
) -> dict[str, Tensor]:
    """Return what TRL makes of responses and rewards: masks, advantages, old and reference log-probs."""
    S, mask = rollout.prompt_length, rollout.attention_mask_BL
    prompts = [
        ids[m].tolist() for ids, m in zip(rollout.tokens_BL[:, :S], mask[:, :S], strict=True)
    ]
    answers = [
        ids[m].tolist()
        for ids, m in zip(rollout.responses_BT, rollout.response_mask_BT, strict=True)
    ]
    texts = [""] * len(answers)
    short = "RLOO" in type(trainer).__name__
    generated = (
        (prompts, answers, texts)
        if short
        else (prompts, answers, None, texts, None, {}, None, None)
    )
    trainer._generate = lambda *_: generated
    trainer.reward_funcs = [lambda **_: list(rewards)]
    with quiet():
        inputs: dict[str, Tensor] = trainer._generate_and_score_completions(
            [{"prompt": ""} for _ in texts]
        )
    return inputs
