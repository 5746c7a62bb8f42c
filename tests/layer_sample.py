"""Random layers of every kind, and oracles that read FORMAT.md by the letter."""

import dataclasses

import torch

import skimlm.format as P


def oracle_bytes(codes: list[int], width: int) -> bytes:
    """One row's bytes, from the row as one big integer."""
    stream = sum(code << (j * width) for j, code in enumerate(codes))
    return stream.to_bytes((len(codes) * width + 7) // 8, "little")


def oracle_planes(codes: list[int], b: int) -> bytes:
    """The same of a trellis row: of every eight codes a byte for each of their bits."""
    eights = [codes[k : k + 8] for k in range(0, len(codes), 8)]
    return bytes(
        sum((u >> m & 1) << i for i, u in enumerate(eight)) for eight in eights for m in range(b)
    )


def oracle_pack(q: P.QuantizedWeight) -> dict[str, bytes]:
    """Every stored tensor as bytes, row by row, by the letter of FORMAT.md."""
    order = sorted(range(len(q.widths)), key=lambda i: (int(q.widths[i]), i))
    out = {"weight": b"", "codebook": b"", "row_scale": b"", "row_zero": b""}
    out["widths"] = bytes(q.widths.tolist())
    for i in order:
        b = int(q.widths[i])
        as_bytes = oracle_planes if b > 16 else oracle_bytes
        out["weight"] += as_bytes(q.codes[i].tolist(), b % 16)
        out["row_scale"] += raw(q.row_scale[i])
        if b > 16:
            continue
        if b <= 5:
            out["codebook"] += bytes(v & 255 for v in q.codebook[i, : 2**b].tolist())
        else:
            out["row_zero"] += int(q.row_zero[i]).to_bytes(2, "little", signed=True)
    if q.in_scale is not None:
        out["in_scale"] = raw(q.in_scale)
    out["trellis"] = raw(q.trellis)
    return {name: data for name, data in out.items() if data}


def oracle_window(codes: list[int], b: int, j: int) -> int:
    """A code and the taps behind it: of every eighth code, then from the next eighth on."""
    eighths = [range(first, len(codes), 8) for first in range(8)]
    behind = [*eighths[j % 8][j // 8 + 1 :], *(k for rest in eighths[j % 8 + 1 :] for k in rest)]
    taps = [codes[k] >> (b - 1) for k in behind[: 7 - b]]
    return codes[j] + sum(tap << (b + k) for k, tap in enumerate(taps))


def oracle_level(q: P.QuantizedWeight, i: int, j: int) -> int:
    """The level of code j of row i."""
    code, b = int(q.codes[i, j]), int(q.widths[i])
    if b > 16:
        table = sorted({w for w in q.widths.tolist() if w > 16}).index(b)
        return int(q.trellis[table, oracle_window(q.codes[i].tolist(), b - 16, j)])
    return int(q.codebook[i, code]) if b <= 5 else code - int(q.row_zero[i])


def levels_of(q: P.QuantizedWeight) -> torch.Tensor:
    """All levels float64 [r, k], windows from the taps as one big integer."""
    levels = q.codebook.double().gather(1, q.codes.long().clamp(max=31))
    wide = (q.widths > 5)[:, None]
    levels = torch.where(wide, q.codes.double() - q.row_zero.double()[:, None], levels)
    for table, width in enumerate(sorted({w for w in q.widths.tolist() if w > 16})):
        rows, b = q.widths == width, width - 16
        levels[rows] = q.trellis[table].double()[big_windows(q.codes[rows], b)]
    return levels


def big_windows(codes: torch.Tensor, b: int) -> torch.Tensor:
    """Windows int64 [n, k], the taps of a row read as one big integer."""
    columns = [list(range(codes.shape[1]))[first::8] for first in range(8)]
    order = [j for eighth in columns for j in eighth]
    out = torch.empty(codes.shape, dtype=torch.long)
    for i, row in enumerate(codes.tolist()):
        stream = sum((row[j] >> (b - 1)) << place for place, j in enumerate(order))
        for place, j in enumerate(order):
            low = row[j] % 2 ** (b - 1)
            out[i, j] = low + ((stream >> place) % 2 ** (8 - b) << (b - 1))
    return out


def oracle_value(q: P.QuantizedWeight, i: int, j: int) -> float:
    """One weight, in doubles: the three factors have few enough bits to multiply exactly."""
    level = oracle_level(q, i, j)
    return level * float(q.row_scale[i]) * (1.0 if q.in_scale is None else float(q.in_scale[j]))


def raw(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).contiguous().view(torch.uint8).numpy().tobytes()


def equal(a, b) -> bool:
    """Whether two of the dataclasses of format/pack.py hold the same numbers."""
    if not isinstance(a, (P.QuantizedWeight, P.Adapter)):
        return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    names = [field.name for field in dataclasses.fields(a)]
    return type(a) is type(b) and all(equal(getattr(a, n), getattr(b, n)) for n in names)


def with_options(
    q, sparsity=None, kept=0, group=None, rank=0, adapter_bits=0, seed=0
) -> P.QuantizedWeight:
    """A dense random weight made sparse, put on a grid and given an adapter."""
    (rows, cols), g = q.shape, torch.Generator().manual_seed(seed)
    codes, mask, adapter, row_scale = q.codes, None, None, q.row_scale
    if sparsity:
        size, keep = (4, 2) if sparsity == "2:4" else (cols, kept)
        chosen = torch.rand(rows, cols // size, size, generator=g).topk(keep).indices
        mask = torch.zeros(rows, cols // size, size, dtype=torch.bool).scatter_(2, chosen, True)
        mask = mask.view(rows, cols)
        codes = codes[mask].view(rows, -1)
    on_grid = group is not None
    if on_grid:
        spread = torch.randn(rows, -(-cols // group), generator=g) / cols**0.5
        row_scale = (spread / 2 ** q.widths.float().unsqueeze(1)).bfloat16()

    def factor(n):
        if adapter_bits == 16:
            return (torch.randn(rank, n, generator=g) / 8).bfloat16(), None
        codes = torch.randint(-8, 8, (rank, n), dtype=torch.int8, generator=g)
        return codes, (torch.randn(rank, -(-n // 128), generator=g) / 64).bfloat16()

    if rank:
        (a, a_scale), (b, b_scale) = factor(cols), factor(rows)
        adapter = P.Adapter(a, b, a_scale, b_scale)
    return P.QuantizedWeight(
        codes,
        q.widths,
        torch.zeros_like(q.codebook) if on_grid else q.codebook,
        row_scale,
        torch.zeros_like(q.row_zero) if on_grid else q.row_zero,
        q.in_scale,
        mask,
        sparsity,
        group,
        adapter,
        q.trellis,
    )


def bits(data: bytes, start: int, count: int) -> int:
    """`count` bits of a stream from bit `start` on, the first one lowest."""
    return sum((data[k // 8] >> k % 8 & 1) << (k - start) for k in range(start, start + count))


def trellis_codes(row: bytes, b: int, n: int) -> list[int]:
    """Bit m of code k is bit k mod 8 of byte b * (k div 8) + m."""
    return [sum((row[b * (k // 8) + m] >> k % 8 & 1) << m for m in range(b)) for k in range(n)]


def oracle_read(stored: dict[str, torch.Tensor], rows: int, cols: int, entry: dict):
    """W, and A and B if there are any, a number at a time by the letter of FORMAT.md."""
    data = {name: raw(tensor) for name, tensor in stored.items()}

    def number(name, i, kind, size):
        piece = bytearray(data[name][size * i : size * i + size])
        return float(torch.frombuffer(piece, dtype=kind)[0])

    n, g, sparsity = entry.get("kept", cols), entry.get("group"), entry.get("sparsity")
    pairs = ["01", "02", "03", "12", "13", "23"]
    at = table = zero = places = 0
    weight = [[0.0] * cols for _ in range(rows)]
    widths = list(data["widths"])
    trellises = sorted({b for b in widths if b > 16})
    for place, i in enumerate(sorted(range(rows), key=lambda i: (widths[i], i))):
        b, columns, width = widths[i] % 16, range(cols), widths[i]
        if sparsity == "bitmap":
            columns = [j for j in range(cols) if bits(data["positions"][places:], j, 1)]
            places += (cols + 7) // 8
        elif sparsity:
            found = [bits(data["positions"][places:], 3 * q, 3) for q in range(cols // 4)]
            columns = [4 * q + int(c) for q, code in enumerate(found) for c in pairs[code]]
            places += (3 * (cols // 4) + 7) // 8
        assert len(columns) == n
        row = data["weight"][at:]
        codes = trellis_codes(row, b, n) if width > 16 else []
        for k, j in enumerate(columns):
            code = bits(row, k * b, b)
            if g:
                level = code - 2 ** (b - 1)
            elif width > 16:
                level = 128 * trellises.index(width) + oracle_window(codes, b, k)
                level = int.from_bytes(data["trellis"][level:][:1], "little", signed=True)
            elif b <= 5:
                level = int.from_bytes(data["codebook"][table + code :][:1], "little", signed=True)
            else:
                level = code - number("row_zero", zero, torch.int16, 2)
            groups = -(-cols // g) if g else 1
            scale = number("row_scale", place * groups + (j // g if g else 0), torch.bfloat16, 2)
            shift = number("in_scale", j, torch.float16, 2) if "in_scale" in data else 1.0
            weight[i][j] = level * scale * shift
        at += b * ((n + 7) // 8) if width > 16 else (n * b + 7) // 8
        table, zero = table + (2**b if width <= 5 else 0), zero + (5 < width < 9)

    def factor(name, n):
        if entry["adapter_bits"] == 16:
            kind = torch.bfloat16
            return [[number(name, k * n + j, kind, 2) for j in range(n)] for k in range(rank)]
        row, scales = (n + 1) // 2, -(-n // 128)
        return [
            [
                ((data[name][k * row + j // 2] >> 4 * (j % 2)) % 16 - 8)
                * number(f"{name}_scale", k * scales + j // 128, torch.bfloat16, 2)
                for j in range(n)
            ]
            for k in range(rank)
        ]

    rank = entry.get("rank", 0)
    sides = (("lora_a", cols), ("lora_b", rows)) if rank else ()
    return torch.tensor(weight), *(torch.tensor(factor(name, n)) for name, n in sides)


def options(sparsity=None, kept=0, group=None, rank=0, adapter_bits=0) -> dict:
    """What a layer of version 2 has, as keywords of `LayerSpec` and `with_options`."""
    return dict(sparsity=sparsity, kept=kept, group=group, rank=rank, adapter_bits=adapter_bits)


# of a layer of 140 columns: every combination but that of version 1
OPTIONS = [
    options(*sparse, group, *adapter)
    for sparse in [(None, 0), ("2:4", 70), ("bitmap", 1), ("bitmap", 50), ("bitmap", 140)]
    for group in (None, 33, 1000)
    for adapter in [(0, 0), (1, 4), (3, 4), (3, 16)]
][1:]


# widths of rows, with those of a trellis among them
TRELLIS_WIDTHS = [[17], [18], [19], [20], [3, 20, 17, 7, 2, 19, 18, 1]]


def options_id(chosen: dict) -> str:
    """A name for a test."""
    return " ".join(f"{key} {value}" for key, value in chosen.items() if value)


def spoil(index, value):
    """A change of one place of a tensor."""

    def change(tensor):
        tensor[index] = value
        return tensor

    return change


def inputs(count, cols, dtype, seed=0):
    """Activations as they come: normal, a few channels a hundred times as large."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(count, cols, generator=g)
    x[:, torch.rand(cols, generator=g) < 0.02] *= 100
    return x.to(dtype)


def mixed(quantized):
    """Every third linear as it is, one 2:4 on a grid with an adapter, one a bitmap of codebooks."""
    kinds = [None, ("2:4", 2, 32, 16, 4), ("bitmap", 3, None, 5, 16)]
    made = {}
    for i, (name, q) in enumerate(quantized.items()):
        if (kind := kinds[i % 3]) is not None:
            sparsity, share, *rest = kind
            q = with_options(q, sparsity, q.shape[1] // share, *rest, seed=i)
        made[name] = q
    return made
