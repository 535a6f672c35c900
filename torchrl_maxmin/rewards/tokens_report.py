"""Preference data as a model reads them: the first pair's tokens, and what a limit of length cuts."""

from __future__ import annotations

import numpy as np

from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.preferences.texts import TextEncoder, is_conversational
from torchrl_maxmin.rewards.pairs import PairTokens
from torchrl_maxmin.rewards.reader import TextReader

__all__ = ["tokens_report"]

_SHOWN = 60  # tokens of a long text, half of them from each end


def tokens_report(data: PreferenceDataset, reader: TextReader, max_length: int) -> str:
    """Describe pairs as a model's tokens.

    Args:
        data: the pairs; conversations as messages.
        reader: what turns texts into the model's tokens.
        max_length: longest text in tokens; never more than the model has positions for.

    Returns:
        A few lines: the first pair with every token, quantiles of the lengths, texts that are cut, and pairs
        of which the cut leaves nothing different.
    """
    limit = max_length if reader.max_length is None else min(max_length, reader.max_length)
    tokenizer = reader.tokenizer
    reader.layout.max_length = None  # lengths before they are cut
    encoder = TextEncoder(tokenizer)
    lines = [
        f"the first pair, as the model reads it ({type(tokenizer).__name__}, layout {reader.layout.kind}):"
    ]
    for name, side in (("chosen", data.chosen), ("rejected", data.rejected)):
        (row,) = reader.encode(data.prompts[:1], side[:1])
        lines.append(f"  {name:<9}{len(row)} tokens: {_tokens(tokenizer, row)}")
    if encoder.has_template and not is_conversational(data.prompts[0]):
        lines.append(
            "! the tokenizer has a chat template, which plain strings do not go through; an "
            "instruction-tuned model expects lists of messages"
        )
    pairs = PairTokens(data, reader.encode, reader.pad_id)
    lengths = pairs.rows.lengths
    low, median, high = np.quantile(lengths, [0.05, 0.5, 0.95])
    cut = int((lengths > limit).sum())
    lines.append(
        f"tokens a text: median {median:.0f}, 90% between {low:.0f} and {high:.0f}, at most {lengths.max()}"
    )
    lines.append(
        f"--max_length {limit} cuts {cut:,} of {len(lengths):,} texts"
        + (" (the model has no more positions)" if limit < max_length else "")
    )
    alike = 0
    for i in np.flatnonzero((lengths.reshape(2, -1) > limit).any(0)).tolist():
        chosen, rejected = reader.encode([data.prompts[i]] * 2, [data.chosen[i], data.rejected[i]], limit)
        alike += chosen == rejected
    if alike:
        lines.append(
            f"! it leaves chosen and rejected the same tokens in {alike:,} pairs; these are left out"
        )
    return "\n".join(lines)


def _tokens(tokenizer: object, row: list[int]) -> str:
    """Tokens side by side, a long row without its middle."""
    tokens = tokenizer.convert_ids_to_tokens(row)  # type: ignore[attr-defined]
    if len(tokens) > _SHOWN:
        half = _SHOWN // 2
        tokens = [*tokens[:half], f"... {len(tokens) - _SHOWN} more ...", *tokens[-half:]]
    return " ".join(map(str, tokens))
