"""A tiny compressed model with a chat template and skills, and a server of it on a free port."""

import contextlib
import socket
import threading
import time

import torch
import uvicorn
from transformers import AutoModelForCausalLM

from conftest import quantized_linears
from skill_sample import TEXT, chat_tokenizer, skill_model
from skimlm.models.probe import structure_of
from skimlm.models.structure import separate
from skimlm.models.write import save
from skimlm.serve.app import app
from skimlm.serve.engine import Engine
from skimlm.serve.guard import Limits
from skimlm.serve.skills import Skills
from skimlm.skills import compression, store
from skimlm.skills.document import parse

OTHER = "---\nname: other\ndescription: Does less.\n---\nCount the notes, say how many there are.\n"


def compressed_model(out, dtype=torch.float32):
    """A tiny model as a user serves it: packed linears, native tokens."""
    dense = skill_model(dtype=dtype)
    layout = structure_of(dense).layout
    separate(dense, layout)
    save(out, dense, None, quantized_linears(dense), embed_bits=8, bits=3.2, layout=layout)
    return AutoModelForCausalLM.from_pretrained(out, dtype=dtype).eval()


def write_skills(folder, model, tokenizer):
    """Two skills as text, and the first as keys and values too."""
    for name, text in (("tidy", TEXT), ("other", OTHER)):
        (folder / name).mkdir(parents=True)
        (folder / name / "SKILL.md").write_text(text)
    made = compression.compress(
        model, tokenizer, parse(TEXT), tokens=40, settings=dict(train=4, dev=2, answer=4)
    )
    store.write(folder / "tidy" / "tidy.skim", made)


def make_world(tmp_path_factory):
    """A compressed model, its tokenizer and a folder of skills."""
    model = compressed_model(tmp_path_factory.mktemp("model") / "out")
    tokenizer = chat_tokenizer()
    folder = tmp_path_factory.mktemp("skills")
    write_skills(folder, model, tokenizer)
    return model, tokenizer, folder


@contextlib.contextmanager
def running(model, tokenizer, skills=None, limits=None, rows=16, waiting=64):
    """Serve on a free port: gives the address and the engine."""
    engine = Engine(model, rows, waiting)
    made = app(model, tokenizer, "tiny", Skills(model, tokenizer, skills), engine,
               limits or Limits())  # fmt: skip
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(made, port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    until = time.monotonic() + 20
    while not server.started and time.monotonic() < until:
        time.sleep(0.01)
    assert server.started
    try:
        yield f"http://127.0.0.1:{port}", engine
    finally:
        server.should_exit = True
        thread.join(20)
        assert not thread.is_alive()


__all__ = ["OTHER", "TEXT", "compressed_model", "make_world", "running"]
