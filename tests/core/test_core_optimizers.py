"""Optimizers by name, and float32 masters of weights in half precision."""

import copy

import pytest
import torch
from torch import nn

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.optimizers import make_optimizer


def step_often(model, optimizer, steps):
    for step in range(steps):
        optimizer.zero_grad()
        for k, parameter in enumerate(model.parameters()):
            parameter.grad = torch.full_like(parameter, 0.1 * (k + 1) * (-1) ** (step // 2))
        optimizer.step()


def groups(model, rate):
    return [{"params": [p], "lr": rate} for p in model.parameters()]


def test_float32_parameters_are_stepped_on_as_torch_does():
    model = nn.Linear(3, 2)
    twin = copy.deepcopy(model)
    step_often(model, make_optimizer(groups(model, 1e-3)), 5)
    plain = torch.optim.AdamW(groups(twin, 1e-3), eps=1e-8, weight_decay=0.0)
    step_often(twin, plain, 5)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, other)


def test_steps_below_the_rounding_of_bfloat16_add_up():
    exact = nn.Linear(3, 2).to(torch.bfloat16).float()
    model = copy.deepcopy(exact).to(torch.bfloat16)
    step_often(exact, make_optimizer(groups(exact, 1e-4), weight_decay=0.1), 200)
    optimizer = make_optimizer(groups(model, 1e-4), weight_decay=0.1)
    step_often(model, optimizer, 200)
    for half, whole in zip(model.parameters(), exact.parameters(), strict=True):
        assert half.dtype == torch.bfloat16
        torch.testing.assert_close(half.float(), whole, rtol=2**-8, atol=2**-8)
    for (_, master), whole in zip(optimizer.copies, exact.parameters(), strict=True):
        torch.testing.assert_close(
            master, whole, rtol=1e-3, atol=1e-4
        )  # gradients were rounded, no weight was


def test_a_state_goes_on_where_it_was():
    model = nn.Linear(3, 2).to(torch.bfloat16)
    twin = copy.deepcopy(model)
    optimizer = make_optimizer(groups(model, 1e-4))
    step_often(model, optimizer, 3)
    twin.load_state_dict(model.state_dict())
    other = make_optimizer(groups(twin, 1e-4))
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    step_often(model, optimizer, 30)
    step_often(twin, other, 30)
    for one, again in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(one, again)


def test_transformers_names_give_their_optimizers():
    model = nn.Linear(3, 2)
    assert type(make_optimizer(groups(model, 1e-3), "adafactor").optimizer).__name__ == "Adafactor"
    assert type(make_optimizer(groups(model, 1e-3), "sgd").optimizer) is torch.optim.SGD


def test_an_optimizer_that_is_not_installed_is_named():
    with pytest.raises(UserError, match="--optim lomo cannot be had"):
        make_optimizer(groups(nn.Linear(3, 2), 1e-3), "lomo")
