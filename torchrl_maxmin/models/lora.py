"""LoRA adapters (Hu et al., arXiv 2106.09685) on a Hugging Face model, by the peft library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.distributed import is_main_process
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.integrity import require_same_tensors
from torchrl_maxmin.models.loading import import_peft, import_transformers, quiet_peft, reading
from torchrl_maxmin.models.lora_products import compute_as_the_trunk
from torchrl_maxmin.models.sequences import backbone_of
from torchrl_maxmin.models.sharding import gathered_state

__all__ = [
    "AdapterSwitch",
    "LoraSettings",
    "add_adapters",
    "add_saved_adapter",
    "base_state",
    "copy_adapter_",
    "import_peft",
    "merged_state",
    "quiet_peft",
    "read_adapter",
    "require_adaptable",
    "save_policy",
    "write_adapter",
]


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


def add_adapters(
    trunk: nn.Module, names: Sequence[str], settings: LoraSettings, task_type: str | None = None
) -> Any:
    """Freeze a trunk and put new adapters on it, which change nothing yet; returns the peft model.

    Args:
        trunk: a Hugging Face model.
        names: of the adapters; the first is active.
        settings: their size and place.
        task_type: what peft's own loaders take the model for, such as ``CAUSAL_LM``.

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
            task_type=task_type,
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
    compute_as_the_trunk(model)
    model.set_requires_grad(list(names), True)
    return model.eval()


def add_saved_adapter(model: Any, name: str, folder: Path) -> None:
    """Put a saved adapter of a model's trunk beside the adapters that the model has, frozen.

    Args:
        model: the peft model of a language model.
        name: of the adapter from now on.
        folder: what peft wrote of an adapter of the trunk alone.

    Raises:
        UserError: for an adapter that is not of this trunk.
    """
    peft, base = import_peft(), model.get_base_model()
    trunk = backbone_of(base)
    path = next(path for path, module in base.named_modules() if module is trunk)
    with reading("adapter", str(folder)):
        config = peft.PeftConfig.from_pretrained(str(folder))
        state = peft.load_peft_weights(str(folder), device="cpu")
    config.inference_mode = True
    old, new = "base_model.model.", ".".join(["base_model.model", *([path] if path else []), ""])
    state = {new + key.removeprefix(old): weight for key, weight in state.items()}
    # new adapters are drawn at random before they are loaded
    with quiet_peft(), torch.random.fork_rng(devices=[]), reading("adapter", str(folder)):
        model.add_adapter(name, config)
    compute_as_the_trunk(model)
    require_same_tensors(state, read_adapter(model, name), "adapter", folder)
    write_adapter(model, name, state)


