"""Every welfare and adversary that the policy stage can be asked for, and its certificate on the way."""

import json
from pathlib import Path

import pytest
import torch
from trainers_runs import PPORun

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.rollouts.certificate import policy_certificate
from torchrl_maxmin.trainers.ppo_settings import adversary_of
from torchrl_maxmin.welfare import AlphaFair, CVaR, GeneralizedGini, KLBall, Nash, ProjectedGradient, SoftMin
from torchrl_maxmin.world import sample_prompts

SHARES = torch.tensor([0.8, 0.2])
UTILITIES = torch.tensor([0.7, 0.4])
WIN_RATE = {"calibration": "win_rate"}


@pytest.fixture
def make_gap_config(make_config, prompt_file, tmp_path):
    """A config with a certificate on the way, and with as many prompts as that needs."""
    rows = Path(prompt_file).read_text().splitlines()
    rows += [json.dumps({"prompt": prompt}) for prompt in sample_prompts(12, 1, heldout=False)]
    path = tmp_path / "more_prompts.jsonl"
    path.write_text("\n".join(rows))
    return lambda name="gap", **settings: make_config(name, **({"dataset_name": str(path)} | settings))


def trained(config):
    trainer = PPORun(config)
    trainer.train()
    return trainer


@pytest.mark.parametrize(
    ("settings", "welfare"),
    [
        ({"welfare": "soft_min", "welfare_parameter": 0.3}, SoftMin(0.3, SHARES)),
        ({"welfare": "kl_ball", "welfare_parameter": 0.2}, KLBall(0.2, SHARES)),
        ({"welfare": "cvar", "welfare_parameter": 0.4}, CVaR(0.4, SHARES)),
        ({"welfare": "nash", **WIN_RATE}, Nash(SHARES, -0.5)),
        ({"welfare": "alpha_fair", "welfare_parameter": 3.0, **WIN_RATE}, AlphaFair(3.0, SHARES, -0.5)),
        ({"welfare": "generalized_gini", "welfare_parameter": 0.5}, GeneralizedGini([2 / 3, 1 / 3])),
    ],
)
def test_a_welfare_gives_its_gradient(make_config, settings, welfare):
    config = make_config(**settings)
    config.check()
    adversary = adversary_of(config, 2, SHARES, disagreement=-config.missing_eos_penalty)
    weights = adversary.update(UTILITIES)
    gradient = welfare.weights(UTILITIES.double())
    torch.testing.assert_close(weights.double(), gradient / gradient.sum(), atol=1e-6, rtol=0)


def test_fixed_weights_stay_as_they_were_given(make_config):
    config = make_config(welfare="fixed", group_weights=[0.3, 0.7], num_iterations=2)
    for row in read_metrics(trained(config).folder):
        assert [row["maxmin/weights/0"], row["maxmin/weights/1"]] == pytest.approx([0.3, 0.7])
        scores = 0.3 * row["rewards/0/mean"] + 0.7 * row["rewards/1/mean"]
        assert row["objective/scores"] == pytest.approx(scores, abs=1e-5)


def test_fixed_weights_are_one_a_group(make_config):
    config = make_config(welfare="fixed", group_weights=[0.2, 0.3, 0.5])
    config.check()
    with pytest.raises(UserError, match="gives 3 weights, but the reward has 2 groups; give one a group"):
        PPORun(config)


def test_projected_gradient_with_its_options(make_config):
    config = make_config(adversary="projected_gradient", adversary_step_decay=0.5, adversary_optimistic=True)
    adversary = adversary_of(config, 2, None)
    assert isinstance(adversary, ProjectedGradient)
    assert (adversary.step_decay, adversary.optimistic) == (0.5, True)


@pytest.mark.parametrize(
    "settings",
    [{"welfare": "chi2_ball"}, {"welfare": "nash", **WIN_RATE}, {"adversary": "projected_gradient"}],
)
def test_a_run_logs_weights_of_the_simplex(make_config, settings):
    trainer = trained(make_config(num_iterations=2, **settings))
    for row in read_metrics(trainer.folder):
        weights = [row["maxmin/weights/0"], row["maxmin/weights/1"]]
        assert min(weights) >= 0
        assert sum(weights) == pytest.approx(1.0, abs=1e-5)


def test_a_stopped_run_of_a_welfare_goes_on_bit_equal(make_config):
    settings = {"welfare": "kl_ball", "adversary_optimistic": True, "num_iterations": 3}
    whole = trained(make_config("whole", **settings))
    trained(make_config("parts", **settings, stop_at_iteration=1))
    resumed = trained(make_config("parts", **settings, resume_from_checkpoint="last"))
    for name, tensor in whole.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], tensor), name
    assert (whole.folder / "metrics.jsonl").read_text() == (resumed.folder / "metrics.jsonl").read_text()


GAP = {"gap_steps": 2, "certificate_prompts": 16, "certificate_samples": 64, "beta": 2.0}


def test_the_gap_is_logged_and_changes_nothing(make_gap_config):
    plain = trained(make_gap_config("plain", beta=2.0))
    certified = trained(make_gap_config("certified", **GAP))
    for name, tensor in plain.policy.state_dict().items():
        assert torch.equal(certified.policy.state_dict()[name], tensor), name
    rows = read_metrics(certified.folder)
    assert ["maxmin/duality_gap" in row for row in rows] == [False, True, False, True]
    low, value, high = (rows[1][f"maxmin/duality_gap{end}"] for end in ("_low", "", "_high"))
    assert 0 <= low <= value <= high
    rests_on = [
        rows[1][f"maxmin/duality_gap_{name}"] for name in ("mass", "worth", "prompt_mass", "prompt_loss")
    ]
    assert 0 < rests_on[0] < rests_on[2] < 1
    assert rests_on[1] > 0
    assert rests_on[3] > high


