"""What a check finds, against counts by hand."""

from collections import Counter

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from torchrl_maxmin.preferences import PreferenceDataset


def from_rows(rows, **kwargs):
    return PreferenceDataset.load(datasets.Dataset.from_list(rows), **kwargs)


def pair(prompt="p", chosen="c", rejected="r", user="u", **more):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "user_id": user, **more}


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(["", "p", "q", "\u2028"]),
            st.sampled_from("abc"),
            st.sampled_from(["", "x", " "]),
            st.integers(0, 4),
        ),
        min_size=1,
        max_size=30,
    )
)
def test_figures_are_those_of_a_plain_count(cells):
    report = from_rows([pair(*cell) for cell in cells]).check()
    per_user = Counter(cell[3] for cell in cells)
    prompts = {cell[0] for cell in cells} - {""}
    shared = [p for p in prompts if len({cell[3] for cell in cells if cell[0] == p}) > 1]
    assert (report.rows, report.pairs, report.users) == (len(cells), len(cells), len(per_user))
    np.testing.assert_allclose(
        report.pairs_per_user, np.percentile(list(per_user.values()), [0, 25, 50, 75, 100])
    )
    assert report.prompts == len(prompts)
    assert report.shared_prompts == pytest.approx(len(shared) / len(prompts) if prompts else 0)
    assert report.duplicates == len(cells) - len(set(cells))
    assert report.distinct_pairs == len({cell[:3] for cell in cells})
    assert report.empty_prompts == sum(not cell[0].strip() for cell in cells)
    assert report.empty_responses == sum(not cell[2].strip() for cell in cells)
    assert report.longest_text == max(len(cell[0]) + 1 for cell in cells)


GOOD = [pair(f"p{i}", f"c{i}", user=u) for i in range(6) for u in "ab"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([pair(f"p{i}") for i in range(9)], "All pairs come from one user"),
        ([pair()] * 9, "All pairs are copies of one pair."),
        (GOOD[:8], r"few pairs per user \(median 4\); with fewer than 5"),
        ([pair(f"p{u}{i}", user=u) for i in range(9) for u in "ab"], "No prompt was judged by two users"),
        ([{**row, "prompt": ""} for row in GOOD], "No pair has a prompt, so the reward stage has nothing"),
        ([*GOOD, GOOD[0], GOOD[0]], "2 pairs repeat an earlier pair of the same user"),
        ([*GOOD, pair(rejected=" ", user="a")], "1 chosen or rejected texts are empty"),
        ([*GOOD, pair("p" * 4_000, "c" * 97, user="a")], "1 texts are longer than 4,096 characters"),
    ],
)
def test_a_plain_sentence_for_what_will_fail(rows, message):
    warnings = from_rows(rows).check().warnings
    with pytest.raises(AssertionError, match=message):
        raise AssertionError("\n".join(warnings))
    assert all(told.endswith(".") and told[0].isupper() | told[0].isdigit() for told in warnings)


def test_good_data_need_no_warning():
    report = from_rows(GOOD).check()
    assert report.warnings == []
    assert report.shared_prompts == 1
    counts = (report.ties, report.duplicates, report.identical, report.beyond_cap, report.rankings)
    assert counts == (0, 0, 0, 0, 0)


def test_one_user_loads_and_says_what_fails():
    data = from_rows([pair(f"p{i}") for i in range(9)])
    data.require_users(1)
    (told,) = data.check().warnings
    assert "--user_column" in told
    assert "--num_groups 1" in told


def test_the_report_fits_one_screen():
    rows = [
        pair(f"p{i}", f"c{i}", user=f"u{i % 2}", group=f"g{i % 2}", **{f"note_{k}": k for k in range(9)})
        for i in range(9)
    ]
    report = from_rows(rows).check()
    console = Console(width=80)
    with console.capture() as screen:
        console.print(report)
    lines = screen.get().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    for text in (screen.get(), str(report)):
        assert "g0 1, g1 1" in text
        assert "note_8" in text
        assert "quartiles" in text
        for told in report.warnings:
            assert told.split()[0] in text


def test_markup_in_names_is_not_read():
    report = from_rows([pair(f"p{i}", user="[red]u", group="[/bold]") for i in range(3)]).check()
    console = Console(width=80)
    with console.capture() as screen:
        console.print(report)
    assert "[/bold] 1" in screen.get()
