"""The HTTP side: OpenAI's chat and text completions with skills, and a page to chat on.

    app(loaded, name, skills, engine, limits) -> an ASGI application

A client sends text and names of skills, never tensors. Every error is a JSON object with a status
that says whose fault it was; what went wrong inside stays in the log.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, Response, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException

from skimlm import __version__
from skimlm.errors import SkimError
from skimlm.serve import prompt
from skimlm.serve.answer import Answer, Failed, Late
from skimlm.serve.engine import Engine, Full, Job
from skimlm.serve.forms import Chat, Text
from skimlm.serve.guard import INVALID, Guard, Limits, error_body
from skimlm.serve.metrics import Metrics
from skimlm.serve.sampling import Sampling
from skimlm.serve.schema import Body, ChatBody, TextBody
from skimlm.serve.shape import Rule, Shapes
from skimlm.serve.skills import Skills
from skimlm.serve.text import Pieces
from skimlm.serve.tools import Split, split, written_so
from skimlm.skills.distill import ends

PAGE = Path(__file__).parent / "page"
POLICY = "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; " + (
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
LOG = logging.getLogger("skimlm.serve")


@dataclass(frozen=True)
class Server:
    """What the routes need."""

    model: Any
    tokenizer: Any
    name: str
    skills: Skills
    engine: Engine
    limits: Limits
    metrics: Metrics
    shapes: Shapes
    words: ThreadPoolExecutor  # of one thread
    about: dict[str, Any]  # of the model, for the page
    created: int


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str, kind: str = INVALID, code: str | None = None):
        super().__init__(message)
        self.status, self.body = status, error_body(message, kind, code)


def app(
    model: Any,
    tokenizer: Any,
    name: str,
    skills: Skills,
    engine: Engine,
    limits: Limits,
    about: dict[str, Any] | None = None,
) -> FastAPI:
    """The application that serves one model."""
    metrics = Metrics(engine, skills)
    rows = model.get_input_embeddings().num_embeddings
    shapes = Shapes(tokenizer, rows, ends(model, tokenizer))
    server = Server(
        model, tokenizer, name, skills, engine, limits, metrics, shapes,
        ThreadPoolExecutor(1), about or {},
        int(time.time()),
    )  # fmt: skip

    @contextlib.asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(engine.stop)

    made = FastAPI(
        title="skimlm", version=__version__, lifespan=life, docs_url=None, redoc_url=None
    )
    _errors(made)
    _completions(made, server)
    _facts(made, server)
    _page(made)
    made.add_middleware(Guard, limits=limits)
    return made


# ---- answers


def _completions(made: FastAPI, server: Server) -> None:
    @made.post("/v1/chat/completions", responses=RESPONSES)
    async def chat(body: ChatBody, request: Request) -> Response:
        """Answer a conversation, with skills before it."""
        names = _named(server, body)
        messages = [message.plain() for message in body.messages]
        tools = body.tools if body.tool_choice != "none" else None
        parts = server.tokenizer, messages, tools, bool(names)
        ids = await _apart(server, prompt.chat_ids, *parts)
        shape = body.shape()
        rule = None if shape is None else await _apart(server, server.shapes.rule, shape)
        most = body.max_completion_tokens or body.max_tokens
        asked = _ask(server, body, ids, names, most, raw=False, rule=rule)
        form = Chat(server.name, calls=bool(tools) and written_so(server.tokenizer))
        return await _respond(server, request, body, asked, form)

    @made.post("/v1/completions", responses=RESPONSES)
    async def text(body: TextBody, request: Request) -> Response:
        """Go on with a text."""
        names = _named(server, body)
        words = body.words()
        ids = await _apart(server, prompt.text_ids, server.tokenizer, words, bool(names))
        asked = _ask(server, body, ids, names, body.max_tokens, raw=True)
        return await _respond(server, request, body, asked, Text(server.name))


async def _apart(server: Server, call: Callable[..., Any], *args: Any) -> Any:
    """Run a call that uses the tokenizer on the one thread for that: it has a state of its own."""
    return await asyncio.get_running_loop().run_in_executor(server.words, call, *args)


def _named(server: Server, body: Body) -> tuple[str, ...]:
    """The skills of a request, and those in the name of its model: NAME+SKILL+SKILL."""
    name, *more = [server.name] if body.model is None else _parts(server.name, body.model)
    if name != server.name:
        raise Refused(404, f"no model {body.model!r:.200}: there is {server.name!r}",
                      code="model_not_found")  # fmt: skip
    try:
        return server.skills.known([*more, *body.skills])
    except SkimError as error:
        raise Refused(404, str(error), code="skill_not_found") from None


def _parts(name: str, asked: str) -> list[str]:
    """What a model is called, taken apart; its own name may have a + in it."""
    if asked.startswith(f"{name}+"):
        return [name, *asked.removeprefix(f"{name}+").split("+")]
    return [asked]


@dataclass
class Asked:
    """An answer that is being made, and what it was asked for with."""

    answer: Answer
    names: tuple[str, ...]
    prompt_tokens: int  # positions before the answer
    cached_tokens: int  # of these, skills: read once, or never
    saved_tokens: int  # of skills' texts, for which fewer stand


def _ask(
    server: Server,
    body: Body,
    ids: Any,
    names: tuple[str, ...],
    most: int | None,
    raw: bool,
    rule: Rule | None = None,
) -> Asked:
    """Hand a request to the engine."""
    behind = server.skills.length(names, raw) if names else 0
    engine, limits = server.engine, server.limits
    room = prompt.check(server.model, server.tokenizer, ids, behind, engine.context)
    room = min(room, limits.tokens or room)
    seed = random.getrandbits(63) if body.seed is None else body.seed
    job = Job(
        ids,
        min(room, most or room),
        lambda job, item: answer.put(job, item),
        server.shapes.ends,
        (lambda: server.skills.prefix(names, raw)) if names else None,
        _sampling(server, body, seed, rule),
    )
    answer = Answer(engine, job, Pieces(server.tokenizer, body.stops()), limits.seconds)
    if not engine.alive():
        raise Refused(503, "the engine is being started: ask again", "server_error")
    try:
        engine.submit(job)
    except Full:
        raise Refused(
            429, "too many requests wait: ask again", "server_error", "queue_full"
        ) from None
    standing, full = server.skills.tokens(names)
    return Asked(answer, names, behind + len(ids), behind, full - standing)


def _sampling(server: Server, body: Body, seed: int, rule: Rule | None) -> Sampling:
    bias = {int(token): value for token, value in (body.logit_bias or {}).items()}
    usual = server.model.generation_config  # heeded where it samples
    if not usual.do_sample:
        usual = None
    asked = {
        name: value if (value := getattr(body, name)) is not None else getattr(usual, name, None)
        for name in ("temperature", "top_p", "top_k")
    }
    return Sampling(
        temperature=1.0 if asked["temperature"] is None else asked["temperature"],
        top_p=1.0 if asked["top_p"] is None else asked["top_p"],
        top_k=asked["top_k"] or 0,
        presence=body.presence_penalty or 0.0,
        frequency=body.frequency_penalty or 0.0,
        bias={token: value for token, value in bias.items() if token < server.shapes.rows},
        seed=seed % 2**64,
        rule=rule,
    )


def _usage(asked: Asked) -> dict[str, Any]:
    answer = asked.answer
    return {
        "prompt_tokens": asked.prompt_tokens,
        "completion_tokens": answer.tokens,
        "total_tokens": asked.prompt_tokens + answer.tokens,
        "prompt_tokens_details": {"cached_tokens": asked.cached_tokens},
        "skills": list(asked.names),
        "skill_tokens_saved": asked.saved_tokens,
        "seconds_to_first_token": answer.first,
        "tokens_per_second": answer.speed(),
    }


async def _respond(
    server: Server, request: Request, body: Body, asked: Asked, form: Text
) -> Response:
    if body.stream:
        usage = bool(body.stream_options and body.stream_options.include_usage)
        return StreamingResponse(
            _events(server, request, asked, form, usage),
            media_type="text/event-stream",
            headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"},
        )
    text = asyncio.ensure_future(asked.answer.text())
    gone = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({text, gone}, return_when=asyncio.FIRST_COMPLETED)
        if not text.done():
            server.metrics.requests.labels("gone").inc()
            return Response(status_code=499)
        said = text.result()
    except (Failed, Late, SkimError) as error:
        raise _as_refused(server, error) from error
    finally:
        gone.cancel()
        text.cancel()
    _count(server, asked)
    made = form.whole(*(split(said) if form.calls else (said, [])), asked.answer.finish)
    return JSONResponse({**made, "usage": _usage(asked)})


async def _events(
    server: Server, request: Request, asked: Asked, form: Text, usage: bool
) -> AsyncIterator[str]:
    """Server-sent events of an answer."""
    pieces = asked.answer.__aiter__()
    apart = Split(pieces) if form.calls else None
    try:
        yield _event(form.piece(None)) if isinstance(form, Chat) else ""
        async for piece in apart or pieces:
            yield _event(form.piece(piece))
        calls = apart.calls if apart else []
        yield _event(form.piece("", asked.answer.finish, calls))
        if usage:
            yield _event({**form.base, "object": form.chunk, "choices": [], "usage": _usage(asked)})
        yield "data: [DONE]\n\n"
        _count(server, asked)
    except (Failed, Late, SkimError) as error:
        yield _event(_as_refused(server, error).body)
    finally:
        if not asked.answer.finish:
            server.metrics.requests.labels("gone").inc()
        await pieces.aclose()  # type: ignore[attr-defined]


def _event(value: dict[str, Any]) -> str:
    return f"data: {json.dumps(value, ensure_ascii=False)}\n\n"


async def _gone(request: Request) -> None:
    """Returns when the client has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _count(server: Server, asked: Asked) -> None:
    metrics, answer = server.metrics, asked.answer
    metrics.requests.labels(answer.finish).inc()
    metrics.saved.inc(max(asked.saved_tokens, 0))
    if answer.first is not None:
        metrics.first.observe(answer.first)


