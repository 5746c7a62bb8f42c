"""From a model folder to a compressed folder that plain transformers loads, end to end."""

import dataclasses
import functools
import json
import re
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from conftest import FAMILIES, byte_tokenizer, tiny_model, walk_of
from skimlm.errors import SkimError
from skimlm.format.layer import Layer, layout
from skimlm.format.pack import dequantize, unpack
from skimlm.models.blocks import decoder_linears
from skimlm.pipeline import budget, sensitivity, walk
from skimlm.pipeline import steps as pipeline_steps
from skimlm.pipeline.budget import specs_of
from skimlm.pipeline.compress import compress
from skimlm.pipeline.config import RECIPES, SLIM_RECIPES, CompressConfig
from skimlm.pipeline.measure import divergences
from skimlm.pipeline.recipes import fit_linear, packed_linear, settled, widths_of
from skimlm.pipeline.steps import train_packed
from skimlm.quantize.fit import finish
from skimlm.quantize.kmeans import kmeans_rows

STEPS = 6  # of training: its held-out loss is measured at 2, 4 and 6
WORDS = ["the row", "of a", "matrix", "is cut", "in parts", "and every", "part", "has one value"]


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Some 9000 characters that repeat themselves now and then."""
    g = torch.Generator().manual_seed(0)
    picks = torch.randint(0, len(WORDS), (1200,), generator=g).tolist()
    file = tmp_path_factory.mktemp("text") / "calibration.txt"
    file.write_text(" ".join(WORDS[i] for i in picks))
    return file


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A tiny bfloat16 model of a family as a folder."""

    @functools.cache
    def make(family: str):
        folder = tmp_path_factory.mktemp(family)
        tiny_model(family, dtype=torch.bfloat16).save_pretrained(folder)
        byte_tokenizer().save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(folders, text, cache, tmp_path, monkeypatch):
    """`compress` with few short windows and training steps; OUT is `tmp_path / name`."""
    for recipes in (RECIPES, SLIM_RECIPES):
        monkeypatch.setitem(recipes, "best", dataclasses.replace(recipes["best"], steps=STEPS))

    def go(family="llama", name="out", **options):
        defaults = dict(recipe="fast", bits=4.0, text=text, samples=8, seq_len=32, cache_dir=cache)
        source = options.pop("source", None) or folders(family)
        if options.keys() & {"size", "index_bits"}:
            del defaults["bits"]
        progress = options.pop("progress", None)
        config = CompressConfig(**(defaults | options))
        return compress(source, tmp_path / name, config, progress=progress)

    return go


def stored(out) -> dict[str, torch.Tensor]:
    """Every tensor of a folder."""
    tensors = {}
    for file in out.glob("*.safetensors"):
        tensors |= load_file(file)
    return tensors


def recount(out, source) -> float:
    """Bits per weight of the compressed linears, from the two folders' files alone."""
    tensors, config = stored(out), json.loads((out / "config.json").read_text())
    names = config["quantization_config"]["linears"]
    bits = sum(
        8 * tensor.nbytes
        for key, tensor in tensors.items()
        if key.rpartition(".")[0] in names and not key.endswith(".bias")
    )
    original = stored(source)
    return bits / sum(original[f"{name}.weight"].numel() for name in names)


def everything(out) -> dict[str, bytes]:
    return {str(f.relative_to(out)): f.read_bytes() for f in out.rglob("*") if f.is_file()}


def perplexity_ratio(out, source) -> float:
    """Mean loss of the compressed model over that of the original on the words."""
    ids = byte_tokenizer()(" ".join(WORDS), return_tensors="pt")["input_ids"][:, :64]
    losses = []
    for folder in (out, source):
        model = AutoModelForCausalLM.from_pretrained(folder)
        with torch.no_grad():
            losses.append(float(model(input_ids=ids, labels=ids).loss))
    return losses[0] / losses[1]


CASES = [(family, recipe) for family in FAMILIES for recipe in ("fast", "paper")]


