"""Ragged token sequences as padded tensors, and the trunks that read them.

Prompts are padded left, responses right. Masks are boolean and come from lengths, never from
token ids: a model may emit its own pad token, and a pad id may equal another special token.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, reduce
from operator import or_
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.masks import row_lengths

__all__ = [
    "NO_TOKENS",
    "Ends",
    "answering",
    "backbone_of",
    "has_ended",
    "hidden_states",
    "in_batches",
    "in_length_buckets",
    "is_end",
    "keep_last",
    "last_index",
    "mask_after_eos",
    "max_positions",
    "pack_left",
    "pad_left",
    "pad_right",
    "penalise_missing_eos",
    "position_ids",
    "predicting_states",
    "require_positions",
    "segment_ids",
    "states_width",
    "takes",
    "takes_whole_mask",
    "text_config",
    "undisturbed",
    "without_cache",
]

#: the token, or the several tokens, that end a response; or what marks the ends in tokens [B, R]
Ends = int | Sequence[int] | Callable[[Tensor], Tensor]
#: the fault of a prompt that nothing is sampled from
NO_TOKENS = (
    "a prompt without tokens: nothing precedes its first response token, which is then sampled and "
    "scored from padding; give it the tokenizer's BOS token, or leave it out"
)


def pad_right(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad token rows on the right; returns (tokens [B, T] int64, mask [B, T] bool)."""
    return _pad(rows, pad_id, left=False)


def pad_left(rows: Sequence[Sequence[int]], pad_id: int) -> tuple[Tensor, Tensor]:
    """Pad token rows on the left; returns (tokens [B, T] int64, mask [B, T] bool)."""
    return _pad(rows, pad_id, left=True)


def _pad(rows: Sequence[Sequence[int]], pad_id: int, left: bool) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([len(row) for row in rows])
    longest = int(lengths.max()) if len(rows) else 0
    tokens = torch.full((len(rows), longest), pad_id, dtype=torch.int64)
    columns = torch.arange(longest)
    mask = columns >= longest - lengths[:, None] if left else columns < lengths[:, None]
    tokens[mask] = torch.tensor([token for row in rows for token in row], dtype=torch.int64)
    return tokens, mask


def is_end(tokens: Tensor, ends: Ends) -> Tensor:
    """Whether each token [B, R] ends a response: bool, and anything behind the first that does."""
    if callable(ends):
        return ends(tokens)
    ends = (ends,) if isinstance(ends, int) else ends
    return reduce(or_, [tokens == end for end in ends])  # no tensor of ids: a copy to the device waits


def mask_after_eos(tokens: Tensor, ends: Ends) -> Tensor:
    """Mask [B, R] of generated tokens up to and with the first that ends a response.

    Args:
        tokens: [B, R] int64.
        ends: the token, or the several tokens, that end a response, or
            :class:`~torchrl_maxmin.models.decoding.StopStrings`.
    """
    found = is_end(tokens, ends).int()
    return found.cumsum(-1) - found == 0


def has_ended(responses: TensorDictBase, ends: Ends) -> Tensor:
    """Whether each response ended by itself: bool [B, 1].

    Args:
        responses: with ``action`` and ``action_mask`` [B, R].
        ends: as of :func:`mask_after_eos`.
    """
    return (is_end(responses["action"], ends) & responses["action_mask"]).any(-1, keepdim=True)


def penalise_missing_eos(rewards: Tensor, responses: TensorDictBase, ends: Ends, penalty: float) -> Tensor:
    """Take ``penalty`` from every reward [B, K] of the responses that do not end."""
    return rewards - penalty * ~has_ended(responses, ends)


def in_batches(function: Callable[[Any], Any], rows: TensorDictBase, batch_size: int) -> Any:
    """Apply a function to ``batch_size`` rows at a time; the parts of its result are put together again.

    Args:
        function: maps a tensordict [B] to a tensor or tensordict of as many rows.
        rows: batch size [N].
        batch_size: most rows at once.

    Example:
        >>> from tensordict import TensorDict
        >>> in_batches(lambda part: part["x"] * 2, TensorDict({"x": torch.arange(5)}, [5]), 2).tolist()
        [0, 2, 4, 6, 8]
    """
    if len(rows) <= batch_size:
        return function(rows)
    return torch.cat([function(part) for part in rows.split(batch_size)])


