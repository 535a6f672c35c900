"""What an evaluation keeps: a run that was stopped goes on, and ends as one that never was."""

import random
import shutil
from pathlib import Path

import measure_judges
import pytest
import torch
from judge_server import Server, ok, shorter
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tensordict import TensorDict

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.evaluation import measure
from torchrl_maxmin.evaluation.cache import Samples, digest_of, digest_of_model
from torchrl_maxmin.evaluation.measure import run_evaluate

MADE = ("summary.json", "report.md", "result")


def files(folder):
    """All that a run made, but for the settings and what it kept."""
    paths = [path for name in MADE for path in [Path(folder) / name, *(Path(folder) / name).rglob("*")]]
    return {path.relative_to(folder): path.read_bytes() for path in paths if path.is_file()}


class Stopped(BaseException):
    """As a signal ends a process."""


class Endpoint:
    """Judges by length; counts its answers, and refuses from a given one on."""

    def __init__(self):
        self.answers, self.refuses_after = [], None

    def __call__(self, number, body):
        if self.refuses_after is not None and len(self.answers) >= self.refuses_after:
            return 403, b"no credit", {}, 0.0
        self.answers.append(body["messages"][0]["content"])
        return shorter(number, body)


@pytest.fixture(scope="module")
def endpoint():
    answers = Endpoint()
    with Server(answers) as server:
        answers.url = server.url
        yield answers


@pytest.fixture
def drawn(monkeypatch):
    """The policies that were sampled, and at which of them the run is stopped."""
    calls, sample = [], measure.sample_responses

    def watched(policy, prompts, num_samples):
        if calls.count(None) + 1 == watched.stops_at:
            raise Stopped
        calls.append(None)
        return sample(policy, prompts, num_samples)

    watched.stops_at, watched.calls = None, calls
    monkeypatch.setattr(measure, "sample_responses", watched)
    return watched


@pytest.fixture
def settings(endpoint):
    criteria = ["brief=few words", "other=a=b"]
    return {"judge": endpoint.url, "judge_model": "m", "judge_criteria": criteria, "num_samples": 2}


def test_a_stopped_run_ends_as_one_that_never_was(make_config, endpoint, drawn, settings, capsys):
    whole = run_evaluate(make_config("whole", **settings))
    count = len(endpoint.answers)
    assert len(set(endpoint.answers)) == count > 40
    assert len(drawn.calls) == 2

    endpoint.answers.clear()
    drawn.calls.clear()
    drawn.stops_at = 2
    with pytest.raises(Stopped):
        run_evaluate(make_config("parts", **settings))
    drawn.stops_at = None
    going_on = settings | {"resume_from_checkpoint": "last"}
    for refuses_after in (9, 9, 30):  # the second time it does not get further
        endpoint.refuses_after = refuses_after
        line = r"call \d+ of \d+: the judge at .* refuses with status 403 \(no credit\).*"
        line += "samples and verdicts are kept; go on with: torchrl-maxmin evaluate --config .* last"
        with pytest.raises(UserError, match=line):
            run_evaluate(make_config("parts", **going_on))
        with (Path(whole).parent / "parts" / "cache" / "verdicts.jsonl").open("a") as file:
            file.write('["half a li')
    endpoint.refuses_after = None
    parts = run_evaluate(make_config("parts", **going_on))
    assert len(endpoint.answers) == len(set(endpoint.answers)) == count
    assert len(drawn.calls) == 2
    assert files(parts) == files(whole)
    assert "damaged or unfinished" in capsys.readouterr().err

    run_evaluate(make_config("parts", **going_on))  # one that was at its end
    assert len(endpoint.answers) == count
    assert files(parts) == files(whole)


def measured(config):
    """Measure by what is in the folder, whatever run it is of; returns the raw result's files."""
    folder = measure._measure(config)[1] / "result"
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_random_judges_do_not_see_whether_samples_were_drawn(make_config, drawn, monkeypatch):
    def guess(prompts, completions):
        return [[random.random(), torch.rand(()).item()] for _ in completions]

    monkeypatch.setattr(measure_judges, "guess", guess, raising=False)
    config = make_config(judge="measure_judges:guess")
    first = measured(config)
    assert len(drawn.calls) == 2
    assert measured(config) == first
    assert len(drawn.calls) == 2
    assert measured(make_config("fresh", judge="measure_judges:guess")) == first
    assert len(drawn.calls) == 4


