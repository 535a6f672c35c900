"""What the README and the pages tell a reader to run is run, or read by the parser that would run it."""

import dataclasses
import difflib
import importlib
import json
import os
import re
import shlex
import subprocess
from pathlib import Path
from string import Template

import pytest

from torchrl_maxmin import api
from torchrl_maxmin.cli import main as cli
from torchrl_maxmin.cli.main import main
from torchrl_maxmin.cli.parsing import mentions, parse_config

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PAGES = {path.relative_to(ROOT).as_posix(): path.read_text() for path in sorted(ROOT.glob("docs/**/*.md"))}

TINY_RECIPE = """
world: {num_texts: 200, num_prompts: 80, num_test_prompts: 12}
sft: {max_steps: 4, per_device_train_batch_size: 16, learning_rate: 5.0e-3, max_length: 64}
reward: {num_rounds: 2, steps_per_round: 3, per_device_train_batch_size: 16, learning_rate: 1.0e-3}
ppo: {num_iterations: 2, rollout_batch_size: 16, num_ppo_epochs: 1, mini_batch_size: 8,
      calibration_prompts: 16, response_length: 24, max_prompt_length: 16}
evaluate: {num_samples: 2, response_length: 24, max_prompt_length: 16,
           certificate_prompts: 4, certificate_samples: 8}
"""


#: the five lines at a size that a test can afford
TINY = {
    "fit_groups": {"num_groups": 2, "num_rounds": 1, "steps_per_round": 2, "calibration_prompts": 8},
    "train_policy": {
        "num_iterations": 1,
        "rollout_batch_size": 8,
        "mini_batch_size": 8,
        "calibration_prompts": 8,
    },
    "evaluate": {"num_samples": 1, "num_prompts": 4, "certificate_prompts": 4, "certificate_samples": 4},
}


def blocks(language, page=None):
    text = README if page is None else PAGES[page]
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def in_pages(language):
    return [(page, code) for page in PAGES for code in blocks(language, page)]


def commands(text):
    """Every call of the program in a block, its words; lines that go on are one."""
    lines = text.replace("\\\n", " ").splitlines()
    return [
        shlex.split(line, comments=True)[1:] for line in lines if line.lstrip().startswith("torchrl-maxmin ")
    ]


def run_lines(block, folder):
    """Run a block line by line: the program in this process, the rest in a shell."""
    known = {}
    for line in block.splitlines():
        if match := re.fullmatch(r"(\w+)=(\S+)", line):
            known[match[1]] = match[2]
        elif line.startswith("torchrl-maxmin "):
            assert main(shlex.split(Template(line).substitute(known))[1:]) == 0, line
        else:
            subprocess.run(["bash", "-euc", line], env={**os.environ, **known}, cwd=folder, check=True)


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """A demo's own files, at a small size."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "recipe.yaml").write_text(TINY_RECIPE)
    sizes = ["--recipe", "recipe.yaml", "--num_users", "24", "--pairs_per_user", "6", "--num_groups", "2"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["demo", *sizes, "--policies", "single", "maxmin"]) == 0
    return folder


def test_the_readme_is_short():
    assert len(README) <= 9000


@pytest.mark.parametrize(("page", "code"), in_pages("python"), ids=lambda text: text.splitlines()[-1][:30])
def test_python_block_runs(page, code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(code, page, "exec"), {})


def test_the_five_lines_run_as_written(demo, tmp_path, monkeypatch, capsys):
    (code,) = blocks("python")
    assert len([line for line in code.splitlines() if line]) == 5
    monkeypatch.chdir(tmp_path)
    seed = demo / "runs/demo/seed-0"
    (tmp_path / "models").mkdir()
    for name, target in (
        ("models/sft", "sft"),
        ("pairs.jsonl", "preferences.jsonl"),
        ("prompts.jsonl", "prompts.jsonl"),
        ("prompts_test.jsonl", "prompts_test.jsonl"),
    ):
        (tmp_path / name).symlink_to(seed / target)
    config = api._config

    def small(config_class, function, folder, settings):
        return config(config_class, function, folder, {**TINY[function], **settings, "response_length": 8})

    monkeypatch.setattr(api, "_config", small)
    exec(compile(code, "README.md", "exec"), {})
    shown = capsys.readouterr().out
    for words in ("Groups in runs/groups", "Policy in runs/policy", "average over people"):
        assert words in shown
    assert (tmp_path / "runs/results/report.md").is_file()


@pytest.mark.parametrize(
    "words",
    [
        words
        for text in (README, *PAGES.values())
        for block in re.findall(r"^```(?:bash|text)\n(.*?)^```$", text, re.M | re.S)
        for words in commands(block)
    ],
    ids=" ".join,
)
def test_every_command_is_read_by_the_parser_of_its_verb(words):
    verb, *flags = words
    if verb not in cli.STAGES:
        assert verb in cli.OTHERS
        return
    stage = cli.ENV_PPO if verb == "ppo" and mentions(flags, "env_id") else cli.STAGES[verb]
    config_class = getattr(importlib.import_module(stage[0]), stage[1])
    partly = "..." in flags or "--config" in flags  # the reader, or the file, has what the line lacks
    flags = [word for word in flags if word != "..."]
    if "--config" in flags:
        place = flags.index("--config")
        del flags[place : place + 2]
    if partly:
        for field in dataclasses.fields(config_class):
            needed = field.default is field.default_factory is dataclasses.MISSING
            if needed and f"--{field.name}" not in flags:
                flags += [f"--{field.name}", "[a]" if "list" in str(field.type) else "a"]
    config = parse_config(verb, "", config_class, flags)
    named = {word.removeprefix("--") for word in flags if word.startswith("--")}
    assert named <= set(vars(config))


@pytest.mark.parametrize("page", ["README.md", *PAGES])
def test_every_link_to_a_file_leads_to_one(page):
    text = re.sub(r"^```.*?^```$", "", (ROOT / page).read_text(), flags=re.M | re.S)
    links = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", text)
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


def test_first_block_names_targets_of_the_makefile():
    makefile = (ROOT / "Makefile").read_text()
    commands = blocks("bash")[0].split("\n")[:-1]
    assert commands == ["make demo", "make test"]
    for command in commands:
        assert re.search(rf"^{command.split()[1]}:", makefile, flags=re.MULTILINE)


def test_by_hand_block_runs_after_a_demo(demo, monkeypatch):
    """Every line of the block and the diagnosis, in the demo's folder."""
    monkeypatch.chdir(demo)
    (block,) = (text for text in blocks("bash", "docs/start.md") if text.startswith("SEED="))
    run_lines(block + blocks("bash", "docs/verbs/diagnose.md")[0], demo)
    assert "group" not in (demo / "pairs.jsonl").read_text()
    by_hand = (demo / "mine/maxmin/model.safetensors").read_bytes()
    assert by_hand == (demo / "runs/demo/seed-0/maxmin/model.safetensors").read_bytes()
    assert (demo / "mine/results/report.md").is_file()
    assert (demo / "mine/results/figures/win_rates.png").is_file()
    assert "# What one reward costs these users" in (demo / "mine/diagnosis/report.md").read_text()


