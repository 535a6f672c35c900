"""Two bandits with known answers: rows are arms, columns groups, the reference policy is uniform."""

import torch

TWO = torch.tensor([[1.0, -0.5], [-0.4, 0.9], [0.45, 0.35], [0.0, 0.0]], dtype=torch.float64)
THREE = torch.tensor(
    [[1.0, -0.5, 0.0], [-0.4, 0.9, 0.1], [0.0, -0.2, 0.8], [0.3, 0.2, 0.2], [0.0, 0.0, 0.0]],
    dtype=torch.float64,
)
BETA = 0.05
# The max-min value without KL (a linear programme), and with it.
LINEAR_VALUE = {"two": 0.38929, "three": 0.22879}
VALUE = {"two": 0.33409, "three": 0.19222}
WEIGHTS = {"two": [0.4736, 0.5264], "three": [0.357, 0.351, 0.292]}
BANDITS = {"two": TWO, "three": THREE}


def objective(logits, rewards, beta=BETA):
    """``min_u F_u`` of a softmax policy, KL to the uniform reference inside."""
    log_policy = logits.log_softmax(-1)
    policy = log_policy.exp()
    kl = (policy * (log_policy + torch.tensor(float(len(rewards))).log())).sum()
    return (policy @ rewards).min() - beta * kl


def mirror_ascent(adversary, rewards, step_size, steps, beta=BETA, last=100):
    """Exact mirror ascent on the logits against ``adversary``.

    Returns the objective of the last ``last`` iterates, and the weights.
    """
    logits = torch.zeros(len(rewards), dtype=torch.float64)
    values, weights_seen = [], []
    for step in range(steps):
        log_policy = logits.log_softmax(-1)
        policy = log_policy.exp()
        weights = adversary.update(policy @ rewards).to(rewards)
        gradient = rewards @ weights - beta * log_policy
        logits = logits + step_size * (gradient - policy @ gradient)
        if step >= steps - last:
            values.append(objective(logits, rewards, beta).item())
            weights_seen.append(weights)
    return torch.tensor(values), torch.stack(weights_seen)
