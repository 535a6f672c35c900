"""Report, table and figures of made-up results."""

import builtins
import csv
import doctest
import importlib
import io
import subprocess
import sys

import pytest
from evaluation_results import NAMES, make_histories, make_result
from rich.console import Console

from torchrl_maxmin.evaluation import plot_training, plot_win_rates, rich_table, summarise, write_report

MODULES = ["gap", "judges", "plots", "policies", "report", "results", "summary"]


def test_report_holds_the_numbers(tmp_path, summary):
    path = write_report(tmp_path, summary, histories=make_histories(), title="Demo")
    text = path.read_text()
    assert text.startswith("# Demo")
    for policy in summary["policies"].values():
        for group in NAMES:
            rate = policy["win_rate_vs_sft"][group]
            assert f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" in text
            utility, ends = policy["utility"][group], policy["utility_interval"][group]
            assert f"{utility:.3f} [{ends['low']:.3f}, {ends['high']:.3f}]" in text
            length = policy["length_correlation"][group]
            assert f"{length['mean']:+.2f} [{length['low']:+.2f}, {length['high']:+.2f}]" in text
        assert f"{policy['worst_group_win_rate']:.3f}" in text
        assert f"{policy['average_win_rate']:.3f}" in text
    compared = summary["comparison"]
    for key in ("worst_group_relative_gain", "average_relative_gain", "majority_relative_change"):
        assert f"{compared[key]:+.1%}" in text
    assert f"{compared['oracle_ratio']:.3f}" in text
    assert "0.980 (worst seed 0.970)" in text
    assert "0.200 [0.050, 2.500]" in text
    assert "The worst group changes with the convention" in text
    assert "Uncalibrated" not in text
    for pair in summary["pairs"]:
        for rate in pair["win_rate"].values():
            assert f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" in text
    for caveat in ("what the judge says", "biased low", "3 seeds are few", "single: a rate above 0.9"):
        assert caveat in text
    for name in ("win_rates", "training"):
        assert f"](figures/{name}.png)" in text
        assert (tmp_path / "figures" / f"{name}.png").is_file()


def test_terminal_table(summary):
    table = rich_table(summary)
    assert table.row_count == len(summary["policies"])
    output = io.StringIO()
    Console(file=output, width=160).print(table)
    for policy in summary["policies"].values():
        rate = policy["win_rate_vs_sft"]["conciseness"]
        assert f"{rate['mean']:.3f} [{rate['low']:.3f}, {rate['high']:.3f}]" in output.getvalue()


def test_win_rate_figure_and_its_numbers(tmp_path, summary):
    png, svg, table = plot_win_rates(summary, tmp_path / "deep" / "win_rates")
    assert png.read_bytes().startswith(b"\x89PNG")
    assert "<svg" in svg.read_text()
    rows = list(csv.DictReader(table.open()))
    averages = {"average over groups": "average_over_groups", "average over people": "average_over_people"}
    assert [(row["policy"], row["group"]) for row in rows] == [
        (policy, group) for policy in ("single", "maxmin", "oracle") for group in (*NAMES, *averages)
    ]
    for row in rows:
        policy = summary["policies"][row["policy"]]
        average = averages.get(row["group"])
        rate = policy["win_rate_vs_sft"][row["group"]] if average is None else policy[f"{average}_interval"]
        assert [float(row[key]) for key in ("mean", "low", "high")] == [
            rate["mean"],
            rate["low"],
            rate["high"],
        ]
    again = plot_win_rates(summary, tmp_path / "again")
    assert again[1].read_bytes() == svg.read_bytes()


def test_training_figure_and_its_numbers(tmp_path):
    histories = make_histories(num_seeds=2, length=6)
    paths = plot_training(histories, tmp_path / "training", group_names=NAMES)
    assert all(path.stat().st_size > 0 for path in paths)
    rows = list(csv.DictReader(paths[2].open()))
    assert len(rows) == 2 * 6 * 2 + 2 * 6 * 4
    row = next(
        r for r in rows
        if (r["policy"], r["seed_index"], r["iteration"]) == ("maxmin", "1", "3")
        and r["metric"] == "rewards/0/mean"
    )  # fmt: skip
    assert float(row["value"]) == pytest.approx(1.3)
    one_seed = {policy: runs[0] for policy, runs in histories.items()}
    assert len(plot_training(one_seed, tmp_path / "one")) == 3


def test_one_reward_for_all_has_no_weights(tmp_path):
    """Its one weight, 1, is that of everybody, and no group's."""
    histories = make_histories()
    histories["single"] = [[row | {"maxmin/weights/0": 1.0} for row in run] for run in histories["single"]]
    rows = list(csv.DictReader(plot_training(histories, tmp_path / "training")[2].open()))
    weighted = {row["policy"] for row in rows if row["metric"].startswith("maxmin/weights")}
    assert weighted == {"maxmin"}


def test_runs_of_different_lengths_are_drawn(tmp_path):
    histories = {"maxmin": [make_histories(length=n)["maxmin"][0] for n in (3, 5)]}
    rows = list(csv.DictReader(plot_training(histories, tmp_path / "training")[2].open()))
    assert len(rows) == (3 + 5) * 4


def test_drawing_changes_no_global_setting(tmp_path, summary):
    import matplotlib

    before = dict(matplotlib.rcParams)
    plot_win_rates(summary, tmp_path / "win_rates")
    assert dict(matplotlib.rcParams) == before


def test_nothing_to_draw_is_named(tmp_path):
    with pytest.raises(ValueError, match="nothing to draw"):
        plot_training({"maxmin": [{"loss": 1.0}]}, tmp_path / "x")
    with pytest.raises(ValueError, match="no policy to draw"):
        plot_win_rates({"policies": {"sft": {}}, "groups": []}, tmp_path / "x")
    with pytest.raises(ValueError, match="1 group names for 2 groups"):
        plot_training(make_histories(), tmp_path / "x", group_names=["a"])


def test_missing_matplotlib_names_the_extra(tmp_path, summary, monkeypatch):
    real_import = builtins.__import__

    def no_matplotlib(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real_import(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", no_matplotlib)
    with pytest.raises(ImportError, match=r"torchrl-maxmin\[plot\]"):
        plot_win_rates(summary, tmp_path / "x")
    monkeypatch.setattr("torchrl_maxmin.evaluation.plots.find_spec", lambda name: None)
    text = write_report(tmp_path, summary).read_text()
    assert "Matplotlib is missing" in text
    assert "figures/win_rates.png" not in text


def test_importing_needs_no_matplotlib():
    code = "import sys, torchrl_maxmin.evaluation; print('matplotlib' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "False"


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name):
    module = importlib.import_module(f"torchrl_maxmin.evaluation.{name}")
    assert doctest.testmod(module).failed == 0


@pytest.mark.parametrize(("judge", "told"), [("world", "synthetic"), ("reward heads", "optimistic")])
def test_report_says_who_judged(tmp_path, judge, told):
    summary = summarise([make_result(0, extra={"judge": judge})], num_resamples=20)
    assert told in write_report(tmp_path, summary).read_text()


def test_report_warns_of_an_uncalibrated_minimum(tmp_path):
    utilities = {"none": {"sentiment": 0.1, "conciseness": 0.2}}
    extra = {"calibration": {"used": "none", "utilities": utilities}}
    summary = summarise([make_result(0, extra=extra)], num_resamples=20)
    assert "Uncalibrated" in write_report(tmp_path, summary).read_text()
