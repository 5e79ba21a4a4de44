"""Prompts as a pure function of (seed, rollout counter, round), so that a resumed run goes on with the right ones."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning as L
import torch
from torch.utils.data import DataLoader

from lightning_mpo.checks import at_least, seeds
from lightning_mpo.errors import UserError
from lightning_mpo.types import Finish, PromptBatch, PromptRow, Rollout

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class Splits:
    """Rows to train on and rows to validate on, which share no prompt."""

    train: Sequence[PromptRow]
    validation: Sequence[PromptRow]


class PromptDataModule(L.LightningDataModule, ABC):
    """Serves prompts; a subclass only says in `load` where the rows come from.

    The tokenizer arrives through `connect`, as it belongs to the policy. There is no training loader here: rollouts
    call `prompts`.

    Args:
        seed: order of the training prompts, and of the split where there is one.
        chat_template: apply the tokenizer's chat template to `instruction + prompt`, once.
        instruction: text before each prompt.
        max_prompt_tokens: a longer prompt is refused, by row.
        validation_prompts: how many rows `validate` takes, the first ones; None: all.
        validation_batch_size: prompts that are sampled together in validation.
    """

    def __init__(
        self,
        seed: int = 0,
        chat_template: bool = True,
        instruction: str = "",
        max_prompt_tokens: int = 512,
        validation_prompts: int | None = None,
        validation_batch_size: int = 32,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        seeds(name, seed=seed)
        at_least(name, 1, max_prompt_tokens=max_prompt_tokens, validation_prompts=validation_prompts)
        at_least(name, 1, validation_batch_size=validation_batch_size)
        self.seed = seed
        self.chat_template = chat_template
        self.instruction = instruction
        self.max_prompt_tokens = max_prompt_tokens
        self.validation_prompts = validation_prompts
        self.validation_batch_size = validation_batch_size
        self._splits: Splits | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    @abstractmethod
    def load(self) -> Splits:
        """Return the rows. Called once per process, before any model is loaded; bad files are refused here."""

    @property
    def splits(self) -> Splits:
        """The loaded rows."""
        if self._splits is None:
            self._splits = self.load()
            if not self._splits.train:
                raise UserError(f"`{type(self).__name__}` found no training rows")
        return self._splits

    @property
    def validation_rows(self) -> Sequence[PromptRow]:
        """The rows that validation takes: the first `validation_prompts` of the split."""
        return self.splits.validation[: self.validation_prompts]

    @property
    def judged(self) -> bool:
        """Whether rows have targets that `predict` can hold completions against."""
        return True

    def setup(self, stage: str | None = None) -> None:
        _ = self.splits

    def connect(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Take the policy's tokenizer, and refuse prompts that are too long for `max_prompt_tokens`."""
        if self.chat_template and not getattr(tokenizer, "chat_template", None):
            raise UserError(
                f"`data.chat_template` is true, but the tokenizer of {tokenizer.name_or_path or 'the policy'!r} has "
                "none; set `data.chat_template: false`"
            )
        self._tokenizer = tokenizer
        frame = len(self._encode_one(PromptRow("", "")))
        for row in [*self.splits.train, *self.splits.validation]:
            if frame + len(row.prompt.encode()) > self.max_prompt_tokens:  # a token is at least a byte
                self._check_length(row, self._encode_one(row))

    def prompts(self, counter: int, count: int, round: int = 0) -> PromptBatch:
        """Return the prompts of rollout `counter`: passes over the shuffled training rows, `count` at a time.

        Round 0 goes through the rows in order; a higher round (redrawn prompts) draws at random. Both depend on
        (seed, counter, round) alone.
        """
        return self.encode(self.training_rows(counter, count, round))

    def training_rows(self, counter: int, count: int, round: int = 0) -> list[PromptRow]:
        """The rows behind `prompts`."""
        rows = self.splits.train
        if round:
            index = torch.randint(len(rows), (count,), generator=seeded_generator(self.seed, counter, round)).tolist()
        else:
            index = [self._position(counter * count + i) for i in range(count)]
        return [rows[i] for i in index]

    def _position(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.splits.train))
        if getattr(self, "_order_epoch", None) != epoch:
            self._order = torch.randperm(len(self.splits.train), generator=seeded_generator(self.seed, epoch)).tolist()
            self._order_epoch = epoch
        return self._order[offset]

    def encode(self, rows: Sequence[PromptRow]) -> PromptBatch:
        """Tokenise prompts and pad them on the left."""
        ids = [self._encode_one(row) for row in rows]
        for row, tokens in zip(rows, ids, strict=True):
            if not tokens:
                raise UserError(
                    f"the prompt {row.prompt[:60]!r} has no tokens; a response needs something to stand behind"
                )
            self._check_length(row, tokens)
        S = max(len(tokens) for tokens in ids)
        input_ids_PS = torch.zeros(len(ids), S, dtype=torch.long)
        attention_mask_PS = torch.zeros(len(ids), S, dtype=torch.bool)
        for i, tokens in enumerate(ids):
            input_ids_PS[i, S - len(tokens) :] = torch.tensor(tokens)
            attention_mask_PS[i, S - len(tokens) :] = True
        return PromptBatch(input_ids_PS, attention_mask_PS, tuple(rows))

    def _check_length(self, row: PromptRow, tokens: list[int]) -> None:
        if len(tokens) > self.max_prompt_tokens:
            raise UserError(
                f"the prompt {row.prompt[:60]!r} has {len(tokens)} tokens, over `data.max_prompt_tokens` "
                f"({self.max_prompt_tokens}); raise it or drop the row"
            )

    def _need_tokenizer(self) -> PreTrainedTokenizerBase:
        if self._tokenizer is None:
            raise UserError(f"`{type(self).__name__}.connect(tokenizer)` must be called before prompts are encoded")
        return self._tokenizer

    def _encode_one(self, row: PromptRow) -> list[int]:
        tokenizer = self._need_tokenizer()
        text = self.instruction + row.prompt
        if not self.chat_template:
            ids = list(tokenizer(text)["input_ids"])
            if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in ids:
                raise UserError(f"the prompt {text[:60]!r} holds characters that the tokenizer does not know")
            return ids
        message = [{"role": "user", "content": text}]
        encoded: Any = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=True)
        return list(encoded["input_ids"])

    def solutions(self, rows: Sequence[PromptRow]) -> Rollout:
        """Return the rows' solutions, closed by the end token, as if they had been sampled."""
        prompts = self.encode(rows)
        tokenizer = self._need_tokenizer()
        ids = []
        for row in rows:
            if row.solution is None:
                raise UserError(
                    f"the row {row.prompt[:60]!r} has no solution to imitate; give the data a solution column"
                )
            ids.append([*tokenizer(row.solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id])
        B, T = len(ids), max(len(tokens) for tokens in ids)
        tokens_BT, mask_BT = torch.zeros(B, T, dtype=torch.long), torch.zeros(B, T, dtype=torch.bool)
        for i, tokens in enumerate(ids):
            tokens_BT[i, : len(tokens)], mask_BT[i, : len(tokens)] = torch.tensor(tokens), True
        return Rollout(
            tokens_BL=torch.cat([prompts.input_ids_PS, tokens_BT], 1),
            attention_mask_BL=torch.cat([prompts.attention_mask_PS, mask_BT], 1),
            response_mask_BT=mask_BT,
            group_B=torch.arange(B),
            behaviour_logprobs_BT=torch.zeros(B, T),
            finish_B=torch.full((B,), int(Finish.STOP)),
            rows=prompts.rows,
        )

    def train_dataloader(self) -> Any:
        """Return the module's own loader, which only has a length; Lightning asks the data module first."""
        if self.trainer is None:
            raise RuntimeError("the training loader exists within a trainer")
        return self.trainer.lightning_module.train_dataloader()

    def val_dataloader(self) -> DataLoader[PromptBatch]:
        """Validation prompts in file order, a `PromptBatch` at a time."""
        rows, size = list(self.validation_rows), self.validation_batch_size
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        return DataLoader(chunks, batch_size=None, collate_fn=self.encode)  # type: ignore[arg-type]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Leave batches alone: prompts are moved by the sampler, micro-batches are on the device already."""
        return batch

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def seeded_generator(*numbers: int) -> torch.Generator:
    """A generator that is a pure function of a few small integers."""
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % (2**63 - 1)
    return torch.Generator().manual_seed(seed)
