"""Policy, reference and critic of a language model on one trunk, told apart by LoRA adapters."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.distributed import is_main_process
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.checkpointing import checkpoint_layers
from torchrl_maxmin.models.full import LanguageNetworks, TokenCritic, ValueHeads, heads_on_policy
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.lora import (
    AdapterSwitch,
    LoraSettings,
    add_adapters,
    add_saved_adapter,
    merged_state,
    read_adapter,
    save_policy,
    write_adapter,
)
from torchrl_maxmin.models.output_head import read_in_one_piece
from torchrl_maxmin.models.sequences import backbone_of, predicting_states, states_width
from torchrl_maxmin.models.sharding import gather_while_sampling, shard
from torchrl_maxmin.models.weights import weights_as_saved

__all__ = ["SharedTrunk"]

#: adapters by role; peft saves the one that it calls default in the folder itself
_ADAPTERS = {"policy": "default", "critic": "critic"}


class SharedTrunk(LanguageNetworks):
    """One frozen trunk: the policy is it with an adapter, the reference it without, the critic with another.

    Adapters and value heads are float32 whatever the trunk is. A new adapter changes nothing, so that the
    policy starts as the reference to the bit.

    Args:
        reference: the policy to start from; its model is adapted in place and frozen.
        tokenizer: theirs.
        num_columns: value heads of the critic; with 0 there is none.
        lora: the adapters.
        critic: ``adapter`` of its own, ``heads`` on the policy's states
            (:func:`~torchrl_maxmin.models.full.heads_on_policy`) or ``full``, a copy of the trunk that is
            trained whole.
        gradient_checkpointing: whether layers are computed again at backward, in place of being kept.
        sharded: whether each of the processes that work as one holds a part of the trunk, but for the output
            embeddings; adapters and value heads are copies in any case.
        merge: whether :meth:`save` adds the adapter to the weights.
        **options: those of :class:`~torchrl_maxmin.models.full.LanguageNetworks`.

    Attributes:
        switch: says which adapter is at work.

    Raises:
        UserError: for settings that peft refuses, or an adapter on the output embeddings.
    """

    def __init__(
        self,
        reference: TokenPolicy,
        tokenizer: Any,
        num_columns: int,
        *,
        lora: LoraSettings,
        critic: str = "adapter",
        gradient_checkpointing: bool = False,
        sharded: bool = False,
        merge: bool = True,
        **options: Any,
    ):
        model, device = reference.model, next(reference.parameters()).device
        own_critic = copy.deepcopy(backbone_of(model)) if num_columns and critic == "full" else None
        with_adapter = bool(num_columns) and critic == "adapter"
        names = list(_ADAPTERS.values())[: 1 + with_adapter]
        self.adapted = add_adapters(model, names, lora, task_type="CAUSAL_LM")
        if any("lora_" in name for name, _ in model.get_output_embeddings().named_parameters()):
            raise UserError(
                "--lora_target_modules names the output embeddings, whose log-probabilities are taken from "
                "their weights alone; leave them out (all-linear does)"
            )
        read_in_one_piece(model.get_output_embeddings())
        self.adapters = names
        self.switch, self.merge = AdapterSwitch(self.adapted, names[0]), merge
        if sharded:
            gather_while_sampling(reference)  # the policy, a copy, has the same hooks
        policy = copy.copy(reference)
        policy.within = partial(self.switch.using, names[0])
        reference.within = partial(self.switch.using, None)
        values: ValueHeads | None = None
        if with_adapter:
            trunk = backbone_of(model)  # not a module of the critic: it is the policy's too
            values = ValueHeads(partial(predicting_states, trunk), states_width(trunk), num_columns).to(
                device
            )
            values.within = partial(self.switch.using, _ADAPTERS["critic"])
        elif num_columns and critic == "heads":
            values = heads_on_policy(policy, num_columns)
        elif own_critic is not None:
            values = TokenCritic(own_critic, num_columns).to(device)
        if gradient_checkpointing:
            checkpoint_layers(model, self.switch.snapshot)
            if own_critic is not None:
                checkpoint_layers(own_critic)
        if sharded:
            # the root is what all roles call; the log-probabilities read the output embeddings outside of it
            shard(backbone_of(model), whole=model.get_output_embeddings().parameters())
            if own_critic is not None:
                shard(own_critic)
        super().__init__(policy, reference, values, tokenizer, **options)

    def add_frozen_adapters(self, folders: Mapping[str, Path]) -> None:
        """Put saved adapters of the trunk beside the policy's; no role is trained by them or saved with them.

        Args:
            folders: what peft wrote, by the name that :attr:`switch` shall know it by.

        Raises:
            UserError: for an adapter of another trunk.
        """
        for name, folder in folders.items():
            add_saved_adapter(self.adapted, name, folder)
        self.switch.include_new()

    @property
    def roles(self) -> dict[str, nn.Module]:
        """What is trained beside the adapters, by role."""
        return {} if self.critic is None else {"critic": self.critic}

    def parameters(self) -> dict[str, list[nn.Parameter]]:
        """The parameters that are trained, by role: the policy's adapter; the critic's, and its heads."""
        found = [(name.split("."), p) for name, p in self.adapted.named_parameters() if p.requires_grad]
        own = {role: [p for path, p in found if name in path] for role, name in _ADAPTERS.items()}
        if self.critic is None:
            own.pop("critic")
        else:
            own["critic"] += [p for p in self.critic.parameters() if p.requires_grad]
        return own

    def state_dict(self) -> dict[str, Any]:
        """The state of every trained part, by role; the trunk is where it came from."""
        adapters = {name: read_adapter(self.adapted, name) for name in self.adapters}
        return {"adapters": adapters} | {role: m.state_dict() for role, m in self.roles.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` returned."""
        super().load_state_dict(state)
        for name in self.adapters:
            write_adapter(self.adapted, name, state["adapters"][name])

    @torch.no_grad()
    def policy_weights(self) -> dict[str, Tensor]:
        """The policy as a plain model: the trunk with its adapter added, by the names of a saved model."""
        return weights_as_saved(self.policy.model, merged_state(self.adapted, _ADAPTERS["policy"]))

    def save(self, folder: Path) -> None:
        """Write the policy and its tokenizer, see :func:`~torchrl_maxmin.models.lora.save_policy`."""
        save_policy(self.policy.model, self.adapted, folder, merge=self.merge)
        if is_main_process():
            self.tokenizer.save_pretrained(folder)
