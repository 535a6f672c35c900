"""From judgements of any layout to pairs: texts in a mapped file, numbers in memory."""

from __future__ import annotations

import json
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import late_bar
from torchrl_maxmin.preferences.chat import Text, as_transcript
from torchrl_maxmin.preferences.describing import values_by_user
from torchrl_maxmin.preferences.io.columns import (
    EACH_ROW,
    GROUP_ALIASES,
    Roles,
    column_paths,
    find_user_column,
    labels_of,
    outer_column,
    read_column,
    shown,
)
from torchrl_maxmin.preferences.io.table import in_batches, spill
from torchrl_maxmin.preferences.judgements import PairCodes

with suppress(ImportError):  # without it there are no tables
    import pyarrow as pa
if TYPE_CHECKING:
    from torchrl_maxmin.preferences.io.table import Table


_BATCH_PAIRS = 5_000
_BATCH_CHARACTERS = 16 << 20  # a batch ends at whichever comes first


@dataclass(frozen=True)
class LoadOptions:
    """Rules by which judgements become pairs: arguments of ``PreferenceDataset.load``.

    Raises:
        UserError: for a value that is none of those that it may have.
    """

    ties: str = "drop"
    tie_margin: float = 0.0
    max_pairs: int = 64
    identical: str = "error"
    seed: int = 0
    conversations: str = "transcript"
    ratings: str = "blocks"
    lower_is_better: bool = False
    describe_columns: Sequence[str] = ()

    def __post_init__(self) -> None:
        choices = {
            "ties": ("drop", "halve"),
            "identical": ("error", "drop"),
            "conversations": ("transcript", "messages"),
            "ratings": ("blocks", "pairs"),
        }
        for name, known in choices.items():
            if getattr(self, name) not in known:
                raise UserError(f"{name} {getattr(self, name)!r} is none of {', '.join(known)}")
        if not self.tie_margin >= 0:
            raise UserError(f"tie_margin must be at least 0, not {self.tie_margin}")
        if self.max_pairs < 1:
            raise UserError(f"max_pairs must be at least 1, not {self.max_pairs}")


class Comparison(NamedTuple):
    """Response ``better`` over response ``worse``, by their places; or neither, when it is a tie."""

    better: int
    worse: int
    tie: bool = False


class Judgement(NamedTuple):
    """One user's judgement of the responses to one prompt.

    Attributes:
        row: the row of the data where it stands (its first row, when it takes several).
        prompt: a string or a list of messages.
        responses: two or more responses, of the prompt's kind.
        ranks: rank of each response, the best 0; equal ranks are ties, or an order not asked for.
        comparisons: the pairs that train.
        ties_left_out: ties that are not among the comparisons.
        pairs_left_out: pairs beyond the cap that are not among the comparisons.
        alone: ratings of the user that no other is left to be compared with.
        pair_by_pair: whether each comparison counts as a choice of its own.
    """

    row: int
    prompt: Text
    responses: Sequence[Text]
    ranks: Sequence[int]
    comparisons: Sequence[Comparison]
    ties_left_out: int = 0
    pairs_left_out: int = 0
    alone: int = 0
    pair_by_pair: bool = False


def best_of(count: int, best: int) -> tuple[list[int], list[Comparison]]:
    """Ranks and comparisons of one response preferred to all others, whose order was not asked.

    Example:
        >>> best_of(3, best=1)[0]
        [1, 0, 1]
    """
    ranks = [int(i != best) for i in range(count)]
    return ranks, [Comparison(best, other) for other in range(count) if other != best]


