"""The one-step token environment: TorchRL's contract, rewards, and the order of prompts."""

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import check_env_specs

from torchrl_maxmin.envs import TokenEnv

TOTAL, WIDTH, EOS = 10, 3, 2


def prompts():
    index = torch.arange(TOTAL)
    return TensorDict(
        {
            "prompt_tokens": index[:, None].expand(TOTAL, WIDTH).clone(),
            "prompt_mask": torch.ones(TOTAL, WIDTH, dtype=torch.bool),
        },
        [TOTAL],
    )


def rewards_of(td):
    """Group 0 counts real tokens, group 1 adds up prompt and action tokens."""
    real = td["action_mask"]
    return torch.stack([real.sum(-1), (td["action"] * real).sum(-1) + td["prompt_tokens"][:, 0]], -1)


def make_env(num_prompts=4, **kwargs):
    settings = {"num_groups": 2, "num_prompts": num_prompts, "max_new_tokens": 5, "eos_token_id": EOS}
    return TokenEnv(prompts(), rewards_of, **(settings | {"vocab_size": 12} | kwargs))


@pytest.mark.parametrize("minimum", [False, True])
def test_specs(minimum):
    check_env_specs(make_env(minimum=minimum))


def test_rewards_are_the_functions_on_masked_responses():
    env = make_env()
    td = env.reset()
    td["action"] = torch.tensor([[5, 5, EOS, 9, 9], [EOS, 1, 1, 1, 1], [3, 4, 5, 6, 7], [3, EOS, EOS, 3, 3]])
    first = td["prompt_tokens"][:, 0]
    stepped = env.step(td)["next"]
    expected = torch.stack([torch.tensor([3, 1, 5, 2]), torch.tensor([12, 2, 25, 5]) + first], -1).float()
    assert stepped["reward"].shape == (4, 2)
    assert torch.equal(stepped["reward"], expected)
    assert torch.equal(stepped["group_reward"], expected)
    assert stepped["done"].all()
    assert stepped["terminated"].all()


def test_every_one_of_several_ends_ends_a_response():
    seen = []

    def reward(responses):
        seen.append(responses["action_mask"].clone())
        return torch.zeros(4, 2)

    env = TokenEnv(
        prompts(), reward, num_groups=2, num_prompts=4, max_new_tokens=3, eos_token_id=(EOS, 7), vocab_size=12
    )
    td = env.reset()
    td["action"] = torch.tensor([[5, 7, 9], [EOS, 7, 1], [7, 5, EOS], [3, 4, 5]])
    env.step(td)
    assert seen[-1].sum(-1).tolist() == [2, 1, 1, 3]


def test_minimum_rewards_with_the_least_of_each_response():
    plain, least = make_env(), make_env(minimum=True)
    td = plain.reset()
    td["prompt_tokens"].zero_()
    td["action"] = torch.tensor([[5, 5, EOS, 9, 9], [EOS, 1, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 0]])
    vector, scalar = plain.step(td.clone())["next"], least.step(td.clone())["next"]
    assert scalar["reward"].shape == (4, 1)
    assert torch.equal(scalar["reward"][:, 0], vector["reward"].min(-1).values)
    assert torch.equal(scalar["group_reward"], vector["reward"])
    assert set(vector["reward"].argmin(-1).tolist()) == {0, 1}


def visit(env, steps, resets=1):
    """Prompt indices of so many batches, with any number of resets before each step."""
    seen = []
    for _ in range(steps):
        for _ in range(resets):
            td = env.reset()
        assert torch.equal(td["prompt_tokens"][:, 0], td["prompt_index"])
        seen.extend(td["prompt_index"].tolist())
        td["action"] = env.action_spec.rand()
        env.step(td)
    return seen


def test_order_does_not_depend_on_resets_or_global_randomness():
    first = visit(make_env(), 6)
    torch.manual_seed(99)
    assert visit(make_env(), 6, resets=3) == first
    assert visit(make_env(seed=1), 6) != first


@pytest.mark.parametrize("size", [1, 4, 7, 23])
def test_every_epoch_visits_every_prompt_once(size):
    seen = visit(make_env(num_prompts=size), -(-3 * TOTAL // size))
    epochs = [seen[i * TOTAL : (i + 1) * TOTAL] for i in range(3)]
    assert all(sorted(epoch) == list(range(TOTAL)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batch_index_resumes():
    whole = visit(make_env(), 7)
    env = make_env()
    env.batch_index = 3
    assert visit(env, 4) == whole[12:]


def test_next_observation_is_the_next_batch():
    env = make_env()
    td = env.reset()
    td["action"] = env.action_spec.rand()
    following = env.step(td)["next", "prompt_index"]
    assert torch.equal(following, env.reset()["prompt_index"])
