"""Records of a seed, and the summary of several, on made-up results."""

import dataclasses
import json

import numpy as np
import pytest
from evaluation_results import NAMES, make_result, make_wins

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.evaluation import (
    SeedResult,
    group_win_rates,
    load_summary,
    summarise,
    write_report,
    write_summary,
)
from torchrl_maxmin.evaluation.policies import NO_INTERVAL
from torchrl_maxmin.stats import SCHEMA_VERSION


def test_record_survives_saving(tmp_path, results):
    results[1].save(tmp_path / "seed_1")
    loaded = SeedResult.load(tmp_path / "seed_1")
    assert loaded.seed == 1
    assert loaded.group_names == NAMES
    assert loaded.group_shares == results[1].group_shares
    assert loaded.extra == results[1].extra
    assert loaded.policies == results[1].policies
    for name in ("utilities", "kl", "length"):
        before, after = getattr(results[1], name), getattr(loaded, name)
        assert list(before) == list(after)
        for policy in before:
            np.testing.assert_array_equal(before[policy], after[policy])
            assert before[policy].dtype == after[policy].dtype
    assert summarise([loaded], num_resamples=50) == summarise([results[1]], num_resamples=50)


def test_loading_nothing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no saved result"):
        SeedResult.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"utilities": {"maxmin": np.zeros((4, 2, 2))}}, "no utilities for 'sft'"),
        ({"utilities": {"sft": np.zeros((4, 2, 3))}}, "must be"),
        ({"utilities": {"sft": np.zeros((4, 2, 2)), "b": np.zeros((5, 2, 2))}}, "utilities of 'b' must be"),
        ({"utilities": {"sft": np.full((4, 2, 2), np.nan)}}, "NaN or infinity"),
        ({"kl": {"sft": np.zeros((4, 3))}}, "kl of 'sft' must be"),
        ({"length": {"other": np.zeros((4, 2))}}, "which has no utilities"),
        ({"group_shares": [1.0]}, "1 shares"),
        ({"group_names": ["a", "a"]}, "repeat"),
        ({"wins": {"sft": np.zeros((4, 1, 2))}}, "give one of the two"),
        ({"utilities": {}}, "no utilities for 'sft'"),
        ({"utilities": {}, "wins": {"sft": np.zeros((4, 2, 2))}}, "P=1 policies"),
    ],
)
def test_bad_records_are_named(change, message):
    fields = {
        "seed": 0,
        "group_names": ["a", "b"],
        "group_shares": [0.5, 0.5],
        "utilities": {"sft": np.zeros((4, 2, 2))},
    }
    with pytest.raises(ValueError, match=message):
        SeedResult(**{**fields, **change})


def test_summary_schema(summary):
    assert summary["seeds"] == [0, 1, 2]
    assert summary["wall_seconds"] == 123.4
    assert summary["groups"] == [
        {"name": "sentiment", "share": pytest.approx(10 / 11), "users": 273},
        {"name": "conciseness", "share": pytest.approx(1 / 11), "users": 27},
    ]
    assert list(summary["policies"]) == ["sft", "single", "maxmin", "oracle"]
    for name, policy in summary["policies"].items():
        for against in ("win_rate_vs_sft", "win_rate_vs_single"):
            for group in NAMES:
                rate = policy[against][group]
                # a sum in another order: where the ends are equal, the last bits of a float64 need not be
                assert rate["low"] - 1e-12 <= rate["mean"] <= rate["high"] + 1e-12
        for key in ("worst_group_win_rate", "average_win_rate", "length"):
            assert isinstance(policy[key], float)
            assert policy[f"{key}_interval"]["low"] <= policy[f"{key}_interval"]["high"] + 1e-12
        assert set(policy["utility"]) == set(NAMES)
        assert [entry["seed"] for entry in policy["per_seed"]] == [0, 1, 2]
        assert (policy["kl"] is None) == (name == "sft")
    for key in ("worst_group_relative_gain", "average_relative_gain", "majority_relative_change"):
        assert isinstance(summary["comparison"][key], float)
        assert set(summary["comparison"][f"{key}_interval"]) == set(NO_INTERVAL)
        assert all(key in entry for entry in summary["comparison"]["per_seed"])
    assert set(summary["certificate"]) >= {"value", "low", "high", "reason"}


