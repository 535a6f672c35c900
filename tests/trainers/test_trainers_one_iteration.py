"""How much a reader of PPO goes through: the functions of one iteration of a language model."""

import sys
from collections import defaultdict
from pathlib import Path

import torch

import torchrl_maxmin
from torchrl_maxmin.core.run import MetricsLog
from torchrl_maxmin.rewards import RewardMixture
from torchrl_maxmin.trainers.lm_ppo import run_ppo

PACKAGE = Path(torchrl_maxmin.__file__).parent
COMPREHENSIONS = ("<listcomp>", "<genexpr>", "<dictcomp>", "<setcomp>")
#: what PPO is given and calls: the rewards, the adversary, the log and the bar
GIVEN = ("rewards/", "welfare/", "core/")


def functions_of_an_iteration(config, monkeypatch):
    """The functions {file: names} from one log entry to the next."""
    seen, write = defaultdict(set), MetricsLog.write
    entries = []

    def own(frame):
        path = Path(frame.f_code.co_filename)
        return path.relative_to(PACKAGE).as_posix() if path.is_relative_to(PACKAGE) else ""

    def profile(frame, event, _):
        code, file = frame.f_code, own(frame)
        if event != "call" or not file or code.co_name in COMPREHENSIONS:
            return
        caller = frame.f_back
        while not own(caller).startswith(GIVEN) and caller.f_code.co_name != "train":
            caller = caller.f_back
        place = (
            file if caller.f_code.co_name == "train" else f"{own(caller)} -> {file}"
        )  # in the insides of what is given
        seen[place].add((code.co_qualname, code.co_firstlineno))

    def watched(*args):
        write(*args)
        entries.append(args)
        sys.setprofile(profile if len(entries) == 1 else None)

    monkeypatch.setattr(MetricsLog, "write", watched)
    seen["trainers/ppo.py"].add(("train", 0))  # runs already when the first entry is written
    seen["core/run.py"].add(("MetricsLog.write", 0))
    run_ppo(config)
    assert len(entries) == 2
    return seen


def test_an_iteration_goes_through_few_files_and_functions(make_config, tiny_model, tmp_path, monkeypatch):
    torch.manual_seed(0)
    RewardMixture.from_causal_lm(tiny_model, 2).save_pretrained(tmp_path / "reward")
    config = make_config(num_iterations=2, reward_funcs=[], reward_model_path=str(tmp_path / "reward"))
    seen = functions_of_an_iteration(config, monkeypatch)
    own = {file: names for file, names in seen.items() if not file.startswith(GIVEN)}
    assert {"trainers/ppo.py", "trainers/learner.py"} < set(own)  # the counter sees the iteration
    listing = "\n".join(f"{file}: {sorted(name for name, _ in own[file])}" for file in sorted(own))
    assert len(own) <= 12, listing
    assert sum(map(len, own.values())) <= 57, listing  # eight let nothing wait for the device
    whole = {(place.split(" -> ")[-1], name) for place, names in seen.items() for name, _ in names}
    assert len({file for file, _ in whole}) <= 26
    assert len(whole) <= 96  # of them some ten say how many processes there are
