"""Several processes measure what one measures; no judge is asked a thing twice."""

import collections
import dataclasses
import json

import measure_judges
import numpy as np
import pytest
from judge_server import Server, shorter
from ranks import on_ranks

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.evaluation import SeedResult
from torchrl_maxmin.evaluation.measure import EvaluateConfig, measure_policies, run_evaluate
from torchrl_maxmin.world import sample_prompts

#: on any processor; a test that is marked slow has the bar of 1e-5
BAR = 1e-4


@pytest.fixture(scope="module")
def prompts():
    """As many as a certificate needs, and one more; neither they nor their responses go round."""
    return sample_prompts(17, 0, heldout=True)


def evaluate_all(configs):
    """Run the stage; returns what this process asked the judges."""
    for values in configs:
        run_evaluate(EvaluateConfig(**values))
    return measure_judges.calls, measure_judges.compared


def asked(views):
    """How often each question was put, over all processes."""
    calls = [call for view in views for kind in view for call in kind]
    return collections.Counter(question for call in calls for question in zip(*call, strict=True))


def assert_close(found, expected, bar, where=""):
    if isinstance(expected, dict):
        assert found.keys() == expected.keys(), where
        for key, value in expected.items():
            assert_close(found[key], value, bar, f"{where}/{key}")
    elif isinstance(expected, list):
        assert len(found) == len(expected), where
        for place, (one, other) in enumerate(zip(found, expected, strict=True)):
            assert_close(one, other, bar, f"{where}/{place}")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, abs=bar, rel=bar, nan_ok=True), where
    else:
        assert found == expected, where


def assert_same_figures(found, expected, bar=BAR):
    one, other = (SeedResult.load(folder / "result") for folder in (found, expected))
    assert one.policies == other.policies
    for name in ("utilities", "kl", "length", "wins"):
        arrays, wanted = getattr(one, name), getattr(other, name)
        assert arrays.keys() == wanted.keys()
        for policy, array in wanted.items():
            np.testing.assert_allclose(arrays[policy], array, atol=bar, err_msg=f"{name} of {policy}")
    assert_close(one.extra, other.extra, bar)
    assert_close(*(json.loads((folder / "summary.json").read_text()) for folder in (found, expected)), bar)
    lines = [(folder / "report.md").read_text().splitlines() for folder in (found, expected)]
    assert len(lines[0]) == len(lines[1])


@pytest.fixture
def evaluate(make_config, trained, tiny_model, reward_folder):
    """Run three kinds of judges by processes that work as one; returns folders, and what was asked."""
    policies = [f"sft={tiny_model}", f"maxmin={trained(kl_coef=20.0)}"]

    def run(world, mode):
        certified = {"reward_model_path": reward_folder, "certificate_samples": 64}
        cases = {
            "function": {"num_samples": 3, "scoring_batch_size": 7, "generation_batch_size": 5} | certified,
            "heads": {"judge": reward_folder, "num_samples": 2, "num_prompts": 3, "top_k": 8},
            "pairs": {"judge": "measure_judges:shorter", "num_samples": 2, "num_prompts": 3},
        }
        configs = [
            make_config(f"{mode}-{world}/{name}", policies=policies, distributed=mode, **case)
            for name, case in cases.items()
        ]
        views = on_ranks(world, evaluate_all, [dataclasses.asdict(config) for config in configs])
        return [config.output_dir for config in configs], asked(views)

    return run


@pytest.mark.parametrize("mode", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp2"])
def test_two_processes_find_what_one_finds(evaluate, tmp_path, mode):
    folders, questions = evaluate(1, "ddp")
    one = SeedResult.load(f"{folders[0]}/result")
    assert one.extra["certificate"]["value"] is not None
    found, again = evaluate(2, mode)
    assert again == questions
    for folder, expected in zip(found, folders, strict=True):
        assert_same_figures(tmp_path / folder, tmp_path / expected)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "fsdp2"])
def test_figures_agree_in_every_element(evaluate, tmp_path, mode):
    for found, expected in zip(evaluate(2, mode)[0], evaluate(1, mode)[0], strict=True):
        assert_same_figures(tmp_path / found, tmp_path / expected, 1e-5)


def judge_badly(values):
    with pytest.raises(UserError) as caught:
        measure_policies(EvaluateConfig(**values))
    return str(caught.value)


def test_a_mistake_of_a_judge_is_that_of_all(make_config, prompts, tmp_path):
    """The endpoint refuses what one of the processes asks; a function fails on the probe."""

    def answer(number, body):
        last = prompts[2] in body["messages"][0]["content"]
        return (400, b"too long", {}, 0.0) if last else shorter(number, body)

    with Server(answer) as server:
        settings = {"judge": server.url, "judge_model": "m", "judge_criteria": ["brief=short"]}
        config = make_config("refused", distributed="ddp", num_prompts=3, num_samples=1, **settings)
        one, other = on_ranks(2, judge_badly, dataclasses.asdict(config))
    assert one == other
    assert "refuses with status 400" in one
    config = make_config("broken", distributed="ddp", judge="measure_judges:broken")
    one, other = on_ranks(2, judge_badly, dataclasses.asdict(config))
    assert one == other
    assert "fails on f(prompts, completions) with KeyError" in one
    assert not (tmp_path / "broken").exists()


@pytest.mark.parametrize(("mode", "message"), [("ddp", "torchrun"), ("dp", "none of none, ddp, fsdp2")])
def test_what_does_not_go_together_is_one_line(make_config, monkeypatch, mode, message):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=message):
        run_evaluate(make_config(distributed=mode))