@pytest.mark.parametrize("family, recipe", [*CASES, ("llama", "best")])
def test_every_family_compresses_loads_and_generates(run, folders, tmp_path, family, recipe):
    report = run(family, recipe=recipe)
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("the row", return_tensors="pt")["input_ids"]
    made = model.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    assert made.shape == (1, ids.shape[1] + 3)

    assert report.bits_per_weight == pytest.approx(recount(out, folders(family)), rel=1e-12)
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["bits"] == report.bits_per_weight
    count = len(decoder_linears(tiny_model(family)))
    assert report.linears == len(config["linears"]) == count
    # from below, and nearer than one step of a row (256 bits) per pool
    pools = count if recipe == "paper" else 1
    assert 0 <= 4.0 - report.bits_per_weight <= pools * 256 / report.weights
    assert report.bytes == sum(len(data) for data in everything(out).values())
    parameters = sum(p.numel() for p in tiny_model(family).parameters())
    assert report.to_json()["bits_per_parameter"] == 8 * report.bytes / parameters
    assert sum(report.rows_by_width.values()) == sum(
        m.out_features for m in decoder_linears(tiny_model(family)).values()
    )
    losses = report.held_out_kl
    assert (len(losses) > 1 and min(losses) > 0) if recipe == "best" else not losses
    assert set(report.seconds) >= {"load", "analyse", "allocate", "fit", "write"}
    json.dumps(report.to_json())


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bits_are_nearly_the_original(run, folders, tmp_path, family):
    run(family, index_bits=8, embed_bits=16)
    assert perplexity_ratio(tmp_path / "out", folders(family)) == pytest.approx(1, abs=0.01)


def test_more_bits_are_nearer_to_the_original(run, folders, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(folders("llama"), dtype=torch.float32)
    ids = byte_tokenizer()(" ".join(WORDS), return_tensors="pt")["input_ids"][:, :64]
    distance = []
    for bits in (2.5, 4, 6):
        run(name=str(bits), bits=bits, embed_bits=16)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / str(bits), dtype=torch.float32)
        with torch.no_grad():
            p, q = (m(input_ids=ids).logits.log_softmax(-1) for m in (source, model))
        distance.append(float((p.exp() * (p - q)).sum(-1).mean()))
    assert distance[0] > 2 * distance[1] > 4 * distance[2] > 0


@pytest.mark.parametrize("recipe", ["fast", "paper"])
@pytest.mark.parametrize("bits", [1.93, 2.0, 2.7, 3.33, 5.5, 7.0, 8.0])
def test_any_number_of_bits_is_met_from_below(run, recipe, bits):
    report = run(recipe=recipe, bits=bits, dry_run=True)
    assert report.bits_per_weight <= bits
    full = 8 + (16 + 16 + 8) / 72  # every row at 8 bits costs this much or less
    slack = (14 if recipe == "paper" else 1) * 256 / report.weights
    assert report.bits_per_weight >= min(bits, full) - slack


@pytest.mark.parametrize("width", [1, 3, 5, 6, 8])
def test_a_fixed_width_is_the_width_of_every_row(run, width):
    report = run(index_bits=width, dry_run=True)
    assert list(report.rows_by_width) == [width]


@pytest.mark.parametrize("width", [-1, 9])
def test_a_width_that_does_not_exist_is_refused(run, tmp_path, width):
    with pytest.raises(SkimError, match=f"1 to 8, got {width}"):
        run(index_bits=width)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("family, recipe", [("llama", "fast"), ("opt", "paper")])
def test_a_size_on_disk_is_met_from_below(run, tmp_path, family, recipe):
    ends = [run(family, recipe=recipe, index_bits=b, dry_run=True).bytes for b in (1, 8)]
    for share in (0.0, 0.02, 0.3, 0.75, 1.0):
        size = round(ends[0] + share * (ends[1] - ends[0]))
        report = run(family, name=f"{share}", recipe=recipe, size=size)
        files = everything(tmp_path / f"{share}")
        assert sum(map(len, files.values())) == report.bytes <= size
        pools = 1 if recipe == "fast" else 12
        # tables of trellises are bought whole, 128 bytes each: a few may be given up at a time
        assert size - report.bytes <= max(pools * 32 + 64, 4 * 128)


def test_a_size_above_what_8_bits_take_is_refused(run, tmp_path):
    with pytest.raises(SkimError, match="more than 8 bits per weight take, .*give at most that"):
        run(size=10_000_000)
    assert not (tmp_path / "out").exists()


