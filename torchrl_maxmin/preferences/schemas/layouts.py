"""The layouts that preference data come in: how each is recognised, and how its rows become judgements.

A layout is a function that finds its columns, one that yields judgements, and a line in :data:`LAYOUTS`.
"""

from __future__ import annotations

import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences.chat import Text, split_prompt
from torchrl_maxmin.preferences.io.columns import (
    NO_PROMPT,
    PROMPT_ALIASES,
    Roles,
    cell,
    column_paths,
    first_of,
    numbered_columns,
    rows_of,
    shown,
)
from torchrl_maxmin.preferences.io.files import require_columns
from torchrl_maxmin.preferences.schemas.pairs import Judgement, Layout, LoadOptions, best_of, ranked
from torchrl_maxmin.preferences.schemas.ratings import CHOSEN, named, ratings, scores
from torchrl_maxmin.preferences.schemas.verdicts import TIE, Verdicts, rank_values

if TYPE_CHECKING:
    from torchrl_maxmin.preferences.io.table import Table

__all__ = ["LAYOUTS", "find_layout"]

_FIRST_TURN = "first_turn_"
_STEMS = ("response", "completion", "answer", "output", "summary", "conversation", "option")
_LISTS = ("responses", "completions", "answers", "outputs")
_RANKED_LISTS = ("ranked_responses", "ranked_completions", "ranked_answers", "ranked_outputs")
_VERDICTS = ("winner", "choice", "preferred_response", "preference", "preferred", "label", "y")
_FLAGS = ("winner_model_a", "winner_model_b", "winner_tie")
_SCORES = ("score", "rating", CHOSEN)
_SCORED = ("model_response", "response", "completion", "answer", "output", "text", "item", "movieId")
_PROMPT_KEYS = ("interaction_id", "prompt_id")


def find_layout(
    table: Table, name: str | None = None, columns: Mapping[str, str] | None = None
) -> tuple[Layout, Roles]:
    """Find the first layout that fits the columns of a table, or the one of this name.

    Args:
        table: the data.
        name: of the layout.
        columns: columns by their role (prompt, response, score, chosen, rejected), where they have other
            names than usual.

    Raises:
        UserError: if there is none, for a column that is not there, and for a table without rows.
    """
    columns = columns or {}
    if len(table) == 0:  # first: a file without rows has no columns either
        raise UserError("the preference data has no rows")
    paths = column_paths(table)
    for role, path in columns.items():
        if path not in paths and (role, path) != ("prompt", NO_PROMPT):
            raise UserError(f"--{role}_column {path!r} is not among the columns {', '.join(paths)}")
    asked = [layout for layout in LAYOUTS if name in (None, layout.name)]
    if not asked:
        raise UserError(f"no layout {name!r}; choose one of {', '.join(layout.name for layout in LAYOUTS)}")
    wanted = [layout for layout in asked if layout.takes.issuperset(columns)]
    if not wanted:
        flags = ", ".join(f"--{role}_column" for role in columns)
        raise UserError(f"{f'layout {name}' if name else 'no layout'} takes {flags} together; leave one out")
    for layout in wanted:
        if (roles := layout.find(paths, columns)) is not None:
            return layout, roles
    known = "; ".join(f"{layout.columns} ({layout.name})" for layout in wanted)
    roles_needed = ("response", "score") if {"response", "score"} & set(columns) else ("chosen", "rejected")
    missing = [role for role in ("prompt", *roles_needed) if role not in {*columns, *paths}]
    raise UserError(
        f"preference data needs the column(s) {', '.join(missing)}; found {', '.join(table.column_names)}. "
        "Say which is which (--prompt_column --response_column --score_column --chosen_column "
        f"--rejected_column), or rename your columns to match, or to one of: {known}"
    )


# -- chosen over rejected --------------------------------------------------------------------------


def _find_pairs(paths: Sequence[str], columns: Mapping[str, str]) -> Roles | None:
    sides = columns.get("chosen", "chosen"), columns.get("rejected", "rejected")
    if not set(sides) <= set(paths):
        return None
    return Roles(_prompt(paths, columns), sides, promptless=columns.get("prompt") == NO_PROMPT)


def _pairs(table: Table, roles: Roles, users: np.ndarray, options: LoadOptions) -> Iterator[Judgement]:
    """Chosen over rejected; without a prompt column both are whole transcripts."""
    first = next(rows_of(table, roles, [0]))
    chosen = cell(first, roles.responses[0])
    if not (roles.prompt or roles.promptless) and isinstance(chosen, str) and "Assistant:" not in chosen:
        require_columns(table, ["prompt"], "preference data")
    for row, cells in enumerate(rows_of(table, roles)):
        prompt, texts = _texts(row, cells, roles)
        yield Judgement(row, prompt, texts, *best_of(2, best=0))


