"""The server under load: speed beside llama.cpp's, right answers for many, time to the first token.

    python bench/serve.py --model DIR --skills DIR --llama llama-server --gguf Q4_0.gguf --out OUT
    python bench/serve.py --model DIR --first pack=DIR soft=DIR text=DIR --out OUT

The model is a folder that `skimlm compress` made, the skills are compressed for it. Both servers
run at the same time and are asked in turn, greedily, 128 tokens an answer; the best of --reps
rounds counts, as this process shares the processors with both. The soak (--seconds 0: none) has
--clients clients ask for --seconds: an answer is wrong if it is not what the server says to the
same question alone. --first has the same skills in folders, compressed in other ways or as their
texts: a server for each, and the time to the first token behind them, the first time and later.
"""

import argparse
import asyncio
import contextlib
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import httpx
import openai
import psutil

from provenance import provenance

QUESTIONS = (
    *("Why is the sky blue?", "Write a short poem about rain.", "List three uses of copper."),
    *("Explain how a bicycle stays upright.", "What is a monad?", "How do I boil an egg?"),
    *("Tell me about the history of Rome.", "Describe a sunset."),
)
TOKENS = 128


@contextlib.contextmanager
def server(command, address):
    """A server that runs until the end, and its process."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        for _ in range(600):
            with contextlib.suppress(httpx.HTTPError):
                if httpx.get(f"{address}/v1/models").status_code == 200:
                    break
            assert process.poll() is None, f"{command[0]} has ended"
            time.sleep(0.2)
        yield process
    finally:
        process.terminate()
        process.wait(30)


async def answer(client, address, question, tokens=TOKENS, **more):
    """Text, tokens and seconds to the first one."""
    body = dict(messages=[{"role": "user", "content": question}], max_tokens=tokens, **more)
    body |= dict(temperature=0, stream=True, stream_options={"include_usage": True})
    text, count, first, start = "", 0, None, time.perf_counter()
    url = f"{address}/v1/chat/completions"
    async with client.stream("POST", url, json=body, timeout=600) as response:
        assert response.status_code == 200, await response.aread()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            assert "error" not in event, event
            piece = event["choices"][0]["delta"].get("content") if event["choices"] else ""
            if piece and first is None:
                first = time.perf_counter() - start
            text += piece or ""
            count = event["usage"]["completion_tokens"] if event.get("usage") else count
    return text, count, first


async def speed(addresses, counts, reps):
    """Tokens per second of all answers together, by server and number of clients."""
    found = {name: {} for name in addresses}
    async with httpx.AsyncClient() as client:
        for address in addresses.values():
            await answer(client, address, "Warm up.", 16)
        for count in counts:
            for _ in range(reps):
                for name, address in addresses.items():
                    some = [f"{QUESTIONS[i % 8]} ({i})" for i in range(count)]
                    start = time.perf_counter()
                    made = await asyncio.gather(*(answer(client, address, q) for q in some))
                    rate = sum(tokens for _, tokens, _ in made) / (time.perf_counter() - start)
                    first = statistics.median(first for _, _, first in made)
                    found[name].setdefault(count, []).append((rate, first))
    return {
        name: {
            count: {
                "tokens_per_second": max(rate for rate, _ in rows),
                "all": [rate for rate, _ in rows],
                "first_token_seconds": min(first for _, first in rows),
            }
            for count, rows in by.items()
        }
        for name, by in found.items()
    }


async def soak(address, process, clients, seconds, skills):
    """Many clients at once: wrong and lost answers, and the server's memory before and after."""
    lengths, options = (8, 24, 48), [None, *([skills[0]] if skills else [])]
    asked = [(q, n, s) for q in QUESTIONS for n in lengths for s in options]

    def how(skill):
        return {"skills": [skill]} if skill else {}

    async with httpx.AsyncClient(limits=httpx.Limits(max_connections=clients)) as client:
        want = {
            key: (await answer(client, address, key[0], key[1], **how(key[2])))[0] for key in asked
        }
        until, memory = time.monotonic() + seconds, []
        counts = {"answers": 0, "wrong": 0, "lost": 0, "tokens": 0}

        async def one(number):
            at = number
            while time.monotonic() < until:
                key = asked[at % len(asked)]
                at += 7
                try:
                    text, tokens, _ = await answer(client, address, key[0], key[1], **how(key[2]))
                except (AssertionError, httpx.HTTPError):
                    counts["lost"] += 1
                    continue
                counts["answers"] += 1
                counts["tokens"] += tokens
                counts["wrong"] += text != want[key]

        async def watch():
            own = psutil.Process(process.pid)
            while time.monotonic() < until:
                memory.append(own.memory_info().rss)
                await asyncio.sleep(seconds / 20)

        await asyncio.gather(watch(), *map(one, range(clients)))
    return {**counts, "clients": clients, "seconds": seconds, "rss_bytes": memory}