def test_a_size_out_of_reach_names_the_range(run, tmp_path):
    with pytest.raises(SkimError) as caught:
        run(size=10_000)
    assert "\n" not in str(caught.value)
    found = re.search(r"takes ([\d,]+) bytes at 1 bit and ([\d,]+) at 8", str(caught.value))
    least, most = (int(n.replace(",", "")) for n in found.groups())
    assert run(size=least, dry_run=True).bytes == least
    assert run(size=most, dry_run=True).bytes <= most
    with pytest.raises(SkimError, match=f"takes {least:,} bytes at 1 bit"):
        run(size=least - 1)
    assert not (tmp_path / "out").exists()


def test_bits_out_of_reach_name_the_least(run, tmp_path):
    for recipe in ("fast", "paper"):
        with pytest.raises(SkimError, match="below what codebooks and bookkeeping allow") as caught:
            run(recipe=recipe, bits=1.5)
        least = float(re.search(r"at least ([\d.]+)$", str(caught.value)).group(1))
        with pytest.raises(SkimError, match="below what"):
            run(recipe=recipe, bits=least - 2e-3)
        report = run(recipe=recipe, bits=least + 1e-3, dry_run=True)
        assert report.bits_per_weight <= least + 1e-3
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("bits", [1.49, 8.01, 0, float("nan")])
def test_bits_outside_the_range_are_refused(run, bits):
    with pytest.raises(SkimError, match="bits must be 1.5 to 8"):
        run(bits=bits)


@pytest.mark.parametrize(
    "options, match",
    [
        ({"recipe": "worst"}, "paper, fast or best, got 'worst'"),
        ({"method": "slim2"}, "method must be"),
        ({"embed_bits": 5}, "16, 8 or 4, got 5"),
        ({"include": ["*.nothing"]}, "include .* matches none of the 14 linears"),
        ({"samples": 0}, "samples"),
        ({"samples": -2}, "samples"),
        ({"seq_len": 0}, "seq"),
        ({"seq_len": 1}, "seq"),
        ({"seq_len": 10**5}, "seq-len must be 2 to 256, got 100000"),
    ],
)
def test_impossible_requests_are_one_line_errors(run, tmp_path, options, match):
    with pytest.raises(SkimError, match=match) as caught:
        run(**options)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_second_width_needs_no_calibration(run, monkeypatch, tmp_path):
    own = tmp_path / "cache"
    assert not run(name="a", bits=3.5, cache_dir=own).analysis_kept

    def fail(*_, **__):
        raise AssertionError("calibrated again")

    monkeypatch.setattr(walk, "statistics", fail)
    report = run(name="b", bits=5, cache_dir=own)
    assert report.analysis_kept and 4.9 < report.bits_per_weight <= 5
    for change in ({"samples": 7}, {"seed": 1}, {"recipe": "paper"}, {"include": ["*.up_proj"]}):
        with pytest.raises(AssertionError, match="calibrated again"):
            run(name="c", cache_dir=own, **change)


def test_a_changed_model_is_analysed_afresh(run, folders, tmp_path):
    source = shutil.copytree(folders("llama"), tmp_path / "source")
    own = tmp_path / "cache"
    run(name="a", source=source, cache_dir=own)
    assert run(name="b", source=source, cache_dir=own).analysis_kept
    tensors = load_file(source / "model.safetensors")
    save_file(
        {n: t * 1.5 for n, t in tensors.items()}, source / "model.safetensors", {"format": "pt"}
    )
    assert not run(name="c", source=source, cache_dir=own).analysis_kept


def test_a_damaged_analysis_is_named(run, tmp_path):
    own = tmp_path / "cache"
    run(name="a", cache_dir=own)
    kept = sorted(own.glob("*/*.safetensors"))[3]
    kept.write_bytes(kept.read_bytes()[:500])
    with pytest.raises(SkimError, match=f"{re.escape(kept.name)}: damaged analysis .* delete it"):
        run(name="b", cache_dir=own)


def test_kept_analyses_are_listed_and_pruned(run, tmp_path):
    own = tmp_path / "cache"
    run(name="a", cache_dir=own, dry_run=True)
    run(name="b", cache_dir=own, dry_run=True, seed=1)
    (own / "x.state").write_bytes(b"left by an interrupted run")
    listed = sensitivity.entries(own)
    assert [size > 1000 for _, size, _ in listed] == [True, True, False]
    assert sensitivity.prune(own) == sum(size for _, size, _ in listed)
    assert not list(own.iterdir())
    assert sensitivity.entries(tmp_path / "nowhere") == []


