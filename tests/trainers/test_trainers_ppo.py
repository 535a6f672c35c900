"""MaxMin PPO on a tiny model: its first step, its invariances, its errors."""

import copy
from pathlib import Path

import pytest
import torch
import trainers_rewards
import yaml
from rounding import SAMPLER, TINY_MODEL, float32_bound, log_prob_bar
from safetensors.torch import load_file
from trainers_runs import PPORun
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.manifest import require_whole
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.models.output_head import OutputHead
from torchrl_maxmin.rewards import Calibration, RewardMixture
from torchrl_maxmin.rewards.source import MixtureRewards
from torchrl_maxmin.trainers.lm_ppo import run_ppo

BREVITY, LETTERS, PLUS_FIVE = (f"trainers_rewards:{n}" for n in ("brevity", "letters", "letters_plus_five"))


def parameters(trainer):
    return {f"policy.{n}": p for n, p in trainer.policy.named_parameters()} | {
        f"critic.{n}": p for n, p in trainer.critic.named_parameters()
    }


def trained(config):
    trainer = PPORun(config)
    trainer.train()
    return trainer


def first_batch(config):
    """The first rollout of a run, with its advantages."""
    trainer = PPORun(config)
    batch = trainer.first_batch()
    return trainer, batch


# -- step 0 and learning rates ---------------------------------------------------------------------


@torch.no_grad()
def largest_logit(trainer):
    prompts = trainer.rollouts.prompts["prompt_tokens"][trainer.rollouts.prompts["prompt_mask"].all(-1)]
    return float(trainer.policy.model(prompts).logits.abs().max())


def test_without_learning_nothing_moves(make_config):
    """KL 0 and ratio 1, the first statements a PPO must satisfy."""
    config = make_config(learning_rate=0.0, critic_learning_rate=1e-3, temperature=0.7, entropy_coeff=0.01)
    trainer = PPORun(config)
    # in float64, so that of all roundings only the sampler's are left, whose scores are float32
    trainer.policy.double()
    trainer.models.reference.double()
    trainer.train()
    bar = log_prob_bar(trainer.policy.model, SAMPLER, config.temperature)
    for row in read_metrics(config.output_dir):
        assert row["objective/kl"] == pytest.approx(0.0, abs=config.response_length * bar)
        assert row["val/ratio"] == pytest.approx(1.0, abs=bar)
        assert row["policy/clipfrac_avg"] == 0
        assert row["policy/approxkl_avg"] == pytest.approx(0.0, abs=bar)
        assert row["objective/entropy"] > 0
    for (name, now), before in zip(
        trainer.policy.named_parameters(), trainer.models.reference.parameters(), strict=True
    ):
        assert torch.equal(now, before), name
    assert trainer.critic.head.weight.abs().sum() > 0


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda t: setattr(t.policy, "head", OutputHead(logit_scale=0.5)), "ratio of PPO is not 1"),
        (lambda t: setattr(t.policy, "temperature", 0.8), "KL to the reference is not 0"),
        (lambda t: t.policy.model.transformer.ln_f.weight.data.mul_(1.1), "KL to the reference is not 0"),
    ],
)
def test_a_first_step_that_cannot_be_right_stops_before_any_update(make_config, tamper, message):
    trainer = PPORun(make_config(num_iterations=1))
    tamper(trainer)
    before = copy.deepcopy(trainer.policy.state_dict())
    with pytest.raises(UserError, match=f"before the first update .*{message}.*likely cause"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.policy.state_dict().items())


def test_the_first_minibatch_has_ratio_one_and_zero_kl(make_config):
    trainer, batch = first_batch(make_config())
    # sampled with cached keys, scored in one pass: the rounding of float32 apart
    bar = log_prob_bar(trainer.policy.model, TINY_MODEL)
    torch.testing.assert_close(batch["sample_log_prob"], batch["ref_log_prob"], atol=bar, rtol=0)
    losses = trainer.learner.loss(batch.exclude("next", "group_utilities"))
    assert losses["mean_ratio"].item() == pytest.approx(1.0, abs=bar)
    assert losses["max_ratio"].item() == pytest.approx(1.0, abs=bar)
    assert losses["clip_fraction"] == 0
    valid = batch["advantage"].squeeze(-1)[batch["action_mask"]]
    assert valid.mean().item() == pytest.approx(0.0, abs=1e-5)
    assert valid.std(correction=0).item() == pytest.approx(1.0, abs=1e-4)


