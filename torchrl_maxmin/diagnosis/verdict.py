"""Say in plain words whether one reward serves, and what it costs whom."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchrl_maxmin.pages import Line, Verdict
from torchrl_maxmin.stats.text import interval_text

__all__ = ["page_verdict", "repeats_text", "verdict"]


def repeats_text(count: int) -> str:
    """Say what became of pairs that repeat one another."""
    return f"{count:,} pairs repeat an earlier pair of the same user and count with it as one judgement."


def verdict(summary: Mapping[str, Any], show: Callable[[str], str] = str) -> str:
    """Answer in one sentence: does one reward serve?

    Args:
        summary: What ``diagnose`` found.
        show: Makes names safe for where the sentence is shown.
    """
    if summary["one_reward_serves"]:
        sentence = (
            "One reward serves: the users do not differ as far as these data can tell, and diversity, "
            "epsilon and alignment gap are 0."
        )
        accuracy = summary["groups"][0]["accuracy"]["single"] or {"low": None}
        if accuracy["low"] is None or not accuracy["low"] > 0.5:  # NaN with one user
            sentence += " That is little: the reward is not seen to rank held-out pairs better than chance."
        return sentence
    given = " (asked for, not chosen)" if summary["choice"] is None else ""
    if summary["num_groups"] > 1 and not summary["established"]:
        why = "; ".join(map(show, summary["evidence"]["reasons"]))
        not_there = "are NOT established, and nothing is claimed on them"
        return f"{summary['num_groups']} groups{given} {not_there}: {why}."
    if summary["one_reward_serves"] is None:
        if summary["choice"] is not None and summary["choice"]["beats_coin"] is False:
            return "Nothing is learned of these users: no reward predicts left-out users better than a coin."
        why = "one group was asked for" if summary["choice"] is None else "too few users to look for more"
        return f"Whether one reward serves was not asked: {why}."
    worst = max(summary["groups"], key=lambda group: group["alignment_gap"]["single"]["mean"])
    single, maxmin = (interval_text(worst["alignment_gap"][name]) for name in ("single", "maxmin"))
    share = f"{worst['share']['mean']:.0%}"
    return (
        f"{summary['num_groups']} groups{given}, diversity up to {summary['diversity']['largest']:.3f}. One "
        f"reward for all costs {show(worst['name'])} ({share} of the users) {single} of utility "
        f"against its own best policy, in deviations of its reward; MaxMin costs it {maxmin}."
    )


def page_verdict(summary: Mapping[str, Any], show: Callable[[str], str] = str) -> Verdict:
    """Put what :func:`verdict` says under one plain sentence, with what each group loses beside it.

    Args:
        summary: What ``diagnose`` found.
        show: Makes names safe for where the sentence is shown.
    """
    whole = Line("note", verdict(summary, show))
    if summary["one_reward_serves"]:
        return Verdict("One reward serves these people, as far as these data can tell.", [whole])
    if summary["num_groups"] > 1 and not summary["established"]:
        return Verdict("Nothing is claimed on groups: those that were found are not established.", [whole])
    if summary["one_reward_serves"] is None:
        return Verdict("Whether one reward serves these people is not decided.", [whole])
    lines, kinds = [], []
    for group in summary["groups"]:
        gaps = group["alignment_gap"]
        single, maxmin = (interval_text(gaps[name]) for name in ("single", "maxmin"))
        kinds.append(_direction(gaps["single"], gaps["maxmin"]))
        what = {"gain": "loses less under MaxMin", "lose": "loses more under MaxMin", "unsure": "not decided"}
        text = (
            f"{_who(group, show)}: {what[kinds[-1]]}, {maxmin} of utility against {single} under one reward."
        )
        lines.append(Line(kinds[-1], text))
    groups = summary["groups"]
    worst = max(range(len(groups)), key=lambda k: groups[k]["alignment_gap"]["single"]["mean"])
    gap = groups[worst]["alignment_gap"]["single"]
    if gap["low"] is None or gap["low"] <= 0:
        return Verdict("That one reward for all costs a group something is not decided.", [*lines, whole])
    headline = f"One reward for all costs {_who(groups[worst], show)} {interval_text(gap, '.2f')} of utility"
    paying = [group for group, kind in zip(groups, kinds, strict=True) if kind == "lose"]
    if kinds[worst] == "gain":
        headline += "; MaxMin costs it less"
        if paying:
            headline += f", and {' and '.join(_who(group, show) for group in paying)} more"
    return Verdict(headline + ".", [*lines, whole])


def _who(group: Mapping[str, Any], show: Callable[[str], str]) -> str:
    return f"{show(group['name'])} ({group['share']['mean']:.0%} of the users)"


def _direction(single: Mapping[str, Any], maxmin: Mapping[str, Any]) -> str:
    """Say which loss is the smaller; ``unsure`` where the two intervals meet, or one has no ends."""
    ends = [single["low"], single["high"], maxmin["low"], maxmin["high"]]
    if None in ends:
        return "unsure"
    return "gain" if ends[3] < ends[0] else "lose" if ends[1] < ends[2] else "unsure"
