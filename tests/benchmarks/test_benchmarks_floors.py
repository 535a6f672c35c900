"""The floors against numbers by hand, and against the tensors and products that they describe."""

import pytest
import torch
from kernel_bench import floors
from kernel_bench.workloads import GAE, EStep, Heads, LogProbs, TokenGAE
from torch.utils.flop_counter import FlopCounterMode


def test_em_by_hand():
    # 3 pairs, 2 groups, 2 users, bfloat16: scores 2 * 3 * 2 * 2 = 24, offsets 24, prior 8, results 16 + 8.
    assert floors.em("forward", 3, 2, 2, 2).bytes == 24 + 24 + 8 + 24
    assert floors.em("backward", 3, 2, 2, 2).bytes == 24 + 24 + 24
    assert floors.em("both", 3, 2, 2, 2).bytes == 80 + 72
    # A million pairs of four groups, a hundred a user: 32 MB of scores and 0.28 MB of the rest.
    assert floors.em("forward", 10**6, 4, 10**4, 4).bytes == 32_000_000 + 80_008 + 16 + 200_000


def test_heads_by_hand():
    # 2 rows of width 3, 4 heads, float32: hidden 24, weight 48, bias 16, rewards 32, three results 32.
    assert floors.heads("forward", 2, 3, 4, 4) == (24 + 48 + 16 + 32 + 32, 48)
    assert floors.heads("backward", 2, 3, 4, 4) == (2 * (24 + 48) + 16 + 24, 96)


def test_gae_by_hand():
    # 2 rows of 3 steps and 4 columns, float32: 24 elements five times, and two flags for 6 steps.
    assert floors.gae("forward", 2, 3, 4, 4).bytes == 5 * 96 + 12


def test_token_gae_by_hand():
    # 2 responses of 3 tokens, one group and the penalty, float32. Read: rewards 8, values 48, mask 6, two
    # log-probabilities 48, a weight 4. Written: 2 * 48, the weighted sum 24, three moments 12.
    assert floors.token_gae("forward", 2, 3, 1, 4).bytes == 8 + 48 + 6 + 48 + 4 + 96 + 24 + 12


def test_log_probs_by_hand():
    # 2 tokens of width 3 over 5 words, bfloat16: hidden 12, lm_head 30, targets 16, results 8.
    assert floors.log_probs("forward", 2, 3, 5, 2) == (12 + 30 + 16 + 8, 60)
    assert floors.log_probs("both", 2, 3, 5, 2) == (66 + 2 * 42 + 16 + 8, 180)


@pytest.mark.parametrize(
    ("workload", "read"),
    [
        (EStep(1000, 3, torch.bfloat16, skew=0.1), ("chosen", "rejected", "user_offsets", "log_prior")),
        (Heads(20, 16, 5), ("hidden", "weight", "bias")),
        (GAE(3, 7, 2), ("reward", "value", "next_value", "done", "terminated")),
        (
            TokenGAE(3, 7, 2, torch.bfloat16),
            ("terminal_reward", "value", "mask", "sample_log_prob", "ref_log_prob", "group_weights"),
        ),
        (LogProbs(9, 8, 50, torch.bfloat16), ("hidden", "lm_head", "targets")),
    ],
    ids=lambda x: getattr(x, "op", ""),
)
def test_the_forward_floor_is_the_size_of_inputs_and_outputs(workload, read):
    inputs = workload.make("cpu")
    outputs = workload.implementations()[0].call(inputs)
    tensors = [*(inputs[name] for name in read), *outputs]
    assert workload.floor("forward").bytes == sum(x.nbytes for x in tensors)


@pytest.mark.parametrize("workload", [Heads(20, 16, 5), LogProbs(9, 8, 50)], ids=lambda w: w.op)
def test_the_floor_counts_the_products_of_eager_pytorch(workload):
    inputs = workload.make("cpu")
    eager = workload.implementations()[1]
    assert eager.name == "eager"
    with FlopCounterMode(display=False) as forward:
        output = eager.call(inputs)[workload.loss_output]
    with FlopCounterMode(display=False) as backward:
        output.sum().backward()
    assert workload.floor("forward").flops == forward.get_total_flops()
    assert workload.floor("backward").flops == backward.get_total_flops()


def test_users_of_a_skewed_workload():
    offsets = EStep(1000, 2, skew=0.1, mean=50).offsets()
    assert offsets[:3].tolist() == [0, 100, 150]
    assert offsets[-1] == 1000
    assert len(offsets) == EStep(1000, 2, skew=0.1, mean=50).users + 1
    ragged = EStep(1030, 2, mean=100)
    assert len(ragged.offsets()) == ragged.users + 1 == 12
    assert ragged.offsets().diff().tolist() == [100] * 10 + [30]
