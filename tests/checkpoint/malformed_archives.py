"""More malformed files: archives, pickles and safetensors that lie. ``CASES`` has all of them."""

from __future__ import annotations

import json
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from checkpoint_cases import torch_file
from malformed_files import (
    CASES,
    FIRST,
    Write,
    add,
    case,
    content,
    described,
    entry,
    good,
    good_bytes,
    header,
    pickle_in_legacy,
    pickle_in_zip,
    repack,
    tensors,
)

__all__ = ["CASES"]


# archives that lie
add("member above", "leaves the folder", repack(lambda r: r.update({"../evil": b"x"})))
add(
    "member inside above",
    "leaves the folder",
    repack(lambda r: r.update({"archive/../../evil": b"x"})),
)
add("absolute member", "leaves the folder", repack(lambda r: r.update({"/etc/evil": b"x"})))
add("two folders", "leaves the folder", repack(lambda r: r.update({"other/data/0": b"x"})))
add("two pickles", "torch.save did not write", repack(lambda r: r.update({"b/data.pkl": b"N."})))
add("no pickle", "torch.save did not write", repack(lambda r: r.pop("archive/data.pkl")))
add("data missing", "storage 3 is missing", repack(lambda r: r.pop("archive/data/3")))
add(
    "data short",
    "should have .* bytes and has",
    repack(lambda r: r.update({"archive/data/3": b"xx"})),
)
add(
    "data long",
    "should have .* bytes and has",
    repack(lambda r: r.update({"archive/data/3": bytes(9999)})),
)
add(
    "compressed",
    "compressed or encrypted",
    repack(lambda r: None, compression=zipfile.ZIP_DEFLATED),
)
add(
    "zip bomb",
    "larger than the file",
    repack(
        lambda r: r.update({"archive/data/0": bytes(100 << 20)}), compression=zipfile.ZIP_DEFLATED
    ),
)
add("empty pickle", "damaged or cut off", pickle_in_zip(b""))
add("pickle without end", "damaged or cut off", pickle_in_zip(b"\x80\x02}q\x00"))
add("bad byte order", "cannot read it", repack(lambda r: r.update({"archive/byteorder": b"mixed"})))


@case("same member twice", "same name")
def _(path: Path) -> None:
    import warnings

    path.write_bytes(good_bytes("zip"))
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("archive/data/0", b"x")


@case("huge directory", "directory claims")
def _(path: Path) -> None:
    raw = bytearray(good_bytes("zip"))
    struct.pack_into("<I", raw, raw.rindex(b"PK\x05\x06") + 12, 0x7FFFFFFF)
    path.write_bytes(raw)


@case("encrypted member", "compressed or encrypted|damaged")
def _(path: Path) -> None:
    raw = bytearray(good_bytes("zip"))
    raw[raw.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(raw)


@case("member marked as a folder", "data/2 is marked as a folder")
def _(path: Path) -> None:
    # PyTorch's reader leaves the memory of such a record as it was.
    raw = bytearray(good_bytes("zip"))
    name = raw.rindex(b"archive/data/2PK")
    raw[name - 8] |= 0x10
    path.write_bytes(raw)


@case("100k tiny tensors", "at most 50000 are read")
def _(path: Path) -> None:
    tiny = torch.ones(1)
    torch_file(path, {"model": {f"t{i}": tiny for i in range(100_000)}})


@case("100k tiny tensors, safetensors", "more than 50000 tensors")
def _(path: Path) -> None:
    entries = ",".join(
        f'"t{i}":{{"dtype":"U8","shape":[1],"data_offsets":[{i},{i + 1}]}}' for i in range(100_000)
    )
    text = f"{{{entries}}}".encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(100_000))


# pickles that describe what cannot be
def tensor_program(
    size: bytes,
    stride: bytes,
    numel: int = 4,
    offset: int = 0,
    kind: bytes = b"FloatStorage",
    key: bytes = b"0",
) -> bytes:
    """{"model": {"t": a tensor}} as torch.save would write it."""
    storage = (
        b"(X\x07\0\0\0storagectorch\n"
        + kind
        + b"\nX"
        + struct.pack("<I", len(key))
        + key
        + b"X\x03\0\0\0cpu\x8a\x08"
        + struct.pack("<q", numel)
        + b"tQ"
    )
    return (
        b"\x80\x02}X\x05\0\0\0model}X\x01\0\0\0tctorch._utils\n_rebuild_tensor_v2\n("
        + storage
        + b"\x8a\x08"
        + struct.pack("<q", offset)
        + size
        + stride
        + b"\x89ccollections\nOrderedDict\n)RtRss."
    )


