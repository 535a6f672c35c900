"""The page of an evaluation says what the summary says, and no more than its intervals carry."""

import copy
import json

import numpy as np
import pytest
from evaluation_results import NAMES, make_histories, make_result, make_wins
from hypothesis import given, settings
from hypothesis import strategies as st
from page_reader import NUMBER, at, check_sources, is_rounding, read_page, strange_numbers

from torchrl_maxmin.evaluation import (
    SeedResult,
    load_summary,
    rich_table,
    summarise,
    write_report,
    write_summary,
)
from torchrl_maxmin.evaluation.report import write_cards
from torchrl_maxmin.evaluation.samples import NUM_SHOWN, responses_to_show
from torchrl_maxmin.evaluation.verdict import verdict

# what sentences explain: a coin, coverage that was simulated, ticks of the scales
KNOWN = {"0.5", "95%", "0", "1", "-1", "-0.693", ".86", ".89", ".92", ".94", ".95", ".97", ".93", "10"}


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A folder with the page of three seeds, whose prompts were answered, and its summary as it was read."""
    results = [make_result(seed) for seed in range(3)]
    for result in results:
        result.extra["judge"] = "function"
    prompts = [f"prompt {n}" for n in range(results[0].num_prompts)]
    first = results[0]
    first.extra["responses"] = responses_to_show(
        first, prompts, lambda name, rows: [f"{name} {r}" for r in rows]
    )
    folder = tmp_path_factory.mktemp("page")
    summary = summarise(results, num_resamples=50)
    write_summary(folder, summary)
    histories = make_histories(num_seeds=2)
    write_report(folder, summary, histories=histories, figures=False)
    return folder, json.loads((folder / "summary.json").read_text()), results


def test_every_number_of_the_page_is_the_summary_s(shown):
    folder, summary, _ = shown
    page = read_page(folder)
    assert check_sources(page, summary) > 150
    training = page.by_section.pop("training")
    assert "iteration 0 to 5" in training
    strange = strange_numbers(page, summary, KNOWN)
    ticks = {"0.2", "0.4", "0.6", "0.8", "-0.2", "-0.1", "0.1", "0.3", "-0.3", "-0.4", "-0.6"}
    assert [entry for entry in strange if entry[1] not in ticks] == []


def test_the_verdict_comes_first_and_is_one_for_all(shown):
    folder, summary, _ = shown
    page = read_page(folder)
    found = summary["verdict"]
    assert page.heading == found["headline"]
    text = " ".join(page.by_section[None].split())
    report = (folder / "report.md").read_text().splitlines()
    assert report[2] == f"**{found['headline']}**"
    for line in found["lines"]:
        assert line["text"] in text
        assert f"- {line['text']}" in report
    assert str(rich_table(summary).caption) == found["headline"]


def test_the_numbers_of_the_verdict_are_the_summary_s(shown):
    summary = shown[1]
    policies, compared = summary["policies"], summary["comparison"]
    lines = {line["text"]: NUMBER.findall(line["text"]) for line in summary["verdict"]["lines"]}
    for group in summary["groups"]:
        name = group["name"]
        rates = [policies[policy]["win_rate_vs_sft"][name]["mean"] for policy in ("maxmin", "single")]
        change = [compared["changes"][name][end] for end in ("mean", "low", "high")]
        expected = [group["share"], *rates, *change]
        [numbers] = [numbers for text, numbers in lines.items() if text.startswith(name)]
        assert len(numbers) == len(expected)
        assert all(map(is_rounding, numbers, expected))
    for start, key in (("Over people", "average_over_people"), ("Over groups", "average_over_groups")):
        expected = [policies[policy][key] for policy in ("maxmin", "single")]
        expected += [compared[f"{key}_change_interval"][end] for end in ("mean", "low", "high")]
        [numbers] = [numbers for text, numbers in lines.items() if text.startswith(start)]
        assert len(numbers) == len(expected)
        assert all(map(is_rounding, numbers, expected))


def test_averages_over_people_and_groups_are_right(shown):
    """By loops over samples, with nothing of ours."""
    folder, summary, results = shown
    expected = {}
    for policy in ("single", "maxmin"):
        by_seed = []
        for result in results:
            ours, theirs = result.utilities[policy], result.utilities["sft"]
            rates = [
                sum(
                    (a > b) + 0.5 * (a == b)
                    for n in range(result.num_prompts)
                    for a in ours[n, :, g].tolist()
                    for b in theirs[n, :, g].tolist()
                ) / (result.num_prompts * ours.shape[1] * theirs.shape[1])
                for g in range(2)
            ]  # fmt: skip
            by_seed.append(rates)
        groups = np.mean(by_seed, axis=0)
        expected[policy] = {
            "average_over_groups": groups.mean(),
            "average_over_people": (10 * groups[0] + groups[1]) / 11,
        }
    sources = [source for source, _ in read_page(folder).sources]
    for key in ("average_over_groups", "average_over_people"):
        for policy, averages in expected.items():
            place = f"policies/{policy}/{key}_interval"
            assert sources.count(place) == 2, "in the chart and in the table"
            assert at(summary, place)["mean"] == pytest.approx(averages[key], abs=1e-12)
        change = at(summary, f"comparison/{key}_change_interval")
        assert change["mean"] == pytest.approx(expected["maxmin"][key] - expected["single"][key], abs=1e-12)
        assert change["low"] < change["mean"] < change["high"]


ENDS = st.tuples(st.floats(-1, 1), st.floats(-1, 1)).map(sorted) | st.just((None, None))


@settings(deadline=None, max_examples=60)
@given(ends=st.lists(ENDS, min_size=4, max_size=4))
def test_a_verdict_says_no_more_than_the_intervals_carry(shown, ends):
    summary = copy.deepcopy(shown[1])
    compared = summary["comparison"]
    parts = [compared["changes"][name] for name in NAMES]
    parts += [compared[f"average_over_{whom}_change_interval"] for whom in ("groups", "people")]
    for part, (low, high) in zip(parts, ends, strict=True):
        part |= {"low": low, "high": high}
    found = verdict(summary)
    head, _, people = found.headline.rpartition("; over all people, ")
    kinds = {name: sign(*pair) for name, pair in zip(NAMES, ends[:2], strict=True)}
    lines = {name: next(line for line in found.lines if line.text.startswith(name)) for name in NAMES}
    for name, kind in kinds.items():
        assert lines[name].kind == kind
        word = {"gain": "gains", "lose": "loses", "unsure": "is not decided"}[kind]
        assert word in lines[name].text
    assert ("gain" in head) == ("gain" in kinds.values())
    assert ("lose" in head) == ("lose" in kinds.values())
    assert ("not decided" in head) == ("unsure" in kinds.values())
    over = {"gain": "win rates rise.", "lose": "win rates fall.", "unsure": "it is not decided."}
    assert people == over[sign(*ends[3])]


def sign(low, high):
    return "unsure" if low is None or low <= 0 <= high else "gain" if low > 0 else "lose"


def test_nothing_is_claimed_on_groups_that_are_not_established(tmp_path):
    groups = {"established": False, "reasons": ["refits find other users"]}
    judged = {"judge": "reward heads", "groups_found": groups}
    summary = summarise([make_result(0, extra=judged)], num_resamples=20)
    found = verdict(summary)
    text = " ".join([found.headline, *(line.text for line in found.lines)])
    assert found.headline.startswith("Nothing is claimed")
    assert "refits find other users" in text
    assert not any(name in text for name in NAMES)
    assert not any(line.kind in ("gain", "lose") for line in found.lines)
    report = write_report(tmp_path, summary, figures=False).read_text()
    page = read_page(tmp_path)
    assert "not established" in page.by_section["who"]
    for text in (report, *page.by_section.values()):
        assert "in a group that gains" not in text
    true = verdict(summarise([make_result(0, extra=judged | {"judge": "world"})], num_resamples=20))
    assert "loses" in true.headline
    assert any("not established" in line.text for line in true.lines)


def test_one_seed_and_one_policy_are_said():
    one = verdict(summarise([make_result(0)], num_resamples=20))
    assert any(line.text.startswith("One seed") for line in one.lines)
    rng = np.random.default_rng(0)
    utilities = {"sft": rng.normal(size=(30, 2, 2)), "mine": rng.normal([3, 0], size=(30, 2, 2))}
    found = verdict(summarise([SeedResult(0, ["a", "b"], [0.5, 0.5], utilities)], num_resamples=20))
    assert found.headline.startswith("With mine in place of sft, a (50% of people) gains and for b")
    assert "a (50% of people) prefers mine to sft" in found.lines[0].text


def test_a_summary_of_before_has_a_page_and_claims_no_average(shown, tmp_path):
    old = copy.deepcopy(shown[1])
    del old["verdict"], old["extra"][0]["responses"], old["comparison"]["changes_per_seed"]
    for key in ("average_over_groups_change", "average_over_people_change"):
        del old["comparison"][key], old["comparison"][f"{key}_interval"]
    (tmp_path / "summary.json").write_text(json.dumps(old))
    summary = load_summary(tmp_path)
    assert verdict(summary).headline.endswith("over all people, it is not decided.")
    write_report(tmp_path, summary, figures=False)
    page = read_page(tmp_path)
    assert check_sources(page, summary) > 90
    assert "responses" not in page.by_section


def test_a_page_of_comparisons(tmp_path):
    result, _ = make_wins(0)
    shape = {policy: np.ones((40, 2)) for policy in result.policies}
    result = SeedResult(0, NAMES, [0.5, 0.5], wins=result.wins, length=shape, extra={"judge": "endpoint"})
    result.extra["responses"] = responses_to_show(result, ["p"] * 40, lambda name, rows: ["r"] * len(rows))
    summary = summarise([result], num_resamples=20)
    write_report(tmp_path, summary, figures=False)
    page = read_page(tmp_path)
    check_sources(page, summary)
    assert "win rate of the policy's responses to that prompt" in page.by_section["responses"]


def test_responses_are_drawn_by_the_seed_and_by_disagreement():
    result, asked = make_result(0), []

    def read(name, rows):
        asked.append((name, list(rows)))
        return [f"{name} {row}" for row in rows]

    found = responses_to_show(result, [f"p{n}" for n in range(40)], read)
    assert found == responses_to_show(result, [f"p{n}" for n in range(40)], read)
    assert [len(found[kind]) for kind in ("random", "disagreement")] == [NUM_SHOWN, NUM_SHOWN]
    spread = []
    for kind in ("random", "disagreement"):
        for entry in found[kind]:
            n = entry["prompt_index"]
            assert entry["prompt"] == f"p{n}"
            change = {}
            for policy, answer in entry["responses"].items():
                place = int(answer["text"].split()[1])
                samples = result.utilities[policy]
                assert place // samples.shape[1] == n
                utilities = samples[n, place % samples.shape[1]]
                assert list(answer["scores"].values()) == pytest.approx(utilities.tolist())
                change[policy] = utilities
            change = change["maxmin"] - change["single"]
            spread.append(change.max() - change.min())
    assert spread[NUM_SHOWN:] == sorted(spread[NUM_SHOWN:], reverse=True)


def test_the_largest_disagreement_is_the_largest():
    """With one response a prompt none is drawn, and all can be compared."""
    rng = np.random.default_rng(3)
    utilities = {policy: rng.normal(size=(50, 1, 3)) for policy in ("sft", "single", "maxmin")}
    result = SeedResult(0, ["a", "b", "c"], [0.5, 0.3, 0.2], utilities)
    found = responses_to_show(result, ["p"] * 50, lambda name, rows: ["r"] * len(rows))
    change = (utilities["maxmin"] - utilities["single"])[:, 0]
    spread = [max(row) - min(row) for row in change.tolist()]
    places = [entry["prompt_index"] for entry in found["disagreement"]]
    assert places == sorted(range(50), key=lambda n: -spread[n])[:NUM_SHOWN]
    alone = SeedResult(0, ["a"], [1.0], {"sft": np.zeros((5, 1, 1)), "maxmin": np.ones((5, 1, 1))})
    assert responses_to_show(alone, ["p"] * 5, lambda name, rows: ["r"] * len(rows))["disagreement"] == []


def test_pictures_that_are_there_stay_without_matplotlib(tmp_path, summary, monkeypatch):
    write_report(tmp_path, summary, histories=make_histories())
    monkeypatch.setattr("torchrl_maxmin.evaluation.plots.find_spec", lambda name: None)
    text = write_report(tmp_path, summary).read_text()
    assert "](figures/win_rates.png)" in text
    assert "](figures/training.png)" in text
    assert "Matplotlib is missing" in text


def test_a_model_card_takes_the_verdict_and_the_folder_stays_whole(tmp_path, summary):
    import yaml

    from torchrl_maxmin.core.manifest import require_whole, write_manifest
    from torchrl_maxmin.evaluation.cache import digest_of_model
    from torchrl_maxmin.pages import model_card

    folder, foreign = tmp_path / "maxmin", tmp_path / "single"
    for place in (folder, foreign):
        place.mkdir()
        (place / "model.safetensors").write_bytes(b"weights")
    (foreign / "README.md").write_text("somebody's own\n")
    about = {"base_model": "org/model", "adapter": False, "title": "T", "data": "<b>", "rows": {"beta": 0.1}}
    card = model_card(folder, about)
    write_manifest(folder, folder.iterdir())
    digest = digest_of_model(str(folder))
    assert "Not measured yet" in card.read_text()
    write_cards({"maxmin": str(folder), "single": str(foreign)}, summary)
    text = card.read_text()
    assert summary["verdict"]["headline"] in text
    assert "Not measured yet" not in text
    metadata = yaml.safe_load(text.split("---")[1])
    assert (metadata["base_model"], metadata["library_name"]) == ("org/model", "transformers")
    assert (foreign / "README.md").read_text() == "somebody's own\n"
    require_whole(folder)
    assert digest_of_model(str(folder)) == digest
    listed = json.loads((folder / "manifest.json").read_text())
    assert list(listed["files"]) == ["model.safetensors"]
    listed["files"]["README.md"] = {"sha256": "of an earlier version"}
    (folder / "manifest.json").write_text(json.dumps(listed))
    require_whole(folder)
    model_card(folder, about | {"title": "Other"})  # a run that goes on writes its card again
    assert summary["verdict"]["headline"] in card.read_text()
    write_cards({"maxmin": str(folder)}, summary)
    assert card.read_text().count(summary["verdict"]["headline"]) == 1
