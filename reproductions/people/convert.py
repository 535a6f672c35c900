"""Turn one's own copy of a public data set into files that ``torchrl-maxmin diagnose`` reads.

    python reproductions/people/convert.py NAME SOURCE OUTPUT

NAME is one of sushi, movielens, prism, dices, popquorn, community_alignment; SOURCE the folder or file as its
authors give it; OUTPUT a folder. What users said of themselves stands in columns of its own, for
``--describe_columns``. README.md beside this file has the commands and what to expect.
"""

import csv
import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from people_world import chosen_over, strict_rankings

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.progress import console
from torchrl_maxmin.core.tables import write_csv
from torchrl_maxmin.preferences.io.files import load_table

sys.path.append(str(Path(__file__).parents[1]))

from common import make_parser, run_main

#: what is written where somebody did not say
UNKNOWN = "not said"
SUSHI = (
    "ebi (shrimp)",
    "anago (sea eel)",
    "maguro (tuna)",
    "ika (squid)",
    "uni (sea urchin)",
    "ikura (salmon roe)",
    "tamago (egg)",
    "toro (fatty tuna)",
    "tekka-maki (tuna roll)",
    "kappa-maki (cucumber roll)",
)
AGES = ("15-19", "20-29", "30-39", "40-49", "50-59", "60 and over")
REGIONS = (
    "Hokkaido",
    "Tohoku",
    "Hokuriku",
    "Kanto and Shizuoka",
    "Nagano and Yamanashi",
    "Chukyo",
    "Kinki",
    "Chugoku",
    "Shikoku",
    "Kyushu",
    "Okinawa",
    "abroad",
)


def sushi(source: Path, output: Path) -> list[Path]:
    """Ten sushi in the order of 5,000 people: ``sushi3a.5000.10.order`` and ``sushi3.udata`` of a folder."""
    header, *lines = _lines(source / "sushi3a.5000.10.order")
    if header.split() != ["10", "1"]:
        raise UserError(f"{source / 'sushi3a.5000.10.order'} begins with {header!r}, not '10 1'")
    orders = [[int(item) for item in line.split()[2:]] for line in lines]
    users = [line.split("\t") for line in _lines(source / "sushi3.udata")]
    if len(users) != len(orders):
        raise UserError(f"{len(orders)} rankings and {len(users)} users; take both files of one release")
    about = {
        f"u{user[0]}": {
            "sex": ("male", "female")[int(user[1])],
            "age": AGES[int(user[2])],
            "region": REGIONS[int(user[8])],
            "childhood": ("east", "west")[int(user[6])],
        }
        for user in users
    }
    prompt = {"prompt": "Which sushi do you like?"}
    rows = (
        {"user_id": user, **prompt, "ranked_responses": [SUSHI[i] for i in order], **about[user]}
        for user, order in zip(about, orders, strict=True)
    )
    judged = [(user, order, range(len(order))) for user, order in zip(about, orders, strict=True)]
    return [
        _write_rows(output / "sushi.jsonl", rows),
        _write_features(output / "sushi.npz", judged, np.eye(10), SUSHI, about),
    ]


class Films(NamedTuple):
    """Ratings of films.

    Attributes:
        ratings: user, film and rating.
        films: title and genres of every film.
        genres: names of all.
        about: columns of every user.
    """

    ratings: list[tuple[str, str, float]]
    films: dict[str, tuple[str, set[str]]]
    genres: list[str]
    about: dict[str, dict[str, str]]


