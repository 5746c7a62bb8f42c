"""What stands before every request: who may ask, from where, and how much at once."""

from __future__ import annotations

import hmac
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

LOOPBACK = ("127.0.0.1", "localhost", "::1")
OPEN = ("/", "/healthz")  # need no key: the page asks for it, and says nothing of the model
BODIES = ("/v1/chat/completions", "/v1/completions")  # what takes a body
MOST_BYTES = 8_000_000
INVALID = "invalid_request_error"


@dataclass(frozen=True)
class Limits:
    """What a server gives."""

    body: int = MOST_BYTES  # bytes of a request
    seconds: float = 600.0  # for an answer, from when it was asked for
    tokens: int | None = None  # of an answer; None: as many as the model can read
    key: str | None = None
    hosts: Sequence[str] = ()  # names it answers to; none: any


def error_body(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients read it."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


class Guard:
    """ASGI middleware: wrong key, foreign host and too large a body end here."""

    def __init__(self, app: Any, limits: Limits) -> None:
        self.app, self.limits = app, limits

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        headers = {name.lower(): value for name, value in scope["headers"]}
        refused = self._refused(scope["path"], headers)
        if refused is None and scope["method"] == "POST" and scope["path"] in BODIES:
            body = await self._body(headers, receive)
            if isinstance(body, bytes):
                receive = _again(body, receive)
            else:
                refused = body
        if refused is None:
            return await self.app(scope, receive, send)
        await _answer(send, *refused)

    def _refused(self, path: str, headers: dict[bytes, bytes]) -> tuple[int, dict[str, Any]] | None:
        limits = self.limits
        host = _host(headers.get(b"host", b"").decode("latin-1"))
        if limits.hosts and host not in limits.hosts:
            return 421, error_body("this server does not answer to that name", INVALID)
        if limits.key is None or path in OPEN or path.startswith("/page/"):
            return None
        given = headers.get(b"authorization", b"")
        if hmac.compare_digest(given, b"Bearer " + limits.key.encode()):
            return None
        said = "no API key was given" if not given else "the API key is wrong"
        return 401, error_body(f"{said}: send it as Authorization: Bearer KEY",
                               INVALID, "invalid_api_key")  # fmt: skip

    async def _body(self, headers: dict[bytes, bytes], receive: Any) -> Any:
        most = self.limits.body
        too_large = 413, error_body(f"the request is larger than {most:,} bytes",
                                    INVALID)  # fmt: skip
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > most:
            return too_large
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if kind != b"application/json":  # what a foreign page could send without being asked
            return 415, error_body("send Content-Type: application/json", INVALID)
        parts, size = [], 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                return 400, error_body("the client has gone", INVALID)
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > most:
                return too_large
            if not message.get("more_body"):
                return b"".join(parts)


def _again(body: bytes, receive: Any) -> Any:
    """A `receive` that gives the body that was read already."""
    given = False

    async def once() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return once


def _host(header: str) -> str:
    """The name in a Host header, without its port."""
    if header.startswith("["):
        return header[1:].partition("]")[0]
    return header.partition(":")[0].lower()


async def _answer(send: Any, status: int, body: dict[str, Any]) -> None:
    raw = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(raw))]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if status == 413:  # what is still to come is not read
        headers.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": raw})
