"""JSON and server-sent events over HTTP with the standard library alone, and the errors an engine can act on.

Guarantee: every failure is a `ServerError` that says whether asking again can help; a key never stands in a message.
"""

from __future__ import annotations

import http.client
import json
import ssl
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from urllib.parse import urlsplit

RETRYABLE = frozenset({408, 409, 425, 429, 500, 502, 503, 504, 529})
"""Statuses after which the same request may succeed."""


class ServerError(Exception):
    """A request failed. `status` is None when no answer came; `retry_after_s` what the server asked to wait."""

    def __init__(self, what: str, *, status: int | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(what)
        self.status = status
        self.retry_after_s = retry_after_s

    @property
    def retryable(self) -> bool:
        """Whether asking again may help."""
        return self.status is None or self.status in RETRYABLE


@contextmanager
def _answer(
    method: str, url: str, body: Any, *, headers: Mapping[str, str], timeout_s: float
) -> Iterator[http.client.HTTPResponse]:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServerError(f"{url!r} is not an http or https address", status=400)
    connection: http.client.HTTPConnection
    if parts.scheme == "https":
        context = ssl.create_default_context()
        connection = http.client.HTTPSConnection(parts.hostname, parts.port, timeout=timeout_s, context=context)
    else:
        connection = http.client.HTTPConnection(parts.hostname, parts.port, timeout=timeout_s)
    where = f"{method} {parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
    try:
        data = None if body is None else json.dumps(body).encode()
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        connection.request(method, path, data, {"Content-Type": "application/json", **headers})
        response = connection.getresponse()
        if response.status >= 400:
            text = _without_keys(response.read(2000).decode("utf-8", "replace"), headers)
            wait = response.headers.get("Retry-After", "")
            raise ServerError(
                f"{where} answered {response.status}: {text[:500]}",
                status=response.status,
                retry_after_s=float(wait) if wait.replace(".", "", 1).isdigit() else None,
            )
        yield response
    except TimeoutError as error:
        raise ServerError(f"{where}: nothing came for {timeout_s:g} s") from error
    except (OSError, http.client.HTTPException) as error:
        raise ServerError(f"{where}: {type(error).__name__}: {error}") from error
    finally:
        connection.close()


def _without_keys(text: str, headers: Mapping[str, str]) -> str:
    """What a server said, without what we sent it in `headers`: some repeat the key that they refuse."""
    for value in headers.values():
        for part in value.split():
            if len(part) > 3 and part != "Bearer":
                text = text.replace(part, "[hidden]")
    return text


def request_json(
    method: str, url: str, body: Any = None, *, headers: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> Any:
    """The answer's JSON, None for an empty answer. `timeout_s` counts seconds without a byte."""
    with _answer(method, url, body, headers=headers or {}, timeout_s=timeout_s) as response:
        raw = response.read()
    if not raw:
        return None
    try:
        return json.loads(raw)
    except ValueError as error:
        text = _without_keys(raw[:2000].decode("utf-8", "replace"), headers or {})[:200]
        raise ServerError(f"{method} {url}: the answer is not JSON: {text!r}", status=502) from error


def tell(url: str, body: Any = None, *, timeout_s: float = 60.0) -> None:
    """POST what needs no answer but success: what a server says about it may be JSON or plain words."""
    with _answer("POST", url, body, headers={}, timeout_s=timeout_s) as response:
        response.read()


def stream_json(
    url: str, body: Any, *, headers: Mapping[str, str] | None = None, timeout_s: float = 60.0
) -> Iterator[dict[str, Any]]:
    """POST and yield the JSON of each server-sent event until `[DONE]`. A stream that ends without it is a ServerError."""
    with _answer("POST", url, body, headers=headers or {}, timeout_s=timeout_s) as response:
        for line in response:
            if not line.startswith(b"data:"):
                continue
            data = line[5:].strip()
            if data == b"[DONE]":
                return
            try:
                event = json.loads(data)
            except ValueError as error:
                raise ServerError(f"the stream held something else than JSON: {data[:200]!r}", status=502) from error
            if isinstance(event, dict) and "error" in event:
                raise ServerError(f"the server reports {_without_keys(str(event['error']), headers or {})}", status=500)
            yield event
    raise ServerError("the stream broke off")
