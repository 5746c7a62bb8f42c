"""The server over HTTP, by the real `openai` client and by hand."""

import asyncio
import copy
import json
import socket
import subprocess
import sys
import threading
import time

import httpx
import openai
import pytest

from serve_sample import TEXT, make_world, running
from skimlm.generate import generate
from skimlm.serve.guard import Limits
from skimlm.serve.skills import Skills
from skimlm.serve.text import Pieces

ASK = [{"role": "user", "content": "What now?"}]
JSON = {"Content-Type": "application/json"}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return make_world(tmp_path_factory)


@pytest.fixture(scope="module")
def served(world):
    """An address and its engine, used by all tests that change nothing."""
    with running(*world) as (address, engine):
        yield address, engine


@pytest.fixture
def client(served):
    return openai.OpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)


def post(address, path="/v1/chat/completions", **body):
    return httpx.post(address + path, json=body, timeout=60)


def message_of(response, status):
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error["message"]


# ---- answers


def test_an_answer_is_that_of_generate(world, client):
    model, tokenizer, _ = world
    want = generate(model, tokenizer, "What now?", 12)
    got = client.chat.completions.create(
        model="tiny", messages=ASK, max_completion_tokens=12, temperature=0
    )
    (choice,) = got.choices
    assert choice.message.content == want.text and choice.message.role == "assistant"
    assert choice.finish_reason in ("length", "stop")
    assert got.usage.prompt_tokens == want.prompt_tokens and got.usage.completion_tokens <= 12
    text = generate(model, tokenizer, "What now?", 12, raw=True)
    got = client.completions.create(model="tiny", prompt="What now?", max_tokens=12, temperature=0)
    assert got.choices[0].text == text.text


def test_a_stream_gives_the_same_in_pieces(client):
    how = dict(model="tiny", messages=ASK, max_tokens=20, temperature=0)
    want = client.chat.completions.create(**how)
    chunks = list(
        client.chat.completions.create(**how, stream=True, stream_options={"include_usage": True})
    )
    said = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert "".join(said) == want.choices[0].message.content and len(said) > 5
    assert chunks[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in chunks if c.choices][-1] == (
        want.choices[0].finish_reason
    )
    assert chunks[-1].usage.completion_tokens == want.usage.completion_tokens
    assert len({chunk.id for chunk in chunks}) == 1
    words = list(client.completions.create(model="tiny", prompt="x", max_tokens=5, stream=True))
    assert words[-1].choices[0].finish_reason in ("length", "stop")


@pytest.mark.parametrize("names", [["tidy-notes"], ["other"], ["tidy-notes", "other"]], ids=str)
def test_skills_stand_before_the_question(world, client, names):
    model, tokenizer, folder = world
    skills = Skills(model, tokenizer, folder)
    stands = [skills.entries[name].stands for name in names]
    want = generate(model, tokenizer, "What now?", 12, skills=stands)
    got = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=12, temperature=0, extra_body={"skills": names}
    )
    assert got.choices[0].message.content == want.text
    assert got.usage.prompt_tokens == want.prompt_tokens
    saved = len(TEXT.rstrip()) - 40 if "tidy-notes" in names else 0
    assert got.usage.skill_tokens_saved == saved and got.usage.skills == names


def test_skills_in_the_name_of_the_model_are_for_clients_that_can_send_no_more(client):
    def say(model, **more):
        got = client.chat.completions.create(
            model=model, messages=ASK, max_tokens=9, temperature=0, extra_body=more
        )
        return got.choices[0].message.content, got.usage.skills

    names = ["other", "tidy-notes"]
    assert say("tiny+other+tidy-notes") == say("tiny", skills=names)
    assert say("tiny+other", skills=["tidy-notes", "other"]) == say("tiny", skills=names)
    for wrong in ("tiny+", "tiny+none", "tiny-other", "+other"):
        with pytest.raises(openai.NotFoundError):
            say(wrong)