# -- responses and a verdict -----------------------------------------------------------------------


def _find_summaries(paths: Sequence[str], columns: Mapping[str, str]) -> Roles | None:
    if "summaries" not in paths or "choice" not in paths:
        return None
    prompt = _prompt(paths, columns) + (("info.article",) if "info.article" in paths else ())
    return Roles(prompt=prompt, responses=("summaries",), verdict=("choice",)) if prompt else None


def _summaries(table: Table, roles: Roles, users: np.ndarray, options: LoadOptions) -> Iterator[Judgement]:
    """The chosen one of two summaries, which are objects with a text."""
    verdicts = Verdicts(table, "choice", ("summary_0", "summary_1"), 2)
    for row, cells in enumerate(rows_of(table, roles)):
        listed = cells["summaries"]
        if not isinstance(listed, list) or len(listed) != 2 or not all(isinstance(s, dict) for s in listed):
            raise UserError(f"row {row}: column 'summaries' does not hold two objects with a text")
        texts = [summary.get("text") for summary in listed]
        prompt, texts = split_prompt(_prompt_of(row, cells, roles), texts, row, ["summaries.text"] * 2)
        yield _judge(row, prompt, texts, verdicts.place(cells["choice"], 2, row))


def _find_choices(paths: Sequence[str], columns: Mapping[str, str]) -> Roles | None:
    listed = columns.get("response")
    if listed and first_of(paths, _SCORES):
        return None
    responses = (
        (listed,)
        if listed
        else numbered_columns(paths, [*_STEMS, *(f"{_FIRST_TURN}{stem}" for stem in _STEMS)])
    )
    if not responses:
        listed = first_of(paths, _LISTS)
        responses = (listed,) if listed else ()
    verdicts = tuple(name for name in _VERDICTS if name in paths or f"{_FIRST_TURN}{name}" in paths)
    if len(verdicts) > 1 and responses:
        raise UserError(
            f"several columns could say which response won: {', '.join(verdicts)}; keep one of them"
        )
    verdict = tuple(name if name in paths else f"{_FIRST_TURN}{name}" for name in verdicts)
    if not verdict and len(responses) == 2 and set(_FLAGS[:2]) <= set(paths):
        verdict = tuple(flag for flag in _FLAGS if flag in paths)
    if not responses or not verdict:
        return None
    promptless = columns.get("prompt") == NO_PROMPT
    return Roles(_prompt(paths, columns), responses, verdict, promptless=promptless)


def _choices(table: Table, roles: Roles, users: np.ndarray, options: LoadOptions) -> Iterator[Judgement]:
    """The winner over every other response, or a tie of two."""
    place = _flagged if len(roles.verdict) > 1 else _verdicts(table, roles)
    for row, cells in enumerate(rows_of(table, roles)):
        prompt, texts = _texts(row, cells, roles)
        yield _judge(row, prompt, texts, place(cells, len(texts), row))


def _verdicts(table: Table, roles: Roles) -> Callable[[dict[str, Any], int, int], int]:
    """Reads the winner's place from a row, given the number of responses."""
    (path,) = roles.verdict
    names: Sequence[str] = roles.responses
    count = len(names)
    if count == 1:
        listed = table.read(list(names), slice(1))[0][0]
        names, count = string.ascii_lowercase, len(listed) if isinstance(listed, list) else 2
    verdicts = Verdicts(table, path, names, count)
    return lambda cells, count, row: verdicts.place(cell(cells, path), count, row)


def _flagged(cells: dict[str, Any], count: int, row: int) -> int:
    """The place of the one flag that is up, of those for the first, the second and a tie."""
    flags = [_flag(cells.get(name, 0), name, row) for name in _FLAGS]
    if sum(flags) != 1:
        raise UserError(f"row {row}: {sum(flags)} of {', '.join(_FLAGS)} are 1; exactly one must be")
    return (0, 1, TIE)[flags.index(True)]


def _flag(value: Any, name: str, row: int) -> bool:
    word = str(value).lower()
    if word not in ("1", "1.0", "true", "0", "0.0", "false"):
        raise UserError(f"row {row}: column {name!r} holds {shown(value)}, not 0 or 1")
    return word in ("1", "1.0", "true")


# -- rankings --------------------------------------------------------------------------------------


def _find_rankings(paths: Sequence[str], columns: Mapping[str, str]) -> Roles | None:
    prompt, given = _prompt(paths, columns), columns.get("response")
    listed, order = given or first_of(paths, _LISTS), first_of(paths, ("rank", "ranks", "ranking"))
    if listed and order:
        return Roles(prompt, (listed,), (order,), promptless=not prompt)
    best_first = given or first_of(paths, _RANKED_LISTS)
    if not best_first or (given and first_of(paths, (*_VERDICTS, *_SCORES))):
        return None
    return Roles(prompt, (best_first,), promptless=not prompt)


