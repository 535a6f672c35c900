"""MaxMin PPO of a causal language model, on TorchRL's parts; the loop itself is :class:`PPOLoop`'s."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data.llm import AdaptiveKLController, ConstantKLController

from torchrl_maxmin.collectors import MaxMinCollector
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.run import (
    leave_no_empty_output,
    nonfinite_batch,
    seed_everything,
    write_config,
    write_json,
)
from torchrl_maxmin.envs import TokenEnv
from torchrl_maxmin.modules import TokenCritic, TokenPolicy, TokenScorer
from torchrl_maxmin.modules.checks import check_first_rollout
from torchrl_maxmin.modules.loading import load_tokenizer, require_causal_lm
from torchrl_maxmin.modules.sampling import encode_prompts
from torchrl_maxmin.modules.sequences import backbone_of, penalise_missing_eos
from torchrl_maxmin.modules.trunks import require_positions
from torchrl_maxmin.objectives import VectorGAE, whiten
from torchrl_maxmin.objectives.token_rewards import token_steps
from torchrl_maxmin.preferences.io.files import load_prompts
from torchrl_maxmin.rewards import Calibration, load_reward_model
from torchrl_maxmin.rewards.calibration import mean_of_present
from torchrl_maxmin.rewards.source import (
    FunctionRewards,
    MixtureRewards,
    NonFiniteRewards,
    distinct_rows,
    extra_columns,
    fill_absent,
    load_functions,
    reference_rewards,
)
from torchrl_maxmin.rollouts.certificate import policy_certificate
from torchrl_maxmin.trainers.ppo_adversary import adversary_of
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.ppo_loop import PPOLoop
from torchrl_maxmin.trainers.ppo_metrics import rollout_metrics
from torchrl_maxmin.welfare import Egalitarian

__all__ = ["PPOTrainer", "run_ppo"]


@leave_no_empty_output
def run_ppo(config: PPOConfig) -> Path:
    """Train a policy and save it; returns its folder.

    Raises:
        UserError: before any work, for settings, models, data or folders that cannot be used.
    """
    trainer = PPOTrainer(config)
    trainer.train()
    return trainer.folder


class PPOTrainer(PPOLoop):
    """The policy stage, built from a config.

    Args:
        config: see :class:`PPOConfig`.
    """

    config: PPOConfig

    def __init__(self, config: PPOConfig):
        super().__init__(config)
        self.num_iterations = config.num_iterations
        require_causal_lm(config.model_name_or_path)
        table, texts = load_prompts(config.dataset_name, config.dataset_split, "ppo")
        self.tokenizer = config.apply_chat(load_tokenizer(config.model_name_or_path))
        mixture = load_reward_model(config.reward_model_path) if config.reward_model_path else None
        functions = load_functions(config.reward_funcs)
        monitors = load_functions(config.monitor_funcs)
        columns = extra_columns([*functions, *monitors], table, range(len(texts)))
        rows = distinct_rows(texts, columns)
        texts = [texts[row] for row in rows]
        columns = {name: [values[row] for row in rows] for name, values in columns.items()}
        self.rewards: MixtureRewards | FunctionRewards
        if mixture is None:
            self.rewards = FunctionRewards(functions, self.tokenizer, texts, columns)
        else:
            self.rewards = MixtureRewards(mixture.to(self.device), self.tokenizer, texts)
        self.monitor = FunctionRewards(monitors, self.tokenizer, texts, columns) if monitors else None
        saved = self._saved()

        seed_everything(config.seed)
        self.reference = self._load_policy()
        self.policy = copy.deepcopy(self.reference)  # not loaded again: a new pad token's row is random
        if isinstance(self.rewards, MixtureRewards):
            self.rewards.eos_token_ids = self.policy.eos_token_ids
        self.prompts = encode_prompts(self.tokenizer, texts, config.max_prompt_length)
        require_positions(self.policy.model, self.prompts["prompt_tokens"].shape[-1], config.response_length)
        shares = None if mixture is None else mixture.log_prior.exp()
        # a win rate is at least 0, and a response that does not end pays the penalty
        self.adversary = adversary_of(
            config, self.rewards.num_groups, shares, disagreement=-config.missing_eos_penalty
        )
        self.fresh = saved is None  # the policy is the reference still
        self.baseline: Tensor | None = None
        self.first_silence = True  # reported once
        if saved is None:
            self.calibration, self.neutral = self._calibrate()
            if config.objective != "min_of_means":
                self.baseline = self._reference_means()
                self.neutral = torch.zeros_like(self.neutral)
        else:
            self.calibration, self.baseline = Calibration.from_dict(saved["calibration"]), saved["baseline"]
            self.neutral = saved.get("neutral", torch.zeros(self.rewards.num_groups))
            if self.calibration.method != config.calibration:
                raise UserError(
                    f"the checkpoint's rewards are calibrated by {self.calibration.method}: resume with "
                    f"--calibration {self.calibration.method}, or start another run for {config.calibration}"
                )
        self._build_learner()
        if saved is not None:
            self._restore(saved)
        self._build_collector()
        if saved is not None:
            self._restore_random(saved)
        write_config(self.folder, config)

    # -- parts ----------------------------------------------------------------------------------

    def _load_policy(self) -> TokenPolicy:
        return TokenPolicy.from_pretrained(
            self.config.model_name_or_path,
            self.tokenizer,
            max_new_tokens=self.config.response_length,
            temperature=self.config.temperature,
            device=self.device,
        )

    def _calibrate(self) -> tuple[Calibration, Tensor]:
        """Fit the calibration on samples of the reference policy; also returns their calibrated mean [K]."""
        config = self.config
        chosen = self.prompts[torch.randperm(len(self.prompts))[: config.calibration_prompts]]
        raw = reference_rewards(self.reference, chosen, self.rewards, config.calibration_samples)
        calibration = Calibration.fit(raw, config.calibration)
        torch.save(raw, self.folder / "reference_rewards.pt")
        return calibration, calibration.apply(mean_of_present(raw, (0, 1)))

    def _reference_means(self) -> Tensor:
        """The reference's mean calibrated reward [N, K] for every prompt.

        A minimum taken response by response compares groups within one prompt, where a
        Bradley-Terry reward may have any offset.
        """
        raw = reference_rewards(self.reference, self.prompts, self.rewards, self.config.calibration_samples)
        return mean_of_present(self.calibration.apply(raw), 1).to(self.device)

    def _build_learner(self) -> None:
        config = self.config
        columns = self.adversary.num_groups + 1  # the last column is the KL penalty
        self.critic = TokenCritic(copy.deepcopy(backbone_of(self.reference.model)), columns).to(self.device)
        self.reference.requires_grad_(False)
        self._build_loss(
            TokenScorer(self.policy, entropy=config.entropy_coeff > 0), loss_mask_key="action_mask"
        )
        self.gae = VectorGAE(gamma=config.gamma, lmbda=config.lam, value_network=None, mask_key="mask")
        self._build_optimizer(config.rollout_batch_size)
        self.kl_controller: Any = ConstantKLController(kl_coef=config.beta)
        if config.kl_controller == "adaptive":
            self.kl_controller = AdaptiveKLController(
                init_kl_coef=config.beta, target=config.kl_target, horizon=config.kl_horizon
            )

    def _build_collector(self) -> None:
        config = self.config
        self.env = TokenEnv(
            self.prompts,
            self._group_rewards,
            num_groups=self.rewards.num_groups,
            num_prompts=config.rollout_batch_size // config.num_generations,
            num_generations=config.num_generations,
            max_new_tokens=config.response_length,
            eos_token_id=self.policy.eos_token_ids,
            vocab_size=self.policy.model.get_input_embeddings().num_embeddings,
            minimum=config.objective == "mean_of_mins",
            seed=config.seed,
            device=self.device,
        )
        self.env.batch_index = self.start
        frames = config.rollout_batch_size
        self.collector = MaxMinCollector(
            self.env,
            self.policy,
            adversary=self.adversary,
            prompt_welfare=Egalitarian() if config.objective == "mean_of_prompt_mins" else None,
            frames_per_batch=frames,
            total_frames=frames * max(config.num_iterations - self.start, 1),
        )

    def _group_rewards(self, responses: TensorDictBase) -> Tensor:
        """Calibrated rewards [B, K], with the penalty for a response that does not end."""
        try:
            rewards = self.calibration.apply(self.rewards(responses))
        except NonFiniteRewards as error:
            raise nonfinite_batch(responses, self.folder, "a reward is nan") from error
        if self.baseline is not None:
            rewards = rewards - self.baseline[responses["prompt_index"]]
        silent = rewards.isnan().all(0)
        if bool(silent.any()) and self.first_silence:
            self.first_silence = False
            groups = silent.nonzero().flatten().tolist()
            console.print(
                f"no response of a batch has a reward for group(s) {groups}: each counts as the reference's "
                "mean, and gives no signal",
                markup=False,
                soft_wrap=True,
            )
        rewards = fill_absent(rewards, self.neutral)
        penalty = self.config.missing_eos_penalty
        return penalise_missing_eos(rewards, responses, self.policy.eos_token_ids, penalty)

    # -- an iteration ---------------------------------------------------------------------------

    def _measure(self, iteration: int, batch: TensorDict, losses: dict[str, Tensor]) -> dict[str, float]:
        config = self.config
        metrics = rollout_metrics(batch, losses, self.kl_controller.coef, self.rewards.num_groups)
        if self.monitor is not None:
            truth = self.monitor(batch.cpu()).nanmean(0)
            metrics |= {f"monitor/{k}/mean": value for k, value in enumerate(truth.tolist())}
        if config.gap_steps and (iteration + 1) % config.gap_steps == 0:
            metrics |= self._gap()
        return metrics

    def _after(self, metrics: dict[str, float]) -> bool:
        self._control_kl(metrics["objective/kl"])
        gap = metrics.get("maxmin/duality_gap_high", math.inf)
        return self.config.stop_at_gap > 0 and gap <= self.config.stop_at_gap

    def _note(self, metrics: dict[str, float]) -> str:
        return f"{super()._note(metrics)}  kl {metrics['objective/kl']:z.1f}"

    def _gap(self) -> dict[str, float]:
        """The certified distance to the optimum; no entry where the samples cannot say."""
        config = self.config
        # its samples must not move the run's own random numbers
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(config.seed)
            certificate = policy_certificate(
                self.policy,
                self.reference,
                lambda responses: self._group_rewards(responses.to(self.device)),
                self.prompts[: config.certificate_prompts],
                config.certificate_samples,
                self.kl_controller.coef,
            )
        parts = {"": certificate.value, "_low": certificate.low, "_high": certificate.high}
        return {f"maxmin/duality_gap{end}": value for end, value in parts.items() if value is not None}

    def _control_kl(self, kl: float) -> None:
        # the controller takes the penalty that each response paid, -coef * kl
        controller = self.kl_controller
        controller.update([-controller.coef * kl] * self.config.rollout_batch_size)
        controller.coef = float(controller.coef)

    @torch.no_grad()
    def _prepare(self, rollout: TensorDictBase) -> TensorDict:
        """Advantages of a rollout: reference, values, one column a group, then the weighted sum."""
        if rollout.ndim == 2:
            rollout = rollout[:, 0]  # an episode is one step
        batch = rollout.select(
            "prompt_tokens", "prompt_mask", "prompt_index", "action", "action_mask", "sample_log_prob",
            "group_weights", "group_utilities", ("next", "reward"), ("next", "group_reward"),
        )  # fmt: skip
        batch["ref_log_prob"] = self.reference.log_prob(batch)
        if self.fresh:
            check_first_rollout(self.policy, batch)
            self.fresh = False
        self.critic(batch)
        steps = token_steps(batch, self.kl_controller.coef, self.config.kl_estimator)
        steps["group_weights"] = batch["group_weights"][:, None].expand(*steps.shape, -1)
        self.gae(steps)
        batch["advantage"] = whiten(steps["advantage"], steps["mask"])
        batch["value_target"] = steps["value_target"]
        return batch

    def _rows(self, batch: TensorDict) -> TensorDict:
        return batch.exclude("next", "group_utilities")

    # -- state ----------------------------------------------------------------------------------

    def _state(self) -> dict[str, Any]:
        return {
            "kl_coef": self.kl_controller.coef,
            "calibration": self.calibration.to_dict(),
            "baseline": self.baseline,
            "neutral": self.neutral,
        }

    def _load_state(self, state: dict[str, Any]) -> None:
        self.kl_controller.coef = state["kl_coef"]

    def _finish(self) -> None:
        self.policy.model.save_pretrained(self.folder)
        self.tokenizer.save_pretrained(self.folder)
        outcome = {
            "calibration": self.calibration.to_dict(),
            "group_weights": self.adversary.weights.tolist(),
            "kl_coef": float(self.kl_controller.coef),
        }
        write_json(self.folder / "summary.json", json.loads(json.dumps(outcome)))
