"""What operations take at given rates, and rates as they are measured."""

import json
import math

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchrl_maxmin.core.allocator import USUAL
from torchrl_maxmin.models.decoding import LARGE_VOCABULARY
from torchrl_maxmin.models.dry_run import Footprint
from torchrl_maxmin.models.memory import Jobs
from torchrl_maxmin.models.rates import Rates, measure_rates


def free(**figures):
    """Rates at which all else costs nothing."""
    given = {"device": "none", "flops": {torch.float32: math.inf}, "bandwidth": math.inf, "op_seconds": 0.0}
    return Rates(**(given | figures))


def seconds_of(rates, function):
    with FakeTensorMode(), Footprint(rates=rates) as counted:
        function()
    return counted.seconds


def test_a_product_reads_its_factors_beside_its_arithmetic():
    rates = free(flops={torch.float32: 1e6}, product_bandwidth={torch.float32: 1e4})
    found = seconds_of(rates, lambda: torch.empty(10, 20) @ torch.empty(20, 30))
    assert found == pytest.approx(2 * 10 * 20 * 30 / 1e6 + 4 * (10 * 20 + 20 * 30) / 1e4)


def test_reading_is_slower_the_more_is_held():
    rates = free(bandwidth=100.0, near={1000: 400.0, 2000: 200.0})
    assert [rates.copy_seconds(400, held) for held in (10, 1000, 1001, 2001)] == [1.0, 1.0, 2.0, 4.0]


def test_an_embedding_reads_the_rows_that_it_gives_and_no_more():
    rates = free(bandwidth=1.0)

    def look_up():
        nn.functional.embedding(torch.empty(3, dtype=torch.int64), torch.empty(1000, 7))

    made = 4 * 7000 + 8 * 3  # written when they are made
    assert seconds_of(rates, look_up) == pytest.approx(made + 8 * 3 + 2 * 4 * 3 * 7)


def test_attention_takes_time_by_the_head_and_by_arithmetic():
    rates = free(attention_flops=1e3, head_seconds=2.0)
    states = (2, 3, 5, 7)

    def attend():
        nn.functional.scaled_dot_product_attention(*(torch.empty(states) for _ in range(3)))

    assert seconds_of(rates, attend) == pytest.approx(2 * 3 * 2.0 + 4 * 2 * 3 * 5 * 5 * 7 / 1e3)


@pytest.mark.parametrize("given", [False, True])
def test_a_token_is_drawn_from_the_whole_vocabulary_unless_by_given_numbers(given):
    from transformers import GPT2Config

    config = GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=1)
    jobs = Jobs(config, rates=free(draw_seconds=1.0, token_seconds=0.5))
    assert jobs.drawing(4, 50, 1.0, given=given) == 0.5 + (0 if given else 4 * 50)
    assert jobs.drawing(4, LARGE_VOCABULARY, 1.0, given=given) == 0.5
    busy = Jobs(config, rates=free(bandwidth=1.0))
    assert busy.drawing(4, 80_000, 1.0, given=given) > 1.8 * busy.drawing(4, 40_000, 1.0, given=given)


def test_fresh_pages_and_backward_passes_have_their_own_time():
    weight = USUAL // 4
    paged = free(page_seconds=1.0)
    assert seconds_of(paged, lambda: torch.empty(weight)) == USUAL
    assert seconds_of(paged, lambda: torch.empty(weight - 1)) == 0
    with FakeTensorMode():
        x = torch.ones(3, requires_grad=True)
        with Footprint(rates=free(op_seconds=1.0, backward_op_seconds=1000.0)) as counted:
            y = (x * x).sum()
            forward = counted.seconds
            y.backward()
    assert 2 <= forward < 1000 <= counted.seconds


def test_rates_are_measured_and_written():
    rates = measure_rates(torch.device("cpu"), (torch.float32,))
    figures = rates.to_dict()
    assert Rates.from_dict(json.loads(json.dumps(figures))) == rates
    for value in (rates.bandwidth, rates.op_seconds, rates.draw_seconds, rates.head_seconds):
        assert 0 < value < math.inf
    # an operation of a transformer is more than its call
    assert rates.op_seconds > 1e-6
    assert rates.product_bandwidth.keys() == rates.flops.keys()