def _as_refused(server: Server, error: Exception) -> Refused:
    if isinstance(error, SkimError):
        server.metrics.requests.labels("refused").inc()
        return Refused(400, str(error))
    if isinstance(error, Late):
        server.metrics.requests.labels("late").inc()
        seconds = server.limits.seconds
        return Refused(504, f"the answer took longer than {seconds:g} s", "server_error", "timeout")
    server.metrics.requests.labels("failed").inc()
    LOG.error("the engine failed", exc_info=error)
    return Refused(503, "the engine failed: ask again", "server_error", "engine_failed")


# ---- what there is


def _facts(made: FastAPI, server: Server) -> None:
    def listed(name: str) -> dict[str, Any]:
        return {
            "id": name,
            "object": "model",
            "created": server.created,
            "owned_by": "skimlm",
            "context_length": server.engine.context,
        }

    @made.get("/v1/models", responses=LISTED)
    async def models() -> dict[str, Any]:
        """The model that is served, and the same with each of its skills."""
        names = [server.name, *(f"{server.name}+{skill}" for skill in server.skills.entries)]
        return {"object": "list", "data": [listed(name) for name in names]}

    @made.get("/v1/models/{name:path}", responses={**LISTED, 404: ERROR})
    async def model(name: str) -> dict[str, Any]:
        """What is known of a model."""
        _named(server, Body(model=name))
        return listed(name)

    @made.get("/v1/skills", responses=LISTED)
    async def skills() -> dict[str, Any]:
        """The skills that a request can name."""
        rows = [
            {
                "id": entry.name,
                "object": "skill",
                "description": entry.description,
                "kind": entry.kind,
                "tokens": entry.tokens,
                "text_tokens": entry.text_tokens,
                "warning": entry.warning,
            }
            for entry in server.skills.entries.values()
        ]
        return {"object": "list", "data": rows}

    @made.get("/healthz", responses={503: ERROR})
    async def healthz() -> dict[str, Any]:
        """Whether requests are answered."""
        if not server.engine.alive():
            raise Refused(503, "the engine does not run", "server_error")
        return {"status": "ok"}

    @made.get("/metrics", responses={200: {"content": {"text/plain": {}}}, 401: ERROR})
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(server.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @made.get("/v1/about", responses=LISTED)
    async def about() -> dict[str, Any]:
        """What the page shows of the model: what it costs beside its original."""
        return {"name": server.name, "version": __version__, **server.about}


def _page(made: FastAPI) -> None:
    headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff",
               "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache"}  # fmt: skip

    def route(path: str, file: Path) -> None:
        @made.get(path, include_in_schema=False)
        async def page() -> Response:
            return FileResponse(file, headers=headers)

    route("/", PAGE / "index.html")
    for file in sorted(PAGE.glob("*.*")):
        route(f"/page/{file.name}", file)


