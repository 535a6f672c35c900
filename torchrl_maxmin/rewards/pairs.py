"""Preference pairs as a model reads them: tokens, frozen features, and the M-step that fine-tunes it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices, row_weights_of
from torchrl_maxmin.clustering.em import UserRows, log_likelihood_by_user
from torchrl_maxmin.clustering.judged import merged_choices
from torchrl_maxmin.clustering.shares import SharedChoices
from torchrl_maxmin.core.distributed import (
    gather_rows,
    share_of_rows,
    sum_over_ranks,
    world_size,
)
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.models.loading import (
    ensure_pad_token,
    import_transformers,
    is_encoder,
    load_causal_lm,
    load_tokenizer,
    load_trunk,
    require_model,
)
from torchrl_maxmin.models.sequences import backbone_of, hidden_states, last_index, pad_right, states_width
from torchrl_maxmin.preferences.chat import Text, set_chat_template
from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE, TextReader

_ENCODED_AT_ONCE = 4096

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
        return gather_rows(self.own_margins(model, batch_size), self.num_pairs)

    @torch.no_grad()
    def own_margins(self, model: RewardMixture, batch_size: int = SCORED_AT_ONCE) -> Tensor:
        """Those of this process's share of the pairs (:mod:`~torchrl_maxmin.core.distributed`), [n, K]."""
        share = share_of_rows(self.num_pairs)[0].numpy()
        longest = self.rows.lengths.reshape(2, -1).max(0)[share]
        order = np.argsort(longest, kind="stable").tolist()
        margins = torch.empty(len(share), model.num_groups)
        size = max(1, batch_size // 2)
        for start in range(0, len(share), size):
            part = order[start : start + size]
            chosen, rejected = self.scores(model, share[part].tolist())
            margins[part] = (chosen - rejected).cpu()
        return margins

    def own_log_likelihood(self, margins: Tensor) -> Tensor:
        """Log-likelihood [U, K] of the choices of every user that are in this process's share, in float64.

        Args:
            margins: of :meth:`own_margins`.
        """
        own = own_rows(self.num_pairs)
        weights = None if self.row_weights is None else self.row_weights[own]
        margins = margins[: own.stop - own.start]
        return log_likelihood_by_user(margins, own_offsets(self.user_offsets, own), weights)


def own_rows(num_rows: int) -> slice:
    """Which rows are this process's, each with one process; none where there are fewer than processes."""
    index, real = share_of_rows(num_rows)
    return slice(int(index[0]), int(index[0]) + int(real.sum()))


def own_offsets(user_offsets: Tensor, own: slice) -> Tensor:
    """Where the rows of every user begin [U + 1] among those of a slice."""
    return user_offsets.clamp(own.start, own.stop) - own.start


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
        chat_template: see :func:`~torchrl_maxmin.preferences.chat.set_chat_template`.
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
        sides = (states, present), (embed(tokens), mask)
        sums = [(x * real[..., None].to(x.dtype)).sum(1) for x, real in sides]
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
    share = share_of_rows(len(data))[0].tolist() if world_size() > 1 else range(len(data))
    own = raw_differences(data, share, model, max_length, device, batch_size, **reading_options)
    differences = gather_rows(own, len(data))
    return differences / differences.std(0).clamp_min(1e-6)


def raw_differences(
    data: PreferenceDataset,
    share: Sequence[int],
    model: str,
    max_length: int | None,
    device: torch.device | str,
    batch_size: int = SCORED_AT_ONCE,
    **reading_options: Any,
) -> Tensor:
    """Features of chosen minus rejected texts [n, D] of some pairs, as the trunk gives them."""
    trunk, reader = load_feature_trunk(model, **reading_options)
    trunk.to(device)
    pairs = PairTokens(data, lambda p, c: reader.encode(p, c, max_length), reader.pad_id)
    rows: Sequence[list[int]] = pairs.rows
    if len(share) < len(pairs):
        rows = [pairs.rows[row] for first in (0, len(pairs)) for row in (first + i for i in share)]
    features = text_features(trunk, rows, pairs.pad_id, batch_size, reader=reader)
    return features[: len(share)] - features[len(share) :]


def feature_choices(data: PreferenceDataset, *args: Any, **kwargs: Any) -> PairChoices:
    """Choices between the pairs of :func:`feature_differences`, those that repeat another left out."""
    return _merged(data, feature_differences(data, *args, **kwargs))


def _merged(data: PreferenceDataset, differences: Tensor) -> PairChoices:
    ids = torch.from_numpy(data.judgement_ids)
    choices = PairChoices(differences, data.user_offsets, row_weights_of(data), ids)
    return merged_choices(choices, data.judgements) if data.judgements.num_repeats else choices


def shared_feature_choices(data: PreferenceDataset, *args: Any, **kwargs: Any) -> SharedChoices:
    """What :func:`feature_choices` gives, each process with the features of its own pairs alone."""
    own = own_rows(len(data))
    differences = raw_differences(data, range(own.start, own.stop), *args, **kwargs)
    differences /= deviation_over_ranks(differences, len(data)).clamp_min(1e-6)
    merged = _merged(data, differences.new_empty(len(data), 0))
    first = torch.from_numpy(data.judgements.first)
    kept = slice(*torch.searchsorted(first, torch.tensor([own.start, own.stop])).tolist())
    return SharedChoices(
        differences[first[kept] - own.start],
        own_offsets(merged.user_offsets, kept),
        None if merged.row_weights is None else merged.row_weights[kept],
        None if merged.judgements is None else merged.judgements[kept],
    )


def deviation_over_ranks(rows: Tensor, num_rows: int) -> Tensor:
    """Standard deviation [D] over the rows [n, D] of all processes, N together."""
    values = rows.double()
    mean = sum_over_ranks(values.sum(0)) / num_rows
    return (sum_over_ranks((values - mean).square().sum(0)) / (num_rows - 1)).sqrt().to(rows.dtype)
