"""A client of servers ends with its process, whatever is still on the way."""

import subprocess
import sys

import pytest

pytest.importorskip("httpx2")

CLIENT = """
import gc, socket, threading
from torchrl_maxmin.core.http import HttpClient, HttpError

client = HttpClient(600.0)
"""
REQUEST = """
server = socket.create_server(("127.0.0.1", 0))  # takes a connection, and never answers
url = f"http://127.0.0.1:{server.getsockname()[1]}"
arrived = threading.Event()
threading.Thread(target=lambda: (server.accept(), arrived.set()), daemon=True).start()
def ask():
    try:
        client.request(url)
    except HttpError:
        pass

threading.Thread(target=ask, daemon=True).start()
arrived.wait()
"""
COLLECTED = "gc.disable(); cycle = [client]; cycle.append(cycle); del cycle, client"


@pytest.mark.parametrize(
    ("code", "status"),
    [(REQUEST + "client.__exit__(None)", 0), (REQUEST + "raise ValueError('as it ends')", 1), (COLLECTED, 0)],
    ids=["closed", "by an exception", "collected at the end"],
)
def test_a_process_ends_with_its_client(code, status):
    command = [sys.executable, "-c", CLIENT + code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == status, done.stderr
    assert ("as it ends" in done.stderr) == bool(status)
    assert "Cancelled" not in done.stderr
