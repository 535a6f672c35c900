"""The base of every model of group rewards, wherever its rewards come from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from torchrl_maxmin.core.distributed import mean_over_ranks
from torchrl_maxmin.models.sequences import pad_right
from torchrl_maxmin.rewards.calibration import Calibration
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE, Text, TextReader

__all__ = ["RewardModel", "TokenModel", "score_texts"]


class TokenModel(Protocol):
    """A model that scores padded token rows of its own tokenizer."""

    reader: TextReader

    @property
    def num_groups(self) -> int:
        """Columns of the rewards."""

    def parameters(self) -> Any:
        """Its parameters, which say where it is."""

    def __call__(self, tokens: Tensor, mask: Tensor) -> Tensor:
        """Rewards [N, K] of tokens [N, T]."""


@torch.no_grad()
def score_texts(
    model: TokenModel,
    prompts: Sequence[Text],
    completions: Sequence[Text],
    batch_size: int,
    max_length: int | None,
    ended: Sequence[bool] | None = None,
) -> Tensor:
    """Raw rewards [N, K] on the CPU, by batches of like length."""
    device = next(model.parameters()).device
    rows = model.reader.encode(prompts, completions, max_length, ended)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    scores = torch.empty(len(rows), model.num_groups)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        tokens, mask = pad_right([rows[i] for i in part], model.reader.pad_id)
        scores[part] = model(tokens.to(device), mask.to(device)).float().cpu()
    return scores


class RewardModel(nn.Module):
    """Rewards of K groups for texts, with the groups' shares and the scale of their rewards.

    Args:
        num_groups: K.
        log_prior: log mixing weights [K]; uniform when None.
        calibration: puts the rewards on one scale; identity when None.
    """

    log_prior: Tensor

    def __init__(
        self, num_groups: int, log_prior: Tensor | None = None, calibration: Calibration | None = None
    ):
        super().__init__()
        uniform = torch.full((num_groups,), 1.0 / num_groups).log()
        self.register_buffer("log_prior", uniform if log_prior is None else log_prior.clone())
        self.calibration = calibration or Calibration.identity(num_groups)

    @property
    def num_groups(self) -> int:
        """Number of groups K."""
        return len(self.log_prior)

    def reads_tokens_of(self, tokenizer: Any) -> bool:
        """Whether a policy's prompt and response tokens, joined, are what this model reads."""
        return False

    def scorers(self) -> Sequence[TokenModel]:
        """The models whose columns stand side by side."""
        raise NotImplementedError

    def score(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Text],
        *,
        calibrated: bool = False,
        batch_size: int = SCORED_AT_ONCE,
        max_length: int | None = None,
        ended: Sequence[bool] | None = None,
    ) -> Tensor:
        """Score texts.

        Args:
            prompts: strings, or conversations (lists of messages with ``role`` and ``content``).
            completions: likewise, one a prompt.
            calibrated: apply :attr:`calibration`.
            batch_size: texts at once; changes nothing but speed and memory.
            max_length: longest text in tokens; never more than the model has positions for.
            ended: whether each completion has an end; one that was cut off is read without. All have
                when None.

        Returns:
            Rewards [N, K] on the CPU, whatever the batch size or padding.
        """
        columns = [
            score_texts(model, prompts, completions, batch_size, max_length, ended)
            for model in self.scorers()
        ]
        scores = torch.cat(columns, -1)
        return self.calibration.apply(scores) if calibrated else scores

    def reward_fn(
        self, *, group: int | None = None, weights: Sequence[float] | None = None, adversary: Any = None
    ) -> Callable[..., list[float]]:
        """A reward function of the form that TRL's trainers take.

        Args:
            group: score for one group.
            weights: score for a fixed mixture of groups, [K].
            adversary: score for the weights of an adversary that sees each batch's mean
                reward by group, summed over all ranks first. A minimum of expectations is no
                function of one sample, so this form holds state.

        Returns:
            ``f(prompts, completions, **columns) -> list[float]`` on calibrated rewards; prompts and
            completions are strings or conversations.

        Raises:
            ValueError: unless exactly one is given, and for groups that this model has not.
        """
        if sum(option is not None for option in (group, weights, adversary)) != 1:
            raise ValueError("give exactly one of group, weights and adversary")
        if group is not None and not 0 <= group < self.num_groups:
            raise ValueError(f"no group {group} among the {self.num_groups} groups, which count from 0")
        if weights is not None and len(weights) != self.num_groups:
            raise ValueError(f"{len(weights)} weights for {self.num_groups} groups")

        def reward(prompts: Sequence[Text], completions: Sequence[Text], **_: Any) -> list[float]:
            scores = self.score(prompts, completions, calibrated=True)
            if group is not None:
                return scores[:, group].tolist()
            if weights is not None:
                return (scores @ torch.tensor(weights, dtype=scores.dtype)).tolist()
            return (scores @ adversary.update(mean_over_ranks(scores.sum(0), len(scores)))).tolist()

        if group is not None:  # trainers log a reward under its function's name
            reward.__name__ = f"group_{group}"
        return reward