def sizes(*values: int) -> bytes:
    return b"(" + b"".join(b"\x8a\x08" + struct.pack("<q", value) for value in values) + b"t"


def one_storage(program: bytes) -> Write:
    return repack(lambda r: r.update({"archive/data.pkl": program, "archive/data/0": bytes(16)}))


add(
    "expanded tensor",
    "reaches beyond",
    one_storage(tensor_program(sizes(10**6, 10**6), sizes(0, 0))),
)
add(
    "tensor beyond its data",
    "reaches beyond",
    one_storage(tensor_program(sizes(2, 4), sizes(4, 1))),
)
add(
    "offset beyond the data",
    "reaches beyond",
    one_storage(tensor_program(sizes(4), sizes(1), offset=1)),
)
add("stride beyond the data", "reaches beyond", one_storage(tensor_program(sizes(2), sizes(4))))
add("negative size", "makes no sense", one_storage(tensor_program(sizes(-1), sizes(1))))
add("negative offset", "makes no sense", one_storage(tensor_program(sizes(1), sizes(1), offset=-4)))
add("huge storage", "should have", one_storage(tensor_program(sizes(1), sizes(1), numel=2**60)))
add("negative storage", "makes no sense", one_storage(tensor_program(sizes(1), sizes(1), numel=-1)))
add("overflowing size", "reaches beyond", one_storage(tensor_program(sizes(2**62, 8), sizes(8, 1))))
add(
    "storage key that climbs",
    "is missing",
    one_storage(tensor_program(sizes(1), sizes(1), key=b"../data.pkl")),
)
add(
    "unknown storage",
    "asks for torch.EvilStorage",
    one_storage(tensor_program(sizes(1), sizes(1), kind=b"EvilStorage")),
)
add(
    "huge storage, old form",
    "cut off|damaged|fit",
    pickle_in_legacy(tensor_program(sizes(1), sizes(1), numel=2**60)),
)
add("key twice", "comes twice", pickle_in_zip(b"\x80\x02}(X\x01\0\0\0aK\x01X\x01\0\0\0aK\x02u."))
add("odd dictionary", "damaged", pickle_in_zip(b"\x80\x02}(X\x01\0\0\0au."))
add("stack underflow", "damaged", pickle_in_zip(b"\x80\x02\x86."))
add("memo of nothing", "damaged", pickle_in_zip(b"\x80\x02h\x07."))
add("text that is no utf-8", "damaged", pickle_in_zip(b"\x80\x02X\x02\0\0\0\xff\xfe."))
add("endless text", "damaged", pickle_in_zip(b"\x80\x02X\xff\xff\xff\xffabc."))
# forty levels of (t, t): hashing it takes 2**40 steps
BOMB = b"\x80\x02}K\x01" + b"q\x00h\x00\x86" * 40 + b"K\x01s."
add("tuple bomb as a key", "neither text nor number", pickle_in_zip(BOMB))
add("tuple bomb as a key, old form", "neither text nor number", pickle_in_legacy(BOMB))
add(
    "tuple bomb in a set",
    "neither text nor number",
    pickle_in_zip(b"\x80\x02c__builtin__\nset\n]K\x01" + b"q\x00h\x00\x86" * 24 + b"a\x85R."),
)
add(
    "number of 81 bits as a key",
    "neither text nor number",
    pickle_in_zip(b"\x80\x02}\x8a\x0b" + bytes(10) + b"\x01K\x01s."),
)
add(
    "small number that makes a large array",
    "calls builtins.bytearray in a way",
    pickle_in_zip(
        b"\x80\x02c__builtin__\nbytearray\n\x8a\x08" + struct.pack("<q", 2**40) + b"\x85R."
    ),
)
add(
    "other codec",
    "bytes in the codec 'rot13'",
    pickle_in_zip(b"\x80\x02c_codecs\nencode\nX\x01\0\0\0aX\x05\0\0\0rot13\x86R."),
)
# one list of a thousand items, made into a thousand sets, and again: in memory a thousand times the file
COPIES = b"c__builtin__\nset\nq\x00](" + b"K\x01" * 1000 + b"e\x85q\x01R" + b"h\x00h\x01R" * 3000
add("copies of copies", "bytes of plain values", pickle_in_zip(b"\x80\x02" + COPIES + b"."))
add("no mark", "damaged", pickle_in_zip(b"\x80\x02t."))
add(
    "two million instructions", "instructions", pickle_in_zip(b"\x80\x02" + b"N" * 2_100_000 + b".")
)