@pytest.mark.parametrize("options", [{}, {"size": 80_000}, {"recipe": "paper", "embed_bits": 4}])
def test_a_dry_run_writes_nothing_and_tells_the_bytes(run, tmp_path, options):
    planned = run(dry_run=True, **options)
    assert not [p for p in tmp_path.iterdir() if p.name != "source"]
    done = run(**options)
    assert planned.bytes == done.bytes and planned.bits_per_weight == done.bits_per_weight
    assert planned.rows_by_width == done.rows_by_width


@pytest.mark.parametrize("recipe", ["fast", "paper", "best"])
def test_the_same_seed_gives_the_same_bytes(run, tmp_path, recipe):
    for name in ("a", "b"):
        report = run(name=name, recipe=recipe, cache_dir=tmp_path / f"cache-{name}")
        assert report.analysis_bytes == sum(
            map(len, everything(tmp_path / f"cache-{name}").values())
        )
    run(name="again", recipe=recipe, cache_dir=tmp_path / "cache-a")  # from the cache
    one = everything(tmp_path / "a")
    assert one == everything(tmp_path / "b") == everything(tmp_path / "again")
    run(name="other", recipe=recipe, seed=5)
    assert one != everything(tmp_path / "other")


def test_an_interrupted_training_goes_on_and_ends_the_same(run, tmp_path):
    run(name="whole", recipe="best", cache_dir=tmp_path / "one")
    own = tmp_path / "two"

    def stop(phase, done, total):
        if phase == "train" and done == total - 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(recipe="best", cache_dir=own, progress=stop)
    assert not (tmp_path / "out").exists() and list(own.glob("*.state"))
    phases = []
    run(recipe="best", cache_dir=own, progress=lambda *a: phases.append(a))
    assert everything(tmp_path / "out") == everything(tmp_path / "whole")
    assert [done for phase, done, _ in phases if phase == "train"] == [5, 6]  # 4 were kept
    assert not list(own.glob("*.state"))


def test_training_needs_two_windows(run, tmp_path):
    for samples in (2, 3):
        assert all(
            x > 0 for x in run(name=f"{samples}", recipe="best", samples=samples).held_out_kl
        )
    with pytest.raises(
        SkimError, match="samples must be at least 2 with recipe best: one is held out, got 1"
    ):
        run(recipe="best", samples=1)
    (tmp_path / "one.txt").write_text(" ".join(WORDS)[:40])
    with pytest.raises(SkimError, match="window"):
        run(recipe="best", text=tmp_path / "one.txt")
    assert not (tmp_path / "out").exists()


def test_progress_tells_every_phase_to_its_end(run):
    told = {}

    def progress(phase, done, total):
        assert 0 < done <= total and done > told.get(phase, (0, 0))[0]
        told[phase] = (done, total)

    run(recipe="best", seed=9, progress=progress)
    assert set(told) >= {"calibrate", "analyse", "fit", "train"}
    assert all(done == total for done, total in told.values())


def test_include_and_exclude_choose_the_linears(run, folders, tmp_path):
    report = run(include=["*.mlp.*"], exclude=["*.1.mlp.up_proj"], bits=3)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    want = [f"model.layers.{i}.mlp.{p}_proj" for i in (0, 1) for p in ("gate", "up", "down")]
    assert sorted(config["linears"]) == sorted(set(want) - {"model.layers.1.mlp.up_proj"})
    assert report.linears == 5
    kept, original = stored(tmp_path / "out"), stored(folders("llama"))
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.up_proj"):
        assert torch.equal(kept[f"{name}.weight"], original[f"{name}.weight"])
    assert report.bits_per_weight == pytest.approx(recount(tmp_path / "out", folders("llama")))
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")


def test_what_is_not_compressed_is_kept_bit_for_bit(run, folders, tmp_path):
    run("opt", embed_bits=16)
    kept, original = stored(tmp_path / "out"), stored(folders("opt"))
    names = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"][
        "linears"
    ]
    for name, tensor in original.items():
        if name.removesuffix(".weight") not in names:
            assert torch.equal(kept[name], tensor), name


def test_a_compressed_model_is_not_compressed_again(run, tmp_path):
    run(name="once")
    with pytest.raises(SkimError, match="once: is compressed already; give the original model"):
        run(name="twice", source=tmp_path / "once")
    assert not (tmp_path / "twice").exists()