def movielens(source: Path, output: Path) -> list[Path]:
    """Films rated up to 5: ``u.data, u.item, u.genre, u.user`` of a folder, or ``ratings.csv, movies.csv``.

    The features are genres, year and popularity.
    """
    found = _films_of_1998(source) if (source / "u.data").is_file() else _films_of_tables(source)
    titles = Counter(title for title, _ in found.films.values())
    names = {f: title if titles[title] == 1 else f"{title} ({f})" for f, (title, _) in found.films.items()}
    counts = Counter(film for _, film, _ in found.ratings)
    features: list[list[float]] = []
    places: dict[str, int] = {}
    for film, (title, mine) in found.films.items():
        year = re.search(r"\((\d{4})\)", title)
        places[film] = len(features)
        decade = (int(year[1]) - 1990) / 10 if year else 0.0
        features.append([*(genre in mine for genre in found.genres), decade, np.log1p(counts[film])])
    by_user: dict[str, list[tuple[int, float]]] = {}
    for user, film, rating in found.ratings:
        by_user.setdefault(user, []).append((places[film], rating))
    judged = []
    for user, rated in by_user.items():
        levels = np.unique([-rating for _, rating in rated], return_inverse=True)[1]
        order = np.argsort(levels, kind="stable")
        judged.append((user, [rated[i][0] for i in order], levels[order].tolist()))
    rows = [
        {"user_id": user, "item": names[film], "rating": rating} | found.about.get(user, {})
        for user, film, rating in found.ratings
    ]
    feature_names = [*found.genres, "decades since 1990", "popularity"]
    return [
        write_csv(output / "movielens.csv", rows),
        _write_features(output / "movielens.npz", judged, np.array(features), feature_names, found.about),
    ]


def _films_of_1998(source: Path) -> Films:
    """The release of 100,000 ratings, whose people say age, sex and occupation."""
    ratings = []
    for line in _lines(source / "u.data"):
        user, film, rating = line.split("\t")[:3]
        ratings.append((user, film, float(rating)))
    genres = [line.split("|")[0] for line in _lines(source / "u.genre")]
    films, about = {}, {}
    for line in _lines(source / "u.item", "latin-1"):
        film, title, *rest = line.split("|")
        flags = zip(genres, rest[-len(genres) :], strict=True)
        films[film] = title, {genre for genre, flag in flags if flag == "1"}
    for line in _lines(source / "u.user"):
        user, age, sex, occupation = line.split("|")[:4]
        decade = int(age) // 10 * 10
        about[user] = {"age": f"{decade}-{decade + 9}", "sex": sex, "occupation": occupation}
    return Films(ratings, films, genres, about)


def _films_of_tables(source: Path) -> Films:
    """Later releases, which say nothing of people."""
    table = csv.DictReader(_lines(source / "ratings.csv"))
    ratings = [(row["userId"], row["movieId"], float(row["rating"])) for row in table]
    movies = csv.DictReader(_lines(source / "movies.csv"))
    films = {row["movieId"]: (row["title"], set(row["genres"].split("|"))) for row in movies}
    genres = {genre for _, mine in films.values() for genre in mine} - {"(no genres listed)"}
    return Films(ratings, films, sorted(genres), {})


def prism(source: Path, output: Path) -> list[Path]:
    """Responses of several models, scored: ``utterances.jsonl`` and ``survey.jsonl`` of a folder.

    First turns only: what is compared later follows from what was said before.
    """
    about = {}
    for line in _lines(source / "survey.jsonl"):
        person = json.loads(line)
        place = person.get("location") or {}
        about[person["user_id"]] = {
            **{name: person.get(name) or UNKNOWN for name in ("age", "gender", "education")},
            "region": place.get("reside_region") or UNKNOWN,
        }
    rows = (json.loads(line) for line in _lines(source / "utterances.jsonl"))
    kept = ("user_id", "interaction_id", "user_prompt", "model_response", "score")
    wanted = (
        {name: row[name] for name in kept} | about.get(row["user_id"], {})
        for row in rows
        if row["turn"] == 0 and row["score"] is not None
    )
    return [_write_rows(output / "prism.jsonl", wanted)]


def dices(source: Path, output: Path) -> list[Path]:
    """Conversations called harmful or not by a hundred raters: the ``.csv`` file of 350 or of 990."""
    kept = ("rater_id", "context", "response", "Q_overall")
    rows = csv.DictReader(_lines(source, keep_ends=True))
    wanted = (
        {name: row[name] for name in kept}
        | {
            name.removeprefix("rater_"): row[name] or UNKNOWN
            for name in ("rater_gender", "rater_race", "rater_age", "rater_locale")
            if name in row
        }
        for row in rows
    )
    return [write_csv(output / "dices.csv", list(wanted))]


