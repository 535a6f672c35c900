"""Flip bits of files, cut them off, zero blocks of them, and see that no run reads what is not there.

    python benchmarks/damage.py                             # 1,000 damaged files: half an hour
    python benchmarks/damage.py --cases "resume ppo" --count 20 --output FILE

A case is a folder of files and a run that reads them: checkpoints of a run that was killed, kept answers of
an evaluation, models, rewards, and files of the user's own. One file is damaged at one place, and the run
started. It has to end as if nothing had happened, from an earlier checkpoint say, or to refuse in one line.
Where the file has a checksum of ours, an end that differs is a miss; a traceback or a crash is a miss
everywhere. A miss is exit status 1.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

from facts import child_environment, facts, results_file, write
from kills import LIBRARIES, PREPARE, RECIPE, SECONDS, left, start

TINY: dict[str, dict[str, Any]] = {
    "sft": {"max_steps": 4, "save_steps": 1, "per_device_train_batch_size": 2, "dataset_name": "pairs.jsonl"},
    "reward": {
        "num_rounds": 2, "steps_per_round": 2, "save_rounds": 1, "identifiability": "false", "num_groups": 2,
        "num_restarts": 2, "calibration_prompts": 2, "response_length": 4, "convergence_tolerance": 0,
        "dataset_name": "pairs.jsonl", "feature_cache": "false",
    },
    "ppo": {
        "num_iterations": 4, "save_steps": 1, "rollout_batch_size": 4, "mini_batch_size": 4,
        "num_ppo_epochs": 1, "response_length": 4, "calibration_prompts": 2, "calibration": "sft_mean",
        "dataset_name": "prompts.jsonl", "reward_funcs": "world.json",
    },
    "environment": {
        "env_id": "gridworld", "num_envs": 8, "frames_per_batch": 96, "total_frames": 384, "save_steps": 1,
        "eval_episodes": 8,
    },
    "evaluate": {
        "policies": "[sft=model, maxmin=other]", "dataset_name": "prompts.jsonl", "judge": "world.json",
        "response_length": 4, "num_samples": 2, "dataset_split": "train",
    },
}  # fmt: skip
#: seconds after which a run of a few is one that runs on
LONG = 60
#: what a run says that had to take something else
INSTEAD = ("going on from", "begins anew", "made again", "drawn again", "do not count", "asked again")


@dataclass(frozen=True)
class Case:
    """A run that reads a folder.

    Attributes:
        words: of the run.
        read: what is damaged, a folder or a file.
        output: what it leaves.
        checked: parts of the paths of files that have a checksum of ours; None for all of the folder.
    """

    words: list[str]
    read: str
    output: str
    checked: tuple[str, ...] | None = None

    def has_checksum(self, path: Path) -> bool:
        """Whether a file is one that no run may take for what it was."""
        return self.checked is None or any(part in str(path) for part in self.checked)


def words_of(verb: str, folder: str, **more: Any) -> list[str]:
    """The command of a tiny run."""
    flags = {"output_dir": folder, "device": "cpu", **TINY[verb], **more}
    if verb in ("sft", "reward", "ppo"):
        flags = {"model_name_or_path": "model"} | flags
    word = "ppo" if verb == "environment" else verb
    return [word, *(str(part) for name, value in flags.items() for part in (f"--{name}", value))]


def finish(
    words: list[str], place: Path, log: str, moment: int = 0, limit: float = SECONDS
) -> tuple[int | None, str]:
    """Run to the end; returns the exit status, None beyond so many seconds, and what it says."""
    process = start(words, place, log, moment)
    process.join(limit)
    if process.exitcode is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.join()
        return None, ""
    return process.exitcode, (place / log).read_text(errors="replace")


def prepare(place: Path) -> dict[str, Case]:
    """Make the models, and the folders that runs left which were killed."""
    subprocess.run([sys.executable, "-c", PREPARE], cwd=place, check=True, capture_output=True)
    (place / "recipe.yaml").write_text(RECIPE)
    rows = [json.loads(line) for line in (place / "pairs.jsonl").read_text().splitlines()]
    text = "\n".join(",".join(row.values()) for row in [{name: name for name in rows[0]}, *rows])
    (place / "pairs.csv").write_text(text + "\n")
    cases = {}
    for verb in TINY:
        whole = f"{verb}-whole"
        status, said = finish(words_of(verb, whole), place, f"{whole}.log")
        if status:
            raise RuntimeError(said[-3000:])
        writes = int((place / f"{whole}.log.writes").read_text())
        for share in range(90, 0, -5):  # late, and not yet at its end
            shutil.rmtree(place / f"{verb}-begun", ignore_errors=True)
            finish(words_of(verb, f"{verb}-begun"), place, f"{verb}-begun.log", writes * share // 100)
            if not (place / f"{verb}-begun" / "summary.json").exists():
                break
        words = [*words_of(verb, f"{verb}-begun"), "--resume_from_checkpoint", "last"]
        checked = ("checkpoint-", "kept", "samples", "verdicts")
        cases[f"resume {verb}"] = Case(words, f"{verb}-begun", f"{verb}-begun", checked)
    sft, reward = "sft-whole", "reward-whole"
    cases["policy of evaluate"] = Case(
        words_of("evaluate", "out-evaluate", policies=f"[sft=model, maxmin={sft}]"), sft, "out-evaluate"
    )
    cases["model of ppo"] = Case(words_of("ppo", "out-ppo", model_name_or_path=sft), sft, "out-ppo")
    cases["rewards of ppo"] = Case(_with_rewards(reward), reward, "out-rewards")
    cases["a model that is not ours"] = Case(words_of("ppo", "out-other"), "model", "out-other", ())
    cases["pairs"] = Case(words_of("sft", "out-pairs"), "pairs.jsonl", "out-pairs", ())
    csv = words_of("reward", "out-csv", dataset_name="pairs.csv", num_rounds=1)
    cases["pairs in csv"] = Case(csv, "pairs.csv", "out-csv", ())
    cases["prompts"] = Case(words_of("evaluate", "out-prompts"), "prompts.jsonl", "out-prompts", ())
    cases["world"] = Case(words_of("ppo", "out-world"), "world.json", "out-world", ())
    config = ["ppo", "--config", "ppo-whole/config.yaml", "--output_dir", "out-config"]
    cases["config"] = Case(config, "ppo-whole/config.yaml", "out-config", ())
    cases["report"] = Case(["report", "evaluate-whole"], "evaluate-whole", "evaluate-whole", ())
    return cases


def _with_rewards(folder: str) -> list[str]:
    words = words_of("ppo", "out-rewards", reward_model_path=folder)
    at = words.index("--reward_funcs")
    return words[:at] + words[at + 2 :]


def damage(path: Path, draw: random.Random) -> str:
    """Change a file at one place; returns how."""
    content = path.read_bytes()
    while True:
        at, kind = draw.randrange(len(content)), draw.choice(("flip", "cut", "zeros"))
        changed = bytearray(content)
        if kind == "flip":
            changed[at] ^= 1 << draw.randrange(8)
        elif kind == "cut":
            del changed[at:]
        else:
            size = min(draw.choice((1, 16, 512)), len(content) - at)
            changed[at : at + size] = bytes(size)
        if changed != content:
            path.write_bytes(changed)
            return f"{kind} at {at} of {len(content)}"


def results_of(folder: Path) -> dict[str, Any]:
    """What a run leaves but for its checkpoints, of which one may be damaged and not read."""
    return {name: content for name, content in left(folder).items() if "checkpoint-" not in name}


def outcome(
    case: Case, status: int | None, said: str, found: dict[str, Any], expected: dict[str, Any]
) -> str:
    """What came of it, in a word or two."""
    if status is None:
        return "runs on"
    if status < 0 or status not in (0, 1, 2) or "Traceback (most recent call last)" in said:
        return "crash"
    if status:
        return "refused"
    if found != expected:
        return "another end"
    return "something else taken" if any(words in said for words in INSTEAD) else "as if nothing were"


def try_one(
    case: Case, place: Path, kept: Path, draw: random.Random, expected: dict[str, Any]
) -> dict[str, Any]:
    """Damage one file of a case in a place that is whole again afterwards."""
    target = place / case.read
    files = sorted(path for path in [target, *target.rglob("*")] if path.is_file() and path.stat().st_size)
    path = draw.choice(files)
    how = damage(path, draw)
    # a number of the user's own that is another one may ask for a long run
    status, said = finish(case.words, place, "damaged.log", limit=LONG)
    found = results_of(place / case.output)
    result = outcome(case, status, said, found, expected)
    checked = case.has_checksum(path.relative_to(place))
    for name in {case.read, case.output}:
        restore(place / name, kept / name)
    bad = result == "crash" or (checked and result in ("another end", "runs on"))
    return {
        "file": str(path.relative_to(place)), "damage": how, "checksum": checked, "outcome": result,
        "missed": bad, "says": said[-1500:] if bad else "",
    }  # fmt: skip


def restore(path: Path, kept: Path) -> None:
    """Put a file or folder back as it was."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    if kept.is_dir():
        shutil.copytree(kept, path)
    elif kept.is_file():
        shutil.copy2(kept, path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", help="names; all by default")
    parser.add_argument("--count", type=int, default=1000, help="of damaged files in all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/damage.json")
    given = parser.parse_args()
    os.environ.update(child_environment(threads=1))
    set_forkserver_preload(LIBRARIES)
    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as name:
        place, kept = Path(name) / "place", Path(name) / "kept"
        place.mkdir()
        cases = prepare(place)
        shutil.copytree(place, kept)
        chosen = given.cases or list(cases)
        draw = random.Random(given.seed)
        for number, case_name in enumerate(chosen):
            case = cases[case_name]
            status, said = finish(case.words, place, "whole.log")
            if status:
                raise RuntimeError(f"{case_name}: {said[-3000:]}")
            expected = results_of(place / case.output)
            for part in {case.read, case.output}:
                restore(place / part, kept / part)
            rows = []
            share = given.count // len(chosen) + (number < given.count % len(chosen))
            for _ in range(share):
                rows.append(try_one(case, place, kept, draw, expected))
                print(f"{case_name}: {len(rows)} of {share}", end="\r", flush=True)
            counts = Counter(row["outcome"] for row in rows)
            missed = [row for row in rows if row["missed"]]
            print(f"{case_name}: {share} damaged, {dict(counts)}, {len(missed)} missed")
            results[case_name] = {
                "count": share, "outcomes": counts, "checksums": sum(row["checksum"] for row in rows),
                "missed": missed,
                "another end": [row["file"] for row in rows if row["outcome"] == "another end"],
            }  # fmt: skip
            write(given.output or results_file("damage.json"), {"environment": facts(), "results": results})
    return int(any(result["missed"] for result in results.values()))


if __name__ == "__main__":
    sys.exit(main())
