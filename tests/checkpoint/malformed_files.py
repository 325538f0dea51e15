"""Files that must be refused: each case writes one, and says what the error has to mention. More in malformed_archives."""

from __future__ import annotations

import functools
import io
import json
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from checkpoint_cases import SHAPES, torch_file, weights
from torch import Tensor

from beit3_fast.checkpoint import safetensors_file, save_checkpoint

FIRST = "beit3.text_embed.weight"
Write = Callable[[Path], Any]
CASES: dict[str, tuple[Write, str]] = {}


def good() -> dict[str, Tensor]:
    return weights(SHAPES)


def case(name: str, message: str) -> Callable[[Write], Write]:
    def register(write: Write) -> Write:
        assert name not in CASES
        CASES[name] = (write, message)
        return write

    return register


def add(name: str, message: str, write: Write) -> None:
    CASES[name] = (write, message)


@functools.cache
def good_bytes(form: str) -> bytes:
    """A file of the weights above: "zip", "legacy" or "safetensors"."""
    if form == "safetensors":
        import tempfile

        with tempfile.TemporaryDirectory() as folder:
            return save_checkpoint(good(), Path(folder) / "x.safetensors").read_bytes()
    buffer = io.BytesIO()
    torch.save({"model": good()}, buffer, _use_new_zipfile_serialization=form == "zip")
    return buffer.getvalue()


def repack(change: Callable[[dict[str, bytes]], Any], **options: Any) -> Write:
    """The good zip file with its records changed, and every checksum right again."""

    def write(path: Path) -> None:
        with zipfile.ZipFile(io.BytesIO(good_bytes("zip"))) as archive:
            records = {name: archive.read(name) for name in archive.namelist()}
        change(records)
        with zipfile.ZipFile(path, "w", **options) as archive:
            for name, data in records.items():
                archive.writestr(name, data)

    return write


def pickle_in_zip(program: bytes) -> Write:
    return repack(lambda records: records.update({"archive/data.pkl": program}))


def pickle_in_legacy(program: bytes) -> Write:
    head = b"".join(
        pickle.dumps(value, 2)
        for value in (
            0x1950A86A20F9469CFC6C,
            1001,
            {"protocol_version": 1001, "little_endian": True},
        )
    )
    return lambda path: path.write_bytes(head + program + pickle.dumps([], 2))


def tensors(change: Callable[[dict[str, Tensor]], Any]) -> Write:
    """The good weights, changed, in a sound file."""

    def write(path: Path) -> None:
        state = good()
        change(state)
        torch_file(path, {"model": state})

    return write


def content(make: Callable[[], Any], **options: Any) -> Write:
    return lambda path: torch_file(path, make(), **options)


def header(change: Callable[[dict[str, Any]], Any]) -> Write:
    """The good safetensors file without digests, its header changed."""

    def write(path: Path) -> None:
        raw = good_bytes("safetensors")
        length = int.from_bytes(raw[:8], "little")
        table = json.loads(raw[8 : 8 + length])
        del table["__metadata__"]
        changed = change(table)
        text = changed if isinstance(changed, bytes) else json.dumps(table).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + raw[8 + length :])

    return write


def described(**texts: str) -> Write:
    """The good weights with these texts, which our own writer would refuse, and sound digests."""

    def write(path: Path) -> None:
        with path.open("wb") as file:
            safetensors_file.write(file, good(), texts)

    return write


def entry(name: str, **fields: Any) -> Write:
    return header(lambda table: table[name].update(fields))


# files that are something else, or nothing
add("empty", "it is empty", lambda p: p.write_bytes(b""))
add("one byte", "neither a PyTorch file", lambda p: p.write_bytes(b"\x80"))
add("zeros", "neither a PyTorch file", lambda p: p.write_bytes(bytes(4096)))
add("noise", "neither a PyTorch file", lambda p: p.write_bytes(bytes(range(255, 0, -1)) * 99))
add("text", "text file", lambda p: p.write_text("weights, I promise\n" * 50))
add("web page", "web page", lambda p: p.write_text("\n<!DOCTYPE html><html>404</html>"))
add("xml error", "web page", lambda p: p.write_text('<?xml version="1.0"?><Error>gone</Error>'))
add(
    "git lfs",
    "git lfs pull",
    lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\n"),
)
add("gzip", "gzip", lambda p: p.write_bytes(b"\x1f\x8b\x08" + bytes(99)))
add("hdf5", "HDF5", lambda p: p.write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99)))
add("numpy", "NumPy", lambda p: p.write_bytes(b"\x93NUMPY\x01\x00" + bytes(99)))
add("seven-zip", "7z", lambda p: p.write_bytes(b"7z\xbc\xaf'\x1c" + bytes(99)))
add("empty zip", "empty zip", lambda p: zipfile.ZipFile(p, "w").close())
add("folder", "folder", lambda p: p.mkdir())
add(
    "plain pickle",
    "pickle that torch.save did not write",
    lambda p: p.write_bytes(pickle.dumps({"a": 1})),
)


