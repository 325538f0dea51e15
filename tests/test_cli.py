"""The command line: exit codes, one-line errors, what is printed."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cli_calls import refused, usage

import beit3_fast
from beit3_fast import cli
from beit3_fast.checkpoint import read_checkpoint, save_checkpoint
from beit3_fast.errors import CheckpointError
from beit3_fast.ops import library

ROOT = Path(__file__).resolve().parent.parent
NAME = "beit3_tiny_patch16_32_retrieval"


@pytest.fixture
def official(tmp_path: Path) -> Path:
    path = tmp_path / "beit3_tiny.pth"
    torch.save({"model": beit3_fast.create_model(NAME).state_dict(), "epoch": 7}, path)
    return path


@pytest.mark.parametrize(
    "arguments", [(), ("nope",), ("convert",), ("convert", "a"), ("info", "--x")]
)
def test_wrong_usage_is_2(arguments: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = usage(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("beit3-fast")
    assert err.endswith(" --help\n")
    assert err.count("\n") == 1


def test_help_lists_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = usage(capsys, "--help")
    assert code == 0
    for name, command in cli.COMMANDS.items():
        assert name in out
        assert command.summary.split()[0] in out
    code, out, _ = usage(capsys, "--version")
    assert (code, out.strip()) == (0, beit3_fast.__version__)


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_a_command_has_an_example_that_parses(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out, _ = usage(capsys, name, "--help")
    assert code == 0
    assert "--json" in out
    example = out.split("example:\n  ")[1].strip()
    program, *arguments = shlex.split(example)
    assert program == "beit3-fast"
    assert cli._parser().parse_args(arguments).command == name


def test_info_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info"]) == 0
    out = capsys.readouterr().out
    for words in (
        f"torch: {torch.__version__}",
        "cpu_features:",
        "compiled_ops: the compiled ops",
        f"cpu_level: {library.cpu_isa()}",
        "gpu:",
    ):
        assert words in out


def test_info_for_programs(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["packages"]["torch"] == torch.__version__
    assert report["packages"]["beit3-fast"] == beit3_fast.__version__
    assert isinstance(report["cpu_features"], list)
    assert set(report["auto"].values()) <= {"cpu", "composite", "reference", "triton", "cuda"}


def test_info_survives_a_broken_installation(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from beit3_fast.ops import dispatch, library

    def broken(*_: object) -> None:
        raise RuntimeError("planted")

    for owner, name in (
        (library, "load"),
        (library, "cpu_features"),
        (dispatch, "choose"),
        (torch.cuda, "is_available"),
    ):
        monkeypatch.setattr(owner, name, broken)
    assert cli.main(["info"]) == 0
    assert capsys.readouterr().out.count("unknown (RuntimeError: planted)") == 6


def test_convert_both_ways(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    middle, back = official.with_suffix(".safetensors"), official.with_name("back.pth")
    options = ["--name", NAME, "--preset", "imagenet"]
    assert cli.main(["convert", str(official), str(middle), *options]) == 0
    out = capsys.readouterr().out
    assert cli.main(["convert", str(official), str(middle), *options, "--force", "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert (report["target"], report["tensors"]) == (str(middle), 94)
    assert report["left_out"] == ["epoch"]
    assert f"{middle}: 94 tensors, 1.0 MiB, read back and equal" in out
    assert "left out, since they are no weights: epoch" in out
    found = read_checkpoint(middle)
    assert found.name == NAME
    assert found.config is not None
    assert found.config["img_size"] == 32
    assert found.preset["mean"] == [0.485, 0.456, 0.406]
    assert cli.main(["convert", str(middle), str(back)]) == 0
    first, last = (torch.load(path, weights_only=True)["model"] for path in (official, back))
    assert list(first) == list(last)
    assert all(torch.equal(first[name], last[name]) for name in first)
    assert read_checkpoint(back).preset == found.preset


def test_convert_can_take_another_entry(tmp_path: Path) -> None:
    path = tmp_path / "x.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "model_ema": {"a": torch.ones(1)}}, path)
    target = tmp_path / "x.safetensors"
    assert cli.main(["convert", str(path), str(target), "--key", "model_ema"]) == 0
    assert read_checkpoint(target).state["a"].item() == 1


def test_convert_refuses_in_one_line(official: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = str(official.with_suffix(".safetensors"))
    source = str(official)
    near = refused(capsys, "convert", source, target, "--name", "beit3_tiny_patch16_retrieval")
    assert f"did you mean {NAME}" in near
    assert "beit3-fast info lists them" in refused(
        capsys, "convert", source, target, "--name", "xyz"
    )
    assert "preset must be one of" in refused(capsys, "convert", source, target, "--preset", "x")
    missing = refused(capsys, "convert", source + "x", target)
    assert "No such file or directory; check the path" in missing
    assert "must end in one of" in refused(capsys, "convert", source, source + ".onnx")
    assert "no entry 'ema'" in refused(capsys, "convert", source, target, "--key", "ema")
    other = refused(capsys, "convert", source, target, "--name", "beit3_tiny_patch16_32_nlvr2")
    assert "missing: head.norm1.{weight,bias}" in other
    assert "allow_missing" not in other
    assert other.endswith("name the model that the file is of, or give the file of this one\n")
    wide = refused(capsys, "convert", source, target, "--name", "beit3_base_patch16_224_retrieval")
    assert "model of another size" in wide
    assert len(wide) < 4000
    assert not os.path.exists(target)
    Path(target).write_text("mine")
    assert "exists already" in refused(capsys, "convert", source, target)
    assert Path(target).read_text() == "mine"
    assert cli.main(["convert", source, target, "--force"]) == 0


def test_an_interrupt_and_a_closed_pipe_end_quietly(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(error: type[BaseException]) -> cli.Command:
        def run(_: object) -> int:
            raise error

        return cli.Command("x", "x", lambda parser: None, run)

    monkeypatch.setitem(cli.COMMANDS, "stop", raising(KeyboardInterrupt))
    assert cli.main(["stop"]) == 130
    assert capsys.readouterr().err == "beit3-fast stop: interrupted\n"
    monkeypatch.setitem(cli.COMMANDS, "fail", raising(CheckpointError))
    assert cli.main(["fail"]) == 1


def test_memory_that_is_not_there(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    ):

        def greedy(_: object, error: Exception = error) -> int:
            raise error

        monkeypatch.setitem(cli.COMMANDS, "huge", cli.Command("x", "x", lambda p: None, greedy))
        assert "not enough memory for this; lower --batch-size" in refused(capsys, "huge")


def test_errors_that_are_not_ours_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    for error in (ZeroDivisionError, RuntimeError):

        def bug(_: object, error: type[Exception] = error) -> int:
            raise error

        monkeypatch.setitem(cli.COMMANDS, "bug", cli.Command("x", "x", lambda parser: None, bug))
        with pytest.raises(error):
            cli.main(["bug"])


def test_python_dash_m_and_a_reader_that_stops_early(tmp_path: Path) -> None:
    path = save_checkpoint({"a": torch.ones(1)}, tmp_path / "a.pth")
    code = f"{sys.executable} -m beit3_fast convert {path} {tmp_path}/b.safetensors | true"
    done = subprocess.run(
        ["bash", "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=100, check=False
    )
    assert done.stderr == ""
    assert read_checkpoint(tmp_path / "b.safetensors").state["a"].item() == 1