def test_the_policy_moves_towards_its_reward_and_dropout_stays_off(make_config):
    config = make_config(
        reward_funcs=[BREVITY], num_iterations=15, rollout_batch_size=32, mini_batch_size=16, beta=0.0,
        learning_rate=1e-2, missing_eos_penalty=0.0,
    )  # fmt: skip
    trainer = trained(config)
    rows = read_metrics(config.output_dir)
    gain = sum(r["rewards/0/mean"] for r in rows[-3:]) - sum(r["rewards/0/mean"] for r in rows[:3])
    assert gain / 3 > 0.5  # standard deviations of the reference
    assert rows[-1]["objective/kl"] > 0.1
    assert not any(m.training for m in trainer.policy.model.modules())
    assert not any(p.requires_grad for p in trainer.models.reference.parameters())


@pytest.mark.parametrize(
    ("warmup", "expected"),
    [(0, [1, 0.75, 0.5, 0.25]), (1, [0.5, 1, 2 / 3, 1 / 3]), (2, [1 / 3, 2 / 3, 1, 0.5])],
)
def test_learning_rate_warms_up_and_decays_to_zero(make_config, warmup, expected):
    config = make_config(warmup_iterations=warmup, num_ppo_epochs=1, mini_batch_size=8)
    trainer = trained(config)
    rates = [row["lr"] for row in read_metrics(config.output_dir)]
    assert rates == pytest.approx([1e-3 * factor for factor in expected])
    assert trainer.learner.schedule.get_last_lr() == [0.0, 0.0]


# -- invariances -----------------------------------------------------------------------------------


def test_the_seed_decides_everything(make_config):
    first, again, other = (
        trained(make_config(name, num_iterations=2, seed=seed))
        for name, seed in (("a", 3), ("b", 3), ("c", 4))
    )
    for name, value in parameters(first).items():
        assert torch.equal(parameters(again)[name], value), name
    lines = [(t.folder / "metrics.jsonl").read_text() for t in (first, again, other)]
    assert lines[0] == lines[1] != lines[2]


def test_two_identical_groups_train_the_policy_of_one(make_config):
    one = trained(make_config("one", reward_funcs=[LETTERS], num_iterations=1, warmup_iterations=0))
    two = trained(make_config("two", reward_funcs=[LETTERS] * 2, num_iterations=1, warmup_iterations=0))
    assert (one.adversary.num_groups, two.adversary.num_groups) == (1, 2)
    torch.manual_seed(0)
    batch = one.policy(one.rollouts.prompts.clone())
    with torch.no_grad():
        before = one.models.reference.log_prob(batch)
        after, same = one.policy.log_prob(batch), two.policy.log_prob(batch)
    assert (after - before).abs().max() > 1e-3
    # one group's advantage is the sum of two halves: after one step of Adam the weights are apart by
    # roundings of the step, and the logits by less than those of the largest
    torch.testing.assert_close(same, after, atol=float32_bound(largest_logit(one)), rtol=0)


def test_a_constant_on_one_head_changes_nothing_when_calibrated(make_config):
    settings = {"calibration": "sft_std", "tau": 0.5}
    _, plain = first_batch(make_config("plain", reward_funcs=[BREVITY, LETTERS], **settings))
    _, shifted = first_batch(make_config("shifted", reward_funcs=[BREVITY, PLUS_FIVE], **settings))
    torch.testing.assert_close(shifted["group_weights"], plain["group_weights"], atol=1e-5, rtol=0)
    torch.testing.assert_close(shifted["advantage"], plain["advantage"], atol=1e-5, rtol=1e-4)
    assert 0.05 < plain["group_weights"][0, 0] < 0.95  # neither group decides alone


def test_a_constant_on_one_head_decides_when_not_calibrated(make_config):
    settings = {"calibration": "none", "tau": 0.5}
    _, plain = first_batch(make_config("plain", reward_funcs=[BREVITY, LETTERS], **settings))
    _, shifted = first_batch(make_config("shifted", reward_funcs=[BREVITY, PLUS_FIVE], **settings))
    assert (shifted["group_weights"] - plain["group_weights"]).abs().max() > 0.1
    assert (shifted["advantage"] - plain["advantage"]).abs().max() > 0.1


