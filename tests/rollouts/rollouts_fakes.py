"""Workers in the process of the test, and networks of one number."""

import torch
from torch import nn

from torchrl_maxmin.core.errors import EngineError
from torchrl_maxmin.models.networks import Networks


def number(value=0.0):
    """Networks whose policy is one number."""
    policy = nn.Linear(1, 1, bias=False)
    with torch.no_grad():
        policy.weight.fill_(value)
    return Networks(policy, None)


class FakeWorkers:
    """Samplers that work when the answers are wanted, by the weights of when they were asked."""

    def __init__(self, samplers, lost_at=()):
        self.samplers, self.size, self.restarts = samplers, len(samplers), 0
        self.lost_at, self.requests, self.closed = set(lost_at), 0, False

    def ask(self, version, weights, tasks):
        assert len(tasks) == self.size
        self.requests += 1
        return self.requests, [weight.clone() for weight in weights], tasks

    def answers(self, request):
        place, weights, tasks = request
        if place in self.lost_at:
            raise EngineError("rollout worker 1 of 2 is lost for good")
        answers = []
        for sampler, task in zip(self.samplers, tasks, strict=True):
            sampler.load(weights)
            answers.append(sampler.sample(task))
        return answers

    def close(self):
        self.closed = True
