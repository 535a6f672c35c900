"""The base of every model of group rewards: heads, scores of texts, reward functions."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from maxmin_kernels import reward_heads_min
from torch import Tensor, nn

from torchrl_maxmin.core.distributed import mean_over_ranks
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.models.integrity import require_same_tensors
from torchrl_maxmin.models.loading import import_transformers, reading
from torchrl_maxmin.models.sequences import pad_right
from torchrl_maxmin.rewards.calibration import Calibration
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE, Text, TextReader

HEADS = ("linear", "mlp", "low_rank")
HEADS_FILE = "heads.safetensors"


class RewardHeads(nn.Module):
    """Rewards of K groups, ``reward_k = w_k . f(h)``: whatever the groups share lies in f.

    ``linear``
        f is the identity.
    ``mlp``
        f is one hidden layer as wide as the trunk, with GELU.
    ``low_rank``
        f(h) = B h with B [rank, H]: groups differ by their weights on few common features, so
        that a small minority learns little more than its weights (SharedRep-RLHF, arXiv 2509.03672).

    Args:
        kind: one of the above.
        hidden_size: H.
        num_groups: K.
        rank: features of ``low_rank``; K when None.

    Raises:
        UserError: for an unknown kind, or a rank below 1 or without ``low_rank``.

    Example:
        >>> heads = RewardHeads("low_rank", hidden_size=16, num_groups=3, rank=2)
        >>> heads(torch.randn(5, 16)).shape
        torch.Size([5, 3])
    """

    def __init__(self, kind: str, hidden_size: int, num_groups: int, rank: int | None = None):
        super().__init__()
        if kind not in HEADS:
            raise UserError(f"head {kind!r} is none of {', '.join(HEADS)}")
        if rank is not None and (kind != "low_rank" or rank < 1):
            raise UserError("rank is a positive number of features of the head 'low_rank'")
        self.kind, self.rank = kind, rank
        self.features: nn.Module = nn.Identity()
        width = hidden_size
        if kind == "mlp":
            self.features = nn.Sequential(nn.Linear(hidden_size, hidden_size), nn.GELU())
        elif kind == "low_rank":
            width = rank or num_groups
            self.features = nn.Linear(hidden_size, width, bias=False)
            nn.init.normal_(self.features.weight, std=(hidden_size + 1) ** -0.5)
        self.output = nn.Linear(width, num_groups, bias=False)
        nn.init.normal_(self.output.weight, std=(width + 1) ** -0.5)

    def forward(self, vectors: Tensor) -> Tensor:
        """Rewards [N, K] in fp32 of vectors [N, H], or of [N, K, H] where every group has its own."""
        features = self.features(vectors.float())
        if features.dim() == 3:
            return (features * self.output.weight).sum(-1)
        return reward_heads_min(features, self.output.weight)[0]


def require_heads(folder: Path) -> None:
    """Raise :class:`UserError` for a folder of a mixture without its heads."""
    if not (folder / HEADS_FILE).is_file():
        raise UserError(f"{folder} lacks {HEADS_FILE}, so it would score at random; save it again")


def read_heads(folder: Path, form: dict[str, Any], width: int) -> RewardHeads:
    """The heads that :meth:`RewardMixture.save_pretrained` wrote beside a trunk.

    Args:
        folder: the mixture's.
        form: the entry ``heads`` of its ``mixture.json``.
        width: of the trunk's states.
    """
    from safetensors.torch import load_file

    with torch.device("meta"):
        heads = RewardHeads(form["kind"], width, form["num_groups"], form["rank"])
    with reading("reward heads", str(folder)):
        weights = load_file(folder / HEADS_FILE)
    require_same_tensors(weights, heads.state_dict(), "reward heads", folder)
    heads.load_state_dict(weights, assign=True)
    return heads


@torch.no_grad()
def permute_rows_(output: nn.Linear, order: Tensor) -> None:
    """Put row ``order[k]`` of the last layer, which is a group's own, at k."""
    for parameter in (output.weight, output.bias):
        if parameter is not None:
            parameter.copy_(parameter[order.to(parameter.device)])


@torch.no_grad()
def reset_row_(output: nn.Linear, k: int, donor: int, noise_scale: float) -> None:
    """Give group k the donor's row of the last layer, and noise of ``noise_scale`` times its deviation."""
    weight = output.weight
    weight[k] = weight[donor] + noise_scale * weight[donor].std() * torch.randn_like(weight[donor])
    if output.bias is not None:
        output.bias[k] = output.bias[donor]


def has_linear_score(config: Any) -> bool:
    """Whether the sequence classifiers of a config's type end in one linear layer named ``score``.

    Decoders' do; RoFormer's, a decoder too, ends in a head of several layers.
    """
    transformers = import_transformers()
    if type(config) not in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        return False
    with torch.device("meta"):
        model = transformers.AutoModelForSequenceClassification.from_config(config)
    return isinstance(getattr(model, "score", None), nn.Linear)


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
        texts = prompts, completions, batch_size, max_length, ended
        scores = torch.cat([score_texts(model, *texts) for model in self.scorers()], -1)
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

        Warns:
            UserWarning: for an adversary on rewards whose offsets by prompt are large, or on win rates.
        """
        if sum(option is not None for option in (group, weights, adversary)) != 1:
            raise ValueError("give exactly one of group, weights and adversary")
        if group is not None and not 0 <= group < self.num_groups:
            raise ValueError(f"no group {group} among the {self.num_groups} groups, which count from 0")
        if weights is not None and len(weights) != self.num_groups:
            raise ValueError(f"{len(weights)} weights for {self.num_groups} groups")
        if adversary is not None and self.calibration.by_prompt:
            warnings.warn(
                "these rewards have offsets by prompt, which a reward function without samples of the "
                "reference leaves in: the adversary's worst group may be that of the batch's prompts; "
                "torchrl-maxmin ppo takes them off",
                stacklevel=2,
            )

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
