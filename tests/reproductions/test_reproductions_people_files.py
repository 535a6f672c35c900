"""The converters of reproductions/people, on files made up in the formats of the data sets."""

import csv
import json
import subprocess
import sys

import numpy as np
import pytest
from scripts import load_script

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.preferences import PreferenceDataset

convert = load_script("people/convert.py")


def rows_of(path):
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture
def sushi(tmp_path):
    (tmp_path / "sushi3a.5000.10.order").write_text(
        "10 1\n0 10 5 0 3 4 6 9 8 1 7 2\n0 10 0 9 6 3 7 2 8 1 5 4\n"
    )
    users = ["0\t0\t2\t784\t26\t6\t1\t8\t3\t0\t1", "7\t1\t5\t400\t0\t0\t0\t26\t6\t1\t1"]
    (tmp_path / "sushi3.udata").write_text("\n".join(users) + "\n")
    return tmp_path


def test_sushi(sushi, tmp_path):
    rankings, arrays = convert.sushi(sushi, tmp_path)
    first, second = rows_of(rankings)
    assert first["ranked_responses"][:2] == ["ikura (salmon roe)", "ebi (shrimp)"]
    assert (first["user_id"], first["sex"], first["age"]) == ("u0", "male", "30-39")
    assert (first["region"], first["childhood"]) == ("Kanto and Shizuoka", "west")
    assert (second["user_id"], second["sex"], second["region"]) == ("u7", "female", "Kinki")
    assert len(PreferenceDataset.load(rankings)) == 90
    with np.load(arrays) as found:
        assert found["differences"].shape == (90, 10)
        assert found["users"].tolist() == ["u0"] * 45 + ["u7"] * 45
        assert np.bincount(found["choice_ids"]).tolist() == [9, 8, 7, 6, 5, 4, 3, 2, 1] * 2
        best = found["differences"][:9]
        assert (best[:, 5] == 1).all()
        assert found["region"][-1] == "Kinki"


def test_sushi_of_two_releases_is_refused(sushi, tmp_path):
    (sushi / "sushi3.udata").write_text("0\t0\t2\t784\t26\t6\t1\t8\t3\t0\t1\n")
    with pytest.raises(UserError, match="2 rankings and 1 users"):
        convert.sushi(sushi, tmp_path)


def test_movielens_of_1998(tmp_path):
    (tmp_path / "u.data").write_text("1\t1\t5\t88\n1\t2\t3\t89\n1\t3\t3\t90\n2\t2\t4\t91\n2\t1\t1\t92\n")
    (tmp_path / "u.genre").write_text("Action|0\nComedy|1\n\n")
    films = ["1|Fog (1975)|01-Jan-1975||http:|1|0", "2|Été (1996)|||http:|0|1", "3|Été (1996)|||http:|1|1"]
    (tmp_path / "u.item").write_text("\n".join(films), encoding="latin-1")
    (tmp_path / "u.user").write_text("1|24|M|baker|0\n2|53|F|other|0\n")
    table, arrays = convert.movielens(tmp_path, tmp_path)
    rows = rows_of(table)
    assert [row["item"] for row in rows[:3]] == ["Fog (1975)", "Été (1996) (2)", "Été (1996) (3)"]
    about = {"age": "50-59", "sex": "F", "occupation": "other"}
    assert rows[3] == {"user_id": "2", "item": "Été (1996) (2)", "rating": "4.0", **about}
    with np.load(arrays) as found:
        assert found["feature_names"].tolist() == ["Action", "Comedy", "decades since 1990", "popularity"]
        assert found["choice_ids"].tolist() == [0, 1]  # Fog over one of two others, and Été over Fog
        np.testing.assert_allclose(found["differences"][1], [-1, 1, 2.1, 0], atol=1e-6)
        assert found["sex"].tolist() == ["M", "F"]


def test_movielens_of_tables(tmp_path):
    (tmp_path / "ratings.csv").write_text("userId,movieId,rating,timestamp\n7,31,2.5,1\n7,10,4.0,2\n")
    (tmp_path / "movies.csv").write_text(
        'movieId,title,genres\n31,"Fog, The (1975)",Action|Drama\n10,Been,(no genres listed)\n'
    )
    table, arrays = convert.movielens(tmp_path, tmp_path)
    assert rows_of(table)[0] == {"user_id": "7", "item": "Fog, The (1975)", "rating": "2.5"}
    with np.load(arrays) as found:
        np.testing.assert_allclose(found["differences"], [[-1, -1, 1.5, 0]], atol=1e-6)


