"""Targets to widths: every stored bit is counted, and a budget is met from below."""

import numpy as np
import pytest
import torch
from torch import nn

from conftest import random_quantized
from skimlm.errors import SkimError
from skimlm.pipeline import budget
from skimlm.pipeline.budget import specs_of
from skimlm.quantize import slim
from skimlm.quantize.fit import GRIDS, TRELLISES, WIDTHS
from skimlm.quantize.mask import Sparsity
from skimlm.runtime.linear import CompressedLinear


def linears():
    return {"a": nn.Linear(40, 24), "b": nn.Linear(17, 9), "c": nn.Linear(64, 50)}


def curves(seed=0):
    """Convex error curves, [r, 8] per linear."""
    g = torch.Generator().manual_seed(seed)
    falling = 4.0 ** -torch.arange(8, dtype=torch.float64)
    rows = {n: m.out_features for n, m in linears().items()}
    return {n: torch.rand(r, 1, generator=g).double() * falling for n, r in rows.items()}


@pytest.mark.parametrize("scale", [False, True])
def test_prices_are_the_bytes_that_are_stored(scale):
    stored, widths = 0, {}
    for seed, (name, m) in enumerate(linears().items()):
        q = random_quantized(m.out_features, m.in_features, seed=seed, in_scale=scale)
        stored += CompressedLinear.from_quantized(q).nbytes
        widths[name] = q.widths
    assert budget.prices(specs_of(linears(), None, scale), WIDTHS).bits(widths) == 8 * stored


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("bits", [4.0, 4.5, 5.01, 6.0])
def test_bits_are_met_from_below_within_one_edge(bits, pooled):
    price = budget.prices(specs_of(linears(), None, False), GRIDS)
    widths = budget.for_bits(curves(), price, bits, pooled)
    room = bits * price.total - price.bits(widths)
    edge = max(np.diff(rows).max() for rows in price.rows.values())
    assert 0 <= room <= edge * (1 if pooled else len(widths))


def wide():
    return {"a": nn.Linear(300, 80), "b": nn.Linear(17, 9), "c": nn.Linear(200, 130)}


def mixed_curves(seed=0):
    """Curves over all widths, in which a trellis loses now less, now more than a codebook."""
    g = torch.Generator().manual_seed(seed)
    bits = torch.tensor([w % 16 for w in WIDTHS]).double()
    of_trellis = torch.tensor([w in TRELLISES for w in WIDTHS])
    found = {}
    for name, m in wide().items():
        better = torch.rand(m.out_features, len(WIDTHS), generator=g).double() + 0.4
        size = torch.rand(m.out_features, 1, generator=g).double()
        found[name] = size * 4.0**-bits * torch.where(of_trellis, better, 1.0)
    return found


@pytest.mark.parametrize("pooled", [True, False])
@pytest.mark.parametrize("bits", [2.5, 4.0])
def test_codebooks_and_trellises_are_bought_from_one_budget(bits, pooled):
    price, errors = budget.prices(specs_of(wide(), None, False), WIDTHS), mixed_curves()
    widths = budget.for_bits(errors, price, bits, pooled)
    assert bits * price.total * 0.97 < price.bits(widths) <= bits * price.total
    both = torch.cat([widths["a"], widths["c"]])
    assert (both > 16).any() and (both < 16).any()
    assert (widths["b"] < 16).all()  # a table of 128 levels would cost more than all its rows
    for name in ("a", "c"):
        cost, allowed = price.per_row(name).tolist(), set(widths[name].tolist())
        columns = [k for k, w in enumerate(WIDTHS) if w < 16 or w in allowed]
        for w, e in zip(widths[name].tolist(), errors[name].tolist(), strict=True):
            now = WIDTHS.index(w)  # no width costs less and loses less
            assert not any(cost[k] < cost[now] and e[k] < e[now] for k in columns)


def test_a_budget_for_codebooks_alone_is_met_without_trellises():
    price, errors = budget.prices(specs_of(linears(), None, False), WIDTHS), curves()
    errors = {n: torch.cat([e, e[:, :4] / 2], 1) for n, e in errors.items()}
    least = price.bits(budget.uniform(price.specs, 1)) / price.total
    widths = budget.for_bits(errors, price, least, True)
    assert price.bits(widths) <= least * price.total


def test_a_pool_of_the_model_is_no_worse_than_one_per_linear():
    price = budget.prices(specs_of(linears(), None, False), GRIDS)

    def error(widths):
        picked = (e.gather(1, widths[n].long()[:, None] - 1).sum() for n, e in curves().items())
        return float(sum(picked))

    one = error(budget.for_bits(curves(), price, 5.0, True))
    assert one < error(budget.for_bits(curves(), price, 5.0, False))


