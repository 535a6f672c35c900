"""Tokens a second of the rollout engines on one model: generate of Hugging Face beside vLLM, weights pushed.

    python benchmarks/engines.py --model_name_or_path FOLDER --dtype bfloat16

needs vLLM (make test-vllm makes an environment). Each engine answers the same prompts, once to warm up, then
in turns; a rollout of vLLM has its push and its probe in it, which are timed by themselves too.
"""

import argparse
import json
import statistics
import time

import torch

from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts
from torchrl_maxmin.rollouts.engine import EnginePolicy
from torchrl_maxmin.rollouts.vllm import VLLMEngine
from torchrl_maxmin.world import sample_prompts


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--response_length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--vllm_gpu_memory_utilization", type=float, default=0.3)
    given = parser.parse_args()
    tokenizer = load_tokenizer(given.model_name_or_path)
    policy = TokenPolicy.from_pretrained(
        given.model_name_or_path,
        tokenizer,
        max_new_tokens=given.response_length,
        device=given.device,
        dtype=getattr(torch, given.dtype),
    )
    models = FullCopies(policy, tokenizer, 0)
    prompts = encode_prompts(tokenizer, sample_prompts(given.num_prompts, 0, heldout=False)).to(given.device)
    engine = VLLMEngine(
        models.policy,
        tokenizer,
        max_prompt_length=prompts["prompt_tokens"].shape[-1],
        max_num_seqs=given.num_prompts,
        gpu_memory_utilization=given.vllm_gpu_memory_utilization,
    )
    vllm = EnginePolicy(models, engine, prompts)
    samplers = {"generate": models.policy, "vllm": vllm, "push": lambda _: vllm.push()}
    seconds, tokens = {name: [] for name in samplers}, {name: [] for name in samplers}
    for turn in range(given.repeats + 1):
        for name, sampler in samplers.items():
            begun = time.perf_counter()
            batch = sampler(prompts.clone())
            if given.device == "cuda":
                torch.cuda.synchronize()
            if turn:
                seconds[name].append(time.perf_counter() - begun)
                tokens[name].append(0 if batch is None else int(batch["action_mask"].sum()))
    rate = {
        name: statistics.median(t / s for t, s in zip(tokens[name], seconds[name], strict=True))
        for name in ("generate", "vllm")
    }
    figures = {f"{name}_tokens_per_s": round(value, 1) for name, value in rate.items()}
    figures |= {"ratio": round(rate["vllm"] / rate["generate"], 3), "probe_gap": vllm.gap}
    figures["push_s"] = round(statistics.median(seconds["push"]), 3)
    print(json.dumps(vars(given) | figures))


if __name__ == "__main__":
    main()
