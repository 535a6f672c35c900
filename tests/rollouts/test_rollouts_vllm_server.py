"""An engine behind an address: the policy's responses, weights over the link, one line where it fails."""

import threading
import time
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from engine_server import Answers, serving
from engines import CopyEngine, disturb, engine_parts

from torchrl_maxmin.core.errors import EngineError, UserError
from torchrl_maxmin.models.full import FullCopies
from torchrl_maxmin.rollouts import vllm_server
from torchrl_maxmin.rollouts.engine import EnginePolicy
from torchrl_maxmin.rollouts.vllm_server import VLLMServer
from torchrl_maxmin.rollouts.weight_link import WeightLink, described, received


@pytest.fixture
def parts(tiny_model, tokenizer):
    return engine_parts(tiny_model, tokenizer, lambda policy: FullCopies(policy, tokenizer, 0))


def engine_at(address, models, prompts, **options):
    length = prompts["prompt_tokens"].shape[-1]
    return VLLMServer(models.policy, address, max_prompt_length=length, **options)


def test_a_server_samples_what_the_same_engine_does_in_this_process(parts):
    models, prompts = parts
    within = EnginePolicy(models, CopyEngine(models.policy, models.tokenizer), prompts, seed=3)
    answers = Answers(CopyEngine(models.policy, models.tokenizer))
    with serving(answers) as address:
        served = EnginePolicy(models, engine_at(f"{address}/", models, prompts), prompts, seed=3)
        for _ in range(2):
            ours, theirs = within(prompts.clone()), served(prompts.clone())
            for key in ("action", "action_mask", "sample_log_prob"):
                assert torch.equal(ours[key], theirs[key]), key
            disturb(models.parameters()["policy"])
            assert served.measure_gap() > 0.1
    assert answers.engine.loads == 3
    resets = [path for path, _ in answers.requests if path == "/reset_prefix_cache"]
    assert len(resets) == 3


def test_what_is_asked_is_how_the_policy_samples(tiny_model, tokenizer):
    networks = lambda policy: FullCopies(policy, tokenizer, 0)  # noqa: E731
    models, prompts = engine_parts(tiny_model, tokenizer, networks, stop_strings=["."], temperature=0.7)
    answers = Answers(CopyEngine(models.policy, models.tokenizer))
    with serving(answers) as address:
        engine_at(address, models, prompts, top_k=4, top_p=0.9).generate([[5, 6]], [11])
    (asked,) = (body for path, body in answers.requests if path.endswith("generate"))
    assert asked["token_ids"] == [5, 6]
    assert asked["sampling_params"] == {
        "max_tokens": 6,
        "temperature": 0.7,
        "top_k": 4,
        "top_p": 0.9,
        "stop_token_ids": list(models.policy.eos_token_ids),
        "logprobs": 0,
        "detokenize": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "stop": ["."],
        "seed": 11,
    }


@pytest.mark.parametrize(
    ("started", "words"),
    [
        ({"logprobs_mode": "raw_logprobs"}, "--logprobs-mode processed_logprobs$"),
        ({"max_model_len": 8}, "--max-model-len of at least"),
        ({"vocab_size": 7}, r"--load-format dummy --hf-overrides '{\"vocab_size\": \d+}'$"),
        ({"data_parallel_size": 2}, "--data-parallel-size 1$"),
    ],
)
def test_a_server_that_was_started_otherwise_is_refused(parts, started, words):
    answers = Answers(CopyEngine(parts[0].policy, parts[0].tokenizer), **started)
    with serving(answers) as address, pytest.raises(UserError, match=words):
        engine_at(address, *parts)


def test_no_server_is_one_line_with_the_command(parts):
    with serving(None) as address:
        pass
    with pytest.raises(
        UserError, match=r"does not answer /collective_rpc \(.*refused\); start it with: VLLM_"
    ):
        engine_at(address, *parts)


