"""The time of an iteration that `torchrl-maxmin plan` foretells, beside what a run of the same flags takes.

    python benchmarks/plan_time.py --model_name_or_path runs/smollm2             # every size, minutes each
    python benchmarks/plan_time.py --model_name_or_path runs/smollm2 --only small medium --ranks 1

Two GPT-2 of random weights, trained whole with a reward model, and the model that is given, trained by
adapters with rewards by functions; each in one process and in two, of one thread each. A run's figure is the
median of its iterations after the first, by the clock: nothing else should run beside it, and a plan is made
just before its run. The bar: within 25%. Results that are there stay, but for those of the same size and
ranks. A miss is exit status 1.
"""

import argparse
import json
import socket
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from facts import CONTESTANTS, ROOT, child_environment, facts, results_file, words, write, write_prompts
from plan import LORA, tokens_of

BAR = 0.25
PHASES = ("generate", "score", "update")
#: layers and width of the GPT-2s: 3 and 20 million parameters
SHAPES = {"small": (6, 192), "medium": (11, 384)}
SIZES: dict[str, dict[str, Any]] = {
    "small": {"rollout_batch_size": 64, "mini_batch_size": 32, "num_ppo_epochs": 2},
    "medium": {"rollout_batch_size": 32, "mini_batch_size": 16, "num_ppo_epochs": 1},
    "large": {**LORA, "rollout_batch_size": 16, "mini_batch_size": 8, "num_ppo_epochs": 1},
}
PREPARE = """
import sys
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.world import build_tokenizer
layers, width, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
tokenizer = build_tokenizer()
ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
config = GPT2Config(
    vocab_size=len(tokenizer), n_positions=64, n_layer=layers, n_embd=width, n_head=width // 64,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids,
)
torch.manual_seed(0)
GPT2LMHeadModel(config).save_pretrained(f"{folder}/model")
tokenizer.save_pretrained(f"{folder}/model")
RewardMixture.from_causal_lm(f"{folder}/model", 2).save_pretrained(f"{folder}/reward")
"""


def settings_of(size: str, model: str, folder: Path) -> dict[str, Any]:
    """Settings that plan and run share; models and prompts are written."""
    write_prompts(folder / "prompts.jsonl")
    common: dict[str, Any] = {"response_length": 24, "calibration_prompts": 8, "device": "cpu", **SIZES[size]}
    if size in SHAPES:
        call([sys.executable, "-c", PREPARE, *map(str, SHAPES[size]), str(folder)])
        model, common["reward_model_path"] = str(folder / "model"), str(folder / "reward")
    else:
        common["reward_funcs"] = ["race_rewards:short", "race_rewards:vowels"]
    longest = tokens_of(folder / "prompts.jsonl", model)
    return {"model_name_or_path": model, "max_prompt_length": longest, **common}


def free_port() -> int:
    """A port that nobody listens at."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def call(command: list[str], **variables: str) -> None:
    """Run a command, with one thread and further variables of its environment.

    Raises:
        RuntimeError: with the end of its output, where it fails.
    """
    environment = child_environment(threads=1, **variables)
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-3000:])


def planned(settings: dict[str, Any], ranks: int, folder: Path) -> dict[str, Any]:
    """What a plan says."""
    flags = words(settings | {"num_groups": 2, "gpus": ranks, "output_dir": folder})
    call([sys.executable, "-m", "torchrl_maxmin", "plan", *flags])
    return json.loads((folder / "summary.json").read_text())


def measured(settings: dict[str, Any], ranks: int, folder: Path, iterations: int) -> list[dict[str, Any]]:
    """Seconds of the iterations of a run, by phase and in all, after the first."""
    more = {
        "dataset_name": str(folder.parent / "prompts.jsonl"),
        "output_dir": str(folder),
        "num_iterations": iterations + 1,
        "distributed": "none" if ranks == 1 else "ddp",
    }
    found = folder.with_suffix(".json")
    command = [sys.executable, str(CONTESTANTS / "timed_ppo.py"), json.dumps(settings | more), str(found)]
    meeting = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    # what torchrun does; its own processes would be a session each, which the system schedules apart
    with ThreadPoolExecutor(ranks) as together:
        starts = [
            together.submit(call, command, **({"RANK": str(rank)} | meeting if ranks > 1 else {}))
            for rank in range(ranks)
        ]
        for start in starts:
            start.result()
    return json.loads(found.read_text())


def compare(size: str, ranks: int, given: argparse.Namespace) -> dict[str, Any]:
    """Plan one size and run it."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        settings = settings_of(size, str(Path(given.model_name_or_path).resolve()), folder)
        plan = planned(settings, ranks, folder / "plan")
        rows = measured(settings, ranks, folder / "run", given.iterations)
    foretold = {phase: plan["phases"][phase]["seconds"] for phase in PHASES}
    took = {p: statistics.median(row[p]["wall"] for row in rows) for p in (*PHASES, "all")}
    foretold["all"] = sum(foretold.values())
    return {
        "size": size,
        "ranks": ranks,
        "settings": {name: value for name, value in settings.items() if not str(value).startswith("/")},
        "parameters": plan["parameters"],
        "planned_seconds": foretold,
        "measured_seconds": took,
        "iterations": rows,
        "difference": foretold["all"] / took["all"] - 1,
        "rates": plan["rates"],
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model_name_or_path", required=True, help="of the largest size")
    parser.add_argument("--only", nargs="+", choices=list(SIZES), default=list(SIZES), help="sizes")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--iterations", type=int, default=3, help="that are timed")
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/plan_time.json")
    given = parser.parse_args()
    output = given.output or results_file("plan_time.json")
    results: list[dict[str, Any]] = json.loads(output.read_text())["results"] if output.is_file() else []
    for size in given.only:
        for ranks in given.ranks:
            result = compare(size, ranks, given)
            results = [r for r in results if (r["size"], r["ranks"]) != (size, ranks)] + [result]
            both = [
                f"{p} {result['planned_seconds'][p]:.2f} / {result['measured_seconds'][p]:.2f} s"
                for p in (*PHASES, "all")
            ]
            where = f"{size}, {ranks} rank(s)"
            print(f"{where:<18} {', '.join(both)}: {result['difference']:+.1%}", flush=True)
            write(output, {"environment": facts(threads=1), "bar": BAR, "results": results})
    missed = [r for r in results if abs(r["difference"]) > BAR]
    print(f"the bar is missed by {len(missed)} of {len(results)}" if missed else "all are within the bar")
    return int(bool(missed))


if __name__ == "__main__":
    sys.exit(main())