def test_summary_numbers_are_those_of_the_parts(summary, results):
    rates = group_win_rates(
        np.stack([r.utilities["maxmin"] for r in results]),
        np.stack([r.utilities["sft"] for r in results]),
        num_resamples=300,
    )
    maxmin, single = summary["policies"]["maxmin"], summary["policies"]["single"]
    for k, group in enumerate(NAMES):
        given = maxmin["win_rate_vs_sft"][group]
        assert (given["mean"], given["low"], given["high"]) == (rates.mean[k], rates.low[k], rates.high[k])
    compared = summary["comparison"]
    assert compared["worst_group_relative_gain"] == pytest.approx(
        maxmin["worst_group_win_rate"] / single["worst_group_win_rate"] - 1
    )
    assert compared["average_relative_gain"] == pytest.approx(
        maxmin["average_win_rate"] / single["average_win_rate"] - 1
    )
    assert compared["majority_relative_change"] == pytest.approx(
        maxmin["win_rate_vs_sft"]["sentiment"]["mean"] / single["win_rate_vs_sft"]["sentiment"]["mean"] - 1
    )
    assert compared["oracle_ratio"] == pytest.approx(
        maxmin["worst_group_win_rate"] / summary["policies"]["oracle"]["worst_group_win_rate"]
    )
    assert maxmin["kl"] == pytest.approx(np.mean([r.kl["maxmin"].mean() for r in results]))
    assert maxmin["length"] == pytest.approx(np.mean([r.length["maxmin"].mean() for r in results]))
    assert maxmin["utility"]["conciseness"] == pytest.approx(
        np.mean([r.utilities["maxmin"][..., 1].mean(dtype=np.float64) for r in results])
    )


def test_extra_is_aggregated(summary):
    em = summary["em"]
    assert em["user_accuracy"] == pytest.approx(0.98)
    assert em["user_accuracy_min"] == pytest.approx(0.97)
    assert em["num_groups_selected"] == 2
    assert em["head_accuracy"]["conciseness"] == pytest.approx(0.82)
    assert [entry["num_groups_selected"] for entry in em["per_seed"]] == [2, 2, 3]
    certificate = summary["certificate"]
    assert certificate["value"] == pytest.approx(0.2)
    assert (certificate["low"], certificate["high"], certificate["reason"]) == (0.05, 2.5, None)
    calibration = summary["calibration"]
    assert calibration["worst_group"] == {
        "sft_std": {"sentiment": 3},
        "win_rate": {"sentiment": 2, "conciseness": 1},
    }
    assert calibration["worst_group_changes"] is True
    assert calibration["seeds_where_it_changes"] == [1]
    assert summary["timings"] == {"ppo": 11.0}
    assert summary["extra"][2] == {"seed": 2, "note": "kept"}


def test_worst_group_by_convention_is_read_off_utilities():
    utilities = {
        "none": {"sentiment": 1.0, "conciseness": 2.0},
        "sft_std": {"sentiment": 2.0, "conciseness": 1.0},
    }
    out = summarise([make_result(0, extra={"calibration": {"utilities": utilities}})], num_resamples=20)
    assert out["calibration"]["worst_group"] == {"none": {"sentiment": 1}, "sft_std": {"conciseness": 1}}


def test_one_silent_certificate_silences_all(results):
    silent = {"certificate": {"value": None, "low": None, "high": None, "reason": "effective sample size 4"}}
    out = summarise([results[0], make_result(1, extra=silent)], num_resamples=20)["certificate"]
    assert (out["value"], out["low"], out["high"]) == (None, None, None)
    assert "seed 1: effective sample size 4" in out["reason"]


def test_the_weakest_statement_stands_for_all_seeds(tmp_path):
    numbers = {"value": 0.1, "low": 0.0, "high": 0.3, "reason": None}
    made = [
        make_result(
            seed, extra={"certificate": numbers | {"worth": w, "mass": 0.01 * w, "statement": f"say {w}"}}
        )
        for seed, w in enumerate((3.0, 2.0, 4.0))
    ]
    out = summarise(made, num_resamples=20)
    certificate = out["certificate"]
    assert (certificate["worth"], certificate["mass"], certificate["statement"]) == (2.0, 0.02, "say 2.0")
    assert [entry["statement"] for entry in certificate["per_seed"]] == ["say 3.0", "say 2.0", "say 4.0"]
    assert "samples cannot show (of the seed where it asks most):** say 2.0." in " ".join(
        write_report(tmp_path, out, figures=False).read_text().split()
    )


