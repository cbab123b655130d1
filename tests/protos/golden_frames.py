"""The gradients whose frames are kept in `golden/`, one for each pair of codings and some at the edges.

The files are the wire format: they change only together with its version byte. To write them anew:

    python tests/protos/golden_frames.py

Each `NAME.frame` has a `NAME.json` that says what it holds; values are the bits of binary32 in hexadecimal, so that NaN
and -0.0 can be told.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from thresher.protos.codec import encode
from thresher.protos.index_codings import IndexCoding
from thresher.protos.seeded import seeded_indices
from thresher.protos.sparse import Levels, Seeded, SparseGradient
from thresher.protos.value_codings import ValueCoding

FOLDER = Path(__file__).parent / "golden"


def from_bits(*words: int) -> Tensor:
    return torch.tensor([word - (word >> 31 << 32) for word in words], dtype=torch.int32).view(torch.float32)


def plain(count: int) -> Tensor:
    values = torch.arange(1, count + 1) / torch.arange(3, count + 3) - 0.7
    values[:4] = from_bits(0x80000000, 0x7F800000, 0x7FC12345, 0x00000001)  # -0.0, infinity, a NaN, the least number
    return values


def brain(count: int) -> Tensor:
    return torch.tensor([(128 + i % 128) * 2.0 ** (i % 40 - 60) * (-1) ** i for i in range(count)])


def half(count: int) -> Tensor:
    values = torch.tensor([(1025 + 2 * (i % 500)) * 2.0 ** (i % 20 - 16) * (-1) ** (i // 3) for i in range(count)])
    values[:3] = torch.tensor([2.0**-24, -1023 * 2.0**-24, float("inf")])  # subnormal, and beyond all numbers
    return values


def signs(count: int) -> Tensor:
    first = count // 3
    scales = torch.tensor([0.1] * first + [0.3] * (count - first))
    return scales * torch.tensor([(-1.0) ** (i // 2) for i in range(count)])


def levels(count: int) -> tuple[Tensor, Levels]:
    first = count // 3
    codes = torch.tensor([(37 * i + 128) % 256 - 128 for i in range(count)], dtype=torch.int8)
    scales = torch.tensor([0.1, 0.003])
    values = codes * torch.cat([scales[:1].expand(first), scales[1:].expand(count - first)])
    return values, Levels(codes, scales, torch.tensor([first, count]))


SUPPORTS: dict[IndexCoding, tuple[Tensor, int, tuple[Seeded, ...]]] = {
    IndexCoding.DENSE: (torch.arange(20), 20, ()),
    IndexCoding.RICE: (torch.from_numpy(seeded_indices(500, 21, key=3)), 500, ()),
    IndexCoding.RUNS: (torch.tensor([*range(7, 20), *range(300, 309), 499]), 500, ()),
    IndexCoding.SEEDED: (
        torch.cat(
            [torch.from_numpy(seeded_indices(700, 120, 5)), 700 + torch.from_numpy(seeded_indices(300, 90, 2**63))]
        ),
        1000,
        (Seeded(0, 700, 120, 5), Seeded(700, 300, 90, 2**63)),
    ),
}
VALUES: dict[ValueCoding, Callable[[int], Tensor]] = {
    ValueCoding.F32: plain,
    ValueCoding.BF16: brain,
    ValueCoding.F16: half,
    ValueCoding.SIGNS: signs,
    ValueCoding.LEVELS: lambda count: levels(count)[0],
}


def gradients() -> dict[str, SparseGradient]:
    """By the name of its files, each gradient."""
    found = {}
    for index_coding, (indices, numel, seeds) in SUPPORTS.items():
        for value_coding, values in VALUES.items():
            hint = levels(indices.numel())[1] if value_coding is ValueCoding.LEVELS else None
            gradient = SparseGradient(indices, values(indices.numel()), numel, hint, seeds)
            found[f"{index_coding.name.lower()}-{value_coding.name.lower()}"] = gradient
    piece = found["seeded-f32"].slice(50, 950)
    edges = {
        "no-element": SparseGradient.empty(0),
        "none-of-five": SparseGradient.empty(5),
        "one-of-many": SparseGradient(torch.tensor([2**32 - 2]), torch.tensor([0.1]), 2**32),
        "two-of-more": SparseGradient(torch.tensor([7, 2**32]), torch.tensor([0.1, -0.2]), 2**32 + 1),
        "bitmap": SparseGradient(torch.tensor([0, 2, 3, 5, 6, 8, 10, 11]), torch.arange(8) / 3, 13),
        "seeded-cut": piece,
    }
    return found | edges


def content(gradient: SparseGradient, frame: bytes) -> dict[str, object]:
    """What the file beside a frame says of it."""
    return {
        "index_coding": IndexCoding(frame[5]).name,
        "value_coding": ValueCoding(frame[6]).name,
        "numel": gradient.numel,
        "indices": gradient.indices.tolist(),
        "values": [f"{word & 0xFFFFFFFF:08x}" for word in gradient.values.view(torch.int32).tolist()],
    }


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for name, gradient in gradients().items():
        frame = encode(gradient)
        FOLDER.joinpath(f"{name}.frame").write_bytes(frame)
        FOLDER.joinpath(f"{name}.json").write_text(json.dumps(content(gradient, frame)) + "\n", encoding="utf-8")