def test_diff_is_what_stands_between_the_two_examples():
    plain, maxmin = (
        text[text.index("import argparse") :].splitlines()
        for text in ((ROOT / f"examples/ppo_{name}.py").read_text() for name in ("plain", "maxmin"))
    )
    lines = difflib.unified_diff(plain, maxmin, n=0, lineterm="")
    changed = [line for line in lines if not line.startswith(("---", "+++", "@@"))]
    assert blocks("diff", "docs/environments.md")[0].splitlines() == changed


def test_environment_block_trains(tmp_path, monkeypatch):
    """The command as it stands, but for the number of steps."""
    monkeypatch.chdir(tmp_path)
    (block,) = (text for text in blocks("bash") if "--env_id" in text)
    assert block in blocks("bash", "docs/environments.md")
    words = re.sub("--total_frames [0-9]+", "--total_frames 12288", block).split()
    assert words[:3] == ["torchrl-maxmin", "ppo", "--env_id"]
    assert main(words[1:]) == 0
    assert json.loads((tmp_path / "runs/tree/summary.json").read_text())["certificate"]["value"] > 0


@pytest.mark.parametrize(
    "target", sorted(set(re.findall(r"`make ([a-z-]+)", README + "".join(PAGES.values()))))
)
def test_every_make_target_exists(target):
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)


def test_the_results_are_those_of_summary_json():
    """The table prints ``low`` and ``high``, the interval to read."""
    summary = json.loads((ROOT / "reproductions/demo-10-1/summary.json").read_text())
    rows = re.findall(
        r"^\| \**([\w ]*?)\** \| (\d\.\d+ \[.*?\]) \| (\d\.\d+ \[.*?\]) \| (.*) \|$", README, re.MULTILINE
    )
    names = {"single reward": "single", "MaxMin": "maxmin", "MaxMin on the true utilities": "oracle"}
    assert {name for name, *_ in rows} == set(names)
    for name, *cells, totals in rows:
        policy = summary["policies"][names[name]]
        keys = ("worst_group_win_rate", "average_over_groups", "average_over_people")
        assert totals.replace("*", "").split(" | ") == [f"{policy[key]:.3f}" for key in keys]
        rates = policy["win_rate_vs_sft"]
        for cell, group in zip(cells, summary["groups"], strict=True):
            rate = rates[group["name"]]
            assert cell == f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]"
            assert rate["method"].startswith("t")


def test_what_it_costs_is_that_of_summary_json():
    compared = json.loads((ROOT / "reproductions/demo-10-1/summary.json").read_text())["comparison"]
    text = " ".join(README.split())
    for key, words in (
        ("majority_relative_change", "the majority's win rate falls by"),
        ("average_over_people_relative_change", "the average over people by"),
    ):
        ends = compared[f"{key}_interval"]
        numbers = f"{-compared[key]:.0%} [{-ends['high']:.0%}, {-ends['low']:.0%}]"
        assert f"{words} {numbers}" in text
    people = compared["people"]
    assert f"{people['lose']:.0%} of the people are in the group that loses, {people['gain']:.0%}" in text
