"""Settings of every stage that fits a mixture to preferences, and the pairs that they leave."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console, progress_bar
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.preferences.chat import ChatSettings, Text, is_conversational
from torchrl_maxmin.preferences.texts import TextEncoder
from torchrl_maxmin.rewards.feature_store import cache_folder
from torchrl_maxmin.rewards.pairs import PairTokens
from torchrl_maxmin.rewards.reader import LAYOUTS, POOLINGS, TextReader, load_reader

__all__ = ["MixtureSettings", "drop_pairs_cut_alike", "tokens_report"]

_ENCODED_AT_ONCE = 4096
_SPECIAL_TOKENS = 16  # more than any tokenizer puts around a text
_SHOWN = 60  # tokens of a long text, half of them from each end


@dataclass(kw_only=True)
class MixtureSettings(ChatSettings):
    """Groups among the people behind preferences.

    Args:
        user_column: column that says who chose, or column.field; found by its usual names when left
            out; none makes every row a user.
        prompt_column: column of prompts, or none; found by its usual names when left out, like the next four.
        response_column: column of the responses or items that are scored, or of their lists.
        score_column: column of scores.
        chosen_column: column of preferred texts.
        rejected_column: column of the others.
        lower_is_better: lower scores are better.
        group_column: ground truth for evaluation, never for training; "group" where it exists.
        dataset_split: split of the pairs.
        layout: how the rows hold pairs; told from the columns when left out (see data check).
        ties: drop, or halve: keep a tie as both orders, each counted one half.
        tie_margin: scores that differ by no more than this tie.
        ratings: blocks, or pairs: deal a user's ratings into random blocks, each a ranking and each rating in
            one at most; or take all pairs of them as independent, which they are not.
        max_pairs: pairs at most of one such block; with pairs, of one user's scores of one prompt.
        num_groups: groups K, or auto to choose by left-out users; 1 is single-reward RLHF.
        max_groups: largest K that auto tries.
        heldout_fraction: share of every user's pairs that accuracy is measured on.
        max_length: longest text in tokens; longer ones lose their start, but for BOS.
        pooling: where the model is read: last, mean or cls token; what suits it when left out.
        text_layout: how prompt and completion become one text: continuation, chat, concat, text_pair,
            response, or a template with {prompt} and {completion}; what suits the model when left out.
        seed: seed of everything random.
        device: cpu, cuda or auto.
        feature_cache: whether features of texts on the frozen model are kept for the next run: true, in
            $TORCHRL_MAXMIN_CACHE or ~/.cache/torchrl_maxmin/features; false; or a folder. Above
            $TORCHRL_MAXMIN_CACHE_BYTES (20 GiB when left out) the least recently used files go.
        feature_dtype: how they are kept: float32, or bfloat16 for half the room.
    """

    user_column: str | None = None
    prompt_column: str | None = None
    response_column: str | None = None
    score_column: str | None = None
    chosen_column: str | None = None
    rejected_column: str | None = None
    lower_is_better: bool = False
    group_column: str | None = None
    dataset_split: str = "train"
    layout: str | None = None
    ties: str = "drop"
    tie_margin: float = 0.0
    ratings: str = "blocks"
    max_pairs: int = 64
    num_groups: int | str = "auto"
    max_groups: int = 3
    heldout_fraction: float = 0.1
    max_length: int = 1024
    pooling: str | None = None
    text_layout: str | None = None
    seed: int = 0
    device: str = "auto"
    feature_cache: bool | str = True
    feature_dtype: str = "float32"

    def groups(self) -> int | None:
        """``num_groups`` as a number, or None for ``"auto"``; raises :class:`UserError` for anything else."""
        if str(self.num_groups) == "auto":
            return None
        if not str(self.num_groups).isdigit() or int(self.num_groups) < 1:
            raise UserError(f"--num_groups is a positive number or auto, not {self.num_groups!r}")
        return int(self.num_groups)

    def check(self) -> None:
        """Raise :class:`UserError` for settings that cannot work."""
        self.groups()
        self.require_at_least(1, "max_groups", "max_pairs", "max_length")
        self.require_at_least(0, "tie_margin")
        self.require_seed()
        self.require_known(
            ties=("drop", "halve"), ratings=("blocks", "pairs"), feature_dtype=("float32", "bfloat16")
        )
        if not 0 <= self.heldout_fraction < 1:
            raise UserError("--heldout_fraction must be at least 0 and below 1")
        if self.pooling not in (None, *POOLINGS):
            raise UserError(f"--pooling {self.pooling!r} is none of {', '.join(POOLINGS)}")
        if self.text_layout and self.text_layout not in LAYOUTS and "{completion}" not in self.text_layout:
            raise UserError(
                f"--text_layout {self.text_layout!r} is none of {', '.join(LAYOUTS)}, "
                "and no template with {completion} in it"
            )
        cache_folder(self.feature_cache)

    def reading_options(self) -> dict[str, Any]:
        """Arguments of :func:`~torchrl_maxmin.rewards.features.load_feature_trunk`."""
        same = {name: getattr(self, name) for name in ("pooling", "chat_template", "system_prompt")}
        return {**same, "layout": self.text_layout}

    def feature_options(self) -> dict[str, Any]:
        """Arguments of :func:`~torchrl_maxmin.rewards.features.feature_rows` beside those."""
        return {"cache": cache_folder(self.feature_cache), "dtype": getattr(torch, self.feature_dtype)}

    def load_pairs(self, name: str, model: str | None = None, **options: Any) -> PreferenceDataset:
        """Load pairs as these settings say, conversations as messages.

        Args:
            name: what :meth:`PreferenceDataset.load` takes.
            model: the model that reads them; pairs of which ``max_length`` leaves nothing different are left
                out, and named.
            **options: further arguments of :meth:`PreferenceDataset.load`.

        Raises:
            UserError: for data that cannot be used.
        """
        data = PreferenceDataset.load(
            name,
            self.user_column,
            self.group_column,
            self.dataset_split,
            layout=self.layout,
            ties=self.ties,
            tie_margin=self.tie_margin,
            max_pairs=self.max_pairs,
            ratings=self.ratings,
            prompt_column=self.prompt_column,
            response_column=self.response_column,
            score_column=self.score_column,
            chosen_column=self.chosen_column,
            rejected_column=self.rejected_column,
            lower_is_better=self.lower_is_better,
            conversations="messages",
            **options,
        )
        for note in data.origin.notes:
            console.print(note, markup=False, highlight=False)
        if model is None:
            return data
        return drop_pairs_cut_alike(data, load_reader(model, **self.reading_options()), self.max_length)


def drop_pairs_cut_alike(
    data: PreferenceDataset, reader: TextReader, max_length: int | None
) -> PreferenceDataset:
    """Leave out pairs whose two texts differ in nothing but what is cut off, and say which.

    A choice among several texts goes as a whole: without one of its pairs it would say that the best of fewer
    was chosen.

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
    named = data.ranking_ids[alike].tolist()
    alike, found = _whole_choices(data, alike), len(alike)
    if len(alike) == len(data):
        raise UserError(
            f"--max_length {limit} cuts the chosen and the rejected text of every pair to the same tokens; "
            "raise it"
        )
    shown = ", ".join(map(str, named[:5])) + (" ..." if len(named) > 5 else "")
    others = f", and {len(alike) - found} with the rest of their choices" if len(alike) > found else ""
    console.print(
        f"{found} of {len(data)} pairs left out{others}: --max_length {limit} leaves chosen and rejected the "
        f"same tokens (rows {shown})"
    )
    return data.select_rows(np.setdiff1d(np.arange(len(data)), alike))


