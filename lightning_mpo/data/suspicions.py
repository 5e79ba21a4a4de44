"""Warnings of rows that can be used but are probably a mistake."""

from __future__ import annotations

from collections.abc import Sequence

from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lightning_mpo.data.contamination import WORDS, shared_runs
from lightning_mpo.data.lengths import encode_checked
from lightning_mpo.data.rendering import Renderer
from lightning_mpo.data.rows import describe
from lightning_mpo.data.tables import contradictions, shared_prompts
from lightning_mpo.types import PromptRow


def warn_of_leaks(
    train: Sequence[PromptRow], validation: Sequence[PromptRow], *, ngrams: bool = True
) -> None:
    """Warn of validation prompts that are trained on, as a whole or in long parts.

    Args:
        train: training rows.
        validation: the rows that validation takes.
        ngrams: also compare runs of words.
    """
    shared = shared_prompts(train, validation)
    if shared:
        rank_zero_warn(
            f"{len(shared)} of {len(validation)} validation prompts are trained on as well, "
            f"such as {describe(shared[0])}: validation measures memory; split rows by "
            "`split_rows` of `lightning_mpo.data.tables`"
        )
    if ngrams:
        leaked = set(map(id, shared))
        _warn_of_contamination(train, [row for row in validation if id(row) not in leaked])


@rank_zero_only
def _warn_of_contamination(train: Sequence[PromptRow], validation: Sequence[PromptRow]) -> None:
    """Warn of validation prompts that share a run of words with training rows, on one process."""
    pairs = shared_runs(train, validation)
    if pairs:
        first, other = pairs[0]
        rank_zero_warn(
            f"validation: {len(pairs)} of {len(validation)} prompts share a {WORDS}-gram with "
            f"training rows (first: {describe(first)} and {describe(other)}); validation may "
            "measure memory"
        )


def warn_of_contradictions(rows: Sequence[PromptRow]) -> None:
    """Warn of prompts in several rows with different targets: no answer is right for all."""
    pairs = contradictions(rows)
    if pairs:
        first, other = pairs[0]
        places = f" ({first.where}, {other.where})" if first.where else ""
        rank_zero_warn(
            f"{len(pairs)} prompts have rows with different targets, such as {first.prompt[:60]!r} "
            f"with {first.target[:30]!r} and {other.target[:30]!r}{places}: no answer is right for "
            "all rows of one"
        )


def allow_rendered_prompts(renderer: Renderer, rows: Sequence[PromptRow]) -> bool:
    """Encode control tokens as such, and warn, if all prompts seem to be rendered already.

    Args:
        renderer: of the prompts; its `encoder.control_tokens` is set.
        rows: the rows.

    Returns:
        Whether the prompts seem to be rendered.
    """
    first_token = renderer.rendered_already(rows)
    if first_token is None:
        return False
    renderer.encoder.control_tokens = True
    rank_zero_warn(
        f"all prompts begin with {first_token!r}, so they seem to be rendered already: their "
        "control tokens are encoded as control tokens; set `data.control_tokens: false` to encode "
        "them as text, or `true` to accept this"
    )
    return True


def warn_of_control_tokens(renderer: Renderer, rows: Sequence[PromptRow]) -> None:
    """Warn of prompts that contain control tokens, which are encoded as text."""
    suspicious = [row for row in rows if renderer.written_control_token(row)]
    if suspicious:
        rank_zero_warn(
            f"{len(suspicious)} of {len(rows)} prompts contain control tokens, such as "
            f"{renderer.written_control_token(suspicious[0])!r} in {describe(suspicious[0])}, "
            "which are encoded as text; set `data.control_tokens: true` if they are meant as "
            "control tokens"
        )


def warn_of_closed_turn(renderer: Renderer, row: PromptRow, end_tokens: Sequence[int]) -> None:
    """Warn of prompts that end with a token that ends a response."""
    last = encode_checked(renderer, row)[-1]
    if last in end_tokens:
        text = renderer.tokenizer.convert_ids_to_tokens(last)
        rank_zero_warn(
            f"prompts end with {text!r}, a token that ends a response, such as {describe(row)}: "
            "responses would begin after an end; the chat template should open the assistant's "
            "turn (`add_generation_prompt`)"
        )
