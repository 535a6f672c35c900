"""Weights on disk against those of a model in memory, one tensor at a time."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.models.loading import import_transformers, load_config, reading
from torchrl_maxmin.models.sequences import backbone_of

__all__ = ["config_difference", "read_weight", "saved_weights", "weights_as_saved", "weights_difference"]

_ONE, _INDEX = "model.safetensors", "model.safetensors.index.json"
#: entries of a config that do not change the hidden states of a text
_APART = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "use_cache"),
    *("id2label", "label2id", "num_labels", "problem_type", "vocab_size", "tie_word_embeddings"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
}


def saved_weights(folder: Path) -> dict[str, Path]:
    """The file of every tensor that a folder of ``save_pretrained`` holds; empty without safetensors."""
    from safetensors import safe_open

    with reading("weights", str(folder)):
        if (folder / _INDEX).is_file():
            index = json.loads((folder / _INDEX).read_text())["weight_map"]
            return {key: folder / name for key, name in index.items()}
        if not (folder / _ONE).is_file():
            return {}
        with safe_open(folder / _ONE, framework="pt") as file:
            return dict.fromkeys(file.keys(), folder / _ONE)


def read_weight(file: Path, key: str) -> Tensor:
    """One tensor of a safetensors file."""
    from safetensors import safe_open

    with reading("weights", str(file.parent)), safe_open(file, framework="pt") as opened:
        return opened.get_tensor(key)


def config_difference(folder: Path, config: Any) -> str | None:
    """Name an entry of a saved model's config that is another in this one, and may change hidden states."""

    def read(entry: Any) -> Any:
        if not isinstance(entry, Mapping):
            return entry
        return {key: read(value) for key, value in entry.items() if key not in _APART}

    saved = json.loads(json.dumps(read(load_config(str(folder)).to_dict()), default=str))
    own = json.loads(json.dumps(read(config.to_dict()), default=str))
    return next((key for key in sorted({*saved, *own}) if saved.get(key) != own.get(key)), None)


def weights_difference(folder: Path, model: Any, rows: int, padding: Collection[int] = ()) -> str | None:
    """Say what of a saved model's trunk is not, bit for bit in this model's dtype, that of this model.

    Tensors are read and compared one by one, so that there is never a second trunk.

    Args:
        folder: what ``save_pretrained`` wrote of a trunk or of a model around one.
        model: a Hugging Face model without adapters.
        rows: of the saved embeddings; this model may have more.
        padding: tokens that no text holds, whose rows were drawn at random and are not compared.

    Returns:
        Words on the first difference, or None.
    """
    trunk: nn.Module = backbone_of(model)
    embeddings = model.get_input_embeddings().weight
    saved, prefix = saved_weights(folder), f"{model.base_model_prefix}."
    for name, weight in trunk.state_dict(keep_vars=True).items():
        key = next((key for key in (name, prefix + name) if key in saved), None)
        if key is None:
            return f"{folder} has no tensor {name!r} to compare"
        found = read_weight(saved[key], key)
        own = weight.detach()
        if weight is embeddings and len(own) >= rows == len(found):
            kept = torch.tensor([row for row in range(rows) if row not in padding])
            own, found = own[kept.to(own.device)], found[kept]
        if own.shape != found.shape or not torch.equal(found.to(own.device, own.dtype), own):
            return f"{name} differs"
    return None


def weights_as_saved(model: Any, state: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights of a model as ``save_pretrained`` names and cuts them, tied ones once; few are copied.

    Args:
        model: a Hugging Face model.
        state: its weights by the names that they have in the model without adapters; by default its own.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=16, n_layer=1, n_head=2))
        >>> weights = weights_as_saved(model)
        >>> "transformer.wte.weight" in weights, "lm_head.weight" in weights
        (True, False)
    """
    state = model.state_dict() if state is None else state
    first = {name.replace(".base_layer.", ".") for name, _ in model.named_parameters()}
    first |= {name for name, _ in model.named_buffers()}
    own = {name: weight.detach() for name, weight in state.items() if name in first}
    import_transformers()
    # some architectures hold in one tensor what their files hold in many
    from transformers.core_model_loading import revert_weight_conversion

    return revert_weight_conversion(model, own)