def test_a_conversation_with_a_skill_goes_on(client):
    def say(messages, **more):
        got = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=8, temperature=0, extra_body=more
        )
        return got.choices[0].message.content, got.usage.prompt_tokens

    system = {"role": "system", "content": "Be brief."}
    long = [*ASK, {"role": "assistant", "content": "That."}, {"role": "user", "content": "Why?"}]
    _, plain = say(ASK, skills=["tidy-notes"])
    _, more = say(long, skills=["tidy-notes"])
    assert more == plain + len("<assistant>That.<user>Why?")
    said, count = say([system, *ASK], skills=["tidy-notes"])
    written = [{"role": "user", "content": "Be brief.\n\nWhat now?"}]
    assert (said, count) == say(written, skills=["tidy-notes"])


SHAPE = {
    "type": "object",
    "properties": {"name": {"enum": ["ann", "bob"]}, "age": {"type": "integer", "maximum": 99}},
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("temperature", [0, 1])
def test_an_answer_keeps_to_a_json_schema(client, temperature):
    form = {"type": "json_schema", "json_schema": {"name": "person", "schema": SHAPE}}
    for seed in range(4):
        got = client.chat.completions.create(
            model="tiny", messages=ASK, max_tokens=200, temperature=temperature, seed=seed,
            response_format=form,
        )  # fmt: skip
        assert got.choices[0].finish_reason == "stop"
        said = json.loads(got.choices[0].message.content)
        assert set(said) == {"name", "age"} and said["name"] in ("ann", "bob")
        assert isinstance(said["age"], int) and said["age"] <= 99


def test_a_json_object_is_one_as_far_as_it_goes(served, client):
    got = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=30, temperature=0,
        response_format={"type": "json_object"},
    )  # fmt: skip
    assert got.choices[0].message.content.lstrip().startswith("{")
    plain = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=30, temperature=0
    )  # an answer beside it is not touched
    assert not plain.choices[0].message.content.lstrip().startswith("{")
    wrong = {"type": "json_schema", "json_schema": {"schema": {"type": "no such type"}}}
    assert "response_format" in message_of(
        post(served[0], messages=ASK, response_format=wrong), 400
    )


@pytest.mark.parametrize("stream", [False, True])
def test_calls_of_tools_come_as_such(world, monkeypatch, stream):
    model, tokenizer, _ = world
    tokenizer = copy.copy(tokenizer)
    tokenizer.chat_template += "{# calls are written as <tool_call> #}"
    said = ["Let me ", "see. <tool", '_call>{"name": "weather", "argum', 'ents": {"city": "Bern"}}']
    said += ["</tool_call>"]

    def add(pieces, token):
        pieces.ids.append(token)
        return said[len(pieces.ids) - 1] if len(pieces.ids) <= len(said) else ""

    monkeypatch.setattr(Pieces, "add", add)
    monkeypatch.setattr(Pieces, "end", lambda pieces: "")
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
    with running(model, tokenizer, limits=Limits(tokens=8)) as (address, _):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        how = dict(model="tiny", messages=ASK, temperature=0, tools=tools)
        if stream:
            with client.chat.completions.stream(**how) as events:
                choice = events.get_final_completion().choices[0]
        else:
            choice = client.chat.completions.create(**how).choices[0]
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content.rstrip() == "Let me see."
        (call,) = choice.message.tool_calls
        assert call.function.name == "weather"
        assert json.loads(call.function.arguments) == {"city": "Bern"}
        plain = client.chat.completions.create(**{**how, "tools": []}).choices[0]
        assert "<tool_call>" in plain.message.content and not plain.message.tool_calls
        back = [*ASK, choice.message.model_dump(exclude_none=True),
                {"role": "tool", "tool_call_id": call.id, "content": "rain"}]  # fmt: skip
        assert post(address, messages=back, tools=tools, max_tokens=2).status_code == 200


def test_a_stop_string_ends_an_answer(client):
    how = dict(model="tiny", messages=ASK, max_tokens=30, temperature=0)
    whole = client.chat.completions.create(**how).choices[0].message.content
    stop = whole[4:6]
    got = client.chat.completions.create(**how, stop=[stop, "never said"])
    assert got.choices[0].message.content == whole[: whole.index(stop)]
    assert got.choices[0].finish_reason == "stop"


