"""Kill runs at random and at chosen moments, finish each by the command that is printed, compare the bytes.

    python benchmarks/kills.py                        # 40 random and 20 chosen kills of every verb: an hour
    python benchmarks/kills.py --verbs sft ppo --kills 5 --chosen 5 --output FILE

Every run is of a tiny model in a process of its own, killed (SIGKILL, workers and all) after a random share
of the time that a whole run takes, or at one of its writes to the disk: half way in a file of tensors, before
an fsync, before a rename; of a demo, whose processes write on their own, when one more file is there. Then it
is started again as before; what it prints is followed, once. All files that it leaves are compared with those
of the run that was never killed, but for those that hold the clock. A run that differs, or does not end, is a
miss; a miss is exit status 1. Processes are forked from one that has imported the libraries.
"""

import argparse
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from facts import child_environment, facts, results_file, write

#: what every run imports, before it is forked
LIBRARIES = [
    "transformers", "peft", "datasets", "matplotlib.pyplot", "torchrl_maxmin.cli.main",
    "torchrl_maxmin.cli.demo", "torchrl_maxmin.trainers.sft", "torchrl_maxmin.trainers.reward",
    "torchrl_maxmin.trainers.lm_ppo", "torchrl_maxmin.trainers.env_ppo", "torchrl_maxmin.evaluation.measure",
]  # fmt: skip
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
        "calibration_prompts": 16, "calibration": "sft_mean", "dataset_name": "prompts.jsonl",
        "reward_funcs": "world.json",
    },
    "environment": {
        "env_id": "gridworld", "num_envs": 8, "frames_per_batch": 96, "total_frames": 1920, "save_steps": 4,
        "eval_episodes": 64,
    },
    "evaluate": {
        "policies": "[sft=model, maxmin=other, third=third, fourth=fourth, fifth=fifth, sixth=sixth]",
        "dataset_name": "prompts.jsonl", "judge": "world.json",
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
for seed, name in enumerate(("model", "other", "third", "fourth", "fifth", "sixth")):
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
APART = {"config.yaml", "run.json", "manifest.json", "report.md", "report.html", "recipe.yaml", "kept.json"}
SECONDS = 900


def words_of(verb: str, folder: str) -> list[str]:
    """The command of a small run."""
    flags = {"output_dir": folder, "device": "cpu", **SMALL[verb]}
    if verb in ("sft", "reward", "ppo"):
        flags["model_name_or_path"] = "model"
    word = "ppo" if verb == "environment" else verb
    return [word, *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]


def start(words: list[str], place: Path, log: str, moment: int = 0) -> BaseProcess:
    """Begin a run in a process and session of its own; what it says goes to a file."""
    process = multiprocessing.get_context("forkserver").Process(target=run, args=(words, place, log, moment))
    process.start()
    return process


def run(words: list[str], place: Path, log: str, moment: int) -> None:
    """Be a run of one thread: dead at its ``moment``-th write, if that is not 0, or it counts them."""
    import torch

    from torchrl_maxmin.cli.main import main

    os.setsid()
    os.chdir(place)
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    writes = die_at_write(moment)
    status = main(words)
    Path(f"{log}.writes").write_text(str(writes[0]))
    sys.exit(status)


def die_at_write(moment: int) -> list[int]:
    """Count the writes to the disk; the process is gone at the ``moment``-th of them."""
    import safetensors.torch

    count = [0]

    def counted(
        function: Callable[..., Any], half: Callable[..., Any] = lambda *_: None
    ) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            count[0] += 1
            if count[0] == moment:
                half(*arguments)
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*arguments, **options)

        return call

    def half_a_file(tensors: Any, path: str, *_: Any) -> None:
        Path(path).write_bytes(b"\x10\x00\x00\x00")

    safetensors.torch.save_file = counted(safetensors.torch.save_file, half_a_file)
    os.replace, os.fsync, os.rename = counted(os.replace), counted(os.fsync), counted(os.rename)
    return count