def in_length_buckets(function: Callable[[Any], Any], rows: TensorDictBase, batch_size: int) -> Any:
    """Apply a function to ``batch_size`` rows at a time, rows of like length together.

    Prompts of a part are as wide as its longest, so that little is padding; the result is in the rows' order.
    Rows that fit at once are left as they are.

    Args:
        function: maps a tensordict [B] to a tensor of as many rows, or adds entries to it, the result.
        rows: ``prompt_tokens`` and ``prompt_mask`` [N, P], padded left; ``action_mask`` [N, R] of responses.
        batch_size: most rows at once.

    Example:
        >>> from tensordict import TensorDict
        >>> tokens, mask = pad_left([[5], [6, 6, 6], [7], [8, 8]], 0)
        >>> rows = TensorDict({"prompt_tokens": tokens, "prompt_mask": mask}, [4])
        >>> width = lambda part: torch.full([len(part)], part["prompt_tokens"].shape[-1])
        >>> in_length_buckets(width, rows, 2).tolist()
        [1, 3, 1, 3]
    """
    if len(rows) <= batch_size:
        return function(rows)
    lengths = rows["prompt_mask"].sum(-1)
    if (action_mask := rows.get("action_mask", None)) is not None:
        lengths = lengths + action_mask.sum(-1)
    order = lengths.argsort(descending=True, stable=True)  # what does not fit fails at once
    parts = []
    for part in rows[order].split(batch_size):
        width = int(part["prompt_mask"].sum(-1).max())
        prompts = {key: part[key][:, -width:] for key in ("prompt_tokens", "prompt_mask")}
        found = function(part.copy().update(prompts))
        parts.append(found if isinstance(found, Tensor) else found.exclude(*part.keys()))
    return torch.cat(parts)[order.argsort()]


def last_index(mask: Tensor) -> Tensor:
    """Index [B] of the last real token of each row, whichever side is padded."""
    positions = torch.arange(mask.shape[-1], device=mask.device)
    return (positions * mask).amax(-1)


def backbone_of(model: nn.Module) -> nn.Module:
    """The trunk of a Hugging Face model: what maps tokens to hidden states, without any head."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    return getattr(inner, inner.base_model_prefix, inner)


@lru_cache
def _parameters_of(forward: Callable[..., Any]) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(forward).parameters)


def takes(model: nn.Module, name: str) -> bool:
    """Whether a module's ``forward``, beneath adapters, has a parameter of that name."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return name in _parameters_of(type(base).forward)


def without_cache(model: nn.Module) -> dict[str, Any]:
    """Arguments of a model's call in training: layers that are computed again would add to a cache twice."""
    return {"use_cache": False} if takes(model, "use_cache") else {}


def position_ids(mask: Tensor) -> Tensor:
    """Position ids [B, T] counted over real tokens alone, and 0 where masked: those of ``generate``."""
    return (mask.long().cumsum(-1) - 1).masked_fill(~mask, 0)


def takes_whole_mask(backbone: nn.Module) -> bool:
    """Whether a trunk takes a mask [B, 1, T, T] as it is, and so reads none to learn if it can do without.

    So do models of transformers that make their mask by its common function, for PyTorch's
    ``scaled_dot_product_attention``; not where layers have windows, and masks of their own.
    """
    config = getattr(backbone, "config", None)
    if config is None or text_config(config) is not config:
        return False
    kinds = set(getattr(config, "layer_types", None) or ())
    windowed = getattr(config, "sliding_window", None) or kinds - {"full_attention"}
    common = hasattr(sys.modules[type(backbone).__module__], "create_causal_mask")
    return config._attn_implementation == "sdpa" and common and not windowed


def causal_mask(mask: Tensor) -> Tensor:
    """What each of the tokens [B, T] may look at, itself and real ones before it: bool [B, 1, T, T]."""
    before = torch.ones(mask.shape[-1:] * 2, dtype=torch.bool, device=mask.device).tril()
    return mask[:, None, None, :] & before


def hidden_states(backbone: nn.Module, tokens: Tensor, mask: Tensor, whole_mask: bool = False) -> Tensor:
    """Run a trunk on padded tokens; hidden states [B, T, H].

    Args:
        backbone: the trunk.
        tokens: [B, T] int64.
        mask: [B, T] bool, True at real tokens.
        whole_mask: give attention its mask [B, 1, T, T] where it takes one, so that nothing waits for the
            device to say whether any token is masked.

    Position ids are counted over real tokens only, so that padding on either side leaves
    every real token where it would be without padding (absolute positions included). A trunk
    that takes none (ALiBi, recurrent ones) finds its positions in the mask, or has none.
    """
    inputs: dict[str, Any] = {"input_ids": tokens}
    taken = _parameters_of(type(backbone).forward)
    whole = whole_mask and takes_whole_mask(backbone)
    inputs["attention_mask"] = causal_mask(mask) if whole else mask.long()
    if "position_ids" in taken:
        inputs["position_ids"] = position_ids(mask)
    if "use_cache" in taken:
        inputs["use_cache"] = False
    return backbone(**inputs).last_hidden_state


