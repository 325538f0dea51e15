"""explain: what runs and why nothing else does, in words, and as it really is."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import beit3_fast
from beit3_fast.errors import ConfigError, KernelUnavailable
from beit3_fast.explanation import explain
from beit3_fast.ops import dispatch, library

TINY = "beit3_tiny_patch16_32"
LINES = [
    f"{op} ({mode})"
    for mode in ("inference", "training")
    for op in ("expert_linear", "shared_attention")
]


def test_every_op_in_both_modes() -> None:
    explanations = explain(beit3_fast.create_model(TINY), quiet=True)
    assert [item.op for item in explanations] == LINES
    for item in explanations:
        reasons = dict(item.rejected)
        assert set(reasons) == set(dispatch.IMPLEMENTATIONS) - {item.impl}
        assert all(len(reason) > 10 for reason in reasons.values())
    wide = library.available() and library.cpu_isa().startswith(("avx512", "amx"))
    attention = "cpu" if wide else "composite"
    if library.available() and library.cpu_isa() == "amx_bf16":
        assert [item.impl for item in explanations[2:]] == ["cpu", "cpu"]
        return
    assert [item.impl for item in explanations[2:]] == ["composite", attention]
    assert "backward" in dict(explanations[2].rejected)["cpu"]


def test_it_says_what_really_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        model = beit3_fast.create_model(TINY, dtype=dtype)
        said = {item.op: item.impl for item in explain(model, quiet=True)}
        ran: dict[str, str] = {}
        real = dispatch.choose

        def choose(
            at: Any, requested: str = "auto", ran: dict[str, str] = ran, real: Any = real
        ) -> Any:
            choice = real(at, requested)
            ran[f"{at.op} ({'training' if at.needs_grad else 'inference'})"] = choice.impl
            return choice

        with monkeypatch.context() as patch:
            patch.setattr(dispatch, "choose", choose)
            image = torch.randn(1, 3, 32, 32, dtype=getattr(torch, dtype))
            with torch.no_grad():
                model(visual_tokens=image)
            model(visual_tokens=image)
        assert ran == said


def test_it_prints_unless_it_is_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    model = beit3_fast.create_model(TINY)
    explain(model, quiet=True)
    assert capsys.readouterr().out == ""
    explanations = beit3_fast.explain(model)
    printed = capsys.readouterr().out
    for item in explanations:
        assert f"{item.op}: {item.impl}\n" in printed
        for name, reason in item.rejected:
            assert f"    not {name}: {reason}" in printed


@pytest.mark.parametrize("impl", ["reference", "composite"])
def test_a_named_implementation_says_why_not_the_others(impl: str) -> None:
    model = beit3_fast.create_model(f"{TINY}_vqav2", impl=impl)
    explanations = explain(model, quiet=True)
    assert [(item.op, item.impl) for item in explanations] == [(op, impl) for op in LINES]
    for item in explanations:
        assert {impl, *dict(item.rejected)} == set(dispatch.IMPLEMENTATIONS)
        other = "composite" if impl == "reference" else "reference"
        assert f"impl='{impl}'" in dict(item.rejected)[other]


def test_a_module_that_runs_nothing_of_ours() -> None:
    with pytest.raises(ConfigError, match="Linear is neither a beit3_fast model nor accelerated"):
        explain(torch.nn.Linear(2, 2))


def test_a_named_implementation_that_cannot_run() -> None:
    with pytest.raises(KernelUnavailable, match="cuda"):
        explain(beit3_fast.create_model(TINY, impl="cuda"), quiet=True)
    with pytest.raises(KernelUnavailable, match="float16"):
        explain(beit3_fast.create_model(TINY, impl="cpu", dtype="float16"), quiet=True)


def test_a_missing_library_explains_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    missing = library.LibraryStatus(False, "is not built: no compiler was found")
    monkeypatch.setattr(library, "load", lambda: missing)
    dispatch.reset()
    try:
        model = beit3_fast.create_model(TINY)
        for item in explain(model, quiet=True):
            assert item.impl == "composite"
            if "inference" in item.op:
                assert "no compiler was found" in dict(item.rejected)["cpu"]
        with pytest.raises(KernelUnavailable, match="no compiler was found"):
            explain(beit3_fast.create_model(TINY, impl="cpu"), quiet=True)
    finally:
        dispatch.reset()


def test_autocast_is_part_of_the_explanation() -> None:
    model = beit3_fast.create_model(TINY)
    with torch.autocast("cpu", torch.bfloat16):
        explanations = explain(model, quiet=True)
    chosen = {item.op: item for item in explanations if item.op.startswith("expert_linear")}
    inference, training = (chosen[f"expert_linear ({kind})"] for kind in ("inference", "training"))
    assert inference.impl == "composite"
    assert "autocast" in dict(inference.rejected)["cpu"]
    fast = library.available() and library.cpu_isa() != "portable"
    assert training.impl == ("cpu" if fast else "composite")


def test_models_on_another_device() -> None:
    with torch.device("meta"):
        model = beit3_fast.create_model(TINY, device="meta")
    for item in explain(model, quiet=True):
        assert item.impl == "composite"
        assert "meta" in dict(item.rejected)["cpu"]


def test_the_choice_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    dispatch.reset()
    model = beit3_fast.create_model(TINY)
    with caplog.at_level("INFO", logger="beit3_fast"), torch.no_grad():
        for _ in range(3):
            model(visual_tokens=torch.randn(1, 3, 32, 32))
    lines = [record.getMessage() for record in caplog.records if "not cpu" in record.getMessage()]
    assert len([line for line in lines if line.startswith("shared_attention")]) == 1
    assert len([line for line in lines if line.startswith("expert_linear")]) == 1
