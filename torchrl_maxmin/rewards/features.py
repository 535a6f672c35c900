"""Frozen features of texts: every distinct text is read once, and never again while its model stays."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.core.distributed import gather_rows, share_of_rows, world_size
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import late_bar, progress_bar
from torchrl_maxmin.models.loading import (
    ensure_pad_token,
    is_encoder,
    load_causal_lm,
    load_config,
    load_tokenizer,
    load_trunk,
)
from torchrl_maxmin.models.sequences import backbone_of, hidden_states, last_index, pad_right, states_width
from torchrl_maxmin.preferences.chat import set_chat_template
from torchrl_maxmin.rewards.feature_store import FeatureStore, row_key, store_facts
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE, TextReader

__all__ = [
    "TOKENS_AT_ONCE",
    "feature_batches",
    "feature_rows",
    "free_memory",
    "gathered_differences",
    "load_feature_trunk",
    "roomy_rows",
    "text_features",
]

#: Tokens at most that a frozen model reads at once, whatever the number of texts.
TOKENS_AT_ONCE = 32_768
_BLOCK_ROWS = 8192
MEMORY_SHARE = 0.25  # of what is free: rows that take more lie in a file


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
    if is_encoder(load_config(name_or_path)):
        model, tokenizer = load_trunk(name_or_path)
    else:
        tokenizer, model = load_tokenizer(name_or_path), load_causal_lm(name_or_path)
        ensure_pad_token(tokenizer, model)
    set_chat_template(tokenizer, chat_template, system_prompt)
    return model, TextReader(model, tokenizer, pooling=pooling, layout=layout)


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
        batch_size: rows at once, at most.
        reader: how the trunk is read; a decoder at the last token when None.
    """
    features = torch.empty(len(rows), _width(model))
    for part, values in feature_batches(model, rows, pad_id, batch_size, reader=reader):
        features[part] = values
    return features


def _width(model: Any) -> int:
    return 2 * states_width(backbone_of(model)) + model.get_input_embeddings().weight.shape[-1]


def feature_batches(
    model: Any,
    rows: Sequence[Sequence[int]],
    pad_id: int,
    batch_size: int = SCORED_AT_ONCE,
    *,
    reader: TextReader | None = None,
) -> Iterator[tuple[list[int], Tensor]]:
    """The features of :func:`text_features` by batches: places in ``rows``, and their features on the CPU.

    A batch holds rows of one length, at most :data:`TOKENS_AT_ONCE` tokens. So nothing is padded, which is
    the least work, and a row's features do not depend on which rows it was read with.
    """
    backbone, embed = backbone_of(model), model.get_input_embeddings()
    device = next(model.parameters()).device
    for part in _batches([len(row) for row in rows], batch_size):
        with torch.no_grad():
            tokens, mask = (t.to(device) for t in pad_right([rows[i] for i in part], pad_id))
            if reader is None:
                states, present = hidden_states(backbone, tokens, mask), mask
                pooled = states[torch.arange(len(part), device=device), last_index(mask)]
            else:
                states, present = reader.states(backbone, tokens, mask)
                pooled = reader.pool(states, present)
            sides = (states, present), (embed(tokens), mask)
            sums = [(x * real[..., None].to(x.dtype)).sum(1) for x, real in sides]
            values = torch.cat([pooled, *sums], -1).float().cpu()
        yield part, values


