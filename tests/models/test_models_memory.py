"""Dry runs: what a pass holds without weights, against passes of real models."""

import pytest
import torch
import transformers
from maxmin_kernels import token_log_probs
from maxmin_kernels.log_probs import chunked
from maxmin_kernels.log_probs.chunked import chunked_backward, chunked_forward
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from torchrl_maxmin.models.dry_run import Footprint, fake_copy, nbytes, shallow_depths, with_depth
from torchrl_maxmin.models.memory import Jobs, log_probs_of, states_of, without_weights
from torchrl_maxmin.models.rates import Rates
from torchrl_maxmin.models.sequences import backbone_of, hidden_states

PLAIN = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
GEMMA2 = {
    "num_hidden_layers": 8,
    "head_dim": 8,
    "sliding_window": 4,
    "layer_types": ["sliding_attention", "full_attention"] * 4,
}
CONFIGS = {
    "GPT-2": ("GPT2Config", {"vocab_size": 96, "n_embd": 32, "n_layer": 6, "n_head": 4, "n_positions": 64}),
    "Llama": ("LlamaConfig", PLAIN),
    "Llama, tied": ("LlamaConfig", {**PLAIN, "tie_word_embeddings": True}),
    "Qwen3": ("Qwen3Config", {**PLAIN, "head_dim": 8}),
    "Gemma2": ("Gemma2Config", {**PLAIN, **GEMMA2}),
}
ROWS, PROMPT, RESPONSE = 3, 5, 7


def config_of(name):
    kind, settings = CONFIGS[name]
    return getattr(transformers, kind)(**settings)


def trained(config):
    return without_weights(config).requires_grad_(True)


def loss(model):
    return log_probs_of(model, states_of(model, ROWS, PROMPT, RESPONSE)).sum()


@pytest.mark.parametrize("name", CONFIGS)
def test_parameters_are_those_of_the_real_model(name):
    config = config_of(name)
    real = transformers.AutoModelForCausalLM.from_config(config)
    with torch.device("meta"):
        shapes = without_weights(config)
    assert {n: p.shape for n, p in shapes.named_parameters()} == {
        n: p.shape for n, p in real.named_parameters()
    }
    assert nbytes(shapes) == nbytes(real)
    tied = real.get_output_embeddings().weight is real.get_input_embeddings().weight
    assert (shapes.get_output_embeddings().weight is shapes.get_input_embeddings().weight) == tied


def peaks_of(model, counted):
    """Bytes after a forward pass over ragged rows, and at the peaks of forward and backward."""
    tokens = torch.zeros(ROWS, 11, dtype=torch.int64)
    mask = torch.ones(ROWS, 11, dtype=torch.bool)
    mask[0, :2] = False
    with counted:
        states = hidden_states(backbone_of(model), tokens, mask)
        held, end = counted.live, len(counted.timeline)
        states.sum().backward()
    return held, counted.trace(end).peaks, counted.live


@pytest.mark.parametrize("name", CONFIGS)
def test_fake_tensors_hold_what_real_ones_do(name):
    config = config_of(name)
    real = peaks_of(transformers.AutoModelForCausalLM.from_config(config).eval(), Footprint())
    with torch.device("meta"):
        shapes = trained(config)
    with FakeTensorMode():
        fake = peaks_of(fake_copy(shapes), Footprint())
    assert fake == real
    assert real[0] > 0


def test_what_autograd_saves_is_what_a_forward_pass_leaves():
    """An oracle that counts otherwise: the storages that autograd packs, each once."""
    model = transformers.AutoModelForCausalLM.from_config(config_of("Llama")).eval()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved = {}

    def pack(tensor):
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    tokens = torch.zeros(ROWS, 11, dtype=torch.int64)
    mask = torch.ones(ROWS, 11, dtype=torch.bool)
    mask[0, :2] = False
    counted = Footprint()
    with counted, torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        states = hidden_states(backbone_of(model), tokens, mask)
        held = counted.live
    expected = sum(size for pointer, size in saved.items() if pointer not in own)
    # the tokens and masks that were made before, and the states themselves if nobody saved them
    slack = tokens.nbytes + states.nbytes
    assert abs(held - expected) <= slack
    assert held > 20 * slack


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("accumulate", [False, True])
def test_a_few_layers_tell_of_them_all(name, accumulate):
    jobs = Jobs(config_of(name), rates=Rates("nothing", {torch.float32: 1e9}, 1e9, 1e-6))
    assert jobs.depths is not None
    few = jobs.training([trained], [loss], accumulate=accumulate, reuse=True)
    few_scoring = jobs.scoring(without_weights, ROWS, PROMPT, RESPONSE, log_probs=True)
    few_step = jobs.step(without_weights, ROWS, PROMPT)
    jobs.depths = None
    every = jobs.training([trained], [loss], accumulate=accumulate, reuse=True)
    assert few.peak == every.peak
    assert few.seconds == pytest.approx(every.seconds)
    scoring = jobs.scoring(without_weights, ROWS, PROMPT, RESPONSE, log_probs=True)
    step = jobs.step(without_weights, ROWS, PROMPT)
    assert (few_scoring.peak, few_step.kept) == (scoring.peak, step.kept)
    assert few_step.peak == pytest.approx(step.peak, rel=0.05)