def test_a_linear_that_needs_more_than_its_share_gets_it():
    price = budget.prices(specs_of(linears(), None, False), GRIDS)
    least = price.bits(budget.uniform(price.specs, 1)) / price.total
    widths = budget.for_bits(curves(), price, least + 0.2, False)
    assert price.bits(widths) <= (least + 0.2) * price.total
    assert (widths["b"] == 1).all()  # 17 columns: bookkeeping alone is over the share


def test_impossible_targets_say_what_is_possible():
    price = budget.prices(specs_of(linears(), None, False), GRIDS)

    def size(widths):
        return 1000 + round(price.bits(widths) / 8)

    low, high = (size(budget.uniform(price.specs, b)) for b in (1, 8))
    for target, word in (
        (budget.Target(size=low - 1), f"{low:,}"),
        (budget.Target(size=high * 2), f"{high:,}"),
        (budget.Target(bits=1.5), "at least"),
    ):
        with pytest.raises(SkimError, match=word):
            budget.check(target, price, size)
    for size_ in (low, high, (low + high) // 2):
        target = budget.Target(size=size_)
        budget.check(target, price, size)
        widths = budget.choose(target, curves(), price, True, size)
        assert 0 <= size_ - size(widths) <= 64


def test_more_bits_than_rows_can_hold_are_refused():
    options = slim.Options(3, Sparsity(2, 4), 0.0)
    layers = {"a": nn.Linear(64, 24), "c": nn.Linear(64, 50)}
    price = budget.prices(specs_of(layers, options, False), GRIDS[:5])
    most = price.bits(budget.uniform(price.specs, 5)) / price.total
    with pytest.raises(SkimError, match=f"the widest here, take: at most {most:.2f}"):
        budget.check(budget.Target(bits=most + 0.01), price, lambda _: 0)
    budget.check(budget.Target(bits=most - 0.01), price, lambda _: 0)


def test_a_size_is_met_also_where_the_rest_of_a_folder_grows_with_the_widths():
    """Headers that grow by jumps once sent the search round in circles: it answered 1 bit."""
    price = budget.prices(specs_of(linears(), None, False), GRIDS)
    least = price.bits(budget.uniform(price.specs, 1)) / 8

    def jumping(widths):
        stored = price.bits(widths) / 8
        return round(stored + 40 * ((stored - least) % 200 < 100))

    for size in range(int(least) + 150, int(least) + 900, 50):
        target = budget.Target(size=size)
        widths = budget.choose(target, curves(), price, True, jumping)
        assert jumping(widths) <= size
        assert price.bits(widths) / 8 > size - 250


def test_a_size_that_nothing_meets_is_an_error():
    price = budget.prices(specs_of(linears(), None, False), GRIDS)
    target = budget.Target(size=1000)
    with pytest.raises(SkimError, match="takes 10,000 bytes at 1 bit and 10,000 at 8"):
        budget.choose(target, curves(), price, True, lambda _: 10_000)


def test_a_size_is_met_as_closely_in_a_model_of_many_rows():
    many = {"a": nn.Linear(16, 100_000, device="meta")}
    price = budget.prices(specs_of(many, None, False), GRIDS)
    g = torch.Generator().manual_seed(0)
    falling = 4.0 ** -torch.arange(8, dtype=torch.float64)
    errors = {"a": torch.rand(100_000, 1, generator=g).double() * falling}

    def size(widths):  # a byte less of codes takes less than one off the folder
        return 1000 + round(0.9 * price.bits(widths) / 8)

    ends = [size(budget.uniform(price.specs, b)) for b in (1, 8)]
    for share in (0.3, 0.5, 0.7):
        asked = round(ends[0] + share * (ends[1] - ends[0]))
        widths = budget.choose(budget.Target(size=asked), errors, price, True, size)
        assert 0 <= asked - size(widths) <= 8


def test_a_size_is_met_where_corrections_are_slow():
    price = budget.prices(specs_of(linears(), None, False), GRIDS)

    def size(widths):
        return 1000 + round(price.bits(widths) / 8 / 50)

    low, high = (size(budget.uniform(price.specs, b)) for b in (1, 8))
    asked = (low + high) // 2 - 1
    widths = budget.choose(budget.Target(size=asked), curves(), price, True, size)
    assert 0 <= asked - size(widths) <= 2
