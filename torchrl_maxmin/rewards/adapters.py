"""LoRA adapters of a reward mixture: one that all groups share, or one for every group."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.integrity import require_whole_adapter
from torchrl_maxmin.models.loading import reading
from torchrl_maxmin.models.lora import base_state, import_peft, quiet_peft, read_adapter, write_adapter
from torchrl_maxmin.models.lora_products import compute_as_the_trunk

ADAPTERS = ("per_group", "shared")
_FOLDER, _CONFIG = "adapters", "adapter_config.json"


def adapter_names(adapters: str, num_groups: int) -> list[str]:
    """Names of the adapters, which are also the names of their folders."""
    if adapters not in ADAPTERS:
        raise UserError(f"adapters {adapters!r} is none of {', '.join(ADAPTERS)}")
    return ["shared"] if adapters == "shared" else [f"group_{k}" for k in range(num_groups)]


def adapter_folder(folder: Path, name: str) -> Path:
    """Where a mixture's folder keeps an adapter."""
    return folder / _FOLDER / name


def require_adapters(folder: Path, names: Sequence[str]) -> None:
    """Raise :class:`UserError` for a mixture's folder that lacks some of its adapters."""
    missing = [name for name in names if not (adapter_folder(folder, name) / _CONFIG).is_file()]
    if missing:
        raise UserError(f"{folder} lacks the adapters {', '.join(missing)}, so it would score without them")


def read_targets(folder: Path, name: str) -> Sequence[str] | str:
    """The layers of a saved adapter: their names, or a pattern of them."""
    with reading("adapter", str(folder)):
        return json.loads((adapter_folder(folder, name) / _CONFIG).read_text())["target_modules"]


def load_adapters(trunk: nn.Module, folder: Path, names: Sequence[str]) -> Any:
    """Put saved adapters on a trunk, trainable; returns the peft model."""
    peft = import_peft()
    require_adapters(folder, names)
    first, *others = ({"model_id": str(adapter_folder(folder, name)), "adapter_name": name} for name in names)
    with quiet_peft(), reading("adapters", str(folder)):
        model = peft.PeftModel.from_pretrained(trunk, is_trainable=True, **first)
        for other in others:
            model.load_adapter(is_trainable=True, **other)
        for name in names:
            require_whole_adapter(model, name, adapter_folder(folder, name), is_trainable=True)
    compute_as_the_trunk(model)
    model.set_requires_grad(list(names), True)
    return model.eval()


def save_adapters(model: Any, folder: Path, names: Sequence[str]) -> None:
    """Write each adapter as a peft folder of its own."""
    # not the embeddings, which peft adds where a pad token made them longer: its row is never read
    model.save_pretrained(str(folder / _FOLDER), selected_adapters=list(names), save_embedding_layers=False)


def permute_adapters_(model: Any, names: Sequence[str], order: Sequence[int]) -> None:
    """Put the weights of adapter ``order[k]`` into adapter k."""
    states = [read_adapter(model, name) for name in names]
    for name, source in zip(names, order, strict=True):
        write_adapter(model, name, states[source])


def save_base(model: Any, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Write the trunk below the adapters, as it was without them.

    Args:
        model: the peft model.
        folder: where to.
        state_dict: as of :func:`~torchrl_maxmin.models.lora.base_state`.
    """
    base, state = model.get_base_model(), base_state(model, state_dict)
    quantizer = getattr(base, "hf_quantizer", None)
    if quantizer is not None:  # transformers would save what it finds in place of this state
        base.hf_quantizer = None
    try:
        base.save_pretrained(folder, state_dict=state)
    finally:
        if quantizer is not None:
            base.hf_quantizer = quantizer
