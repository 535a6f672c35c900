"""PPO with TorchRL on an environment with a vector reward, trained for the group that is worst off.

    python examples/ppo_maxmin.py --env_id fruit-tree-v0

examples/ppo_plain.py is the same for the mean over groups.
"""

import argparse
import time

import torch
from tensordict.nn import TensorDictModule
from torchrl import torchrl_logger
from torchrl.data import LazyTensorStorage, ReplayBuffer, SamplerWithoutReplacement
from torchrl.envs import RewardSum, TransformedEnv
from torchrl.modules import MLP, ProbabilisticActor

from torchrl_maxmin.collectors import MaxMinCollector
from torchrl_maxmin.collectors.episodes import exact_summary
from torchrl_maxmin.envs import make_env
from torchrl_maxmin.objectives import MaxMinPPOLoss, VectorGAE
from torchrl_maxmin.welfare import EntropyRegularized


def train(
    env_id="fruit-tree-v0",
    options=None,
    num_envs=512,
    steps=6,
    total_frames=500_000,
    gamma=1.0,
    entropy=0.01,
    minibatches=2,
    seed=0,
    report=print,
):
    """Train for the worst-off group; returns the policy and its environment."""
    torch.manual_seed(seed)
    base = make_env(env_id, num_envs, seed=seed, **(options or {}))
    groups, size = base.reward_spec.shape[-1], base.observation_spec["observation"].shape[-1]
    env = TransformedEnv(base, RewardSum())

    network = MLP(size, base.action_spec.n, num_cells=[64, 64], activation_class=torch.nn.Tanh)
    actor = ProbabilisticActor(
        TensorDictModule(network, ["observation"], ["logits"]),
        in_keys=["logits"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
    )
    value = MLP(size, groups, num_cells=[64, 64], activation_class=torch.nn.Tanh)
    critic = TensorDictModule(value, ["observation"], ["state_value"])

    collector = MaxMinCollector(
        env,
        actor,
        adversary=EntropyRegularized(groups, tau=0.1),
        frames_per_batch=num_envs * steps,
        total_frames=total_frames,
    )
    advantage = VectorGAE(gamma=gamma, lmbda=0.95, value_network=critic)
    loss = MaxMinPPOLoss(actor, critic, entropy_coeff=entropy, normalize_advantage=True, functional=False)
    iterations = total_frames // (num_envs * steps)
    optimizer = torch.optim.Adam(loss.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, iterations)
    buffer = ReplayBuffer(
        storage=LazyTensorStorage(num_envs * steps),
        sampler=SamplerWithoutReplacement(),
        batch_size=num_envs * steps // minibatches,
    )
    for iteration, data in enumerate(collector):
        with torch.no_grad():
            advantage(data)
        buffer.empty()
        buffer.extend(data.exclude("next").flatten())
        for _ in range(4):
            for minibatch in buffer:
                losses = loss(minibatch)
                total = losses["loss_objective"] + losses["loss_critic"] + losses["loss_entropy"]
                optimizer.zero_grad()
                total.backward()
                torch.nn.utils.clip_grad_norm_(loss.parameters(), 0.5)
                optimizer.step()
        schedule.step()
        if iteration % max(iterations // 10, 1) == 0:
            returns = data["next", "episode_reward"][data["next", "done"].squeeze(-1)].mean(0)
            report(f"{iteration:5d}  returns by group {returns.numpy().round(2)}")
    collector.shutdown()
    return actor, base


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--env_id", default="fruit-tree-v0")
    parser.add_argument("--total_frames", type=int, default=500_000)
    parser.add_argument("--seed", type=int, default=0)
    start = time.perf_counter()
    arguments = vars(parser.parse_args())
    torchrl_logger.setLevel("WARNING")
    torch.set_num_threads(1)  # small networks run fastest so
    actor, env = train(**arguments)
    exact = exact_summary(env, actor, "min_of_means")["exact"]
    print(f"{arguments['total_frames']} steps in {time.perf_counter() - start:.1f} s")
    print(f"exact returns {[round(u, 3) for u in exact['utilities']]}")
    print(f"worst group {exact['worst_group']:.3f}, at best {exact['max_min']:.3f}")
