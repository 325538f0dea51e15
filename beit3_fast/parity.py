"""The one rule that decides whether a result is right, used by the tests and by the benchmark.

No constant tolerance can be right for every shape, dtype and input: it is either loose for small
values or wrong for large ones. So an error is held against the error that plain PyTorch makes in
the same dtype on the same inputs:

- an *op* against its formula in fp64 (`op_parity`), by three rules that must all hold: the largest
  error is at most 2 times (gradients: 3 times) that of plain PyTorch plus a floor of rounding
  derived from the data; the relative rms error is at most 1.5 times that of plain PyTorch, or the
  rounding of the dtype; and every row keeps its direction, which finds the one wrong row that hides
  under an outlier;
- a *model* against another runtime in fp32 (`model_parity`): fp32 stays within 1e-5 of the output's
  scale, a 16-bit dtype within 2 times (gradients: 3 times) the error that the other runtime itself
  makes in that dtype.

Nothing here takes a tolerance: a result that does not pass is to be mended, not the rule.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

_RMS_BOUND = {
    torch.float64: 1e-12,
    torch.float32: 1e-5,
    torch.float16: 5e-3,
    torch.bfloat16: 5e-3,
}
_ROW_BOUND = {
    torch.float64: 1e-14,
    torch.float32: 1e-6,
    torch.float16: 1e-4,
    torch.bfloat16: 1e-3,
}
_MODEL_BOUND = {torch.float64: 1e-10, torch.float32: 1e-5}
_FORWARD_FACTOR = 2.0
_GRADIENT_FACTOR = 3.0
_RMS_FACTOR = 1.5


@dataclass(frozen=True)
class Parity:
    """How far one result is from the truth, and whether that is near enough.

    max_abs: largest absolute error, in the units of the output; NaN if the result holds a value
        that is not finite where it should be, or has the wrong shape or dtype.
    rel_rms: root mean square of the error over that of the truth (no unit).
    baseline_rel_rms: the same figure of plain PyTorch, or of the other runtime, in the same dtype.
    passed: whether every rule holds.
    reason: empty if passed, else each broken rule with its figures.
    """

    max_abs: float
    rel_rms: float
    baseline_rel_rms: float
    passed: bool
    reason: str = ""


def op_parity(ours: Tensor, plain: Tensor, truth: Tensor, *, gradient: bool = False) -> Parity:
    """Judges the result of one op.

    Args:
        ours: [..., width], the result under test.
        plain: same shape and dtype, what plain PyTorch calls give on the same inputs.
        truth: same shape, fp64: the formula on the same, already rounded, inputs.
        gradient: the tensors are gradients, which are allowed 3 times plain PyTorch's largest
            error, not 2 times.

    A row is a slice along the last dimension. Where the truth, rounded to the dtype, is not finite,
    the result must be the same infinity or NaN; everywhere else it must be finite. Empty tensors of
    the right shape pass.

    Raises:
        ValueError: the truth is not fp64, or `plain` does not fit it: the test itself is wrong.
    """
    if truth.dtype != torch.float64:
        raise ValueError(f"the truth must be computed in float64, got {truth.dtype}")
    _check_dtype(plain.dtype, _RMS_BOUND)
    if plain.shape != truth.shape:
        raise ValueError(f"plain PyTorch gave {tuple(plain.shape)}, the truth {tuple(truth.shape)}")
    early = _unusable(ours, plain, truth)
    if early is not None:
        return early

    dtype = plain.dtype
    factor = _GRADIENT_FACTOR if gradient else _FORWARD_FACTOR
    rounded = truth.to(dtype)
    expected = torch.isfinite(rounded)
    usable = expected & torch.isfinite(plain)
    f, r = (torch.where(expected, t.double(), 0.0) for t in (ours, truth))
    p, p_truth = (torch.where(usable, t.double(), 0.0) for t in (plain, truth))

    max_abs = _largest(f - r)
    spread = p
    if torch.equal(p, torch.where(usable, rounded, 0.0).double()):
        # Correctly rounded by luck: a multiplication and a division give ordinary rounding errors.
        spread = torch.where(usable, plain * 0.3 / 0.3, 0.0).double()
    max_limit = factor * _largest(spread - p_truth) + _rounding_floor(rounded, expected)

    scale = _rms(r)
    rel_rms = _relative(_rms(f - r), scale)
    plain_rel_rms = _relative(_rms(p - p_truth), scale)
    rms_limit = max(_RMS_BOUND[dtype], _RMS_FACTOR * plain_rel_rms)

    broken = []
    if not max_abs <= max_limit:
        broken.append(f"largest error {max_abs:.3e} is over the limit {max_limit:.3e}")
    if not rel_rms <= rms_limit:
        broken.append(f"relative rms error {rel_rms:.3e} is over the limit {rms_limit:.3e}")
    broken.extend(_turned_rows(f, r, p, p_truth, dtype, factor))
    return Parity(max_abs, rel_rms, plain_rel_rms, not broken, "; ".join(broken))


def model_parity(
    ours: Tensor, reference: Tensor, baseline: Tensor | None = None, *, gradient: bool = False
) -> Parity:
    """Judges one output of a whole model.

    Args:
        ours: [...], the output under test, in the dtype that is judged.
        reference: same shape, the other runtime's output in fp32 or fp64, same weights and inputs.
        baseline: same shape and dtype as `ours`, the other runtime's output in that dtype. Needed
            for 16-bit dtypes; for fp32 and fp64 it only fills `baseline_rel_rms`.
        gradient: the tensors are gradients, which are allowed 3 times the baseline's error, not
            2 times.

    In fp32 the largest error is at most 1e-5 of the reference's largest value. In a 16-bit dtype
    both the largest and the rms error are at most the factor times the baseline's own, or the
    rounding of the reference to that dtype if that is larger (no stored output can be nearer). A
    value that is not finite is never accepted.

    Raises:
        ValueError: no baseline for a 16-bit dtype, or one that does not fit: the test itself is
            wrong.
    """
    _check_dtype(reference.dtype, _MODEL_BOUND)
    dtype = ours.dtype
    if dtype not in _RMS_BOUND:
        return _failed(f"the output has dtype {dtype}, which is not a floating-point dtype")
    if baseline is None and dtype not in _MODEL_BOUND:
        raise ValueError(f"{dtype} is judged against a baseline in {dtype}; none was given")
    if baseline is not None and baseline.shape != reference.shape:
        raise ValueError(
            f"the baseline gave {tuple(baseline.shape)}, the reference {tuple(reference.shape)}"
        )
    for name, tensor in (("reference", reference), ("baseline", baseline)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"the {name} holds values that are not finite and can judge nothing")
    early = _unusable(ours, baseline, reference)
    if early is not None:
        return early

    r = reference.double()
    error = ours.double() - r
    scale = _rms(r)
    max_abs, rel_rms = _largest(error), _relative(_rms(error), scale)
    baseline_error = torch.zeros_like(r) if baseline is None else baseline.double() - r
    baseline_rel_rms = _relative(_rms(baseline_error), scale)

    max_limit, rms_limit = model_limits(dtype, reference, baseline, gradient=gradient)
    broken = []
    if not max_abs <= max_limit:
        limit = f"{max_limit:.3e}"
        if dtype in _MODEL_BOUND:
            limit = f"{_MODEL_BOUND[dtype]:.0e} of the scale, {limit}"
        broken.append(f"largest error {max_abs:.3e} is over the limit {limit}")
    if rms_limit is not None and not rel_rms <= rms_limit:
        broken.append(f"relative rms error {rel_rms:.3e} is over the limit {rms_limit:.3e}")
    return Parity(max_abs, rel_rms, baseline_rel_rms, not broken, "; ".join(broken))


def model_limits(
    dtype: torch.dtype, reference: Tensor, baseline: Tensor | None, *, gradient: bool = False
) -> tuple[float, float | None]:
    """The largest error that ``model_parity`` lets pass in ``dtype``, and the relative rms error where it has a limit."""
    r = reference.double()
    if dtype in _MODEL_BOUND:
        return _MODEL_BOUND[dtype] * _largest(r), None
    factor = _GRADIENT_FACTOR if gradient else _FORWARD_FACTOR
    scale = _rms(r)
    error = torch.zeros_like(r) if baseline is None else baseline.double() - r
    rounding = r.to(dtype).double() - r
    return (
        max(factor * _largest(error), _largest(rounding)),
        max(factor * _relative(_rms(error), scale), _relative(_rms(rounding), scale)),
    )


def worst_of(parities: dict[str, Parity]) -> Parity:
    """One verdict for several outputs of one run: the largest figures, every reason by output.

    Raises:
        ValueError: there is nothing to judge, which must not count as a pass.
    """
    if not parities:
        raise ValueError("no output was judged")
    members = list(parities.values())
    reasons = [f"{name}: {p.reason}" for name, p in parities.items() if not p.passed]
    worst = max(members, key=lambda p: float("inf") if p.rel_rms != p.rel_rms else p.rel_rms)
    figures = [p.max_abs for p in members]
    max_abs = float("nan") if any(v != v for v in figures) else max(figures)
    return Parity(
        max_abs,
        worst.rel_rms,
        worst.baseline_rel_rms,
        all(p.passed for p in members),
        "; ".join(reasons),
    )


def assert_parity(parity: Parity, what: str = "the result") -> None:
    """Raises AssertionError, with the figures and the broken rules, if `parity` did not pass."""
    if not parity.passed:
        raise AssertionError(
            f"{what} is not in parity: {parity.reason} (max_abs {parity.max_abs:.3e}, "
            f"rel_rms {parity.rel_rms:.3e}, baseline rel_rms {parity.baseline_rel_rms:.3e})"
        )


def _check_dtype(dtype: torch.dtype, known: dict[torch.dtype, float]) -> None:
    if dtype not in known:
        raise ValueError(f"expected one of {', '.join(map(str, known))}, got {dtype}")


def _failed(reason: str) -> Parity:
    nan = float("nan")
    return Parity(nan, nan, nan, False, reason)


def _unusable(ours: Tensor, peer: Tensor | None, truth: Tensor) -> Parity | None:
    """The verdict if shape, dtype or a value that is not finite already decides it, else None."""
    if ours.shape != truth.shape:
        return _failed(f"shape {tuple(ours.shape)}, expected {tuple(truth.shape)}")
    if peer is not None and ours.dtype != peer.dtype:
        return _failed(f"dtype {ours.dtype}, expected {peer.dtype}")
    rounded = truth.to(ours.dtype)
    wrong = torch.isfinite(rounded) & ~torch.isfinite(ours)
    if bool(wrong.any()):
        first = wrong.nonzero()[0].tolist()
        return _failed(f"{int(wrong.sum())} values are not finite, the first at {first}")
    same = (rounded == ours) | (torch.isnan(rounded) & torch.isnan(ours))
    if not bool((torch.isfinite(rounded) | same).all()):
        return _failed("an infinity or NaN of the truth is missing or has the wrong sign")
    return None


def _largest(error: Tensor) -> float:
    return float(error.abs().max()) if error.numel() else 0.0


def _rms(values: Tensor) -> float:
    return float(values.pow(2).mean().sqrt()) if values.numel() else 0.0


def _relative(error: float, scale: float) -> float:
    if error == 0.0:
        return 0.0
    return error / scale if scale > 0.0 else float("inf")


def _rounding_floor(rounded: Tensor, finite: Tensor) -> float:
    """Twice the largest change that adding and removing 0.3 of the data's rms makes in the dtype."""
    values = rounded[finite]
    shift = torch.tensor(0.3 * _rms(values.double()), dtype=rounded.dtype, device=rounded.device)
    moved = (values + shift) - shift
    steady = torch.isfinite(moved)
    return 2.0 * _largest(moved[steady].double() - values[steady].double())