def test_an_existing_out_needs_force(run, tmp_path):
    run(bits=3)
    before = everything(tmp_path / "out")
    with pytest.raises(SkimError, match="out: exists, use --force"):
        run(bits=5)
    assert everything(tmp_path / "out") == before
    assert run(bits=5, force=True).bits_per_weight > 4.9
    assert everything(tmp_path / "out") != before


@pytest.mark.parametrize("content, have", [("", 1), ("too short", 10)])
def test_text_without_a_window_is_refused(run, tmp_path, content, have):
    (tmp_path / "few.txt").write_text(content)
    with pytest.raises(SkimError, match=f"few.txt: {have} tokens are fewer than one window of 32"):
        run(text=tmp_path / "few.txt")
    assert not (tmp_path / "out").exists()


def test_a_text_that_is_missing_is_named(run, tmp_path):
    with pytest.raises(SkimError, match="nothing.txt: no such file"):
        run(text=tmp_path / "nothing.txt")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_not_numbers_are_named(run, folders, tmp_path, value):
    source = shutil.copytree(folders("llama"), tmp_path / "source")
    tensors = load_file(source / "model.safetensors")
    name = "model.layers.1.mlp.gate_proj.weight"
    tensors[name][3, 4] = value
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(SkimError, match=f"model.safetensors: {name}: holds NaN or Inf"):
        run(source=source)
    assert not (tmp_path / "out").exists()


def test_the_built_in_text_needs_no_file(run):
    assert run(text=None, dry_run=True).calibration["text"] == "the built-in text"


def test_provenance_names_the_text_without_its_folder(run, tmp_path, text):
    run()
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    calibration = config["provenance"]["calibration"]
    assert calibration == {"text": "calibration.txt", "windows": 8, "seq_len": 32, "seed": 0}
    assert str(tmp_path) not in json.dumps(config) and str(text.parent) not in json.dumps(config)


def test_shards_hold_what_the_report_counts(run, folders, tmp_path):
    """Every stored tensor of every linear is there, with the sizes its widths give."""
    run("phi3", recipe="paper")
    with safe_open(next((tmp_path / "out").glob("*.safetensors")), framework="pt") as file:
        keys = set(file.keys())
    for name in decoder_linears(tiny_model("phi3")):
        assert {f"{name}.{part}" for part in ("weight", "widths", "row_scale", "in_scale")} <= keys


# ---- the steps between the analysis and the folder


def analysed(recipe: str, path, bits: float = 4.0, **changes):
    """The walk of a float32 model, its analysis under a recipe, and widths for so many bits."""
    plan = dataclasses.replace(RECIPES[recipe], **changes)
    model, ids = (
        tiny_model(),
        torch.randint(0, 256, (12, 24), generator=torch.Generator().manual_seed(0)),
    )
    chosen = decoder_linears(model)
    steps = walk_of(model, ids)
    known = sensitivity.stored(path, recipe, chosen)
    walk.analyse(steps, known, plan)
    errors = {n: a.errors for n, a in known.items()}
    price = budget.prices(specs_of(chosen, None, plan.scale), widths_of(plan, None))
    return steps, plan, known, budget.for_bits(errors, price, bits, plan.end_loss)


def fit_all(steps, known, widths, plan):
    """Codebooks and codes of every linear at its widths."""
    weights = {n: m.weight.detach().float() for n, m in steps.linears.items()}
    return {n: fit_linear(w, known[n], widths[n], plan) for n, w in weights.items()}


def rounded(steps, known, fits, plan):
    """The fits as they are stored."""
    weights = {n: m.weight.detach().float() for n, m in steps.linears.items()}
    return {n: settled(weights[n], known[n], fit, plan) for n, fit in fits.items()}


def full_error(w, w_hat, known) -> torch.Tensor:
    """sum_i rho_i (w_hat - w) H (w_hat - w) float64."""
    d = (w_hat - w).double()
    return (((d @ known.hessian.double()) * d).sum(1) * known.row_weight.double()).sum()


