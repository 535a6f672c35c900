"""The networks of a stage as a plan knows them: shapes, adapters, what of them is trained."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from torchrl_maxmin.models.checkpointing import checkpoint_layers, layers_of
from torchrl_maxmin.models.dry_run import nbytes
from torchrl_maxmin.models.loading import load_config, reading
from torchrl_maxmin.models.lora import AdapterSwitch, LoraSettings, add_adapters
from torchrl_maxmin.models.memory import without_weights
from torchrl_maxmin.models.sequences import text_config
from torchrl_maxmin.models.weights import config_difference
from torchrl_maxmin.rewards.adapters import adapter_names

__all__ = ["Network", "Reader", "Size", "reward_reader", "size_of"]


@dataclass(frozen=True)
class Network:
    """A model that a stage holds, without its weights.

    Attributes:
        model_name_or_path: whose config it is of.
        kind: ``"policy"`` (a causal language model) or ``"trunk"``.
        dtype: of the weights below adapters.
        trained: whether it is trained: its adapters where it has some, else all of it.
        adapters: names of its LoRA adapters.
        active: the adapter that its passes go through, the others idle; None where each has its own pass.
        lora: size and place of the adapters.
        checkpointing: whether a backward pass computes every layer again.
    """

    model_name_or_path: str
    kind: str = "policy"
    dtype: torch.dtype = torch.float32
    trained: bool = False
    adapters: tuple[str, ...] = ()
    active: str | None = None
    lora: LoraSettings | None = None
    checkpointing: bool = False

    def build(self, config: Any) -> nn.Module:
        """Make it of a config, which may have fewer layers than its own."""
        model: Any = without_weights(config, self.kind, self.dtype).requires_grad_(self.trained)
        if self.adapters:
            model = add_adapters(model, self.adapters, self.lora or LoraSettings())
            switch = AdapterSwitch(model, self.active or self.adapters[0])
            for module in switch.dropouts:
                module.train()
            if self.checkpointing:
                checkpoint_layers(model, switch.snapshot)
        elif self.checkpointing:
            checkpoint_layers(model)
        return model

    def through(self, adapter: str) -> Network:
        """The same network with another adapter active."""
        return replace(self, active=adapter)


@dataclass(frozen=True)
class Size:
    """What a network weighs.

    Attributes:
        parameters: how many it has, the adapters' included; shared ones count once.
        weights: bytes of all that is no adapter.
        adapters: bytes of an adapter.
        trained: parameters that are trained, of all adapters.
        gradients: bytes of their gradients, in the dtype of each.
        largest: elements of the largest parameter that is trained.
        embeddings: bytes of the input embeddings.
        half: trained parameters in half precision, of which the optimizer has float32 copies.
        tensors: how many tensors are trained.
        layers: how many it has; 0 for heads.
        root: bytes of all that is no adapter and in no layer.
        adapted: bytes of the weights that an adapter is added to.
    """

    parameters: int
    weights: int
    adapters: int
    trained: int
    gradients: int
    largest: int
    embeddings: int = 0
    half: int = 0
    tensors: int = 0
    layers: int = 0
    root: int = 0
    adapted: int = 0

    @classmethod
    def of_heads(cls, elements: int, tensors: int = 2) -> Size:
        """That of trained heads in float32: weights and biases, or with one tensor weights alone."""
        return cls(elements, 4 * elements, 0, elements, 4 * elements, elements, tensors=tensors)


def size_of(network: Network) -> Size:
    """Measure a network on the meta device: parameters to the last one, and no memory."""
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        model: Any = network.build(load_config(network.model_name_or_path))
        if network.adapters:
            model.set_requires_grad(list(network.adapters), network.trained)
    # tied weights are one parameter on the meta device too
    own = [p for name, p in model.named_parameters() if ".lora_" not in name] + list(model.buffers())
    trained = [p for p in model.parameters() if p.requires_grad]
    added = [p for name, p in model.named_parameters() if ".lora_" in name]
    layers = layers_of(model)
    inside = {id(p) for layer in layers for p in layer.parameters()}
    return Size(
        parameters=sum(p.numel() for p in model.parameters()),
        weights=nbytes(own),
        adapters=sum(p.nbytes for p in added) // max(len(network.adapters), 1),
        trained=sum(p.numel() for p in trained),
        gradients=sum(p.nbytes for p in trained),
        largest=max((p.numel() for p in trained), default=0),
        embeddings=model.get_input_embeddings().weight.nbytes,
        half=sum(p.numel() for p in trained if p.itemsize == 2),
        tensors=len(trained),
        layers=len(layers),
        root=nbytes([p for p in own if id(p) not in inside]),
        adapted=sum(p.nbytes for name, p in model.named_parameters() if ".base_layer.weight" in name),
    )


@dataclass(frozen=True)
class Reader:
    """What reads the rewards.

    Attributes:
        network: its trunk, without adapters.
        passes: how often it reads a text.
        added: bytes of what is on the trunk.
        shared: whether the trunk is the policy's own, and weighs nothing more.
    """

    network: Network
    passes: int = 1
    added: int = 0
    shared: bool = False


def reward_reader(folder: str | None, reference: Network, lora: LoraSettings | None, groups: int) -> Reader:
    """The reward model of a run of PPO.

    A saved mixture with adapters left its trunk as it was: where its config is the policy's it counts as on
    the policy's trunk. The run compares their weights, of which a plan reads none.

    Args:
        folder: what the reward stage wrote, or another sequence classifier; None for what that stage makes of
            the policy's model.
        reference: the policy without its adapters.
        lora: of the adapters where the policy's trunk is frozen and may be shared; None where it may not.
        groups: K, of a reward model that is not there yet.

    Raises:
        UserError: for a folder without a config.
    """
    own = replace(reference, kind="trunk")
    if folder is None and lora is None:
        return Reader(Network(own.model_name_or_path, "trunk"))
    if folder is None:  # an adapter and a head a group, the defaults of the reward stage
        names = adapter_names("per_group", groups)
        size = size_of(replace(own, adapters=tuple(names), lora=lora))
        width = text_config(load_config(own.model_name_or_path)).hidden_size
        return Reader(own, groups, groups * (size.adapters + Size.of_heads(width).weights), True)
    load_config(folder)
    extra, state = Path(folder) / "mixture.json", {}
    if extra.is_file():
        with reading("mixture.json", folder):
            state = json.loads(extra.read_text())
    form = state.get("heads", {})
    passes = form["num_groups"] if form.get("adapters") == "per_group" else 1
    files: Sequence[Path] = [*Path(folder).glob("adapters/*/*.safetensors"), *Path(folder).glob("heads.*")]
    added, base = sum(file.stat().st_size for file in files), form.get("base") or folder
    frozen = lora is not None and form.get("adapters") and Path(base).is_dir()
    if frozen and config_difference(Path(base), load_config(own.model_name_or_path)) is None:
        return Reader(own, passes, added, True)
    dtype = getattr(torch, form.get("dtype") or state.get("dtype", "float32"))
    return Reader(Network(base, "trunk", dtype), passes, added)