def ranked(values: Sequence[float]) -> tuple[list[int], list[Comparison]]:
    """Ranks and all comparisons of responses with these values, where smaller is better.

    Those of one better response stand together, the best response first, and its ties after them.

    Example:
        >>> ranked([2.0, 1.0, 2.0])
        ([1, 0, 1], [Comparison(better=1, worse=0, tie=False), Comparison(better=1, worse=2, tie=False), \
Comparison(better=0, worse=2, tie=True)])
    """
    levels = {value: rank for rank, value in enumerate(sorted(set(values)))}
    ranks = [levels[value] for value in values]
    found = []
    for better, rank in sorted(enumerate(ranks), key=operator.itemgetter(1)):
        found += [Comparison(better, worse) for worse, other in enumerate(ranks) if other > rank]
        ties = (worse for worse in range(better + 1, len(ranks)) if ranks[worse] == rank)
        found += [Comparison(better, worse, tie=True) for worse in ties]
    return ranks, found


@dataclass(frozen=True)
class Layout:
    """One way in which preference data are written down.

    Attributes:
        name: what reports call it.
        columns: the columns by which it is recognised, for people.
        find: the role of every column among these paths, or None where the layout does not fit. Given are
            the columns that the user named, by their role.
        judgements: the judgements in a table, from its roles, the user codes [N] of its rows and options.
        takes: the roles of columns that can be named.
        states_pairs: whether rows state chosen and rejected texts (which should then differ).
    """

    name: str
    columns: str
    find: Callable[[Sequence[str], Mapping[str, str]], Roles | None]
    judgements: Callable[[Table, Roles, np.ndarray, LoadOptions], Iterator[Judgement]]
    takes: frozenset[str] = frozenset()
    states_pairs: bool = False


@dataclass(frozen=True)
class PairTable:
    """All pairs of a data set in the order in which they were read.

    Attributes:
        texts: mapped columns prompt, chosen, rejected; each text as json where ``as_json``.
        users: user code [P] int64.
        weights: [P] float32; 1, or 1/2 for each order of a tie.
        rankings: [P] int64, the judgement that a pair follows from.
        choices: [P] int64, Luce's choice that a pair belongs to: one response of a judgement preferred to
            others, in one or more rows that stand together. Each order of a tie is a choice of its own.
        codes: [P], by which pairs of equal texts are known.
        ranks: [P, 2] int32, ranks of the chosen and the rejected response in that judgement, the best 0.
        user_ids: id of every user code.
        groups: true group of every user code, or None.
        described: value of every user code by column that describes users; None where a user has none.
    """

    texts: pa.Table
    users: np.ndarray
    weights: np.ndarray
    rankings: np.ndarray
    choices: np.ndarray
    codes: PairCodes
    ranks: np.ndarray
    user_ids: list[str]
    groups: list[str] | None
    as_json: bool = False
    described: dict[str, list[str | None]] = field(default_factory=dict)


@dataclass
class Origin:
    """Findings while loading, for the report.

    Attributes:
        layout: name of the layout.
        columns: role of every column that is read.
        ignored: columns that are not.
        rows: rows of the table.
        users: users of the table, with or without a pair.
        options: how judgements became pairs.
        ties, identical, beyond_cap, alone: how many of each were met.
        pair_by_pair: whether pairs of one user's ratings count as independent.
        states_pairs: whether the data state pairs, which training then takes as they are.
        notes: sentences about decisions taken.
    """

    layout: str
    columns: dict[str, str]
    ignored: list[str]
    rows: int
    users: int
    options: LoadOptions
    ties: int = 0
    identical: int = 0
    beyond_cap: int = 0
    alone: int = 0
    pair_by_pair: bool = False
    states_pairs: bool = False
    notes: list[str] = field(default_factory=list)