@case("missing", "No such file")
def _(path: Path) -> None:
    pass


@case("dangling link", "No such file")
def _(path: Path) -> None:
    path.symlink_to(path.parent / "nowhere")


@case("link to itself", "cannot be read")
def _(path: Path) -> None:
    path.symlink_to(path)


@case("pipe", "no regular file")
def _(path: Path) -> None:
    import os

    os.mkfifo(path)


@case("tar", "neither a PyTorch file|text file")
def _(path: Path) -> None:
    with tarfile.open(path, "w") as archive:
        archive.addfile(tarfile.TarInfo("x"))


@case("zip of a checkpoint", "unpack it and load beit3.pth")
def _(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("beit3.pth", good_bytes("zip"))


@case("other zip", "torch.save did not write")
def _(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("word/document.xml", "<x/>")


@case("torchscript", "TorchScript")
def _(path: Path) -> None:
    class Module(torch.nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x

    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(Module(), torch.ones(1)), str(path))


@case("exported program", "torch.export")
def _(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in (
            ("archive_format", "pt2"),
            ("data/weights/w", "x"),
            ("models/model.json", "{}"),
        ):
            archive.writestr(f"x/{name}", data)


# cut off or damaged
for form in ("zip", "legacy", "safetensors"):
    for keep in (0.001, 0.3, 0.9, 0.9999):
        add(
            f"{form} cut to {keep}",
            "cut off|damaged|neither|directory is missing",
            lambda p, form=form, keep=keep: p.write_bytes(
                (raw := good_bytes(form))[: max(5, int(len(raw) * keep))]
            ),
        )
    add(
        f"{form} cut by a byte",
        "cut off|damaged|missing",
        lambda p, form=form: p.write_bytes(good_bytes(form)[:-1]),
    )
add("safetensors with more", "added to", lambda p: p.write_bytes(good_bytes("safetensors") + b"\0"))
add("legacy with more", "added to", lambda p: p.write_bytes(good_bytes("legacy") + b"\0"))


def flipped(form: str, find: bytes, offset: int = 0, bit: int = 1) -> Write:
    def write(path: Path) -> None:
        raw = bytearray(good_bytes(form))
        raw[raw.index(find) + offset] ^= bit
        path.write_bytes(bytes(raw))

    return write


some_data = good()[FIRST].numpy().tobytes()[:16]
add("zip bit in data", "checksum.*data/0 is wrong", flipped("zip", some_data, 3))
add("zip bit in pickle", "checksum.*data.pkl is wrong", flipped("zip", b"_rebuild_tensor_v2"))
add("zip bit in directory", "damaged|checksum|header|claim", flipped("zip", b"PK\x01\x02", 20))
add("zip bit in local header", "damaged", flipped("zip", b"PK\x03\x04", 26))
add("safetensors bit in data", "do not fit its sha256", flipped("safetensors", some_data, 3))
add("safetensors bit in header", "does not fit its digest", flipped("safetensors", b"text_embed"))
add("safetensors bit in digest", "digest|sha256", flipped("safetensors", b'"sha256":"', 12))
add("safetensors digest renamed", "digests is missing", flipped("safetensors", b'"sha256"', 2))
add("safetensors bit in length", "damaged|cut off", flipped("safetensors", b"{", -7, 64))
add("legacy bit in pickle", "damaged|asks for", flipped("legacy", b"_rebuild_tensor_v2"))
add("legacy bit in sizes", "cut off|damaged|fit", flipped("legacy", some_data, -8))

# not weights
add("list", "holds a list", content(lambda: [torch.ones(1)]))
add("tensor", "holds a Tensor", content(lambda: torch.ones(1)))
add("number", "holds a int", content(lambda: 3))
add("nothing", "holds a NoneType", content(lambda: None))
add("empty dictionary", "holds no tensors", content(dict))
add("empty model", "holds no tensors", content(lambda: {"model": {}}))
add(
    "optimizer only",
    "optimizer's state but no weights",
    content(lambda: {"optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}}, "epoch": 3}),
)
add(
    "optimizer state",
    "optimizer's state but no weights",
    content(lambda: torch.optim.AdamW([torch.nn.Parameter(torch.ones(1))]).state_dict()),
)
add(
    "nested junk",
    "no weights: its entries are config",
    content(lambda: {"config": {"a": {"b": 1}}}),
)
add("list of tensors", "holds no weights", content(lambda: {"model": [torch.ones(1)]}))
add("a value that is text", "is a str", content(lambda: {"model": {**good(), "name": "base"}}))
add("a value that is a table", "is a dict", content(lambda: {"model": {**good(), "beit3": {}}}))
add("a value that is None", "is a NoneType", content(lambda: {"model": {**good(), FIRST: None}}))
add("numbered tensors", "named by 0", content(lambda: {"model": {0: torch.ones(1)}}))

# tensors that are no weights
add("sparse", "sparse tensor", tensors(lambda s: s.update({FIRST: s[FIRST].to_sparse()})))
add("sparse rows", "sparse tensor", tensors(lambda s: s.update({FIRST: s[FIRST].to_sparse_csr()})))


@case("sparse with bad indices", "sparse tensor")
def _(path: Path) -> None:
    bad = torch.sparse_coo_tensor(
        torch.tensor([[10**9]]), torch.ones(1), (2,), check_invariants=False
    )
    torch_file(path, {"model": {**good(), "beit3.evil": bad}})


add(
    "quantised",
    "quantised tensor",
    tensors(lambda s: s.update({FIRST: torch.quantize_per_tensor(s[FIRST], 0.1, 0, torch.qint8)})),
)
add("complex", "complex", tensors(lambda s: s.update({FIRST: s[FIRST].to(torch.complex64)})))
add("meta", "without data", tensors(lambda s: s.update({FIRST: s[FIRST].to("meta")})))
add(
    "integers",
    "has dtype torch.int8",
    tensors(lambda s: s.update({FIRST: s[FIRST].to(torch.int8)})),
)
add(
    "eight bits",
    "dtype torch.float8",
    tensors(lambda s: s.update({FIRST: s[FIRST].to(torch.float8_e5m2)})),
)
add("booleans", "has dtype torch.bool", tensors(lambda s: s.update({FIRST: s[FIRST] > 0})))
add("NaN", f"{FIRST}: holds NaN", tensors(lambda s: s[FIRST].view(-1)[5].fill_(float("nan"))))
add(
    "infinity",
    f"{FIRST}: holds infinity",
    tensors(lambda s: s[FIRST].view(-1)[5].fill_(float("inf"))),
)
add(
    "tensor attributes",
    "subclass|asks for",
    content(lambda: {"model": {**good(), "x": _with_attribute()}}),
)


def _with_attribute() -> Tensor:
    tensor = torch.ones(2)
    tensor.note = "hidden"  # type: ignore[attr-defined]
    return tensor


# weights that do not fit
add(
    "wrong shape",
    "wrong shape: .*logit_scale",
    tensors(lambda s: s.update(logit_scale=torch.ones(3))),
)
add("transposed", "wrong shape", tensors(lambda s: s.update({FIRST: s[FIRST].t().contiguous()})))
add("scalar for a matrix", "wrong shape", tensors(lambda s: s.update({FIRST: torch.tensor(1.0)})))
add("missing key", f"missing: {FIRST}", tensors(lambda s: s.pop(FIRST)))
add(
    "extra key",
    "unexpected: beit3.extra",
    tensors(lambda s: s.update({"beit3.extra": torch.ones(1)})),
)
add(
    "other layers",
    r"missing: beit3.encoder.layers.1",
    content(
        lambda: (
            {"model": weights({n.replace("layers.1", "layers.5"): x for n, x in SHAPES.items()})}
            | {"x": 1}
        )
    ),
)
add(
    "misspelt prefix",
    "unexpected: beitbeit3.text_embed",
    tensors(lambda s: [s.update({f"beit{n}": s.pop(n)}) for n in list(s)]),
)
add(
    "swapped tables",
    "look swapped",
    tensors(
        lambda s: s.update(
            {
                "beit3.encoder.embed_positions.A.weight": s[
                    "beit3.encoder.embed_positions.B.weight"
                ],
                "beit3.encoder.embed_positions.B.weight": s[
                    "beit3.encoder.embed_positions.A.weight"
                ],
            }
        )
    ),
)
add(
    "no square grid",
    "no square",
    tensors(lambda s: s.update({"beit3.encoder.embed_positions.A.weight": torch.ones(3 + 15, 8)})),
)
add(
    "prefix on some names only",
    "unexpected: module.beit3",
    tensors(lambda s: s.update({f"module.{FIRST}": s.pop(FIRST)})),
)
