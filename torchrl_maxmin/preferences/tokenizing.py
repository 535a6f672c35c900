"""Texts to token ids: one text at a time, or all pairs in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torchrl_maxmin.preferences.late_bar import late_bar
from torchrl_maxmin.preferences.texts import Text, TextEncoder

if TYPE_CHECKING:
    from torchrl_maxmin.preferences.dataset import PreferenceDataset
    from torchrl_maxmin.preferences.storage import ArrowColumn

__all__ = ["encode", "tokenize_pairs"]

Encoder = Callable[[Sequence[Text], Sequence[Text]], list[list[int]]]

_BATCH_ROWS = 1_000


def encode(tokenizer: Any, prompt: Text, completion: Text, max_length: int | None = None) -> list[int]:
    """Return the token ids of one text: prompt, completion and EOS, as :class:`TextEncoder` makes them.

    Longer texts lose tokens of the prompt's start, but for BOS, and never the end that a score is read at.

    Args:
        tokenizer: a Hugging Face tokenizer.
        prompt: a string or a list of messages.
        completion: likewise.
        max_length: most tokens.
    """
    return TextEncoder(tokenizer)([prompt], [completion], max_length)[0]


def tokenize_pairs(data: PreferenceDataset, encoder: Encoder) -> tuple[ArrowColumn, ArrowColumn]:
    """Token rows of both sides of every pair, kept in a temporary file.

    Args:
        data: P pairs.
        encoder: prompts and completions in, one list of token ids for each out; called with a
            thousand at a time.

    Returns:
        Two sequences of P lists of token ids, chosen and rejected, in the order of ``data``.
    """
    import numpy as np
    import pyarrow as pa

    from torchrl_maxmin.preferences.storage import ArrowColumn, spill

    kind = pa.large_list(pa.int32())

    def tables() -> Iterator[pa.Table]:
        with late_bar("tokenizing pairs", len(data)) as reach:
            for start in range(0, len(data), _BATCH_ROWS):
                part = slice(start, start + _BATCH_ROWS)
                prompts = data.prompts[part]
                sides = {"chosen": data.chosen[part], "rejected": data.rejected[part]}
                yield pa.table({name: pa.array(encoder(prompts, side), kind) for name, side in sides.items()})
                reach(start + len(prompts))

    table, rows = spill(tables()), np.arange(len(data))
    return ArrowColumn(table["chosen"], rows), ArrowColumn(table["rejected"], rows)
