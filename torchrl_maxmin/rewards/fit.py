"""A reward mixture fitted to preferences, and what it says about the users.

Algorithm 2 of MaxMin-RLHF (arXiv 2402.08925), with responsibilities and mixing weights (``soft``) or the
paper's own hard assignment. EM is warm-started by a linear mixture on frozen features; its M-steps fine-tune
the shared trunk and all heads.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from torchrl_maxmin.clustering.agreement import Restarts
from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.em import EMSettings, mixing_weights, posterior, run_em
from torchrl_maxmin.clustering.established import Establishment, evidence_for
from torchrl_maxmin.clustering.identifiability import IdentifiabilityReport, identifiability_report
from torchrl_maxmin.clustering.linear import fit_choices
from torchrl_maxmin.clustering.selection import (
    L2_CANDIDATES,
    SEARCH,
    NumGroupsChoice,
    choose_num_groups,
    searched_choices,
)
from torchrl_maxmin.clustering.shares import AdamStepOfShares
from torchrl_maxmin.core.distributed import of_main_process, shares_rows
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.interruption import Interrupted, signals_held
from torchrl_maxmin.core.progress import progress_bar
from torchrl_maxmin.models.sequences import backbone_of
from torchrl_maxmin.models.sharding import shard
from torchrl_maxmin.preferences.dataset import PreferenceDataset
from torchrl_maxmin.preferences.texts import text_key
from torchrl_maxmin.rewards.fine_tuning import FineTuning, FineTuningSettings
from torchrl_maxmin.rewards.mixture import RewardMixture
from torchrl_maxmin.rewards.pairs import PairTokens, feature_choices, shared_feature_choices
from torchrl_maxmin.rewards.reader import SCORED_AT_ONCE
from torchrl_maxmin.stats import accuracy_by_group

__all__ = ["REPORT_USERS", "MixtureFit", "WarmStart", "fit_mixture", "heldout_figures"]

#: The identifiability report looks at no more users than this: it fits fifteen mixtures.
REPORT_USERS = 2000

# As the warm start itself: exact M-steps would take minutes on wide features.
_REPORT: dict[str, Any] = {
    "m_step": "adam",
    "num_rounds": 50,
    "num_restarts": 4,
    "l2_candidates": (3e-4, 1e-3, 2e-3),
}
_READING = ("pooling", "layout", "chat_template", "system_prompt")


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
        group_names: names of the true groups that the heads were trained on, when they were.
        identifiability: whether these pairs tell the users apart, when it was asked for.
        restarts: whether the starts of the linear mixture agree; None where there was one at most.
        establishment: whether the groups are there at all, when that was asked for.
    """

    model: RewardMixture
    user_ids: list[str]
    responsibilities_matrix: Tensor
    log_prior: Tensor
    history: list[dict[str, Any]]
    heldout: dict[str, Any]
    choice: NumGroupsChoice | None = None
    group_names: list[str] | None = None
    identifiability: IdentifiabilityReport | None = None
    restarts: Restarts | None = None
    establishment: Establishment | None = None

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
        intervals = self.heldout.get("head_accuracy_interval", [None] * len(shares))
        for k, (share, count, accuracy) in enumerate(zip(shares, users, accuracies, strict=True)):
            line = f"  group {k}: {count} users, mixing weight {share:.3f}"
            if accuracy is not None:
                line += f", held-out accuracy {accuracy:.3f}"
                line += "" if None in intervals[k] else " [{:.3f}, {:.3f}]".format(*intervals[k])
            lines.append(line)
        if "log_likelihood" in self.heldout:
            lines.append(f"held-out log-likelihood {self.heldout['log_likelihood']:.4f} nats a pair")
        if self.choice is not None:
            tried = ", ".join(f"K={k}: {v:.4f}" for k, v in self.choice.heldout_log_likelihood.items())
            lines.append(f"K={self.choice.num_groups} by the likelihood of left-out users ({tried})")
            if self.choice.beats_coin is False:
                lines.append("no reward predicts left-out users better than a coin")
        if self.establishment is not None:
            lines += self.establishment.report().splitlines()
        if self.restarts is not None:
            lines.append(f"the groups that EM began with were {self.restarts.text()}")
        if self.identifiability is not None:
            lines.append("on frozen features, linear heads:")
            lines += [f"  {line}" for line in self.identifiability.report().splitlines()]
        return "\n".join(lines)


