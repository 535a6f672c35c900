"""Policy, reference and critic of a language model: what every kind has, and whole copies of the network."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from torch import Tensor, nn

from torchrl_maxmin.core.distributed import is_main_process, over_ranks
from torchrl_maxmin.models.checkpointing import checkpoint_layers
from torchrl_maxmin.models.checks import check_first_rollout
from torchrl_maxmin.models.language import SCORED, TokenPolicy, TokenScorer
from torchrl_maxmin.models.lora import save_policy
from torchrl_maxmin.models.networks import Networks
from torchrl_maxmin.models.output_head import read_in_one_piece
from torchrl_maxmin.models.sequences import backbone_of, in_length_buckets, predicting_states, states_width
from torchrl_maxmin.models.sharding import shard, shard_policy, whole_weights
from torchrl_maxmin.models.weights import weights_as_saved

__all__ = ["FullCopies", "LanguageNetworks", "TokenCritic", "ValueHeads", "heads_on_policy"]


class ValueHeads(TensorDictModuleBase):
    """One value head a group, and one for the KL penalty where there is one, on hidden states.

    Group weights move every iteration and the value of a group does not, so heads of their
    own keep every group's advantage valid whatever the weights are.

    Args:
        states: gives hidden states [B, R, width] of a tensordict, as :func:`predicting_states` does.
        width: of the hidden states, H.
        num_columns: value heads; groups, plus one for the KL column.
        backbone: the trunk that gives the states, where it is the critic's own.

    Reads what :func:`predicting_states` reads; writes ``state_value`` [B, R, num_columns] fp32.
    """

    def __init__(
        self,
        states: Callable[[TensorDictBase], Tensor],
        width: int,
        num_columns: int,
        backbone: nn.Module | None = None,
    ):
        super().__init__()
        if backbone is not None:
            self.backbone = backbone  # before the heads: norms are summed in the order of the parameters
        self.in_keys = list(SCORED)
        self.out_keys = ["state_value"]
        self.states = states
        self.within: Callable[[], AbstractContextManager[Any]] = nullcontext  # as of TokenPolicy
        # drawing nothing: a run's random numbers do not depend on the number of groups
        self.head = nn.utils.skip_init(nn.Linear, width, num_columns)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write ``state_value`` [B, R, num_columns]."""
        with self.within():
            states = self.states(tensordict)
        tensordict["state_value"] = self.head(states.to(self.head.weight.dtype)).float()
        return tensordict


class TokenCritic(ValueHeads):
    """A trunk with value heads, see :class:`ValueHeads`.

    Args:
        backbone: a Hugging Face trunk of its own (not shared with the policy).
        num_columns: value heads; groups, plus one for the KL column.
    """

    def __init__(self, backbone: nn.Module, num_columns: int):
        states = partial(predicting_states, backbone)
        super().__init__(states, states_width(backbone), num_columns, backbone)


