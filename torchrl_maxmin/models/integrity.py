"""Whether the weights of a model are whole: none missing, none left over, none NaN, no file damaged."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.finite import nonfinite_tensors

__all__ = [
    "damaged_file",
    "listed",
    "require_all_weights",
    "require_finite_weights",
    "require_same_tensors",
    "require_whole_adapter",
]

_SHOWN = 3
#: tensors of old files that a model computes itself today: masks, positions, frequencies of rotations
_BUFFERS = re.compile(
    r"(^|\.)((\w*attn|\w*attention)\.(masked_)?bias|position_ids|token_type_ids|\w*inv_freq|num_batches_tracked)$"
)


def listed(names: Collection[str]) -> str:
    """The first few names, and how many more there are.

    Example:
        >>> listed(["a", "b", "c", "d", "e"])
        'a, b, c and 2 more'
    """
    first = sorted(names)[:_SHOWN]
    rest = len(names) - len(first)
    return ", ".join(first) + (f" and {rest} more" if rest else "")


def require_all_weights(
    model: Any,
    loaded: Mapping[str, Any],
    name_or_path: str,
    *,
    fresh: tuple[str, ...] = (),
    unread: tuple[str, ...] = (),
    foreign_heads: bool = False,
) -> None:
    """Raise :class:`UserError` unless the weights of a model's files are its own, and all are finite.

    Args:
        model: as ``from_pretrained`` of transformers loaded it.
        loaded: what it gave for ``output_loading_info``; tied weights are no missing ones.
        name_or_path: of the model, for the message.
        fresh: beginnings of names that may be missing, because they are trained from scratch or never read.
        unread: beginnings of names that the files may hold beside the model's own.
        foreign_heads: whether they may hold any head that is none of this model, as those of a language model
            do for a trunk.

    Raises:
        UserError: naming the first few weights, and how many there are.
    """
    missing = {key for key in loaded["missing_keys"] if not (fresh and key.startswith(fresh))}
    if missing:
        raise UserError(
            f"{name_or_path} lacks {len(missing)} of the weights of its {type(model).__name__}, which would "
            f"be drawn at random: {listed(missing)}; save or download it again"
        )
    extra = {key for key in loaded["unexpected_keys"] if _BUFFERS.search(key) is None}
    extra = {key for key in extra if not (unread and key.startswith(unread))}
    if foreign_heads:
        extra = {key for key in extra if _is_of(model, key)}
    if extra:
        raise UserError(
            f"{name_or_path} holds {len(extra)} weights that its {type(model).__name__} has no place for: "
            f"{listed(extra)}; its config.json is of another model or damaged, or it is no such model"
        )
    require_finite_weights(model.named_parameters(), name_or_path)


def _is_of(model: Any, key: str) -> bool:
    """Whether a weight's name lies in a trunk, with or without the trunk's own name before it."""
    prefix = f"{model.base_model_prefix}."
    own = {name for name, _ in model.named_children()} | {name.split(".")[0] for name in model.state_dict()}
    return key.startswith(prefix) or key.split(".")[0] in own


def require_finite_weights(named: Iterable[tuple[str, Tensor]], name_or_path: str) -> None:
    """Raise :class:`UserError` where a weight that was read is NaN or infinite.

    Example:
        >>> import torch
        >>> require_finite_weights([("a", torch.ones(2))], "runs/sft")
    """
    if found := nonfinite_tensors(named):
        raise UserError(
            f"{len(found)} weights of {name_or_path} hold NaN or infinity: {listed(found)}; the run that "
            "wrote it diverged, or a file is damaged: train or download it again"
        )


def require_same_tensors(
    found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], what: str, folder: str | Path
) -> None:
    """Raise :class:`UserError` unless saved tensors are those that a module needs, in names and shapes.

    Args:
        found: what was read.
        wanted: the module's own, of which only the shapes are asked.
        what: words for the module, such as ``adapter``.
        folder: where it was read.
    """
    if lacking := wanted.keys() - found.keys():
        raise UserError(
            f"the {what} in {folder} lacks {len(lacking)} of its weights, which would be drawn at random: "
            f"{listed(lacking)}; it is of another model, or damaged"
        )
    if extra := found.keys() - wanted.keys():
        raise UserError(
            f"the {what} in {folder} holds {len(extra)} weights that the model has no place for: "
            f"{listed(extra)}; it is of another model, or damaged"
        )
    apart = [key for key, value in wanted.items() if value.shape != found[key].shape]
    if apart:
        first = min(apart)
        raise UserError(
            f"the {what} in {folder} is of a model of another size: {len(apart)} weights differ, {first} "
            f"is {list(found[first].shape)} and the model's {list(wanted[first].shape)}"
        )
    require_finite_weights(found.items(), f"the {what} in {folder}")


def require_whole_adapter(model: Any, name: str, folder: str | Path, *, is_trainable: bool = False) -> None:
    """Raise :class:`UserError` unless a folder holds the weights of an adapter, all of them and no other.

    Args:
        model: the peft model.
        name: of the adapter.
        folder: what peft wrote.
        is_trainable: as it was loaded.
    """
    # once more, small as it is: peft says what was missing to those alone who add a second adapter
    loaded = model.load_adapter(str(folder), adapter_name=name, is_trainable=is_trainable)
    for keys, words in ((loaded.missing_keys, "lacks"), (loaded.unexpected_keys, "holds")):
        if keys:
            end = ", which would be as new" if words == "lacks" else " that the model has no place for"
            raise UserError(
                f"the adapter in {folder} {words} {len(keys)} weights{end}: {listed(keys)}; it is of another "
                "model, or damaged"
            )
    own = [(key, p) for key, p in model.named_parameters() if f".{name}" in key]
    require_finite_weights(own, f"the adapter in {folder}")


def damaged_file(folder: str | Path) -> Path | None:
    """The first safetensors file of a model's folder that cannot be opened: cut short or damaged."""
    from safetensors import SafetensorError, safe_open

    for path in [*Path(folder).glob("*.safetensors"), *Path(folder).glob("adapters/*/*.safetensors")]:
        try:
            with safe_open(path, framework="pt"):
                pass
        except (SafetensorError, OSError, ValueError):
            return path
    return None