# safetensors that lie
add(
    "header of text",
    "no valid JSON",
    lambda p: p.write_bytes(b"\x08" + bytes(7) + b"{weights" + bytes(64)),
)
add(
    "header of a list",
    "neither|no JSON object",
    lambda p: p.write_bytes(b"\x02" + bytes(7) + b"[]"),
)
add(
    "header length of 2**62",
    "claims",
    lambda p: p.write_bytes((2**62).to_bytes(8, "little") + b"{}" + bytes(64)),
)
add("header without end", "claims", lambda p: p.write_bytes((99).to_bytes(8, "little") + b"{}"))
add("deep header", "no valid JSON", header(lambda t: b'{"a":' + b"[" * 100_000))
add("header of no utf-8", "no valid JSON", header(lambda t: b'{"\xff\xfe": 1}'))
add("no tensors", "no tensors", lambda p: p.write_bytes(b"\x02" + bytes(7) + b"{}"))
add("numbers as metadata", "table of texts", header(lambda t: t.update({"__metadata__": {"a": 1}})))
add("unknown dtype", "dtype 'F3'", entry(FIRST, dtype="F3"))
add("dtype that is a list", "not supported", entry(FIRST, dtype=["F32"]))
add("wrong dtype width", "does not fit its", entry(FIRST, dtype="F64"))
add("shape and bytes differ", "does not fit its", entry(FIRST, shape=[1, 1]))
add("negative shape", "make no sense", entry(FIRST, shape=[-20, -8]))
add("shape of text", "make no sense", entry(FIRST, shape="20x8"))
add("fractional shape", "make no sense", entry(FIRST, shape=[20.0, 8]))
add("thousand dimensions", "make no sense", entry(FIRST, shape=[1] * 1000))
add("gap", "leaves a gap", entry(FIRST, data_offsets=[8, 8 + 20 * 8 * 4]))
add(
    "overlap",
    "overlaps",
    header(
        lambda t: t.update({"beit3.extra": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}})
    ),
)
add("offsets backwards", "does not fit its", entry(FIRST, data_offsets=[640, 0]))
add("offsets beyond", "gap|cut off|overlap", entry(FIRST, data_offsets=[10**12, 10**12 + 640]))
add("entry without shape", "incomplete", header(lambda t: t[FIRST].pop("shape")))
add("entry that is a number", "incomplete", header(lambda t: t.update({FIRST: 3})))
add(
    "same key twice",
    "comes twice",
    header(lambda t: (json.dumps(t)[:-1] + f', "{FIRST}": {json.dumps(t[FIRST])}}}').encode()),
)
add("bad configuration", "no valid JSON", described(config="{"))
add("configuration of a list", "no table", described(config="[]"))
for name, text in (
    ("unknown", '"nonsense"'),
    ("of a number", "5"),
    ("without a spread", '{"std": [0, 0, 0]}'),
    ("of a list", "[1, 2]"),
):
    add(f"preset {name}", "image preset in the metadata is none", described(preprocessing=text))
add(
    "metadata of numbers in a zip",
    "must be texts under names",
    content(lambda: {"model": good(), "beit3_fast": {"model": 5}}),
)
add(
    "metadata of a list in a zip",
    "must be a dictionary of texts",
    content(lambda: {"model": good(), "beit3_fast": ["model"]}),
)
add(
    "bytes behind a zip",
    "has been cut off or added to",
    lambda p: p.write_bytes(good_bytes("zip") + b"more"),
)
add(
    "bytes behind the pickle of a zip",
    "it has been added to",
    repack(lambda r: r.update({"archive/data.pkl": r["archive/data.pkl"] + b"more"})),
)


def _aliases() -> dict[str, Any]:
    block = torch.ones(100, 100)
    return {"model": {f"t{i}": block for i in range(100)}}


add("one block under many names", "tensors unfold to", content(_aliases))
add(
    "negative view",
    "lazy view.*resolve_neg",
    tensors(lambda s: s.update({FIRST: torch.ones(20, 8, dtype=torch.complex64).conj().imag})),
)


def _within_itself() -> dict[str, Any]:
    inner: dict[str, Any] = {}
    for _ in range(20):
        inner = {"model": inner or good()}
    return inner


add("dictionaries in dictionaries", "in more than 8 dictionaries", content(_within_itself))
