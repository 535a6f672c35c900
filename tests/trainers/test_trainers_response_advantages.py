"""Training without a critic: advantages of responses, the gradient that they give, and whole runs."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rounding import float32_bound
from tensordict import TensorDict
from torchrl.data.llm import AdaptiveKLController, ConstantKLController
from trainers_runs import PPORun
from transformers import AutoModelForCausalLM, AutoTokenizer

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.core.serial import load_state
from torchrl_maxmin.models import TokenPolicy
from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.trainers.learner import Learner
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.token_advantages import ResponseAdvantages

WIDTH, BETA = 6, 0.3
KINDS = [("rloo", None), ("grpo", "group"), ("grpo", "none")]
KL = {"k1": lambda d: d, "k2": lambda d: d * d / 2, "k3": lambda d: np.exp(-d) - 1 + d}


# -- advantages ------------------------------------------------------------------------------------


def response_columns(reward, paid, n, kind, scale):
    """Advantages [B, K + 1] of responses, one by one, in float64."""
    rows = np.concatenate([reward, paid[:, None]], -1)
    out = np.zeros(rows.shape)
    for b, k in np.ndindex(*rows.shape):
        first = b // n * n
        own = rows[first : first + n, k]
        if kind == "rloo":
            out[b, k] = rows[b, k] - np.delete(own, b - first).mean()
            continue
        out[b, k] = rows[b, k] - own.mean()
        if scale == "group" and k < reward.shape[1]:
            out[b, k] /= own.std(ddof=1) + 1e-4
    return out


class Given:
    """Models whose reference answers what it was given, and that have no values."""

    def __init__(self, ref_log_prob):
        self.known = ref_log_prob

    def ref_log_prob(self, rows):
        return self.known


def make(prompts, n, groups, seed, kind, scale, estimator="k1", kl=None):
    generator = torch.Generator().manual_seed(seed)
    size = prompts * n

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    lengths = torch.randint(1, WIDTH + 1, (size, 1), generator=generator)
    reward = draw(size, groups)
    batch = TensorDict(
        {
            "prompt_tokens": torch.zeros(size, 1, dtype=torch.int64),
            "prompt_mask": torch.ones(size, 1, dtype=torch.bool),
            "action": torch.zeros(size, WIDTH, dtype=torch.int64),
            "action_mask": torch.arange(WIDTH) < lengths,
            # what lies behind the end must not matter
            "sample_log_prob": draw(size, WIDTH),
            # by prompt, as mean_of_prompt_mins gives them
            "group_weights": torch.rand(prompts, groups, generator=generator).repeat_interleave(n, 0),
            "next": {"reward": reward, "group_reward": reward},
        },
        [size],
    )
    models = Given(draw(size, WIDTH))
    advantages = ResponseAdvantages(
        models,
        kl or ConstantKLController(kl_coef=BETA),
        estimator,
        estimator=kind,
        num_generations=n,
        scale_rewards=scale or "group",
        fresh=False,
    )
    return batch, models, advantages


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(2, 5), st.integers(1, 3), st.sampled_from(KINDS),
    st.sampled_from(sorted(KL)), st.integers(0, 99),
)  # fmt: skip
def test_against_a_loop(prompts, n, groups, kind_and_scale, estimator, seed):
    batch, models, advantages = make(prompts, n, groups, seed, *kind_and_scale, estimator)
    rows, _ = advantages(batch)
    mask = batch["action_mask"].numpy()
    log_ratio = (batch["sample_log_prob"].double() - models.known.double()).numpy()
    paid = -BETA * (KL[estimator](log_ratio) * mask).sum(-1)
    columns = response_columns(batch["next", "reward"].double().numpy(), paid, n, *kind_and_scale)
    weights = np.concatenate([batch["group_weights"].double().numpy(), np.ones((len(mask), 1))], -1)
    expected = (columns * weights).sum(-1, keepdims=True) * mask
    bound = float32_bound(1e2 * (np.abs(columns).max() + np.abs(paid).max()))
    np.testing.assert_allclose(rows["advantage"].squeeze(-1).numpy(), expected, atol=bound)
    assert not {"state_value", "value_target"} & set(rows.keys())


def test_the_penalty_moves_on_the_kl_after_the_rollout_that_paid_it():
    kl = AdaptiveKLController(init_kl_coef=0.3, target=0.01, horizon=40)
    batch, models, advantages = make(2, 2, 2, 0, "rloo", None, kl=kl)
    batch["sample_log_prob"] = models.known + 0.5  # far above the target
    _, metrics = advantages(batch)
    length = batch["action_mask"].sum(-1).double().mean().item()
    assert metrics["objective/kl"] == pytest.approx(0.5 * length)
    assert metrics["objective/kl_coef"] == 0.3
    assert advantages.state_dict() == {"kl_coef": pytest.approx(0.3 * (1 + 0.2 * 4 / 40))}


# -- the gradient ----------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "scale"), KINDS)
@pytest.mark.parametrize("micro", [0, 4])
def test_the_gradient_is_the_weighted_sum_of_the_columns_own(tiny_model, tmp_path, kind, scale, micro):
    """Each group's policy gradient from the model's own logits times its weight, the penalty's times 1."""
    prompts, n, groups = 2, 3, 3
    size, dtype = prompts * n, torch.float64
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    reference = TokenPolicy(
        AutoModelForCausalLM.from_pretrained(tiny_model, dtype=dtype).eval(),
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=WIDTH,
    )
    models = FullCopies(reference, tokenizer, 0)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in models.policy.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    lengths = torch.tensor([1, 6, 2, 5, 3, 4])
    batch = TensorDict(
        {
            "prompt_tokens": torch.randint(5, len(tokenizer), (prompts, 3)).repeat_interleave(n, 0),
            "prompt_mask": torch.ones(size, 3, dtype=torch.bool),
            "action": torch.randint(5, len(tokenizer), (size, WIDTH)),
            "action_mask": torch.arange(WIDTH) < lengths[:, None],
            "group_weights": torch.tensor([0.5, 0.2, 0.3], dtype=dtype).expand(size, groups).clone(),
        },
        [size],
    )
    reward = torch.randn(size, groups, dtype=dtype)
    batch["next"] = TensorDict({"reward": reward, "group_reward": reward}, [size])
    batch["sample_log_prob"] = models.log_prob(batch)
    advantages = ResponseAdvantages(
        models,
        ConstantKLController(kl_coef=BETA),
        "k1",
        estimator=kind,
        num_generations=n,
        scale_rewards=scale or "group",
        fresh=False,
    )
    config = PPOConfig(
        "", "", output_dir=str(tmp_path), mini_batch_size=size, per_device_train_batch_size=micro
    )
    learner = Learner(config, models, 1, size, loss_mask_key="action_mask")
    assert [group["lr"] for group in learner.optimizer.param_groups] == [
        config.learning_rate / 6
    ]  # warming up
    losses = learner.accumulate(advantages(batch)[0])
    assert not {"loss_critic", "explained_variance"} & set(losses.keys())
    parameters = models.parameters()
    assert list(parameters) == ["policy"]
    found = [p.grad.clone() for p in parameters["policy"]]

    def sum_log_prob(model, row):
        """log pi(y | x) of a response, from logits."""
        length = int(row["action_mask"].sum())
        tokens = torch.cat([row["prompt_tokens"], row["action"][:length]])
        log_probs = model(tokens[None]).logits[0, :-1].log_softmax(-1)
        return log_probs.gather(-1, tokens[1:, None])[-length:].sum()

    score = [sum_log_prob(models.policy.model, row) for row in batch]
    with torch.no_grad():
        log_ratio = torch.stack(
            [s - sum_log_prob(reference.model, row) for s, row in zip(score, batch, strict=True)]
        )
    assert log_ratio.abs().max() > 0.05
    columns = response_columns(reward.numpy(), -BETA * log_ratio.numpy(), n, kind, scale)
    num_tokens = int(lengths.sum())
    expected = [torch.zeros_like(p) for p in parameters["policy"]]
    for k, weight in enumerate([0.5, 0.2, 0.3, 1.0]):
        loss = -sum(a * s for a, s in zip(columns[:, k].tolist(), score, strict=True)) / num_tokens
        for total, gradient in zip(
            expected, torch.autograd.grad(loss, parameters["policy"], retain_graph=True), strict=True
        ):
            total += weight * gradient
    largest = max(gradient.abs().max() for gradient in expected)
    assert largest > 1e-2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-10 * float(largest), rtol=0)


