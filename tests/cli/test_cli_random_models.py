"""Whatever the model, its tokenizer and the prompts: four verbs run, or say in a line why not.

The outcomes stand in the summary of the test run.
"""

from __future__ import annotations

import json
import math
import re
import signal
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from random_models import Case, draw_cases, write_case

from torchrl_maxmin.cli.main import main
from torchrl_maxmin.evaluation.results import SeedResult
from torchrl_maxmin.rewards.source import MixtureRewards

pytestmark = pytest.mark.slow

CASES = draw_cases(200)
SECONDS = 120  # a verb that takes longer hangs: they take about one


def _words(completions) -> list[list[str]]:
    texts = [text if isinstance(text, str) else text[0]["content"] for text in completions]
    assert not any("<|" in text or "</s>" in text for text in texts)
    return [text.split() for text in texts]


def two_groups(prompts, completions, topic):
    """Rewards of two groups: brevity, and the letter a; no two responses of a rollout are quite alike."""
    assert len(prompts) == len(topic)
    rows = enumerate(_words(completions))
    return [[-len(words) / 10 + i * 1e-3, words.count("a") - i * 1e-3] for i, words in rows]


def prefer_short(prompts, a, b):
    """A judge of two responses."""
    sizes = [(len(x), len(y)) for x, y in zip(_words(a), _words(b), strict=True)]
    return [0.5 + 0.5 * ((y > x) - (y < x)) for x, y in sizes]


class Session:
    """The verbs of one case, in one folder."""

    def __init__(self, case: Case, folder: Path, capsys, record_property):
        self.case, self.folder, self.capsys, self.record = case, folder, capsys, record_property

    def run(self, verb: str, **settings) -> bool:
        """Whether the verb ran; it was refused in one line where not."""
        flags = {**settings, "output_dir": self.folder / verb, "device": "cpu"}
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        with _limit(SECONDS):
            code = main([verb, *words])
        out, err = self.capsys.readouterr()
        self.record("verb", (verb, _kind(err, self.folder) if code else "ran", self.case.number))
        if code == 0:
            assert (self.folder / verb / "summary.json").is_file()
            return True
        lines = err.splitlines()
        assert (code, len(lines), out) == (2, 1, ""), (verb, code, out, err)
        assert re.match(rf"torchrl-maxmin {verb}: error: \S.{{15,}}", lines[0]), lines
        left = self.folder / verb
        assert not left.exists() or not list(left.iterdir()), f"{lines[0]}\nleft {list(left.iterdir())}"
        return False


@contextmanager
def _limit(seconds: int):
    def stop(*_):
        raise TimeoutError(f"not done after {seconds} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _kind(line: str, folder: Path) -> str:
    """A refusal without what differs from case to case."""
    line = line.partition("error: ")[2].replace(str(folder), "").strip()
    return re.sub(r"\d[\d.e+-]*", "#", line)[:150]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_four_verbs_run_or_say_why_not(case, tmp_path, monkeypatch, capsys, record_property):
    monkeypatch.chdir(tmp_path)
    write_case(case, tmp_path)
    capsys.readouterr()
    verbs = Session(case, tmp_path, capsys, record_property)
    flags = {verb: dict(given) for verb, given in case.flags.items()}
    quick = {"num_rounds": 1, "steps_per_round": 1, "num_restarts": 1, "identifiability": False}
    sizes = {"calibration_prompts": 4, "response_length": 6}
    base, prompts = "base", {"dataset_name": "prompts.jsonl", "response_length": 6}

    read_as_text = []
    of_texts = MixtureRewards._of_texts
    monkeypatch.setattr(
        MixtureRewards, "_of_texts", lambda self, rows: read_as_text.append(rows) or of_texts(self, rows)
    )

    tuned = verbs.run("sft", model_name_or_path=base, dataset_name="sft.jsonl", max_steps=1, **flags["sft"])
    reference = "sft" if tuned else base
    given = {name: value for name, value in flags["reward"].items() if value is not None}
    has_rewards = verbs.run(
        "reward", model_name_or_path=reference, dataset_name="pairs.jsonl", **quick, **sizes, **given
    )
    reward = flags["ppo"].pop("reward")
    source = (
        {"reward_model_path": "reward"}
        if has_rewards and reward == "model"
        else {"reward_funcs": "[test_cli_random_models:two_groups]"}
    )
    still = {"learning_rate": 0, "num_iterations": 1, "rollout_batch_size": 8, "mini_batch_size": 4}
    trained = verbs.run(
        "ppo",
        model_name_or_path=reference,
        calibration_prompts=4,
        **prompts,
        **source,
        **still,
        **flags["ppo"],
    )
    if trained:
        (metrics,) = map(json.loads, (tmp_path / "ppo" / "metrics.jsonl").read_text().splitlines())
        assert all(math.isfinite(value) for value in metrics.values()), metrics
        assert abs(metrics["objective/kl"]) < 1e-4  # nothing was learned
        assert metrics["policy/clipfrac_avg"] == 0
    wanted = flags["evaluate"].pop("judge")
    judge = f"test_cli_random_models:{'prefer_short' if wanted == 'pairs' else 'two_groups'}"
    if wanted == "model" and has_rewards:
        judge = "reward"
    if has_rewards and case.evaluation == "with the reward model":
        flags["evaluate"] |= {
            "reward_model_path": "reward",
            "certificate_prompts": 2,
            "certificate_samples": 4,
        }
    policies = f"[sft={reference}, maxmin={'ppo' if trained else reference}]"
    measured = verbs.run(
        "evaluate",
        policies=policies,
        judge=judge,
        dataset_split="train",
        num_samples=2,
        **prompts,
        **flags["evaluate"],
    )
    if measured:
        result = SeedResult.load(tmp_path / "evaluate" / "result")
        assert all(abs(found.mean()) < 1e-4 for found in result.kl.values())
        assert all(np.isfinite(found).all() for found in (result.utilities or result.wins).values())
    if flags["reward"]["text_layout"] is None:  # a trunk of the policy's own reads its tokens
        assert not read_as_text
