"""The stages as a user types them, the policy stage in both its forms."""

import importlib

from torchrl_maxmin.cli.main import ENV_PPO, STAGES

IN_ENV = "ppo --env_id=fruit-tree-v0"  # the policy stage's other form
FORMS = [*STAGES, IN_ENV]


def config_class(form):
    module, name, *_ = ENV_PPO if form == IN_ENV else STAGES[form]
    return getattr(importlib.import_module(module), name)
