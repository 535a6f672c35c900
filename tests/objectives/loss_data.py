"""Small policies, critics and batches for the loss tests."""

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.modules import NormalParamExtractor, ProbabilisticActor, TanhNormal

OBS, ACTIONS = 3, 4


def categorical_actor(seed=0):
    torch.manual_seed(seed)
    module = TensorDictModule(nn.Linear(OBS, ACTIONS), in_keys=["observation"], out_keys=["logits"])
    return ProbabilisticActor(
        module,
        in_keys=["logits"],
        out_keys=["action"],
        distribution_class=torch.distributions.Categorical,
        return_log_prob=True,
        log_prob_key="sample_log_prob",
    )


def gaussian_actor(seed=0):
    torch.manual_seed(seed)
    network = nn.Sequential(nn.Linear(OBS, 2 * ACTIONS), NormalParamExtractor())
    module = TensorDictModule(network, in_keys=["observation"], out_keys=["loc", "scale"])
    return ProbabilisticActor(
        module,
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=TanhNormal,
        return_log_prob=True,
        log_prob_key="sample_log_prob",
    )


class Scorer(nn.Module):
    """Log-probability and entropy of given actions, in one pass, without a distribution."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(OBS, ACTIONS)

    def forward(self, observation, action):
        log_policy = self.linear(observation).log_softmax(-1)
        log_prob = log_policy.gather(-1, action.unsqueeze(-1)).squeeze(-1)
        return log_prob, -(log_policy.exp() * log_policy).sum(-1)


def scoring_actor(seed=0, out_keys=("log_prob", "entropy")):
    return TensorDictModule(Scorer(seed), in_keys=["observation", "action"], out_keys=list(out_keys))


def critic(columns, seed=1):
    torch.manual_seed(seed)
    return TensorDictModule(nn.Linear(OBS, columns), in_keys=["observation"], out_keys=["state_value"])


def batch(shape=(4, 6), columns=1, weights=None, continuous=False, seed=0, dtype=torch.float32):
    """A batch with a precomputed advantage of ``columns`` columns."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size):
        return torch.randn(*shape, *size, generator=generator, dtype=dtype)

    action = torch.rand(*shape, ACTIONS, generator=generator, dtype=dtype) - 0.5
    if not continuous:
        action = action.argmax(-1)
    data = TensorDict(
        {
            "observation": normal(OBS),
            "action": action,
            "sample_log_prob": normal() * 0.4 - 1.4,
            "ref_log_prob": normal() * 0.4 - 1.4,
            "advantage": normal(columns),
            "value_target": normal(columns),
            "state_value": normal(columns),
        },
        batch_size=shape,
    )
    if weights is not None:
        data["group_weights"] = torch.tensor(weights, dtype=dtype).expand(*shape, -1)
    return data


def rollout(shape=(4, 6), columns=2, weights=(0.3, 0.7), seed=0):
    """A batch without an advantage: the loss computes it."""
    data = batch(shape, columns, weights, seed=seed).exclude("advantage", "value_target", "state_value")
    generator = torch.Generator().manual_seed(seed + 1)
    done = torch.rand(*shape, 1, generator=generator) < 0.2
    data["next"] = TensorDict(
        {
            "observation": torch.randn(*shape, OBS, generator=generator),
            "reward": torch.randn(*shape, columns, generator=generator),
            "done": done,
            "terminated": done,
        },
        batch_size=shape,
    )
    return data


def total(losses):
    """The sum of the loss terms."""
    return sum(value.sum() for key, value in losses.items() if key.startswith("loss_"))


def gradients(loss, data):
    """Loss terms by name, and gradients by parameter name."""
    for parameter in loss.parameters():
        parameter.grad = None
    losses = loss(data)
    total(losses).backward()
    found = {name: p.grad for name, p in loss.named_parameters() if p.grad is not None}
    return {k: v.detach() for k, v in losses.items()}, found
