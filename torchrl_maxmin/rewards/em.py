"""EM over users: who belongs to which group, and what each group values.

Algorithm 2 of MaxMin-RLHF (arXiv 2402.08925), with responsibilities and mixing weights
(``soft``) or the paper's own hard assignment. The E-step is warm-started by a linear mixture
on frozen features; the M-step fine-tunes the shared trunk and all heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.errors import UserError
from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.progress import progress_bar
from torchrl_maxmin.rewards.fit import MixtureFit, heldout_figures
from torchrl_maxmin.rewards.linear import expectation, mixing_weights
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.pairs import Batches, PairTokens
from torchrl_maxmin.rewards.warm_start import from_true_groups, linear_warm_start

__all__ = ["MixtureFit", "fit_mixture"]

_READING = ("pooling", "layout", "chat_template", "system_prompt")


def fit_mixture(
    data: PreferenceDataset,
    model: str,
    num_groups: int | str = 2,
    assignment: str = "soft",
    *,
    heldout: PreferenceDataset | None = None,
    use_true_groups: bool = False,
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
    model_options: dict[str, Any] | None = None,
    identifiability: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_round: Callable[[dict[str, Any]], None] | None = None,
    resume: dict[str, Any] | None = None,
) -> MixtureFit:
    """Learn K rewards and who holds them.

    Args:
        data: training pairs; true groups in it are not read unless ``use_true_groups``.
        model: Hugging Face model (folder or name) that gives the trunk.
        num_groups: K, or ``"auto"`` for :func:`~torchrl_maxmin.rewards.select_num_groups`.
        assignment: ``"soft"`` or ``"hard"`` (the paper).
        heldout: pairs of the same users that are only scored at the end.
        use_true_groups: train one head on each true group of ``data`` instead of finding groups:
            the yardstick that EM is measured by. ``num_groups`` and ``assignment`` are not used.
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
        model_options: kind of heads, adapters and so on, as
            :meth:`~torchrl_maxmin.rewards.RewardMixture.from_backbone` takes them.
        identifiability: whether to report on the linear mixture if users can be told apart; with one
            given group there is nothing to tell apart.
        seed: of starts, batches and new heads.
        device: where the reward model trains.
        on_round: called after every round with the state that ``resume`` takes.
        resume: go on from such a state; the result is bit-equal to a run that never stopped.

    Raises:
        UserError: for fewer users than groups, or ``use_true_groups`` without true groups.
        ValueError: for an unknown assignment.
        FloatingPointError: if the likelihood stops being finite.
    """
    if assignment not in ("soft", "hard"):
        raise ValueError(f"assignment is 'soft' or 'hard', not {assignment!r}")
    if use_true_groups and data.groups is None:
        raise UserError("the data has no group column, so its true groups cannot be used; name it")
    if not use_true_groups:
        data.require_users(2 if num_groups == "auto" else int(num_groups))
    torch.manual_seed(seed)
    options = model_options or {}
    if resume is not None:
        warm = resume["warm_start"]
    elif use_true_groups:
        warm = from_true_groups(data)
    else:
        warm = linear_warm_start(
            data,
            model,
            num_groups,
            assignment=assignment,
            num_restarts=num_restarts,
            max_groups=max_groups,
            max_length=max_length,
            reading_options={name: options[name] for name in _READING if name in options},
            identifiability=identifiability,
            seed=seed,
            device=device,
        )
    start = warm.responsibilities
    mixture = RewardMixture.from_backbone(model, start.shape[-1], **options).to(device)
    pairs = PairTokens(data, mixture.encoder(max_length), mixture.reader.pad_id)
    em = _EM(
        mixture,
        pairs,
        start,
        _MStep(learning_rate, head_learning_rate, weight_decay, reward_l2, num_rounds * steps_per_round),
        Batches(len(pairs), batch_size, seed),
        assignment="known" if use_true_groups else assignment,
    )
    if resume is not None:
        em.load_state_dict(resume)
    total = num_rounds * steps_per_round
    with progress_bar(f"reward model, K={mixture.num_groups}", total) as advance:
        advance(len(em.history) * steps_per_round)
        while len(em.history) < num_rounds and not _converged(em.history, convergence_tolerance):
            em.round(steps_per_round, advance)
            if on_round is not None:
                on_round({**em.state_dict(), "warm_start": warm})
    responsibilities = em.responsibilities
    if not use_true_groups:
        order = responsibilities.sum(0).argsort(descending=True, stable=True)
        mixture.permute_groups_(order)
        responsibilities = responsibilities[:, order]
    mixture.log_prior.copy_(mixing_weights(responsibilities))
    figures = {}
    if heldout is not None:
        figures = heldout_figures(mixture, heldout, data.user_ids, responsibilities, max_length)
    return MixtureFit(
        mixture,
        data.user_ids,
        responsibilities,
        mixture.log_prior.cpu().clone(),
        em.history,
        figures,
        warm.choice,
        warm.group_names,
        warm.identifiability,
    )


@dataclass(frozen=True)
class _MStep:
    """Settings of the M-step's optimizer."""

    learning_rate: float
    head_learning_rate: float
    weight_decay: float
    reward_l2: float
    total_steps: int

    def optimizer(self, mixture: RewardMixture) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            [
                {"params": mixture.trunk_parameters(), "lr": self.learning_rate},
                {"params": mixture.head_parameters(), "lr": self.head_learning_rate},
            ],
            weight_decay=self.weight_decay,
        )

    def schedule(self, optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LambdaLR:
        return torch.optim.lr_scheduler.LambdaLR(optimizer, self._warmup_cosine)

    def _warmup_cosine(self, step: int) -> float:
        warmup = max(1, self.total_steps // 20)
        if step < warmup:
            return (step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.total_steps - warmup)))


