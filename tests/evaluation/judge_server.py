"""A chat endpoint on this machine, whose answers a test writes."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Server:
    """A chat endpoint whose answers a test writes: (status, body, headers, delay) of the n-th call.

    Or a function of the handler, which answers by itself.
    """

    def __init__(self, answer):
        self.requests = []
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(handler):
                body = json.loads(handler.rfile.read(int(handler.headers.get("Content-Length", 0))) or b"{}")
                with lock:
                    self.requests.append((handler.path, dict(handler.headers), body))
                    number = len(self.requests)
                said = answer(number, body)
                try:
                    if callable(said):
                        said(handler)
                        return
                    status, payload, headers, delay = said
                    time.sleep(delay)
                    handler.send_response(status)
                    for name, value in headers.items():
                        handler.send_header(name, value)
                    handler.end_headers()
                    handler.wfile.write(payload)
                except (BrokenPipeError, ConnectionResetError):
                    pass  # the client gave up, as the test wants

            do_GET = do_POST

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.thread = threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True)

    def __enter__(self):
        self.thread.start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.thread.join()


def completion(said):
    return json.dumps({"choices": [{"message": {"role": "assistant", "content": said}}]}).encode()


def ok(said):
    return 200, completion(said), {}, 0.0


def shorter(number, body):
    """A judge of brevity that reads the two responses out of the question."""
    question = body["messages"][0]["content"]
    a = question.split("Response A:\n")[1].split("\n\nResponse B:")[0]
    b = question.split("Response B:\n")[1].split("\n\nWhich")[0]
    return ok("TIE" if len(a) == len(b) else " a\n" if len(a) < len(b) else "**B**.")