def test_missing_eos_is_paid_by_every_group(make_config):
    longer = {"response_length": 40, "rollout_batch_size": 32}
    _, free = first_batch(make_config("free", missing_eos_penalty=0.0, **longer))
    trainer, paid = first_batch(make_config("paid", missing_eos_penalty=3.0, **longer))
    assert torch.equal(free["action"], paid["action"])
    ended = ((paid["action"] == trainer.models.tokenizer.eos_token_id) & paid["action_mask"]).any(-1)
    assert ended.any()
    assert not ended.all()
    expected = free["next", "reward"] - 3.0 * (~ended).float()[:, None]
    torch.testing.assert_close(paid["next", "reward"], expected)


# -- objectives and rewards ------------------------------------------------------------------------


def test_mean_of_mins_rewards_with_each_responses_minimum(make_config):
    config = make_config(objective="mean_of_mins")
    trainer, batch = first_batch(config)
    assert torch.equal(batch["next", "reward"], batch["next", "group_reward"].min(-1, keepdim=True).values)
    assert batch["group_weights"].tolist() == [[1.0]] * 8
    assert trainer.critic.head.out_features == 2
    config = make_config("whole", objective="mean_of_mins", num_iterations=2)
    run_ppo(config)
    for row in read_metrics(config.output_dir):
        assert row["objective/scores"] <= min(row["rewards/0/mean"], row["rewards/1/mean"]) + 1e-6


