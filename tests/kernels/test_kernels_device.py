"""The switch ``--device``: where tensors of the tests lie, and what its dry run notices."""

import pytest
import torch
from kernels_oracles import em_oracle, gradients, heads_inputs
from kernels_stand_in import StandIn, stand_in
from maxmin_kernels import em_responsibilities, reward_heads_min, token_log_probs


def test_tensors_lie_on_the_chosen_device(device):
    made = [torch.zeros(2), torch.tensor([1.0]), torch.arange(3), torch.randn(2, 2), *heads_inputs(2, 3, 4)]
    assert {x.device.type for x in made} == {device.type}
    outputs, grads = gradients(lambda *x: reward_heads_min(*x), made[4:7])
    assert {x.device.type for x in (*outputs, *grads)} == {device.type}


@pytest.mark.cpu
def test_what_the_cpu_alone_has_is_tested_there(device):
    assert device.type == torch.zeros(2).device.type == torch.tensor([1]).device.type == "cpu"


@pytest.fixture
def on_stand_in():
    if torch.get_default_device().type != "cpu":
        pytest.skip("about the stand-in itself, on the CPU")
    with stand_in():
        yield


@pytest.mark.usefixtures("on_stand_in")
def test_operators_take_the_stand_in_for_a_device():
    scores, offsets = torch.randn(9, 3, requires_grad=True), torch.tensor([0, 4, 4, 9])
    outputs = em_responsibilities(scores, None, offsets, torch.zeros(3).log_softmax(0))
    expected = em_oracle(scores, torch.zeros_like(scores), offsets, torch.zeros(3).log_softmax(0))
    for actual, reference in zip(outputs, expected, strict=True):
        assert isinstance(actual, StandIn)
        assert actual.device.type == "meta"
        assert (actual - reference).abs().max().item() < 1e-5
    (grad,) = torch.autograd.grad(outputs[1].sum(), scores)
    assert grad.tolist() != torch.zeros(9, 3).tolist()


@pytest.mark.usefixtures("on_stand_in")
@pytest.mark.parametrize(
    "mistake",
    [
        lambda x: x + torch.ones(3, device="cpu"),
        lambda x: torch.cat([x, torch.randn(3, generator=torch.Generator(), device="cpu")]),
        lambda x: torch.randn(3, generator=torch.Generator()),
        lambda x: token_log_probs(x[None], torch.zeros(5, 3), torch.zeros(1, device="cpu").long()),
        lambda x: torch.testing.assert_close(x, x.cpu()),
        lambda x: torch.where(x > 0, x, torch.zeros(3, device="cpu")),
    ],
    ids=["add", "cat", "generator", "operator", "assert_close", "where"],
)
def test_what_stops_on_cuda_stops_on_the_stand_in(mistake):
    with pytest.raises((RuntimeError, ValueError, AssertionError), match=r"CPU|cpu"):
        mistake(torch.randn(3))


@pytest.mark.usefixtures("on_stand_in")
def test_what_cuda_takes_from_the_cpu_the_stand_in_takes_too():
    x = torch.arange(6.0).view(3, 2)
    assert x[[0, 2]].tolist() == x[torch.tensor([0, 2], device="cpu")].tolist() == [[0, 1], [4, 5]]
    x[[True, False, False]] = 7.0
    x[1] = torch.tensor(3.0, device="cpu")
    x[2].copy_(torch.ones(2, device="cpu"))
    assert x.tolist() == [[7, 7], [3, 3], [1, 1]]
    assert (x * torch.tensor(2.0, device="cpu")).sum().item() == 44
    assert not isinstance(x.cpu(), StandIn)
