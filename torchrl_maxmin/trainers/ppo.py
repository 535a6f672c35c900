"""MaxMin PPO: Algorithm 1 of MaxMin-RLHF (arXiv 2402.08925) on TorchRL's parts.

The loop in :meth:`PPOTrainer.train` is the algorithm; everything above it builds its parts and
everything below it measures.
"""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.data.llm import AdaptiveKLController, ConstantKLController

from torchrl_maxmin.collectors import MaxMinCollector
from torchrl_maxmin.envs import TokenEnv
from torchrl_maxmin.errors import UserError
from torchrl_maxmin.modules import TokenCritic, TokenPolicy, TokenScorer
from torchrl_maxmin.modules.loading import load_tokenizer, require_model
from torchrl_maxmin.modules.sampling import encode_prompts
from torchrl_maxmin.modules.sequences import backbone_of
from torchrl_maxmin.objectives import MaxMinPPOLoss, VectorGAE, whiten
from torchrl_maxmin.objectives.token_rewards import token_steps
from torchrl_maxmin.preferences import load_table
from torchrl_maxmin.preferences.loading import require_columns
from torchrl_maxmin.progress import progress_bar
from torchrl_maxmin.rewards import Calibration, load_reward_model
from torchrl_maxmin.rewards.source import FunctionRewards, MixtureRewards, load_functions, reference_rewards
from torchrl_maxmin.trainers.checkpoint import (
    find_checkpoint,
    random_state,
    restore_random_state,
    save_checkpoint,
)
from torchrl_maxmin.trainers.ppo_adversary import adversary_of
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.ppo_gap import policy_certificate
from torchrl_maxmin.trainers.ppo_metrics import rollout_metrics
from torchrl_maxmin.trainers.run import (
    MetricsLog,
    prepare_output_dir,
    require_finite,
    resolve_device,
    seed_everything,
    write_config,
    write_json,
)
from torchrl_maxmin.welfare import Egalitarian

__all__ = ["PPOTrainer", "run_ppo"]


def run_ppo(config: PPOConfig) -> Path:
    """Train a policy and save it; returns its folder.

    Raises:
        UserError: before any work, for settings, models, data or folders that cannot be used.
    """
    trainer = PPOTrainer(config)
    trainer.train()
    return trainer.folder