def left(folder: Path) -> dict[str, Any]:
    """What a run leaves, but for the clock and names of its own folder."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if not path.is_file() or path.name in APART or any(part.startswith(".") for part in name.parts):
            continue
        content: Any = path.read_bytes().replace(str(folder.name).encode(), b"FOLDER")
        if path.name.startswith("samples-"):  # named after what was asked for, folders and all
            content = _tensors(path)
            name = name.with_name(f"samples-{hashlib.sha256(content).hexdigest()[:16]}")
        if path.suffix == ".json":
            with contextlib.suppress(ValueError):  # a damaged one is bytes
                content = _without_clock(json.loads(content))
        found[str(name)] = content
    return found


def _tensors(path: Path) -> bytes:
    """The tensors of a file without its metadata; a damaged one as it is."""
    content = path.read_bytes()
    with contextlib.suppress(ValueError, KeyError):
        size = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + size])
        header.pop("__metadata__", None)
        return json.dumps(header, sort_keys=True).encode() + content[8 + size :]
    return content


def _without_clock(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_clock(part) for key, part in value.items() if key not in CLOCK}
    return [_without_clock(part) for part in value] if isinstance(value, list) else value


def wait_for_files(folder: Path, number: int, process: BaseProcess) -> None:
    """Wait until a run has so many files, or has ended."""
    while process.is_alive() and sum(path.is_file() for path in folder.rglob("*")) < number:
        time.sleep(0.005)


def kill_and_finish(
    verb: str, kill: Callable[[list[str], str], BaseProcess], name: str, place: Path, expected: dict[str, Any]
) -> dict[str, Any]:
    """Kill one run, finish it, compare it."""
    words = words_of(verb, name)
    process = kill(words, f"{name}.log")
    ended = not process.is_alive() and process.exitcode is not None and process.exitcode >= 0
    if process.is_alive():
        try:
            os.killpg(process.pid or 0, signal.SIGKILL)
        except ProcessLookupError:  # it has no session of its own yet
            process.kill()
    process.join()
    again, log = start(words, place, f"{name}-again.log"), place / f"{name}-again.log"
    again.join(SECONDS)
    said = log.read_text()
    printed = "go on with: torchrl-maxmin " in said
    if printed:
        command = shlex.split(said.partition("go on with: torchrl-maxmin ")[2].splitlines()[0])
        again = start(command, place, f"{name}-on.log")
        again.join(SECONDS)
        said = (place / f"{name}-on.log").read_text()
    found = left(place / name)
    other = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    done = again.exitcode == 0 or "holds a finished run" in said  # it was, before its process was gone
    return {
        "run": name, "ended": ended, "printed": printed, "finished": done, "differs": other,
        "says": "" if done else said[-500:],
    }  # fmt: skip


def kills_of(
    verb: str, place: Path, took: float, expected: dict[str, Any], kills: int, chosen: int, seed: int
) -> list[tuple[str, Callable[[list[str], str], BaseProcess]]]:
    """The names of runs, and what starts each and returns when it is to be dead."""
    draw, found = random.Random(f"{verb} {seed}"), []

    def after(seconds: float) -> Callable[[list[str], str], BaseProcess]:
        def kill(words: list[str], log: str) -> BaseProcess:
            process = start(words, place, log)
            process.join(seconds)
            return process

        return kill

    def at(moment: int) -> Callable[[list[str], str], BaseProcess]:
        def kill(words: list[str], log: str) -> BaseProcess:
            process = start(words, place, log, 0 if verb == "demo" else moment)
            if verb == "demo":
                wait_for_files(place / words[words.index("--output_dir") + 1], moment, process)
            else:
                process.join(SECONDS)
            return process

        return kill

    for number in range(kills):
        found.append((f"{verb}-random-{number:02}", after(took * (0.02 + 1.0 * draw.random()))))
    last = len(expected) if verb == "demo" else int((place / f"{verb}-all.log.writes").read_text())
    moments = sorted(draw.sample(range(1, last + 1), min(chosen, last)))
    return [*found, *((f"{verb}-chosen-{moment:03}", at(moment)) for moment in moments)]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbs", nargs="+", choices=list(SMALL), default=list(SMALL))
    parser.add_argument("--kills", type=int, default=40, help="of every verb, at random moments")
    parser.add_argument("--chosen", type=int, default=20, help="of every verb, at writes to the disk")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/kills.json")
    given = parser.parse_args()
    output = given.output or results_file("kills.json")
    results: dict[str, Any] = json.loads(output.read_text())["results"] if output.is_file() else {}
    os.environ.update(child_environment(threads=1))
    multiprocessing.set_forkserver_preload(LIBRARIES)
    missed = 0
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        subprocess.run([sys.executable, "-c", PREPARE], cwd=place, check=True, capture_output=True)
        (place / "recipe.yaml").write_text(RECIPE)
        for verb in given.verbs:
            start(words_of(verb, f"{verb}-first"), place, f"{verb}-first.log").join(SECONDS)  # fills caches
            began = time.perf_counter()
            whole = start(words_of(verb, f"{verb}-all"), place, f"{verb}-all.log")
            whole.join(SECONDS)
            if whole.exitcode:
                raise RuntimeError((place / f"{verb}-all.log").read_text()[-3000:])
            took, expected = time.perf_counter() - began, left(place / f"{verb}-all")
            rows, bad = [], []
            kills = kills_of(verb, place, took, expected, given.kills, given.chosen, given.seed)
            for folder, kill in kills:
                rows.append(kill_and_finish(verb, kill, folder, place, expected))
                bad = [row for row in rows if row["differs"] or not row["finished"]]
                print(f"{verb}: {len(rows)} of {len(kills)} kills, {len(bad)} missed", end="\r", flush=True)
                shutil.rmtree(place / folder, ignore_errors=True)
            missed += len(bad)
            alive = sum(not row["ended"] for row in rows)
            print(f"{verb}: {len(rows)} kills, {alive} before the end of {took:.1f} s, {len(bad)} missed")
            results[verb] = {"seconds": took, "kills": len(rows), "alive": alive, "missed": bad}
            write(output, {"environment": facts(threads=1), "results": results})
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