def popquorn(source: Path, output: Path) -> list[Path]:
    """Comments rated as offensive, 1 (not) to 5: ``offensiveness/raw_data.csv``; a rating is 6 less that."""
    rows = csv.DictReader(_lines(source, keep_ends=True))
    columns = ("gender", "race", "age", "occupation", "education")
    wanted = (
        {"user_id": row["user_id"], "item": row["text"], "rating": 6 - float(row["offensiveness"])}
        | {name: row[name] or UNKNOWN for name in columns}
        for row in rows
    )
    return [write_csv(output / "popquorn.csv", list(wanted))]


def community_alignment(source: Path, output: Path) -> list[Path]:
    """The best of four responses: the ``.csv`` or ``.parquet`` file; first turns in English.

    The mark at the end of responses goes, and a row with two equal responses or without a choice is left out.
    """
    names = [f"first_turn_response_{letter}" for letter in "abcd"]
    columns = ("age", "gender", "education_level", "political", "ethnicity", "country")

    def wanted() -> Iterator[dict[str, Any]]:
        for row in load_table(source):
            responses = [str(row[name] or "").replace("<|end_of_text|>", "").strip() for name in names]
            choice = row["first_turn_preferred_response"]
            if row["assigned_lang"] != "en" or not choice or len({*responses, ""}) < 5:
                continue
            yield {
                "user_id": row["annotator_id"],
                "prompt": row["first_turn_prompt"],
                "responses": responses,
                "winner": choice[-1],
                **{name: row.get(f"annotator_{name}") or UNKNOWN for name in columns},
            }

    return [_write_rows(output / "community_alignment.jsonl", wanted())]


CONVERTERS: dict[str, Callable[[Path, Path], list[Path]]] = {
    "sushi": sushi,
    "movielens": movielens,
    "prism": prism,
    "dices": dices,
    "popquorn": popquorn,
    "community_alignment": community_alignment,
}


# -- files -----------------------------------------------------------------------------------------


def _lines(path: Path, encoding: str = "utf-8-sig", keep_ends: bool = False) -> Iterator[str]:
    """Lines that hold something; all, with their ends, where cells of a table may span several."""
    if not path.is_file():
        raise UserError(f"no file {path}; name what you unpacked")
    with path.open(encoding=encoding, newline="" if keep_ends else None) as file:
        for line in file:
            if keep_ends:
                yield line
            elif line.strip():
                yield line.rstrip("\n")


def _write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> Path:
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return path


def _write_features(
    path: Path,
    judged: Sequence[tuple[str, Sequence[int], Sequence[int]]],
    features: np.ndarray,
    names: Sequence[str],
    about: Mapping[str, Mapping[str, str]],
) -> Path:
    """Write one judgement a user as features of pairs, one with ties as rankings without.

    Args:
        path: an ``.npz`` file.
        judged: user, items best first, and their levels (equal ones are ties).
        features: of the items [I, D].
        names: of the features.
        about: columns of the users; one that is missing there has none.
    """
    sizes = [len(items) for _, items, _ in judged]
    items, levels = (np.concatenate([np.asarray(j[part], int) for j in judged]) for part in (1, 2))
    entries, offsets = strict_rankings(np.cumsum([0, *sizes]), levels, np.random.default_rng(0))
    chosen, other = chosen_over(offsets, levels[entries])
    features, items = features.astype(np.float32), items[entries]
    users = np.repeat([user for user, _, _ in judged], sizes)[entries[chosen]]
    arrays: dict[str, Any] = {
        "differences": features[items[chosen]] - features[items[other]],
        "users": users,
        "judgement_ids": np.searchsorted(offsets, chosen, side="right") - 1,
        "choice_ids": np.unique(chosen, return_inverse=True)[1],
        "feature_names": np.array(names),
    }
    for name in next(iter(about.values()), {}):
        arrays[name] = np.array([about[user][name] for user in users])
    np.savez(path, **arrays)
    return path


def main() -> None:
    """Convert one data set."""
    parser = make_parser(__doc__)
    parser.add_argument("name", choices=CONVERTERS)
    parser.add_argument("source", type=Path)
    parser.add_argument("output", type=Path)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for path in CONVERTERS[args.name](args.source, args.output):
        console.print(str(path))


if __name__ == "__main__":
    run_main("convert", main)
