"""MaxMin PPO of a causal language model: the parts that :func:`~torchrl_maxmin.trainers.ppo.train` takes."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torchrl.data.llm import AdaptiveKLController, ConstantKLController

from torchrl_maxmin.collectors import GroupStatistics
from torchrl_maxmin.core.distributed import across_ranks, is_main_process, rank, shares_rows
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run import resolve_device, write_config, write_json
from torchrl_maxmin.core.run_folder import stage
from torchrl_maxmin.models.full import LanguageNetworks
from torchrl_maxmin.models.loading import load_tokenizer, require_causal_lm
from torchrl_maxmin.models.making import make_networks
from torchrl_maxmin.models.sampling import encode_prompts
from torchrl_maxmin.models.sequences import require_positions
from torchrl_maxmin.preferences.io.files import load_prompts
from torchrl_maxmin.rewards import load_reward_model
from torchrl_maxmin.rewards.base import RewardModel
from torchrl_maxmin.rewards.functions import (
    FunctionRewards,
    distinct_rows,
    extra_columns,
    load_functions,
)
from torchrl_maxmin.rewards.on_trunk import SavedMixture
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.rollouts.certificate import policy_certificate
from torchrl_maxmin.rollouts.engine import Engine, EnginePolicy
from torchrl_maxmin.rollouts.language import CalibratedRewards, LanguageRollouts
from torchrl_maxmin.rollouts.language_workers import WorkerLanguageRollouts
from torchrl_maxmin.rollouts.ray_workers import ray_session
from torchrl_maxmin.rollouts.vllm import VLLMEngine
from torchrl_maxmin.rollouts.vllm_server import VLLMServer
from torchrl_maxmin.stats.interval import SCHEMA_VERSION
from torchrl_maxmin.trainers.card import write_card
from torchrl_maxmin.trainers.learner import Learner
from torchrl_maxmin.trainers.lm_workers import load_reference, start_workers
from torchrl_maxmin.trainers.monitors import Metrics, Monitor, monitors_of_rewards
from torchrl_maxmin.trainers.ppo import PPOParts, find_state, restore, train
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.ppo_settings import MAY_CHANGE, adversary_of
from torchrl_maxmin.trainers.token_advantages import LanguageAdvantages, make_advantages
from torchrl_maxmin.trainers.watch import warnings_of
from torchrl_maxmin.welfare import Egalitarian

__all__ = ["LanguageParts", "build_ppo", "run_ppo", "train_policy"]


@dataclass
class LanguageParts(PPOParts):
    """The parts of a language model's run."""

    models: LanguageNetworks
    rollouts: LanguageRollouts | WorkerLanguageRollouts
    advantages: LanguageAdvantages


@across_ranks
@stage(
    "ppo",
    inputs=("model_name_or_path", "dataset_name", "reward_model_path", "reward_funcs", "monitor_funcs"),
    may_change=MAY_CHANGE,
    length="num_iterations",
)
def run_ppo(config: PPOConfig) -> Path:
    """Train a policy and save it; returns its folder.

    Raises:
        UserError: before any work, for settings, models, data or folders that cannot be used.
    """
    with ray_session(config.rollout_workers, config.ray_address, config.rollout_worker_gpus):
        return train_policy(config, build_ppo(config))


def train_policy(config: PPOConfig, parts: LanguageParts) -> Path:
    """Train what :func:`build_ppo` built; returns the policy's folder."""
    folder = Path(config.output_dir)
    if train(config, **vars(parts)):
        parts.models.save(folder)
        calibration = parts.rollouts.rewards.calibration
        outcome = {
            "schema_version": SCHEMA_VERSION,
            "calibration": calibration.to_dict(),
            "calibrated_by_prompt": calibration.by_prompt,
            "group_weights": parts.statistics.adversary.weights.tolist(),
            "kl_coef": float(parts.advantages.kl.coef),
            "warnings": warnings_of(config),
        }
        if is_main_process():
            write_card(config, outcome["group_weights"])
        write_json(folder / "summary.json", json.loads(json.dumps(outcome)))
    return folder


