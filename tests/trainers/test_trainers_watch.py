"""Warnings about numbers that go wrong: each is found once, and none in a run that goes as it should."""

import json
import re
from dataclasses import fields
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from trainers_runs import EnvPPORun, PPORun

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.run import read_metrics
from torchrl_maxmin.trainers.env_ppo_config import EnvPPOConfig
from torchrl_maxmin.trainers.ppo_config import PPOConfig
from torchrl_maxmin.trainers.ppo_settings import PPOSettings
from torchrl_maxmin.trainers.watch import CHECKS, Watch, warnings_of

PAGE = Path(__file__).resolve().parents[2] / "docs" / "numbers.md"
#: what an iteration of a language model logs, as it should be
SOUND = {
    "objective/kl": 2.0,
    "objective/entropy": 24.0,
    "completions/mean_length": 10.0,
    "val/ratio": 1.0,
    "loss/value_avg": 0.2,
    "maxmin/weights/0": 0.95,
    "maxmin/weights/1": 0.05,
    "rewards/0/mean": 1.0,
    "rewards/1/mean": 2.0,
    "rewards/0/std": 1.0,
    "rewards/1/std": 1.0,
}
#: metrics after 15 sound iterations that each warning is about
WRONG = {
    "kl-below-zero": {"objective/kl": -1.0},
    "kl-above-target": {"objective/kl": 29.0},
    "far-from-the-reference": {"objective/kl": 45.0},
    "ratio-explosion": {"val/ratio": 9.0},
    "entropy-collapse": {"objective/entropy": 0.3},
    "group-falls": {"rewards/0/mean": 0.2},
    "value-loss-explosion": {"loss/value_avg": 90.0},
}


def config(**values):
    if "kl_target" in values:
        values |= {"model_name_or_path": "", "dataset_name": "", "kl_controller": "adaptive"}
        return PPOConfig(output_dir="", **values)
    return PPOSettings(output_dir="", **values)


def named(watch):
    return [warning["name"] for warning in watch.found]


def fed(watch, rows):
    for iteration, row in enumerate(rows, start=1):
        watch(iteration, row)
    return watch


@pytest.mark.parametrize("name", CHECKS)
def test_each_is_given_once_and_its_flag_turns_it_off(name, capsys):
    options = {"kl_target": 5.0} if name == "kl-above-target" else {}
    rows = [SOUND] * 15 + [SOUND | WRONG[name]] * 25
    watch = fed(Watch(config(**options)), rows)
    assert named(watch) == [name]
    (warning,) = watch.found
    assert 16 <= warning["iteration"] <= 36
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    line = "warning: iteration {iteration}: {text}; see docs/numbers.md#{name}\n"
    assert error == line.format(**warning)
    flag = CHECKS[name][0]
    assert named(fed(Watch(config(**options, **{flag: 0.0})), rows)) == []
    assert named(fed(Watch(config(**options)), [SOUND] * 40)) == []


@pytest.mark.parametrize("name", CHECKS)
def test_one_bad_batch_is_noise(name):
    options = {"kl_target": 5.0} if name == "kl-above-target" else {}
    rows = [SOUND] * 15 + [SOUND | WRONG[name]] + [SOUND] * 25
    assert named(fed(Watch(config(**options)), rows)) == []


def test_a_resumed_watch_is_one_that_never_stopped(capsys):
    rows = [SOUND] * 15
    rows += [SOUND | WRONG["ratio-explosion"]] * 10 + [SOUND | WRONG["value-loss-explosion"]] * 10
    whole = fed(Watch(config()), rows)
    capsys.readouterr()
    assert named(whole) == ["ratio-explosion", "value-loss-explosion"]
    for start in range(len(rows)):
        again = Watch(config(), rows[:start])
        assert capsys.readouterr().err == ""  # it was said before
        for iteration, row in enumerate(rows[start:], start=start + 1):
            again(iteration, row)
        assert again.found == whole.found
        capsys.readouterr()


def test_ratios_near_zero_are_an_explosion_too():
    assert named(fed(Watch(config()), [SOUND] * 15 + [SOUND | {"val/ratio": 0.1}] * 3)) == ["ratio-explosion"]