# -- whole runs ------------------------------------------------------------------------------------


@pytest.fixture
def make_free(make_config):
    """A config without a critic."""

    def make_free(name="run", advantage="rloo", **changes):
        return make_config(name, **({"advantage": advantage, "num_generations": 2} | changes))

    return make_free


@pytest.mark.parametrize("flags", [{}, {"generation_batch_size": 3}, {"rollout_batch_size": 32}])
def test_responses_to_a_prompt_are_side_by_side(make_free, flags):
    """Whatever is sampled at once, and where a rollout meets prompts (of 12) a second time."""
    run = PPORun(make_free(num_generations=4, **flags))
    for batch in (next(iter(run.rollouts)) for _ in range(2)):
        index = batch["prompt_index"].reshape(-1, 4)
        assert (index == index[:, :1]).all()
        assert len(index.unique()) > 1
        tokens = run.rollouts.prompts["prompt_tokens"][batch["prompt_index"]]
        assert torch.equal(batch["prompt_tokens"], tokens)


def test_no_critic_is_built(make_free, monkeypatch):
    def refuse(*_):
        raise AssertionError("a critic")

    monkeypatch.setattr("torchrl_maxmin.models.full.TokenCritic", refuse)
    run = PPORun(make_free(num_iterations=1, save_steps=1)).train()
    assert run.critic is None
    state = load_state(run.folder / "checkpoint-1")
    assert "policy" in state
    assert "critic" not in state
    trained = sum(p.numel() for p in run.policy.parameters())
    moments = run.learner.optimizer.state_dict()["state"].values()
    assert sum(v.numel() for state in moments for n, v in state.items() if n != "step") == 2 * trained