def test_what_a_model_samples_with_holds_where_nothing_is_asked(world, monkeypatch):
    usual = world[0].generation_config
    monkeypatch.setattr(usual, "do_sample", True)
    monkeypatch.setattr(usual, "top_k", 1)
    with running(*world, limits=Limits(tokens=10)) as (address, _):
        asked = [dict(seed=1), dict(seed=2), dict(temperature=0), dict(seed=1, top_k=9)]
        said = [
            post(address, messages=ASK, **how).json()["choices"][0]["message"]["content"]
            for how in asked
        ]
        assert said[0] == said[1] == said[2] != said[3]


def test_seeds_make_answers_the_same(client):
    def say(seed):
        got = client.chat.completions.create(model="tiny", messages=ASK, max_tokens=12, seed=seed)
        return got.choices[0].message.content

    assert say(1) == say(1) != say(2)


def test_many_clients_get_what_each_gets_alone(world, served):
    model, tokenizer, _ = world
    questions = [f"Question {i}?" * (1 + i % 5) for i in range(40)]
    want = [generate(model, tokenizer, question, 9).text for question in questions]

    async def all_of():
        client = openai.AsyncOpenAI(base_url=f"{served[0]}/v1", api_key="none", max_retries=0)

        async def one(question):
            got = await client.chat.completions.create(
                model="tiny", messages=[{"role": "user", "content": question}], max_tokens=9,
                temperature=0,
            )  # fmt: skip
            return got.choices[0].message.content

        return await asyncio.gather(*map(one, questions))

    assert asyncio.run(all_of()) == want


# ---- what there is


def test_models_skills_and_metrics(served, client):
    address, _ = served
    names = ["tiny", "tiny+other", "tiny+tidy-notes"]
    assert [model.id for model in client.models.list()] == names
    assert [client.models.retrieve(name).id for name in names] == names
    message_of(httpx.get(f"{address}/v1/models/tiny+none"), 404)
    rows = {row["id"]: row for row in httpx.get(f"{address}/v1/skills").json()["data"]}
    assert set(rows) == {"other", "tidy-notes"}
    tidy = rows["tidy-notes"]
    assert (tidy["kind"], tidy["tokens"], tidy["text_tokens"]) == ("kv", 40, len(TEXT.rstrip()))
    assert tidy["description"].startswith("Sort loose notes") and tidy["warning"] is None
    post(address, messages=ASK, max_tokens=3, skills=["tidy-notes"])
    text = httpx.get(f"{address}/metrics").text
    counted = dict(line.rsplit(" ", 1) for line in text.splitlines() if line[0] != "#")
    assert float(counted["skimlm_tokens_total"]) >= 3
    assert float(counted["skimlm_skill_tokens_saved_total"]) >= len(TEXT.rstrip()) - 40
    assert float(counted["skimlm_running"]) == 0 and "skimlm_waiting" in counted
    assert httpx.get(f"{address}/healthz").json() == {"status": "ok"}


# ---- what is refused


