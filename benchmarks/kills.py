"""Kill runs at random moments, finish each by the command that the program prints, and compare the bytes.

    python benchmarks/kills.py                                   # 40 kills of every verb: an hour or two
    python benchmarks/kills.py --verbs sft ppo --kills 5 --output FILE

Every run is of a tiny model in a process of its own, killed (SIGKILL, workers and all) after a random share
of the time that a whole run takes. Then it is started again as before; what it prints is followed, once. All
files that it leaves are compared with those of the run that was never killed, but for those that hold the
clock. A run that differs, or does not end, is a miss; a miss is exit status 1.
"""

import argparse
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from facts import child_environment, facts, results_file, write

#: flags of a small run of every verb, and files that it reads
SMALL: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 40, "save_steps": 5, "dataset_name": "pairs.jsonl"},
    "reward": {
        "num_rounds": 3, "steps_per_round": 15, "save_rounds": 1, "identifiability": "false", "num_groups": 2,
        "calibration_prompts": 8, "response_length": 8, "convergence_tolerance": 0,
        "dataset_name": "pairs.jsonl", "feature_cache": "false",
    },
    "ppo": {
        "num_iterations": 12, "save_steps": 2, "rollout_batch_size": 16, "response_length": 8,
        "calibration_prompts": 16, "dataset_name": "prompts.jsonl", "reward_funcs": "world.json",
    },
    "environment": {
        "env_id": "gridworld", "num_envs": 8, "frames_per_batch": 96, "total_frames": 1920, "save_steps": 4,
        "eval_episodes": 64,
    },
    "evaluate": {
        "policies": "[sft=model, maxmin=other]", "dataset_name": "prompts.jsonl", "judge": "world.json",
        "response_length": 12, "num_samples": 8, "dataset_split": "train",
    },
    "demo": {
        "recipe": "recipe.yaml", "num_users": 24, "pairs_per_user": 6, "num_groups": 2, "num_workers": 2,
    },
}  # fmt: skip
PREPARE = """
import json, random, sys, torch
from transformers import GPT2Config, GPT2LMHeadModel
from torchrl_maxmin.world import World, build_tokenizer
tokenizer = build_tokenizer()
ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
config = GPT2Config(
    vocab_size=len(tokenizer), n_positions=64, n_layer=2, n_embd=32, n_head=2,
    resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, **ids,
)
for seed, name in enumerate(("model", "other")):
    torch.manual_seed(seed)
    GPT2LMHeadModel(config).save_pretrained(name)
    tokenizer.save_pretrained(name)
World.preset("10:1").save("world.json")
words = ["the film", "a story", "this movie", "the plot", "an actor", "the music"]
ends = [" was great .", " was dull .", " is long .", " is short .", " felt warm ."]
draw = random.Random(0)
with open("prompts.jsonl", "w") as file:
    for word in words:
        file.write(json.dumps({"prompt": word}) + "\\n")
with open("pairs.jsonl", "w") as file:
    for user in range(12):
        for _ in range(8):
            chosen, rejected = draw.sample(ends, 2)
            row = {"prompt": draw.choice(words), "chosen": chosen, "rejected": rejected}
            file.write(json.dumps(row | {"user_id": f"u{user}"}) + "\\n")
"""
RECIPE = """
world: {num_texts: 600, num_prompts: 120, num_test_prompts: 12, test_pairs_per_user: 2}
sft: {max_steps: 20, per_device_train_batch_size: 32, warmup_steps: 2}
reward: {num_rounds: 2, steps_per_round: 4, per_device_train_batch_size: 32, num_restarts: 2}
ppo: {num_iterations: 2, rollout_batch_size: 16, mini_batch_size: 8, calibration_prompts: 16}
evaluate: {num_samples: 2, certificate_prompts: 4, certificate_samples: 16}
"""
CLOCK = {"wall_seconds", "frames_per_second", "seconds", "timings"}
#: name their folder, or say when they were written, or show seconds
APART = {"config.yaml", "run.json", "manifest.json", "report.md", "recipe.yaml", "kept.json"}
SECONDS = 900


