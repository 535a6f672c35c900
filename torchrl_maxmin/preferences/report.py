"""One screen about preference data, and what will go wrong with them later."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_maxmin.core.progress import late_bar
from torchrl_maxmin.core.text_escape import terminal
from torchrl_maxmin.preferences.schemas.pairs import Origin

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["DataReport", "check_pairs"]

FEW_PAIRS = 5  # with fewer, most users cannot be placed in a group
LONG_CHARACTERS = 4096  # about 1024 tokens, where the reward stage cuts by default
_BATCH_ROWS = 5_000
_NAME, _SENTENCE = 60, 500  # characters shown


@dataclass(frozen=True)
class DataReport:
    """Findings of :meth:`PreferenceDataset.check`.

    Attributes:
        layout: how the data are laid out.
        rows: rows of the source.
        pairs: pairs that train.
        users: users with a pair.
        pairs_per_user: smallest, lower quartile, median, upper quartile, largest.
        prompts: distinct prompts that are not empty.
        shared_prompts: share of them that two or more users judged.
        ties: ties met; dropped, or halved where ``ties_kept``.
        ties_kept: whether each tie became two pairs of weight 1/2.
        identical: pairs left out because both texts are equal.
        beyond_cap: pairs left out because a user had more than the cap.
        alone: ratings left out because no other of their user was left to compare with.
        better: which way scores point.
        likelihood: what the pairs are taken for: rankings, first choices, pairs.
        judgement_sizes: responses of a judgement: smallest, quartiles, largest.
        rankings: judgements of three or more responses.
        duplicates: pairs that repeat an earlier pair of the same user word for word.
        repeats: pairs that repeat one either way round; with it they count as one judgement.
        contradicted: different pairs that a user chose both ways, halved ties apart.
        distinct_pairs: pairs that differ in prompt, chosen or rejected text.
        empty_responses: empty chosen or rejected texts.
        empty_prompts: pairs without a prompt.
        long_texts: texts (prompt and response) longer than :data:`LONG_CHARACTERS` characters.
        longest_text: characters of the longest.
        columns: role of every column that is used.
        ignored: columns that are not.
        groups: users of every true group, where the data have them.
        warnings: what to know or mend, one sentence each.
    """

    layout: str
    rows: int
    pairs: int
    users: int
    pairs_per_user: tuple[float, float, float, float, float]
    prompts: int
    shared_prompts: float
    ties: int
    ties_kept: bool
    identical: int
    beyond_cap: int
    alone: int
    better: str
    likelihood: str
    judgement_sizes: tuple[float, float, float, float, float]
    rankings: int
    duplicates: int
    repeats: int
    contradicted: int
    distinct_pairs: int
    empty_responses: int
    empty_prompts: int
    long_texts: int
    longest_text: int
    columns: dict[str, str]
    ignored: list[str]
    groups: dict[str, int]
    warnings: list[str] = field(default_factory=list)

    def lines(self) -> list[tuple[str, str]]:
        """Name and value of every figure that is worth a line."""
        low, q1, median, q3, high = self.pairs_per_user
        roles: dict[str, list[str]] = {}
        for path, role in self.columns.items():
            roles.setdefault(role, []).append(terminal(path, _NAME))
        used = "; ".join(f"{role}: {', '.join(paths)}" for role, paths in roles.items())
        left_out = {
            f"{self.identical:,} identical": self.identical,
            f"{self.beyond_cap:,} beyond the cap of pairs": self.beyond_cap,
            f"{self.alone:,} ratings without another value to compare": self.alone,
        }
        least, s1, s2, s3, most = self.judgement_sizes
        lines = [
            ("layout", self.layout),
            ("rows", f"{self.rows:,}"),
            ("pairs", f"{self.pairs:,}"),
            ("users", f"{self.users:,}"),
            ("better", terminal(self.better)),
            ("likelihood", self.likelihood),
            ("judged at once", f"quartiles {s1:g} / {s2:g} / {s3:g} responses, from {least:g} to {most:g}"),
            ("pairs per user", f"quartiles {q1:g} / {median:g} / {q3:g}, from {low:g} to {high:g}"),
            ("prompts", f"{self.prompts:,} distinct, {self.shared_prompts:.0%} seen by two or more users"),
            ("ties", f"{self.ties:,} {'halved' if self.ties_kept else 'dropped'}"),
            ("rankings", f"{self.rankings:,} of three or more responses" if self.rankings else ""),
            ("left out", ", ".join(told for told, count in left_out.items() if count)),
            ("duplicates", f"{self.duplicates:,}{self._contradictions()}"),
            ("empty", f"{self.empty_responses:,} responses, {self.empty_prompts:,} prompts"),
            ("longest text", f"{self.longest_text:,} characters"),
            ("columns used", used),
            ("columns ignored", ", ".join(terminal(name, _NAME) for name in self.ignored)),
            (
                "true groups",
                ", ".join(f"{terminal(name, _NAME)} {count:,}" for name, count in self.groups.items()),
            ),
        ]
        return [(name, value) for name, value in lines if value]

    def _contradictions(self) -> str:
        return f", {self.contradicted:,} pairs chosen both ways" if self.contradicted else ""

    def __str__(self) -> str:
        figures = [f"{name:<17}{value}" for name, value in self.lines()]
        return "\n".join(figures + [f"! {terminal(sentence, _SENTENCE)}" for sentence in self.warnings])

    def __rich__(self) -> RenderableType:
        from rich.console import Group
        from rich.table import Table
        from rich.text import Text

        figures = Table.grid(padding=(0, 2))
        figures.add_column(min_width=15)
        for name, value in self.lines():
            figures.add_row(Text(name, style="bold"), Text(value))
        warnings = Table.grid(padding=(0, 1))
        for sentence in self.warnings:
            warnings.add_row(Text("!", style="bold yellow"), Text(terminal(sentence, _SENTENCE)))
        return Group(figures, warnings) if self.warnings else figures


def check_pairs(data: Any) -> DataReport:
    """Look at every pair of a :class:`PreferenceDataset` once and say what is there."""
    origin = data.origin
    texts = _scan(data)
    users = data.users_of_rows
    prompted = texts.prompt != hash("")
    prompts, seen_by = np.unique(_distinct(texts.prompt[prompted], users[prompted])[:, 0], return_counts=True)
    given = data.pairs.weights[data.rows]
    comparisons = np.bincount(np.unique(data.ranking_ids, return_inverse=True)[1], weights=given)
    likelihood, sizes = _likelihood(data)
    report = DataReport(
        layout=origin.layout,
        rows=origin.rows,
        pairs=len(data),
        users=data.num_users,
        pairs_per_user=tuple(np.quantile(np.diff(data.offsets), (0, 0.25, 0.5, 0.75, 1)).tolist()),
        prompts=len(prompts),
        shared_prompts=float((seen_by > 1).sum() / max(1, len(prompts))),
        ties=origin.ties,
        ties_kept=origin.options.ties == "halve",
        identical=origin.identical,
        beyond_cap=origin.beyond_cap,
        alone=origin.alone,
        better=_better(origin),
        likelihood=likelihood,
        judgement_sizes=tuple(np.quantile(sizes, (0, 0.25, 0.5, 0.75, 1)).tolist()),
        rankings=int((comparisons > 1).sum()),  # two responses have one comparison, or two halves
        duplicates=len(data) - len(_distinct(texts.pair, users)),
        repeats=data.judgements.num_repeats,
        contradicted=data.judgements.num_contradicted,
        distinct_pairs=len(np.unique(texts.pair)),
        empty_responses=texts.empty_responses,
        empty_prompts=texts.empty_prompts,
        long_texts=texts.long,
        longest_text=texts.longest,
        columns=origin.columns,
        ignored=origin.ignored,
        groups=dict(Counter(data.groups or ()).most_common()),
    )
    report.warnings.extend(_warnings(report, origin))
    return report


def _likelihood(data: Any) -> tuple[str, np.ndarray]:
    """Name the likelihood of every kind of judgement; and the responses of each judgement."""
    starts = data.choice_bounds[:-1]
    rows = np.diff(data.choice_bounds)
    halves = data.pairs.weights[data.rows][starts] < 1
    _, which = np.unique(data.ranking_ids[starts], return_inverse=True)
    strict = np.bincount(which, ~halves)
    least = np.full(len(strict), np.iinfo(np.int64).max)
    np.minimum.at(least, which[~halves], rows[~halves])
    sizes = np.where(strict > 0, strict + least, 2).astype(
        np.int64
    )  # the last choice is of all that are left
    if data.origin.pair_by_pair:
        return f"Bradley-Terry over {len(data):,} pairs, as if they were independent", sizes
    ranked, best = strict > 1, (strict == 1) & (sizes > 2)
    single, halved = ((strict == 1) & (sizes == 2)).sum(), halves.sum() // 2
    kinds = {
        f"Plackett-Luce over {_of(ranked, sizes, 'rankings')}": ranked.any(),
        f"Luce over {_of(best, sizes, 'first choices')}": best.any(),
        f"Bradley-Terry over {single:,} pairs": single,
        f"half of either order of {halved:,} ties": halved,
    }
    return "; ".join(name for name, count in kinds.items() if count), sizes


def _of(which: np.ndarray, sizes: np.ndarray, what: str) -> str:
    """So many of these sizes, in words."""
    if not which.any():
        return what
    low, high = sizes[which].min(), sizes[which].max()
    return f"{which.sum():,} {what} of {low}" + (f" to {high}" if high > low else "")


def _better(origin: Origin) -> str:
    """Which way scores point; empty where there are none."""
    column = next((path for path, role in origin.columns.items() if role == "verdict"), "")
    return (
        f"{'lower' if origin.options.lower_is_better else 'higher'} {column}"
        if origin.layout == "scores"
        else ""
    )


def _warnings(report: DataReport, origin: Origin) -> list[str]:
    """List what to know or mend, one plain sentence each."""
    median = report.pairs_per_user[2]
    without = origin.users - report.users
    stated = report.identical if origin.states_pairs else 0
    found = {
        "All pairs come from one user, so groups cannot be told apart: check --user_column, or train one "
        "reward with --num_groups 1.": report.users == 1,
        "All pairs are copies of one pair.": report.pairs > 1 and report.distinct_pairs == 1,
        f"There are few pairs per user (median {median:g}); with fewer than {FEW_PAIRS} most users cannot be "
        "placed in a group.": median < FEW_PAIRS,
        "No prompt was judged by two users, so groups are told apart only by what a reward model carries "
        "from one prompt to another.": report.users > 1 and report.prompts > 0 and report.shared_prompts == 0,
        "No pair has a prompt, so the reward stage has nothing to sample responses to and cannot calibrate "
        "its heads.": report.empty_prompts == report.pairs,
        f"{stated:,} pairs have equal chosen and rejected texts; the reward stage refuses them, so drop "
        "them.": stated > 0,
        f"{report.repeats:,} pairs repeat an earlier pair of the same user and count with it as one "
        "judgement.": report.repeats > 0,
        f"{report.contradicted:,} pairs were chosen both ways by the same user; each way counts by its "
        "share.": report.contradicted > 0,
        f"{report.empty_responses:,} chosen or rejected texts are empty.": report.empty_responses > 0,
        f"{report.long_texts:,} texts are longer than {LONG_CHARACTERS:,} characters (about 1,024 tokens); "
        "what is over the reward stage's --max_length is cut from their start.": report.long_texts > 0,
        f"{without:,} of {origin.users:,} users are left without a pair.": without > 0,
    }
    return [*origin.notes, *(sentence for sentence, holds in found.items() if holds)]


@dataclass
class _Texts:
    """Hashes of the texts of P pairs, and counts over them."""

    prompt: np.ndarray
    pair: np.ndarray
    empty_prompts: int = 0
    empty_responses: int = 0
    long: int = 0
    longest: int = 0


def _scan(data: Any) -> _Texts:
    import pyarrow.compute as pc

    texts = _Texts(*np.empty((2, len(data)), dtype=np.int64))
    columns = (data.prompts, data.chosen, data.rejected)
    done = 0
    with late_bar("checking pairs", len(data)) as reach:
        for batch in zip(*(column.batches(_BATCH_ROWS) for column in columns), strict=True):
            part = slice(done, done := done + len(batch[0]))
            prompts, chosen, rejected = (column.to_pylist() for column in batch)
            texts.prompt[part] = list(map(hash, prompts))
            texts.pair[part] = list(map(hash, zip(prompts, chosen, rejected, strict=True)))
            empty = [int(pc.sum(pc.equal(pc.utf8_trim_whitespace(column), "")).as_py()) for column in batch]
            texts.empty_prompts += empty[0]
            texts.empty_responses += empty[1] + empty[2]
            prompt_length, *lengths = (pc.utf8_length(column).to_numpy() for column in batch)
            for length in lengths:
                texts.long += int((prompt_length + length > LONG_CHARACTERS).sum())
                texts.longest = max(texts.longest, int((prompt_length + length).max()))
            reach(done)
    return texts


def _distinct(values: np.ndarray, users: np.ndarray) -> np.ndarray:
    """The distinct (value, user) rows [D, 2]."""
    rows = np.stack([values, users], axis=1)
    rows = rows[np.lexsort((users, values))]
    first = np.append(True, (rows[1:] != rows[:-1]).any(axis=1))
    return rows[first[: len(rows)]]
