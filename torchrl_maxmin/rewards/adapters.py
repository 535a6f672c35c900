"""LoRA adapters on one trunk: one that all groups share, or one for every group."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.loading import import_transformers, reading

ADAPTERS = ("per_group", "shared")
_FOLDER = "adapters"


def import_peft() -> Any:
    """The peft package; raises :class:`UserError` where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("LoRA adapters need peft: pip install 'torchrl-maxmin[llm]'") from error
    return peft


@dataclass(frozen=True)
class LoraSettings:
    """Size and place of LoRA adapters (Hu et al., arXiv 2106.09685).

    Attributes:
        r: rank.
        alpha: scale; updates are multiplied by ``alpha / r``.
        dropout: on the adapters' inputs, while the model is in training mode.
        target_modules: names of the layers, or ``"all-linear"``; when None peft's choice for the
            architecture, and all linear layers where peft has none.
    """

    r: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: Sequence[str] | str | None = None


def adapter_names(adapters: str, num_groups: int) -> list[str]:
    """Names of the adapters, which are also the names of their folders."""
    if adapters not in ADAPTERS:
        raise UserError(f"adapters {adapters!r} is none of {', '.join(ADAPTERS)}")
    return ["shared"] if adapters == "shared" else [f"group_{k}" for k in range(num_groups)]


def add_adapters(trunk: nn.Module, names: Sequence[str], settings: LoraSettings) -> Any:
    """Freeze a trunk and put new adapters on it, which change nothing yet; returns the peft model.

    Raises:
        UserError: without peft, for settings that it refuses, or an unknown architecture
            without ``target_modules``.
    """
    conv = import_transformers().pytorch_utils.Conv1D  # GPT-2's linear layers are stored transposed
    transposed = any(isinstance(module, conv) for module in trunk.modules())
    peft = import_peft()
    targets = settings.target_modules
    if targets is not None and not isinstance(targets, str):
        targets = "all-linear" if list(targets) == ["all-linear"] else list(targets)  # as a flag gives it

    def adapted(target_modules: Sequence[str] | str | None) -> Any:
        config = peft.LoraConfig(
            r=settings.r,
            lora_alpha=settings.alpha,
            lora_dropout=settings.dropout,
            target_modules=target_modules,
            fan_in_fan_out=transposed,
        )
        with quiet_peft():
            model = peft.get_peft_model(trunk, config, adapter_name=names[0])
            for name in names[1:]:
                model.add_adapter(name, config)
        return model

    try:
        try:
            model = adapted(targets)
        except ValueError:
            if targets is not None:
                raise
            model = adapted("all-linear")
    except ValueError as error:
        raise UserError(
            f"peft cannot adapt {type(trunk).__name__}: {error}; check lora_r, and name the layers "
            "to adapt by lora_target_modules"
        ) from error
    model.set_requires_grad(list(names), True)
    return model.eval()


def require_adaptable(config: Any, settings: LoraSettings) -> None:
    """Raise :class:`UserError` where a trunk of this config cannot be adapted so, before it has weights."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        add_adapters(import_transformers().AutoModel.from_config(config), ["trial"], settings)


def load_adapters(trunk: nn.Module, folder: Path, names: Sequence[str]) -> Any:
    """Put saved adapters on a trunk, trainable; returns the peft model."""
    peft = import_peft()
    missing = [name for name in names if not (folder / _FOLDER / name / "adapter_config.json").is_file()]
    if missing:
        raise UserError(f"{folder} lacks the adapters {', '.join(missing)}, so it would score without them")
    first, *others = ({"model_id": str(folder / _FOLDER / name), "adapter_name": name} for name in names)
    with quiet_peft(), reading("adapters", str(folder)):
        model = peft.PeftModel.from_pretrained(trunk, is_trainable=True, **first)
        for other in others:
            model.load_adapter(is_trainable=True, **other)
    model.set_requires_grad(list(names), True)
    return model.eval()


def save_adapters(model: Any, folder: Path, names: Sequence[str]) -> None:
    """Write each adapter as a peft folder of its own."""
    # not the embeddings, which peft adds where a pad token made them longer: its row is never read
    model.save_pretrained(str(folder / _FOLDER), selected_adapters=list(names), save_embedding_layers=False)


def save_base(model: Any, folder: Path) -> None:
    """Write the trunk below the adapters, as it was without them."""
    base = model.get_base_model()
    own = {name: value for name, value in base.state_dict().items() if ".lora_" not in name}
    state = {name.replace(".base_layer.", "."): value for name, value in own.items()}
    base.save_pretrained(folder, state_dict=state)


def each_adapter(model: Any, names: Sequence[str]) -> Iterator[str]:
    """Make each adapter the active one in turn; afterwards all require gradients as they did before."""
    parameters = [p for name, p in model.named_parameters() if ".lora_" in name]
    trainable = [p.requires_grad for p in parameters]
    for name in names:
        # peft freezes the adapters that are not active, and nothing frozen gets a gradient at backward
        model.set_adapter(name)
        for parameter, flag in zip(parameters, trainable, strict=True):
            parameter.requires_grad_(flag)
        yield name


def copy_adapter_(model: Any, source: str, target: str) -> None:
    """Copy one adapter's weights into another's."""
    _write(model, target, _read(model, source))


def permute_adapters_(model: Any, names: Sequence[str], order: Sequence[int]) -> None:
    """Put the weights of adapter ``order[k]`` into adapter k."""
    states = [_read(model, name) for name in names]
    for name, source in zip(names, order, strict=True):
        _write(model, name, states[source])


def set_adapter_dropout(model: Any, mode: bool) -> None:
    """Switch the adapters' dropout alone."""
    for name, module in model.named_modules():
        if name.endswith(".lora_dropout"):
            module.train(mode)


@contextmanager
def quiet_peft() -> Iterator[None]:
    """Without the warning that peft calls transformers by a name of its past."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def _read(model: Any, name: str) -> dict[str, Tensor]:
    state = import_peft().get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().clone() for key, value in state.items()}


def _write(model: Any, name: str, state: dict[str, Tensor]) -> None:
    import_peft().set_peft_model_state_dict(model, state, adapter_name=name)