def test_what_fails_is_an_engine_error_with_its_cause(parts):
    models, prompts = parts
    answers = Answers(CopyEngine(models.policy, models.tokenizer))
    with serving(answers) as address:
        sampler = EnginePolicy(models, engine_at(address, models, prompts), prompts)
        answers.lost = "transformer.h.0.ln_1.bias"
        with pytest.raises(EngineError, match=r"\(status 500: .*ln_1.bias has no place"):
            sampler.push()
        answers.lost = None
        sampler.push()  # the link belongs to one push
        answers.empties_cache = False
        with pytest.raises(EngineError, match="the cache of prompts could not be emptied"):
            sampler.push()
    with pytest.raises(EngineError, match=r"does not answer \(.*refused"):
        sampler.push()
    with pytest.raises(EngineError, match=r"does not answer /inference/v1/generate \(.*refused"):
        sampler.measure_gap()


def test_a_server_whose_engine_died_is_not_waited_for(parts):
    """vLLM never answers a call to workers that are gone; its health says so."""
    models, prompts = parts
    answers = Answers(CopyEngine(models.policy, models.tokenizer))
    with serving(answers) as address:
        sampler = EnginePolicy(models, engine_at(address, models, prompts), prompts)
        answers.well, answers.stuck = False, threading.Event()
        try:
            with pytest.raises(EngineError, match=r"does not answer /health \(status 503"):
                sampler.push()
        finally:
            answers.stuck.set()


@contextmanager
def answering(answer):
    """Yield the address of a server that answers every request so, and the requests."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            requests.append(self.path)
            answer(self)

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", requests
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def say(status, body=b"", **headers):
    def answer(handler):
        handler.send_response(status)
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def drip(handler):
    with suppress(OSError):  # the client gives up
        for _ in range(10_000):
            handler.wfile.write(b"H")
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (say(500, b"no\n\x1b[2Jway"), r"status 500: no \\x1b\[2Jway"),
        (say(200, b"<html>"), "no JSON, but '<html>'"),
        (drip, r"no answer within 0\.2 s"),
    ],
)
def test_a_server_that_answers_badly_is_one_line(parts, monkeypatch, answer, words):
    monkeypatch.setattr(vllm_server, "_SECONDS", 0.2 if answer is drip else 60.0)
    line = rf"does not answer /collective_rpc \({words}\); start it"
    with answering(answer) as (address, requests), pytest.raises(UserError, match=line):
        engine_at(address, *parts)
    assert requests == ["/collective_rpc"]


def test_no_weights_go_where_a_server_sends(parts):
    line = r"redirects \(status 307\) to http.*, which is not followed"
    with (
        answering(say(200, b"{}")) as (other, requests),
        answering(say(307, Location=f"{other}/x")) as (address, _),
        pytest.raises(UserError, match=line),
    ):
        engine_at(address, *parts)
    assert requests == []


@pytest.mark.parametrize("size", [2, 3])
def test_every_dtype_and_shape_arrives_at_every_worker(size):
    generator = torch.Generator().manual_seed(0)
    weights = {
        "matrix": torch.randn(5, 7, generator=generator).T,
        "half": torch.randn(3, generator=generator).to(torch.bfloat16),
        "scalar": torch.tensor(2.5),
        "counts": torch.arange(4),
        "none": torch.zeros(0, 3),
    }
    found = {}
    with WeightLink("127.0.0.1", size) as link:

        def work(rank):
            found[rank] = dict(received(link.address, rank, size, described(weights)))

        workers = [threading.Thread(target=work, args=(rank,)) for rank in range(1, size)]
        for worker in workers:
            worker.start()
        link.send(weights.values())
        for worker in workers:
            worker.join()
    assert sorted(found) == list(range(1, size))
    for arrived in found.values():
        assert list(arrived) == list(weights)
        for name, weight in weights.items():
            assert arrived[name].dtype == weight.dtype
            assert torch.equal(arrived[name], weight)
