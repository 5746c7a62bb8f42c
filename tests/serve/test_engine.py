"""The engine against the model's own `generate`: whoever runs beside, the same tokens."""

import queue
import random
import threading
import time

import pytest
import torch

from serve_sample import TEXT, compressed_model, make_world
from skill_sample import skill_model
from skimlm.generate import generate
from skimlm.runtime import decode
from skimlm.serve import engine as engines
from skimlm.serve.engine import Engine, Full, Job
from skimlm.serve.sampling import Sampling
from skimlm.serve.skills import Skills
from skimlm.skills.splice import closing

PROMPTS = [torch.tensor([60 + i] * (3 + 5 * i)) for i in range(6)]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A compressed model, its tokenizer, and skills."""
    model, tokenizer, folder = make_world(tmp_path_factory)
    return model, tokenizer, Skills(model, tokenizer, folder)


@pytest.fixture
def start(request):
    """Makes engines that are stopped in the end."""
    made = []

    def begin(*args, **options):
        made.append(Engine(*args, **options))
        return made[-1]

    yield begin
    for engine in made:
        engine.stop()


def collect():
    """A `put`, and what gives all that it got up to the end."""
    items = queue.Queue()

    def all_of():
        tokens = []
        while isinstance(item := items.get(timeout=60), int):
            tokens.append(item)
        return tokens, item

    return (lambda job, item: items.put(item)), all_of


def ask(engine, ids, most=12, **how):
    put, all_of = collect()
    job = Job(ids, most, put, **how)
    engine.submit(job)
    return all_of


@torch.inference_mode()
def alone(model, ids, most=12):
    """What `generate` of transformers says, greedily."""
    out = model.generate(ids[None], max_new_tokens=most, do_sample=False, eos_token_id=None,
                         pad_token_id=0)  # fmt: skip
    return out[0, len(ids) :].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_many_get_what_each_gets_alone(start, tmp_path, dtype):
    model = compressed_model(tmp_path / "out", dtype)
    engine = start(model, rows=4)
    want = [alone(model, ids) for ids in PROMPTS]
    if dtype == torch.bfloat16:  # a random model's logits are within a rounding of each other
        want = [ask(engine, ids)()[0] for ids in PROMPTS]
        engine = start(model, rows=4)
    waiting = [ask(engine, ids) for ids in PROMPTS * 3]
    for i, all_of in enumerate(waiting):
        assert all_of() == (want[i % len(want)], "length")
    assert engine.together > 20 and engine.tokens == 18 * 12
    assert engine.prompt_tokens == 3 * sum(map(len, PROMPTS))


def test_a_model_without_a_native_way_is_served_too(start):
    model = skill_model("gemma3").eval()
    want = [alone(model, ids) for ids in PROMPTS[:3]]
    engine = start(model)
    waiting = [ask(engine, ids) for ids in PROMPTS[:3]]
    assert [all_of() for all_of in waiting] == [(tokens, "length") for tokens in want]
    assert engine.together == 0


def test_a_long_prompt_is_read_in_parts_and_others_go_on(world, start, monkeypatch):
    monkeypatch.setattr(engines, "PART", 16)
    model = world[0]
    long = torch.arange(200) % 90 + 3
    engine = start(model)
    put, all_of = collect()
    seen = []

    def note(job, item):
        seen.append((item, engine.reading is not None))
        put(job, item)

    engine.submit(Job(PROMPTS[0], 30, note))
    while len(seen) < 2:
        time.sleep(0.001)
    tail = ask(engine, long, 4)
    assert all_of()[0] == alone(model, PROMPTS[0], 30)
    assert sum(reading for _, reading in seen) > 5  # it got tokens while the other was read
    tokens, end = tail()
    assert end == "length" and len(tokens) == 4
    assert tokens == ask(engine, long, 4)()[0]


def test_ends_are_not_given_and_lengths_are_kept(world, start):
    model = world[0]
    said = alone(model, PROMPTS[1])
    engine = start(model)
    at = next(i for i, token in enumerate(said) if said.index(token) == i and i > 2)
    assert ask(engine, PROMPTS[1], ends=[said[at]])() == (said[:at], "stop")
    assert ask(engine, PROMPTS[1], 1)() == (said[:1], "length")
    assert ask(engine, PROMPTS[1], ends=[said[0]])() == ([], "stop")


@pytest.mark.parametrize("names", [["tidy-notes"], ["other"], ["other", "tidy-notes"]], ids=str)
def test_skills_stand_before_as_in_generate(world, start, names):
    model, tokenizer, skills = world
    ids = closing(tokenizer, "What now?", True)
    stands = [skills.entries[name].stands for name in names]
    said = []
    result = generate(model, tokenizer, "What now?", 10, skills=stands)
    engine = start(model)
    waiting = [
        ask(engine, ids, 10, prefix=lambda: skills.prefix(names)),
        ask(engine, PROMPTS[0], 10),
        ask(engine, ids, 10, prefix=lambda: skills.prefix(names)),
    ]
    said = [all_of()[0] for all_of in waiting]
    assert tokenizer.decode(said[0]) == result.text and said[2] == said[0]
    assert said[1] == alone(model, PROMPTS[0], 10)
    assert skills.length(names) + len(ids) == result.prompt_tokens
    assert skills.tokens(names)[0] == result.skill_tokens


def test_a_prefix_is_read_once_for_all(world, start):
    model, tokenizer, skills = world
    fresh = Skills(model, tokenizer, None)
    fresh.entries.update(skills.entries)
    ids = closing(tokenizer, "So?", True)
    engine = start(model)
    waiting = [ask(engine, ids, 3, prefix=lambda: fresh.prefix(["other"])) for _ in range(5)]
    assert len({tuple(all_of()[0]) for all_of in waiting}) == 1
    assert (fresh.misses, fresh.hits) == (1, 4)
    kept = skills.entries["tidy-notes"]
    assert (kept.kind, kept.tokens) == ("kv", 40) and kept.text_tokens == len(TEXT.rstrip())


def test_a_seed_decides_whatever_runs_beside(world, start):
    engine = start(world[0])
    how = Sampling(temperature=1.0, top_p=0.9, seed=5)
    first = ask(engine, PROMPTS[0], sampling=how)()[0]
    waiting = [ask(engine, ids, sampling=Sampling(1.0, seed=i)) for i, ids in enumerate(PROMPTS)]
    again = ask(engine, PROMPTS[0], sampling=how)
    others = [all_of()[0] for all_of in waiting]
    assert again()[0] == first and first not in others


def test_cancelled_jobs_stop_and_give_their_place(world, start):
    engine = start(world[0], rows=1)
    got = []
    job = Job(PROMPTS[0], 10**6, lambda job, item: got.append(item))
    engine.submit(job)
    waits = ask(engine, PROMPTS[1], 3)
    never = Job(PROMPTS[1], 3, lambda job, item: got.append("never"))
    engine.submit(never)
    engine.cancel(never)
    while len(got) < 3:
        time.sleep(0.001)
    engine.cancel(job)
    assert waits()[1] == "length"
    count = len(got)
    assert ask(engine, PROMPTS[1], 3)()[1] == "length"
    assert len(got) == count and "never" not in got and job.cache is None
    until = time.monotonic() + 5
    while engine.running and time.monotonic() < until:  # the last is let go after it was told
        time.sleep(0.001)
    assert not engine.running and engine.reading is None


def test_more_than_may_wait_are_refused(world, start):
    engine = start(world[0], rows=1, waiting=2)
    job = Job(PROMPTS[0], 10**6, lambda job, item: None)
    engine.submit(job)
    while not engine.running:
        time.sleep(0.001)
    waiting = [ask(engine, PROMPTS[1], 2) for _ in range(2)]
    with pytest.raises(Full):
        ask(engine, PROMPTS[1], 2)
    engine.cancel(job)
    assert [all_of()[1] for all_of in waiting] == ["length"] * 2


def test_memory_for_keys_and_values_is_not_given_twice(world, start):
    engine = start(world[0])
    engine.budget = 60
    first = Job(PROMPTS[0], 10**6, lambda job, item: None)  # counts for its prompt and ANSWER
    engine.submit(first)
    while not engine.running:
        time.sleep(0.001)
    waits = ask(engine, PROMPTS[1], 2)
    time.sleep(0.05)
    assert len(engine.waiting) == 1 and len(engine.running) == 1
    engine.cancel(first)
    assert waits()[1] == "length"


@pytest.mark.parametrize("few", [0, 64])
def test_what_outgrows_memory_waits_and_goes_on_where_it_was(world, start, monkeypatch, few):
    monkeypatch.setattr(engines, "ANSWER", 4)
    engine = start(world[0])
    engine.few, engine.budget = few, 10**6
    how = Sampling(temperature=1.0, seed=3)
    want = [ask(engine, ids, 40, sampling=how)()[0] for ids in PROMPTS[:4]]
    engine.budget = 120
    waiting = [ask(engine, ids, 40, sampling=how) for ids in PROMPTS[:4]]
    assert [all_of() for all_of in waiting] == [(tokens, "length") for tokens in want]
    assert engine.prompt_tokens > 2 * sum(map(len, PROMPTS[:4]))  # some were read again


def test_a_request_is_put_back_under_the_lock(world, start, monkeypatch):
    """`submit` walks the queue on another thread."""
    engine, held = start(world[0]), []

    class Queue(type(engine.waiting)):
        def appendleft(self, job):
            held.append(engine._changed._is_owned())
            super().appendleft(job)

    jobs = [Job(PROMPTS[0], 40, lambda job, item: None, cache=object()) for _ in range(2)]
    monkeypatch.setattr(engine, "_step", lambda some: None)
    engine.waiting, engine.budget, engine.running = Queue(), 5, list(jobs)
    engine._turn()  # its own thread sleeps: nobody has told it of them
    assert held == [True]
    assert engine.running == jobs[:1] and [*engine.waiting] == jobs[1:]
    engine.running = []
    engine.waiting.clear()


def test_one_whose_token_cannot_be_chosen_is_told_alone(world, start):
    engine = start(world[0])

    class Broken:
        def allowed(self):
            raise RuntimeError("no rule")

    beside = ask(engine, PROMPTS[0], 20)
    _, error = ask(engine, PROMPTS[1], sampling=Sampling(rule=Broken()))()
    assert str(error) == "no rule"
    assert beside() == (alone(world[0], PROMPTS[0], 20), "length")


def test_one_that_fails_is_told_and_the_others_go_on(world, start):
    engine = start(world[0])

    def broken():
        raise ValueError("no prefix")

    beside = ask(engine, PROMPTS[0], 20)
    _, error = ask(engine, PROMPTS[1], prefix=broken)()
    assert isinstance(error, ValueError)
    assert beside() == (alone(world[0], PROMPTS[0], 20), "length") and engine.failures == 1


def test_when_a_step_fails_all_that_run_are_told_and_new_ones_run(world, start, monkeypatch):
    engine = start(world[0])
    real, fail = decode.together, threading.Event()

    def together(*args):
        if fail.is_set():
            fail.clear()
            raise RuntimeError("broken")
        return real(*args)

    monkeypatch.setattr(decode, "together", together)
    running = [ask(engine, ids, 10**6) for ids in PROMPTS[:3]]
    while len(engine.running) < 3:
        time.sleep(0.001)
    fail.set()
    assert [str(all_of()[1]) for all_of in running] == ["broken"] * 3
    assert ask(engine, PROMPTS[0])() == (alone(world[0], PROMPTS[0]), "length")
    assert engine.alive() and engine.failures == 1


def test_a_thread_that_dies_is_started_again(world, start, monkeypatch):
    engine = start(world[0])
    monkeypatch.setattr(threading, "excepthook", lambda args: None)

    def die():
        raise SystemExit("killed")

    monkeypatch.setattr(engine, "_turn", die)
    _, error = ask(engine, PROMPTS[0])()
    assert isinstance(error, SystemExit)
    monkeypatch.undo()
    engine._thread.join(5)
    assert not engine.alive() and engine.alive()
    assert ask(engine, PROMPTS[0])() == (alone(world[0], PROMPTS[0]), "length")


def test_stopping_tells_all(world):
    engine = Engine(world[0], rows=1)
    jobs = [ask(engine, PROMPTS[0], 10**6), ask(engine, PROMPTS[1])]
    while not engine.running:
        time.sleep(0.001)
    engine.stop()
    assert all("stopping" in str(all_of()[1]) for all_of in jobs)
    with pytest.raises(Full):
        ask(engine, PROMPTS[0])
    assert not engine.alive()


def test_jobs_that_come_and_go_at_random(world, start):
    model, chance = world[0], random.Random(0)
    lengths = {i: alone(model, ids, 20) for i, ids in enumerate(PROMPTS)}
    engine, wrong = start(model, rows=5, waiting=1000), []

    def client(seed):
        own = random.Random(seed)
        for _ in range(12):
            i, most = own.randrange(len(PROMPTS)), own.randrange(1, 20)
            put, all_of = collect()
            job = Job(PROMPTS[i], most, put)
            engine.submit(job)
            if own.random() < 0.3:
                time.sleep(own.random() / 50)
                engine.cancel(job)
            elif all_of() != (lengths[i][:most], "length"):
                wrong.append(i)

    threads = [threading.Thread(target=client, args=[chance.random()]) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong and not any(thread.is_alive() for thread in threads)