def fit_mixture(
    data: PreferenceDataset,
    model: str,
    num_groups: int | str = 2,
    assignment: str = "soft",
    *,
    heldout: PreferenceDataset | None = None,
    use_true_groups: bool = False,
    convergence_tolerance: float = 1e-4,
    num_restarts: int = 4,
    warm_start_l2: float = 1e-4,
    max_groups: int = 3,
    max_length: int | None = None,
    model_options: dict[str, Any] | None = None,
    feature_options: dict[str, Any] | None = None,
    identifiability: bool = False,
    seed: int = 0,
    device: torch.device | str = "cpu",
    on_round: Callable[[dict[str, Any]], None] | None = None,
    on_interruption: Callable[[dict[str, Any]], Path] | None = None,
    resume: dict[str, Any] | None = None,
    sharded: bool = False,
    **optimizer: Any,
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
        convergence_tolerance: stop when no user changed group and the training
            log-likelihood a pair rose by less than this.
        num_restarts: starts of the linear mixture.
        warm_start_l2: penalty on its squared weights, in units of choices.
        max_groups: largest K that ``"auto"`` tries.
        max_length: longest text in tokens.
        model_options: kind of heads, adapters and so on, as
            :meth:`~torchrl_maxmin.rewards.RewardMixture.from_backbone` takes them.
        feature_options: where the warm start's features are kept, and in which type: ``cache`` and ``dtype``
            of :func:`~torchrl_maxmin.rewards.features.feature_rows`.
        identifiability: whether to report on the linear mixture if users can be told apart; with one
            given group there is nothing to tell apart.
        seed: of starts, batches and new heads.
        device: where the reward model trains.
        on_round: called after every round with the state that ``resume`` takes.
        on_interruption: called after the step in hand with such a state, where Ctrl-C or SIGTERM ends the
            run; returns where it is written.
        resume: go on from such a state; the result is bit-equal to a run that never stopped.
        sharded: whether each of the processes that work as one holds a part of the trunk.
        **optimizer: rounds, steps, rates and batch sizes: fields of
            :class:`~torchrl_maxmin.rewards.fine_tuning.FineTuningSettings`.

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
    tuning = FineTuningSettings(seed=seed, **optimizer)
    torch.manual_seed(seed)
    options = model_options or {}
    if resume is not None:
        warm = resume["warm_start"]
    elif use_true_groups:
        warm = from_true_groups(data)
    elif num_groups == 1:
        warm = WarmStart(torch.ones(data.num_users, 1))
    else:
        reading = {name: options[name] for name in _READING if name in options} | (feature_options or {})
        size = tuning.scoring_batch_size
        fit = {"num_restarts": num_restarts, "assignment": assignment, "l2": warm_start_l2}
        choices: PairChoices
        if shares_rows() and num_groups != "auto" and not identifiability:
            choices = shared_feature_choices(data, model, max_length, device, size, **reading)
            fit["m_step"] = AdamStepOfShares
        else:
            choices = feature_choices(data, model, max_length, device, size, **reading)
        warm = linear_warm_start(choices, num_groups, max_groups, seed, evidence=identifiability, **fit)
        if identifiability:
            warm = replace(warm, identifiability=_identifiability(data, choices, warm, seed))
        warm = of_main_process(lambda: warm)  # other processors may round otherwise
    start = warm.responsibilities
    mixture = RewardMixture.from_backbone(model, start.shape[-1], **options).to(device)
    if sharded:
        shard(backbone_of(mixture.model))
    pairs = PairTokens(data, mixture.encoder(max_length), mixture.reader.pad_id)
    bar = progress_bar(f"reward model, K={mixture.num_groups}", tuning.total_steps)
    with bar as advance, signals_held() as waiting:
        history: list[dict[str, Any]] = [] if resume is None else resume["history"]

        def state_at(responsibilities: Tensor) -> dict[str, Any]:
            own = {"responsibilities": responsibilities, "history": history, "warm_start": warm}
            return m_step.state_dict() | own

        def on_step(responsibilities: Tensor) -> None:
            advance(note=f"loss {m_step.loss:.3f}")
            if on_interruption is not None and (signum := waiting()):
                raise Interrupted.at_checkpoint(signum, on_interruption(state_at(responsibilities)))

        def keep(responsibilities: Tensor, records: list[dict[str, Any]]) -> None:
            history[:] = records
            if on_round is not None:
                on_round(state_at(responsibilities))

        m_step = FineTuning(mixture, pairs, tuning, on_step)
        if resume is not None:
            m_step.load_state_dict(resume)
            start = resume["responsibilities"]
        advance(len(history) * tuning.steps_per_round + m_step.num_steps)

        settings = EMSettings(
            assignment="known" if use_true_groups else assignment,
            num_rounds=tuning.num_rounds,
            convergence_tolerance=convergence_tolerance,
        )
        em = run_em(pairs, m_step, settings, start=start, history=history, on_round=keep)
    responsibilities = em.responsibilities
    if not use_true_groups:
        order = responsibilities.sum(0).argsort(descending=True, stable=True)
        mixture.permute_groups_(order)
        responsibilities = responsibilities[:, order]
    mixture.log_prior.copy_(mixing_weights(responsibilities))
    figures = {}
    if heldout is not None:
        later = PairTokens(heldout, mixture.encoder(max_length), mixture.reader.pad_id)
        known = dict(zip(data.user_ids, responsibilities, strict=True))
        prompts = [text_key(prompt) for prompt in heldout.prompts]
        size = tuning.scoring_batch_size
        figures = heldout_figures(mixture, later, heldout.user_ids, known, size, prompts=prompts)
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
        warm.restarts,
        warm.establishment,
    )