class PPOTrainer:
    """The policy stage, built from a config.

    Args:
        config: see :class:`PPOConfig`.
    """

    def __init__(self, config: PPOConfig):
        config.check()
        self.config = config
        self.device = resolve_device(config.device)
        require_model(config.model_name_or_path)
        table = load_table(config.dataset_name, config.dataset_split)
        if len(table) == 0:
            raise UserError(f"{config.dataset_name} has no prompts")
        require_columns(table, ["prompt"], "ppo")
        self.tokenizer = load_tokenizer(config.model_name_or_path)
        mixture = load_reward_model(config.reward_model_path) if config.reward_model_path else None
        functions, monitors = load_functions(config.reward_funcs), load_functions(config.monitor_funcs)
        self.folder = Path(config.output_dir)
        saved = (
            find_checkpoint(self.folder, config.resume_from_checkpoint)
            if config.resume_from_checkpoint
            else None
        )
        if saved is None:
            prepare_output_dir(self.folder)

        seed_everything(config.seed)
        self.reference = self._load_policy()
        self.policy = copy.deepcopy(self.reference)  # not loaded again: a new pad token's row is random
        self.prompts = encode_prompts(
            self.tokenizer, list(dict.fromkeys(table["prompt"][:])), config.max_prompt_length
        )
        self.rewards: MixtureRewards | FunctionRewards
        if mixture is not None:
            self.rewards = MixtureRewards(mixture.to(self.device), self.tokenizer)
        else:
            self.rewards = FunctionRewards(functions, self.tokenizer)
        self.monitor = FunctionRewards(monitors, self.tokenizer) if monitors else None
        self.baseline: Tensor | None = None
        if saved is None:
            self.calibration = self._calibrate()
            if config.objective != "min_of_means":
                self.baseline = self._reference_means()
        else:
            self.calibration, self.baseline = Calibration.from_dict(saved["calibration"]), saved["baseline"]
        shares = None if mixture is None else mixture.log_prior.exp()
        self.adversary = adversary_of(config, self.rewards.num_groups, shares)
        self._build_learner()
        self.start = 0
        if saved is not None:
            self._restore(saved)
        self._build_collector()
        if saved is not None:
            restore_random_state(saved["random"])
        write_config(self.folder, config)

    # -- parts ----------------------------------------------------------------------------------

    def _load_policy(self) -> TokenPolicy:
        return TokenPolicy.from_pretrained(
            self.config.model_name_or_path,
            self.tokenizer,
            max_new_tokens=self.config.response_length,
            temperature=self.config.temperature,
        ).to(self.device)

    def _calibrate(self) -> Calibration:
        """Fit the calibration on samples of the reference policy."""
        config = self.config
        chosen = self.prompts[torch.randperm(len(self.prompts))[: config.calibration_prompts]]
        raw = reference_rewards(self.reference, chosen, self.rewards, config.calibration_samples)
        calibration = Calibration.fit(raw, config.calibration)
        torch.save(raw, self.folder / "reference_rewards.pt")
        return calibration

    def _reference_means(self) -> Tensor:
        """The reference's mean calibrated reward [N, K] for every prompt.

        A minimum taken response by response compares groups within one prompt, where a
        Bradley-Terry reward may have any offset.
        """
        raw = reference_rewards(self.reference, self.prompts, self.rewards, self.config.calibration_samples)
        return self.calibration.apply(raw).mean(1).to(self.device)

    def _build_learner(self) -> None:
        config = self.config
        columns = self.adversary.num_groups + 1  # the last column is the KL penalty
        self.critic = TokenCritic(copy.deepcopy(backbone_of(self.reference.model)), columns).to(self.device)
        self.reference.requires_grad_(False)
        self.loss = MaxMinPPOLoss(
            TokenScorer(self.policy, entropy=config.entropy_coeff > 0),
            self.critic,
            functional=False,
            clip_epsilon=config.cliprange,
            clip_value=config.cliprange_value or None,
            entropy_bonus=config.entropy_coeff > 0,
            entropy_coeff=config.entropy_coeff,
            critic_coeff=1.0,
            loss_critic_type="l2",
            loss_mask_key="action_mask",
        )
        self.gae = VectorGAE(gamma=config.gamma, lmbda=config.lam, value_network=None, mask_key="mask")
        self.optimizer = torch.optim.AdamW(
            [
                {"params": self.policy.parameters(), "lr": config.learning_rate},
                {
                    "params": self.critic.parameters(),
                    "lr": config.critic_learning_rate or config.learning_rate,
                },
            ],
            eps=1e-8,
            weight_decay=0.0,
        )
        warmup, total = config.warmup_iterations, config.num_iterations

        def rate(iteration: int) -> float:
            if iteration < warmup:
                return (iteration + 1) / (warmup + 1)
            return max(total - iteration, 0) / max(total - warmup, 1)

        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, rate)
        self.kl_controller: Any = ConstantKLController(kl_coef=config.beta)
        if config.kl_controller == "adaptive":
            self.kl_controller = AdaptiveKLController(
                init_kl_coef=config.beta, target=config.kl_target, horizon=config.kl_horizon
            )
        self.buffer = ReplayBuffer(
            storage=LazyTensorStorage(config.rollout_batch_size, device=self.device),
            sampler=SamplerWithoutReplacement(),
            batch_size=min(config.mini_batch_size, config.rollout_batch_size),
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
            eos_token_id=self.tokenizer.eos_token_id,
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
        rewards = self.calibration.apply(self.rewards(responses))
        require_finite(rewards.sum().item(), responses, self.folder, "a reward")
        if self.baseline is not None:
            rewards = rewards - self.baseline[responses["prompt_index"]]
        ended = (responses["action"] == self.tokenizer.eos_token_id) & responses["action_mask"]
        return rewards - self.config.missing_eos_penalty * (~ended.any(-1, keepdim=True))

    # -- the algorithm --------------------------------------------------------------------------

    def train(self) -> None:
        """Run all iterations, save the policy and what is known of the run."""
        config = self.config
        log = MetricsLog(self.folder, config.report_to, keep=self.start)
        stop = config.stop_at_iteration or config.num_iterations
        batches, near_enough = iter(self.collector), False
        with progress_bar(f"ppo ({self.folder.name})", stop - self.start) as advance:
            for iteration in range(self.start, stop):
                batch = self._prepare(next(batches)[:, 0])
                losses = self._update(batch)
                metrics = rollout_metrics(batch, losses, self.kl_controller.coef, self.rewards.num_groups)
                metrics["lr"] = self.schedule.get_last_lr()[0]
                if self.monitor is not None:
                    truth = self.monitor(batch.cpu()).mean(0)
                    metrics |= {f"monitor/{k}/mean": value for k, value in enumerate(truth.tolist())}
                if config.gap_steps and (iteration + 1) % config.gap_steps == 0:
                    metrics |= self._gap()
                log.write(iteration, metrics)
                self.schedule.step()
                self._control_kl(metrics["objective/kl"])
                if (
                    config.save_steps and (iteration + 1) % config.save_steps == 0
                ) or iteration + 1 == config.stop_at_iteration:
                    self._save(iteration + 1)
                gap = metrics.get("maxmin/duality_gap_high", math.inf)
                near_enough = config.stop_at_gap > 0 and gap <= config.stop_at_gap
                advance(
                    note=f"worst group {metrics['objective/welfare']:+.2f}  kl {metrics['objective/kl']:.1f}"
                )
                if near_enough:
                    break
        self.collector.shutdown(close_env=False)
        if stop == config.num_iterations or near_enough:
            self._finish()

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
        batch = rollout.select(
            "prompt_tokens", "prompt_mask", "action", "action_mask", "sample_log_prob",
            "group_weights", "group_utilities", ("next", "reward"), ("next", "group_reward"),
        )  # fmt: skip
        batch["ref_log_prob"] = self.reference.log_prob(batch)
        self.critic(batch)
        steps = token_steps(batch, self.kl_controller.coef, self.config.kl_estimator)
        steps["group_weights"] = batch["group_weights"][:, None].expand(*steps.shape, -1)
        self.gae(steps)
        batch["advantage"] = whiten(steps["advantage"], steps["mask"])
        batch["value_target"] = steps["value_target"]
        return batch

    def _update(self, batch: TensorDict) -> dict[str, Tensor]:
        """Clipped PPO on a rollout; metrics averaged over optimizer steps."""
        config = self.config
        self.buffer.empty()
        self.buffer.extend(batch.exclude("next", "group_utilities"))
        records = []
        for _ in range(config.num_ppo_epochs):
            for minibatch in self.buffer:
                losses = self.loss(minibatch)
                total = sum(value for name, value in losses.items() if name.startswith("loss_"))
                self.optimizer.zero_grad()
                total.backward()
                norm = nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
                nn.utils.clip_grad_norm_(self.critic.parameters(), config.max_grad_norm)
                require_finite(
                    total.item() + norm.item(), minibatch, self.folder, "the PPO loss or its gradient"
                )
                self.optimizer.step()
                records.append(losses.detach())
        return torch.stack(records).mean(0).to_dict()

    # -- state ----------------------------------------------------------------------------------

    def _save(self, iteration: int) -> None:
        state = {
            "iteration": iteration,
            "policy": self.policy.state_dict(),
            "critic": self.critic.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "adversary": self.adversary.state_dict(),
            "kl_coef": self.kl_controller.coef,
            "calibration": self.calibration.to_dict(),
            "baseline": self.baseline,
            "random": random_state(),
        }
        save_checkpoint(self.folder, iteration, state)

    def _restore(self, state: dict[str, Any]) -> None:
        self.start = state["iteration"]
        if self.start >= (self.config.stop_at_iteration or self.config.num_iterations):
            raise UserError(f"the checkpoint is at iteration {self.start} already; raise --num_iterations")
        self.policy.load_state_dict(state["policy"])
        self.critic.load_state_dict(state["critic"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.adversary.load_state_dict(state["adversary"])
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
