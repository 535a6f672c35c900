"""PPO with a reward on the policy's own trunk is the run with two trunks, in the memory of one."""

import gc

import pytest
import torch
from trainers_runs import PPORun
from transformers import GPT2Model

from torchrl_maxmin.core import progress
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.rewards import RewardMixture


@pytest.fixture(scope="module")
def rewards(tiny_model, tmp_path_factory):
    """Folders of two mixtures with adapters, and of one whose trunk was trained."""
    root = tmp_path_factory.mktemp("rewards")
    torch.manual_seed(0)
    for name, options in {
        "per_group": {"use_peft": True, "lora_r": 2},
        "shared": {"use_peft": True, "lora_r": 2, "adapters": "shared"},
        "trained": {},
    }.items():
        mixture = RewardMixture.from_backbone(tiny_model, 2, **options)
        with torch.no_grad():
            for parameter in mixture.trunk_parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        mixture.log_prior.copy_(torch.tensor([0.8, 0.2]).log())
        mixture.save_pretrained(root / name)
    return root


@pytest.fixture
def lines(monkeypatch):
    """What a run says."""
    said = []
    monkeypatch.setattr(progress.console, "print", lambda *words, **_: said.append(" ".join(map(str, words))))
    return said


def trained(config):
    return PPORun(config).train()


def left(run):
    """What a run leaves behind."""
    names = ("model.safetensors", "metrics.jsonl", "summary.json")
    return [(run.folder / name).read_bytes() for name in names]


def trunks():
    gc.collect()
    return sum(type(each) is GPT2Model for each in gc.get_objects())


LORA = {"use_peft": True, "lora_r": 4, "num_iterations": 2, "reward_funcs": []}


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("per_group", {"lora_dropout": 0.1}),
        ("per_group", {"advantage": "rloo", "num_generations": 2, "gradient_checkpointing": True}),
        ("shared", {"critic": "heads", "calibration": "win_rate"}),
        ("shared", {"critic": "full", "objective": "mean_of_mins"}),
    ],
)
def test_it_is_the_run_with_two_trunks(make_config, rewards, lines, name, settings):
    settings = LORA | settings | {"reward_model_path": str(rewards / name)}
    before = trunks()
    one = trained(make_config("one", **settings))
    held = trunks() - before
    two = trained(make_config("two", **settings, share_reward_trunk=False))
    assert trunks() - before == 2 * held + 1
    assert held == 1 + (settings.get("critic") == "full")
    assert left(one) == left(two)
    assert not any("trunk" in line for line in lines)
    assert one.adversary.weights.tolist() != [0.5, 0.5]


def test_a_run_in_bfloat16_goes_on_as_it_was(make_config, rewards):
    settings = LORA | {"reward_model_path": str(rewards / "per_group"), "dtype": "bfloat16"}
    whole = trained(make_config("whole", **settings))
    trained(make_config("parts", **settings, stop_at_iteration=1))
    assert left(trained(make_config("parts", **settings, resume_from_checkpoint="last"))) == left(whole)
    own = trained(make_config("own", **settings, share_reward_trunk=False))
    found, expected = (read_metrics(run.folder)[0]["rewards/0/mean"] for run in (whole, own))
    assert found == pytest.approx(expected, abs=0.1)


def test_a_reward_whose_trunk_was_trained_keeps_it(make_config, rewards, lines):
    settings = LORA | {"reward_model_path": str(rewards / "trained")}
    other = trained(make_config("other", **settings))
    assert any("keeps a trunk of its own" in line and "wte.weight differs" in line for line in lines)
    assert left(other) == left(trained(make_config("own", **settings, share_reward_trunk=False)))


def test_full_copies_do_not_ask(make_config, rewards, lines):
    settings = LORA | {"reward_model_path": str(rewards / "per_group"), "use_peft": False}
    del settings["lora_r"]
    before = trunks()
    run = trained(make_config("full", **settings))
    assert trunks() - before == 4
    assert run.models.policy.model is not run.models.reference.model
    assert not any("trunk" in line for line in lines)