def _rankings(table: Table, roles: Roles, users: np.ndarray, options: LoadOptions) -> Iterator[Judgement]:
    """All pairs of a ranking: a list best first, ranks of the responses, or their places best first."""
    for row, cells in enumerate(rows_of(table, roles)):
        prompt, texts = _texts(row, cells, roles)
        values: Sequence[float] = range(len(texts))
        if roles.verdict:
            (path,) = roles.verdict
            values = rank_values(cell(cells, path), len(texts), path, row)
        yield Judgement(row, prompt, texts, *ranked(values))


# -- what they share -------------------------------------------------------------------------------


def _prompt(paths: Sequence[str], columns: Mapping[str, str]) -> tuple[str, ...]:
    if given := columns.get("prompt"):
        return () if given == NO_PROMPT and NO_PROMPT not in paths else (given,)
    found = first_of(paths, (*PROMPT_ALIASES, f"{_FIRST_TURN}prompt"))
    return (found,) if found else ()


def _prompt_of(row: int, cells: dict[str, Any], roles: Roles) -> Any:
    """The first prompt column that holds something, or None for a layout without."""
    found = next((value for path in roles.prompt if (value := cell(cells, path)) is not None), None)
    if found is None and roles.prompt:
        raise UserError(
            f"row {row}: column {roles.prompt[0]!r} holds NoneType, not text; drop the row or mend it"
        )
    return found


def _texts(row: int, cells: dict[str, Any], roles: Roles) -> tuple[Text, list[Text]]:
    """Prompt and responses, which stand in columns of their own or in one list."""
    columns = roles.responses
    responses = [cell(cells, path) for path in columns]
    if len(columns) == 1:
        listed = responses[0]
        if not isinstance(listed, list) or len(listed) < 2:
            raise UserError(f"row {row}: column {columns[0]!r} does not hold a list of two or more responses")
        responses, columns = list(map(named, listed)), columns * len(listed)
    prompt = _prompt_of(row, cells, roles)
    if roles.promptless and all(isinstance(text, str) and "Assistant:" not in text for text in responses):
        prompt = ""
    return split_prompt(prompt, responses, row, columns)


def _judge(row: int, prompt: Text, texts: list[Text], winner: int) -> Judgement:
    if winner != TIE:
        return Judgement(row, prompt, texts, *best_of(len(texts), winner))
    if len(texts) == 2:
        return Judgement(row, prompt, texts, *ranked([0, 0]))
    raise UserError(f"row {row}: a tie of {len(texts)} responses does not say which of them are equal")


def _find_ratings(paths: Sequence[str], columns: Mapping[str, str]) -> Roles | None:
    if "Q_overall" not in paths or "response" not in paths:
        return None
    responses = ("context", "response") if "context" in paths else ("response",)
    return Roles(responses=responses, verdict=("Q_overall",))


def _find_scores(paths: Sequence[str], columns: Mapping[str, str]) -> Roles | None:
    prompt = _prompt(paths, columns)
    response = columns.get("response") or first_of(paths, _SCORED)
    score = columns.get("score") or first_of(paths, _SCORES)
    if response is None or score is None:
        return None
    keyed = columns.get("prompt") != NO_PROMPT
    return Roles(prompt, (response,), (score,), first_of(paths, _PROMPT_KEYS) if keyed else None)


#: the first that fits is taken
LAYOUTS = (
    Layout(
        "pairs",
        "chosen, rejected, prompt (or whole transcripts)",
        _find_pairs,
        _pairs,
        frozenset({"prompt", "chosen", "rejected"}),
        states_pairs=True,
    ),
    Layout(
        "summaries",
        "summaries, choice, info.post or prompt",
        _find_summaries,
        _summaries,
        frozenset({"prompt"}),
    ),
    Layout(
        "rankings",
        "responses and ranks or ranking, or ranked_responses",
        _find_rankings,
        _rankings,
        frozenset({"prompt", "response"}),
    ),
    Layout(
        "choices",
        "response_a, response_b ... (or responses) and winner or choice; prompt",
        _find_choices,
        _choices,
        frozenset({"prompt", "response"}),
    ),
    Layout("ratings", "response, context, Q_overall", _find_ratings, ratings),
    Layout(
        "scores",
        "response, score (and prompt, or all responses of a user are compared)",
        _find_scores,
        scores,
        frozenset({"prompt", "response", "score"}),
    ),
)
