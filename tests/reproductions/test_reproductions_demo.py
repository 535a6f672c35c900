"""The committed figures of the demo, recomputed from the committed utilities of every sample."""

import json

import numpy as np
import pytest
from scripts import REPRODUCTIONS


def utilities(folder):
    """Policy -> [N, M, G] and the shares, seed by seed, read without the package."""
    for result in sorted((REPRODUCTIONS / folder / "results").iterdir()):
        record = json.loads((result / "result.json").read_text())
        with np.load(result / "arrays.npz") as arrays:
            found = {
                policy: arrays[f"utilities/{policy}"].astype(np.float64) for policy in record["policies"]
            }
        yield found, np.array(record["group_shares"])


def win_rates(policy, sft):
    """Win rate by group [G]: every sample against every one of sft's on the same prompt, ties one half."""
    differences = policy[:, :, None, :] - sft[:, None, :, :]
    return ((np.sign(differences) + 1) / 2).mean((0, 1, 2))


@pytest.mark.parametrize(("folder", "seeds"), [("demo-10-1", 6), ("demo-80-20", 3)])
def test_averages_over_groups_and_people_are_those_of_the_samples(folder, seeds):
    summary = json.loads((REPRODUCTIONS / folder / "summary.json").read_text())
    assert summary["shares_are"] == "true"
    found = list(utilities(folder))
    assert len(found) == seeds == len(summary["seeds"])
    people = {}
    for name, policy in summary["policies"].items():
        rates = [win_rates(arrays[name], arrays["sft"]) for arrays, _ in found]
        people[name] = np.mean([share @ rate for rate, (_, share) in zip(rates, found, strict=True)])
        assert policy["average_over_people"] == pytest.approx(people[name], abs=1e-12)
        assert policy["average_over_groups"] == pytest.approx(np.mean(rates), abs=1e-12)
        assert policy["worst_group_win_rate"] == pytest.approx(np.mean(rates, axis=0).min(), abs=1e-12)
    change = summary["comparison"]["average_over_people_relative_change"]
    assert change == pytest.approx(people["maxmin"] / people["single"] - 1, abs=1e-12)
