"""Start two runs into one folder at once, and go on with runs whose settings or inputs were changed.

    python benchmarks/run_folders.py                         # 10 pairs of runs and all settings of every verb
    python benchmarks/run_folders.py --verbs ppo --pairs 2 --output FILE

Of two runs one has to work and one to refuse, in a line that says who holds the folder, or that a finished
run is there. A run that was killed is resumed with one setting at another value, and with one file changed:
it must refuse with both values, or say the change and have its config.yaml name what was used. All else is a
miss; a miss is exit status 1.
"""

import argparse
import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import yaml
from damage import TINY, finish, restore, words_of
from facts import child_environment, facts, results_file, write
from kills import LIBRARIES, PREPARE, SECONDS, start

#: what a verb is set by, and files that it reads
CONFIGS = {
    "sft": ("torchrl_maxmin.trainers.sft", "SFTConfig", ("pairs.jsonl", "model/model.safetensors")),
    "reward": ("torchrl_maxmin.trainers.reward", "RewardConfig", ("pairs.jsonl", "model/config.json")),
    "ppo": ("torchrl_maxmin.trainers.lm_ppo", "PPOConfig", ("prompts.jsonl", "world.json")),
    "environment": ("torchrl_maxmin.trainers.env_ppo", "EnvPPOConfig", ()),
    "evaluate": ("torchrl_maxmin.evaluation.measure", "EvaluateConfig", ("prompts.jsonl", "world.json")),
}  # fmt: skip
OWNED = ("is in use: process", "holds a finished run", "holds a broken-off run")


def two_at_once(verb: str, number: int, took: float, place: Path, draw: random.Random) -> dict[str, Any]:
    """Start a run and, some moments later, another into the same folder."""
    words = words_of(verb, f"{verb}-two-{number}")
    one = start(words, place, "one.log")
    time.sleep(draw.choice((0.0, draw.random() * took)))
    other = start(words, place, "other.log")
    for process in (one, other):
        process.join(SECONDS)
    said = [(place / name).read_text() for name in ("one.log", "other.log")]
    codes = [one.exitcode, other.exitcode]
    refusal = said[codes.index(2)] if 2 in codes else ""
    right = sorted(map(str, codes)) == ["0", "2"] and any(words in refusal for words in OWNED)
    return {"codes": codes, "missed": not right, "says": "" if right else said}


def another(value: Any) -> Any:
    """A value of the same kind; None where there is none that is sure to be allowed."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1
    return value * 0.5 + 0.01 if isinstance(value, float) else None


def changed_settings(verb: str) -> dict[str, Any]:
    """Every field of the verb's config that has another value, by name."""
    module, name, _ = CONFIGS[verb]
    fields = dataclasses.fields(getattr(import_module(module), name))
    values = {field.name: TINY[verb].get(field.name, field.default) for field in fields}
    changed = {name: another(value) for name, value in values.items()}
    return {name: value for name, value in changed.items() if value is not None}


def judge(name: str, value: Any, status: int, said: str, used: dict[str, Any]) -> str:
    """What came of a changed setting."""
    if "Traceback (most recent call last)" in said or status not in (0, 1, 2):
        return "missed"
    if status == 0:  # it went on: said, and true
        return (
            "allowed" if f"! --{name} is" in " ".join(said.split()) and used.get(name) == value else "missed"
        )
    if f"has --{name} " in said and ", not " in said:
        return "refused with both values"
    return "refused by itself" if f"--{name}" in said else "missed"


def resume_changed(verb: str, place: Path, kept: Path) -> list[dict[str, Any]]:
    """Go on with a killed run, each time with one thing changed."""
    rows: list[dict[str, Any]] = []
    folder = f"{verb}-begun"
    shutil.copytree(place / folder, kept / folder)

    def resume(**more: Any) -> tuple[int, str]:
        words = words_of(verb, folder, resume_from_checkpoint="last", **more)
        status, said = finish(words, place, "changed.log")
        return status, said

    def done(row: dict[str, Any], said: str) -> None:
        rows.append(
            row
            | {"missed": row["outcome"] == "missed"}
            | ({"says": said[-800:]} if row["outcome"] == "missed" else {})
        )
        restore(place / folder, kept / folder)

    for name, value in changed_settings(verb).items():
        status, said = resume(**{name: str(value).lower() if isinstance(value, bool) else value})
        path = place / folder / "config.yaml"
        used = yaml.safe_load(path.read_text()) if path.is_file() else {}
        done({"change": f"{name} {value}", "outcome": judge(name, value, status, said, used)}, said)
    for file in CONFIGS[verb][2]:
        whole = (place / file).read_bytes()
        (place / file).write_bytes(whole + b"\n")
        status, said = resume()
        outcome = "refused with both values" if status == 2 and "SHA-256" in said else "missed"
        done({"change": f"content of {file}", "outcome": outcome}, said)
        (place / file).write_bytes(whole)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--verbs", nargs="+", choices=list(CONFIGS), default=list(CONFIGS))
    parser.add_argument("--pairs", type=int, default=10, help="of runs, of every verb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/run_folders.json")
    given = parser.parse_args()
    os.environ.update(child_environment(threads=1))
    set_forkserver_preload(LIBRARIES)
    results: dict[str, Any] = {}
    draw, missed = random.Random(given.seed), 0
    with tempfile.TemporaryDirectory() as name:
        place, kept = Path(name) / "place", Path(name) / "kept"
        place.mkdir()
        subprocess.run([sys.executable, "-c", PREPARE], cwd=place, check=True, capture_output=True)
        for verb in given.verbs:
            began = time.perf_counter()
            status, said = finish(words_of(verb, f"{verb}-whole"), place, f"{verb}-whole.log")
            if status:
                raise RuntimeError(said[-3000:])
            took = time.perf_counter() - began
            writes = int((place / f"{verb}-whole.log.writes").read_text())
            finish(words_of(verb, f"{verb}-begun"), place, "begun.log", writes // 2)
            pairs = [two_at_once(verb, number, took, place, draw) for number in range(given.pairs)]
            rows = resume_changed(verb, place, kept)
            bad = [row for row in [*pairs, *rows] if row["missed"]]
            missed += len(bad)
            counts = {
                outcome: sum(row["outcome"] == outcome for row in rows)
                for outcome in dict.fromkeys(row["outcome"] for row in rows)
            }
            print(f"{verb}: {len(pairs)} pairs, {len(rows)} changes {json.dumps(counts)}, {len(bad)} missed")
            results[verb] = {"pairs": len(pairs), "changes": counts, "rows": rows, "missed": bad}
            write(
                given.output or results_file("run_folders.json"), {"environment": facts(), "results": results}
            )
    return int(missed > 0)


if __name__ == "__main__":
    sys.exit(main())