def _whole_choices(data: PreferenceDataset, rows: list[int]) -> list[int]:
    """Add the other pairs of the choices that these are part of."""
    offsets = data.choice_offsets.numpy()
    choices = np.unique(np.searchsorted(offsets, rows, side="right") - 1)
    return [row for choice in choices for row in range(offsets[choice], offsets[choice + 1])]


def _cut_alike(data: PreferenceDataset, reader: TextReader, limit: int) -> list[int]:
    """Pairs of which a limit of tokens leaves nothing different."""
    alike: list[int] = []
    with progress_bar("looking for pairs that are cut alike", len(data)) as advance:
        for start in range(0, len(data), _ENCODED_AT_ONCE):
            part = slice(start, start + _ENCODED_AT_ONCE)
            texts = zip(data.prompts[part], data.chosen[part], data.rejected[part], strict=True)
            rows = enumerate(texts, start)
            long = [(i, p, *sides) for i, (p, *sides) in rows if any(_may_be_cut(p, s, limit) for s in sides)]
            if long:
                places, prompts, chosen, rejected = map(list, zip(*long, strict=True))
                sides = (reader.encode(prompts, side, limit) for side in (chosen, rejected))
                alike += [place for place, one, other in zip(places, *sides, strict=True) if one == other]
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
    kind = f"{type(tokenizer).__name__}, layout {reader.layout.kind}"
    lines = [f"the first pair, as the model reads it ({kind}):"]
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
    most = " (the model has no more positions)" if limit < max_length else ""
    lines += [
        f"tokens a text: median {median:.0f}, 90% between {low:.0f} and {high:.0f}, at most {lengths.max()}",
        f"--max_length {limit} cuts {cut:,} of {len(lengths):,} texts{most}",
    ]
    if alike := len(_cut_alike(data, reader, limit)):
        lines.append(
            f"! it leaves chosen and rejected the same tokens in {alike:,} pairs; these are left out, with "
            "the rest of their choices"
        )
    return "\n".join(lines)


def _tokens(tokenizer: Any, row: list[int]) -> str:
    """Tokens side by side, a long row without its middle."""
    tokens = tokenizer.convert_ids_to_tokens(row)
    if len(tokens) > _SHOWN:
        half = _SHOWN // 2
        tokens = [*tokens[:half], f"... {len(tokens) - _SHOWN} more ...", *tokens[-half:]]
    return " ".join(map(str, tokens))
