"""Say in plain words what an evaluation shows, and no more than its intervals carry.

The report, the page, the model card and the terminal all show what :func:`verdict` says.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torchrl_maxmin.evaluation.comparison import MAXMIN
from torchrl_maxmin.evaluation.policies import BASELINE, NO_INTERVAL
from torchrl_maxmin.evaluation.results import REFERENCE
from torchrl_maxmin.pages import KINDS, Line, Verdict
from torchrl_maxmin.stats.text import interval_text, number_text

__all__ = [
    "SHARES",
    "compared_policies",
    "direction",
    "judge_kinds",
    "not_established",
    "nothing_claimed",
    "people_text",
    "seeds_text",
    "verdict",
]

#: Whose shares weigh the people.
SHARES = {
    "true": "the true shares",
    "found": "the shares that were found",
    "equal": "equal shares, as the judge has none, so that both averages are one",
    "given": "the shares given",
}

_MOST_NAMES = 3  # of groups in the headline
_VERBS = {"gain": ("gains", "gain"), "lose": ("loses", "lose")}
_OVER = {
    "average_over_people": "Over people (each group weighted by {})",
    "average_over_groups": "Over groups (each counted once)",
}


def verdict(summary: Mapping[str, Any], show: Callable[[Any], str] = str) -> Verdict:
    """Answer who gains and who pays, by groups and over all people.

    A group gains, or loses, where the interval of its change leaves 0 out; otherwise it is not decided.
    Nothing is claimed on groups that were found and are not established.

    Args:
        summary: What :func:`~torchrl_maxmin.evaluation.summary.summarise` returned.
        show: Makes names safe for where the verdict is shown.

    Example:
        >>> verdict({"policies": {"sft": {}}}).headline
        'Only sft was evaluated: there is nothing to compare.'
    """
    policy, baseline = compared_policies(summary)
    if policy is None:
        return Verdict(f"Only {REFERENCE} was evaluated: there is nothing to compare.")
    doubts = not_established(summary)
    if nothing_claimed(summary):
        why = "; ".join(show(reason) for reason in doubts or ()) or "they do not beat one reward for all"
        headline = "Nothing is claimed: the groups that were found are not established."
        return Verdict(headline, [Line("unsure", f"Why: {why}."), *_notes(summary)])
    groups = _by_group(summary, policy, baseline)
    ordered = sorted(groups, key=lambda group: KINDS.index(group["kind"]))
    lines = [_group_line(group, policy, baseline, show) for group in ordered]
    averages, totals = _averages(summary, policy, baseline, show)
    notes = _notes(summary)
    if doubts is not None:
        notes.insert(0, Line("note", "The groups that the policy was trained for are not established: it may "
                             "serve others than the groups that are judged here."))  # fmt: skip
    headline = _headline(groups, averages["average_over_people"], policy, baseline, show)
    return Verdict(headline, [*lines, *totals, *notes])


def compared_policies(summary: Mapping[str, Any]) -> tuple[str | None, str]:
    """Return the policy that the verdict is about, or None, and the one that it is held against."""
    policies = summary["policies"]
    others = [name for name in policies if name != REFERENCE]
    if not others:
        return None, REFERENCE
    policy = MAXMIN if MAXMIN in policies else others[-1]
    both = policy == MAXMIN and BASELINE in policies and summary["comparison"].get("people") is not None
    return policy, BASELINE if both else REFERENCE


def direction(interval: Mapping[str, Any], line: float = 0.0) -> str:
    """Say what an interval decides: ``gain``, ``lose`` or ``unsure``.

    Example:
        >>> direction({"low": 0.1, "high": 0.2}), direction({"low": None, "high": None})
        ('gain', 'unsure')
    """
    low, high = interval["low"], interval["high"]
    if low is None or high is None or low <= line <= high:
        return "unsure"
    return "gain" if low > line else "lose"


def judge_kinds(summary: Mapping[str, Any]) -> set[str | None]:
    """Return what kinds of judge there were."""
    return {extra.get("judge") for extra in summary.get("extra", [])}


def not_established(summary: Mapping[str, Any]) -> list[str] | None:
    """Return why groups that were found are not established in some seed; None where nothing says so."""
    found = [extra.get("groups_found") or {} for extra in summary.get("extra", [])]
    doubted = [entry for entry in found if entry.get("established") is False]
    return [reason for entry in doubted for reason in entry.get("reasons", [])] if doubted else None


def nothing_claimed(summary: Mapping[str, Any]) -> bool:
    """Say whether the groups that are judged are those that were found, and are not established."""
    return not_established(summary) is not None and judge_kinds(summary) == {"reward heads"}


def people_text(summary: Mapping[str, Any]) -> str | None:
    """Say how many people are in groups that gain and lose; None where nothing is known or claimed."""
    people = summary["comparison"].get("people")
    if not people or nothing_claimed(summary):
        return None
    unsure = f", {people['unsure']:.0%} in one whose interval holds 0" if people["unsure"] else ""
    gain, lose = f"{people['gain']:.0%}", f"{people['lose']:.0%}"
    return f"{gain} of the people are in a group that gains, {lose} in one that loses{unsure}."


def seeds_text(summary: Mapping[str, Any]) -> str:
    """Count the seeds in words."""
    return "1 seed" if len(summary["seeds"]) == 1 else f"{len(summary['seeds'])} seeds"


def _by_group(summary: Mapping[str, Any], policy: str, baseline: str) -> list[dict[str, Any]]:
    found = []
    rates = {name: summary["policies"][name]["win_rate_vs_sft"] for name in (policy, baseline)}
    changes = summary["comparison"]["changes"] if baseline == BASELINE else None
    for group in summary["groups"]:
        name = group["name"]
        change = None if changes is None else changes[name]
        own = rates[policy][name]
        kind = direction(own, 0.5) if change is None else direction(change)
        found.append(group | {"kind": kind, "change": change, "rate": own, "before": rates[baseline][name]})
    return found


def _people(share: float) -> str:
    return f"{share:.0%} of people"


def _group_line(group: Mapping[str, Any], policy: str, baseline: str, show: Callable[[Any], str]) -> Line:
    kind, name = group["kind"], show(group["name"])
    who = f"{name} ({_people(group['share'])})"
    if group["change"] is None:
        what = {
            "gain": f"prefers {show(policy)} to {REFERENCE}",
            "lose": f"prefers {REFERENCE} to {show(policy)}",
            "unsure": f"not decided between {show(policy)} and {REFERENCE}",
        }[kind]
        return Line(
            kind, f"{who} {what}: win rate {interval_text(group['rate'])}, where 0.5 is no preference."
        )
    before, after = (number_text(group[key]["mean"], ".3f") for key in ("before", "rate"))
    change = interval_text(group["change"], "+.3f")
    moves = f"its win rate against {REFERENCE} is {after} under {policy}, {before} under {baseline}"
    what = _VERBS[kind][0] if kind in _VERBS else "is not decided"
    return Line(kind, f"{who} {what}: {moves}, a change of {change}.")


def _averages(
    summary: Mapping[str, Any], policy: str, baseline: str, show: Callable[[Any], str]
) -> tuple[dict[str, str], list[Line]]:
    """Return what each average decides, and a line for each."""
    kinds, lines = {}, []
    own = summary["policies"][policy]
    for key, label in _OVER.items():
        over = label.format(SHARES[summary["shares_are"]])
        if baseline == REFERENCE:
            rate = own[f"{key}_interval"]
            kinds[key] = kind = direction(rate, 0.5)
            text = f"{over}: the win rate of {show(policy)} against {REFERENCE} is {interval_text(rate)}"
        else:
            change = summary["comparison"].get(f"{key}_change_interval") or NO_INTERVAL
            before = summary["policies"][baseline]
            kinds[key] = kind = direction(change)
            rates = [number_text(entry[key], ".3f") for entry in (own, before)]
            text = f"{over}: {rates[0]} under {policy}, {rates[1]} under {baseline}"
            text += (
                ", without an interval"
                if change["mean"] is None
                else f", a change of {interval_text(change, '+.3f')}"
            )
        lines.append(Line(kind, text + (", which is not decided." if kind == "unsure" else ".")))
    return kinds, lines


def _headline(
    groups: Sequence[Mapping[str, Any]], people: str, policy: str, baseline: str, show: Callable[[Any], str]
) -> str:
    parts = []
    for kind, verbs in _VERBS.items():
        there = [group for group in groups if group["kind"] == kind]
        if there:
            parts.append(f"{_who(there, show)} {verbs[len(there) > 1]}")
    unsure = [group for group in groups if group["kind"] == "unsure"]
    if unsure:
        parts.append(f"for {_who(unsure, show)} it is not decided")
    over = {"gain": "win rates rise", "lose": "win rates fall", "unsure": "it is not decided"}[people]
    found = f"{', '.join(parts[:-1])} and {parts[-1]}" if len(parts) > 1 else parts[0]
    return f"With {show(policy)} in place of {show(baseline)}, {found}; over all people, {over}."


def _who(groups: Sequence[Mapping[str, Any]], show: Callable[[Any], str]) -> str:
    if len(groups) > _MOST_NAMES:
        return f"{len(groups)} groups ({_people(sum(group['share'] for group in groups))})"
    return " and ".join(f"{show(group['name'])} ({_people(group['share'])})" for group in groups)


def _notes(summary: Mapping[str, Any]) -> list[Line]:
    count, confidence = len(summary["seeds"]), summary["confidence"]
    first = "One seed: this is about the policies of this run, and says nothing of another run."
    if count > 1:
        first = f"{count} seeds: the intervals hold the chance of training, too."
    lines = [f"{first} Each is a {confidence:.0%} interval by itself, not all of them at once."]
    kinds = judge_kinds(summary)
    if kinds == {"world"}:
        lines.append(
            "The world is synthetic and its conflict was chosen: the size of the effect says nothing of "
            "people."
        )
    if kinds == {"reward heads"}:
        lines.append("The judge is a reward model, not people: where the policies were trained on it, "
        "win rates "
                     "are optimistic.")  # fmt: skip
    return [Line("note", line) for line in lines]
