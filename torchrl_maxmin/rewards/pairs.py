"""Preference pairs as a model reads them: tokens, batches, frozen features, what a limit of length cuts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.choices import UserRows, row_weights_of
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console, progress_bar
from torchrl_maxmin.models.loading import (
    ensure_pad_token,
    import_transformers,
    is_encoder,
    load_causal_lm,
    load_tokenizer,
    load_trunk,
    require_model,
)
from torchrl_maxmin.models.sequences import backbone_of, hidden_states, last_index, pad_right
from torchrl_maxmin.models.trunks import states_width
from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.preferences.texts import Text, TextEncoder, is_conversational, set_chat_template
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE, TextReader

__all__ = [
    "Batches",
    "PairTokens",
    "TokenRows",
    "drop_pairs_cut_alike",
    "feature_differences",
    "load_feature_trunk",
    "text_features",
    "tokens_report",
]

_ENCODED_AT_ONCE = 4096
_SPECIAL_TOKENS = 16  # more than any tokenizer puts around a text
_SHOWN = 60  # tokens of a long text, half of them from each end

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


class PairTokens(UserRows):
    """Both sides of every pair as token rows: row i is pair i's chosen text, row P + i its rejected one.

    Args:
        data: the pairs.
        encode: prompts and completions in, token rows out.
        pad_id: what pads a batch.
    """

    def __init__(self, data: PreferenceDataset, encode: Encoder, pad_id: int):
        self.user_offsets, self.row_weights = data.user_offsets, row_weights_of(data)
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
    def margins(self, model: RewardMixture, batch_size: int = SCORED_AT_ONCE) -> Tensor:
        """Margins [P, K] of all pairs on the CPU, by batches of like length, ``batch_size`` texts at once."""
        longest = self.rows.lengths.reshape(2, -1).max(0)
        order = np.argsort(longest, kind="stable").tolist()
        margins = torch.empty(self.num_pairs, model.num_groups)
        size = max(1, batch_size // 2)
        for start in range(0, self.num_pairs, size):
            part = order[start : start + size]
            chosen, rejected = self.scores(model, part)
            margins[part] = (chosen - rejected).cpu()
        return margins


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
        """State of the generator, and the rows of its epoch that are left."""
        return {"generator": self._generator.bit_generator.state, "left": list(self._left)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._generator.bit_generator.state = state["generator"]
        self._left = list(state["left"])


# -- frozen features -------------------------------------------------------------------------------


def load_feature_trunk(
    name_or_path: str,
    pooling: str | None = None,
    layout: str | None = None,
    chat_template: str | None = None,
    system_prompt: str | None = None,
) -> tuple[Any, TextReader]:
    """Load a language model, decoder or encoder, to take features from, and what reads texts with it.

    Args:
        name_or_path: Hugging Face model.
        pooling: see :class:`~torchrl_maxmin.rewards.reader.TextReader`.
        layout: likewise.
        chat_template: see :func:`~torchrl_maxmin.preferences.texts.set_chat_template`.
        system_prompt: likewise.

    Raises:
        UserError: if there is no such model, or it cannot be read.
    """
    require_model(name_or_path)
    if is_encoder(import_transformers().AutoConfig.from_pretrained(name_or_path)):
        model, tokenizer = load_trunk(name_or_path)
    else:
        tokenizer, model = load_tokenizer(name_or_path), load_causal_lm(name_or_path)
        ensure_pad_token(tokenizer, model)
    set_chat_template(tokenizer, chat_template, system_prompt)
    return model, TextReader(model, tokenizer, pooling=pooling, layout=layout)


@torch.no_grad()
def text_features(
    model: Any,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int = SCORED_AT_ONCE,
    *,
    reader: TextReader | None = None,
) -> Tensor:
    """Frozen features [N, 2H + E] of token rows: pooled state, and sums of hidden states and embeddings.

    The sums let a linear head see counts, above all length. H is the width of the trunk's states, E
    that of its embeddings; for most models they are equal.

    Args:
        model: a language model or its trunk.
        rows: token ids of N texts.
        pad_id: what pads a batch.
        batch_size: rows at once.
        reader: how the trunk is read; a decoder at the last token when None.
    """
    backbone, embed = backbone_of(model), model.get_input_embeddings()
    device = next(model.parameters()).device
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    features = torch.empty(len(rows), 2 * states_width(backbone) + embed.weight.shape[-1])
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        tokens, mask = (t.to(device) for t in pad_right([rows[i] for i in part], pad_id))
        if reader is None:
            states, present = hidden_states(backbone, tokens, mask), mask
            pooled = states[torch.arange(len(part), device=device), last_index(mask)]
        else:
            states, present = reader.states(backbone, tokens, mask)
            pooled = reader.pool(states, present)
        sums = [
            (x * real[..., None].to(x.dtype)).sum(1) for x, real in ((states, present), (embed(tokens), mask))
        ]
        features[part] = torch.cat([pooled, *sums], -1).float().cpu()
    return features


def feature_differences(
    data: PreferenceDataset,
    model: str,
    max_length: int | None,
    device: torch.device | str,
    batch_size: int = SCORED_AT_ONCE,
    **reading_options: Any,
) -> Tensor:
    """Features of chosen minus rejected texts [P, D] on a frozen trunk, each of unit deviation."""
    trunk, reader = load_feature_trunk(model, **reading_options)
    trunk.to(device)
    pairs = PairTokens(data, lambda p, c: reader.encode(p, c, max_length), reader.pad_id)
    features = text_features(trunk, pairs.rows, pairs.pad_id, batch_size, reader=reader)
    differences = features[: len(pairs)] - features[len(pairs) :]
    return differences / differences.std(0).clamp_min(1e-6)


# -- what a limit of length cuts -------------------------------------------------------------------


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
    limit = min((most for most in (max_length, reader.max_length) if most is not None), default=None)
    alike = [] if limit is None else _cut_alike(data, reader, limit)
    if not alike:
        return data
    if len(alike) == len(data):
        raise UserError(
            f"--max_length {limit} cuts the chosen and the rejected text of every pair to the same tokens; "
            "raise it"
        )
    rows = data.ranking_ids[alike].tolist()
    shown = ", ".join(map(str, rows[:5])) + (" ..." if len(rows) > 5 else "")
    console.print(
        f"{len(alike)} of {len(data)} pairs left out: --max_length {limit} leaves chosen and rejected the "
        f"same tokens (rows {shown})"
    )
    return data.select_rows(np.setdiff1d(np.arange(len(data)), alike))


def _cut_alike(data: PreferenceDataset, reader: TextReader, limit: int) -> list[int]:
    """Pairs of which a limit of tokens leaves nothing different."""
    alike: list[int] = []
    with progress_bar("looking for pairs that are cut alike", len(data)) as advance:
        for start in range(0, len(data), _ENCODED_AT_ONCE):
            part = slice(start, start + _ENCODED_AT_ONCE)
            texts = zip(data.prompts[part], data.chosen[part], data.rejected[part], strict=True)
            long = [
                (start + i, *row)
                for i, row in enumerate(texts)
                if any(_may_be_cut(row[0], side, limit) for side in row[1:])
            ]
            if long:
                places, prompts, chosen, rejected = map(list, zip(*long, strict=True))
                sides = (reader.encode(prompts, side, limit) for side in (chosen, rejected))
                alike += [place for place, *rows in zip(places, *sides, strict=True) if rows[0] == rows[1]]
            advance(len(data.prompts[part]))
    return alike


def _may_be_cut(prompt: Text, completion: Text, limit: int) -> bool:
    """A text of fewer bytes than tokens are allowed is not cut, whatever the tokenizer."""
    if not (isinstance(prompt, str) and isinstance(completion, str)):
        return True  # a chat template adds to them
    return len(prompt.encode()) + len(completion.encode()) + _SPECIAL_TOKENS > limit


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
    alike = len(_cut_alike(data, reader, limit))
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