@pytest.mark.parametrize(
    ("body", "status", "told"),
    [
        (dict(messages=[]), 400, "messages: List should have at least 1 item"),
        (dict(), 400, "messages: Field required"),
        (dict(messages="hello"), 400, "messages: Input should be a valid list"),
        (dict(messages=[{"role": "boss", "content": "x"}]), 400, "messages.0.role"),
        (dict(messages=ASK, model="gpt-5"), 404, "no model 'gpt-5': there is 'tiny'"),
        (dict(messages=ASK, skills=["none"]), 404, "no skill 'none': there are other, tidy-notes"),
        (dict(messages=ASK, skills="tidy-notes"), 400, "skills: Input should be a valid list"),
        (dict(messages=ASK, skills=["../../etc/passwd"]), 404, "no skill"),
        (dict(messages=ASK, max_tokens=0), 400, "max_tokens"),
        (dict(messages=ASK, temperature=-1), 400, "temperature"),
        (dict(messages=ASK, temperature="hot"), 400, "temperature"),
        (dict(messages=ASK, presence_penalty=False), 400, "presence_penalty"),
        (dict(messages=ASK, seed=1.5), 400, "seed"),
        (dict(messages=ASK, stream="yes"), 400, "stream"),
        (dict(messages=ASK, n=2), 400, "n: Input should be 1"),
        (dict(messages=ASK, logprobs=True), 400, "logprobs"),
        (dict(messages=ASK, mirostat=2), 400, "mirostat: is not supported"),
        (dict(messages=ASK, logit_bias={"x": 1}), 400, "logit_bias.x"),
        (dict(messages=[{"role": "user", "content": "x" * 5000}]), 400, "the model reads 4,096"),
        (dict(messages=[{"role": "user", "content": [{"type": "image_url"}]}]), 400, "content"),
        (dict(messages=[{"role": "assistant", "content": "x"}], skills=["other"]), 400,
         "must be the user's"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_cannot_be_answered_is_told_in_one_line(served, body, status, told):
    response = post(served[0], **body)
    said = message_of(response, status)
    assert told in said and "\n" not in said and "Traceback" not in said


def test_what_changes_no_answer_is_taken(served):
    body = dict(messages=ASK, max_tokens=2, user="me", metadata={"a": "b"}, store=False, stop=None)
    body |= dict(parallel_tool_calls=True, logprobs=False, response_format={"type": "text"})
    assert post(served[0], **body).status_code == 200
    parts = [{"role": "developer", "content": "Be brief."},
             {"role": "user", "content": [{"type": "text", "text": "What"}, {"type": "text",
                                           "text": " now?"}]}]  # fmt: skip
    assert post(served[0], messages=parts, max_tokens=2).status_code == 200
    bias = {"99999": 3.0}  # of no token
    assert post(served[0], messages=ASK, max_tokens=2, logit_bias=bias).status_code == 200


def test_more_tokens_than_fit_are_an_upper_bound(world):
    with running(*world, limits=Limits(tokens=5)) as (address, _):
        usage = post(address, messages=ASK, max_tokens=10**12, temperature=0).json()["usage"]
        assert usage["completion_tokens"] <= 5


@pytest.mark.parametrize(
    ("raw", "headers", "status"),
    [
        (b"{", JSON, 400),
        (b"[" * 100_000, JSON, 400),
        (b'{"messages": NaN}', JSON, 400),
        (b"\xff\xfe", JSON, 400),
        (b"[]", JSON, 400),
        (b"", JSON, 400),
        (b"{}", {"Content-Type": "text/plain"}, 415),
        (b"{}", {}, 415),
        (b"{}", JSON | {"Host": "evil.example"}, 421),
        (b"{}", JSON | {"Host": "evil.example:8000"}, 421),
    ],
)
def test_bodies_and_headers_of_no_sense(world, raw, headers, status):
    with running(*world, limits=Limits(hosts=("127.0.0.1",))) as (address, _):
        message_of(
            httpx.post(f"{address}/v1/chat/completions", content=raw, headers=headers), status
        )
        assert httpx.get(f"{address}/healthz").status_code == 200


def test_paths_and_methods(served):
    address = served[0]
    for path in ("/nothing", "/page/../app.py", "/page/%2e%2e/app.py", "/v1/models/x/../../y"):
        message_of(httpx.get(address + path), 404)
    assert message_of(httpx.get(f"{address}/v1/chat/completions"), 405)
    assert message_of(httpx.delete(f"{address}/v1/models"), 405)


def test_a_body_may_only_be_so_large(world):
    with running(*world, limits=Limits(body=2000)) as (address, _):
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 3000}]}).encode()
        url = f"{address}/v1/chat/completions"
        message_of(httpx.post(url, content=body, headers=JSON), 413)
        parts = (body[i : i + 100] for i in range(0, len(body), 100))  # no length is stated
        message_of(httpx.post(url, content=parts, headers=JSON), 413)
        assert post(address, messages=ASK, max_tokens=2).status_code == 200


def test_a_key_is_asked_for_where_there_is_one(world):
    with running(*world, limits=Limits(key="secret-1")) as (address, _):
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert httpx.get(f"{address}/").status_code == 200
        for path in ("/v1/models", "/v1/skills", "/metrics", "/openapi.json", "/v1/about"):
            assert "no API key" in message_of(httpx.get(address + path), 401)
        wrong = openai.OpenAI(base_url=f"{address}/v1", api_key="secret-2", max_retries=0)
        with pytest.raises(openai.AuthenticationError) as told:
            wrong.chat.completions.create(model="tiny", messages=ASK)
        assert "secret" not in str(told.value)
        right = openai.OpenAI(base_url=f"{address}/v1", api_key="secret-1", max_retries=0)
        assert right.chat.completions.create(model="tiny", messages=ASK, max_tokens=2)


