"""vLLM itself as the engine of rollouts; in an environment of its own, by `make test-vllm`."""

import os

import pytest
import torch
from engines import disturb, engine_parts

from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.models.lora import LoraSettings
from torchrl_maxmin.models.sequences import mask_after_eos
from torchrl_maxmin.models.shared import SharedTrunk
from torchrl_maxmin.rollouts.engine import EnginePolicy
from torchrl_maxmin.rollouts.vllm import VLLMEngine
from torchrl_maxmin.world import sample_prompts

pytest.importorskip("vllm", reason="vLLM has an environment of its own: make test-vllm")
pytestmark = pytest.mark.vllm
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; a fixed size also makes no trial run

FLOAT32 = 1e-3
FAR = 0.1
#: heads of 32, the least that vLLM has kernels for without a GPU
LLAMA = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "tie_word_embeddings": True,
}


@pytest.fixture(scope="module")
def folders(make_model, tokenizer, tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    ids = {name: getattr(tokenizer, name) for name in ("pad_token_id", "bos_token_id", "eos_token_id")}
    llama = str(tmp_path_factory.mktemp("models") / "llama")
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **LLAMA, **ids)).save_pretrained(llama)
    tokenizer.save_pretrained(llama)
    gpt2 = make_model("vllm", n_embd=64, n_positions=256, vocab_size=len(tokenizer))
    return {"gpt2": gpt2, "llama": llama}


def sampler_of(folder, tokenizer, networks=None, prompts=None, **options):
    networks = networks or (lambda policy: FullCopies(policy, tokenizer, 0))
    prompts = prompts or sample_prompts(16, 0, heldout=False)
    models, encoded = engine_parts(folder, tokenizer, networks, prompts, **options)
    shape = {name: options[name] for name in ("top_k", "top_p") if name in options}
    engine = VLLMEngine(
        models.policy,
        tokenizer,
        max_prompt_length=encoded["prompt_tokens"].shape[-1],
        gpu_memory_utilization=0.15,
        **shape,
    )
    return EnginePolicy(models, engine, encoded, seed=1), encoded


def apart(sampler, batch):
    """The largest and the mean distance of the engine's log-probabilities from the trainer's."""
    far = (sampler.models.log_prob(batch) - batch["sample_log_prob"])[batch["action_mask"]].abs()
    return float(far.max()), float(far.mean())


@pytest.fixture(scope="module")
def llama(folders, tokenizer):
    long = " ".join(sample_prompts(60, 1, heldout=False))  # more than a block of the cache of prompts
    return sampler_of(folders["llama"], tokenizer, prompts=[long, *sample_prompts(7, 0, heldout=False)])


def test_a_tied_model_is_the_trainers_after_a_push_and_not_before(llama):
    sampler, prompts = llama
    before = torch.get_rng_state()
    batch = sampler(prompts.clone())
    assert torch.equal(torch.get_rng_state(), before)
    assert int(prompts["prompt_mask"].sum(-1).max()) > 128
    assert apart(sampler, batch)[0] < FLOAT32
    ends = sampler.models.policy.ends
    assert torch.equal(batch["action_mask"], mask_after_eos(batch["action"], ends) & batch["action_mask"])
    disturb(sampler.models.parameters()["policy"])
    assert sampler.measure_gap() > FAR
    sampler.push()
    assert sampler.gap < FLOAT32
    assert apart(sampler, sampler(prompts.clone()))[0] < FLOAT32


def test_what_is_left_out_of_a_push_shows(llama):
    """vLLM's own reload leaves a packed output layer, and cached prompts, as the weights before made them."""
    sampler, prompts = llama
    engine = sampler.engine
    sampler(prompts.clone())
    disturb(sampler.models.parameters()["policy"])
    weights = list(sampler.models.policy_weights().items())
    engine.llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights)})
    if next(sampler.models.policy.parameters()).is_cpu:
        assert sampler.measure_gap() > FAR
    engine.llm.collective_rpc("load_policy", args=(weights,))
    assert sampler.measure_gap() < FLOAT32
    row = prompts["prompt_tokens"][0][prompts["prompt_mask"][0]].tolist()
    (stale,) = engine.generate([row], [5])
    assert engine.llm.reset_prefix_cache()
    (fresh,) = engine.generate([row], [5])
    assert abs(stale.log_probs[0] - fresh.log_probs[0]) > 1e-2 or stale.tokens[0] != fresh.tokens[0]


def test_rows_have_seeds_of_their_own(llama):
    sampler, prompts = llama
    row = prompts["prompt_tokens"][1][prompts["prompt_mask"][1]].tolist()
    first, second, third = (
        sampler.engine.generate([row] * 3, seeds) for seeds in ([1, 2, 1], [1, 3, 4], [9, 9, 9])
    )
    assert first[0].tokens == first[2].tokens == second[0].tokens
    assert len({tuple(sample.tokens) for sample in (*first, *second)}) > 2
    assert third[0].tokens == third[1].tokens == third[2].tokens


def test_stop_strings_and_truncation_are_those_of_the_policy(folders, tokenizer):
    word = tokenizer.decode([20])
    sampler, prompts = sampler_of(
        folders["gpt2"], tokenizer, stop_strings=[word, "."], top_k=8, top_p=0.9, temperature=0.7
    )
    batch = sampler(prompts.clone())
    mask, policy = batch["action_mask"], sampler.models.policy
    assert torch.equal(mask, mask_after_eos(batch["action"], policy.ends))
    tokens = torch.cat([batch["prompt_tokens"], batch["action"]], -1)
    real = torch.cat([batch["prompt_mask"], mask], -1)
    with torch.no_grad():
        positions = (real.long().cumsum(-1) - 1).clamp(min=0)
        logits = policy.model(tokens, attention_mask=real.long(), position_ids=positions).logits
    scores = logits[:, prompts["prompt_tokens"].shape[-1] - 1 : -1].flatten(0, 1) / policy.temperature
    for warper in policy.warpers:
        scores = warper(None, scores)
    expected = scores.log_softmax(-1).gather(-1, batch["action"].flatten()[:, None]).view_as(mask)
    torch.testing.assert_close(batch["sample_log_prob"][mask], expected[mask], atol=FLOAT32, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_adapters_are_pushed_as_weights(folders, tokenizer, dtype):
    lora = LoraSettings(r=4, target_modules="all-linear")
    sampler, prompts = sampler_of(
        folders["llama"], tokenizer, lambda policy: SharedTrunk(policy, tokenizer, 0, lora=lora), dtype=dtype
    )
    disturb(sampler.models.parameters()["policy"], 0.2)
    assert sampler.measure_gap() > 2 * 0.2
    sampler.push()
    largest, mean = apart(sampler, sampler(prompts.clone()))
    if dtype == torch.float32:
        assert largest < FLOAT32
    else:
        assert mean < 0.2  # single tokens are off by more


def test_an_engine_that_is_collected_late_takes_nothing_along(folders, tokenizer):
    first, _ = sampler_of(folders["gpt2"], tokenizer)
    second, prompts = sampler_of(folders["gpt2"], tokenizer)
    first.engine.llm.llm_engine.engine_core.shutdown()  # as when it is collected
    assert apart(second, second(prompts.clone()))[0] < FLOAT32