def test_summary_is_deterministic_whatever_the_order_of_seeds(tmp_path, results, summary):
    again = summarise(results[::-1], wall_seconds=123.4, num_resamples=300)
    one = write_summary(tmp_path / "a", summary).read_bytes()
    two = write_summary(tmp_path / "b", again).read_bytes()
    assert one == two
    assert json.loads(one) == {"schema_version": SCHEMA_VERSION, **summary}


def test_what_is_not_finite_becomes_null(tmp_path):
    lost = SeedResult(
        0, NAMES, [0.9, 0.1],
        {"sft": np.zeros((5, 1, 2)), "single": -np.ones((5, 1, 2)), "maxmin": np.ones((5, 1, 2))},
        extra={"em": {"heldout_log_likelihood": float("nan")}},
    )  # fmt: skip
    out = summarise([lost], num_resamples=20)
    assert out["comparison"]["worst_group_relative_gain"] is None
    assert out["em"]["heldout_log_likelihood"] is None
    text = write_summary(tmp_path, out).read_text()
    assert "NaN" not in text
    assert "Infinity" not in text
    assert "Not compared" in write_report(tmp_path, out, figures=False).read_text()


def test_single_seed_and_bare_policies(tmp_path):
    bare = SeedResult(7, NAMES, [0.5, 0.5], {"sft": np.zeros((5, 1, 2)), "maxmin": np.ones((5, 1, 2))})
    out = summarise([bare], num_resamples=20)
    assert out["seeds"] == [7]
    assert out["comparison"]["worst_group_relative_gain"] is None
    assert "oracle_ratio" not in out["comparison"]
    assert "win_rate_vs_single" not in out["policies"]["maxmin"]
    assert out["policies"]["maxmin"]["worst_group_win_rate"] == 1.0
    rate = out["policies"]["maxmin"]["win_rate_vs_sft"]["sentiment"]
    assert (rate["low"], rate["high"]) == (pytest.approx(1 - 0.5218, abs=1e-4), 1.0)  # 5 of 5, exact
    assert out["em"]["user_accuracy"] is None
    assert out["certificate"]["reason"] == "not computed"
    text = write_report(tmp_path, out, figures=False).read_text()
    assert "One seed" in text
    assert "not computed" in text


def test_policy_that_only_some_seeds_hold(results):
    out = summarise([results[0], make_result(1, oracle=False)], num_resamples=50)
    assert [entry["seed"] for entry in out["policies"]["oracle"]["per_seed"]] == [0]
    assert [entry["seed"] for entry in out["comparison"]["oracle_ratio_per_seed"]] == [0]
    assert [entry["seed"] for entry in out["comparison"]["per_seed"]] == [0, 1]


def test_results_of_comparisons(tmp_path):
    results, rates = zip(*(make_wins(seed) for seed in range(2)), strict=True)
    results[0].save(tmp_path / "saved")
    loaded = SeedResult.load(tmp_path / "saved")
    assert loaded.policies == ["sft", "single", "maxmin"]
    np.testing.assert_array_equal(loaded.win_matrix("maxmin", "single"), rates[0]["maxmin", "single"])
    np.testing.assert_allclose(loaded.win_matrix("single", "maxmin"), 1 - rates[0]["maxmin", "single"])
    out = summarise([loaded, results[1]], num_resamples=50)
    for pair in out["pairs"]:
        expected = np.mean([r[pair["policy"], pair["other"]].mean(0) for r in rates], axis=0)
        np.testing.assert_allclose([pair["win_rate"][name]["mean"] for name in NAMES], expected)
    assert out["policies"]["maxmin"]["utility_interval"]["sentiment"]["low"] is None
    assert out["comparison"]["worst_group_relative_gain"] is not None
    assert "n/a" in write_report(tmp_path, out, figures=False).read_text()
    with pytest.raises(ValueError, match="judged in two ways"):
        summarise([loaded, make_result(1)])


