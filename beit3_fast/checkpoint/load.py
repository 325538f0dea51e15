"""Weights into a model: everything is checked before the first parameter changes."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from beit3_fast.checkpoint import keys, positions
from beit3_fast.checkpoint.read import (
    Checkpoint,
    PathLike,
    from_state,
    read_checkpoint,
    same_bits,
)
from beit3_fast.checkpoint.report import HOLDS_INFINITY, HOLDS_NAN, LoadReport, mismatch
from beit3_fast.errors import CheckpointError

logger = logging.getLogger("beit3_fast")

# Fields of a configuration that change results and no shape.
_SHAPELESS = ("num_heads", "layer_norm_eps")
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def load_checkpoint(
    model: nn.Module,
    source: PathLike | Checkpoint | Mapping[str, Tensor],
    *,
    strict: bool = True,
    allow_missing: str | Sequence[str] = (),
    allow_mismatched: str | Sequence[str] = (),
    allow_nonfinite: bool = False,
    key: str | None = None,
    verify: bool = True,
) -> LoadReport:
    """Copy the weights of a file, a read checkpoint or a state dict into ``model``, all of them or none.

    Parameters keep their identity, device and dtype; fp64, fp32, bf16 and fp16 are cast to one another. What the
    tables in ``keys`` know to be foreign (another task's head, a branch or a final norm that the model lacks) is
    dropped and reported.

    The vision position table is interpolated to the model's grid (``grid_size``, of the model or its ``config``) when
    it has another number of rows, or when the file's configuration states another grid. As many rows without a stated
    grid (official files and plain state dicts state none) are taken as they are, as the official loader does; where
    the model's grid is no square and the rows would make one, the report says so and the log warns.

    strict: every other name must be in both, and the file's configuration, where it has one, must not say otherwise
        than the model's; False reports the names instead. Shapes must always fit.
    allow_missing: prefixes of names that the file may lack; they keep their values. ``HEADS`` names all heads.
    allow_mismatched: prefixes of names that may have another shape in the file (a head with another number of
        classes); they keep their values.
    allow_nonfinite: take weights that hold NaN or infinity, or that overflow the model's dtype.
    key, verify: as in ``read_checkpoint``.

    Raises CheckpointError (CheckpointMismatch, with the report, where names, shapes or values do not fit), and leaves
    the model as it was, also where a hook of the model raises half-way.
    """
    _check_model(model)
    checkpoint = _checkpoint(source, key, verify)
    for name, tensor in _tensors(model).items():
        _check_target(name, tensor)
    report, ready = _plan(
        model, checkpoint, strict, allow_missing, allow_mismatched, allow_nonfinite
    )
    before = _copies(model) if _has_hooks(model) else {}
    try:
        with torch.no_grad():
            model.load_state_dict(ready, strict=False)
    except Exception as error:
        _put_back(model, before)
        raise CheckpointError(f"{checkpoint}: the model refused its weights: {error}") from error
    except BaseException:
        # Ctrl-C between two tensors: the way forward is the one that needs no copies.
        with torch.no_grad():
            model.load_state_dict(ready, strict=False)
        raise
    report.loaded = list(ready)
    doubtful = report.problems() or report.assumed
    logger.log(logging.WARNING if doubtful else logging.INFO, "%s", report)
    return report


def check_checkpoint(
    model: nn.Module,
    source: PathLike | Checkpoint | Mapping[str, Tensor],
    *,
    strict: bool = True,
    allow_missing: str | Sequence[str] = (),
    allow_mismatched: str | Sequence[str] = (),
    allow_nonfinite: bool = False,
    key: str | None = None,
    verify: bool = True,
) -> LoadReport:
    """What ``load_checkpoint`` would do, without doing it; the model may be on the meta device.

    Raises CheckpointError where ``load_checkpoint`` would because of the file.
    """
    _check_model(model)
    checkpoint = _checkpoint(source, key, verify)
    report, _ = _plan(model, checkpoint, strict, allow_missing, allow_mismatched, allow_nonfinite)
    return report


def _checkpoint(
    source: PathLike | Checkpoint | Mapping[str, Tensor], key: str | None, verify: bool
) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, Mapping):
        return from_state(source)
    return read_checkpoint(source, key=key, verify=verify)


def _plan(
    model: nn.Module,
    checkpoint: Checkpoint,
    strict: bool,
    allow_missing: str | Sequence[str],
    allow_mismatched: str | Sequence[str],
    allow_nonfinite: bool,
) -> tuple[LoadReport, dict[str, Tensor]]:
    """The report and the tensors to copy. Raises CheckpointError when they may not be."""
    targets = _tensors(model)
    for option, prefixes in (
        ("allow_missing", allow_missing),
        ("allow_mismatched", allow_mismatched),
    ):
        _check_prefixes(option, prefixes)
    if strict:
        _compare_configurations(checkpoint, model)
    try:
        state, remarks = keys.fit(checkpoint.state, targets)
    except CheckpointError as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    report = LoadReport(
        str(checkpoint), preset=checkpoint.preset, remarks=[*checkpoint.remarks, *remarks]
    )
    own_name = getattr(model, "name", None)
    if checkpoint.name is not None and own_name is not None and checkpoint.name != own_name:
        report.remarks.append(f"it was saved from {checkpoint.name}; the model is {own_name}")
    if checkpoint.left_out:
        report.remarks.append(f"left in the file: {', '.join(checkpoint.left_out)}")
    _compare_names(report, state, targets)
    ready = _prepare(report, state, targets, (_source_grid(checkpoint), _grid_of(model)))
    _check_ties(report, ready, targets)
    if not allow_nonfinite:
        _check_values(report, state, ready, targets)
    blocking = LoadReport(
        report.source,
        missing=[n for n in report.missing if strict and not keys.matches(n, allow_missing)],
        unexpected=report.unexpected if strict else [],
        mismatched={
            name: shapes
            for name, shapes in report.mismatched.items()
            if not keys.matches(name, allow_mismatched)
        },
        rejected=report.rejected,
        dropped=report.dropped,
        remarks=report.remarks,
    )
    if blocking.problems() or not ready:
        raise mismatch(blocking, state, targets)
    return report, ready


def _check_model(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise CheckpointError(f"a model is needed to load into, got {type(model).__name__}")


def _check_prefixes(option: str, prefixes: str | Sequence[str]) -> None:
    listed = isinstance(prefixes, Sequence) and all(isinstance(p, str) for p in prefixes)
    if not listed:
        raise CheckpointError(
            f"{option} must be a prefix of names or a sequence of them, such as HEADS, got {prefixes!r}"
        )


def _compare_configurations(checkpoint: Checkpoint, model: nn.Module) -> None:
    """Raises CheckpointError where the file's configuration says that its weights are meant for another computation."""
    given, own = checkpoint.config or {}, getattr(model, "config", None)
    other = [
        f"{field} {given[field]!r} in the file and {getattr(own, field)!r} in the model"
        for field in _SHAPELESS
        if field in given and given[field] != getattr(own, field, given[field])
    ]
    if other:
        raise CheckpointError(
            f"{checkpoint}: its configuration is another one: {', '.join(other)}; make the model with the file's, or pass "
            "strict=False to load the weights nevertheless"
        )


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return {n: t for n, t in model.state_dict().items() if isinstance(t, Tensor)}


def _has_hooks(model: nn.Module) -> bool:
    """Whether code of others runs while weights are copied, and may end it half-way."""
    hooks = (
        hook
        for module in model.modules()
        for table in (module._load_state_dict_pre_hooks, module._load_state_dict_post_hooks)
        for hook in table.values()
    )
    # PyTorch wraps some; ours, on packed weights, raise before anything is written.
    return any(
        not str(getattr(getattr(hook, "hook", hook), "__module__", "")).startswith("beit3_fast.")
        for hook in hooks
    )


def _copies(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in _tensors(model).items()}


@torch.no_grad()
def _put_back(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    for name, tensor in _tensors(model).items() if before else ():
        tensor.copy_(before[name])


def _check_target(name: str, tensor: Tensor) -> None:
    """Raise CheckpointError for a tensor of the model that cannot be written to: found now, not half-way."""
    if tensor.is_meta:
        raise CheckpointError(
            f"the model's {name} is on the meta device: give the model memory first, "
            "with model.to_empty(device=...)"
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise CheckpointError(
            f"the model's {name} was made under torch.inference_mode and can only be changed there: "
            "make the model outside it"
        )
    strided = tensor.layout == torch.strided and not tensor.is_quantized
    if not strided or any(
        n > 1 and step == 0 for n, step in zip(tensor.shape, tensor.stride(), strict=True)
    ):
        raise CheckpointError(f"the model's {name} is no dense tensor with memory of its own")


def _grid_of(model: nn.Module) -> positions.Grid | None:
    for owner in (model, getattr(model, "config", None)):
        grid = getattr(owner, "grid_size", None)
        if grid is not None:
            return int(grid[0]), int(grid[1])
    return None


def _source_grid(checkpoint: Checkpoint) -> positions.Grid | None:
    """The grid that the file's own configuration states."""
    config = checkpoint.config or {}
    size, patch = config.get("img_size"), config.get("patch_size")
    pair = size if isinstance(size, list) else [size, size]
    numbers = [n for n in (*pair, patch) if isinstance(n, int) and n > 0]
    return (numbers[0] // numbers[2], numbers[1] // numbers[2]) if len(numbers) == 3 else None


def _compare_names(
    report: LoadReport, state: dict[str, Tensor], targets: Mapping[str, Tensor]
) -> None:
    """Note what is missing, unexpected and foreign, and leave only the model's names in ``state``."""
    wanted = keys.Wanted(targets)
    for name in [name for name in state if name not in targets]:
        reason = wanted.why_foreign(name)
        if reason is None:
            report.unexpected.append(name)
        else:
            report.dropped[name] = reason
    report.missing = [name for name in targets if name not in state]


def _prepare(
    report: LoadReport,
    state: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
    grids: tuple[positions.Grid | None, positions.Grid | None],
) -> dict[str, Tensor]:
    """Tensors of the model's shapes, positions interpolated; what cannot be one is noted in the report."""
    ready: dict[str, Tensor] = {}
    for name, target in targets.items():
        if name not in state:
            continue
        tensor = state[name]
        floating = tensor.dtype in _FLOATING and target.dtype in _FLOATING
        if not floating and tensor.dtype != target.dtype:
            report.rejected[name] = (
                f"has dtype {tensor.dtype} in the file and {target.dtype} in the model"
            )
            continue
        if floating and positions.is_table(name) and tensor.shape[1:] == target.shape[1:]:
            try:
                tensor = _fit_positions(report, name, tensor, target, grids)
            except CheckpointError as error:
                report.rejected[name] = str(error)
                continue
        if tensor.shape != target.shape:
            report.mismatched[name] = (tuple(tensor.shape), tuple(target.shape))
            continue
        if state[name].dtype != target.dtype:
            cast = (_short(state[name].dtype), _short(target.dtype))
            report.casts[cast] = report.casts.get(cast, 0) + 1
        ready[name] = tensor
    return ready


def _fit_positions(
    report: LoadReport,
    name: str,
    table: Tensor,
    target: Tensor,
    grids: tuple[positions.Grid | None, positions.Grid | None],
) -> Tensor:
    rows, wanted = table.shape[0], target.shape[0]
    source, grid = grids
    if source is not None and positions.rows_of(source) != rows:
        source = None
    if grid is None or positions.rows_of(grid) != wanted:
        grid = positions.square_grid(wanted)
    square = positions.square_grid(rows)
    if rows == wanted and (source is None or grid is None):
        if square is not None and grid is not None and grid != square:
            report.assumed[name] = (grid, square)
        return table
    source = source or square
    if source is None or grid is None:
        owner, count = ("file", rows) if source is None else ("model", wanted)
        raise CheckpointError(
            f"has {count} rows in the {owner}: {positions.EXTRA_ROWS} and {count - positions.EXTRA_ROWS} patches, "
            "which are no square; only tables of a known grid can be interpolated"
        )
    resized = positions.interpolate_positions(table, source, grid)
    if resized is not table:
        report.interpolated[name] = (source, grid)
    return resized


def _check_ties(
    report: LoadReport, ready: Mapping[str, Tensor], targets: Mapping[str, Tensor]
) -> None:
    """Names that are one tensor of the model must have one value in the file."""
    first: dict[tuple[object, ...], str] = {}
    for name in ready:
        target = targets[name]
        if target.is_meta or not target.numel():
            continue
        place = (target.device, target.data_ptr(), target.dtype, target.shape, target.stride())
        other = first.setdefault(place, name)
        if other != name and not same_bits(ready[name], ready[other]):
            report.rejected[name] = (
                f"is the same tensor as {other} in the model, and another one in the file"
            )


def _check_values(
    report: LoadReport,
    state: Mapping[str, Tensor],
    ready: Mapping[str, Tensor],
    targets: Mapping[str, Tensor],
) -> None:
    for name, tensor in ready.items():
        if tensor.dtype not in _FLOATING or not tensor.numel():
            continue
        largest, limit = _largest(tensor), torch.finfo(targets[name].dtype).max
        if (
            name in report.interpolated
            and not math.isfinite(largest)
            and math.isfinite(own := _largest(state[name]))
        ):
            report.rejected[name] = (
                f"holds values of up to {own:g}, which go beyond float32 when they are interpolated; "
                "are they damaged? A model of the file's own image size would take them as they are"
            )
        elif math.isnan(largest):
            report.rejected[name] = HOLDS_NAN
        elif math.isinf(largest):
            report.rejected[name] = HOLDS_INFINITY
        elif largest > limit:
            report.rejected[name] = (
                f"holds values beyond {limit:g}, the limit of {_short(targets[name].dtype)}; "
                "use a model in bfloat16 or float32"
            )


def _largest(tensor: Tensor) -> float:
    """The largest magnitude; NaN where the tensor holds one."""
    low, high = (float(end) for end in tensor.aminmax())
    return math.nan if math.isnan(low) or math.isnan(high) else max(-low, high)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
