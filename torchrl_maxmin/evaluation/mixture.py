"""What the reward mixture adds to an evaluation: EM's figures, sensitivity to calibration, certificate."""

from __future__ import annotations

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from tensordict import TensorDict

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import seed_everything
from torchrl_maxmin.evaluation.results import REFERENCE
from torchrl_maxmin.evaluation.settings import EvaluateConfig
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.loading import reading
from torchrl_maxmin.models.sequences import penalise_missing_eos
from torchrl_maxmin.rewards import Calibration
from torchrl_maxmin.rewards.calibration import CALIBRATIONS
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.rollouts.certificate import policy_certificate

__all__ = ["mixture_figures", "read_summary", "trained_with"]


@torch.no_grad()
def mixture_figures(
    config: EvaluateConfig,
    scorers: dict[str, MixtureRewards],
    reward: dict[str, Any],
    trained: dict[str, Any],
    group_names: list[str],
    utilities: dict[str, np.ndarray],
    responses: dict[str, TensorDict],
    prompts: TensorDict,
    reference: TokenPolicy,
) -> dict[str, Any]:
    """Compute what the reward mixture adds: EM's figures, calibration sensitivity, certificate."""
    extra: dict[str, Any] = {}
    raw = scorers[REFERENCE].in_batches(responses[REFERENCE])
    extra["em"] = {
        "num_groups_selected": raw.shape[-1],
        "user_accuracy": reward.get("user_accuracy"),
        "heldout_log_likelihood": reward.get("heldout", {}).get("log_likelihood"),
        "head_accuracy": reward.get("heldout", {}).get("head_accuracy"),
    }
    if reward.get("num_groups", 1) > 1:
        evidence = reward.get("evidence") or {}
        extra["groups_found"] = {
            "established": reward.get("established"),
            "reasons": evidence.get("reasons", []),
        }
        extra["groups_found"] |= {key: evidence.get(key) for key in ("agreement", "gain", "num_refits")}
    heads = reward.get("head_of_group", {})
    if all(name in heads for name in group_names):
        if utilities:
            truth = utilities[REFERENCE].reshape(len(raw), -1)
            extra["em"]["head_correlation"] = {
                name: float(np.corrcoef(raw[:, heads[name]].numpy(), truth[:, g])[0, 1])
                for g, name in enumerate(group_names)
            }
        extra["group_users"] = [reward["users"][heads[name]] for name in group_names]
    if config.certify not in responses:
        reason = f"no policy named {config.certify!r} was evaluated; name the one meant by --certify"
        extra["certificate"] = {**_NOTHING, "reason": reason}
        return extra
    names = {head: name for name, head in heads.items()}
    target = scorers[config.certify].in_batches(responses[config.certify])
    own, target = (rewards.reshape(len(prompts), config.num_samples, -1) for rewards in (raw, target))
    found: dict[str, tuple[Calibration, torch.Tensor]] = {}
    for method in CALIBRATIONS:
        with contextlib.suppress(UserError):  # one sample a prompt, or a constant head, has no scale
            calibration = Calibration.fit(own, method)
            found[method] = calibration, calibration.apply(target, own.unsqueeze(1)).mean((0, 1))
    groups = [names.get(k, f"group {k}") for k in range(own.shape[-1])]
    utilities_by = {
        method: dict(zip(groups, means.tolist(), strict=True)) for method, (_, means) in found.items()
    }
    used = trained.get("calibration", {}).get("method")
    extra["calibration"] = {"used": used, "utilities": utilities_by}
    if used in found:
        extra["calibration"]["offsets"] = _offsets(*found[used], groups, trained)
    extra["certificate"] = _certificate(config, scorers[config.certify], trained, prompts, reference, own)
    return extra


def _offsets(
    calibration: Calibration, means: torch.Tensor, groups: list[str], trained: dict[str, Any]
) -> dict[str, Any] | None:
    """Say how large the prompts' offsets are, and what they would do to a rollout's worst group."""
    if calibration.offset_deviation is None or calibration.within_deviation is None:
        return None
    by_prompt = Calibration.from_dict(trained["calibration"]).by_prompt
    num_prompts = max(1, trained.get("rollout_batch_size", 1) // trained.get("num_generations", 1))
    samples = trained.get("baseline_samples") if by_prompt else None
    deviation = (calibration.offset_deviation / calibration.within_deviation).tolist()
    return {
        "deviation": dict(zip(groups, deviation, strict=True)),
        "by_prompt": by_prompt,
        "num_prompts": num_prompts,
        "wrong_worst_group": calibration.wrong_worst_group(means, num_prompts, samples),
    }


_NOTHING: dict[str, Any] = {"value": None, "low": None, "high": None}


def read_summary(folder: str) -> dict[str, Any]:
    """Read what a stage wrote of itself, where it did."""
    path = Path(folder) / "summary.json"
    with reading("summary.json", folder):
        return json.loads(path.read_text()) if path.is_file() else {}


def trained_with(folder: str) -> dict[str, Any]:
    """Read the settings that a policy was trained with, and what came of them, where its folder has them."""
    settings = Path(folder) / "config.yaml"
    with reading("config.yaml", folder):
        given = yaml.safe_load(settings.read_text()) if settings.is_file() else {}
        return {**given, **read_summary(folder)}


def _certificate(
    config: EvaluateConfig,
    source: MixtureRewards,
    trained: dict[str, Any],
    prompts: TensorDict,
    reference: TokenPolicy,
    own: torch.Tensor,
) -> dict[str, Any]:
    """Certify the gap of a policy to the max-min optimum under the rewards that it was trained on."""
    beta = config.beta if config.beta is not None else trained.get("kl_coef")
    if config.truncated:
        return {**_NOTHING, "reason": "top_k and top_p leave out tokens that the optimum may need"}
    if "calibration" not in trained:
        return {**_NOTHING, "reason": f"the folder of {config.certify} does not say how it was trained"}
    if not beta:
        return {**_NOTHING, "reason": "without a KL penalty (beta 0) the optimum has no closed form"}
    calibration = Calibration.from_dict(trained["calibration"])
    if trained.get("reward_funcs") or len(calibration.shift) != source.num_groups:
        return {**_NOTHING, "reason": f"{config.certify} was not trained on this reward mixture"}
    seed_everything(config.seed)
    device = next(reference.parameters()).device
    policy = config.load_policy(config.folders()[config.certify], source.tokenizer, device)
    penalty = trained.get("missing_eos_penalty", 0.0)

    def rewards(responses: TensorDict) -> torch.Tensor:
        samples = own[responses["prompt_index"].cpu()] if calibration.by_prompt else None
        calibrated = calibration.apply(source.in_batches(responses), samples).double()
        return penalise_missing_eos(calibrated, responses, source.ends, penalty)

    some = prompts[: config.certificate_prompts]
    certificate = policy_certificate(
        policy, reference, rewards, some, config.certificate_samples, beta, reward_bound=config.reward_bound
    )
    return asdict(certificate)