@pytest.fixture(scope="module")
def reward_folder(tiny_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("reward") / "mixture"
    torch.manual_seed(0)
    mixture = RewardMixture.from_causal_lm(tiny_model, 2)
    mixture.log_prior.copy_(torch.tensor([0.8, 0.2]).log())
    mixture.save_pretrained(folder)
    return str(folder)


def test_utilitarian_weights_are_population_shares(make_config, reward_folder):
    config = make_config(
        reward_funcs=[], reward_model_path=reward_folder, welfare="utilitarian", num_iterations=2
    )
    trainer = trained(config)
    torch.testing.assert_close(trainer.adversary.weights, torch.tensor([0.8, 0.2]))
    for row in read_metrics(config.output_dir):
        expected = 0.8 * row["rewards/0/mean"] + 0.2 * row["rewards/1/mean"]
        assert row["objective/scores"] == pytest.approx(expected, abs=1e-5)
        assert row["maxmin/weights/0"] == pytest.approx(0.8)


def test_utilitarian_weights_of_functions_are_equal(make_config):
    trainer = PPORun(make_config(welfare="utilitarian"))
    assert trainer.adversary.weights.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("adversary", ["hard_min", "exponentiated_gradient", "entropy_regularized"])
def test_egalitarian_runs_weigh_the_worst_group_most(make_config, reward_folder, adversary):
    config = make_config(
        reward_funcs=[], reward_model_path=reward_folder, adversary=adversary, num_iterations=1
    )
    run_ppo(config)
    (row,) = read_metrics(config.output_dir)
    worst = min((0, 1), key=lambda k: row[f"rewards/{k}/mean"])
    assert row["maxmin/worst_group"] == worst
    assert row[f"maxmin/weights/{worst}"] > 0.5
    if adversary == "hard_min":
        assert row[f"maxmin/weights/{worst}"] == 1.0
    welfare = row[f"rewards/{worst}/mean"] - config.beta * row["objective/kl"]
    assert row["objective/welfare"] == pytest.approx(welfare, abs=1e-5)


def test_rewards_are_the_mixtures_calibrated_on_the_reference(make_config, reward_folder):
    trainer, batch = first_batch(
        make_config(reward_funcs=[], reward_model_path=reward_folder, missing_eos_penalty=0.0)
    )
    raw = load_file(trainer.folder / "reference_rewards.safetensors")["rewards"]
    assert raw.shape == (12, 2, 2)
    calibration = Calibration.fit(raw)
    mixture = RewardMixture.from_pretrained(reward_folder)
    expected = calibration.apply(MixtureRewards(mixture, trainer.models.tokenizer)(batch))
    torch.testing.assert_close(batch["next", "group_reward"], expected, atol=1e-5, rtol=1e-5)


def test_monitors_are_logged_and_change_nothing(make_config):
    plain = trained(make_config("plain", num_iterations=1))
    watched = trained(make_config("watched", num_iterations=1, monitor_funcs=["trainers_rewards:both"]))
    (row,) = read_metrics(watched.folder)
    (other,) = read_metrics(plain.folder)
    assert {"monitor/0/mean", "monitor/1/mean"} == set(row) - set(other)
    assert all(row[name] == value for name, value in other.items())
    # brevity is rewarded and monitored: one is the calibrated form of the other
    assert -0.7 < row["monitor/0/mean"] < 0


def test_the_saved_policy_is_a_causal_language_model(make_config):
    trainer = trained(make_config(num_iterations=1, warmup_iterations=0))
    again = AutoModelForCausalLM.from_pretrained(trainer.folder)
    for name, value in trainer.policy.model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    assert AutoTokenizer.from_pretrained(trainer.folder).get_vocab() == trainer.models.tokenizer.get_vocab()
    assert {p.name for p in trainer.folder.iterdir()} >= {"config.yaml", "summary.json", "metrics.jsonl"}
    card = (trainer.folder / "README.md").read_text()
    metadata = yaml.safe_load(card.split("---")[1])
    assert (metadata["library_name"], metadata["pipeline_tag"]) == ("transformers", "text-generation")
    assert "base_model" not in metadata, "a folder of ours is no model of the hub"
    assert "| objective | min\\_of\\_means |" in card
    require_whole(trainer.folder)


def test_a_tokenizer_without_pad_token_starts_at_kl_zero(make_config, make_model):
    """Its new row in the model is random: policy and reference must share it."""
    folder = make_model("no_pad")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    trainer, batch = first_batch(make_config(model_name_or_path=folder))
    assert trainer.models.tokenizer.pad_token_id == len(tokenizer)
    # sampled with cached keys, scored in one pass: the rounding of float32 apart
    bar = log_prob_bar(trainer.policy.model, TINY_MODEL)
    torch.testing.assert_close(batch["sample_log_prob"], batch["ref_log_prob"], atol=bar, rtol=0)
    tokens, mask = trainer.rollouts.prompts["prompt_tokens"], trainer.rollouts.prompts["prompt_mask"]
    assert (tokens[~mask] == trainer.models.tokenizer.pad_token_id).all()


# -- adaptive KL -----------------------------------------------------------------------------------


def test_adaptive_kl_follows_ziegler(make_config):
    """beta <- beta (1 + clip(KL / target - 1, -.2, .2) * responses / horizon)."""
    config = make_config(
        kl_controller="adaptive", kl_target=0.02, kl_horizon=40, learning_rate=3e-3, beta=0.1
    )
    trained(config)
    rows = read_metrics(config.output_dir)
    coefficient, moved = 0.1, set()
    for row in rows:
        assert row["objective/kl_coef"] == pytest.approx(coefficient, rel=1e-5)
        error = min(max(row["objective/kl"] / 0.02 - 1, -0.2), 0.2)
        coefficient *= 1 + error * 8 / 40
        moved.add(error > 0)
    assert moved == {True, False}  # below the target at first, above it later


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("calls", [0, 1])
def test_a_nan_reward_stops_the_run_with_its_batch_saved(make_config, monkeypatch, calls):
    monkeypatch.setattr(trainers_rewards.poisoned, "calls_left", 10**9)
    config = make_config(reward_funcs=["trainers_rewards:poisoned", LETTERS])
    trainer = PPORun(config)
    trainers_rewards.poisoned.calls_left = calls
    with pytest.raises(FloatingPointError, match="a reward is nan; the batch that gave it is in"):
        trainer.train()
    batch = load_file(trainer.folder / "nonfinite_batch.safetensors")
    assert batch["action"].shape == (8, 6)
    path = trainer.folder / "metrics.jsonl"
    assert len(path.read_text().splitlines()) == calls
    assert not (trainer.folder / "model.safetensors").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model_name_or_path": "no/such-model"}, "no model at 'no/such-model'.*--model_name_or_path"),
        ({"reward_funcs": [], "reward_model_path": "no/such-reward"}, "no model at 'no/such-reward'"),
        ({"dataset_name": "no/such.jsonl"}, "cannot read data from 'no/such.jsonl'"),
        ({"objective": "max_of_mins"}, "'max_of_mins' is none of min_of_means, mean_of_prompt_mins"),
        ({"welfare": "rawls"}, "--welfare 'rawls' is none of"),
        ({"adversary": "devil"}, "--adversary 'devil' is none of"),
        ({"calibration": "z"}, "--calibration 'z' is none of"),
        ({"kl_controller": "pid"}, "--kl_controller 'pid' is none of"),
        ({"kl_controller": "adaptive", "beta": 0.0}, "--beta, which must be positive"),
        ({"reward_funcs": []}, "either --reward_model_path or --reward_funcs"),
        ({"reward_model_path": "x"}, "either --reward_model_path or --reward_funcs"),
        ({"reward_funcs": ["trainers_rewards:nothing"]}, "no reward function 'trainers_rewards:nothing'"),
        ({"reward_funcs": ["trainers_rewards:constant", BREVITY]}, r"head\(s\) \[0\].*sft_mean"),
        ({"calibration_samples": 1}, "--calibration_samples of at least 2"),
        ({"num_iterations": 0}, "--num_iterations must be at least 1"),
        ({"stop_at_iteration": 5}, "--stop_at_iteration is after --num_iterations"),
        ({"temperature": 0.0}, "--temperature must be positive"),
        ({"device": "abacus"}, "--device 'abacus' is no device"),
        ({"resume_from_checkpoint": "last"}, "there is no run in"),
    ],
)
def test_mistakes_are_told_before_any_work(make_config, settings, message):
    config = make_config(**settings)
    with pytest.raises(UserError, match=message):
        PPORun(config)
    folder = Path(config.output_dir)
    assert not folder.exists() or not any(folder.iterdir())  # so that the mended command can run