def build_ppo(config: PPOConfig) -> LanguageParts:
    """Build the parts of a run, and take back the state of the checkpoint that it goes on from.

    Raises:
        UserError: before any work, for settings, models, data or folders that cannot be used.
    """
    config.check()
    device, folder = resolve_device(config.device), Path(config.output_dir)
    require_causal_lm(config.model_name_or_path)
    table, texts = load_prompts(config.dataset_name, config.dataset_split, "ppo")
    tokenizer = config.apply_chat(load_tokenizer(config.model_name_or_path))
    reward: RewardModel | SavedMixture | None = None
    if config.reward_model_path:
        saved = SavedMixture.find(config.reward_model_path) if config.shares_reward_trunk else None
        reward = saved or load_reward_model(config.reward_model_path)
    functions = load_functions(config.reward_funcs)
    monitor_functions = load_functions(config.monitor_funcs)
    columns = extra_columns([*functions, *monitor_functions], table, range(len(texts)))
    rows = distinct_rows(texts, columns)
    texts = [texts[row] for row in rows]
    columns = {name: [values[row] for row in rows] for name, values in columns.items()}
    known = (tokenizer, texts, columns)
    of_functions = FunctionRewards(functions, *known, timeout=config.reward_timeout)
    monitors = monitors_of_rewards(
        [FunctionRewards([function], *known, timeout=config.reward_timeout) for function in monitor_functions]
    )
    state = find_state(config, config.num_iterations)

    workers = start_workers(config)
    reference = load_reference(config, tokenizer, device)
    if isinstance(reward, SavedMixture):
        reward = reward.shared_with(reference.model, tokenizer)
    prompts = encode_prompts(tokenizer, texts, config.max_prompt_length)
    require_positions(reference.model, prompts["prompt_tokens"].shape[-1], config.response_length)
    # a win rate is at least 0, and a response that does not end pays the penalty
    shares = None if reward is None else reward.log_prior.exp()
    num_groups = of_functions.num_groups if reward is None else reward.num_groups
    adversary = adversary_of(config, num_groups, shares, disagreement=-config.missing_eos_penalty)
    models = make_networks(
        config,
        reference,
        tokenizer,
        # the last column is the KL penalty
        adversary.num_groups + 1 if config.advantage == "gae" else 0,
        critic=config.critic,
        merge_adapter=config.merge_adapter,
        entropy=config.entropy_coeff > 0,
        scoring_batch_size=config.scoring_batch_size,
    )
    start = 0 if state is None else state["iteration"]
    # before the calibration, so that what an engine cannot serve is known before long work
    sampler = engine_policy(config, models, prompts, start) if config.samples_in_vllm else None
    if isinstance(reward, SavedMixture):
        reward = reward.on(models)
    source: MixtureRewards | FunctionRewards = of_functions
    if reward is not None:
        source = MixtureRewards(reward.to(device), tokenizer, texts, reference.ends)
    rewards = CalibratedRewards(
        source,
        ends=reference.ends,
        missing_eos_penalty=config.missing_eos_penalty,
        scoring_batch_size=config.scoring_batch_size,
        folder=folder,
    )
    if state is None:
        rewards.fit(
            reference,
            prompts,
            config.calibration,
            num_prompts=config.calibration_prompts,
            num_samples=config.calibration_samples,
            baseline_samples=config.baseline_samples,
            by_prompt=config.objective != "min_of_means",
        )
    else:
        rewards.load_state_dict(state, config.calibration)
    kl: Any = ConstantKLController(kl_coef=config.beta)
    if config.kl_controller == "adaptive":
        kl = AdaptiveKLController(
            init_kl_coef=config.beta, target=config.kl_target, horizon=config.kl_horizon
        )
    if state is not None:
        kl.coef = state["kl_coef"]
    if config.gap_steps:
        monitors.append(monitor_gap(config, models, rewards, prompts))
    order: dict[str, Any] = {
        "batch_size": config.rollout_batch_size,
        "num_batches": config.num_iterations,
        "num_generations": config.num_generations,
        "minimum": config.objective == "mean_of_mins",
        "seed": config.seed,
        "start": start,
    }
    rollouts: LanguageRollouts | WorkerLanguageRollouts
    if workers is None:
        trial = not config.use_peft and not shares_rows() and sampler is None
        rollouts = LanguageRollouts(models.policy, rewards, prompts, **order, trial=trial, sampler=sampler)
    else:
        order |= {"max_staleness": config.max_staleness, "state": state}
        rollouts = WorkerLanguageRollouts(models, workers, rewards, prompts, **order)
        monitors.append(rollouts.batches.metrics)
    parts = LanguageParts(
        models=models,
        rollouts=rollouts,
        statistics=GroupStatistics(
            adversary,
            prompt_welfare=Egalitarian() if config.objective == "mean_of_prompt_mins" else None,
        ),
        advantages=make_advantages(config, models, kl, fresh=state is None),
        learner=Learner(
            config,
            models,
            config.num_iterations,
            config.rollout_batch_size,
            config.optim,
            loss_mask_key="action_mask",
        ),
        monitors=monitors,
        start=start,
        stop_at_gap=config.stop_at_gap or float("-inf"),
    )
    if rank():
        torch.manual_seed(config.seed + rank())  # dropout of other rows is another
    restore(state, parts, folder)
    write_config(folder, config)
    return parts