@pytest.mark.parametrize("words", [["rloo"], ["grpo"], ["grpo", "--scale_rewards", "none"]])
def test_by_command_line_and_resumed_bit_for_bit(make_free, tmp_path, words):
    base = make_free()

    def command(name, *more):
        flags = {
            "model_name_or_path": base.model_name_or_path, "dataset_name": base.dataset_name,
            "output_dir": str(tmp_path / name), "num_iterations": 4, "rollout_batch_size": 8,
            "mini_batch_size": 4, "num_ppo_epochs": 2, "learning_rate": 1e-3, "warmup_iterations": 1,
            "response_length": 6, "num_generations": 4, "calibration_prompts": 12, "device": "cpu",
            "tau": 0.5,
        }  # fmt: skip
        line = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        rewards = ["--reward_funcs", "trainers_rewards:brevity", "trainers_rewards:letters"]
        assert main(["ppo", *line, *rewards, "--advantage", *words, *more]) == 0
        return tmp_path / name

    whole = command("whole")
    command("parts", "--stop_at_iteration", "2")
    torch.manual_seed(4321)  # what happens in between must not matter
    parts = command("parts", "--resume_from_checkpoint", "last")
    for file in ("model.safetensors", "metrics.jsonl", "summary.json"):
        assert (parts / file).read_bytes() == (whole / file).read_bytes(), file
    rows = read_metrics(whole)
    assert len(rows) == 4
    for row in rows:
        assert {"rewards/1/mean", "maxmin/weights/1", "objective/welfare", "loss/policy_avg"} <= set(row)
        assert not [name for name in row if name.startswith("val/explained") or name == "loss/value_avg"]
    assert rows[0]["objective/kl"] == pytest.approx(0, abs=1e-4)
    assert abs(rows[-1]["objective/kl"]) > 1e-3
    assert "critic" not in json.loads((whole / "summary.json").read_text())