def test_other_settings_are_other_samples(make_config, drawn, other_model, tiny_model, tmp_path):
    def run(**changes):
        before = len(drawn.calls)
        measured(make_config(**({"num_samples": 1} | changes)))
        return len(drawn.calls) - before

    assert run() == 2
    assert run() == 0
    assert run(judge="measure_judges:brevity") == 0
    assert run(seed=1) == 2
    assert run(temperature=0.9) == 2
    assert run(num_prompts=5) == 2
    assert run(response_length=3) == 2
    folder = tmp_path / "changed"
    shutil.copytree(other_model, folder)
    policies = [f"sft={tiny_model}", f"maxmin={folder}"]
    assert run(policies=policies) == 0  # the same weights by another name
    weights = load_file(folder / "model.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-6
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    assert run(policies=policies) == 1


def test_there_must_be_something_to_go_on_from(make_config):
    with pytest.raises(UserError, match=r"there is no run in .* start one without --resume_from_checkpoint"):
        run_evaluate(make_config(resume_from_checkpoint="last"))
    with pytest.raises(UserError, match="'checkpoint-3' is none of last"):
        make_config(resume_from_checkpoint="checkpoint-3").check()


@pytest.mark.parametrize("flag", ["judge_retries", "judge_retry_after", "judge_refusals"])
def test_flags_of_an_endpoint_are_of_no_function(make_config, flag):
    value = "tie" if flag == "judge_refusals" else 1
    with pytest.raises(UserError, match=f"--{flag} belongs to a --judge that is an http address"):
        run_evaluate(make_config(**{flag: value}))


def test_flags_reach_the_endpoint(make_config, settings):
    with Server(lambda number, body: (503, b"", {"Retry-After": "9999"}, 0.0)) as server:
        flags = {"judge": server.url, "judge_retries": 2, "judge_retry_after": 0.0}
        with pytest.raises(UserError, match="in 3 attempts: status 503"):
            run_evaluate(make_config(**(settings | flags)))
        assert len(server.requests) == 3
    with Server(lambda number, body: (*ok("A")[:3], 1.0)) as server:
        flags = {"judge": server.url, "judge_retries": 0, "judge_timeout": 0.1}
        with pytest.raises(UserError, match=r"in 1 attempt: no answer within 0\.1 s"):
            run_evaluate(make_config(**(settings | flags)))


@pytest.mark.parametrize("judge", ["hangs", "hangs_at_pairs"])
def test_a_function_that_judges_has_a_time_too(make_config, judge):
    with pytest.raises(UserError, match=r"gives no answer within 0\.1 s.* raise --judge_timeout"):
        run_evaluate(make_config(judge=f"measure_judges:{judge}", judge_timeout=0.1))


# -- samples ---------------------------------------------------------------------------------------


def some():
    rows = {"action": torch.arange(6).reshape(3, 2), "sample_log_prob": torch.rand(3, 2).T.contiguous().T}
    return TensorDict(rows | {"action_mask": torch.ones(3, 2, dtype=torch.bool)}, [3])


def test_damaged_samples_are_drawn_again(tmp_path, capsys):
    samples, key = Samples(tmp_path), digest_of("settings")
    calls = []

    def draw():
        calls.append(None)
        return first

    first = some()
    for _ in range(2):
        found = samples.of(key, draw)
        assert set(found.keys()) == set(first.keys())
        assert all(torch.equal(found[name], first[name]) for name in first.keys())  # noqa: SIM118
        assert found.batch_size == first.batch_size
    assert len(calls) == 1
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    generator = random.Random(0)
    kinds = {
        "bit": lambda data, place: data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :],
        "end": lambda data, place: data[:place],
        "zeros": lambda data, place: data[: place // 2] + bytes(len(data) - place // 2),
    }
    for number in range(60):
        kind = list(kinds)[number % 3]
        place = generator.randrange(len(whole))
        path.write_bytes(kinds[kind](whole, place))
        before = len(calls)
        found = samples.of(key, draw)
        # a flip among what says nothing, such as the name of an entry of no use, may change nothing
        assert all(torch.equal(found[name], first[name]) for name in first.keys())  # noqa: SIM118
        assert len(calls) - before in (0, 1)
        assert len(calls) > before or kind == "bit"
        assert path.read_bytes() == whole or len(calls) == before
    assert len(calls) > 50
    assert "is damaged: the samples are drawn again" in " ".join(capsys.readouterr().err.split())


def test_the_file_says_what_it_is(tmp_path):
    key = digest_of({"seed": 3}, {"prompt": torch.ones(2)})
    Samples(tmp_path).of(key, some)
    (path,) = tmp_path.iterdir()
    with safe_open(path, "pt") as file:
        assert file.metadata()["digests"].startswith(f"{key} ")


def test_digests_tell_all_apart(tiny_model, other_model, tmp_path):
    tensors = [torch.zeros(2), torch.zeros(2, 1), torch.zeros(1), torch.zeros(2, dtype=torch.int32)]
    parts = [({"a": 1},), ({"a": 1}, 2), ({"a": 2},), ("a", 1), *(({"x": t},) for t in tensors), ()]
    assert len({digest_of(*part) for part in parts}) == len(parts)
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    assert len({digest_of_model(path) for path in (tiny_model, other_model, "some/name")}) == 3