# ---- errors


def _errors(made: FastAPI) -> None:
    def answer(status: int, body: dict[str, Any], **headers: str) -> JSONResponse:
        return JSONResponse(body, status, headers=headers)

    @made.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        headers = {"Retry-After": "1"} if error.status in (429, 503) else {}
        return answer(error.status, error.body, **headers)

    @made.exception_handler(SkimError)
    async def skim(_: Request, error: SkimError) -> JSONResponse:
        return answer(400, error_body(str(error), INVALID))

    @made.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        return answer(400, error_body(_told(error.errors()), INVALID))

    @made.exception_handler(HTTPException)
    async def http(_: Request, error: HTTPException) -> JSONResponse:
        return answer(error.status_code, error_body(str(error.detail), INVALID),
                      **(error.headers or {}))  # fmt: skip

    @made.exception_handler(Exception)
    async def other(_: Request, error: Exception) -> JSONResponse:
        return answer(500, error_body("the server failed", "server_error"))


def _told(errors: Sequence[Any]) -> str:
    """What is wrong with a body, in one line; nothing of it is repeated."""
    first = errors[0]
    place = ".".join(str(part) for part in first["loc"][1:] if part != "body")
    said = str(first["msg"])
    if first["type"] == "extra_forbidden":
        said = "is not supported"
    if first["type"] == "json_invalid":
        return "the body is not JSON"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"{place}: {said}{more}" if place else said + more


ERROR: dict[str, Any] = {
    "description": "What was wrong",
    "content": {
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["error"],
                "properties": {
                    "error": {
                        "type": "object",
                        "required": ["message", "type"],
                        "properties": {"message": {"type": "string"}, "type": {"type": "string"}},
                    }
                },
            }
        }
    },
}
LISTED: dict[int | str, dict[str, Any]] = {401: ERROR, 421: ERROR}
STATUSES = (400, 401, 404, 413, 415, 421, 422, 429, 499, 500, 503, 504)
RESPONSES: dict[int | str, dict[str, Any]] = {
    **{status: ERROR for status in STATUSES},
    200: {"content": {"application/json": {}, "text/event-stream": {}}},
}