def test_openai_raises_its_own_errors(client):
    with pytest.raises(openai.NotFoundError, match="no model"):
        client.chat.completions.create(model="other", messages=ASK)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.chat.completions.create(model="tiny", messages=ASK, temperature=9)


def test_when_too_many_wait_one_is_told_to_ask_again(world, slow):
    with running(*world, rows=1, waiting=1) as (address, engine):
        url, body = f"{address}/v1/chat/completions", dict(messages=ASK, temperature=0,
                                                           stream=True)  # fmt: skip
        with httpx.stream("POST", url, json=body, timeout=60) as first:
            lines = first.iter_lines()  # held: it would close the stream
            next(lines)
            with httpx.stream("POST", url, json=body, timeout=60):
                until = time.monotonic() + 10
                while not engine.waiting and time.monotonic() < until:
                    time.sleep(0.01)
                response = post(address, messages=ASK)
                assert "too many requests" in message_of(response, 429)
                assert response.headers["retry-after"] == "1"
        while engine.running or engine.waiting:  # until it is seen that both have gone
            assert time.monotonic() < until
            time.sleep(0.01)
        assert post(address, messages=ASK, max_tokens=2).status_code == 200


def test_an_answer_that_takes_too_long_is_ended(world, slow):
    with running(*world, limits=Limits(seconds=0.3)) as (address, engine):
        assert "longer than 0.3 s" in message_of(post(address, messages=ASK, temperature=0), 504)
        with httpx.stream(
            "POST",
            f"{address}/v1/chat/completions",
            json=dict(messages=ASK, temperature=0, stream=True),
        ) as response:
            lines = [line for line in response.iter_lines() if line]
        assert json.loads(lines[-1].removeprefix("data: "))["error"]["code"] == "timeout"
        until = time.monotonic() + 5
        while engine.running and time.monotonic() < until:
            time.sleep(0.01)
        assert not engine.running


@pytest.mark.parametrize("stream", [True, False])
def test_when_a_client_goes_its_work_stops(world, slow, stream):
    with running(*world) as (address, engine):
        host, port = address.removeprefix("http://").split(":")
        body = json.dumps(dict(messages=ASK, stream=stream, temperature=0)).encode()
        with socket.create_connection((host, int(port))) as raw:
            raw.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
                        b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
                        % (len(body), body))  # fmt: skip
            until = time.monotonic() + 10
            while engine.tokens < 5 and time.monotonic() < until:
                time.sleep(0.01)
            assert engine.running
        while engine.running and time.monotonic() < until:
            time.sleep(0.01)
        assert not engine.running and engine.tokens < 3000
        assert post(address, messages=ASK, max_tokens=2).status_code == 200


def test_when_the_engine_fails_clients_are_told_and_it_recovers(world, monkeypatch):
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with running(*world) as (address, engine):
        client = openai.OpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0)
        for error in (RuntimeError("inside"), SystemExit("killed")):

            def broken(error=error):
                raise error

            with monkeypatch.context() as here:
                here.setattr(engine, "_turn", broken)
                with pytest.raises(openai.InternalServerError) as told:
                    client.chat.completions.create(model="tiny", messages=ASK, max_tokens=3)
                assert told.value.status_code == 503 and "inside" not in str(told.value)
        engine._thread.join(5)
        assert httpx.get(f"{address}/healthz").status_code == 503
        assert httpx.get(f"{address}/healthz").status_code == 200
        assert post(address, messages=ASK, max_tokens=3).status_code == 200


def test_a_server_that_stops_says_so(world):
    with running(*world) as (address, engine):
        engine.stop()
        assert message_of(post(address, messages=ASK), 503)


def test_its_own_description_holds(world, tmp_path):
    pytest.importorskip("schemathesis")
    with running(*world, limits=Limits(tokens=3)) as (address, _):
        done = subprocess.run(
            [sys.executable, "-m", "schemathesis.cli", "run", f"{address}/openapi.json",
             "--max-examples", "20", "--seed", "1", "--generation-database", "none"],
            capture_output=True, text=True, timeout=300, cwd=tmp_path,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-4000:]
        assert post(address, messages=ASK, max_tokens=2).status_code == 200