@pytest.mark.filterwarnings("ignore:a rate above")
def test_every_two_policies_are_compared(summary, results):
    pairs = {(pair["policy"], pair["other"]): pair for pair in summary["pairs"]}
    assert list(pairs) == [
        ("single", "sft"), ("maxmin", "sft"), ("oracle", "sft"), ("maxmin", "single"), ("oracle", "single"),
        ("oracle", "maxmin"),
    ]  # fmt: skip
    for (policy, other), pair in pairs.items():
        rates = group_win_rates(
            np.stack([r.utilities[policy] for r in results]),
            np.stack([r.utilities[other] for r in results]),
            num_resamples=300,
        )
        for k, name in enumerate(NAMES):
            assert pair["win_rate"][name] == rates.groups.to_dict(k)
        assert pair["worst_group_win_rate_interval"] == rates.worst_group.to_dict()


def test_length_that_earns_the_utility_is_seen():
    rng = np.random.default_rng(0)
    length = rng.integers(5, 50, (40, 3)).astype(float)
    longer = np.stack([length, rng.normal(size=length.shape)], axis=-1)
    result = SeedResult(0, NAMES, [0.5, 0.5], {"sft": longer}, length={"sft": length})
    found = summarise([result], num_resamples=50)["policies"]["sft"]["length_correlation"]
    assert found["sentiment"]["mean"] == pytest.approx(1.0)
    assert abs(found["conciseness"]["mean"]) < 0.4
    single = SeedResult(0, NAMES, [0.5, 0.5], {"sft": longer[:, :1]}, length={"sft": length[:, :1]})
    found = summarise([single], num_resamples=50)["policies"]["sft"]["length_correlation"]
    assert "one sample a prompt" in found["sentiment"]["reason"]


def test_seeds_that_do_not_belong_together_are_named(results):
    with pytest.raises(ValueError, match="no seed results"):
        summarise([])
    with pytest.raises(ValueError, match="seeds repeat"):
        summarise([results[0], results[0]])
    with pytest.raises(ValueError, match="held-out prompts"):
        summarise([results[0], make_result(1, num_prompts=41)])
    other = SeedResult(5, NAMES[::-1], [0.1, 0.9], results[1].utilities)
    with pytest.raises(ValueError, match="name other groups"):
        summarise([results[0], other])


def without_averages_over_people(summary):
    """Take from a summary, and return it, what version 3 brought."""
    del summary["shares_are"]
    compared = summary["comparison"]
    for entry in (*summary["policies"].values(), compared, *compared["per_seed"]):
        for key in [key for key in entry if key.startswith("average_over_") or key in ("changes", "people")]:
            del entry[key]
    for policy in summary["policies"].values():
        for row in policy["per_seed"]:
            del row["average_over_groups"], row["average_over_people"]
    return summary


def test_averages_are_over_groups_and_over_people(results):
    """Recomputed sample by sample, with shares that differ from seed to seed."""
    shares = [[0.9, 0.1], [10 / 11, 1 / 11], [0.7, 0.3]]
    given = [dataclasses.replace(r, group_shares=s) for r, s in zip(results, shares, strict=True)]
    summary = summarise(given, num_resamples=50)
    over_people = {}
    for name in ("sft", "single", "maxmin"):
        by_seed = []
        for result, share in zip(given, shares, strict=True):
            pairs = list(zip(result.utilities[name], result.utilities["sft"], strict=True))
            rates = [
                np.mean(
                    [[(a[g] > b[g]) + (a[g] == b[g]) / 2 for a in one for b in two] for one, two in pairs]
                )
                for g in range(2)
            ]
            by_seed.append((np.mean(rates), share[0] * rates[0] + share[1] * rates[1]))
        found = summary["policies"][name]
        groups, over_people[name] = np.mean(by_seed, axis=0)
        assert found["average_over_groups"] == found["average_win_rate"] == pytest.approx(groups, abs=1e-12)
        assert found["average_over_people"] == pytest.approx(over_people[name], abs=1e-12)
        for row, (groups, people) in zip(found["per_seed"], by_seed, strict=True):
            assert row["average_over_groups"] == pytest.approx(groups, abs=1e-12)
            assert row["average_over_people"] == pytest.approx(people, abs=1e-12)
        ends = found["average_over_people_interval"]
        assert ends["low"] <= found["average_over_people"] <= ends["high"]
    compared = summary["comparison"]
    assert compared["average_over_groups_relative_change"] == compared["average_relative_gain"]
    assert compared["average_over_people_relative_change"] == pytest.approx(
        over_people["maxmin"] / over_people["single"] - 1, abs=1e-12
    )
    assert compared["changes"]["sentiment"]["high"] < 0 < compared["changes"]["conciseness"]["low"]
    lost, won = np.mean(shares, axis=0)
    assert compared["people"] == {
        "gain": pytest.approx(won), "lose": pytest.approx(lost), "unsure": pytest.approx(0)
    }  # fmt: skip


