"""Runs of the policy stages whose parts a test can reach."""

from pathlib import Path

from torchrl_maxmin.trainers.env_ppo import build_env_ppo, train_env_policy
from torchrl_maxmin.trainers.lm_ppo import build_ppo, train_policy


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
