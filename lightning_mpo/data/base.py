"""The base of data modules: prompts are a pure function of (seed, rollout counter, round).

A resumed run therefore gets the same prompts.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from lightning_mpo.checks import at_least, one_of, seeds
from lightning_mpo.data.batching import prompt_batch
from lightning_mpo.data.curriculum import Curriculum
from lightning_mpo.data.encoding import no_template
from lightning_mpo.data.identity import (
    IDENTIFYING,
    describe_curriculum,
    describe_rows,
    digest_of,
)
from lightning_mpo.data.loaders import PromptLoaders
from lightning_mpo.data.order import TrainingOrder
from lightning_mpo.data.overlong import Overlong, each_row, fit_prompts
from lightning_mpo.data.rendering import Renderer
from lightning_mpo.data.solutions import SolutionEncoder, check_positions, rollout_of
from lightning_mpo.data.suspicions import (
    allow_rendered_prompts,
    warn_of_closed_turn,
    warn_of_contradictions,
    warn_of_control_tokens,
    warn_of_leaks,
)
from lightning_mpo.errors import UserError
from lightning_mpo.types import PromptBatch, PromptRow, Rollout, Splits

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")


class PromptDataModule(PromptLoaders):
    """Serves prompts. A subclass implements `load`, which returns the rows.

    The tokenizer arrives through `connect`, as it belongs to the policy. There is no training
    loader here: rollouts call `prompts`.

    Args:
        seed: seed of the order of the training prompts.
        chat_template: apply the tokenizer's chat template to each row, once.
        instruction: text before each prompt; in a chat, before the last message.
        max_prompt_tokens: longest prompt.
        validation_prompts: number of rows that `validate` takes, the first ones; None: all.
        validation_batch_size: prompts that are sampled together in validation.
        system: system message of the chat template, for rows that have none; None: none.
        suffix: text after each prompt; in a chat, after the last message.
        template_arguments: variables of the chat template, such as `{enable_thinking: false}`.
        control_tokens: encoding of control tokens in prompts, such as `<|im_end|>`. False: as
            ordinary text. True: as control tokens, for prompts that are already rendered. None: as
            text, unless there is no chat template and all prompts begin with the token that begins
            a prompt.
        overlong: a prompt over `max_prompt_tokens` is refused. Or, with a warning, its row is
            skipped, or the prompt is cut to its end.
        order: training rows are shuffled anew in each pass, or taken in the order of the file.
        curriculum: draws the rows of each rollout by weights instead; None: passes over all rows.

    Raises:
        UserError: an option is out of range, or `order` and `curriculum` contradict each other.
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
        overlong: Overlong = "refuse",
        order: Literal["shuffled", "file"] = "shuffled",
        curriculum: Curriculum | None = None,
    ) -> None:
        super().__init__()
        # options
        name = type(self).__name__
        seeds(name, seed=seed)
        at_least(
            name, 1, max_prompt_tokens=max_prompt_tokens, validation_prompts=validation_prompts
        )
        at_least(name, 1, validation_batch_size=validation_batch_size)
        one_of(name, ("refuse", "skip", "cut"), overlong=overlong)
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
        self.order, self.curriculum = order, curriculum
        # rows, and the parts that `connect` makes, with the tokens of the longest prompt
        self.longest_prompt = 0
        self.shots: Sequence[PromptRow] = ()
        """Examples before each prompt, with their solutions; `load` may set them."""
        self._splits: Splits | None = None
        self._loaded: Splits | None = None
        self._renderer: Renderer | None = None
        self._solutions: SolutionEncoder | None = None
        self._digest: str | None = None
        self._training_order = TrainingOrder(seed, order, curriculum)

    searches_ngrams: bool = True
    """Whether validation prompts are compared with training rows by runs of words."""

    @abstractmethod
    def load(self) -> Splits:
        """Return the rows, and refuse bad files.

        It runs once per process, before a model is loaded.
        """

    @property
    def splits(self) -> Splits:
        """The loaded rows; after `connect` without rows that `overlong` skips."""
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
            warn_of_leaks(splits.train, self.validation_rows, ngrams=self.searches_ngrams)
            self.order_metrics(0)  # refuses rows that do not fit a curriculum

    def connect(
        self, tokenizer: PreTrainedTokenizerBase, end_tokens: Sequence[int] | None = None
    ) -> None:
        """Take the policy's tokenizer, and render the rows with it once.

        Args:
            tokenizer: of the policy.
            end_tokens: ids that end a response; None: the tokenizer's end of sequence.

        Raises:
            UserError: a row cannot be rendered or encoded, or its prompt is longer than
                `max_prompt_tokens`.
        """
        # tokens that end a response
        if end_tokens is None:
            end_tokens = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        # render each row once, also if both splits hold it
        rows = each_row(self.splits)
        renderer = self._make_renderer(tokenizer, rows)
        renderer.try_template(rows)
        # leave out or cut prompts over the limit
        fitted = fit_prompts(renderer, self.splits, self.max_prompt_tokens, self.overlong)
        if self._renderer is None:
            rank_zero_info(f"data       {type(self).__name__}: {fitted.line}")
        self._splits, self.longest_prompt = fitted.splits, fitted.longest
        self._renderer, self._solutions = renderer, SolutionEncoder(renderer, end_tokens)
        shortest = min(fitted.splits.train, key=lambda row: len(row.prompt))
        warn_of_closed_turn(renderer, shortest, end_tokens)

    def _make_renderer(
        self, tokenizer: PreTrainedTokenizerBase, rows: Sequence[PromptRow]
    ) -> Renderer:
        """Return the renderer, and warn if rows contain control tokens."""
        chat = next((row for row in rows if row.messages), None)
        if chat and not (self.chat_template and tokenizer.chat_template):
            raise no_template(tokenizer, chat)
        renderer = Renderer(
            tokenizer,
            chat_template=self.chat_template,
            instruction=self.instruction,
            suffix=self.suffix,
            system=self.system,
            template_arguments=self.template_arguments,
            control_tokens=bool(self.control_tokens),
            shots=self.shots,
        )
        undecided = self.control_tokens is None and not self.chat_template
        if undecided and allow_rendered_prompts(renderer, rows):
            return renderer
        if not self.control_tokens:
            warn_of_control_tokens(renderer, rows)
        return renderer

    def check_response(self, max_new_tokens: int) -> None:
        """Refuse a length of responses into which no right answer fits.

        Called before a model is loaded.

        Args:
            max_new_tokens: longest response, tokens.

        Raises:
            UserError: each right answer is longer.
        """

    def identity(self) -> dict[str, Any]:
        """Return a description of the rows, their order and their rendering, to compare runs.

        It needs no tokenizer. It holds the class, the numbers of rows, a digest of all rows, their
        order, and the options of their rendering.
        """
        loaded = self._loaded or self.splits
        if self._digest is None:
            self._digest = digest_of(Splits([*self.shots, *loaded.train], loaded.validation))
        options = {name: getattr(self, name) for name in IDENTIFYING}
        options["curriculum"] = describe_curriculum(self.curriculum)
        return describe_rows(type(self).__name__, loaded, self._digest) | options

    def prompts(self, counter: int, count: int, round: int = 0) -> PromptBatch:
        """Return the prompts of rollout `counter`: the next `count` rows of the training split.

        Round 0 goes through the rows in order; a higher round (redrawn prompts) draws at random.
        Both depend on (seed, counter, round) alone; with a `curriculum` also on its state.
        """
        return self.encode(self.training_rows(counter, count, round))

    def training_rows(self, counter: int, count: int, round: int = 0) -> list[PromptRow]:
        """Return the rows of `prompts`."""
        rows = self.splits.train
        return [rows[i] for i in self._training_order.indices(rows, counter, count, round)]

    @property
    def learner(self) -> Callable[[int, Tensor], None] | None:
        """The function that takes results of rollouts, for a curriculum that learns; else None."""
        learns = self.curriculum is not None and self.curriculum.learns
        return partial(self._training_order.learn, self.splits.train) if learns else None

    def order_metrics(self, counter: int) -> dict[str, float]:
        """Return the metrics of the curriculum before rollout `counter`; without one, none."""
        return self._training_order.metrics(self.splits.train, counter)

    def encode(self, rows: Sequence[PromptRow]) -> PromptBatch:
        """Tokenise prompts and pad them on the left.

        Raises:
            UserError: `connect` was not called, or a prompt is empty, too long or cannot be
                rendered.
        """
        return prompt_batch(self._connected(self._renderer), rows, self.max_prompt_tokens)

    def _connected(self, part: T | None) -> T:
        """Return a part that `connect` makes."""
        if part is None:
            raise UserError(
                f"`{type(self).__name__}.connect(tokenizer)` must be called before prompts are "
                "encoded"
            )
        return part

    def check_solutions(self, positions: int | None = None, canvas: int | None = None) -> None:
        """Encode all solutions once, so that mistakes end the run before training.

        Args:
            positions: tokens that the model can read; None: no limit.
            canvas: tokens of each solution, as for `solutions`.

        Raises:
            UserError: a row has no solution. A solution cannot be encoded, holds an end token, is too
                long for the canvas, or with its prompt too long for the model.
        """
        solutions = self._connected(self._solutions)
        for rows in (self.splits.train, self.validation_rows):
            encoded = solutions.encode(rows, canvas)
            if positions is not None:
                room = positions - self.longest_prompt
                check_positions(rows, encoded, room, positions, self.encode)

    def solutions(self, rows: Sequence[PromptRow], canvas: int | None = None) -> Rollout:
        """Return solutions as sampled responses; end tokens that fill a canvas are part of them."""
        return rollout_of(self.encode(rows), self._connected(self._solutions).encode(rows, canvas))