@pytest.mark.parametrize("kind", ["rloo", "grpo"])
def test_the_policy_moves_towards_its_reward(make_free, kind):
    config = make_free(
        advantage=kind, reward_funcs=["trainers_rewards:brevity"], num_iterations=15, rollout_batch_size=32,
        num_generations=4, mini_batch_size=16, beta=0.0, learning_rate=1e-2, missing_eos_penalty=0.0,
    )  # fmt: skip
    rows = read_metrics(PPORun(config).train().folder)
    gain = sum(r["rewards/0/mean"] for r in rows[-3:]) - sum(r["rewards/0/mean"] for r in rows[:3])
    assert gain / 3 > 0.5  # standard deviations of the reference


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": "mean_of_mins", "entropy_coeff": 0.01},
        {"objective": "mean_of_prompt_mins", "per_device_train_batch_size": 3},
        {"welfare": "nash", "calibration": "win_rate", "kl_controller": "adaptive"},
        {"adversary": "hard_min", "gap_steps": 1, "certificate_prompts": 16, "certificate_samples": 4},
    ],
)
def test_objectives_welfares_and_the_certificate_are_as_with_a_critic(make_free, settings):
    """All that comes before the advantage: the first rollout's weights and statistics are the same."""
    base = {"num_generations": 4, "num_iterations": 1, **settings}
    free = read_metrics(PPORun(make_free("free", "grpo", **base)).train().folder)[0]
    critic = read_metrics(PPORun(make_free("critic", "gae", **base)).train().folder)[0]
    shared = [n for n in critic if n.startswith(("objective/", "rewards/", "maxmin/weights", "maxmin/worst"))]
    assert {n: free[n] for n in shared} == {n: critic[n] for n in shared}
    assert len(shared) >= 10
    gaps = [{name for name in row if name.startswith("maxmin/duality_gap")} for row in (free, critic)]
    assert gaps[0] == gaps[1]


def test_undivided_rewards_move_the_group_weights(make_free):
    """What ``--scale_rewards`` divides is the advantage alone."""
    first = [
        PPORun(make_free(scale, "grpo", scale_rewards=scale, num_generations=4)).first_batch()
        for scale in ("group", "none")
    ]
    for key in ("group_weights", ("next", "reward")):
        assert torch.equal(first[0][key], first[1][key])
    assert not torch.equal(first[0]["advantage"], first[1]["advantage"])


# -- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": "a2c"}, "--advantage 'a2c' is none of gae, rloo, grpo"),
        ({"num_generations": 1}, "--advantage rloo compares .* --num_generations of at least 2"),
        ({"advantage": "grpo", "num_generations": 1}, "--advantage grpo .* --num_generations of at least 2"),
        ({"scale_rewards": "group"}, "--scale_rewards is of --advantage grpo.*leave it out"),
        ({"advantage": "gae", "scale_rewards": "none"}, "--scale_rewards is of --advantage grpo"),
        ({"advantage": "grpo", "scale_rewards": "batch"}, "--scale_rewards 'batch' is none of group, none"),
        ({"lam": 0.9}, "--lam does nothing with --advantage rloo, which has no critic: leave it out"),
        ({"gamma": 0.9}, "--gamma does nothing"),
        ({"critic_learning_rate": 1e-3}, "--critic_learning_rate does nothing"),
        (
            {"advantage": "grpo", "cliprange_value": 0.2},
            "--cliprange_value does nothing with --advantage grpo",
        ),
    ],
)
def test_flags_of_another_advantage_are_refused(make_free, changes, message):
    with pytest.raises(UserError, match=message):
        make_free(**changes).check()


@pytest.mark.parametrize(("first", "then"), [("gae", "rloo"), ("rloo", "gae")])
def test_a_checkpoint_with_a_critic_is_of_another_run(make_free, first, then):
    PPORun(make_free("run", first, stop_at_iteration=1)).train()
    with pytest.raises(UserError, match="the checkpoint is of other settings"):
        PPORun(make_free("run", then, resume_from_checkpoint="last"))
