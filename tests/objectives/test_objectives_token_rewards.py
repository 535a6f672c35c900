"""Score placement and the KL column against a loop over single tokens."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl_maxmin.objectives.token_rewards import place_at_last_token, token_steps


def make_batch(lengths, width, groups, seed):
    generator = torch.Generator().manual_seed(seed)
    size = len(lengths)
    mask = torch.arange(width) < torch.tensor(lengths)[:, None]
    return TensorDict(
        {
            "action_mask": mask,
            # what lies behind the end must not matter
            "sample_log_prob": torch.randn(size, width, generator=generator),
            "ref_log_prob": torch.randn(size, width, generator=generator),
            "state_value": torch.randn(size, width, groups + 1, generator=generator),
            "next": {"reward": torch.randn(size, groups, generator=generator)},
        },
        [size],
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=5),
    st.integers(1, 3),
    st.floats(0, 2),
    st.integers(0, 99),
)
def test_against_a_loop(lengths, groups, beta, seed):
    width = 6
    batch = make_batch(lengths, width, groups, seed)
    steps = token_steps(batch, beta)
    score = batch["next", "reward"].numpy()
    log_prob, ref = batch["sample_log_prob"].numpy(), batch["ref_log_prob"].numpy()
    reward = np.zeros((len(lengths), width, groups + 1), dtype=np.float32)
    done = np.zeros((len(lengths), width, 1), dtype=bool)
    for b, length in enumerate(lengths):
        for t in range(length):
            reward[b, t, groups] = -beta * (log_prob[b, t] - ref[b, t])
        reward[b, length - 1, :groups] = score[b]
        done[b, length - 1] = True
    assert steps.batch_size == (len(lengths), width)
    np.testing.assert_allclose(steps["next", "reward"].numpy(), reward, rtol=1e-5, atol=1e-6)
    assert (steps["next", "done"].numpy() == done).all()
    assert (steps["next", "terminated"].numpy() == done).all()
    placed = place_at_last_token(batch["next", "reward"], batch["action_mask"])
    np.testing.assert_array_equal(placed.numpy(), reward[..., :groups])
    value = batch["state_value"]
    assert torch.equal(steps["state_value"], value)
    assert torch.equal(steps["next", "state_value"][:, :-1], value[:, 1:])
    assert torch.equal(steps["mask"], batch["action_mask"])


def test_the_whole_penalty_is_beta_times_the_sampled_kl():
    batch = make_batch([3, 6, 1], 6, 2, 0)
    steps = token_steps(batch, 0.3)
    mask = batch["action_mask"]
    kl = ((batch["sample_log_prob"] - batch["ref_log_prob"]) * mask).sum(-1)
    torch.testing.assert_close(steps["next", "reward"][..., 2].sum(-1), -0.3 * kl)
    torch.testing.assert_close(steps["next", "reward"][..., :2].sum(1), batch["next", "reward"])
