"""Prompts as a pure function of (seed, rollout counter, round), so that a resumed run gets the same ones."""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader

from lightning_mpo.checks import at_least, one_of, seeds
from lightning_mpo.data.rendering import HUGE, Renderer, describe, no_template
from lightning_mpo.data.tables import contradictions, shared_prompts
from lightning_mpo.errors import UserError
from lightning_mpo.seeding import Stream, generator_of
from lightning_mpo.types import Finish, PromptBatch, PromptRow, Rollout, Splits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class PromptDataModule(L.LightningDataModule, ABC):
    """Serves prompts; a subclass only says in `load` where the rows come from.

    The tokenizer arrives through `connect`, as it belongs to the policy. There is no training loader here: rollouts
    call `prompts`.

    Args:
        seed: seed of the order of the training prompts.
        chat_template: apply the tokenizer's chat template to each row, once.
        instruction: text before each prompt; in a chat, before the last message.
        max_prompt_tokens: longest prompt.
        validation_prompts: how many rows `validate` takes, the first ones; None: all.
        validation_batch_size: prompts that are sampled together in validation.
        system: system message of the chat template, for rows that have none; None: none.
        suffix: text after each prompt; in a chat, after the last message.
        template_arguments: variables of the chat template, such as `{enable_thinking: false}`.
        control_tokens: how control tokens in prompts, such as `<|im_end|>`, are encoded. False: as ordinary text. True: as
            control tokens, for prompts that are already rendered. None: as text, unless there is no chat template and all
            prompts begin with the token that begins a prompt.
        overlong: a prompt over `max_prompt_tokens` is refused, or its row is skipped with a warning.
        order: training rows are shuffled anew in each pass, or taken in the order of the file.

    Raises:
        UserError: an option is out of range.
    """

    def __init__(
        self,
        seed: int = 0,
        chat_template: bool = True,
        instruction: str = "",
        max_prompt_tokens: int = 512,
        validation_prompts: int | None = None,
        validation_batch_size: int = 32,
        system: str | None = None,
        suffix: str = "",
        template_arguments: dict[str, Any] | None = None,
        control_tokens: bool | None = None,
        overlong: Literal["refuse", "skip"] = "refuse",
        order: Literal["shuffled", "file"] = "shuffled",
    ) -> None:
        super().__init__()
        name = type(self).__name__
        seeds(name, seed=seed)
        at_least(
            name, 1, max_prompt_tokens=max_prompt_tokens, validation_prompts=validation_prompts
        )
        at_least(name, 1, validation_batch_size=validation_batch_size)
        one_of(name, ("refuse", "skip"), overlong=overlong)
        one_of(name, ("shuffled", "file"), order=order)
        self.seed = seed
        self.chat_template = chat_template
        self.instruction = instruction
        self.max_prompt_tokens = max_prompt_tokens
        self.validation_prompts = validation_prompts
        self.validation_batch_size = validation_batch_size
        self.system = system or ""
        self.suffix = suffix
        self.template_arguments = dict(template_arguments or {})
        self.control_tokens = control_tokens
        self.overlong = overlong
        self.order = order
        self.longest_prompt = 0
        """Tokens of the longest prompt, from `connect` on."""
        self._splits: Splits | None = None
        self._loaded: Splits | None = None
        self._renderer: Renderer | None = None
        self._end_tokens: list[int] = []
        self._digest: str | None = None
        self._order: list[int] = []
        self._order_of: tuple[int, int] | None = None

    @abstractmethod
    def load(self) -> Splits:
        """Return the rows. It runs once per process, before a model is loaded, and refuses bad files."""

    @property
    def splits(self) -> Splits:
        """The loaded rows; from `connect` on without those that `overlong` skips."""
        if self._splits is None:
            self._splits = self._loaded = self.load()
            if not self._splits.train:
                raise UserError(f"`{type(self).__name__}` found no training rows")
            warn_of_contradictions([*self._splits.train, *self._splits.validation])
        return self._splits

    @property
    def validation_rows(self) -> Sequence[PromptRow]:
        """The rows that validation takes: the first `validation_prompts` of the split."""
        return self.splits.validation[: self.validation_prompts]

    @property
    def judged(self) -> bool:
        """Whether rows have targets, so that `predict` can judge completions."""
        return True

    def setup(self, stage: str | None = None) -> None:
        splits = self.splits
        if stage == "fit":
            warn_of_leaks(splits)

    def connect(
        self, tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int] | None = None
    ) -> None:
        """Take the policy's tokenizer, and render the rows with it once.

        Args:
            tokenizer: of the policy.
            end_tokens: ids that end a response; None: the tokenizer's end of sequence.

        Raises:
            UserError: a row cannot be rendered or encoded, or its prompt is longer than `max_prompt_tokens`.
        """
        eos = tokenizer.eos_token_id
        self._end_tokens = list(
            end_tokens if end_tokens is not None else [] if eos is None else [eos]
        )
        rows = list(
            {id(row): row for row in [*self.splits.train, *self.splits.validation]}.values()
        )
        renderer = self._make_renderer(tokenizer, rows)
        renderer.try_template(rows)
        lengths = self._lengths(renderer, rows)
        self._renderer = renderer
        self._warn_of_a_closed_turn(renderer, min(rows, key=lambda row: len(row.prompt)))
        self._skip({i for i, length in lengths.items() if length > self.max_prompt_tokens})
        self.longest_prompt = max(
            (n for n in lengths.values() if n <= self.max_prompt_tokens), default=0
        )

    def _make_renderer(
        self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow]
    ) -> Renderer:
        """Return the renderer, and warn if rows contain control tokens."""
        options = ("chat_template", "instruction", "suffix", "system", "template_arguments")
        chat = next((row for row in rows if row.messages), None)
        if chat and not (self.chat_template and tokenizer.chat_template):
            raise no_template(tokenizer, chat)
        renderer = Renderer(tokenizer, **{name: getattr(self, name) for name in options})
        renderer.control_tokens = bool(self.control_tokens)
        rendered = (
            None
            if self.chat_template or self.control_tokens is not None
            else renderer.rendered_already(rows)
        )
        if rendered is not None:
            renderer.control_tokens = True
            rank_zero_warn(
                f"all prompts begin with {rendered!r}, so they seem to be rendered already: their control tokens are "
                "encoded as control tokens; set `data.control_tokens: false` to encode them as text, or `true` to accept this"
            )
        elif not renderer.control_tokens:
            writing = [row for row in rows if renderer.written_control_token(row)]
            if writing:
                rank_zero_warn(
                    f"{len(writing)} of {len(rows)} prompts contain control tokens, such as "
                    f"{renderer.written_control_token(writing[0])!r} in {describe(writing[0])}, which are encoded as "
                    "text; set `data.control_tokens: true` if they are meant as control tokens"
                )
        return renderer

    def _lengths(self, renderer: Renderer, rows: Sequence[PromptRow]) -> dict[int, int]:
        """Return the tokens of the prompts that may be the longest, by the row's `id`.

        Raises:
            UserError: a prompt is empty or longer than it may be, or cannot be encoded.
        """
        counts = renderer.count_tokens(rows, self.max_prompt_tokens)
        frames: dict[tuple[str, ...], int] = {}
        for row, count in zip(rows, counts, strict=True):
            if (shape := renderer.shape(row)) not in frames and count <= self.max_prompt_tokens:
                frames[shape] = len(renderer.encode(row)) - count
        totals = [
            count + frames.get(renderer.shape(row), 0)
            for row, count in zip(rows, counts, strict=True)
        ]
        longest = set(sorted(range(len(rows)), key=lambda i: totals[i])[-3:])
        lengths: dict[int, int] = {}
        for i, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if count >= HUGE:
                lengths[id(row)] = count
            elif (
                i in longest
                or not count
                or totals[i] + 8 * (len(row.messages) + 2) > self.max_prompt_tokens
            ):
                lengths[id(row)] = len(self._check_tokens(row, renderer.encode(row)))
            if self.overlong == "refuse" and lengths.get(id(row), 0) > self.max_prompt_tokens:
                raise UserError(self._too_long(row, lengths[id(row)]))
        return lengths

    def _warn_of_a_closed_turn(self, renderer: Renderer, row: PromptRow) -> None:
        last = self._check_tokens(row, renderer.encode(row))[-1]
        if last in self._end_tokens:
            text = renderer.tokenizer.convert_ids_to_tokens(last)
            rank_zero_warn(
                f"prompts end with {text!r}, a token that ends a response, such as {describe(row)}: responses would "
                "begin after an end; the chat template should open the assistant's turn (`add_generation_prompt`)"
            )

    def _skip(self, overlong: set[int]) -> None:
        """Remove rows, given by their `id`, with a warning."""
        if not overlong:
            return
        parts = self.splits.train, self.splits.validation
        rows = list({id(row): row for part in parts for row in part}.values())
        kept = [[row for row in part if id(row) not in overlong] for part in parts]
        first = next(row for row in rows if id(row) in overlong)
        sentence = f"{len(overlong)} of {len(rows)} rows are longer than `data.max_prompt_tokens` ({self.max_prompt_tokens})"
        if not kept[0]:
            raise UserError(f"{sentence}, and none is left to train on; raise it")
        rank_zero_warn(f"{sentence} and are skipped; the first is {describe(first)}")
        self._splits = Splits(*kept)

    def identity(self) -> dict[str, Any]:
        """Return a description of the rows, their order and their rendering, to compare runs. It needs no tokenizer.

        Returns:
            The class, the numbers of rows, a digest of them all, their order, and the options of the rendering.
        """
        _ = self.splits
        loaded = self._loaded or self.splits
        if self._digest is None:
            digest = hashlib.sha256()
            for part in (loaded.train, loaded.validation):
                for row in part:
                    messages = [dict(message) for message in row.messages]
                    content = [
                        row.prompt,
                        row.target,
                        row.solution,
                        messages,
                        dict(row.extra),
                    ]  # rewards read columns
                    digest.update(json.dumps(content, default=str).encode() + b"\n")
                digest.update(b"\n")
            self._digest = digest.hexdigest()[:16]
        options = (
            *("seed", "order", "overlong", "max_prompt_tokens", "validation_prompts"),
            *(
                "chat_template",
                "instruction",
                "suffix",
                "system",
                "template_arguments",
                "control_tokens",
            ),
        )
        return {
            "data": type(self).__name__,
            "rows": {"train": len(loaded.train), "validation": len(loaded.validation)},
            "digest": self._digest,
            **{name: getattr(self, name) for name in options},
        }

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
            index = torch.randint(
                len(rows),
                (count,),
                generator=generator_of(self.seed, Stream.REDRAW, counter, round),
            ).tolist()
        else:
            index = [self._position(counter * count + i) for i in range(count)]
        return [rows[i] for i in index]

    def _position(self, position: int) -> int:
        epoch, offset = divmod(position, len(self.splits.train))
        if self.order == "file":
            return offset
        if self._order_of != (epoch, len(self.splits.train)):
            self._order = torch.randperm(
                len(self.splits.train), generator=generator_of(self.seed, Stream.SHUFFLE, epoch)
            ).tolist()
            self._order_of = epoch, len(self.splits.train)
        return self._order[offset]

    def encode(self, rows: Sequence[PromptRow]) -> PromptBatch:
        """Tokenise prompts and pad them on the left.

        Raises:
            UserError: `connect` was not called, or a prompt is empty, too long or cannot be rendered.
        """
        renderer = self._need_renderer()
        ids = [self._check_tokens(row, renderer.encode(row)) for row in rows]
        for row, tokens in zip(rows, ids, strict=True):
            if len(tokens) > self.max_prompt_tokens:
                raise UserError(self._too_long(row, len(tokens)))
        S = max(len(tokens) for tokens in ids)
        input_ids_PS = torch.zeros(len(ids), S, dtype=torch.long)
        attention_mask_PS = torch.zeros(len(ids), S, dtype=torch.bool)
        for i, tokens in enumerate(ids):
            input_ids_PS[i, S - len(tokens) :] = torch.tensor(tokens)
            attention_mask_PS[i, S - len(tokens) :] = True
        thinking = [renderer.thinks(tokens) for tokens in ids]
        encoded = [
            replace(row, thinking=True) if thinks else row
            for row, thinks in zip(rows, thinking, strict=True)
        ]
        return PromptBatch(input_ids_PS, attention_mask_PS, tuple(encoded))

    @staticmethod
    def _check_tokens(row: PromptRow, tokens: list[int]) -> list[int]:
        if not tokens:
            raise UserError(f"{describe(row)} has no tokens; write a prompt, or take the row out")
        return tokens

    def _too_long(self, row: PromptRow, length: int) -> str:
        tokens = f"{len(row.prompt)} characters" if length >= HUGE else f"{length} tokens"
        return (
            f"{describe(row)} has {tokens}, over `data.max_prompt_tokens` ({self.max_prompt_tokens}); raise it, "
            "drop the row, or set `data.overlong: skip`"
        )

    def _need_renderer(self) -> Renderer:
        if self._renderer is None:
            raise UserError(
                f"`{type(self).__name__}.connect(tokenizer)` must be called before prompts are encoded"
            )
        return self._renderer

    def check_solutions(self, positions: int | None = None) -> None:
        """Try all solutions, once, before any is imitated.

        Args:
            positions: tokens that the model has places for; None: no limit.

        Raises:
            UserError: a row has no solution, or one that cannot be encoded, that an end token ends early, or that is
                too long for the model together with its prompt.
        """
        for rows in (self.splits.train, self.validation_rows):
            solutions = self._need_renderer().encode_solutions(rows, self._end_tokens)
            for row, solution in zip(rows, solutions, strict=True):
                if positions is None or self.longest_prompt + len(solution) <= positions:
                    continue
                prompt = int(self.encode([row]).attention_mask_PS.sum())
                if prompt + len(solution) > positions:
                    raise UserError(
                        f"{describe(row)} has {prompt} tokens and its solution {len(solution)}, together more than the "
                        f"model's {positions} positions: shorten or drop the row"
                    )

    def solutions(self, rows: Sequence[PromptRow]) -> Rollout:
        """Return the rows' solutions, closed by the token that ends a response, as if they had been sampled."""
        prompts, renderer = self.encode(rows), self._need_renderer()
        ids = renderer.encode_solutions(rows, self._end_tokens)
        B, T = len(ids), max(len(tokens) for tokens in ids)
        tokens_BT, mask_BT = (
            torch.zeros(B, T, dtype=torch.long),
            torch.zeros(B, T, dtype=torch.bool),
        )
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
        """Return the loader of the LightningModule, which only has a length; Lightning calls the data module first."""
        if self.trainer is None:
            raise RuntimeError("the training loader exists within a trainer")
        return self.trainer.lightning_module.train_dataloader()

    def val_dataloader(self) -> DataLoader[PromptBatch]:
        """Validation prompts in file order, a `PromptBatch` at a time."""
        rows, size = list(self.validation_rows), self.validation_batch_size
        chunks = [rows[i : i + size] for i in range(0, len(rows), size)]
        return DataLoader(chunks, batch_size=None, collate_fn=self.encode)  # type: ignore[arg-type]

    def transfer_batch_to_device(
        self, batch: Any, device: torch.device, dataloader_idx: int
    ) -> Any:
        """Leave batches alone: prompts are moved by the sampler, micro-batches are on the device already."""
        return batch

    test_dataloader = val_dataloader
    predict_dataloader = val_dataloader


def warn_of_leaks(splits: Splits) -> None:
    """Warn of prompts that are trained on and validated on, which a `load` of one's own may return."""
    shared = shared_prompts(splits.train, splits.validation)
    if shared:
        rank_zero_warn(
            f"{len(shared)} of {len(splits.validation)} validation prompts are trained on as well, such as "
            f"{describe(shared[0])}: validation measures memory; split rows by `split_rows` of `lightning_mpo.data.tables`"
        )


def warn_of_contradictions(rows: Sequence[PromptRow]) -> None:
    """Warn of prompts that stand in several rows with different targets: no answer is right for all of them."""
    pairs = contradictions(rows)
    if pairs:
        first, other = pairs[0]
        places = f" ({first.where}, {other.where})" if first.where else ""
        rank_zero_warn(
            f"{len(pairs)} prompts have rows with different targets, such as {first.prompt[:60]!r} with "
            f"{first.target[:30]!r} and {other.target[:30]!r}{places}: no answer is right for all rows of one"
        )