def test_people_of_a_group_that_may_have_changed_either_way_are_unsure(results):
    same = [
        dataclasses.replace(r, utilities={**r.utilities, "maxmin": r.utilities["single"]}, kl={}, length={})
        for r in results
    ]
    compared = summarise(same, num_resamples=50)["comparison"]
    assert compared["people"] == {"gain": 0, "lose": 0, "unsure": pytest.approx(1)}


def test_an_older_summary_is_read_by_todays_names(tmp_path, summary):
    """Version 1: ``low`` was the bootstrap's end, ``t_low`` the one to read, an interval had no mean."""

    def old(value, key=""):
        if isinstance(value, list):
            return [old(item) for item in value]
        if not isinstance(value, dict):
            return value
        out = {name: old(item, name) for name, item in value.items()}
        if "bootstrap_low" in out and (out["method"] or "t")[0] == "t":
            out |= {"t_low": out["low"], "t_high": out["high"]}
            out |= {"low": out.pop("bootstrap_low"), "high": out.pop("bootstrap_high")}
            del out["method"]
        return out

    before = without_averages_over_people(json.loads(json.dumps(old(summary | {"pairs": []}))))
    for policy in before["policies"].values():
        for key in ("kl", "length", "worst_group_win_rate", "average_win_rate"):
            policy[f"{key}_interval"].pop("mean", None)
        for interval in policy["utility_interval"].values():
            del interval["mean"]
    (tmp_path / "summary.json").write_text(json.dumps(before))
    loaded = load_summary(tmp_path)
    assert loaded["schema_version"] == SCHEMA_VERSION
    maxmin, now = loaded["policies"]["maxmin"], summary["policies"]["maxmin"]
    for name in NAMES:
        assert maxmin["win_rate_vs_sft"][name] == {**now["win_rate_vs_sft"][name], "method": "t"}
        assert maxmin["utility_interval"][name] == {**now["utility_interval"][name], "method": "t"}
    assert maxmin["kl_interval"] == {**now["kl_interval"], "method": "t"}
    gain = "worst_group_relative_gain_interval"
    assert loaded["comparison"][gain] == {**summary["comparison"][gain], "method": "t"}
    expected = json.loads(json.dumps(summary | {"pairs": []}))
    without_averages_over_people(expected)
    for name, policy in expected["policies"].items():
        people = summary["policies"][name]["average_over_people"]
        for key in ("average_over_groups", "average_over_groups_interval"):
            policy[key] = summary["policies"][name][key]
        policy["average_over_people_interval"] = {**NO_INTERVAL, "mean": people}
        assert loaded["policies"][name]["average_over_people"] == pytest.approx(people, abs=1e-12)
    compared, given = expected["comparison"], summary["comparison"]
    for key in ("average_over_groups_relative_change", "average_over_people_relative_change"):
        compared |= {key: given[key], f"{key}_interval": given[f"{key}_interval"]}
    compared["average_over_people_relative_change_interval"] = {**NO_INTERVAL, "mean": None}
    for row in compared["per_seed"]:
        row["average_over_groups_relative_change"] = row["average_relative_gain"]
    one, two = (
        write_report(tmp_path / str(i), each, figures=False).read_text()
        for i, each in enumerate([loaded, expected | {"shares_are": "given"}])
    )
    assert one == two


def test_a_summary_that_cannot_be_read_is_named(tmp_path, summary):
    with pytest.raises(UserError, match=r"no summary\.json"):
        load_summary(tmp_path)
    (tmp_path / "summary.json").write_text(json.dumps(summary | {"schema_version": SCHEMA_VERSION + 1}))
    with pytest.raises(UserError, match="schema_version"):
        load_summary(tmp_path)
    write_summary(tmp_path, summary)
    assert load_summary(tmp_path) == {"schema_version": SCHEMA_VERSION, **summary}
