"""Judges as plain callables, and one behind a real HTTP server on this machine."""

import numpy as np
import pytest
import torch
from judge_server import Server, completion, ok, shorter
from scipy.special import expit

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.evaluation.judges import EndpointJudge, judge_pairs, reward_judge, truth_judge
from torchrl_maxmin.evaluation.judging import PairJudges, UtilityJudge, load_judge
from torchrl_maxmin.stats.rates import rates_by_group, win_matrix


def lengths(prompts, completions):
    return [float(len(text)) for text in completions]


def brevity(prompts, completions):
    return [-float(len(text)) for text in completions]


def with_column(prompts, completions, answer):
    return [float(len(text) == size) for text, size in zip(completions, answer, strict=True)]


def of_two(prompts, a, b):
    return [0.5] * len(a)


@pytest.fixture
def texts():
    rng = np.random.default_rng(0)

    def draw(m):
        return [["x" * int(n) for n in rng.integers(1, 6, m)] for _ in range(10)]

    return [f"prompt {n}" for n in range(10)], draw(3), draw(2)


def test_truth_judges_give_the_win_matrix(texts):
    prompts, a, b = texts
    told = judge_pairs({"long": truth_judge(lengths), "short": truth_judge(brevity)}, prompts, a, b)
    utilities = [np.array([[[len(t), -len(t)] for t in row] for row in side], float) for side in (a, b)]
    np.testing.assert_allclose(told.wins, win_matrix(*utilities))
    assert told.group_names == ("long", "short")
    np.testing.assert_allclose(told.first_place, 0, atol=1e-12)
    assert rates_by_group(told.wins, told.group_names).worst_group_name in ("long", "short")


def test_both_orders_take_out_a_judge_that_likes_the_first(texts):
    prompts, a, b = texts

    def partial(prompts, first, second):
        return np.clip(truth_judge(lengths)(prompts, first, second) + 0.3, 0, 1) * 0.5 + 0.25

    def first_always(prompts, first, second):
        return np.ones(len(prompts))

    told = judge_pairs({"partial": partial, "first": first_always}, prompts, a, b)
    np.testing.assert_allclose(told.wins[:, 1], 0.5)
    np.testing.assert_allclose(told.first_place[1], 1.0)
    assert told.first_place[0] > 0.05
    one_order = judge_pairs({"first": first_always}, prompts, a, b, both_orders=False)
    np.testing.assert_allclose(one_order.wins, 1.0)
    assert np.isnan(one_order.first_place).all()


def test_reward_heads_judge_by_bradley_terry():
    judge = reward_judge(lambda prompts, texts: [[len(t), 2.0 * len(t)] for t in texts], 1)
    np.testing.assert_allclose(judge(["p"], ["abc"], ["a"]), expit(4.0))
    with pytest.raises(UserError, match="2 columns"):
        reward_judge(lambda prompts, texts: [[1.0, 2.0] for _ in texts])(["p"], ["a"], ["b"])


@pytest.mark.parametrize(
    ("judges", "arguments", "message"),
    [
        ({}, (["p"], [["a"]], [["b"]]), "no judge"),
        ({"g": truth_judge(lengths)}, (["p"], [["a"]], []), "give one each"),
        ({"g": truth_judge(lengths)}, (["p"], [["a"]], [[]]), "no responses"),
        ({"g": lambda p, a, b: [0.5, 0.5]}, (["p"], [["a"]], [["b"]]), r"gives \[2\] for 1 comparisons"),
        ({"g": lambda p, a, b: [1.5]}, (["p"], [["a"]], [["b"]]), r"outside \[0, 1\]"),
        ({"g": lambda p, a, b: [float("nan")]}, (["p"], [["a"]], [["b"]]), r"outside \[0, 1\]"),
        ({"g": lambda p, a, b: {}["x"]}, (["p"], [["a"]], [["b"]]), "'g' fails .* KeyError"),
    ],
)
def test_bad_judges_are_named(judges, arguments, message):
    with pytest.raises(UserError, match=message):
        judge_pairs(judges, *arguments)


def make(server, **settings):
    return EndpointJudge(
        server.url, "judge-1", "short answers", **({"backoff": 0.01, "timeout": 5} | settings)
    )


