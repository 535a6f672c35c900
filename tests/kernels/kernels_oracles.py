"""Float64 oracles, each from its definition and independent of the code under test, and error measures."""

import os

import torch
from hypothesis import settings

INTERPRET = os.environ.get("TRITON_INTERPRET", "0") == "1"
# The interpreter is slow to trace through Inductor and gains nothing by it.
COMPILER = "aot_eager" if INTERPRET else "inductor"
# The interpreter truncates where it should round, so one bfloat16 step there and half of one elsewhere.
LOW_BAR = {torch.bfloat16: 8e-3, torch.float16: 1e-3}

# An example costs a pass in the interpreter, on a GPU the compilation of a new shape.
EXAMPLES = {"cpu": 12 if INTERPRET else 40, "cuda": 12, "meta": 2}[torch.get_default_device().type]
PROPERTY = settings(max_examples=EXAMPLES, deadline=None, derandomize=True)


def rms_error(actual, expected):
    """Return the norm of the error over the norm of the expected value."""
    expected = expected.double()
    error = (actual.double() - expected).norm()
    return (error / expected.norm().clamp(min=1e-30)).item()


def largest_error(actual, expected):
    """Return the largest error over the largest absolute value."""
    expected = expected.double()
    error = (actual.double() - expected).abs().max()
    return (error / expected.abs().max().clamp(min=1e-30)).item()


def random_weights(tensors, seed=0):
    """Return one fixed random cotangent per tensor."""
    generator = torch.Generator().manual_seed(seed)
    options = {"generator": generator, "dtype": torch.float64, "device": "cpu"}
    return [torch.randn(t.shape, **options).to(t.device) for t in tensors]


def gradients(function, inputs):
    """Return float outputs, and the gradients of their fixed random combination."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    outputs = [o for o in function(*leaves) if o is not None and o.is_floating_point()]
    active = [o for o in outputs if o.requires_grad]
    total = sum((o.double() * w).sum() for o, w in zip(active, random_weights(active), strict=True))
    return outputs, torch.autograd.grad(total, leaves)


def heads_inputs(rows, width, heads, dtype=torch.float32):
    """Return random hidden [N, H], weight [K, H], bias, shift and scale [K]."""
    hidden = torch.randn(rows, width).to(dtype)
    weight = (torch.randn(heads, width) / width**0.5).to(dtype)
    vectors = torch.randn(heads).to(dtype), torch.randn(heads).to(dtype), (torch.rand(heads) + 0.5).to(dtype)
    return hidden, weight, *vectors


def heads_oracle(hidden, weight, bias=None, shift=None, scale=None, temperature=1.0):
    rewards = torch.einsum("nh,kh->nk", hidden.double(), weight.double())
    for vector, sign in ((bias, 1.0), (shift, -1.0)):
        if vector is not None:
            rewards = rewards + sign * vector.double()
    if scale is not None:
        rewards = rewards / scale.double()
    return (rewards, *min_oracle(rewards, temperature))


def min_oracle(rewards, temperature=1.0):
    rewards = rewards.double()
    # A loop over heads, strictly smaller wins: ties stay with the first.
    minimum, argmin = rewards[..., 0], torch.zeros(rewards.shape[:-1], dtype=torch.int64)
    for k in range(1, rewards.shape[-1]):
        lower = rewards[..., k] < minimum
        minimum = torch.where(lower, rewards[..., k], minimum)
        argmin = torch.where(lower, k, argmin)
    mean = torch.exp(-(rewards - minimum.detach()[..., None]) / temperature).mean(-1)
    return minimum, argmin, minimum.detach() - temperature * mean.log()


def masked_heads_oracle(
    hidden, weight, bias=None, shift=None, scale=None, *, head_mask, row_mask, temperature=1.0
):
    """Drop the padding, ask the oracles above, and put the real rows back among zeros; then the head sums."""
    rows, heads = row_mask.nonzero().squeeze(1), head_mask.nonzero().squeeze(1)
    real = heads_oracle(hidden[rows], weight, bias, shift, scale)[0]
    minimum, argmin, softmin = min_oracle(real[:, heads], temperature)

    def put_back(values):
        return values.new_zeros(len(hidden), *values.shape[1:]).index_copy(0, rows, values)

    return (*map(put_back, (real, minimum, heads[argmin], softmin)), real.sum(0))


def em_oracle(chosen, rejected, user_offsets, log_prior):
    responsibilities, likelihood = [], []
    prior = log_prior.double()
    for u in range(len(user_offsets) - 1):
        rows = slice(int(user_offsets[u]), int(user_offsets[u + 1]))
        margin = chosen[rows].double() - rejected[rows].double()
        total = prior - torch.logaddexp(-margin, torch.zeros_like(margin)).sum(0)
        joint = torch.logsumexp(total, 0)
        likelihood.append(joint)
        responsibilities.append(prior.exp() if joint == -torch.inf else (total - joint).exp())
    return torch.stack(responsibilities).detach(), torch.stack(likelihood)


def gae_oracle(reward, value, next_value, done, terminated, gamma, lmbda, mask=None):
    """The defining sum: A_t = sum_l (gamma lmbda)^l delta_{t+l}, up to the end of the trajectory."""
    batch, steps, columns = reward.shape
    advantage = torch.zeros(batch, steps, columns, dtype=torch.float64)
    for b in range(batch):
        for t in range(steps):
            factor = 1.0
            for s in range(t, steps):
                if mask is not None and not mask[b, s]:
                    break
                delta = reward[b, s].double() - value[b, s].double()
                if not terminated[b, s, 0]:
                    delta = delta + gamma * next_value[b, s].double()
                advantage[b, t] += factor * delta
                if done[b, s, 0]:
                    break
                factor *= gamma * lmbda
    return advantage, advantage + value.double()


def log_probs_oracle(hidden, lm_head, targets, temperature=1.0):
    logits = torch.einsum("nh,vh->nv", hidden.double(), lm_head.double()) / temperature
    distribution = torch.distributions.Categorical(logits=logits)
    return distribution.log_prob(targets), distribution.entropy()
