"""Help without imports: what it lists is what the configs hold, by group, with choices and defaults."""

import dataclasses
import re
import subprocess
import sys

import pytest
from cli_forms import FORMS, IN_ENV, config_class

from torchrl_maxmin.cli.fields import REQUIRED, read_config
from torchrl_maxmin.cli.flags import CHOICES, COMMON, EXAMPLES, GROUPS, group_of
from torchrl_maxmin.cli.main import ENV_PPO, OTHERS, STAGES, main
from torchrl_maxmin.core.settings import CheckedSettings
from torchrl_maxmin.trainers.plan_config import PlanConfig

ALL = [*FORMS, "plan"]
#: nothing of these is needed to read a config's source
HEAVY = ("torch", "tensordict", "torchrl", "transformers", "datasets", "jsonargparse", "numpy", "rich")


def config_of(form):
    return PlanConfig if form == "plan" else config_class(form)


def text_of(form):
    if form == "plan":
        return read_config("torchrl_maxmin.trainers.plan", "PlanConfig")
    return read_config(*(ENV_PPO if form == IN_ENV else STAGES[form])[:2])


def key(form):
    return "ppo --env_id" if form == IN_ENV else form


def help_of(capsys, *words):
    with pytest.raises(SystemExit) as stop:
        main(list(words))
    assert stop.value.code == 0
    out, err = capsys.readouterr()
    assert err == ""
    return out


@pytest.mark.parametrize("form", ALL)
def test_what_is_read_from_the_source_is_what_python_makes_of_it(form):
    """Names, order, types and defaults, through every class that a config extends."""
    read, fields = text_of(form).fields, dataclasses.fields(config_of(form))
    assert list(read) == [field.name for field in fields]
    for field in fields:
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        assert read[field.name].default == (REQUIRED if default is dataclasses.MISSING else default)
        assert read[field.name].type == field.type


@pytest.mark.parametrize("form", ALL)
def test_every_field_has_one_group_and_words(form):
    for field in text_of(form).fields.values():
        assert [names.count(field.name) for names in GROUPS.values() if field.name in names] == [1]
        assert group_of(field.name) in GROUPS
        assert re.search(r"[a-z]{3}", field.help), field.name


def test_no_group_names_what_no_verb_has():
    known = set().union(*(text_of(form).fields for form in ALL))
    assert {name for names in GROUPS.values() for name in names} == known
    assert known >= COMMON
    for form, choices in CHOICES.items():
        assert set(text_of(IN_ENV if form == "ppo --env_id" else form).fields) >= set(choices)


@pytest.mark.parametrize("form", ALL)
def test_help_all_lists_every_flag_and_its_words(form, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    text = help_of(capsys, *form.split(), "--help-all")
    assert text.startswith(f"usage: torchrl-maxmin {form.split()[0]} ")
    assert max(map(len, text.partition("\nexamples:")[0].splitlines())) <= 105
    for field in text_of(form).fields.values():
        entry = re.search(rf"^  --{field.name}\b[^\n]*\n((?: {{6}}[^\n]*\n)+)", text, flags=re.MULTILINE)
        assert entry, field.name
        assert ("(default:" in entry[1]) is (field.default is not REQUIRED), field.name
    for example in EXAMPLES[key(form)]:
        assert example in text


@pytest.mark.parametrize("form", ALL)
def test_help_is_the_required_flags_first_and_the_common_ones(form, capsys):
    text = help_of(capsys, *form.split(), "--help")
    fields = text_of(form).fields
    flags = re.findall(r"^  --(\w+)\b(?!-)", text, flags=re.MULTILINE)
    required = [name for name, field in fields.items() if field.default is REQUIRED]
    assert flags[: len(required)] == required
    common = {name for name in fields if name in COMMON}
    assert set(flags) == {*required, *common, "config", "print_config", "help"}
    if left := len(fields) - len({*required, *common}):
        assert f"{left} more flags" in text


def test_help_of_ppo_says_that_there_is_another_form(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    assert "in an environment with --env_id (ppo --env_id ID --help)" in help_of(capsys, "ppo", "--help")


@pytest.mark.parametrize("form", [form for form in ALL if CHOICES.get(key(form))])
def test_choices_are_those_that_the_check_takes(form, stage, here, monkeypatch):
    """Whatever a check looks a word up in is what help shows, word by word."""
    seen = {}
    check = CheckedSettings.require_known

    def watched(self, **choices):
        seen.update({name: sorted(known) for name, known in choices.items()})
        check(self, **choices)

    monkeypatch.setattr(CheckedSettings, "require_known", watched)
    given = {
        field.name: field.default if field.default is not dataclasses.MISSING else "x"
        for field in dataclasses.fields(config_of(form))
        if field.default_factory is dataclasses.MISSING
    }
    given |= {
        "sft": {},
        "reward": {},
        "ppo": {"reward_funcs": ["a:f"], "scale_rewards": "group", "advantage": "grpo", "num_generations": 2},
        IN_ENV: {"env_id": "gridworld"},
        "evaluate": {"policies": ["sft=a", "maxmin=b"], "judge_refusals": "tie"},
        "diagnose": {"model_name_or_path": "m"},
        "demo": {},
        "plan": {"num_groups": 2, "use_peft": True},
    }[form]
    given |= {"report_to": "csv"} if "report_to" in given else {}
    config_of(form)(**given).check()
    for extra in {
        "ppo": [{"critic": "full", "advantage": "gae", "scale_rewards": None}],
        "plan": [
            {"critic": "full"},
            {"advantage": "gae"},
            {"distributed": "ddp"},
            {"stage": "reward", "adapters": "shared"},
        ],
    }.get(form, []):
        config_of(form)(**(given | extra)).check()
    shown = CHOICES[key(form)]
    assert {name: known for name, known in seen.items() if name in shown} == {
        name: sorted(known) for name, known in shown.items() if name in seen
    }
    # what is compared by other means, or is a list
    assert set(shown) - set(seen) <= {"critic", "pooling", "policies", "world", "scale_rewards"}


@pytest.mark.parametrize("verb", list(OTHERS))
def test_help_of_the_other_verbs(verb, capsys):
    assert f"usage: torchrl-maxmin {verb}" in help_of(capsys, verb, "--help")


@pytest.mark.parametrize("words", [[], ["--help"], ["-h"]])
def test_usage_names_every_verb(words, capsys):
    assert main(words) == 0
    text = capsys.readouterr().out
    for verb in [*STAGES, *OTHERS]:
        assert re.search(rf"^  {verb} ", text, flags=re.MULTILINE)


def test_version_is_that_of_the_package(capsys):
    assert main(["--version"]) == 0
    assert re.fullmatch(r"torchrl-maxmin \d+\.\d+\.\d+\S*\n", capsys.readouterr().out)


def test_no_help_imports_anything_heavy():
    """All verbs' help in one process, which would be slow for each of these that it imported."""
    words = [[*form.split(), flag] for form in [*ALL, *OTHERS] for flag in ("--help", "--help-all")]
    words = [w for w in words if w[0] in STAGES or w[-1] == "--help" or w[0] == "plan"]
    script = (
        "import sys\nfrom torchrl_maxmin.cli.main import main\n"
        f"for words in {[*words, [], ['--version'], ['no_verb']]}:\n"
        "    try:\n        main(words)\n    except SystemExit:\n        pass\n"
        f"    loaded = [name for name in {HEAVY} if name in sys.modules]\n"
        "    assert not loaded, (words, loaded)\n"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