def test_the_papers_scale_is_kept_where_the_full_error_falls(tmp_path):
    steps, plan, known, widths = analysed("paper", tmp_path)
    chosen = steps.linears
    scaled = fit_all(steps, known, widths, plan)
    plain = fit_all(steps, known, widths, dataclasses.replace(plan, scale=False))
    moved = 0
    for name, fit in scaled.items():
        w, s = chosen[name].weight.detach(), fit.in_scale
        before = full_error(w, plain[name].dense(), known[name])
        after = full_error(w, fit.dense(), known[name])
        if bool((s == 1).all()):
            assert torch.equal(fit.dense(), plain[name].dense())
            continue
        moved += 1
        assert after < before
        # rows with a codebook are the k-means solution of w / s under f s^2
        v, f = fit.dense() / s, known[name].fisher.float() * s * s
        costs = kmeans_rows(w / s, f, 5)[1]
        for i, b in enumerate(widths[name].tolist()):
            if b <= 5:
                cost = float((f[i].double() * (w[i] / s - v[i]).double() ** 2).sum())
                assert cost == pytest.approx(float(costs[i, b - 1]), rel=1e-4, abs=1e-12)
    assert moved


def test_codes_settle_on_the_stored_codebooks(tmp_path):
    steps, plan, known, widths = analysed("fast", tmp_path)
    chosen = steps.linears
    quantized = rounded(steps, known, fit_all(steps, known, widths, plan), plan)
    fits = fit_all(steps, known, widths, plan)
    gained = 0
    for name, q in quantized.items():
        w = chosen[name].weight.detach()
        loose = full_error(w, dequantize(finish(w, None, fits[name])), known[name])
        tight = full_error(w, dequantize(q), known[name])
        assert tight <= loose * (1 + 1e-6)
        gained += tight < loose * (1 - 1e-6)
    assert gained > len(quantized) // 2


def test_what_is_trained_is_what_is_written(tmp_path):
    """Codebooks and norms together have the held-out loss that the training reports."""
    steps, plan, known, widths = analysed("best", tmp_path, bits=3.0, steps=12)
    model, original, unseen = steps.source.model, tiny_model(), steps.ids[-6:]
    walk.each(steps, "fit", "packed", packed_linear, lambda n: (known[n], widths[n], plan))
    specs = specs_of(steps.linears, None, plan.scale)
    specs = {n: specs[n].with_widths(w) for n, w in widths.items()}
    losses = train_packed(steps, specs, plan.steps, plan.rate)
    read = walk.packed(steps)
    quantized = {
        n: unpack(Layer(spec, {part: read(f"{n}.{part}") for part in layout(spec)}))
        for n, spec in specs.items()
    }
    norms = {n: p for n, p in model.named_parameters() if p.dim() == 1}
    assert any(not torch.equal(p, original.get_parameter(n)) for n, p in norms.items())

    def loss() -> float:
        with torch.no_grad():
            p, q = (m(input_ids=unseen).logits.double().log_softmax(-1) for m in (original, model))
        return float((p.exp() * (p - q)).sum(-1).mean())

    for name, q in quantized.items():
        assert torch.equal(model.get_submodule(name).weight, original.get_submodule(name).weight)
        model.get_submodule(name).weight.data.copy_(dequantize(q))
    assert min(losses) < losses[0]
    off = abs(loss() - min(losses))
    assert off < 0.02 * min(losses)
    for name, p in norms.items():
        p.data.copy_(original.get_parameter(name))
    assert abs(loss() - min(losses)) > 1e-6


@pytest.mark.parametrize("worse", [False, True])
def test_refinement_that_is_measured_worse_is_left_out(run, tmp_path, monkeypatch, worse):
    with monkeypatch.context() as patch:
        patch.setitem(RECIPES, "fast", dataclasses.replace(RECIPES["fast"], rounds=0))
        run(name="plain", bits=2.5)
    seen = []

    def measured(walk, trials):
        usual = divergences(walk, trials)
        seen.append((len(walk.ids), usual, {n for trial in trials.values() for n in trial.names}))
        return {"refined": 9.0 if worse else 1e-9}

    monkeypatch.setattr(pipeline_steps, "divergences", measured)
    report = run(bits=2.5)
    assert report.tried["refined"] == (9.0 if worse else 1e-9)
    ((windows, found, names),) = seen
    assert windows == 4 and names == set(decoder_linears(tiny_model())) and found["refined"] > 0
    plain, out = (everything(tmp_path / name) for name in ("plain", "out"))
    assert (plain["model.safetensors"] == out["model.safetensors"]) == worse


# ---- sparsity and adapters


