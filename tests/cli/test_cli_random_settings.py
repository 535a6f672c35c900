"""Whatever the settings and however small the data: a stage runs to its end, or one line says why not."""

from pathlib import Path

import pytest
from cli_files import write_rows
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from torchrl_maxmin.cli.main import main

pytestmark = pytest.mark.slow

MANY = settings(
    max_examples=300,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
WELFARES = ["soft_min", "kl_ball", "chi2_ball", "cvar", "nash", "alpha_fair", "generalized_gini"]
ADVERSARIES = ["hard_min", "exponentiated_gradient", "projected_gradient"]
POLICY = {
    "welfare": ["egalitarian", "utilitarian", *WELFARES],
    "welfare_parameter": [0.01, 0.5, 2],
    "adversary": ADVERSARIES,
    "adversary_step_size": [0, 10],
    "adversary_optimistic": ["true"],
    "tau": [0.001, 10],
    "num_ppo_epochs": [1, 2],
    "mini_batch_size": [1, 3, 64],
    "learning_rate": [0, 1e-2, 1.0],
    "critic_learning_rate": [0, 1.0],
    "warmup_iterations": [0, 9],
    "cliprange": [0.01, 1],
    "cliprange_value": [0, 0.2],
    "lam": [0, 1],
    "gamma": [0, 0.9],
    "entropy_coeff": [0, 0.01],
    "max_grad_norm": [".inf", 1e-3],
    "save_steps": [0, 1],
}
LANGUAGE = POLICY | {
    "objective": ["mean_of_mins", "mean_of_prompt_mins"],
    "calibration": ["sft_mean", "win_rate", "none"],
    "beta": [0, 5],
    "kl_estimator": ["k2", "k3"],
    "kl_controller": ["adaptive"],
    "num_iterations": [1, 3],
    "num_generations": [2, 4],
    "temperature": [0.1, 5],
    "response_length": [1, 8],
    "max_prompt_length": [1, 2],
    "missing_eos_penalty": [0, 10],
    "gap_steps": [1],
}
ENVIRONMENT = POLICY | {
    "env_id": ["fishwood-v0", "fruit-tree-v0", "resource-gathering-v0"],
    "env_backend": ["batched", "gym"],
    "objective": ["mean_of_mins"],
    "observation": ["one_hot", "scale", "none"],
    "num_envs": [1, 4],
    "max_episode_steps": [1, 5, 20],
    "utility_scale": [1e-6, 100],
    "shares": ["[1, 0]", "[1, 2, 3]"],
    "hidden_sizes": ["[]", "[1]"],
}
REWARD = {
    "num_groups": ["auto", "1", "3"],
    "heldout_fraction": [0, 0.5, 0.9],
    "ties": ["halve"],
    "assignment": ["hard"],
    "head": ["mlp", "low_rank"],
    "num_restarts": [1],
    "calibration": ["sft_mean", "win_rate", "none"],
    "identifiability": ["false"],
    "use_true_groups": ["true"],
    "use_peft": ["true"],
    "pooling": ["last", "mean"],
    "text_layout": ["chat", "concat", "response"],
    "save_rounds": [1],
}
DIAGNOSE = {
    "num_groups": ["auto", "1", "3"],
    "heldout_fraction": [0, 0.9],
    "num_folds": [2, 9],
    "num_jackknife": [0, 3],
    "num_bootstrap": [0, 2],
    "l2": ["[1e-8]", "[1, 1000]"],
}


def some_of(choices):
    return st.fixed_dictionaries(
        {}, optional={name: st.sampled_from(values) for name, values in choices.items()}
    )


completions = st.lists(st.sampled_from(["was", "great", "dull", "."]), max_size=3).map(" ".join)
pairs = st.lists(
    st.fixed_dictionaries(
        {
            "prompt": st.sampled_from(["", "the film", "a story"]),
            "chosen": completions,
            "rejected": completions,
            "user_id": st.sampled_from(["ann", "bob", "eve", "dan"]),
        },
        optional={"group": st.sampled_from(["x", "y"])},
    ).filter(lambda row: row["chosen"] != row["rejected"]),
    min_size=1,
    max_size=16,
)


@pytest.fixture
def runs_or_says_why(tmp_path_factory, capsys, monkeypatch):
    """Run a stage in a folder of its own; a traceback, or more than a line of error, fails."""

    def run(verb, flags, rows=()):
        folder = tmp_path_factory.mktemp("run")
        monkeypatch.chdir(folder)
        write_rows(folder / "rows.jsonl", rows)
        Path("judge.py").write_text(
            "def score(prompts, completions):\n"
            "    return [[len(text) % 7 / 7, text.count('e') / 3] for text in completions]\n"
        )
        words = [str(word) for name, value in flags.items() for word in (f"--{name}", value)]
        code = main([verb, *words, "--output_dir", "out", "--device", "cpu"])
        event(f"exit code {code}")
        lines = capsys.readouterr().err.splitlines()
        assert code == 0 or (code == 2 and len(lines) == 1), lines
        assert (Path("out") / "summary.json").is_file() == (code == 0)

    return run


@MANY
@given(some_of(LANGUAGE))
def test_ppo(runs_or_says_why, tiny_model, chosen):
    base = {
        "model_name_or_path": tiny_model,
        "dataset_name": "rows.jsonl",
        "reward_funcs": "judge:score",
        "num_iterations": 2,
        "rollout_batch_size": 4,
        "response_length": 4,
        "calibration_prompts": 2,
        "certificate_samples": 4,
        "certificate_prompts": 16,
    }
    prompts = [{"prompt": text} for text in ("the film", "a story", "the")]
    runs_or_says_why("ppo", base | chosen, prompts)


@MANY
@given(some_of(ENVIRONMENT))
def test_ppo_in_an_environment(runs_or_says_why, chosen):
    base = {"env_id": "gridworld", "num_envs": 2, "frames_per_batch": 120, "total_frames": 240}
    runs_or_says_why("ppo", base | {"mini_batch_size": 60, "eval_episodes": 2} | chosen)


@MANY
@given(some_of(REWARD), pairs)
def test_reward(runs_or_says_why, tiny_model, chosen, rows):
    base = {
        "model_name_or_path": tiny_model,
        "dataset_name": "rows.jsonl",
        "num_rounds": 2,
        "steps_per_round": 2,
        "calibration_prompts": 4,
        "response_length": 4,
    }
    runs_or_says_why("reward", base | chosen, rows)


@MANY
@given(some_of(DIAGNOSE), pairs)
def test_diagnose(runs_or_says_why, tiny_model, chosen, rows):
    base = {"model_name_or_path": tiny_model, "dataset_name": "rows.jsonl", "num_bootstrap": 2}
    runs_or_says_why("diagnose", base | chosen, rows)