@torch.no_grad()
def heldout_figures(
    mixture: RewardMixture,
    pairs: PairTokens,
    user_ids: list[str],
    responsibilities: Mapping[str, Tensor],
    batch_size: int = SCORED_AT_ONCE,
    *,
    prompts: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Predictive log-likelihood a pair, and each head's accuracy on the users it was given.

    Each user counts once; the intervals are t over those users and, with ``prompts`` [P], over the prompts
    that they share, 95%, and null with one user. ``notes`` say why they may be too narrow.
    """
    unknown = mixture.log_prior.exp().cpu()
    known = torch.stack([responsibilities.get(user, unknown) for user in user_ids])
    margins = pairs.margins(mixture, batch_size)
    by_user = pairs.log_likelihood_by_user(margins)
    predictive = posterior(by_user, known.double().log()).log_likelihood.sum().item() / pairs.num_choices
    groups = known.argmax(-1)
    right = (margins.gather(1, groups[pairs.row_users].unsqueeze(1)) > 0).double()
    found = accuracy_by_group(
        right.squeeze(1), pairs.row_users, groups, mixture.num_groups,
        row_weights=pairs.row_weights, prompts=prompts, num_resamples=0, warn=False,
    )  # fmt: skip
    accuracy = [[None] * 3 if interval is None else interval.to_list() for interval in found]
    return {
        "log_likelihood": predictive,
        "head_accuracy": [estimate for estimate, *_ in accuracy],
        "head_accuracy_interval": [ends for _, *ends in accuracy],
        "head_accuracy_notes": [[] if interval is None else list(interval.notes) for interval in found],
        "pairs": len(pairs),
    }


# -- where EM starts -------------------------------------------------------------------------------


@dataclass(frozen=True)
class WarmStart:
    """Responsibilities of the users before the trunk is tuned, and where they come from.

    Attributes:
        responsibilities: [U, K].
        choice: how K was chosen, when it was.
        identifiability: whether users can be told apart, when that was asked for.
        group_names: names of the true groups, when these are the responsibilities.
        restarts: whether the starts of the linear mixture agree.
        establishment: whether the groups are there, when that was asked for.
    """

    responsibilities: Tensor
    choice: NumGroupsChoice | None = None
    identifiability: IdentifiabilityReport | None = None
    group_names: list[str] | None = None
    restarts: Restarts | None = None
    establishment: Establishment | None = None


def from_true_groups(data: PreferenceDataset) -> WarmStart:
    """One-hot groups [U, K] as the data names them, the largest first."""
    assert data.groups is not None
    names = [name for name, _ in Counter(data.groups).most_common()]
    index = torch.tensor([names.index(group) for group in data.groups])
    return WarmStart(nn.functional.one_hot(index, len(names)).float(), group_names=names)


def linear_warm_start(
    choices: PairChoices,
    num_groups: int | str,
    max_groups: int,
    seed: int,
    *,
    evidence: bool = False,
    **fit: Any,
) -> WarmStart:
    """Fit the linear mixture; with ``"auto"`` choose K first, as ``diagnose`` does.

    Args:
        choices: of all users.
        num_groups: K, or ``"auto"``.
        max_groups: largest K that ``"auto"`` tries.
        seed: of folds and starts.
        evidence: whether to ask if the groups are there.
        **fit: of the mixture that EM begins with.
    """
    choice, establishment, searched = None, None, choices
    if num_groups == "auto" or evidence:
        searched = searched_choices(choices)
    if num_groups == "auto":
        choice = choose_num_groups(searched, max_groups, seed=seed, l2_candidates=L2_CANDIDATES, **SEARCH)
        num_groups = choice.num_groups
    if evidence and int(num_groups) > 1:
        penalties = {} if choice is None else choice.l2
        establishment = evidence_for(searched, int(num_groups), penalties, seed)
    found = fit_choices(choices, int(num_groups), seed, **fit)
    return WarmStart(found.responsibilities, choice, restarts=found.restarts, establishment=establishment)


def _identifiability(
    data: PreferenceDataset, choices: PairChoices, warm: WarmStart, seed: int
) -> IdentifiabilityReport:
    """The report on all users, or on :data:`REPORT_USERS` of them drawn at random."""
    every = [text_key(prompt) for prompt in data.prompts]
    prompts: Sequence[Any] = [every[row] for row in data.distinct_rows.tolist()]
    if data.num_users > REPORT_USERS:
        drawn = torch.randperm(data.num_users, generator=torch.Generator().manual_seed(seed))
        kept = torch.zeros(data.num_users, dtype=torch.bool)
        kept[drawn[:REPORT_USERS]] = True
        prompts = [prompts[row] for row in kept[choices.row_users].nonzero().flatten().tolist()]
        choices = choices.take_users(kept.nonzero().flatten())
    return identifiability_report(
        choices.differences,
        choices.user_offsets,
        warm.responsibilities.shape[-1],
        prompts=prompts,
        row_weights=choices.row_weights,
        judgements=choices.judgements,
        seed=seed,
        **_REPORT,
    )
