"""EM over users: who belongs to which group, and what each group values.

Algorithm 2 of MaxMin-RLHF (arXiv 2402.08925), with responsibilities and mixing weights
(``soft``) or the paper's own hard assignment. The E-step is warm-started by a linear mixture
on frozen features; the M-step fine-tunes the shared trunk and all heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from torchrl_maxmin.modules.loading import load_causal_lm
from torchrl_maxmin.modules.sequences import pad_right
from torchrl_maxmin.preferences.dataset import PreferenceDataset, encode
from torchrl_maxmin.progress import progress_bar
from torchrl_maxmin.rewards.features import text_features
from torchrl_maxmin.rewards.linear import (
    NumGroupsChoice,
    expectation,
    fit_linear_mixture,
    mixing_weights,
    select_num_groups,
)
from torchrl_maxmin.rewards.mixture import RewardMixture

__all__ = ["MixtureFit", "fit_mixture"]


@dataclass
class MixtureFit:
    """A fitted reward mixture and what was learned about the users.

    Attributes:
        model: the K-head reward model, groups sorted by size, largest first.
        user_ids: users in the order of the rows of ``responsibilities_matrix``.
        responsibilities_matrix: [U, K].
        log_prior: log mixing weights [K].
        history: one record an EM round.
        heldout: figures on pairs that were not trained on, empty without such pairs.
        choice: how K was chosen, when it was.
    """

    model: RewardMixture
    user_ids: list[str]
    responsibilities_matrix: Tensor
    log_prior: Tensor
    history: list[dict[str, Any]]
    heldout: dict[str, Any]
    choice: NumGroupsChoice | None = None

    @property
    def responsibilities(self) -> dict[str, list[float]]:
        """Responsibilities of every user by user id."""
        return dict(zip(self.user_ids, self.responsibilities_matrix.tolist(), strict=True))

    def report(self) -> str:
        """A few lines: groups with size, held-out accuracy of each head, likelihood, choice of K."""
        shares = self.log_prior.exp().tolist()
        users = self.responsibilities_matrix.argmax(-1).bincount(minlength=len(shares)).tolist()
        lines = [f"{len(self.user_ids)} users in {len(shares)} group(s)"]
        accuracies = self.heldout.get("head_accuracy", [None] * len(shares))
        for k, (share, count, accuracy) in enumerate(zip(shares, users, accuracies, strict=True)):
            told = "" if accuracy is None else f", held-out accuracy {accuracy:.3f}"
            lines.append(f"  group {k}: {count} users, mixing weight {share:.3f}{told}")
        if "log_likelihood" in self.heldout:
            lines.append(f"held-out log-likelihood {self.heldout['log_likelihood']:.4f} nats a pair")
        if self.choice is not None:
            tried = ", ".join(f"K={k}: {v:.4f}" for k, v in self.choice.heldout_log_likelihood.items())
            lines.append(f"K={self.choice.num_groups} by the likelihood of left-out users ({tried})")
        return "\n".join(lines)


class _PairTokens:
    """Both sides of every pair as token rows."""

    def __init__(self, data: PreferenceDataset, tokenizer: Any, max_length: int | None):
        self.chosen = [
            encode(tokenizer, p, c, max_length) for p, c in zip(data.prompts, data.chosen, strict=True)
        ]
        self.rejected = [
            encode(tokenizer, p, r, max_length) for p, r in zip(data.prompts, data.rejected, strict=True)
        ]
        self.user_offsets = data.user_offsets
        self.row_users = data.row_users
        self.pad_id = tokenizer.pad_token_id

    def __len__(self) -> int:
        return len(self.chosen)

    def scores(self, model: RewardMixture, rows: list[int]) -> tuple[Tensor, Tensor]:
        """Rewards of chosen and rejected texts, both [len(rows), K], in one pass."""
        device = model.log_prior.device
        both = [self.chosen[i] for i in rows] + [self.rejected[i] for i in rows]
        tokens, mask = pad_right(both, self.pad_id)
        chosen, rejected = model(tokens.to(device), mask.to(device)).chunk(2)
        return chosen, rejected

    @torch.no_grad()
    def margins(self, model: RewardMixture, batch_size: int = 128) -> Tensor:
        """Margins [P, K] of all pairs on the CPU, by batches of like length."""
        order = sorted(range(len(self)), key=lambda i: max(len(self.chosen[i]), len(self.rejected[i])))
        margins = torch.empty(len(self), model.num_groups)
        for start in range(0, len(order), batch_size):
            part = order[start : start + batch_size]
            chosen, rejected = self.scores(model, part)
            margins[part] = (chosen - rejected).cpu()
        return margins


def fit_mixture(
    data: PreferenceDataset,
    model: str,
    num_groups: int | str = 2,
    assignment: str = "soft",
    *,
    heldout: PreferenceDataset | None = None,
    num_rounds: int = 4,
    steps_per_round: int = 50,
    batch_size: int = 64,
    learning_rate: float = 1e-5,
    head_learning_rate: float = 1e-4,
    reward_l2: float = 1e-3,
    weight_decay: float = 0.01,
    convergence_tolerance: float = 1e-4,
    num_restarts: int = 4,
    max_groups: int = 3,
    max_length: int | None = None,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> MixtureFit:
    """Learn K rewards and who holds them.

    Args:
        data: training pairs; true groups in it are not read.
        model: Hugging Face causal language model (folder or name) that gives the trunk.
        num_groups: K, or ``"auto"`` for :func:`~torchrl_maxmin.rewards.select_num_groups`.
        assignment: ``"soft"`` or ``"hard"`` (the paper).
        heldout: pairs of the same users that are only scored at the end.
        num_rounds: EM rounds at most; an E-step follows each.
        steps_per_round: optimizer steps of an M-step.
        batch_size: pairs a step.
        learning_rate: of the trunk.
        head_learning_rate: of the heads.
        reward_l2: penalty on squared rewards, which keeps offsets small.
        weight_decay: of AdamW.
        convergence_tolerance: stop when no user changed group and the training
            log-likelihood a pair rose by less than this.
        num_restarts: starts of the linear mixture.
        max_groups: largest K that ``"auto"`` tries.
        max_length: longest text in tokens.
        seed: of starts, batches and new heads.
        device: where the reward model trains.

    Raises:
        UserError: for fewer users than groups.
        ValueError: for an unknown assignment.
    """
    if assignment not in ("soft", "hard"):
        raise ValueError(f"assignment is 'soft' or 'hard', not {assignment!r}")
    data.require_users(2 if num_groups == "auto" else int(num_groups))
    torch.manual_seed(seed)
    warm, choice = _warm_start(
        data, model, num_groups, assignment, num_restarts, max_groups, max_length, seed, device
    )
    mixture = RewardMixture.from_causal_lm(model, warm.shape[-1]).to(device)
    pairs = _PairTokens(data, mixture.tokenizer, max_length)
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for n, p in mixture.named_parameters() if "score" not in n], "lr": learning_rate},
            {"params": mixture.model.score.parameters(), "lr": head_learning_rate},
        ],
        weight_decay=weight_decay,
    )
    total = num_rounds * steps_per_round
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, total))
    batches = _batches(len(pairs), batch_size, seed)
    responsibilities, history = warm, []
    with progress_bar(f"reward model, K={mixture.num_groups}", total) as advance:
        for round_index in range(num_rounds):
            loss = 0.0
            for _ in range(steps_per_round):
                loss = _maximisation_step(
                    mixture, pairs, next(batches), responsibilities, optimizer, reward_l2
                )
                schedule.step()
                advance(note=f"loss {loss:.3f}")
            log_prior = mixing_weights(responsibilities)
            before = responsibilities
            responsibilities, user_ll = expectation(
                pairs.margins(mixture), pairs.user_offsets, log_prior, assignment
            )
            responsibilities, repaired = _repair_empty_groups(
                mixture, responsibilities, user_ll, pairs.user_offsets
            )
            record = _round_record(round_index, before, responsibilities, user_ll, len(pairs), loss, repaired)
            history.append(record)
            if not math.isfinite(record["em/log_likelihood"]):
                raise FloatingPointError(
                    f"EM round {round_index}: the log-likelihood is not finite; lower the rates"
                )
            if _converged(history, convergence_tolerance):
                break
    responsibilities = _sort_groups(mixture, responsibilities)
    mixture.log_prior.copy_(mixing_weights(responsibilities))
    figures = (
        {}
        if heldout is None
        else _heldout_figures(mixture, heldout, data.user_ids, responsibilities, max_length)
    )
    return MixtureFit(
        mixture, data.user_ids, responsibilities, mixture.log_prior.cpu().clone(), history, figures, choice
    )


def _warm_start(
    data: PreferenceDataset,
    model: str,
    num_groups: int | str,
    assignment: str,
    num_restarts: int,
    max_groups: int,
    max_length: int | None,
    seed: int,
    device: torch.device | str,
) -> tuple[Tensor, NumGroupsChoice | None]:
    """Responsibilities [U, K] of the linear mixture, and how K was chosen."""
    if num_groups == 1:
        return torch.ones(data.num_users, 1), None
    from torchrl_maxmin.modules.loading import ensure_pad_token, load_tokenizer

    tokenizer, frozen = load_tokenizer(model), load_causal_lm(model)
    ensure_pad_token(tokenizer, frozen)
    frozen.to(device)
    pairs = _PairTokens(data, tokenizer, max_length)
    features = text_features(frozen, pairs.chosen + pairs.rejected, pairs.pad_id)
    differences = features[: len(pairs)] - features[len(pairs) :]
    differences = differences / differences.std(0).clamp_min(1e-6)
    choice = None
    if num_groups == "auto":
        choice = select_num_groups(
            differences,
            data.user_offsets,
            max_groups,
            seed=seed,
            num_restarts=num_restarts,
            assignment=assignment,
        )
        num_groups = choice.num_groups
    fitted = fit_linear_mixture(
        differences,
        data.user_offsets,
        int(num_groups),
        num_restarts=num_restarts,
        assignment=assignment,
        generator=torch.Generator().manual_seed(seed),
    )
    return fitted.responsibilities, choice


def _maximisation_step(
    mixture: RewardMixture,
    pairs: _PairTokens,
    rows: list[int],
    responsibilities: Tensor,
    optimizer: torch.optim.Optimizer,
    reward_l2: float,
) -> float:
    """One optimizer step on the responsibility-weighted Bradley-Terry loss of some pairs."""
    chosen, rejected = pairs.scores(mixture, rows)
    weights = responsibilities[pairs.row_users[rows]].to(chosen.device)
    nll = -(weights * nn.functional.logsigmoid(chosen - rejected)).sum(-1).mean()
    penalty = (weights * (chosen.square() + rejected.square())).sum(-1).mean() / 2
    optimizer.zero_grad()
    (nll + reward_l2 * penalty).backward()
    nn.utils.clip_grad_norm_(mixture.parameters(), 1.0)
    optimizer.step()
    return nll.item()


def _batches(num_rows: int, batch_size: int, seed: int) -> Iterator[list[int]]:
    """Batches of shuffled rows, epoch after epoch."""
    generator = np.random.default_rng(seed)
    left: list[int] = []
    while True:
        while len(left) < min(batch_size, num_rows):
            left.extend(generator.permutation(num_rows).tolist())
        yield left[:batch_size]
        left = left[batch_size:]


def _warmup_cosine(step: int, total: int) -> float:
    warmup = max(1, total // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, total - warmup)))


def _repair_empty_groups(
    mixture: RewardMixture, responsibilities: Tensor, user_ll: Tensor, user_offsets: Tensor
) -> tuple[Tensor, list[int]]:
    """Give a group that holds less than half a user the users whom the mixture explains worst.

    Its head restarts from the largest group's with a little noise; one in K users, by
    log-likelihood a pair, moves there.
    """
    mass = responsibilities.sum(0)
    empty = [k for k in range(len(mass)) if mass[k] < 0.5]
    if not empty or len(mass) == 1:
        return responsibilities, []
    per_pair = user_ll / user_offsets.diff().clamp_min(1)
    worst = per_pair.argsort()[: max(1, len(per_pair) // len(mass))]
    repaired = responsibilities.clone()
    with torch.no_grad():
        head = mixture.model.score.weight
        for index, k in enumerate(empty):
            donor = int(mass.argmax())
            head[k] = head[donor] + 0.1 * head[donor].std() * torch.randn_like(head[donor])
            mine = worst[index :: len(empty)]
            repaired[mine] = nn.functional.one_hot(torch.tensor(k), len(mass)).to(repaired.dtype)
    return repaired, empty


def _round_record(
    round_index: int,
    before: Tensor,
    after: Tensor,
    user_ll: Tensor,
    num_pairs: int,
    loss: float,
    repaired: list[int],
) -> dict[str, Any]:
    entropy = torch.special.entr(after).sum(-1).mean().item()
    return {
        "round": round_index,
        "em/log_likelihood": user_ll.double().sum().item() / num_pairs,
        "em/responsibility_entropy": entropy,
        "em/users_changed": int((before.argmax(-1) != after.argmax(-1)).sum()),
        "em/repaired_groups": repaired,
        "loss": loss,
        **{f"em/cluster_mass/{k}": mass for k, mass in enumerate(after.sum(0).tolist())},
    }


def _converged(history: list[dict[str, Any]], tolerance: float) -> bool:
    if len(history) < 2 or history[-1]["em/users_changed"] or history[-1]["em/repaired_groups"]:
        return False
    return history[-1]["em/log_likelihood"] - history[-2]["em/log_likelihood"] < tolerance


@torch.no_grad()
def _sort_groups(mixture: RewardMixture, responsibilities: Tensor) -> Tensor:
    """Order groups and heads by size, largest first."""
    order = responsibilities.sum(0).argsort(descending=True, stable=True)
    head = mixture.model.score
    head.weight.copy_(head.weight[order.to(head.weight.device)])
    if head.bias is not None:
        head.bias.copy_(head.bias[order.to(head.bias.device)])
    return responsibilities[:, order]


def _heldout_figures(
    mixture: RewardMixture,
    heldout: PreferenceDataset,
    user_ids: list[str],
    responsibilities: Tensor,
    max_length: int | None,
) -> dict[str, Any]:
    """Predictive log-likelihood a pair, and each head's accuracy on the users it was given."""
    index = {user: i for i, user in enumerate(user_ids)}
    unknown = mixture.log_prior.exp().cpu()
    known = torch.stack([responsibilities[index[u]] if u in index else unknown for u in heldout.user_ids])
    pairs = _PairTokens(heldout, mixture.tokenizer, max_length)
    margins = pairs.margins(mixture).double()
    per_user = torch.zeros(heldout.num_users, mixture.num_groups, dtype=torch.float64)
    per_user.index_add_(0, pairs.row_users, nn.functional.logsigmoid(margins))
    predictive = torch.logsumexp(known.double().log() + per_user, -1).sum().item() / len(pairs)
    owner = known.argmax(-1)[pairs.row_users]
    right = (margins > 0).double()
    accuracy: list[float | None] = []
    for k in range(mixture.num_groups):
        mine = right[owner == k, k]
        accuracy.append(mine.mean().item() if len(mine) else None)
    return {"log_likelihood": predictive, "head_accuracy": accuracy, "pairs": len(pairs)}