def test_depths_repeat_with_the_kinds_of_layers():
    with torch.device("meta"):
        assert shallow_depths(without_weights(config_of("Llama"))) == (2, 3)
        assert shallow_depths(without_weights(config_of("Gemma2"))) == (4, 6)
        assert shallow_depths(without_weights(with_depth(config_of("Llama"), 2))) is None
        odd = config_of("Gemma2")
        odd.layer_types = ["sliding_attention"] * 7 + ["full_attention"]
        assert shallow_depths(without_weights(odd)) is None


def test_a_cache_holds_keys_and_values_of_every_token():
    config = config_of("Llama")
    jobs = Jobs(config)
    token = 4 * 2 * config.num_hidden_layers * config.num_key_value_heads * (32 // 4)
    assert jobs.prefill(without_weights, ROWS, PROMPT).kept == ROWS * PROMPT * token
    assert jobs.step(without_weights, ROWS, PROMPT).kept == ROWS * (PROMPT + 1) * token


def test_a_window_bounds_the_cache():
    plain, local = Jobs(config_of("Llama")), Jobs(config_of("Gemma2"))
    grown = [
        jobs.step(without_weights, ROWS, 40).kept / jobs.step(without_weights, ROWS, 20).kept
        for jobs in (plain, local)
    ]
    assert grown[1] < grown[0]


@pytest.mark.parametrize("vocabulary", [1000, 40_000])
def test_logits_are_those_of_a_chunk(vocabulary):
    """The operator's own allocations on a CPU, by the profiler's memory events."""
    hidden, head = torch.randn(600, 16), torch.randn(vocabulary, 16)
    from maxmin_kernels import token_log_probs

    token_log_probs(hidden, head, torch.zeros(600, dtype=torch.int64))
    with torch.profiler.profile(profile_memory=True) as profile:
        token_log_probs(hidden, head, torch.zeros(600, dtype=torch.int64))
    largest = max(event.cpu_memory_usage for event in profile.events())
    counted = Footprint()
    with FakeTensorMode(), counted:
        fake = torch.empty(600, 16), torch.empty(vocabulary, 16), torch.zeros(600, dtype=torch.int64)
        token_log_probs(*fake)
    chunk = min(600, -(-600 // -(-600 // max(2**22 // vocabulary, 256))))
    assert counted.trace().logits == 4 * chunk * vocabulary
    assert largest >= counted.trace().logits


def test_products_take_their_arithmetic_and_copies_their_bytes():
    rates = Rates("nothing", {torch.float32: 1e6}, 1e12, 0.0)
    counted = Footprint(rates=rates)
    with FakeTensorMode(), counted:
        torch.empty(10, 20) @ torch.empty(20, 30)
    assert counted.seconds == pytest.approx(2 * 10 * 20 * 30 / 1e6)
    slow = Footprint(rates=Rates("nothing", {torch.float32: 1e15}, 100.0, 1.0))
    with FakeTensorMode():
        x = torch.empty(25)
        with slow:
            x.view(5, 5)
            x + 1.0
    assert slow.seconds == pytest.approx(1 + 1 + 2)


def test_gradients_that_are_there_count_once():
    """With old gradients or without, what is left at the end are the gradients, which are subtracted."""
    layers = [nn.Linear(8, 8, bias=False) for _ in range(2)]

    def run(reuse):
        class Tiny(Jobs):
            def __init__(self):
                self.config, self.device, self.rates, self.depths = None, "cpu", None, None

        def product(model):
            return model(torch.zeros(4, 8)).sum()

        return Tiny().training(
            [lambda config: nn.Sequential(*map(type(layers[0]), (8, 8), (8, 8)))],
            [product],
            accumulate=False,
            reuse=reuse,
        )

    assert run(True).peak - run(False).peak <= 2 * 8 * 8 * 4 + 2 * 8 * 4
    assert run(True).peak > run(False).peak


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_holds_what_is_counted_for_it(dtype, entropy, monkeypatch):
    """Real passes of the chunks, operation by operation, against the formula for the whole operator."""
    rows, width, vocabulary = 60, 16, 2000
    monkeypatch.setattr(chunked, "budget_elements", lambda device: 20 * vocabulary)
    monkeypatch.setattr(chunked, "_LEAST_ROWS", 1)
    hidden = torch.randn(rows, width).to(dtype).requires_grad_()
    head, targets = torch.randn(vocabulary, width).to(dtype), torch.zeros(rows, dtype=torch.int64)
    with Footprint() as forward:
        outputs = token_log_probs(hidden, head, targets, entropy=entropy)
    total = sum(x.sum() for x in outputs if x is not None)
    with Footprint() as backward:
        total.backward()
    with Footprint() as real_forward:
        _, entropies, logsumexp, kept = chunked_forward(
            hidden, head, targets, 1.0, entropy, 0, None, 1.0, None, not entropy
        )
    vectors = targets, entropies, logsumexp, kept, torch.ones(rows), torch.ones(rows) if entropy else None
    with Footprint() as real_backward:
        chunked_backward(hidden, head, *vectors, 1.0, 0, True, False, None, 1.0, None, False)
    for counted, real in ((forward, real_forward), (backward, real_backward)):
        assert real.trace().peak == pytest.approx(counted.trace().peak, rel=0.05)
