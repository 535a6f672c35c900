"""Short policy runs that every test of the trainers starts from."""

import json

import pytest
from trainers_runs import small_config

from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig
from torchrl_maxmin.world import sample_prompts


@pytest.fixture(scope="session")
def prompt_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": p}) + "\n" for p in sample_prompts(12, 0, heldout=False)))
    return str(path)


@pytest.fixture
def make_config(tiny_model, prompt_file, tmp_path):
    """A config of four small iterations; settings override it."""

    def make(name="run", **settings):
        return small_config(tiny_model, prompt_file, tmp_path / name, **settings)

    return make


@pytest.fixture
def make_env_config(tmp_path):
    """A config of four small iterations in a walk whose episodes end at random; settings override it."""

    def make(name="run", **settings):
        base = {
            "env_id": "trainers_envs:walk",
            "output_dir": str(tmp_path / name),
            "num_envs": 8,
            "frames_per_batch": 64,
            "total_frames": 256,
            "mini_batch_size": 24,
            "num_ppo_epochs": 2,
            "hidden_sizes": [8],
            "eval_episodes": 20,
            "device": "cpu",
        }
        return EnvPPOConfig(**(base | settings))

    return make
