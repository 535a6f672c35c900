"""An endpoint that misbehaves: each failure is one line, no verdict is lost, and none is asked for twice."""

import json
import threading
import time
from collections import Counter
from email.utils import formatdate

import numpy as np
import pytest
from judge_server import Server, completion, ok

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.http import seconds_to_wait
from torchrl_maxmin.evaluation.cache import Verdicts
from torchrl_maxmin.evaluation.endpoint_judge import EndpointJudge

KEY = "sk-secret/0123456789"
ROWS = 10
BAD = 4  # the row whose question the endpoint misbehaves at
EXPECTED = [1.0, 0.0, 0.5, 1.0, 0.0, 0.5, 1.0, 0.0, 0.5, 1.0]
PROMPTS = [f"prompt {row}" for row in range(ROWS)]
SAID = {1.0: "A", 0.0: "B", 0.5: "TIE"}


@pytest.fixture(autouse=True)
def key(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")  # as a file holds it


def row_of(body):
    return int(body["messages"][0]["content"].split("Prompt:\nprompt ")[1].split("\n")[0])


def right(row):
    return ok(SAID[EXPECTED[row]])


def said(text):
    return 200, completion(text), {}, 0.0


def status(code, body=b"no", **headers):
    return code, body, {name.replace("_", "-"): value for name, value in headers.items()}, 0.0


def breaks(handler):
    """Promise a long body, and end in the middle of it."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000")
    handler.end_headers()
    handler.wfile.write(b'{"choices": [')
    handler.close_connection = True


def closes(handler):
    handler.close_connection = True


def no_http(handler):
    handler.wfile.write(b"\x00\x01\x02 SSH-2.0\r\n\r\n")
    handler.close_connection = True


def echo(handler):
    """Give the request's headers back, in words and as JSON and addresses write them."""
    given = handler.headers["Authorization"]
    body = f"bad: {given} {given.replace('/', chr(92) + '/')} {given.replace('/', '%2F')} \x1b[2J\u202e" * 20
    handler.send_response(401)
    handler.end_headers()
    handler.wfile.write(body.encode())


def echo_of(verdict):
    def answer(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(completion(f"{verdict} {handler.headers['Authorization']}"))

    return answer


class Run:
    """A judge of ROWS questions at a server that misbehaves at one of them."""

    def __init__(self, folder, misbehave, *, once=False):
        self.folder, self.misbehave, self.once = folder, misbehave, once
        self.asked, self.answered = Counter(), Counter()
        self.lock = threading.Lock()

    def answer(self, number, body):
        row = row_of(body)
        with self.lock:
            self.asked[row] += 1
            wrong = self.misbehave is not None and row == BAD and not (self.once and self.asked[row] > 1)
            self.answered[row] += not wrong
        return self.misbehave if wrong else right(row)

    def judge(self, server, **settings):
        defaults = {"backoff": 0.01, "timeout": 60, "retries": 2, "workers": 3}
        judge = EndpointJudge(
            server.url, "judge-1", "any", verdicts=Verdicts(self.folder), **(defaults | settings)
        )
        return judge(PROMPTS, ["a"] * ROWS, ["b"] * ROWS)

    def finish(self, server):
        """The endpoint is well again: the rest is asked for, and what was had is not."""
        had, self.misbehave = Counter(self.answered), None
        assert len(Verdicts(self.folder)) == sum(had.values())
        assert self.judge(server).tolist() == EXPECTED
        assert self.answered == dict.fromkeys(range(ROWS), 1)
        asked = sum(self.asked.values())
        assert self.judge(server).tolist() == EXPECTED
        assert sum(self.asked.values()) == asked


#: what it answers, what the line says, and whether it is asked again before that
LASTING = {
    "empty": (said(""), "the verdict is ''", True),
    "no body": (status(200, b""), "no chat completion but ''", True),
    "html": (status(200, b"<html>not\x1b[31m json</html>"), r"but '<html>not\\x1b\[31m json</", True),
    "not json": (status(200, b'{"choices": '), "no chat completion", True),
    "no utf-8": (status(200, b"\xff\xfe\x00"), "no chat completion", True),
    "deep": (status(200, b"[" * 200_000), "no chat completion", True),
    "no choices": (status(200, b'{"error": "x"}'), "no chat completion", True),
    "empty choices": (status(200, b'{"choices": []}'), "no chat completion", True),
    "no content": (said(None), "the verdict is 'None'", True),
    "two words": (said("A or B"), "the verdict is 'A or B'", True),
    "only thoughts": (said("<think>A"), "the verdict is '<think>A'", True),
    "400": (status(400, b"context too long"), r"refuses with status 400 \(context too long\)", False),
    "401": (status(401), r"refuses with status 401 .*\$OPENAI_API_KEY", False),
    "403": (status(403, b""), "refuses with status 403;", False),
    "404": (status(404), "refuses with status 404", False),
    "413": (status(413), r"status 413 .*--judge_refusals tie", False),
    "408": (status(408), "in 3 attempts: status 408", True),
    "429": (status(429, b"slow\n\ndown", Retry_After="0.01"), r"status 429 \(slow down\)", True),
    "429, a day": (status(429, Retry_After="86400"), "status 429", True),
    "429, a date": (status(429, Retry_After=formatdate(time.time() + 9e6, usegmt=True)), "429", True),
    "429, garbage": (status(429, Retry_After="soon"), "status 429", True),
    "500": (status(500, b"x" * 5000), r"status 500 \(x{100} \.\.\. x{100}\);", True),
    "502": (status(502), "status 502", True),
    "503": (status(503), "status 503", True),
    "529": (status(529), "status 529", True),
    "breaks": (breaks, "in 3 attempts: ", True),
    "closes": (closes, "in 3 attempts: ", True),
    "no http": (no_http, "in 3 attempts: ", True),
    "redirect here": (status(307, Location="/v1/elsewhere"), r"redirects \(status 307\) to /v1/else", False),
    "echo": (echo, r"status 401 \(bad: Bearer \[key\] Bearer \[key\] Bearer \[key\] \\x1b\[2J", False),
    "echo as verdict": (echo_of("A"), r"the verdict is 'A Bearer \[key\]'", True),
}


@pytest.mark.parametrize("mode", LASTING)
def test_lasting_trouble_with_one_comparison(mode, tmp_path):
    answer, line, again = LASTING[mode]
    run = Run(tmp_path, answer)
    with Server(run.answer) as server:
        with pytest.raises(UserError, match=line) as caught:
            run.judge(server, retry_after=0.02)
        assert run.asked[BAD] == (3 if again else 1)
        run.finish(server)
    text = str(caught.value)
    assert text.startswith(f"call {BAD + 1} of {ROWS}: the judge at {server.url}/chat/completions ")
    assert text.isprintable()
    assert len(text) < 700
    assert "secret" not in text


@pytest.mark.parametrize("mode", [mode for mode, (_, _, again) in LASTING.items() if again])
def test_passing_trouble_is_not_seen(mode, tmp_path):
    run = Run(tmp_path, LASTING[mode][0], once=True)
    with Server(run.answer) as server:
        assert run.judge(server, retry_after=0.02).tolist() == EXPECTED
        assert run.asked == dict.fromkeys(range(ROWS), 1) | {BAD: 2}
        run.finish(server)


@pytest.mark.parametrize(
    "text",
    [
        "b",
        " B.\n",
        "**B**",
        "`B`",
        "(b)",
        '"B"!',
        "<think>A is longer, but</think> B",
        "<think>\nA\n</think>\n\n<think>A</think>B",
        "the template opened the thought: A</think>\nB",
        [{"type": "thinking", "thinking": "A"}, {"type": "text", "text": "B"}],
    ],
)
def test_forms_of_a_verdict(text, tmp_path):
    run = Run(tmp_path, said(text))
    with Server(run.answer) as server:
        assert run.judge(server, retries=0).tolist() == EXPECTED


@pytest.mark.parametrize("code", [301, 302, 303, 307, 308])
def test_no_key_goes_to_another_host(code, tmp_path):
    with Server(lambda number, body: ok("A")) as other:
        elsewhere = f"http://localhost:{other.server.server_port}/v1/chat/completions?key={KEY}"
        run = Run(tmp_path, status(code, Location=elsewhere))
        with Server(run.answer) as server:
            with pytest.raises(
                UserError, match=rf"redirects \(status {code}\) to http://localhost"
            ) as caught:
                run.judge(server)
            assert run.asked[BAD] == 1
            run.finish(server)
        assert other.requests == []
    assert "secret" not in str(caught.value)


def drip(handler, pause=0.05):
    """A good answer, of which a byte comes now and then: no single read takes long."""
    for byte in b"HTTP/1.0 200 OK\r\n\r\n" + completion("A") + b" " * 10_000:
        handler.wfile.write(bytes([byte]))
        handler.wfile.flush()
        time.sleep(pause)


def drip_body(handler):
    handler.send_response(200)
    handler.end_headers()
    for _ in range(10_000):
        handler.wfile.write(b" ")
        handler.wfile.flush()
        time.sleep(0.05)


@pytest.mark.parametrize("mode", ["drip", "drip_body", "hang"])
def test_the_deadline_is_of_the_whole_answer(mode, tmp_path):
    end = threading.Event()
    slow = {"drip": drip, "drip_body": drip_body, "hang": lambda handler: end.wait(600)}[mode]
    with Server(lambda number, body: slow) as server:
        judge = EndpointJudge(server.url, "m", "c", timeout=0.2, retries=1, backoff=0.01)
        begun = time.monotonic()
        with pytest.raises(UserError, match=r"call 1 of 1: .* in 2 attempts: no answer within 0\.2 s"):
            judge(["prompt 0"], ["a"], ["b"])
        assert time.monotonic() - begun < 60  # a drip is over after minutes
        assert len(server.requests) == 2
        end.set()


def test_a_wait_that_is_asked_for_is_capped_and_said(tmp_path, capsys):
    run = Run(tmp_path, status(429, Retry_After="86400"), once=True)
    with Server(run.answer) as server:
        assert run.judge(server, retry_after=0.3).tolist() == EXPECTED
    line = " ".join(capsys.readouterr().err.split())
    assert f"{server.url}/chat/completions asks to wait 86400 s, and is asked again after 0.3 s" in line


def test_waits_are_seconds_or_dates():
    later = formatdate(time.time() + 100, usegmt=True)
    assert 90 < seconds_to_wait(later) <= 100
    assert [seconds_to_wait(text) for text in ("7", "0.5", "-3", "", "nan", "Mon, 99 Foo", "0x1")] == [
        7.0,
        0.5,
        0.0,
        0.0,
        0.0,
        0.0,
        0.0,
    ]
    assert seconds_to_wait(formatdate(0, usegmt=True)) == 0.0


def test_a_refused_comparison_may_count_as_a_tie(tmp_path, capsys):
    run = Run(tmp_path, status(400, b"filtered"))
    with Server(run.answer) as server:
        verdicts = run.judge(server, refusals="tie")
        assert verdicts.tolist() == [*EXPECTED[:BAD], 0.5, *EXPECTED[BAD + 1 :]]
        assert "refused 1 of 10 comparisons: they count as ties" in " ".join(capsys.readouterr().err.split())
        run.finish(server)  # no verdict: asked for by the next start
    with Server(lambda number, body: status(400, b"no such model")) as server:
        judge = EndpointJudge(server.url, "m", "c", refusals="tie")
        with pytest.raises(UserError, match=r"status 400 \(no such model\)"):
            judge(["prompt 0", "prompt 1"], ["a"] * 2, ["b"] * 2)


def test_a_question_that_comes_again_is_asked_once():
    with Server(lambda number, body: right(row_of(body))) as server:
        judge = EndpointJudge(server.url, "m", "c")
        prompts = ["prompt 0", "prompt 1", "prompt 0"]
        assert judge(prompts, ["a"] * 3, ["b"] * 3).tolist() == [1.0, 0.0, 1.0]
        assert judge(prompts, ["a"] * 3, ["b"] * 3).tolist() == [1.0, 0.0, 1.0]
        assert len(server.requests) == 2
        for other in (
            EndpointJudge(server.url, "other", "c", verdicts=judge.verdicts),
            EndpointJudge(server.url, "m", "other", verdicts=judge.verdicts),
            EndpointJudge(server.url, "m", "c", temperature=0.5, verdicts=judge.verdicts),
            EndpointJudge(
                server.url, "m", "c", template="Prompt:\n{prompt}\n{a} {b}", verdicts=judge.verdicts
            ),
        ):
            other(prompts, ["a"] * 3, ["b"] * 3)
        assert len(server.requests) == 2 + 4 * 2


def test_a_key_that_no_header_takes_is_not_shown(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nother")
    with pytest.raises(UserError, match=r"the key in \$OPENAI_API_KEY holds characters") as caught:
        EndpointJudge("http://127.0.0.1:9/v1", "m", "c")(["prompt 0"], ["a"], ["b"])
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("address", ["https://me:sk-secret@host/v1", "https://host/v1?key=sk-secret"])
def test_an_address_holds_no_key(address):
    with pytest.raises(UserError, match=r"goes into \$OPENAI_API_KEY") as caught:
        EndpointJudge(address, "m", "c")
    assert "secret" not in str(caught.value)


# -- the file of verdicts --------------------------------------------------------------------------


def test_damaged_lines_do_not_count(tmp_path, capsys):
    kept = Verdicts(tmp_path)
    for name, verdict in zip("abc", (1.0, 0.0, 0.5), strict=True):
        kept[name] = verdict
    whole = kept.path.read_bytes()
    assert dict(Verdicts(tmp_path)) == {"a": 1.0, "b": 0.0, "c": 0.5}
    for size in range(len(whole)):  # a kill in the middle of a line, at every byte
        kept.path.write_bytes(whole[:size])
        lines = whole[:size].count(b"\n")
        again = Verdicts(tmp_path)
        assert len(again) in (lines, lines + 1)
        again["d"] = 1.0
        assert dict(Verdicts(tmp_path)) == dict(again)
    rng = np.random.default_rng(0)
    for _ in range(300):  # a flip of any bit
        damaged = bytearray(whole)
        damaged[rng.integers(len(whole))] ^= 1 << rng.integers(8)
        kept.path.write_bytes(damaged)
        found = dict(Verdicts(tmp_path))
        assert found.items() <= {"a": 1.0, "b": 0.0, "c": 0.5}.items()
    assert "asked for again" in capsys.readouterr().err


def test_lines_are_json(tmp_path):
    kept = Verdicts(tmp_path / "made" / "when needed")
    assert not (tmp_path / "made").exists()
    kept["a"] = 0.5
    key, verdict, _ = json.loads(kept.path.read_text())
    assert (key, verdict) == ("a", 0.5)
