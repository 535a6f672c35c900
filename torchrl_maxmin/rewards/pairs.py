"""Preference pairs as tokens, and the order in which training meets them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.modules.sequences import pad_right
from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.preferences.texts import Text
from torchrl_maxmin.progress import console, progress_bar
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.reader import TextReader

__all__ = ["Batches", "PairTokens", "TokenRows", "drop_pairs_cut_alike"]

_ENCODED_AT_ONCE = 4096
_SPECIAL_TOKENS = 16  # more than any tokenizer puts around a text

Encoder = Callable[[Sequence[Text], Sequence[Text]], list[list[int]]]


class TokenRows(Sequence[list[int]]):
    """Token rows of any length in one flat array: four bytes a token, whatever the number of rows."""

    def __init__(self, parts: list[np.ndarray], lengths: list[int]):
        self._tokens = np.concatenate([*parts, np.zeros(0, np.int32)])
        self._ends = np.cumsum([0, *lengths])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: Any) -> Any:
        return self._tokens[self._ends[index] : self._ends[index + 1]].tolist()

    @property
    def lengths(self) -> np.ndarray:
        """Tokens [N] of every row."""
        return np.diff(self._ends)


class PairTokens:
    """Both sides of every pair as token rows: row i is pair i's chosen text, row P + i its rejected one.

    Args:
        data: the pairs.
        encode: prompts and completions in, token rows out.
        pad_id: what pads a batch.
    """

    def __init__(self, data: PreferenceDataset, encode: Encoder, pad_id: int):
        self.num_pairs = len(data)
        parts: list[np.ndarray] = []
        lengths: list[int] = []
        with progress_bar("tokenizing pairs", 2 * self.num_pairs) as advance:
            for side in (data.chosen, data.rejected):
                for start in range(0, self.num_pairs, _ENCODED_AT_ONCE):
                    part = slice(start, start + _ENCODED_AT_ONCE)
                    rows = encode(data.prompts[part], side[part])
                    lengths.extend(map(len, rows))
                    parts.append(np.fromiter((token for row in rows for token in row), np.int32))
                    advance(len(rows))
        self.rows = TokenRows(parts, lengths)
        self.user_offsets = data.user_offsets
        self.row_users = data.row_users
        # None where every pair counts once; a tie that was halved is there both ways, each counted one half
        self.weights = None if bool((data.weights == 1).all()) else data.weights.float()
        self.pad_id = pad_id

    def __len__(self) -> int:
        return self.num_pairs

    def scores(self, model: RewardMixture, pairs: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Rewards of chosen and rejected texts, both [len(pairs), K], in one pass."""
        device = model.log_prior.device
        both = [self.rows[i] for i in pairs] + [self.rows[self.num_pairs + i] for i in pairs]
        tokens, mask = pad_right(both, self.pad_id)
        chosen, rejected = model(tokens.to(device), mask.to(device)).chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def margins(self, model: RewardMixture, batch_size: int = 128) -> Tensor:
        """Margins [P, K] of all pairs on the CPU, by batches of like length."""
        longest = self.rows.lengths.reshape(2, -1).max(0)
        order = np.argsort(longest, kind="stable").tolist()
        margins = torch.empty(self.num_pairs, model.num_groups)
        for start in range(0, self.num_pairs, batch_size):
            part = order[start : start + batch_size]
            chosen, rejected = self.scores(model, part)
            margins[part] = (chosen - rejected).cpu()
        return margins


def drop_pairs_cut_alike(
    data: PreferenceDataset, reader: TextReader, max_length: int | None
) -> PreferenceDataset:
    """Leave out pairs whose two texts differ in nothing but what is cut off, and say which.

    Args:
        data: the pairs.
        reader: what turns texts into tokens.
        max_length: most tokens of a text.

    Raises:
        UserError: if no pair is left.
    """
    limits = [limit for limit in (max_length, reader.max_length) if limit is not None]
    if not limits:
        return data
    alike: list[int] = []
    with progress_bar("looking for pairs that are cut alike", len(data)) as advance:
        for start in range(0, len(data), _ENCODED_AT_ONCE):
            part = slice(start, start + _ENCODED_AT_ONCE)
            texts = zip(data.prompts[part], data.chosen[part], data.rejected[part], strict=True)
            # a text of fewer bytes than tokens are allowed is not cut, whatever the tokenizer
            long = [
                (start + i, *row)
                for i, row in enumerate(texts)
                if any(_may_be_cut(row[0], side, min(limits)) for side in row[1:])
            ]
            if long:
                places, prompts, chosen, rejected = map(list, zip(*long, strict=True))
                sides = (reader.encode(prompts, side, max_length) for side in (chosen, rejected))
                alike += [place for place, *rows in zip(places, *sides, strict=True) if rows[0] == rows[1]]
            advance(len(data.prompts[part]))
    if len(alike) == len(data):
        raise UserError(
            f"--max_length {min(limits)} cuts the chosen and the rejected text of every pair to the same "
            "tokens; raise it"
        )
    if not alike:
        return data
    rows = data.ranking_ids[alike].tolist()
    shown = ", ".join(map(str, rows[:5])) + (" ..." if len(rows) > 5 else "")
    console.print(
        f"{len(alike)} of {len(data)} pairs left out: --max_length {min(limits)} leaves chosen and rejected "
        f"the same tokens (rows {shown})"
    )
    return data.select_rows(np.setdiff1d(np.arange(len(data)), alike))


def _may_be_cut(prompt: Text, completion: Text, limit: int) -> bool:
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        return True  # a chat template adds to them
    return len(prompt.encode()) + len(completion.encode()) + _SPECIAL_TOKENS > limit


class Batches:
    """Batches of shuffled rows, epoch after epoch, from a generator that can be put back.

    Args:
        num_rows: rows to draw from; every epoch meets each once.
        batch_size: rows a batch.
        seed: of the shuffles.
    """

    def __init__(self, num_rows: int, batch_size: int, seed: int):
        self._num_rows, self._batch_size = num_rows, batch_size
        self._generator = np.random.default_rng(seed)
        self._left: list[int] = []

    def __next__(self) -> list[int]:
        while len(self._left) < min(self._batch_size, self._num_rows):
            self._left.extend(self._generator.permutation(self._num_rows).tolist())
        batch, self._left = self._left[: self._batch_size], self._left[self._batch_size :]
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands, and the rows of its epoch that are left."""
        return {"generator": self._generator.bit_generator.state, "left": list(self._left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._generator.bit_generator.state = state["generator"]
        self._left = list(state["left"])