class _EM:
    """EM in progress: everything that one round changes, so that it can be saved between two."""

    def __init__(
        self,
        mixture: RewardMixture,
        pairs: PairTokens,
        responsibilities: Tensor,
        m_step: _MStep,
        batches: Batches,
        assignment: str,
    ):
        self.mixture, self.pairs, self.responsibilities = mixture, pairs, responsibilities
        self.optimizer = m_step.optimizer(mixture)
        self.schedule = m_step.schedule(self.optimizer)
        self.batches, self.assignment, self.reward_l2 = batches, assignment, m_step.reward_l2
        self.history: list[dict[str, Any]] = []

    def round(self, steps: int, advance: Callable[..., None]) -> None:
        """An M-step of some optimizer steps, then an E-step; appends a record to ``history``."""
        loss = 0.0
        self.mixture.train()  # adapters' dropout alone: the trunk has none
        for _ in range(steps):
            loss = self._optimizer_step(next(self.batches))
            self.schedule.step()
            advance(note=f"loss {loss:.3f}")
        self.mixture.eval()
        before = self.responsibilities
        after, user_ll = expectation(
            self.pairs.margins(self.mixture),
            self.pairs.user_offsets,
            mixing_weights(before),
            "soft" if self.assignment == "known" else self.assignment,
            self.pairs.weights,
        )
        repaired: list[int] = []
        if self.assignment == "known":
            after = before
        else:
            after, repaired = _repair_empty_groups(self.mixture, after, user_ll, self.pairs.user_offsets)
        record = _round_record(len(self.history), before, after, user_ll, len(self.pairs), loss, repaired)
        if not math.isfinite(record["em/log_likelihood"]):
            raise FloatingPointError(
                f"EM round {record['round']}: the log-likelihood is not finite; lower the rates"
            )
        self.responsibilities = after
        self.history.append(record)

    def _optimizer_step(self, rows: list[int]) -> float:
        """One step on the responsibility-weighted Bradley-Terry loss of some pairs."""
        chosen, rejected = self.pairs.scores(self.mixture, rows)
        weights = self.responsibilities[self.pairs.row_users[rows]]
        if self.pairs.weights is not None:
            weights = weights * self.pairs.weights[rows].unsqueeze(-1)
        weights = weights.to(chosen.device)
        nll = -(weights * nn.functional.logsigmoid(chosen - rejected)).sum(-1).mean()
        penalty = (weights * (chosen.square() + rejected.square())).sum(-1).mean() / 2
        self.optimizer.zero_grad()
        (nll + self.reward_l2 * penalty).backward()
        nn.utils.clip_grad_norm_(self.mixture.parameters(), 1.0)
        self.optimizer.step()
        return nll.item()

    def state_dict(self) -> dict[str, Any]:
        """The state after the last round."""
        return {
            "model": self.mixture.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "batches": self.batches.state_dict(),
            "responsibilities": self.responsibilities,
            "history": self.history,
            "random": torch.get_rng_state(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self.mixture.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.batches.load_state_dict(state["batches"])
        self.responsibilities, self.history = state["responsibilities"], list(state["history"])
        torch.set_rng_state(state["random"])


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
    donor = int(mass.argmax())
    for index, k in enumerate(empty):
        mixture.reset_head_(k, donor)
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
