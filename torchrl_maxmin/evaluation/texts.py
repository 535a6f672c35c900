"""Paragraphs about an evaluation that ``report.md`` and the page share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torchrl_maxmin.evaluation.verdict import judge_kinds, seeds_text
from torchrl_maxmin.pages import Text
from torchrl_maxmin.stats.text import ends_text, interval_text

__all__ = [
    "NOT_ESTABLISHED",
    "WORST_OF_PAIRS",
    "calibration_texts",
    "caveats",
    "certificate_texts",
    "description",
    "oracle_text",
]

Show = Callable[..., str]

_SENTENCE = 2000  # characters shown of what is longer than a name

#: What stands over figures by group where nothing is claimed on the groups.
NOT_ESTABLISHED = (
    "The groups are not established: figures by group may be chance, and say nothing of anybody."
)

#: What the worst group says where two policies meet.
WORST_OF_PAIRS = (
    "Here 0.5 means that a group has no preference between the two policies. The worst group's rate is small "
    "wherever the two serve different groups, and small both ways round: it says that some group prefers the "
    "other policy, not that the first is bad. Against sft, above, it says who is left behind."
)


def description(summary: Mapping[str, Any], show: Show) -> str:
    """Say what was done, and how the numbers are to be read."""
    groups = " and ".join(f"{show(group['name'])} ({group['share']:.0%})" for group in summary["groups"])
    policies = ", ".join(map(show, summary["policies"]))
    wall, judged = summary.get("wall_seconds"), judge_kinds(summary) & {"endpoint", "comparisons"}
    took = "" if wall is None else f" The whole run took {wall:.0f} s."
    source = "t intervals over seeds with the component of the prompts that they share"
    if len(summary["seeds"]) == 1:
        source = "t intervals over prompts, as there is one seed"
    who = "a group's judge, asked in both orders, prefers" if judged else "a group's own utility prefers"
    return (
        f"Policies ({policies}) were trained with {seeds_text(summary)} "
        f"({', '.join(map(str, summary['seeds']))}) for a population of {groups}, and each was sampled on "
        f"the same {summary['num_prompts']} held-out prompts. A win rate is how often {who} the policy's "
        "sample to the sft policy's on the same prompt, over all pairs of samples, ties counting one half. "
        f"Intervals are {summary['confidence']:.0%} {source}.{took}"
    )


def oracle_text(summary: Mapping[str, Any]) -> str | None:
    """Compare the worst group with MaxMin on the true utilities, and say how many seeds that rests on."""
    compared = summary["comparison"]
    if compared.get("oracle_ratio") is None:
        return None
    count = len(compared.get("oracle_ratio_per_seed") or summary["seeds"])
    rests = (
        "One seed: the interval holds the prompts alone, and two trainings of the same policy differ by more."
    )
    if count > 1:
        rests = f"{count} seeds."
    ratio = interval_text(compared["oracle_ratio_interval"])
    return f"Worst group relative to MaxMin on the true utilities: {ratio}. {rests}"


def certificate_texts(summary: Mapping[str, Any], show: Show) -> list[Text]:
    """Say how far from the optimum the policy is at most, or why that cannot be said."""
    certificate = summary["certificate"]
    if certificate["value"] is None:
        reason = show(str(certificate["reason"]).rstrip("."), _SENTENCE)
        return [Text(f"No certificate of the distance to the max-min optimum: {reason}.")]
    several = " (mean; smallest low and largest high over seeds)" if len(summary["seeds"]) > 1 else ""
    found = Text(
        f"The worst group's utility is within {certificate['value']:.3f} "
        f"{ends_text(certificate, '.3f')} of the best that any policy can give its worst group{several}."
    )
    if not certificate.get("statement"):  # of an earlier version
        return [found, Text("Modes that nobody sampled are not certified.")]
    whose = " (of the seed where it asks most)" if several else ""
    statement = show(certificate["statement"], _SENTENCE)
    return [found, Text(f"This rests on what samples cannot show{whose}: {statement}.", important=True)]


def calibration_texts(summary: Mapping[str, Any], show: Show) -> list[Text]:
    """Say on what scale groups were compared, and whether the worst one depends on it; [] where unknown."""
    calibration = summary.get("calibration")
    if not calibration or not calibration["worst_group"]:
        return []
    used = f" Training used {show(calibration['used'])}." if calibration.get("used") else ""
    texts = [
        Text(
            "Preferences fix a reward only up to an offset and a scale, so a minimum over groups needs a "
            f"convention.{used}"
        )
    ]
    if calibration.get("used") == "none":
        texts.append(
            Text(
                "Uncalibrated: a constant added to a head, or an offset of its own for every prompt, leaves "
                "the likelihood of all preferences as it is and changes whom this policy was trained for.",
                important=True,
            )
        )
    if calibration["worst_group_changes"]:
        seeds = ", ".join(map(str, calibration["seeds_where_it_changes"]))
        texts.append(
            Text(
                f"The worst group changes with the convention (seeds {seeds}): who is protected is then a "
                "choice of scale, not a finding.",
                important=True,
            )
        )
    else:
        texts.append(Text("The worst group is the same under every convention."))
    found = "; ".join(
        f"under {show(convention)} it is "
        + ", ".join(f"{show(group)} (in {count})" for group, count in sorted(counts.items()))
        for convention, counts in calibration["worst_group"].items()
    )
    texts.append(Text(f"The worst group in the number of seeds named: {found}."))
    return texts + _offsets(calibration.get("offsets"), show)


def _offsets(offsets: Mapping[str, Any] | None, show: Show) -> list[Text]:
    if not offsets or offsets["wrong_worst_group"] is None:
        return []
    sizes = ", ".join(
        f"{size:.2f} ({show(name)})" for name, size in offsets["deviation"].items() if size is not None
    )
    taken = "were taken off" if offsets["by_prompt"] else "stay in the rewards"
    chance = offsets["wrong_worst_group"]
    return [
        Text(
            f"Offsets by prompt, which {taken}, deviate by {sizes} within-prompt deviations. What is left of "
            f"them makes a rollout of {offsets['num_prompts']:.0f} prompts name another worst group with "
            f"probability {f'{chance:.3f}' if chance >= 0.001 else 'under .001'} (largest over seeds): "
            "often where groups are level, which costs no more than they are apart."
        )
    ]


def caveats(summary: Mapping[str, Any], show: Show) -> list[str]:
    """List what a reader must know before the numbers are used."""
    count = len(summary["seeds"])
    seeds = (
        "One seed: intervals hold prompts only, and say nothing about another training run."
        if count == 1
        else f"{count} seeds are few: the bootstrap over few seeds (bootstrap_low and bootstrap_high in "
        "summary.json) is too narrow: simulated, a nominal 95% covers .86 to .89 with 3 seeds, .92 to .94 "
        "with 6. The t intervals (low and high), which stand in the tables, cover .95 to .97, for "
        "relative changes .93."
        if count < 10
        else f"{count} seeds: chance in training is measured by these alone."
    )
    noted: dict[str, list[str]] = {}  # policies whose intervals may be too narrow
    for name, policy in summary["policies"].items():
        for note in policy.get("notes", []):
            if "biased low" not in note and "one seed" not in note:
                noted.setdefault(note, []).append(name)
    return [
        *_about_the_judge(summary, show),
        "The minimum over groups of noisy win rates is biased low, most where groups are close. The "
        "interval of the worst group allows for the closeness of the groups.",
        seeds,
        *(f"{', '.join(map(show, names))}: {show(note, _SENTENCE)}." for note, names in noted.items()),
    ]


def _about_the_judge(summary: Mapping[str, Any], show: Show) -> list[str]:
    kinds = judge_kinds(summary)
    if kinds == {"world"}:
        return [
            "The world is synthetic and its conflict between groups was chosen. The size of the effect is "
            "a fact about this world, not about people.",
            "Win rates use the groups' true utilities, which training never sees.",
        ]
    if kinds == {"reward heads"}:
        return [
            "The judge is a reward mixture. Where the policies were trained on it, win rates are "
            "optimistic: a policy learns its judge's mistakes too."
        ]
    lines = ["Win rates are what the judge says; they are as good as the judge."]
    for extra in summary.get("extra", []):
        if extra.get("judge_first_place"):
            bias = ", ".join(
                f"{show(name)} {value:+.3f}" for name, value in extra["judge_first_place"].items()
            )
            lines.append(
                f"Both orders were asked. What stood first won oftener by (seed {extra['seed']}): {bias}."
            )
    return lines
