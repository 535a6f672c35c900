"""One-step token environment: a prompt comes in, a whole response goes out, K rewards come back."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite, Unbounded
from torchrl.envs import EnvBase

from torchrl_maxmin.models.sequences import Ends, mask_after_eos

__all__ = ["TokenEnv"]


class TokenEnv(EnvBase):
    """Prompts as observations, padded responses as actions, one reward a group.

    An episode is one step, so a batch of B responses is one environment step and a collector
    adds nothing to the cost of generation. Prompts follow a shuffled order that is a function
    of ``seed`` and :attr:`batch_index` alone: set the index to continue where a run stopped.

    Args:
        prompts: ``prompt_tokens`` and ``prompt_mask`` [N, P], batch size [N].
        reward_fn: maps a tensordict with prompt, ``action`` and ``action_mask`` to group
            rewards [B, K].
        num_groups: K.
        num_prompts: prompts a step.
        max_new_tokens: columns of a response, R.
        eos_token_id: the token, or the several tokens, that end a response, or what marks its ends, see
            :attr:`~torchrl_maxmin.models.language.TokenPolicy.ends`.
        vocab_size: number of tokens.
        num_generations: responses to every prompt, side by side; B is ``num_prompts`` times this.
        minimum: reward with the least of a response's group rewards (``mean_of_mins``); the
            group rewards stay in ``group_reward`` either way.
        seed: of the order of prompts.
        device: where tensors live.

    Example:
        >>> prompts = TensorDict({
        ...     "prompt_tokens": torch.full((8, 2), 5), "prompt_mask": torch.ones(8, 2, dtype=torch.bool)
        ... }, [8])
        >>> env = TokenEnv(prompts, lambda td: torch.zeros(4, 2), num_groups=2, num_prompts=4,
        ...                max_new_tokens=3, eos_token_id=2, vocab_size=10)
        >>> env.rollout(1)["next", "reward"].shape
        torch.Size([4, 1, 2])
    """

    def __init__(
        self,
        prompts: TensorDictBase,
        reward_fn: Callable[[TensorDictBase], Tensor],
        *,
        num_groups: int,
        num_prompts: int,
        max_new_tokens: int,
        eos_token_id: Ends,
        vocab_size: int,
        num_generations: int = 1,
        minimum: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        size = num_prompts * num_generations
        super().__init__(device=torch.device(device), batch_size=[size])
        self.num_generations = num_generations
        self.prompts = prompts.to(device)
        self.reward_fn = reward_fn
        self.eos_token_id, self.minimum = eos_token_id, minimum
        self.batch_index = 0
        self._seed = seed
        width = prompts["prompt_tokens"].shape[-1]
        token = {"low": 0, "high": vocab_size - 1, "dtype": torch.int64, "device": device}
        rewards = 1 if minimum else num_groups
        self.observation_spec = Composite(
            prompt_tokens=Bounded(shape=(size, width), **token),
            prompt_mask=Bounded(low=0, high=1, shape=(size, width), dtype=torch.bool, device=device),
            prompt_index=Unbounded(shape=(size,), dtype=torch.int64, device=device),
            group_reward=Unbounded(shape=(size, num_groups), device=device),
            shape=(size,),
        )
        self.action_spec = Bounded(shape=(size, max_new_tokens), **token)
        self.reward_spec = Unbounded(shape=(size, rewards), device=device)
        self.done_spec = Composite(
            done=Bounded(low=0, high=1, shape=(size, 1), dtype=torch.bool, device=device),
            terminated=Bounded(low=0, high=1, shape=(size, 1), dtype=torch.bool, device=device),
            shape=(size,),
        )

    def prompts_of(self, batch_index: int) -> Tensor:
        """Which prompts a batch is of: indices int64 [B], those of the generations side by side."""
        total, size = len(self.prompts), self.batch_size[0] // self.num_generations
        start, rows = batch_index * size, []
        for epoch in range(start // total, (start + size - 1) // total + 1):  # one permutation each
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + epoch)
            order = torch.randperm(total, generator=generator)
            first = max(start - epoch * total, 0)
            rows.append(order[first : min(start + size - epoch * total, total)])
        return torch.cat(rows).repeat_interleave(self.num_generations)

    def _observe(self, group_reward: Tensor | None = None) -> TensorDict:
        """The prompts of the current batch."""
        index = self.prompts_of(self.batch_index).to(self.device)
        if group_reward is None:
            group_reward = self.observation_spec["group_reward"].zero()
        chosen = self.prompts[index]
        return TensorDict(
            {
                "prompt_tokens": chosen["prompt_tokens"],
                "prompt_mask": chosen["prompt_mask"],
                "prompt_index": index,
                "group_reward": group_reward,
            },
            self.batch_size,
            device=self.device,
        )

    def _reset(self, tensordict: TensorDictBase | None = None, **_: object) -> TensorDictBase:
        # the index moves in _step, so that any number of resets gives the same prompts
        result = self._observe()
        for key in ("done", "terminated"):
            result[key] = torch.zeros(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        return result

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict["action"]
        response = TensorDict(
            {
                "prompt_tokens": tensordict["prompt_tokens"],
                "prompt_mask": tensordict["prompt_mask"],
                "prompt_index": tensordict["prompt_index"],
                "action": action,
                "action_mask": mask_after_eos(action, self.eos_token_id),
            },
            self.batch_size,
        )
        group_reward = self.reward_fn(response).float()
        self.batch_index += 1
        result = self._observe(group_reward)
        result["reward"] = group_reward.amin(-1, keepdim=True) if self.minimum else group_reward
        for key in ("done", "terminated"):
            result[key] = torch.ones(*self.batch_size, 1, dtype=torch.bool, device=self.device)
        return result

    def _set_seed(self, seed: int | None) -> None:
        self._seed = 0 if seed is None else seed
