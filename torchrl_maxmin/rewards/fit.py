"""A reward mixture fitted to preferences, and what it says about the users.

Algorithm 2 of MaxMin-RLHF (arXiv 2402.08925), with responsibilities and mixing weights (``soft``) or the
paper's own hard assignment. EM is warm-started by a linear mixture on frozen features; its M-steps fine-tune
the shared trunk and all heads.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_maxmin.clustering.choices import PairChoices
from torchrl_maxmin.clustering.em import EMSettings, mixing_weights, run_em
from torchrl_maxmin.clustering.identifiability import IdentifiabilityReport, identifiability_report
from torchrl_maxmin.clustering.shares import AdamStepOfShares
from torchrl_maxmin.clustering.wants import items_of, wants_by_margins
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
from torchrl_maxmin.rewards.mixture_fit import MixtureFit, heldout_figures
from torchrl_maxmin.rewards.pairs import PairTokens, feature_choices, shared_feature_choices
from torchrl_maxmin.rewards.start import (
    WarmStart,
    from_true_groups,
    linear_warm_start,
    pair_contents,
    prompts_of,
)

__all__ = ["REPORT_USERS", "fit_mixture"]

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
        fit: dict[str, Any] = {"num_restarts": num_restarts, "assignment": assignment, "l2": warm_start_l2}
        choices: PairChoices
        if shares_rows() and num_groups != "auto" and not identifiability:
            choices = shared_feature_choices(data, model, max_length, device, size, **reading)
            fit["m_step"] = AdamStepOfShares
        else:
            choices = feature_choices(data, model, max_length, device, size, **reading)
        asked: dict[str, Any] = {"evidence": identifiability, "data": data, "device": device}
        warm = linear_warm_start(choices, num_groups, max_groups, seed, **asked, **fit)
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
    order = torch.arange(mixture.num_groups)
    if not use_true_groups:
        order = responsibilities.sum(0).argsort(descending=True, stable=True)
        mixture.permute_groups_(order)
        responsibilities = responsibilities[:, order]
    log_prior = mixing_weights(responsibilities)
    mixture.log_prior.copy_(log_prior)
    wants = None
    if identifiability and mixture.num_groups > 1:
        wants = _wants(data, m_step.margins()[:, order], log_prior)
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
        dict(warm.left_out),
        wants,
        warm.searched_users,
    )


def _wants(data: PreferenceDataset, margins: Tensor, log_prior: Tensor) -> list[dict[str, Any]]:
    """What each group wants, by margins [P, K] of all pairs."""
    contents, kept = pair_contents(data), margins[torch.from_numpy(data.distinct_rows)]
    rows = np.arange(len(kept))
    asked = kept.double().numpy(), log_prior.double().cpu().numpy(), rows, contents
    return wants_by_margins(*asked, items_of(contents, kept, rows))


def _identifiability(
    data: PreferenceDataset, choices: PairChoices, warm: WarmStart, seed: int
) -> IdentifiabilityReport:
    """The report on all users, or on :data:`REPORT_USERS` of them drawn at random."""
    prompts: Sequence[Any] = prompts_of(data)
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