def _turned_rows(
    f: Tensor, r: Tensor, p: Tensor, p_truth: Tensor, dtype: torch.dtype, factor: float
) -> list[str]:
    """The rows whose cosine with the truth is off by more than the bound and than plain PyTorch's.

    1 - cosine grows with the square of the relative error, hence the squared factor. Rows whose
    truth is all zero, or below the normal numbers of what it is computed in (fp32 for 16-bit dtypes),
    have no direction; the largest-error rule holds them.
    """
    if not r.numel():
        return []
    width = r.shape[-1] if r.ndim else 1
    f, r, p, p_truth = (t.reshape(-1, width) for t in (f, r, p, p_truth))
    off = (_unit(f) - _unit(r)).pow(2).sum(-1) / 2
    plain_off = (_unit(p) - _unit(p_truth)).pow(2).sum(-1) / 2
    bound = _ROW_BOUND[dtype]
    smallest = torch.finfo(torch.promote_types(dtype, torch.float32)).tiny
    directed = r.abs().amax(-1) >= smallest
    turned = (off > torch.clamp(factor * factor * plain_off, min=bound)) & directed
    if not bool(turned.any()):
        return []
    row = int(torch.where(turned, off, -1.0).argmax())
    return [
        f"{int(turned.sum())} of {len(r)} rows point elsewhere, the worst is row {row}: 1 - cosine "
        f"{float(off[row]):.3e}, bound {bound:.0e}, plain PyTorch {float(plain_off[row]):.3e}"
    ]


def _unit(rows: Tensor) -> Tensor:
    # Two steps, so that neither tiny nor huge rows lose their norm to underflow or overflow.
    rows = rows / rows.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(torch.finfo(rows.dtype).tiny)