@pytest.mark.parametrize("recipe", ["paper", "fast", "best"])
@pytest.mark.parametrize("sparsity, rank", [("2:4", 0.3), ("0.5", 0.3), ("none", 0.3), ("2:4", 0)])
def test_slim_compresses_loads_and_counts_every_bit(run, folders, tmp_path, recipe, sparsity, rank):
    report = run(method="slim", recipe=recipe, bits=4, sparsity=sparsity, rank=rank)
    out = tmp_path / "out"
    model = AutoModelForCausalLM.from_pretrained(out)
    ids = AutoTokenizer.from_pretrained(out)("the row", return_tensors="pt")["input_ids"]
    assert model(input_ids=ids).logits.isfinite().all()
    assert report.bits_per_weight == pytest.approx(recount(out, folders("llama")), rel=1e-12)
    assert report.bytes == sum(len(data) for data in everything(out).values())
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["format_version"] == 2 and config["bits"] == report.bits_per_weight
    entry = config["linears"]["model.layers.0.mlp.up_proj"]
    assert entry.get("sparsity") == {"2:4": "2:4", "0.5": "bitmap"}.get(sparsity)
    assert entry.get("rank", 0) == (32 if rank else 0)  # 0.3 of 64, in sixteens
    assert config["provenance"]["config"]["sparsity"] == sparsity


@pytest.mark.parametrize("family", FAMILIES)
def test_slim_goes_through_the_blocks_of_every_family(run, folders, tmp_path, family):
    run(family, method="slim", recipe="best", bits=4)
    assert perplexity_ratio(tmp_path / "out", folders(family)) < 1.5


def test_two_runs_of_slim_write_the_same_bytes(run, tmp_path):
    for name in ("out", "again"):
        run(name=name, method="slim", recipe="best", bits=3)
    assert everything(tmp_path / "out") == everything(tmp_path / "again")


def test_slim_plans_what_it_writes(run):
    planned = run(method="slim", recipe="fast", bits=4, dry_run=True)
    assert planned.bytes == run(method="slim", recipe="fast", bits=4).bytes


@pytest.mark.parametrize("sparsity, rank", [("2:4", 0.3), ("2:4", 0), ("none", 0.3), ("0.5", 0.3)])
def test_skim_pays_masks_and_adapters_from_its_bits(run, folders, tmp_path, sparsity, rank):
    asked = 9.5 if rank else 4.0  # on 64 inputs an adapter of rank 32 takes five bits per weight
    asked = min(asked, 8.0)
    report = run(bits=asked, sparsity=sparsity, rank=rank)
    assert report.bits_per_weight == pytest.approx(
        recount(tmp_path / "out", folders("llama")), rel=1e-12
    )
    assert report.bits_per_weight <= asked
    assert max(report.rows_by_width) <= 5
    assert report.bytes == sum(len(data) for data in everything(tmp_path / "out").values())


def test_skim_with_sparsity_may_be_asked_for_a_size_or_an_index_width(run, tmp_path):
    size = run(index_bits=3, sparsity="2:4", name="one").bytes
    assert run(index_bits=3, sparsity="2:4", name="two").rows_by_width.keys() == {3}
    report = run(size=size, bits=None, sparsity="2:4", name="three")
    assert 0.99 * size < report.bytes <= size


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(method="slim", bits=3.2), "with method slim bits are the width"),
        (dict(method="slim", bits=6), "2 to 5 with recipe fast, got 6"),
        (dict(method="slim", bits=None, size=10**6), "method slim has one width"),
        (dict(method="slim", bits=4, sparsity="5:4"), "sparsity must be none, N:M"),
        (dict(method="slim", bits=4, sparsity="3:5"), "3:5 needs a multiple of 5 inputs, got 64"),
        (dict(rank=1.5), "rank must be 0"),
        (dict(rank=0.5, adapter_bits=8), "adapter-bits must be 16 or 4"),
        (dict(recipe="paper", sparsity="2:4"), "recipe paper is SKIM as published"),
        (dict(sparsity="2:4", index_bits=6), "index-bits must be 1 to 5"),
        (dict(method="slimmer"), "method must be skim or slim"),
        (dict(rank=1.0, bits=2.0), "bits per weight is below what"),
    ],
)
def test_impossible_mixtures_are_one_line(run, tmp_path, options, message):
    with pytest.raises(SkimError, match=re.escape(message)):
        run(**options)
    assert not (tmp_path / "out").exists()
