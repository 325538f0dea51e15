"""Nothing in a file is executed, nothing hangs, nothing is half loaded; every refusal names the file and the reason."""

from __future__ import annotations

import contextlib
import pickle
import re
import warnings
from pathlib import Path

import pytest
import torch
from checkpoint_cases import SHAPES, Standin, snapshot
from malformed_archives import CASES
from malformed_files import good_bytes, pickle_in_legacy, pickle_in_zip

from beit3_fast.checkpoint import (
    check_checkpoint,
    load_checkpoint,
    read_checkpoint,
    torch_file,
)
from beit3_fast.checkpoint.pickle_scan import Scan
from beit3_fast.errors import CheckpointError

pytestmark = pytest.mark.timeout(60)


@pytest.fixture(scope="module")
def model() -> Standin:
    return Standin(SHAPES)


def refuse(model: Standin, path: Path, message: str) -> None:
    before = snapshot(model)
    with pytest.raises(CheckpointError) as caught:
        load_checkpoint(model, path)
    text = str(caught.value)
    assert str(path) in text
    assert re.search(message, text), text
    assert snapshot(model) == before


def test_there_are_enough_of_them() -> None:
    assert len(CASES) >= 60


@pytest.mark.parametrize("form", ["zip", "legacy", "safetensors"])
def test_the_file_they_are_made_from_is_sound(form: str, model: Standin, tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(good_bytes(form))
    check_checkpoint(model, path)


@pytest.mark.parametrize("name", CASES)
def test_a_malformed_file_is_refused(name: str, model: Standin, tmp_path: Path) -> None:
    write, message = CASES[name]
    path = tmp_path / "beit3_base.pth"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write(path)
    refuse(model, path, message)


def test_a_file_that_may_not_be_read(
    model: Standin, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pth"
    path.write_bytes(good_bytes("zip"))

    def deny(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", deny)
    refuse(model, path, "cannot be read: Permission denied")


def test_a_web_address_is_no_file(model: Standin) -> None:
    with pytest.raises(CheckpointError, match="download it first"):
        load_checkpoint(model, "https://example.org/beit3.pth")


@pytest.mark.parametrize("content", [[1], {"a": 1}, {}, {"a": torch.ones(1).to_sparse()}])
def test_what_is_handed_over_is_checked_too(content: object, model: Standin) -> None:
    before = snapshot(model)
    with pytest.raises((CheckpointError, TypeError)):
        load_checkpoint(model, content)  # type: ignore[arg-type]
    assert snapshot(model) == before


# Each calls something with one text; "{canary}" in it is a file that must never appear.
GADGETS = {
    "os.system": ("os", "system", "touch {canary}"),
    "posix.system": ("posix", "system", "touch {canary}"),
    "os.popen": ("os", "popen", "touch {canary}"),
    "subprocess.getoutput": ("subprocess", "getoutput", "touch {canary}"),
    "subprocess.Popen": ("subprocess", "Popen", "touch {canary}"),
    "eval": ("builtins", "eval", "__import__('pathlib').Path('{canary}').touch()"),
    "exec": ("builtins", "exec", "__import__('pathlib').Path('{canary}').touch()"),
    "python 2 eval": ("__builtin__", "eval", "__import__('pathlib').Path('{canary}').touch()"),
    "compile": ("builtins", "compile", "__import__('pathlib').Path('{canary}').touch()"),
    "open": ("io", "open", "{canary}"),
    "getattr": ("builtins", "getattr", "system"),
    "__import__": ("builtins", "__import__", "os"),
    "import_module": ("importlib", "import_module", "antigravity"),
    "runpy": ("runpy", "run_path", "{canary}.py"),
    "pickle.loads": ("pickle", "loads", "x"),
    "timeit": ("timeit", "timeit", "__import__('pathlib').Path('{canary}').touch()"),
    "pdb": ("pdb", "run", "__import__('pathlib').Path('{canary}').touch()"),
    "cProfile": ("cProfile", "run", "__import__('pathlib').Path('{canary}').touch()"),
    "attrgetter": ("operator", "attrgetter", "system"),
    "partial": ("functools", "partial", "x"),
    "CDLL": ("ctypes", "CDLL", "libc.so.6"),
    "code": ("code", "InteractiveInterpreter", "x"),
    "webbrowser": ("webbrowser", "open", "file://{canary}"),
    "torch.load": ("torch", "load", "{canary}"),
    "torch.serialization.load": ("torch.serialization", "load", "{canary}"),
    "torch.hub": ("torch.hub", "load_state_dict_from_url", "http://localhost/{canary}"),
    "torch.jit.load": ("torch.jit", "load", "{canary}"),
    "torch load_library": ("torch.ops", "load_library", "{canary}"),
    "torch classes": ("torch.classes", "load_library", "{canary}"),
    "lazy part of torch": ("torch", "_inductor", "x"),
    "cpp extension": ("torch.utils.cpp_extension", "load_inline", "x"),
    "numpy.load": ("numpy", "load", "{canary}"),
    "numpy reconstruct": ("numpy.core.multiarray", "_reconstruct", "x"),
    "codecs": ("_codecs", "encode", "x"),
    "bytearray": ("builtins", "bytearray", "x"),
    "set": ("builtins", "set", "x"),
    "tensor class": ("torch", "FloatTensor", "x"),
    "sparse builder": ("torch._utils", "_rebuild_sparse_tensor", "x"),
    "from numpy": ("torch._utils", "_rebuild_device_tensor_from_numpy", "x"),
    "type builder": ("torch._tensor", "_rebuild_from_type_v2", "x"),
}
STYLES = ("reduce", "stack global", "inst", "newobj", "build", "persistent")


def text(value: str) -> bytes:
    raw = value.encode()
    return b"X" + len(raw).to_bytes(4, "little") + raw


def program(module: str, name: str, argument: str, style: str) -> bytes:
    mention = f"c{module}\n{name}\n".encode()
    call = {
        "reduce": mention + b"(" + text(argument) + b"tR",
        "stack global": text(module) + text(name) + b"\x93(" + text(argument) + b"tR",
        "inst": b"(" + text(argument) + f"i{module}\n{name}\n".encode(),
        "newobj": mention + b"(" + text(argument) + b"t\x81",
        "build": mention + b")R" + text(argument) + b"b",
        "persistent": b"(" + text("module") + mention + text(argument) + text("x") + b"tQ",
    }[style]
    return b"\x80\x04" + b"}(" + text("model") + call + b"u."


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
@pytest.mark.parametrize("gadget", GADGETS)
def test_no_gadget_runs(gadget: str, form: str, model: Standin, tmp_path: Path) -> None:
    module, name, argument = GADGETS[gadget]
    canary = tmp_path / "canary"
    for style in STYLES:
        code = program(module, name, argument.format(canary=canary), style)
        path = tmp_path / "x.pth"
        if form == "plain":
            path.write_bytes(code)
        else:
            {"zip": pickle_in_zip, "legacy": pickle_in_legacy}[form](code)(path)
        refuse(
            model,
            path,
            "asks for|instruction|did not write|holds a|no known|no weights|outside|inner state",
        )
        assert set(tmp_path.iterdir()) == {path}


def test_a_careless_reader_does_run_them(tmp_path: Path) -> None:
    """The gadgets are live: plain pickle creates the canary."""
    for gadget in ("os.system", "eval", "exec", "subprocess.getoutput"):
        canary = tmp_path / gadget
        module, name, argument = GADGETS[gadget]
        with contextlib.suppress(Exception):
            pickle.loads(program(module, name, argument.format(canary=canary), "reduce"))
        assert canary.exists()


@pytest.mark.parametrize("gadget", GADGETS)
def test_the_second_barrier_holds_alone(
    gadget: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With our own pass over the pickle out of the way, PyTorch's restricted reader runs nothing either."""
    monkeypatch.setattr(torch_file, "scan_pickle", lambda stream: Scan())
    module, name, argument = GADGETS[gadget]
    path = tmp_path / "x.pth"
    code = program(module, name, argument.format(canary=tmp_path / "canary"), "reduce")
    pickle_in_zip(code)(path)
    with contextlib.suppress(CheckpointError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        read_checkpoint(path)
    assert set(tmp_path.iterdir()) == {path}


def test_names_the_user_allowed_in_the_process_stay_refused_here(tmp_path: Path) -> None:
    """Another library's allow-list is no licence for checkpoints: exactly one more type is taken."""
    path = tmp_path / "x.pth"
    pickle_in_zip(program("builtins", "print", "x", "reduce"))(path)
    with (
        torch.serialization.safe_globals([print]),
        pytest.raises(CheckpointError, match=r"builtins\.print"),
    ):
        read_checkpoint(path)
