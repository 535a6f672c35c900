"""Made-up results, and tiny policies to measure."""

import json
import shutil

import pytest
import torch
import yaml
from evaluation_results import CALIBRATION, LENGTH, make_result
from transformers import AutoModelForCausalLM

from torchrl_maxmin.evaluation import SeedResult, summarise
from torchrl_maxmin.evaluation.measure import EvaluateConfig, measure_policies
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.world import sample_prompts


@pytest.fixture(scope="module")
def results():
    return [make_result(seed) for seed in range(3)]


@pytest.fixture(scope="module")
def summary(results):
    return summarise(results, wall_seconds=123.4, num_resamples=300)


@pytest.fixture(scope="module")
def prompts():
    return sample_prompts(6, 0, heldout=True)


@pytest.fixture(scope="module")
def prompt_file(prompts, tmp_path_factory):
    path = tmp_path_factory.mktemp("measure") / "prompts.jsonl"
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return str(path)


@pytest.fixture(scope="module")
def other_model(tiny_model, tmp_path_factory):
    """A policy that is not far from the reference."""
    folder = tmp_path_factory.mktemp("models") / "other"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def mixture(tiny_model):
    torch.manual_seed(3)
    made = RewardMixture.from_causal_lm(tiny_model, 2)
    made.log_prior.copy_(torch.tensor([0.75, 0.25]).log())
    made.calibration = CALIBRATION
    return made


@pytest.fixture(scope="module")
def reward_folder(mixture, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "reward"
    mixture.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def trained(other_model, tmp_path):
    """A folder of the policy that says how it was trained; settings override that."""

    def make(name="trained", **settings):
        folder = tmp_path / name
        shutil.copytree(other_model, folder)
        base = {"kl_coef": 1.0, "calibration": CALIBRATION.to_dict()} | settings
        outcome = {key: base.pop(key) for key in ("kl_coef", "calibration")}
        (folder / "summary.json").write_text(json.dumps(outcome))
        given = {"beta": 7.0, "missing_eos_penalty": 0.0, "reward_funcs": []} | base
        (folder / "config.yaml").write_text(yaml.safe_dump(given))
        return str(folder)

    return make


@pytest.fixture
def make_config(tiny_model, other_model, prompt_file, tmp_path):
    def make(name="out", **settings):
        base = {
            "policies": [f"sft={tiny_model}", f"maxmin={other_model}"],
            "dataset_name": prompt_file,
            "output_dir": str(tmp_path / name),
            "judge": "measure_judges:words",
            "num_samples": 3,
            "response_length": LENGTH,
            "max_prompt_length": 16,
            "certificate_samples": 16,
            "device": "cpu",
        }
        return EvaluateConfig(**(base | settings))

    return make


@pytest.fixture
def measure(make_config):
    """Run the stage; returns its result, read back from the folder."""

    def run(name="out", **settings):
        return SeedResult.load(measure_policies(make_config(name, **settings)) / "result")

    return run
