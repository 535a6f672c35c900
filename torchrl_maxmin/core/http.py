"""Ask servers over HTTP: one deadline for a whole answer, no redirects, and no secret in any message."""

from __future__ import annotations

import os
import ssl
import time
import weakref
from collections.abc import Mapping, Sequence
from concurrent.futures import CancelledError
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cache
from typing import Any
from urllib.parse import quote

from torchrl_maxmin.core.errors import UserError
from torchrl_maxmin.core.text_escape import terminal

__all__ = ["HttpAnswer", "HttpClient", "HttpError", "RedirectError", "seconds_to_wait"]

_LONGEST = 64 * 2**20  # bytes of an answer


class HttpError(Exception):
    """A server gave no whole answer; one line says why."""


class RedirectError(HttpError):
    """A server sends elsewhere, where nobody follows it."""


@dataclass(frozen=True)
class HttpAnswer:
    """What a server answered.

    Attributes:
        status: such as 200.
        headers: by their names in lower case.
        body: all of it.
    """

    status: int
    headers: Mapping[str, str]
    body: bytes


class HttpClient:
    """Sends requests, from any number of threads at once; where it ends it gives up those on the way.

    It ends with its ``with`` block, when nobody holds it any more, and at the end of the process.

    Args:
        timeout: seconds from the start of a request to the last byte of its answer.
        secrets: what no line may show, such as a key.

    Raises:
        UserError: where the package for it is not installed.
    """

    def __init__(self, timeout: float, secrets: Sequence[str] = ()):
        try:
            import httpx2
            from anyio.from_thread import start_blocking_portal
        except ImportError as error:
            raise UserError("requests over HTTP need httpx2: pip install 'torchrl-maxmin[llm]'") from error
        self.timeout = timeout
        # a server may give a key back as JSON or an address holds it
        forms = [form for key in secrets for form in (key, key.replace("/", "\\/"), quote(key, safe=""))]
        self._secrets = sorted({form for form in forms if form}, key=len, reverse=True)
        stack = ExitStack()
        # asynchronous, for only so can one deadline hold for all that a server may do slowly
        self._portal = stack.enter_context(start_blocking_portal())
        # before the interpreter stops the thread of the portal, which would be waited for in vain
        self._close = weakref.finalize(self, _close, self._portal, stack)
        limits = httpx2.Limits(max_connections=None, max_keepalive_connections=None)
        self._client = httpx2.AsyncClient(
            verify=_certificates(), timeout=None, limits=limits, follow_redirects=False
        )

    def __enter__(self) -> HttpClient:
        return self

    def __exit__(self, *exc_info: Any) -> None:
        if exc_info[0] is None:
            self._portal.call(self._client.aclose)
        self._close()

    def shown(self, text: str | bytes, length: int = 200) -> str:
        """Make one line of what a server said: without secrets, nothing in it acts, and it is cut."""
        words = text.decode(errors="replace") if isinstance(text, bytes) else text
        for secret in self._secrets:
            words = words.replace(secret, "[key]")
        return terminal(words, length)

    def request(
        self, url: str, content: bytes | None = None, headers: Mapping[str, str] | None = None
    ) -> HttpAnswer:
        """Ask, and wait for the whole answer, whatever its status.

        Args:
            url: where.
            content: sent by POST; GET where it is None.
            headers: of the request.

        Raises:
            RedirectError: for an answer that sends elsewhere.
            HttpError: where there is no whole answer in time.
        """
        import httpx2

        try:
            answer = self._portal.call(self._send, url, content, dict(headers or {}))
        except TimeoutError as error:
            raise HttpError(f"no answer within {self.timeout:g} s") from error
        except CancelledError as error:
            raise HttpError("given up, as the client ended") from error
        except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
            raise HttpError(self.shown(_reason(error))) from error
        if 300 <= answer.status < 400:
            where = self.shown(answer.headers.get("location", "nowhere"))
            raise RedirectError(f"redirects (status {answer.status}) to {where}, which is not followed")
        return answer

    async def _send(self, url: str, content: bytes | None, headers: dict[str, str]) -> HttpAnswer:
        import anyio

        with anyio.fail_after(self.timeout):
            method = "GET" if content is None else "POST"
            async with self._client.stream(method, url, content=content, headers=headers) as response:
                body = bytearray()
                async for part in response.aiter_bytes():
                    body += part
                    if len(body) > _LONGEST:
                        raise OSError(f"the answer is longer than {_LONGEST >> 20} MB")
                named = {name.lower(): value for name, value in response.headers.items()}
                return HttpAnswer(response.status_code, named, bytes(body))


def _close(portal: Any, stack: ExitStack) -> None:
    """Cancel the requests on the way, and end the thread that they are in."""
    with suppress(RuntimeError):
        portal.call(portal.stop, True)
    stack.close()


@cache
def _certificates() -> ssl.SSLContext:
    """Whom to trust, read from files once."""
    import httpx2

    return httpx2.create_ssl_context()


def _reason(error: BaseException) -> str:
    """What the system said, where it is the cause, and not only that nothing worked."""
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, OSError) and cause.strerror:
            return os.strerror(cause.errno) if cause.errno and cause.errno > 0 else cause.strerror
        if isinstance(cause, BaseExceptionGroup):
            cause = cause.exceptions[0]
        else:
            cause = cause.__cause__ or cause.__context__
    return str(error) or type(error).__name__


def seconds_to_wait(retry_after: str) -> float:
    """Read a ``Retry-After``: seconds or a date; 0 for what is neither, or over.

    Example:
        >>> seconds_to_wait("1.5"), seconds_to_wait("soon"), seconds_to_wait("Thu, 01 Jan 1970 00:00:00 GMT")
        (1.5, 0.0, 0.0)
    """
    try:
        wait = float(retry_after)
    except ValueError:
        try:
            wait = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, TypeError, OverflowError):
            return 0.0
    return wait if wait > 0 else 0.0