def engine_policy(
    config: PPOConfig, models: LanguageNetworks, prompts: TensorDict, start: int
) -> EnginePolicy:
    """The policy as ``--rollout_engine vllm`` samples it.

    Raises:
        UserError: where vLLM cannot serve the model, or computes another.
    """
    options: dict[str, Any] = {
        "max_prompt_length": prompts["prompt_tokens"].shape[-1],
        "max_num_seqs": min(config.generation_batch_size, config.rollout_batch_size),
        "top_k": config.top_k,
        "top_p": config.top_p,
    }
    engine: Engine
    if config.vllm_server_base_url:
        engine = VLLMServer(models.policy, config.vllm_server_base_url, **options)
    else:
        options["gpu_memory_utilization"] = config.vllm_gpu_memory_utilization
        engine = VLLMEngine(models.policy, models.tokenizer, **options)
    return EnginePolicy(models, engine, prompts, seed=config.seed, version=start)


def monitor_gap(
    config: PPOConfig, models: LanguageNetworks, rewards: CalibratedRewards, prompts: TensorDict
) -> Monitor:
    """Log the certified distance to the optimum, every ``gap_steps`` iterations, where the samples can say.

    Its names are ``maxmin/duality_gap``, with ``_low`` and ``_high`` the ends of its interval, and with
    ``_mass``, ``_worth``, ``_prompt_mass`` and ``_prompt_loss`` what it rests on, see
    :class:`~torchrl_maxmin.welfare.Certificate`. Where it may stop the run, all planned looks share the error
    probability.
    """
    looks = max(config.num_iterations // config.gap_steps, 1) if config.stop_at_gap else 1
    device = next(models.policy.parameters()).device

    def monitor(iteration: int, batch: TensorDictBase, metrics: Metrics) -> Metrics:
        if iteration % config.gap_steps:
            return {}
        # its samples must not move the run's own random numbers
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            torch.manual_seed(config.seed)
            certificate = policy_certificate(
                models.policy,
                models.reference,
                lambda responses: rewards(responses.to(device)),
                prompts[: config.certificate_prompts],
                config.certificate_samples,
                metrics["objective/kl_coef"],
                scoring_batch_size=config.scoring_batch_size,
                reward_bound=config.reward_bound,
                looks=looks,
            )
        if config.stop_at_gap and certificate.high is not None and certificate.high <= config.stop_at_gap:
            console.print(f"stops: the gap is at most {certificate.high:.3g}, if {certificate.statement}")
        names = ("low", "high", "mass", "worth", "prompt_mass", "prompt_loss")
        parts = {"": certificate.value} | {f"_{name}": getattr(certificate, name) for name in names}
        return {f"maxmin/duality_gap{end}": value for end, value in parts.items() if value is not None}

    return monitor