def require_adaptable(config: Any, settings: LoraSettings) -> None:
    """Raise :class:`UserError` where a trunk of this config cannot be adapted so, before it has weights."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        add_adapters(import_transformers().AutoModel.from_config(config), ["trial"], settings)


def base_state(model: Any, state_dict: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """The weights below the adapters, by their names without them.

    Args:
        model: the peft model.
        state_dict: the whole state of the model below it, where that is sharded.
    """
    state = model.get_base_model().state_dict() if state_dict is None else state_dict
    own = {name: weight for name, weight in state.items() if ".lora_" not in name}
    return {name.replace(".base_layer.", "."): weight for name, weight in own.items()}


def save_policy(model: Any, adapted: Any, folder: Path, *, merge: bool, adapter: str = "default") -> None:
    """Write a language model in the format of Hugging Face: plain, or its adapter alone as peft does.

    Either is a policy to this package; ``AutoModelForCausalLM`` and ``AutoPeftModelForCausalLM`` load both.

    Args:
        model: the language model.
        adapted: the peft model around it; None where it has no adapters.
        folder: where to.
        merge: whether the adapter is added to the weights.
        adapter: which one.
    """
    gathered = gathered_state(model)
    if not is_main_process():
        return
    if adapted is None:
        model.save_pretrained(folder, **gathered)
    elif merge:
        model.save_pretrained(folder, state_dict=merged_state(adapted, adapter, **gathered))
    else:
        config = adapted.peft_config[adapter]
        if Path(base := model.name_or_path).is_dir():
            config.base_model_name_or_path = str(Path(base).resolve())  # found from anywhere
        adapted.save_pretrained(str(folder), selected_adapters=[adapter], save_embedding_layers=False)


def merged_state(
    model: Any, adapter: str, state_dict: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """The weights of a plain model that computes what this one does with an adapter.

    Args:
        model: the peft model.
        adapter: which one.
        state_dict: as of :func:`base_state`.
    """
    state, layer = base_state(model, state_dict), import_peft().tuners.lora.LoraLayer
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, layer) and adapter in module.scaling:
            weight = state[f"{name}.weight"]
            delta = module.get_delta_weight(adapter).to(weight.device, torch.float32)
            state[f"{name}.weight"] = (weight.float() + delta).to(weight.dtype)
    return state


class AdapterSwitch:
    """Says which adapter of a model is at work, or that none is.

    peft freezes the adapters that are not active, and nothing frozen gets a gradient at backward; here they
    stay as trainable as they were. Dropout on the adapters' inputs works where gradients are taken, so that
    samples and scores come from one distribution.

    Args:
        model: a peft model.
        active: the adapter that is active to begin with.
    """

    def __init__(self, model: Any, active: str):
        self.model = model
        self.active: str | None = active
        self._find({p: p.requires_grad for name, p in model.named_parameters() if ".lora_" in name})

    def _find(self, trainable: dict[nn.Parameter, bool]) -> None:
        tuner = import_peft().tuners.tuners_utils.BaseTunerLayer
        self.layers = [module for module in self.model.modules() if isinstance(module, tuner)]
        self.trainable = trainable
        drops = (m for layer in self.layers for m in getattr(layer, "lora_dropout", {}).values())
        self.dropouts = [module for module in drops if isinstance(module, nn.Dropout)]
        self.apply()

    def include_new(self) -> None:
        """Take in adapters that were put on the model since; they are frozen, the others as they were."""
        present = [p for name, p in self.model.named_parameters() if ".lora_" in name]
        self._find({p: self.trainable.get(p, False) for p in present})

    def apply(self) -> None:
        """Make the active adapter active in every layer, whatever others did to them."""
        for layer in self.layers:
            if layer.disable_adapters != (self.active is None):
                layer.enable_adapters(self.active is not None)
            if self.active is not None:
                layer.set_adapter(self.active)
        for parameter, trainable in self.trainable.items():
            parameter.requires_grad_(trainable)

    def _set(self, adapter: str | None, dropout: bool) -> None:
        if adapter != self.active:
            self.active = adapter
            self.apply()
        for module in self.dropouts:
            module.train(dropout)

    @contextmanager
    def using(self, adapter: str | None, dropout: bool | None = None) -> Iterator[None]:
        """Put an adapter to work, or with None the model below all of them; afterwards all is as before.

        Args:
            adapter: its name.
            dropout: on its inputs; where gradients are taken when None.
        """
        before = self.active
        self._set(adapter, torch.is_grad_enabled() if dropout is None else dropout)
        try:
            yield
        finally:
            self._set(before, False)

    def snapshot(self) -> AbstractContextManager[None]:
        """What is at work now, to come back to it where a layer is recomputed at backward."""
        return self.using(self.active, any(module.training for module in self.dropouts))


def copy_adapter_(model: Any, source: str, target: str) -> None:
    """Copy one adapter's weights into another's."""
    write_adapter(model, target, read_adapter(model, source))


def read_adapter(model: Any, name: str) -> dict[str, Tensor]:
    """A copy of an adapter's weights, by peft's names."""
    state = import_peft().get_peft_model_state_dict(model, adapter_name=name, save_embedding_layers=False)
    return {key: value.detach().clone() for key, value in state.items()}


def write_adapter(model: Any, name: str, state: dict[str, Tensor]) -> None:
    """Load what :func:`read_adapter` gave."""
    import_peft().set_peft_model_state_dict(model, state, adapter_name=name)
