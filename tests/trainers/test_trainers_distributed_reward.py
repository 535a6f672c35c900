"""Several processes fit the reward mixture that one fits, wherever the users are split."""

import csv
import dataclasses
import json
from pathlib import Path

import pytest
import torch
from ranks import assert_same_parameters, on_ranks

from torchrl_maxmin.clustering.em import log_likelihood_by_user
from torchrl_maxmin.core.distributed import process_group, sum_over_ranks
from torchrl_maxmin.preferences import PreferenceDataset
from torchrl_maxmin.rewards.pairs import PairTokens
from torchrl_maxmin.trainers.reward import RewardConfig, run_reward
from torchrl_maxmin.world.world import sample_reviews

#: pairs of four users: half of the 63 are the first one's, so that a process has it, and the other the others
COUNTS = (31, 11, 11, 10)
#: on any processor
BAR = 1e-4


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    rows, user = [], [u for u, count in enumerate(COUNTS) for _ in range(count)]
    for (prompt, rest), who in zip(sample_reviews(sum(COUNTS), seed=1), user, strict=True):
        words = f"{prompt} {rest}".split()
        longer, shorter = " ".join(words), " ".join(words[: len(words) // 2])
        chosen, rejected = (longer, shorter) if who in (0, 2) else (shorter, longer)
        rows.append({"prompt": "the film", "chosen": chosen, "rejected": rejected, "worker": who})
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def fit_all(configs):
    for values in configs:
        run_reward(RewardConfig(**values))


CASES = {
    "soft": {},
    "hard": {"assignment": "hard", "gradient_accumulation_steps": 2},
    "mlp": {"head": "mlp", "gradient_checkpointing": True, "calibration": "win_rate"},
    "adapters": {"use_peft": True, "lora_r": 4, "gradient_checkpointing": True},
}
COPIES_ALONE = {"auto": {"num_groups": "auto", "max_groups": 2}}


def run_on_ranks(world, mode, cases, tiny_model, pairs, folder, **settings):
    """Run cases with batches of 16 pairs; returns their folders."""
    base = {
        "num_groups": 2, "num_rounds": 3, "steps_per_round": 4, "learning_rate": 3e-4,
        "head_learning_rate": 1e-3, "num_restarts": 2, "device": "cpu", "eval_dataset_name": pairs,
        "response_length": 5, "calibration_prompts": 21, "scoring_batch_size": 10, "distributed": mode,
        "identifiability": False,
    }  # fmt: skip
    configs = {}
    for name, case in cases.items():
        values = base | case | settings
        values["per_device_train_batch_size"] = 16 // world // values.get("gradient_accumulation_steps", 1)
        values.setdefault("output_dir", str(folder / f"{mode}-{world}" / name))
        configs[name] = RewardConfig(tiny_model, pairs, **values)
    on_ranks(world, fit_all, [dataclasses.asdict(config) for config in configs.values()])
    return {name: Path(config.output_dir) for name, config in configs.items()}


def responsibilities(folder):
    with (folder / "groups.csv").open() as file:
        return [
            [float(value) for key, value in row.items() if not key.startswith("user")]
            for row in csv.DictReader(file)
        ]


def assert_same_rounds(figures, wanted, bar=BAR):
    for row, other in zip(figures["history"], wanted["history"], strict=True):
        assert row.pop("em/repaired_groups") == other.pop("em/repaired_groups")
        assert row == pytest.approx(other, abs=bar)


def assert_same_fit(found, expected, bar=BAR):
    for path in expected.glob("*.safetensors"):
        assert_same_parameters(found / path.name, path, bar)
    for mine, theirs in zip(responsibilities(found), responsibilities(expected), strict=True):
        assert mine == pytest.approx(theirs, abs=bar)
    figures, wanted = (json.loads((folder / "summary.json").read_text()) for folder in (found, expected))
    assert_same_rounds(figures, wanted, bar)
    assert figures["heldout"]["log_likelihood"] == pytest.approx(wanted["heldout"]["log_likelihood"], abs=bar)
    scales = [
        json.loads((folder / "mixture.json").read_text())["calibration"] for folder in (found, expected)
    ]
    assert scales[0]["shift"] == pytest.approx(scales[1]["shift"], abs=bar)
    assert scales[0]["scale"] == pytest.approx(scales[1]["scale"], abs=bar)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("reward")


@pytest.fixture(scope="module")
def on_one(tiny_model, pairs, folder):
    return run_on_ranks(1, "ddp", CASES | COPIES_ALONE, tiny_model, pairs, folder)


def test_one_process_of_torchrun_fits_what_one_by_itself_does(on_one, tiny_model, pairs, folder):
    """But for the calibration, for which other responses are drawn."""
    alone = run_on_ranks(1, "none", {"soft": {}}, tiny_model, pairs, folder)["soft"]
    figures, wanted = (json.loads((path / "summary.json").read_text()) for path in (on_one["soft"], alone))
    assert_same_rounds(figures, wanted)


def test_two_copies_fit_what_one_fits(on_one, tiny_model, pairs, folder):
    for name, found in run_on_ranks(2, "ddp", CASES | COPIES_ALONE, tiny_model, pairs, folder).items():
        assert_same_fit(found, on_one[name])


def test_two_parts_fit_what_one_fits(on_one, tiny_model, pairs, folder):
    for name, found in run_on_ranks(2, "fsdp2", CASES, tiny_model, pairs, folder).items():
        assert_same_fit(found, on_one[name])


def test_rounds_go_on_with_any_number_of_processes(on_one, tiny_model, pairs, folder):
    whole = run_on_ranks(2, "fsdp2", {"saved": {"save_rounds": 1}}, tiny_model, pairs, folder)["saved"]
    assert_same_fit(whole, on_one["soft"])
    assert len(list((whole / "checkpoint-2").glob("shards/*.safetensors"))) == 2
    last = (whole / "summary.json").read_text()
    case = {"again": {"resume_from_checkpoint": "checkpoint-2", "output_dir": str(whole)}}
    run_on_ranks(1, "fsdp2", case, tiny_model, pairs, folder)
    assert_same_fit(whole, on_one["soft"])
    run_on_ranks(2, "fsdp2", case, tiny_model, pairs, folder)
    assert (whole / "summary.json").read_text() == last


def likelihoods(path, margins):
    with process_group("ddp"):
        data = PreferenceDataset.load(path)
        tokens = PairTokens(data, lambda prompts, texts: [[1]] * len(texts), 0)
        own = tokens.own_log_likelihood(margins[_share(len(data))])
        return own.tolist(), sum_over_ranks(own).tolist()


def _share(num_pairs):
    from torchrl_maxmin.core.distributed import share_of_rows

    return share_of_rows(num_pairs)[0]


def test_log_likelihoods_are_summed_over_processes_before_bayes_rule(pairs):
    """The second user's choices lie with both processes, and each process alone knows other users."""
    data = PreferenceDataset.load(pairs)
    margins = torch.randn(len(data), 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (one, total), (other, again) = on_ranks(2, likelihoods, pairs, margins)
    expected = log_likelihood_by_user(margins, data.user_offsets)
    torch.testing.assert_close(torch.tensor(total), expected.float(), atol=1e-5, rtol=1e-6)
    assert total == again
    assert [sum(user) != 0 for user in one] == [True, True, False, False]
    assert [sum(user) != 0 for user in other] == [False, True, True, True]