class LanguageNetworks(Networks):
    """A policy, its reference and a critic, whatever they share.

    Args:
        policy: is trained.
        reference: what it started from; never changes.
        critic: gives the values of every token; None where advantages need none.
        tokenizer: theirs.
        entropy: whether :attr:`actor` also writes the entropy.
        scoring_batch_size: rows that are read at once where no gradient is taken.
        autocast: whether all compute in bfloat16, with weights as they are.
    """

    policy: TokenPolicy

    def __init__(
        self,
        policy: TokenPolicy,
        reference: TokenPolicy,
        critic: nn.Module | None,
        tokenizer: Any,
        *,
        entropy: bool = False,
        scoring_batch_size: int = 512,
        autocast: bool = False,
    ):
        super().__init__(policy, critic, TokenScorer(policy, entropy))
        self.reference = reference
        self.tokenizer, self.scoring_batch_size = tokenizer, scoring_batch_size
        if autocast:
            device = next(policy.parameters()).device.type
            for part in dict.fromkeys((policy, reference, *([] if critic is None else [critic]))):
                part.within = partial(_both, partial(torch.autocast, device, torch.bfloat16), part.within)
            policy.compute_dtype = reference.compute_dtype = torch.bfloat16

    @torch.no_grad()
    def log_prob(self, responses: TensorDictBase) -> Tensor:
        """Log-probabilities [B, R] of the tokens under the policy."""
        return self._in_buckets(self.policy.log_prob, responses)

    @torch.no_grad()
    def ref_log_prob(self, responses: TensorDictBase) -> Tensor:
        """Log-probabilities [B, R] of the tokens under the reference."""
        return self._in_buckets(self.reference.log_prob, responses)

    @torch.no_grad()
    def values(self, responses: TensorDictBase) -> Tensor:
        """Values [B, R, num_columns] of the tokens, where there is a critic."""
        assert self.critic is not None
        critic = self.critic
        return self._in_buckets(lambda part: critic(part)["state_value"], responses.select(*critic.in_keys))

    def _in_buckets(self, function: Callable[[TensorDictBase], Tensor], rows: TensorDictBase) -> Tensor:
        size = self.scoring_batch_size
        return over_ranks(lambda share: in_length_buckets(function, share, size), rows)

    def check_first_rollout(self, rollout: TensorDictBase) -> Tensor:
        """See :func:`~torchrl_maxmin.models.checks.check_first_rollout`."""
        with whole_weights(self.policy):
            return check_first_rollout(self.policy, rollout)

    def policy_weights(self) -> dict[str, Tensor]:
        """The policy as a plain model: its weights by the names of a saved one."""
        return weights_as_saved(self.policy.model)

    def save(self, folder: Path) -> None:
        """Write the policy and its tokenizer in the format of Hugging Face."""
        save_policy(self.policy.model, None, folder, merge=False)
        if is_main_process():
            self.tokenizer.save_pretrained(folder)


@contextmanager
def _both(outer: Callable[[], Any], inner: Callable[[], Any]) -> Iterator[None]:
    with outer(), inner():
        yield


def heads_on_policy(policy: TokenPolicy, num_columns: int) -> ValueHeads:
    """A critic of value heads alone, on the policy's own hidden states.

    Its loss does not reach the policy: the heads learn what can be read off the states as they are. The
    policy's pass serves both.

    Args:
        policy: whose states they read; it keeps them from now on.
        num_columns: value heads.
    """
    policy.keep_states = True
    width = states_width(backbone_of(policy.model))
    # looked up when it is called: a sharded policy's is another
    return ValueHeads(lambda rows: policy.take_states(rows), width, num_columns).to(
        next(policy.parameters()).device
    )


class FullCopies(LanguageNetworks):
    """Copies of a language model: the policy and the critic are trained whole, the reference is not.

    Another kind of model (adapters on one trunk, shards) offers the same methods.

    Args:
        reference: the policy to start from; frozen. The policy is a copy of it, and the critic of its trunk.
        tokenizer: theirs.
        num_columns: value heads, see :class:`~torchrl_maxmin.models.full.ValueHeads`; with 0 there is no
            critic, and no memory for it.
        critic: ``full``, or ``heads`` on the policy's states, see :func:`heads_on_policy`.
        gradient_checkpointing: whether layers are computed again at backward, in place of being kept.
        sharded: whether each of the processes that work as one holds a part of each network, in place of a
            copy; value heads are copies in any case.
        **options: those of :class:`LanguageNetworks`.
    """

    def __init__(
        self,
        reference: TokenPolicy,
        tokenizer: Any,
        num_columns: int,
        *,
        critic: str = "full",
        gradient_checkpointing: bool = False,
        sharded: bool = False,
        **options: Any,
    ):
        device = next(reference.parameters()).device
        policy = copy.deepcopy(reference)  # not loaded again: a new pad token's row is random
        if gradient_checkpointing:
            checkpoint_layers(policy)
        values: ValueHeads | None = None
        if num_columns and critic == "heads":
            values = heads_on_policy(policy, num_columns)
        if sharded:  # before the next copy is made
            shard_policy(policy)
        if num_columns and values is None:
            values = TokenCritic(copy.deepcopy(backbone_of(reference.model)), num_columns).to(device)
            if gradient_checkpointing:
                checkpoint_layers(values)
            if sharded:
                shard(values.backbone)
        if reference.model.dtype.itemsize == 2:  # in float32 rounding, and so samples, would change
            read_in_one_piece(reference.model.get_output_embeddings())
        reference.requires_grad_(False)
        if sharded:
            shard_policy(reference)
        super().__init__(policy, reference, values, tokenizer, **options)