def words_of(verb: str, folder: str) -> list[str]:
    """The command of a small run."""
    flags = {"output_dir": folder, "device": "cpu", **SMALL[verb]}
    if verb in ("sft", "reward", "ppo"):
        flags["model_name_or_path"] = "model"
    word = "ppo" if verb == "environment" else verb
    return [word, *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]


def start(words: list[str], place: Path) -> subprocess.Popen[str]:
    """Begin a run in a session of its own."""
    command = [sys.executable, "-m", "torchrl_maxmin", *words]
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = child_environment(threads=1)
    return subprocess.Popen(command, cwd=place, env=environment, start_new_session=True, **pipes)


def left(folder: Path) -> dict[str, Any]:
    """What a run leaves, but for the clock and names of its own folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or path.name in APART or any(part.startswith(".") for part in name.parts):
            continue
        content: Any = path.read_bytes().replace(str(folder.name).encode(), b"FOLDER")
        if path.suffix == ".json":
            content = _without_clock(json.loads(content))
        found[str(name)] = content
    return found


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(part) for key, part in value.items() if key not in CLOCK}
    return [_without_clock(part) for part in value] if isinstance(value, list) else value


def kill_and_finish(verb: str, seconds: float, number: int, place: Path, expected: dict[str, Any]) -> dict:
    """Kill one run after so many seconds, finish it, compare it."""
    words = words_of(verb, f"{verb}-{number:03}")
    run = start(words, place)
    time.sleep(seconds)
    ended = run.poll() is not None
    os.killpg(run.pid, signal.SIGKILL)
    run.communicate()
    again = start(words, place)
    _, errors = again.communicate(timeout=SECONDS)
    printed = "go on with: torchrl-maxmin " in errors
    if printed:
        command = shlex.split(errors.partition("go on with: torchrl-maxmin ")[2].splitlines()[0])
        again = start(command, place)
        _, errors = again.communicate(timeout=SECONDS)
    found = left(place / f"{verb}-{number:03}")
    other = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
    done = again.returncode == 0 or "holds a finished run" in errors  # it was, before its process was gone
    return {
        "seconds": seconds, "ended": ended, "printed": printed, "finished": done, "differs": other,
        "says": "" if done else errors[-500:],
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbs", nargs="+", choices=list(SMALL), default=list(SMALL))
    parser.add_argument("--kills", type=int, default=40, help="of every verb")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/kills.json")
    given = parser.parse_args()
    output = given.output or results_file("kills.json")
    results: dict[str, Any] = json.loads(output.read_text())["results"] if output.is_file() else {}
    draw, missed = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        prepare = [sys.executable, "-c", PREPARE]
        subprocess.run(prepare, cwd=place, env=child_environment(threads=1), check=True, capture_output=True)
        (place / "recipe.yaml").write_text(RECIPE)
        for verb in given.verbs:
            began = time.perf_counter()
            whole = start(words_of(verb, f"{verb}-all"), place)
            _, errors = whole.communicate(timeout=SECONDS)
            if whole.returncode:
                raise RuntimeError(errors[-3000:])
            took, expected = time.perf_counter() - began, left(place / f"{verb}-all")
            rows = []
            for number in range(given.kills):
                seconds = took * (0.1 + 0.95 * draw.random())
                rows.append(kill_and_finish(verb, seconds, number, place, expected))
                bad = [row for row in rows if row["differs"] or not row["finished"]]
                print(f"{verb}: {number + 1} kills, {len(bad)} missed", end="\r", flush=True)
            missed += len(bad)
            alive = sum(not row["ended"] for row in rows)
            print(f"{verb}: {len(rows)} kills, {alive} before the end of {took:.1f} s, {len(bad)} missed")
            results[verb] = {"seconds": took, "kills": len(rows), "missed": bad, "rows": rows}
            write(output, {"environment": facts(threads=1), "results": results})
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