def build_pairs(
    table: Table,
    layout: Layout,
    roles: Roles,
    user_column: str | None,
    group_column: str | None,
    options: LoadOptions,
) -> tuple[PairTable, Origin]:
    """Pairs, and how they were found.

    Args:
        table: the data.
        layout: how its rows hold judgements.
        roles: which columns the layout reads.
        user_column: see :meth:`~torchrl_maxmin.preferences.PreferenceDataset.load`.
        group_column: likewise.
        options: how judgements become pairs.

    Raises:
        UserError: for data without users or pairs, and for a row that cannot be read.
    """
    if options.lower_is_better and layout.name != "scores":
        raise UserError(
            f"lower_is_better is about scores, and the layout {layout.name} has none; leave it out"
        )
    paths = column_paths(table)
    user_column = user_column or find_user_column(paths)
    if user_column == EACH_ROW and EACH_ROW not in paths:
        users, user_ids = np.arange(len(table)), [str(row) for row in range(len(table))]
    else:
        _require(table, paths, user_column, "user")
        users, user_ids = labels_of(table, user_column, "user")
    columns = {**roles.columns(), **({user_column: "user"} if user_column in paths else {})}
    origin = Origin(layout.name, columns, [], len(table), len(user_ids), options)
    origin.states_pairs = layout.states_pairs
    if user_column not in paths:
        origin.notes.append("No column says who chose: every row counts as a user of its own.")
    groups = _user_groups(table, paths, group_column, users, len(user_ids), origin)
    described = {}
    for name in options.describe_columns:
        _require(table, paths, name, "describe")
        values = read_column(table, name).to_pylist()
        described[name], note = values_by_user(values, users, len(user_ids), name)
        origin.notes += [note] if note else []
        origin.columns.setdefault(name, "describes users")
    used = {outer_column(table, path) for path in origin.columns}
    origin.ignored = [name for name in table.column_names if name not in used]
    render = _renderer(table, roles, options)
    with late_bar("reading pairs", len(table)) as reach:
        judgements = (render(judgement) for judgement in layout.judgements(table, roles, users, options))
        texts, codes, rows, choices, weights, ranks = _collect(judgements, origin, reach)
    if not len(rows):
        raise UserError(_nothing_left(origin))
    as_json = render is _as_json
    numbers = (users[rows], weights, rows, choices, codes, ranks)
    return PairTable(texts, *numbers, user_ids, groups, as_json, described), origin


def _renderer(table: Table, roles: Roles, options: LoadOptions) -> Callable[[Judgement], Judgement]:
    """Choose how texts become strings: transcripts, or json where messages stay."""
    names = {outer_column(table, path) for path in (*roles.prompt, *roles.responses)}
    nested = any(pa.types.is_nested(table.schema.field(name).type) for name in names)
    return _as_json if nested and options.conversations == "messages" else _as_transcripts


def _as_json(judgement: Judgement) -> Judgement:
    prompt, *responses = (json.dumps(text, default=str) for text in (judgement.prompt, *judgement.responses))
    return judgement._replace(prompt=prompt, responses=responses)


def _as_transcripts(judgement: Judgement) -> Judgement:
    prompt, responses = as_transcript(judgement.prompt, judgement.responses)
    return judgement._replace(prompt=prompt, responses=responses)


def _require(table: Table, paths: list[str], column: str, what: str) -> None:
    if column not in paths:
        raise UserError(
            f"preference data ({what} column) needs the column(s) {column}; "
            f"found {', '.join(table.column_names)}; give another --{what}_column"
        )


def _user_groups(
    table: Table, paths: list[str], column: str | None, users: np.ndarray, num_users: int, origin: Origin
) -> list[str] | None:
    """True group of every user, or None; a column that was not asked for must fit or is only noted."""
    if column is not None:
        _require(table, paths, column, "group")
        groups = _by_user(table, column, users, num_users)
    else:
        column = next((name for name in GROUP_ALIASES if name in paths and name not in origin.columns), None)
        if column is None:
            return None
        try:
            groups = _by_user(table, column, users, num_users)
        except UserError as error:
            origin.notes.append(f"Column {column!r} is not used as the users' true groups: {error}.")
            return None
    origin.columns[column] = "true group"
    return groups


def _by_user(table: Table, column: str, users: np.ndarray, num_users: int) -> list[str]:
    codes, names = labels_of(table, column, "group")
    by_user = np.empty(num_users, dtype=np.int64)
    by_user[users] = codes
    if (by_user[users] != codes).any():
        raise UserError(f"column {column!r} puts one user in several groups")
    return [names[code] for code in by_user]


