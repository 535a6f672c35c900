"""How far float32 may lie from the exact value: bars for tests that compute one thing in two ways."""

import torch

EPS = torch.finfo(torch.float32).eps
# a logit, its division by the temperature, the largest logit taken off, the log-probability: at most EPS each
SAMPLER = 4
# besides, two blocks of ten operations each, a layer norm, a head and a softmax, each rounded once
TINY_MODEL = SAMPLER + 2 * 10 + 3


def log_prob_bar(model, roundings, temperature=1.0):
    """Bound ``roundings`` errors of one unit each in a token's log-probability.

    The unit is that of the largest logit there can be: states have the norm sqrt(width) behind a last layer
    norm that was not trained.
    """
    head = model.get_output_embeddings().weight.detach().double()
    return roundings * EPS * head.shape[1] ** 0.5 * head.norm(dim=-1).max().item() / temperature


def float32_bound(largest, roundings=16):
    """Bound the error of a sum of products as large as ``largest``, after so many roundings of it.

    A matrix product, a softmax or a mean adds its terms in an order that is the processor's; what differs is
    a few roundings of its largest term.
    """
    return roundings * EPS * max(1.0, float(abs(largest)))
