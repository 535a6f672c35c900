"""Advantages from other responses to a prompt: TRL's and TorchRL's numbers, and what each is biased by."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.objectives.llm import MCAdvantage

from torchrl_maxmin.objectives import grpo_advantage, rloo_advantage, scalarise_advantage


def rewards(prompts, n, columns, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(prompts, n, columns, generator=generator, dtype=torch.float64) + 1


SHAPES = {"prompts": st.integers(1, 4), "n": st.integers(2, 6), "columns": st.integers(1, 4)}


# -- the numbers of others -------------------------------------------------------------------------


def trl_rloo(flat, n):
    """``RLOOTrainer``: one reward a completion [N n]."""
    grouped = flat.reshape(-1, n)
    baseline = (grouped.sum(1, keepdims=True) - grouped) / (n - 1)
    return flat - baseline.reshape(-1)


def trl_grpo(flat, n, scale_rewards):
    """``GRPOTrainer``: one reward a completion [N n]; its deviation is over n - 1."""
    grouped = flat.reshape(-1, n)
    advantage = flat - grouped.mean(1).repeat(n)
    return advantage if scale_rewards == "none" else advantage / (grouped.std(1, ddof=1).repeat(n) + 1e-4)


@given(**SHAPES, seed=st.integers(0, 99))
@settings(deadline=None)
def test_every_column_is_the_one_of_trl(prompts, n, columns, seed):
    given_rewards = rewards(prompts, n, columns, seed)
    found = {
        "rloo": rloo_advantage(given_rewards),
        "group": grpo_advantage(given_rewards),
        "none": grpo_advantage(given_rewards, "none"),
    }
    for k in range(columns):
        flat = given_rewards[..., k].reshape(-1).numpy()
        expected = {"rloo": trl_rloo(flat, n), **{s: trl_grpo(flat, n, s) for s in ("group", "none")}}
        for name, values in expected.items():
            np.testing.assert_allclose(
                found[name][..., k].reshape(-1).numpy(), values, atol=1e-9, err_msg=name
            )


@pytest.mark.parametrize("n", [2, 5])
def test_one_column_is_that_of_torchrl(n):
    """``MCAdvantage`` adds nothing to the deviation and leaves none out: n / (n - 1) of it are ours."""
    prompts = 3
    given_rewards = rewards(prompts, n, 1)
    data = TensorDict(
        {
            "query": torch.arange(prompts).repeat_interleave(n)[:, None],
            "next": {
                "reward": given_rewards.reshape(-1, 1, 1),
                "done": torch.ones(prompts * n, 1, 1, dtype=torch.bool),
            },
        },
        [prompts * n, 1],
    )
    transform = MCAdvantage(grpo_size=n, trajectory_return="sum")
    found = transform.inv(data)["advantage"].reshape(prompts, n, 1)
    torch.testing.assert_close(grpo_advantage(given_rewards, eps=0.0), found, atol=1e-6, rtol=0)
    of_reward = found * given_rewards.std(1, keepdim=True)
    torch.testing.assert_close(grpo_advantage(given_rewards, "none"), of_reward, atol=1e-6, rtol=0)
    torch.testing.assert_close(rloo_advantage(given_rewards), of_reward * n / (n - 1), atol=1e-6, rtol=0)


# -- bias, by enumeration --------------------------------------------------------------------------


def expected_gradient(logits, reward, n, advantage):
    """Exact mean of the estimate over all n-tuples of responses: (gradient, exact gradient) [X, M, K].

    ``logits`` [X, M] are those of M responses to each of X prompts, ``reward`` [X, M, K].
    """
    policy = logits.softmax(-1)
    num_prompts, num_responses = logits.shape
    tuples = torch.tensor(list(itertools.product(range(num_responses), repeat=n)))
    chance = policy[:, tuples].prod(-1)  # [X, T]
    columns = advantage(reward[:, tuples])  # [X, T, n, K]
    # grad log pi(y) = onehot(y) - pi
    score = torch.eye(num_responses, dtype=logits.dtype)[tuples] - policy[:, None, None]
    mean = torch.einsum("xt,xtnk,xtnm->xmk", chance, columns, score) / n
    utility = torch.einsum("xm,xmk->xk", policy, reward)
    exact = policy[..., None] * (reward - utility[:, None])
    return mean / num_prompts, exact / num_prompts


@st.composite
def worlds(draw):
    prompts, responses, columns = draw(st.integers(1, 3)), draw(st.integers(2, 4)), draw(st.integers(1, 3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    logits = torch.randn(prompts, responses, generator=generator, dtype=torch.float64)
    return logits, rewards(prompts, responses, columns, draw(st.integers(0, 99)))


@given(worlds(), st.integers(2, 4))
@settings(deadline=None)
def test_leave_one_out_is_unbiased_in_every_column(world, n):
    found, exact = expected_gradient(*world, n, rloo_advantage)
    torch.testing.assert_close(found, exact, atol=1e-12, rtol=0)


@given(worlds(), st.integers(2, 4))
@settings(deadline=None)
def test_the_own_response_in_the_baseline_shrinks_the_gradient_and_no_more(world, n):
    found, exact = expected_gradient(*world, n, lambda r: grpo_advantage(r, "none"))
    torch.testing.assert_close(found, exact * (n - 1) / n, atol=1e-12, rtol=0)


def test_the_deviation_turns_the_direction():
    """Of two groups that want other things, one in a unit ten times as large: GRPO takes them for equal."""
    logits = torch.zeros(1, 3, dtype=torch.float64)
    reward = torch.tensor([[[10.0, -1.0], [0.0, -1.0], [-10.0, 2.0]]], dtype=torch.float64)
    weights = torch.tensor([0.5, 0.5], dtype=torch.float64)
    cosine = []
    for advantage in (rloo_advantage, grpo_advantage):
        found, exact = expected_gradient(logits, reward, 3, advantage)
        direction, right = ((columns * weights).sum(-1).flatten() for columns in (found, exact))
        cosine.append(torch.cosine_similarity(direction, right, dim=0).item())
    assert cosine[0] == pytest.approx(1)
    assert cosine[1] < 0.6


@given(**SHAPES, seed=st.integers(0, 99))
@settings(deadline=None)
def test_a_unit_or_offset_of_a_prompt_and_column_means_nothing_to_grpo(prompts, n, columns, seed):
    given_rewards = rewards(prompts, n, columns, seed)
    generator = torch.Generator().manual_seed(seed)
    unit = 0.1 + torch.rand(prompts, 1, columns, generator=generator, dtype=torch.float64)
    offset = torch.randn(prompts, 1, columns, generator=generator, dtype=torch.float64)
    other = grpo_advantage(given_rewards * unit + offset, eps=0.0)
    torch.testing.assert_close(other, grpo_advantage(given_rewards, eps=0.0), atol=1e-9, rtol=0)
    moved = rloo_advantage(given_rewards * unit + offset)  # an offset by prompt only
    torch.testing.assert_close(moved, rloo_advantage(given_rewards) * unit, atol=1e-9, rtol=0)


# -- shapes and mistakes ---------------------------------------------------------------------------


@given(**SHAPES, seed=st.integers(0, 99))
@settings(deadline=None)
def test_the_weighted_sum_of_columns_is_the_advantage_of_the_weighted_reward(prompts, n, columns, seed):
    given_rewards = rewards(prompts, n, columns, seed)
    weights = torch.rand(columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for advantage in (rloo_advantage, lambda r: grpo_advantage(r, "none")):
        found = scalarise_advantage(advantage(given_rewards), weights)
        expected = advantage((given_rewards * weights).sum(-1, keepdim=True))
        torch.testing.assert_close(found, expected, atol=1e-9, rtol=0)
        torch.testing.assert_close(found.sum(1), torch.zeros_like(found.sum(1)), atol=1e-9, rtol=0)


@pytest.mark.parametrize("advantage", [rloo_advantage, grpo_advantage])
def test_equal_rewards_teach_nothing(advantage):
    assert (advantage(torch.full((2, 4, 3), 0.75)) == 0).all()


@pytest.mark.parametrize("advantage", [rloo_advantage, grpo_advantage, lambda r: grpo_advantage(r, "none")])
def test_one_response_has_no_others(advantage):
    with pytest.raises(ValueError, match="needs 2 or more, not 1"):
        advantage(torch.zeros(3, 1, 2))


def test_another_scale_is_refused():
    with pytest.raises(ValueError, match="one of group, none, not 'batch'"):
        grpo_advantage(torch.zeros(3, 2, 2), "batch")