Pair = tuple[Text, Text, Text, int, int, float, int, int]


def _collect(
    judgements: Iterable[Judgement], origin: Origin, reach: Callable[[int], None]
) -> tuple[pa.Table, PairCodes, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Texts of all pairs, mapped; and their codes [P], rows [P], choices [P], weights [P], ranks [P, 2]."""
    numbers: list[np.ndarray] = []
    codes, sides = [np.empty(0, np.int64)], [np.empty(0, bool)]

    def tables() -> Iterator[pa.Table]:
        sizes = ((pair, sum(map(len, pair[:3]))) for pair in _pairs_of(judgements, origin))
        for pairs in in_batches(sizes, _BATCH_PAIRS, _BATCH_CHARACTERS):
            prompts, chosen, rejected, *rest = zip(*pairs, strict=True)
            numbers.append(np.array(rest, dtype=np.float64))
            ordered = ((p, *sorted(both)) for p, *both in zip(prompts, chosen, rejected, strict=True))
            codes.append(np.array(list(map(hash, ordered)), np.int64))
            sides.append(np.array(list(map(operator.lt, chosen, rejected)), bool))
            texts = {"prompt": prompts, "chosen": chosen, "rejected": rejected}
            yield pa.table({name: pa.array(values, pa.large_string()) for name, values in texts.items()})
            reach(max(rest[0]))

    texts = spill(tables())
    rows, choices, weights, better, worse = np.concatenate([np.empty((5, 0)), *numbers], axis=1)
    ranks = np.stack([better, worse], axis=1).astype(np.int32)
    known = PairCodes(np.concatenate(codes), np.concatenate(sides))
    return texts, known, rows.astype(np.int64), choices.astype(np.int64), weights.astype(np.float32), ranks


def _pairs_of(judgements: Iterable[Judgement], origin: Origin) -> Iterator[Pair]:
    """Prompt, chosen, rejected, row, choice, weight and the ranks of both, for every pair that is kept."""
    halve = origin.options.ties == "halve"
    numbers = count()
    refuse = origin.states_pairs and origin.options.identical == "error"
    for judgement in judgements:
        row, prompt, responses, ranks, comparisons, *_ = judgement
        origin.ties += judgement.ties_left_out
        origin.beyond_cap += judgement.pairs_left_out
        origin.alone += judgement.alone
        origin.pair_by_pair |= judgement.pair_by_pair
        choice, best = 0, -1
        for better, worse, tie in comparisons:
            origin.ties += tie
            if tie and not halve:
                continue
            chosen, rejected = responses[better], responses[worse]
            if chosen == rejected:
                if refuse:
                    raise UserError(f"row {row}: chosen equals rejected ({shown(chosen)}); drop such pairs")
                origin.identical += 1
                continue
            if tie:
                yield prompt, chosen, rejected, row, next(numbers), 0.5, ranks[better], ranks[worse]
                yield prompt, rejected, chosen, row, next(numbers), 0.5, ranks[worse], ranks[better]
                best = -1
                continue
            if better != best or judgement.pair_by_pair:
                choice, best = next(numbers), better
            yield prompt, chosen, rejected, row, choice, 1.0, ranks[better], ranks[worse]


def _nothing_left(origin: Origin) -> str:
    reasons = []
    if origin.ties:
        reasons.append(f"{origin.ties} are ties, which ties='halve' (--ties halve) keeps")
    if origin.alone:
        reasons.append(f"{origin.alone} ratings have no other of another value, of one user, beside them")
    if origin.identical:
        reasons.append(f"{origin.identical} have two equal responses")
    reason = "; ".join(reasons) or "no user compared or scored two responses to one prompt"
    return f"the preference data ({origin.layout}) give no pair: {reason}"