def test_prism(tmp_path):
    person = {"user_id": "user0", "age": "18-24 years old", "gender": "Female", "education": None}
    place = {"reside_region": "Europe"}
    others = {"user_id": "user1", "age": None, "gender": "Male", "education": "School", "location": None}
    people = [person | {"location": place}, others]
    (tmp_path / "survey.jsonl").write_text("\n".join(map(json.dumps, people)))
    told = [("user0", 0, 80), ("user0", 0, 20), ("user0", 1, 50), ("user1", 0, 9), ("user1", 0, None)]
    utterances = [
        {
            "utterance_id": f"ut{i}",
            "interaction_id": f"int-{user}",
            "user_id": user,
            "turn": turn,
            "user_prompt": "Hello",
            "model_response": f"Answer {i}",
            "score": score,
        }
        for i, (user, turn, score) in enumerate(told)
    ]
    (tmp_path / "utterances.jsonl").write_text("\n".join(map(json.dumps, utterances)))
    (path,) = convert.prism(tmp_path, tmp_path)
    rows = rows_of(path)
    assert [row["model_response"] for row in rows] == ["Answer 0", "Answer 1", "Answer 3"]
    assert (rows[0]["region"], rows[0]["education"], rows[2]["age"]) == ("Europe", "not said", "not said")
    data = PreferenceDataset.load(path)
    assert list(zip(data.chosen, data.rejected, strict=True)) == [("Answer 0", "Answer 1")]


def test_dices(tmp_path):
    source = tmp_path / "diverse_safety.csv"
    source.write_text(
        "id,rater_id,rater_gender,rater_age,item_id,context,response,Q2_harmful_content_other,Q_overall\n"
        '0,r1,Woman,gen z,0,"USER: can I\nAI: no",Yes,No,No\n'
        "1,r1,Woman,gen z,1,USER: why,Because,No,Yes\n"
    )
    (path,) = convert.dices(source, tmp_path)
    first, second = rows_of(path)
    assert first["context"] == "USER: can I\nAI: no"
    assert (second["gender"], second["age"], second["Q_overall"]) == ("Woman", "gen z", "Yes")
    assert len(PreferenceDataset.load(path)) == 1


def test_popquorn(tmp_path):
    source = tmp_path / "raw_data.csv"
    source.write_text(
        "instance_id,user_id,text,offensiveness,gender,race,age,occupation,education\n"
        '530,0,"A song, in C",1.0,Man,White,35-39,Unemployed,College degree\n'
        "12,0,An insult,5.0,Man,White,35-39,Unemployed,\n"
    )
    (path,) = convert.popquorn(source, tmp_path)
    first, second = rows_of(path)
    assert (first["user_id"], first["item"], first["rating"]) == ("0", "A song, in C", "5.0")
    assert (second["rating"], second["education"]) == ("1.0", "not said")


def test_community_alignment(tmp_path):
    names = ["conversation_id", "assigned_lang", "annotator_id", "annotator_age", "first_turn_prompt"]
    names += [f"first_turn_response_{letter}" for letter in "abcd"] + ["first_turn_preferred_response"]
    told = [
        ["c0", "en", "an1", "18-34", "Who?", "One<|end_of_text|>", "Two", "Three", "Four", "response_c"],
        ["c1", "fr", "an1", "18-34", "Qui?", "Un", "Deux", "Trois", "Quatre", "response_a"],
        ["c2", "en", "an2", "", "Who?", "One", "One", "Three", "Four", "response_a"],
        ["c3", "en", "an2", "", "Who?", "One", "Two", "Three", "Four", "response_a"],
        ["c4", "en", "an2", "", "Who?", "One", "Two", "Three", "Four", ""],
    ]
    source = tmp_path / "community.csv"
    with source.open("w", newline="") as file:
        csv.writer(file).writerows([names, *told])
    (path,) = convert.community_alignment(source, tmp_path)
    rows = rows_of(path)
    assert [(row["user_id"], row["winner"], row["age"]) for row in rows] == [
        ("an1", "c", "18-34"),
        ("an2", "a", "not said"),
    ]
    assert rows[0]["responses"] == ["One", "Two", "Three", "Four"]
    data = PreferenceDataset.load(path)
    assert (len(data), data.chosen[0]) == (6, "Three")


def test_the_command_names_its_files_and_what_is_missing(sushi, tmp_path):
    command = [sys.executable, convert.__file__, "sushi", str(sushi), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["sushi.jsonl", "sushi.npz"]
    command[2] = "movielens"
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("convert: error: no file ")