def _batches(lengths: list[int], batch_size: int) -> Iterator[list[int]]:
    """Places of rows of one length each, short ones first, as many as a batch may hold."""
    by_length: dict[int, list[int]] = {}
    for place, length in enumerate(lengths):
        by_length.setdefault(length, []).append(place)
    for length in sorted(by_length):
        places, size = by_length[length], min(batch_size, max(1, TOKENS_AT_ONCE // max(1, length)))
        for start in range(0, len(places), size):
            yield places[start : start + size]


# -- each text once --------------------------------------------------------------------------------


def feature_rows(
    rows: Sequence[Sequence[int]],
    model: str,
    device: torch.device | str,
    batch_size: int = SCORED_AT_ONCE,
    *,
    reader: TextReader,
    cache: Path | None = None,
    dtype: torch.dtype = torch.float32,
    deal: bool = False,
    **reading_options: Any,
) -> Tensor:
    """Features [N, D] of distinct token rows, of a frozen model that is loaded if a row is not in the cache.

    Args:
        rows: token ids of N texts, no two alike.
        model: Hugging Face model.
        device: where it reads.
        batch_size: rows at once, at most.
        reader: what made the rows.
        cache: folder of the features that are kept; None keeps none.
        dtype: of the features, float32 or bfloat16; the model computes in float32.
        deal: whether each of several processes reads a share of the rows, and gets all the features.
        **reading_options: of :func:`load_feature_trunk`.

    Returns:
        The features; in a memory-mapped file where they do not fit (:func:`roomy_rows`).
    """
    if deal and world_size() > 1:
        index = share_of_rows(len(rows))[0]
        own = rows[int(index[0]) : int(index[-1]) + 1]
        part = _own_rows(own, model, device, batch_size, reader, cache, dtype, reading_options)
        return gather_rows(part[index - index[0]], len(rows))
    return _own_rows(rows, model, device, batch_size, reader, cache, dtype, reading_options)


def _own_rows(
    rows: Sequence[Sequence[int]],
    model: str,
    device: torch.device | str,
    batch_size: int,
    reader: TextReader,
    cache: Path | None,
    dtype: torch.dtype,
    reading_options: dict[str, Any],
) -> Tensor:
    facts = None
    if cache is not None:
        where = {"device": torch.device(device).type, "dtype": str(dtype)}
        facts = store_facts(model, **reader.facts(), **where)
    store = None if cache is None or facts is None else FeatureStore(cache, facts)
    keys = [] if store is None else [row_key(row) for row in rows]
    missing = dict.fromkeys(range(len(rows)))

    def load() -> tuple[Any, TextReader]:
        with torch.random.fork_rng(devices=[]):  # what is drawn later must not tell that one was loaded
            trunk, own_reader = load_feature_trunk(model, **reading_options)
        return trunk.to(device), own_reader

    def read() -> Iterator[tuple[list[int], Tensor]]:
        left = list(missing)
        if not left:
            return
        trunk, own_reader = load()
        batches = feature_batches(
            trunk, [rows[i] for i in left], own_reader.pad_id, batch_size, reader=own_reader
        )
        with progress_bar("encoding texts", len(left)) as advance:
            for part, values in batches:
                yield [left[i] for i in part], values.to(dtype)
                advance(len(part))

    features = None
    for places, values in read() if store is None else chain(store.held(keys), store.kept(keys, read())):
        features = roomy_rows(len(rows), values.shape[1], dtype) if features is None else features
        features[places] = values
        for place in places:
            del missing[place]
    return torch.empty(0, _width(load()[0]), dtype=dtype) if features is None else features


def gathered_differences(features: Tensor, chosen: Tensor, rejected: Tensor) -> Tensor:
    """Features of chosen minus rejected texts [n, D], float32; what does not fit in memory lies in a file.

    Args:
        features: of distinct texts [N, D]; a file holds differences in their dtype.
        chosen: which of them each pair's chosen text is, int64 [n].
        rejected: which its rejected text is.

    Example:
        >>> x = torch.tensor([[1.0], [5.0]])
        >>> gathered_differences(x, torch.tensor([1, 1]), torch.tensor([0, 1])).tolist()
        [[4.0], [0.0]]
    """
    count, width = len(chosen), features.shape[1]
    differences = roomy_rows(count, width, torch.float32 if _fits(4 * count * width) else features.dtype)
    with late_bar("differences of pairs", count) as reach:
        for start in range(0, count, _BLOCK_ROWS):
            part = slice(start, start + _BLOCK_ROWS)
            differences[part] = features[chosen[part]].float() - features[rejected[part]].float()
            reach(min(count, start + _BLOCK_ROWS))
    return differences


# -- rows that may not fit in memory ---------------------------------------------------------------


def free_memory() -> int:
    """Bytes of memory that are free, or would be if files were not kept in it."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) << 10
    except (OSError, StopIteration):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError, ValueError):  # the limit of a container; "max" is none
        group = Path("/sys/fs/cgroup")
        used = int((group / "memory.current").read_text())
        kept = (group / "memory.stat").read_text().split()  # files are given up for what asks for memory
        used -= int(kept[kept.index("inactive_file") + 1])
        free = min(free, int((group / "memory.max").read_text()) - used)
    return max(free, 0)


def _fits(size: int) -> bool:
    return size <= MEMORY_SHARE * free_memory()


def roomy_rows(count: int, width: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Make room for rows [count, width], without values: in memory, or mapped to a file where it is short.

    The file lies in the system's folder for temporary files (``TMPDIR``), and goes with the tensor.

    Raises:
        UserError: if neither has the room.

    Example:
        >>> roomy_rows(3, 2).shape
        torch.Size([3, 2])
    """
    size = count * width * dtype.itemsize
    if _fits(size):
        return torch.empty(count, width, dtype=dtype)
    try:
        with tempfile.TemporaryFile(prefix="torchrl_maxmin_") as file:
            if hasattr(os, "posix_fallocate"):  # macOS has none
                os.posix_fallocate(file.fileno(), 0, size)  # now, and not at a write to a full disk
            file.truncate(size)
            mapped = np.memmap(file, np.uint8, "r+", shape=(size,))
    except OSError as error:
        raise UserError(
            f"features take {size / 1e9:.1f} GB, too much for the memory, and for {tempfile.gettempdir()} "
            f"({error}); set TMPDIR to a folder with room, or give --feature_dtype bfloat16"
        ) from error
    return torch.from_numpy(mapped).view(dtype).view(count, width)