def test_endpoint_judges_over_http(texts, monkeypatch):
    prompts, a, b = texts
    monkeypatch.setenv("JUDGE_KEY", "secret")
    with Server(shorter) as server:
        judge = make(server, api_key_variable="JUDGE_KEY")
        told = judge_pairs({"brief": judge}, prompts, a, b)
        path, headers, body = server.requests[0]
    expected = judge_pairs({"brief": truth_judge(brevity)}, prompts, a, b)
    np.testing.assert_allclose(told.wins, expected.wins)
    assert path == "/v1/chat/completions"
    assert headers["Authorization"] == "Bearer secret"
    assert (body["model"], body["temperature"]) == ("judge-1", 0.0)
    assert "short answers" in body["messages"][0]["content"]


def test_texts_with_braces_reach_the_judge_as_they_are(monkeypatch):
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with Server(lambda number, body: ok("A")) as server:
        make(server)(["{a} {b}"], ["{prompt}"], ["{0} \\1"])
        _, headers, body = server.requests[0]
    question = body["messages"][0]["content"]
    assert "Prompt:\n{a} {b}\n\nResponse A:\n{prompt}\n\nResponse B:\n{0} \\1\n" in question
    assert "Authorization" not in headers


def test_passing_trouble_is_tried_again():
    def answer(number, body):
        troubles = {
            1: (503, b"loading", {}, 0.0),
            2: (429, b"slow down", {"Retry-After": "0"}, 0.0),
            3: (200, b"<html>not json</html>", {}, 0.0),
            4: ok("I think that both are fine"),
        }
        return troubles.get(number, ok("B"))

    with Server(answer) as server:
        assert make(server, retries=4)(["p"], ["a"], ["b"]).tolist() == [0.0]
        assert len(server.requests) == 5


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (200, b"<html>not json</html>", {}, 0.0),
            "in 2 attempts: the answer is no chat completion but '<html>",
        ),
        ((200, b'{"error": "x"}', {}, 0.0), "no chat completion"),
        ((200, b'{"choices": []}', {}, 0.0), "no chat completion"),
        (ok("neither"), "the verdict is 'neither'"),
        ((500, b"out of memory", {}, 0.0), r"status 500 \(out of memory\)"),
        ((200, completion("A"), {}, 0.6), r"no answer within 0\.2 s"),
    ],
)
def test_lasting_trouble_is_one_clear_error(answer, message):
    with Server(lambda number, body: answer) as server:
        with pytest.raises(UserError, match=message) as caught:
            make(server, retries=1, timeout=0.2)(["p"], ["a"], ["b"])
        assert len(server.requests) == 2
    assert server.url in str(caught.value)
    assert "raise timeout or retries" in str(caught.value)


def test_a_refusal_is_not_tried_again():
    with Server(lambda number, body: (401, b"no such key", {}, 0.0)) as server:
        with pytest.raises(UserError, match=r"refuses with status 401 \(no such key\).*OPENAI_API_KEY"):
            make(server, retries=5, workers=1)(["p"], ["a"], ["b"])
        assert len(server.requests) == 1


def test_nobody_there_is_one_clear_error():
    with Server(shorter) as server:
        url = server.url
    judge = EndpointJudge(url, "m", "c", retries=1, backoff=0.01, timeout=1)
    with pytest.raises(UserError, match=r"in 2 attempts: .*refused"):
        judge(["p"], ["a"], ["b"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"base_url": "localhost:8000"}, "must begin with http"),
        ({"timeout": 0}, "timeout must be positive"),
        ({"template": "{prompt} {a}"}, r"lacks \{b\}"),
    ],
)
def test_bad_settings_are_named(settings, message):
    fields = {"base_url": "http://localhost/v1", "model": "m", "criterion": "c"} | settings
    with pytest.raises(UserError, match=message):
        EndpointJudge(**fields)


def test_a_function_that_takes_a_column_is_no_judge_of_two():
    """Both have three arguments; a reward function of TRL's kind judges as well as it trains."""
    datasets = pytest.importorskip("datasets")
    table = datasets.Dataset.from_list([{"prompt": "p", "answer": 1}, {"prompt": "q", "answer": 3}])
    kinds = {"with_column": UtilityJudge, "of_two": PairJudges}
    for name, kind in kinds.items():
        judge = load_judge(f"{__name__}:{name}", ["p", "q"], torch.device("cpu"), table=table)
        assert isinstance(judge, kind)
    lacking = table.remove_columns("answer")
    with pytest.raises(UserError, match="missing 1 required positional argument: 'answer'"):
        load_judge(f"{__name__}:with_column", ["p", "q"], torch.device("cpu"), table=lacking)