async def kinds_of_skill(address, reps=7):
    """Seconds to the first token behind every skill there is: the first time, and later."""
    found = {}
    async with httpx.AsyncClient() as client:
        await answer(client, address, "Warm up.", 16)
        for row in (await client.get(f"{address}/v1/skills")).json()["data"]:
            how = dict(skills=[row["id"]])
            cold = (await answer(client, address, QUESTIONS[0], 2, **how))[2]
            later = [
                (await answer(client, address, QUESTIONS[0], 2, **how))[2] for _ in range(reps)
            ]
            found[row["id"]] = {"first": cold, "later": statistics.median(later)}
    return found


async def first_tokens(address, names, texts, reps=7):
    """Seconds to the first token behind a skill: its text as a message, and as it is served."""
    found = {}
    async with httpx.AsyncClient() as client:
        for name in names:
            with_text = f"Relevant Skill:\n{texts[name]}\n\n{QUESTIONS[0]}"
            cold = (await answer(client, address, QUESTIONS[0], 2, skills=[name]))[2]
            rows = {"text in the message": [], "skill": [], "no skill": []}
            for _ in range(reps):
                rows["text in the message"].append((await answer(client, address, with_text, 2))[2])
                made = await answer(client, address, QUESTIONS[0], 2, skills=[name])
                rows["skill"].append(made[2])
                rows["no skill"].append((await answer(client, address, QUESTIONS[0], 2))[2])
            found[name] = {"skill, the first time": cold}
            found[name] |= {key: statistics.median(values) for key, values in rows.items()}
    return found


def check_client(address):
    """The real client of OpenAI, once."""
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="none")
    model = next(iter(client.models.list()))
    made = client.chat.completions.create(
        model=model.id, messages=[{"role": "user", "content": QUESTIONS[0]}], max_tokens=8
    )
    assert made.choices[0].message.content


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--skills", type=Path)
    parser.add_argument("--first", nargs="+", help="KIND=DIR: only the time to the first token")
    parser.add_argument("--llama")
    parser.add_argument("--gguf")
    parser.add_argument("--threads", type=int, default=psutil.cpu_count())
    parser.add_argument(
        "--counts", type=lambda text: [*map(int, text.split(","))], default=[1, 4, 16]
    )
    parser.add_argument("--reps", type=int, default=5)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    addresses = {"skimlm": "http://127.0.0.1:8361"}
    command = [sys.executable, "-m", "skimlm", "serve", args.model, "--port", "8361",
               "--threads", str(args.threads), "--queue", "1000"]  # fmt: skip
    command += ["--skills", str(args.skills)] if args.skills else []
    found = {"command": sys.argv[1:], "provenance": provenance()}
    for pair in args.first or ():
        kind, folder = pair.split("=", 1)
        with server([*command, "--skills", folder], addresses["skimlm"]):
            found[kind] = asyncio.run(kinds_of_skill(addresses["skimlm"]))
            print(kind, json.dumps(found[kind]), flush=True)
    if args.first:
        args.out.write_text(json.dumps(found, indent=1) + "\n")
        return
    with contextlib.ExitStack() as stack:
        process = stack.enter_context(server(command, addresses["skimlm"]))
        if args.llama:
            addresses["llama.cpp"] = "http://127.0.0.1:8362"
            other = [args.llama, "-m", args.gguf, "--port", "8362", "-t", str(args.threads),
                     "-np", "16", "-c", "16384"]  # fmt: skip
            stack.enter_context(server(other, addresses["llama.cpp"]))
        check_client(addresses["skimlm"])
        found["speed"] = asyncio.run(speed(addresses, args.counts, args.reps))
        print(json.dumps(found["speed"], indent=1))
        rows = httpx.get(f"{addresses['skimlm']}/v1/skills").json()["data"]
        names = [row["id"] for row in rows]
        if args.skills:
            from skimlm.skills import store

            texts = {(s := store.read(p)).name: s.document.text for p in args.skills.glob("*.skim")}
            kept = [name for name in names if name in texts]
            found["first_token"] = asyncio.run(first_tokens(addresses["skimlm"], kept, texts))
            print(json.dumps(found["first_token"], indent=1))
        if args.seconds:
            found["soak"] = asyncio.run(
                soak(addresses["skimlm"], process, args.clients, args.seconds, names)
            )
            print(json.dumps(found["soak"]))
    args.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