def test_empty_prompts(make_config, tmp_path):
    (tmp_path / "none.jsonl").write_text("")
    with pytest.raises(UserError, match=r"none.jsonl has no prompts"):
        PPORun(make_config(dataset_name=str(tmp_path / "none.jsonl")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu(make_config):
    with pytest.raises(UserError, match=r"--device cuda.*no GPU"):
        PPORun(make_config(device="cuda"))


def test_a_folder_that_holds_something_is_left_as_it_is(make_config):
    config = make_config()
    folder = Path(config.output_dir)
    folder.mkdir()
    (folder / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not empty"):
        run_ppo(copy.copy(config))
    assert [p.name for p in folder.iterdir()] == ["thesis.txt"]
    assert (folder / "thesis.txt").read_text() == "years of work"


def test_mean_of_mins_does_not_see_a_prompts_own_offset(make_config):
    """A minimum response by response compares groups within a prompt, where an offset means nothing."""
    rewards = []
    for name, functions in (("plain", ["brevity", "letters"]), ("offset", ["brevity", "letters_by_prompt"])):
        specs = [f"trainers_rewards:{f}" for f in functions]
        config = make_config(name, objective="mean_of_mins", reward_funcs=specs, calibration="sft_mean")
        rewards.append(first_batch(config)[1]["next", "group_reward"])
    torch.testing.assert_close(rewards[0], rewards[1], atol=1e-4, rtol=0)


@pytest.mark.parametrize("calibration", ["win_rate", "sft_mean"])
def test_rewards_with_large_offsets_by_prompt_are_taken_prompt_by_prompt(make_config, calibration):
    rewards, runs = [], []
    for name, functions in (("plain", ["brevity", "letters"]), ("offset", ["brevity", "letters_by_prompt"])):
        specs = [f"trainers_rewards:{f}" for f in functions]
        config = make_config(name, reward_funcs=specs, calibration=calibration, beta=0.0)
        run, batch = first_batch(config)
        runs.append(run.rollouts.rewards)
        rewards.append(batch["next", "group_reward"])
    assert runs[1].calibration.by_prompt
    if calibration == "win_rate":
        torch.testing.assert_close(rewards[0], rewards[1], atol=1e-5, rtol=0)
        return
    assert not runs[0].calibration.by_prompt
    assert runs[0].baseline is None
    # what is left of an offset is what its mean over eight samples is shrunk by
    pooled = rewards[1] + runs[1].baseline[batch["prompt_index"]]
    assert rewards[1][:, 1].std() < pooled[:, 1].std() / 3