def test_a_minimum_that_is_trained_is_no_group_that_has_all_the_weight():
    """With mean_of_mins there is one weight, of the minimum, and each group has its own mean."""
    rows = [SOUND | {"maxmin/weights/0": 1.0, "rewards/0/mean": -float(i)} for i in range(40)]
    for row in rows:
        del row["maxmin/weights/1"]
    assert named(fed(Watch(config()), rows)) == []
    for row in rows:  # one group that is alone has
        del row["rewards/1/mean"]
    assert named(fed(Watch(config()), rows)) == ["group-falls"]


def test_entropy_of_an_environment_is_its_policys():
    rows = [{"policy/entropy_avg": 1.3}] * 12 + [{"policy/entropy_avg": 0.01}] * 12
    assert named(fed(Watch(config()), rows)) == ["entropy-collapse"]
    rows = [{"policy/entropy_avg": -0.5}] * 12 + [{"policy/entropy_avg": -2.0}] * 12  # of a density
    assert named(fed(Watch(config()), rows)) == []


NUMBERS = st.one_of(
    st.floats(allow_nan=True, allow_infinity=True), st.integers(-(10**18), 10**18), st.none(), st.floats(0, 1)
)


@settings(deadline=None, max_examples=60)
@given(
    st.lists(st.dictionaries(st.sampled_from(sorted(SOUND)), NUMBERS), max_size=8),
    st.lists(st.integers(0, 7), min_size=30, max_size=45),
    st.floats(0, 1e9),
)
def test_it_never_raises(rows, order, threshold):
    limits = {flag: threshold for flag, _ in CHECKS.values()}
    watch = Watch(config(kl_target=6.0, **limits))
    for iteration, place in enumerate(order, start=1):
        watch(iteration, SOUND | rows[place] if place < len(rows) else SOUND)
    assert len(set(named(watch))) == len(watch.found)
    json.dumps(watch.found, allow_nan=False)


@pytest.mark.parametrize("kind", ["language", "environment"])
def test_ordinary_runs_get_none_and_a_wrong_one_keeps_its_own(make_config, make_env_config, capsys, kind):
    if kind == "language":
        trainer = PPORun(make_config(num_iterations=14))
    else:
        trainer = EnvPPORun(make_env_config(total_frames=64 * 14, entropy_coeff=0.01))
    trainer.train()
    assert "warning" not in capsys.readouterr().err
    path = trainer.folder / "summary.json"
    assert json.loads(path.read_text())["warnings"] == []
    rows = read_metrics(trainer.folder)
    assert len(rows) == 14
    for row in rows[10:]:
        row["val/ratio"] = 99.0
    (trainer.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (warning,) = warnings_of(trainer.config)
    assert (warning["name"], warning["iteration"]) == ("ratio-explosion", 13)


def test_a_run_says_it_and_writes_it_down(make_env_config, capsys):
    """A critic that learns nothing at this limit, so that the loss's own noise is an explosion."""
    trainer = EnvPPORun(make_env_config(total_frames=64 * 14, warn_value=1e-6))
    trainer.train()
    summary = json.loads((trainer.folder / "summary.json").read_text())
    assert [warning["name"] for warning in summary["warnings"]] == ["value-loss-explosion"]
    assert capsys.readouterr().err.count("warning: iteration 13: loss/value_avg") == 1


def test_limits_that_cannot_be():
    for limits in ({"warn_ratio": 0.5}, {"warn_kl": -1.0}, {"warn_value": float("nan")}):
        with pytest.raises(UserError, match=next(iter(limits))):
            config(**limits).check()


def test_the_page_has_a_section_for_each_and_names_what_there_is():
    text = PAGE.read_text()
    sections = [line[3:].lower().replace(" ", "-") for line in text.splitlines() if line.startswith("## ")]
    assert sections == list(CHECKS)
    assert re.findall(r"\]\(#([a-z-]+)\)", text) == list(CHECKS)
    flags = {field.name for kind in (PPOConfig, EnvPPOConfig) for field in fields(kind)}
    named_flags = set(re.findall(r"`--(\w+)", text))
    assert named_flags <= flags
    defaults = {field.name: field.default for field in fields(PPOSettings)}
    for flag, default in re.findall(r"`--(warn_\w+)`[^|]*\| ([0-9.]+) \|", text):
        assert defaults[flag] == float(default)
        named_flags.discard(flag)
    assert not any(flag.startswith("warn_") for flag in named_flags)
    for part in text.split("\n## ")[1:]:
        for words in ("**What it means.**", "**How to see it.**", "**What to do.**"):
            assert words in part