def pack_left(tokens: Tensor, mask: Tensor, pad_id: int) -> tuple[Tensor, Tensor]:
    """Move the real tokens of each row to its left end, in their order, and ``pad_id`` behind them.

    Args:
        tokens: [B, T] int64.
        mask: [B, T] bool, True at real tokens, wherever they are.
        pad_id: what fills the rest.

    Returns:
        Tokens and mask, as wide as the longest row.

    Example:
        >>> mask = torch.tensor([[False, True, True], [False, True, False]])
        >>> pack_left(torch.tensor([[7, 1, 2], [7, 3, 7]]), mask, 0)[0].tolist()
        [[1, 2], [3, 0]]
    """
    order = mask.logical_not().int().argsort(dim=-1, stable=True)[:, : int(mask.sum(-1).max())]
    mask = mask.gather(-1, order)
    return tokens.gather(-1, order).masked_fill(~mask, pad_id), mask


def keep_last(mask: Tensor, length: int) -> Tensor:
    """Mask [B, T] of at most the last ``length`` real tokens of each row."""
    return mask & (mask.flip(-1).cumsum(-1).flip(-1) <= length)


def segment_ids(tokens: Tensor, mask: Tensor, separator: int) -> Tensor:
    """Segment ids [B, T] of one or two texts a row: 1 behind the first separator, 0 elsewhere."""
    ends = tokens == separator
    return ((ends.int().cumsum(-1) - ends.int() > 0) & mask).long()


def text_config(model: Any) -> Any:
    """The config of what reads and writes text: nested in another one where a model also sees images.

    Args:
        model: a Hugging Face model, or a config.
    """
    return getattr(model, "config", model).get_text_config(decoder=True)


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """A trial of a model: no gradients, and the caller's random numbers stay where they are."""
    devices = {parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"}
    with torch.no_grad(), torch.random.fork_rng(devices=list(devices)):
        yield


@contextmanager
def answering(name: str) -> Iterator[None]:
    """Whatever a model raises where it is given plain text, as one :class:`UserError`."""
    try:
        yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        words = next(iter(str(error).strip().splitlines()), "no more is known")
        raise UserError(
            f"{name} fails on padded text ({type(error).__name__}: {words}); use another language model"
        ) from error


def states_width(backbone: nn.Module) -> int:
    """Width H of a trunk's hidden states, which need not be that of its embeddings or of its layers."""
    device = next(backbone.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.int64, device=device)
    with undisturbed(backbone):
        return hidden_states(backbone, token, torch.ones_like(token, dtype=torch.bool)).shape[-1]


def max_positions(model: Any) -> int | None:
    """Tokens that a model has positions for; None where nothing limits them.

    Args:
        model: a Hugging Face model, or its config, which knows of all tables but RoBERTa's.
    """
    config = text_config(model)
    # MPT's table of biases is as long as its config's longest sequence
    names = ("max_position_embeddings", "max_seq_len")
    limits = [getattr(config, name, None) or 0 for name in names]
    if isinstance(model, nn.Module):
        for name, module in backbone_of(model).named_modules():
            # RoBERTa and its kin count positions from the padding index on
            if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
                limits.append(module.num_embeddings - module.padding_idx - 1)
    return min((limit for limit in limits if limit > 0), default=None)


def require_positions(model: Any, longest_prompt: int, response_length: int) -> None:
    """Raise :class:`UserError` where prompts and responses are longer than a policy has positions for.

    Args:
        model: the policy's language model, or its config.
        longest_prompt: tokens of the longest prompt, after truncation.
        response_length: most tokens of a response.
    """
    positions = max_positions(model)
    if positions is not None and longest_prompt + response_length > positions:
        raise UserError(
            f"the longest prompt has {longest_prompt} tokens and a response up to {response_length}, more "
            f"than the model's {positions} positions together; lower --max_prompt_length or --response_length"
        )


def predicting_states(backbone: nn.Module, tensordict: TensorDictBase) -> Tensor:
    """Hidden states [B, R, H] from which each response token is predicted.

    Reads ``prompt_tokens``, ``prompt_mask`` [B, P] (padded left) and ``action``,
    ``action_mask`` [B, R] (padded right). The state at column t has seen the prompt and
    the response up to t - 1. Columns after the longest response are zero. One wait for the device, none with
    the rows' :class:`~torchrl_maxmin.masks.RowLengths`.

    Raises:
        ValueError: for a prompt without tokens.
    """
    prompt, action = tensordict["prompt_tokens"], tensordict["action"]
    prompt_mask, action_mask = tensordict["prompt_mask"], tensordict["action_mask"]
    lengths = row_lengths(tensordict)
    if lengths.prompt.min() < 1:
        raise ValueError(NO_TOKENS)
    longest = max(int(lengths.response.max()), 1)
    tokens = torch.cat([prompt, action[:, : longest - 1]], -1)
    mask = torch.cat([prompt_mask, action_mask[:, : longest - 1]], -1)
    states = hidden_states(backbone, tokens, mask, whole_mask=True)
    return nn.functional.pad(states[:, prompt.shape[-1] - 1 :], (0, 0, 0, action.shape[-1] - longest))
