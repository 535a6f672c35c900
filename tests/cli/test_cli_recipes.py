"""Recipes and completion: each recipe is what its verb takes, and its head says what it costs."""

import dataclasses
import re
import shutil
import subprocess

import pytest
from cli_forms import FORMS, IN_ENV, config_class

from torchrl_maxmin.cli.completion import SHELLS, words_after
from torchrl_maxmin.cli.main import OTHERS, STAGES, main
from torchrl_maxmin.cli.parsing import mentions, parse_config
from torchrl_maxmin.cli.recipes import FIELDS, read_recipes

RECIPES = read_recipes()


def parsed(name, path):
    verb, words = RECIPES[name].head["verb"], ["--config", str(path)]
    form = IN_ENV if verb == "ppo" and mentions(words, "env_id") else verb
    return parse_config(verb, "", config_class(form), words)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_copied_and_its_verb_takes_it(name, tmp_path, capsys):
    path = tmp_path / "mine.yaml"
    assert main(["recipes", "cp", name, str(path)]) == 0
    assert path.read_text() == RECIPES[name].text
    verb = RECIPES[name].head["verb"]
    assert capsys.readouterr().out.endswith(f"run it with: torchrl-maxmin {verb} --config {path}\n")
    config = parsed(name, path)
    config.check()
    assert all(len(line) <= 120 for line in RECIPES[name].text.splitlines())


@pytest.mark.parametrize("name", RECIPES)
def test_the_head_of_a_recipe_says_what_it_takes(name):
    head = RECIPES[name].head
    assert tuple(head) == FIELDS
    assert all(head.values())
    assert head["command"].endswith(f"torchrl-maxmin {head['verb']} --config {name}.yaml")
    assert "measured" in head["time"]  # measured, or not


def test_the_list_names_every_recipe_and_its_verb(capsys):
    assert main(["recipes"]) == 0
    out = capsys.readouterr().out
    for name, recipe in RECIPES.items():
        assert re.search(rf"^  {name} +{recipe.head['verb']} +{re.escape(recipe.title)}$", out, re.MULTILINE)


def test_recipes_for_each_experiment_of_the_paper_and_for_common_jobs():
    verbs = {name: recipe.head["verb"] for name, recipe in RECIPES.items()}
    for paper in ("imdb", "tulu2"):  # sections 5.1 and 5.2
        mine = {verb for name, verb in verbs.items() if name.startswith(f"paper_{paper}_")}
        assert mine >= {"reward", "ppo", "evaluate"}
    assert {"paper_gridworld", "paper_demo", "ratings", "rankings", "environment"} <= verbs.keys()
    assert verbs["diagnose_alone"] == "diagnose"
    assert verbs["endpoint_judge"] == "evaluate"


def test_a_copy_goes_into_a_folder_and_overwrites_nothing(tmp_path, capsys):
    assert main(["recipes", "cp", "environment.yaml", str(tmp_path)]) == 0
    assert (tmp_path / "environment.yaml").is_file()
    assert main(["recipes", "cp", "environment", str(tmp_path)]) == 2
    assert "is there already" in capsys.readouterr().err


@pytest.mark.parametrize("verb", [*STAGES, *OTHERS])
def test_what_may_follow_a_verb_is_what_it_takes(verb):
    words = words_after(verb)
    assert len(words) == len(set(words))
    for form in FORMS:
        if form.split()[0] == verb:
            assert {f"--{field.name}" for field in dataclasses.fields(config_class(form))} <= set(words)


@pytest.mark.parametrize("shell", SHELLS)
def test_a_completion_script_is_sound(shell, capsys, tmp_path):
    assert main(["completion", shell]) == 0
    script = capsys.readouterr().out
    for verb in [*STAGES, *OTHERS]:
        assert verb in script
    assert "save_total_limit" in script
    assert "paper_gridworld" in script
    if shutil.which(shell):  # bash is where tests run; the others may not be
        (tmp_path / "script").write_text(script)
        subprocess.run([shell, "-n", str(tmp_path / "script")], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
@pytest.mark.parametrize(
    ("words", "found"),
    [
        (["re"], {"reward", "report", "recipes"}),
        (["--v"], {"--version"}),
        (["ppo", "--save_s"], {"--save_steps"}),
        (["ppo", "--env_i"], {"--env_id"}),
        (["recipes", "cp", "paper_g"], {"paper_gridworld"}),
        (["data", "c"], {"check"}),
    ],
)
def test_bash_completes(words, found, capsys):
    assert main(["completion", "bash"]) == 0
    typed = " ".join(["torchrl-maxmin", *words])
    script = f"{capsys.readouterr().out}\nCOMP_WORDS=({typed}); COMP_CWORD={len(words)}\n_torchrl_maxmin\n"
    run = subprocess.run(
        ["bash", "-c", script + 'echo "${COMPREPLY[@]}"'], capture_output=True, text=True, timeout=60
    )
    assert set(run.stdout.split()) == found
