"""Runs of the policy stages whose parts a test can reach."""

from pathlib import Path

from torchrl_maxmin.trainers.env_ppo import build_env_ppo, train_env_policy
from torchrl_maxmin.trainers.lm_ppo import build_ppo, train_policy
from torchrl_maxmin.trainers.ppo_config import PPOConfig


def small_config(model, prompts, folder, **settings):
    """A config of four small iterations of a language model; settings override it."""
    base = {
        "model_name_or_path": model,
        "dataset_name": prompts,
        "output_dir": str(folder),
        "reward_funcs": ["trainers_rewards:brevity", "trainers_rewards:letters"],
        "calibration_prompts": 12,
        "calibration_samples": 2,
        "num_iterations": 4,
        "rollout_batch_size": 8,
        "mini_batch_size": 4,
        "num_ppo_epochs": 2,
        "learning_rate": 1e-3,
        "warmup_iterations": 1,
        "response_length": 6,
        "missing_eos_penalty": 0.5,
        "device": "cpu",
    }
    return PPOConfig(**(base | settings))


class PPORun:
    """A run of a language model, built and not trained yet."""

    build, finish = staticmethod(build_ppo), staticmethod(train_policy)

    def __init__(self, config):
        self.config, self.folder = config, Path(config.output_dir)
        self.parts = parts = self.build(config)
        self.models, self.rollouts, self.learner = parts.models, parts.rollouts, parts.learner
        self.policy, self.critic, self.adversary = (
            parts.models.policy,
            parts.models.critic,
            parts.statistics.adversary,
        )
        self.start = parts.start

    def train(self):
        self.finish(self.config, self.parts)
        return self

    def first_batch(self):
        """The first rollout, with its weights and advantages."""
        batch = self.parts.statistics(next(iter(self.rollouts)))
        rows, _ = self.parts.advantages(batch)
        for key, value in rows.items():
            batch[key] = value.reshape(*batch.shape, *value.shape[1:])
        return batch


class EnvPPORun(PPORun):
    """A run in an environment."""

    build, finish = staticmethod(build_env_ppo), staticmethod(train_env_policy)

    @property
    def env(self):
        return self.rollouts.env

    @property
    def utility_scale(self):
        return self.parts.advantages.utility_scale
