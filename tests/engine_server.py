"""A server that answers as `vllm serve` does, from an engine of a test."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from torchrl_maxmin.rollouts.weight_link import received

STARTED = {"logprobs_mode": "processed_logprobs", "max_model_len": 64, "data_parallel_size": 1}


class Answers:
    """What each path answers, of a server started as :data:`STARTED`, or otherwise.

    ``lost`` is a weight that has no place; ``stuck`` an event before which no weights are asked for.
    """

    def __init__(self, engine, **otherwise):
        vocabulary = {"vocab_size": engine.policy.model.config.vocab_size}
        self.engine, self.started = engine, STARTED | vocabulary | otherwise
        self.empties_cache, self.lost = True, None
        self.well, self.stuck = True, None
        self.lock = threading.Lock()  # a test's engine draws from torch's own generator
        self.requests = []

    def collective_rpc(self, asked):
        if asked["method"] == "describe":
            return {"results": [self.started]}
        assert asked["method"] == "receive_policy"
        (words,) = asked["args"]
        if self.stuck is not None:
            self.stuck.wait()
        sent = json.loads(words)
        weights = {}
        for name, weight in received(sent["address"], 1, sent["size"], sent["weights"]):
            if name == self.lost:
                raise ValueError(f"{name} has no place")
            weights[name] = weight
        self.engine.load(weights)
        return {"results": [None]}

    def reset_prefix_cache(self, _):
        return {"success": self.empties_cache}

    def generate(self, asked):
        options, tokens = asked["sampling_params"], asked["token_ids"]
        if "prompt_logprobs" in options:
            steps = zip(tokens[1:], self.engine.score(tokens), strict=True)
            return {"prompt_logprobs": [None, *({token: {"logprob": value}} for token, value in steps)]}
        (sample,) = self.engine.generate([tokens], [options["seed"]], stop_early="stop" in options)
        content = [{"logprob": value} for value in sample.log_probs]
        return {"choices": [{"token_ids": sample.tokens, "logprobs": {"content": content}}]}

    def __call__(self, path, asked):
        with self.lock:
            self.requests.append((path, asked))
            return getattr(self, path.rsplit("/", 1)[-1])(asked)


@contextmanager
def serving(answers):
    """Yield the address at which the answers are had."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                status, body = 200, answers(self.path, asked)
            except Exception as error:
                status, body = 500, {"error": str(error)}
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(body).encode())

        def do_GET(self):
            assert self.path == "/health"
            self.send_response(200 if answers.well else 503)
            self.end_headers()

        def log_message(self, *_):
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