def test_a_run_stops_at_the_gap_and_is_finished(make_gap_config):
    trainer = trained(make_gap_config(**GAP, stop_at_gap=1e6))
    assert len(read_metrics(trainer.folder)) == 2
    assert (trainer.folder / "model.safetensors").exists()
    assert (trainer.folder / "summary.json").exists()
    far = trained(make_gap_config("far", **GAP, stop_at_gap=1e-9))
    assert len(read_metrics(far.folder)) == 4


def test_all_looks_that_may_stop_a_run_share_the_error(make_gap_config, monkeypatch, capsys):
    """Two looks are planned, at iterations 2 and 4; a run that does not stop asks only how far it is."""
    asked = []

    def certificate(*args, **settings):
        asked.append((settings["looks"], settings["reward_bound"]))
        return policy_certificate(*args, **settings)

    monkeypatch.setattr("torchrl_maxmin.trainers.lm_ppo.policy_certificate", certificate)
    trained(make_gap_config("logged", **GAP))
    trained(make_gap_config("stops", **GAP, stop_at_gap=1e6, reward_bound=50.0))
    assert asked == [(1, None), (1, None), (2, 50.0)]
    captured = capsys.readouterr()
    words = " ".join((captured.out + captured.err).split())
    assert "no reward is above 50 in size" in words


def test_no_entry_where_the_samples_cannot_say(make_gap_config):
    trainer = trained(make_gap_config(**(GAP | {"beta": 1e-4, "certificate_samples": 4})))
    assert not any("maxmin/duality_gap" in row for row in read_metrics(trainer.folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"welfare": "nash"}, "--calibration win_rate"),
        ({"welfare": "alpha_fair", "welfare_parameter": 2.0}, "--calibration win_rate"),
        ({"welfare": "cvar", "welfare_parameter": 1.5}, "level of cvar"),
        ({"welfare": "generalized_gini", "welfare_parameter": 1.5}, "ratio of generalized_gini"),
        ({"welfare": "kl_ball", "welfare_parameter": 0.0}, "must be positive"),
        ({"adversary_step_decay": -1.0}, "must not be negative"),
        ({"welfare": "fixed"}, "need each other"),
        ({"group_weights": [0.5, 0.5]}, "need each other"),
        ({"welfare": "fixed", "group_weights": [0.9, 0.2]}, "sum to 1"),
        ({"welfare": "fixed", "group_weights": [1.5, -0.5]}, "must not be negative"),
        ({"welfare": "fixed", "group_weights": [1.0, float("nan")]}, "sum to 1"),
        ({"welfare": "fixed", "group_weights": [0.5, 0.5], "objective": "mean_of_mins"}, "min_of_means"),
        (
            {"welfare": "nash", "objective": "mean_of_mins"},
            "--objective min_of_means: mean_of_mins is a welf",
        ),
        (
            {"adversary": "hard_min", "objective": "mean_of_mins"},
            "--adversary hard_min moves the group weigh",
        ),
        ({"adversary": "hard_min", "welfare": "utilitarian"}, "of --welfare egalitarian .*: leave it out"),
        ({"stop_at_gap": 0.1}, "--stop_at_gap needs --gap_steps"),
        ({"gap_steps": 1, "objective": "mean_of_mins"}, "min_of_means"),
        ({"gap_steps": 1, "welfare": "utilitarian"}, "--welfare egalitarian"),
        ({"gap_steps": 1, "beta": 0.0}, "--beta above 0"),
        ({"gap_steps": 1, "certificate_samples": 6}, "multiple of 4"),
        ({"gap_steps": 1, "certificate_prompts": 15}, "--certificate_prompts 16 or more"),
        ({"gap_steps": 1, "reward_bound": 0.0}, "--reward_bound must be positive"),
        ({"reward_bound": 3.0}, "--reward_bound is of the certificate"),
    ],
)
def test_mistakes(make_config, settings, message):
    with pytest.raises(UserError, match=message):
        make_config(**settings).check()


# -- the minimum of every prompt ---------------------------------------------------------------------------


def test_every_prompt_is_weighed_by_its_own_worst_group(make_config):
    config = make_config(objective="mean_of_prompt_mins", num_generations=4, learning_rate=0.0)
    trainer = PPORun(config)
    batch = trainer.first_batch()
    index, rewards = batch["prompt_index"], batch["next", "reward"]
    assert index.view(2, 4).eq(index.view(2, 4)[:, :1]).all()
    for rows in (slice(0, 4), slice(4, 8)):
        worst = int(rewards[rows].mean(0).argmin())
        expected = torch.nn.functional.one_hot(torch.tensor(worst), 2).float()
        assert torch.equal(batch["group_weights"][rows], expected.expand(4, 2))
    assert torch.equal(trainer.adversary.weights, torch.tensor([0.5, 0.5]))


def test_the_minimum_of_every_prompt_trains(make_config):
    settings = {"objective": "mean_of_prompt_mins", "num_generations": 4, "num_iterations": 2}
    rows = read_metrics(trained(make_config(**settings)).folder)
    assert all(0 <= row["maxmin/weights/0"] <= 1 for row in rows)
    for name, message in (({"num_generations": 1}, "at least 2"), ({"num_generations": 3}, "a multiple of")):
        with pytest.raises(UserError, match=message):
            make_config(**(settings | name)).check()
