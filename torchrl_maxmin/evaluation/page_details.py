"""Sections of the page of an evaluation on what the results rest on."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrl_maxmin.evaluation.policies import NO_INTERVAL
from torchrl_maxmin.evaluation.tables import group_names
from torchrl_maxmin.evaluation.texts import calibration_texts, certificate_texts
from torchrl_maxmin.pages import Cell, Figures, Section, Table, Term, Text

__all__ = [
    "calibration_section",
    "certificate_section",
    "groups_section",
    "plain_name",
    "sizes_section",
    "stability_section",
]


def plain_name(text: Any, most: int = 0) -> str:
    """Leave a name as it is: the template makes it safe."""
    return str(text)


def sizes_section(summary: Mapping[str, Any], figures: Figures) -> list[Section]:
    """Tabulate utility, KL, length, and how far length explains utility."""
    policies = summary["policies"]
    if not all("length_correlation" in policy for policy in policies.values()):
        return []
    names = group_names(summary)
    rows: list[list[Any]] = []
    for policy in policies:
        utility = []
        for name in names:
            known = policies[policy]["utility_interval"][name] != NO_INTERVAL
            path = ("policies", policy, "utility_interval", name)
            utility.append(figures.interval(".3f", *path) if known else Cell("n/a"))
        kl = figures.interval(".2f", "policies", policy, "kl_interval")
        length = figures.interval(".1f", "policies", policy, "length_interval")
        with_length = [
            figures.interval("+.2f", "policies", policy, "length_correlation", name) for name in names
        ]
        rows.append([policy, *utility, kl, length, *with_length])
    header: list[str | Term] = [
        "policy",
        *(Term(f"utility, {name}", "utility") for name in names),
        Term("KL (nats)", "kl"),
        "length",
    ]
    header += [f"length with utility, {name}" for name in names]
    blocks: list[Any] = [Table("Utility, KL and length with their intervals", header, rows)]
    reasons = {
        e["reason"] for p in policies.values() for e in p["length_correlation"].values() if e.get("reason")
    }
    if reasons:
        blocks.append(Text("No correlation: " + "; ".join(sorted(reasons)) + "."))
    meaning = ("What responses are worth, how far policies moved from the reference, and whether length "
    "alone explains "
               "it: a correlation near 1 or -1 says that it does.")  # fmt: skip
    return [
        Section("sizes", "Utility, KL and length", meaning, blocks, ("utility", "kl", "nats", "bootstrap"))
    ]


def certificate_section(summary: Mapping[str, Any]) -> Section:
    """Say how far from the optimum the policy is."""
    meaning = "How far from the best possible policy for its worst group the policy is at most."
    terms = ("certificate", "duality_gap", "maxmin")
    return Section("certificate", "Certificate", meaning, certificate_texts(summary, plain_name), terms)


def calibration_section(summary: Mapping[str, Any]) -> list[Section]:
    """Say whether the worst group depends on the scale."""
    texts = calibration_texts(summary, plain_name)
    meaning = "Whether it depends on a choice of scale which group counts as the worst."
    return (
        [Section("calibration", "Calibration", meaning, texts, ("calibration", "convention"))]
        if texts
        else []
    )


def groups_section(summary: Mapping[str, Any], figures: Figures) -> Section:
    """Say how sure it is who belongs to which group."""
    em = summary["em"]
    rows: list[list[Any]] = []
    labels = {
        "user_accuracy": ("users in the right group, mean over seeds", ".3f"),
        "user_accuracy_min": ("users in the right group, worst seed", ".3f"),
        "num_groups_selected": ("number of groups", ".0f"),
        "heldout_log_likelihood": (Term("held-out log-likelihood, nats a pair", "heldout"), ".3f"),
    }
    for key, (label, spec) in labels.items():
        if em.get(key) is not None:
            rows.append([label.text if isinstance(label, Term) else label, figures.number(spec, "em", key)])
    for key, what in (
        ("head_accuracy", "head accuracy"),
        ("head_correlation", "head's correlation with the truth"),
    ):
        found = em.get(key) or []
        for place in found if isinstance(found, Mapping) else range(len(found)):
            head = place if isinstance(place, str) else f"group {place}"
            rows.append([f"{what}, {head}", figures.number(".3f", "em", key, place)])
    blocks: list[Any] = []
    if rows:
        blocks.append(Table("What the groups rest on", ["", "value"], rows))
    else:
        blocks.append(Text("No reward mixture was given (--reward_model_path), so that nothing is known "
        "of how the "
                           "groups were found."))  # fmt: skip
    counted = [group for group in summary["groups"] if group["users"] is not None]
    if counted:
        blocks.append(
            Text("Users: " + ", ".join(f"{group['name']} {group['users']}" for group in counted) + ".")
        )
    terms = ("heldout", "nats", "head_accuracy", "established", "misassigned")
    return Section("found", "Groups", "How sure it is who belongs to which group.", blocks, terms)


def stability_section(summary: Mapping[str, Any], figures: Figures) -> Section:
    """Say whether the same would be found again."""
    blocks: list[Any] = []
    compared = summary["comparison"]
    rows = compared.get("changes_per_seed", [])
    if len(rows) > 1:
        same = [
            g["name"] for g in summary["groups"] if len({row["changes"][g["name"]] > 0 for row in rows}) == 1
        ]
        blocks.append(Text(f"The sign of the change is the same in all {len(rows)} seeds for {len(same)} of "
                           f"{len(summary['groups'])} groups."))  # fmt: skip
    elif len(summary["seeds"]) == 1:
        blocks.append(
            Text(
                "There is one seed: whether another training would give the same is not known.",
                important=True,
            )
        )
    found = [
        (n, extra["groups_found"])
        for n, extra in enumerate(summary.get("extra", []))
        if extra.get("groups_found")
    ]
    cells = []
    for n, entry in found:
        state = {True: "established", False: "not established", None: "not asked"}[entry.get("established")]
        agreement = "n/a"
        if entry.get("agreement"):
            agreement = figures.interval(".2f", "extra", n, "groups_found", "agreement")  # type: ignore[assignment]
        cells.append(
            [
                f"seed {summary['extra'][n]['seed']}",
                state,
                agreement,
                "; ".join(entry.get("reasons") or []) or "none",
            ]
        )
    if cells:
        header: list[str | Term] = ["", Term("groups", "established")]
        header += ["found again by refits (adjusted Rand index)", "doubts"]
        blocks.append(Table("Whether the groups are found again", header, cells, words=True))
    changes = (summary.get("calibration") or {}).get("worst_group_changes")
    if changes is not None:
        what = "changes with the" if changes else "is the same under every"
        blocks.append(Text(f"The worst group {what} convention of scale."))
    meaning = "Whether the same would be found with another seed, other users or another convention."
    return Section(
        "stability",
        "Stability",
        meaning,
        blocks or [Text("Nothing was measured.")],
        ("stability", "established"),
    )
