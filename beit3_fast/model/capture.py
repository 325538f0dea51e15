"""model.capture: a forward for inputs of fixed shapes, replayed as a CUDA graph.

A graph replays the kernels of one forward on the memory that they had then, without Python. Inputs are copied into
buffers that stay; texts are padded to the shortest captured length that holds them, and the padding is masked, so that
the result is that of the text without it (``beit3_fast.padded_layout``).
"""

from __future__ import annotations

import inspect
import threading
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from beit3_fast.derived import Snapshot, keeping
from beit3_fast.errors import ConfigError, ShapeError
from beit3_fast.model.embedding import POSITION_OFFSET
from beit3_fast.ops.dispatch import autocast_enabled
from beit3_fast.padded_layout import fixed_shapes

# Parameters of the forwards by what they take; other tensors are images and masks over their patches.
_TEXTS = ("textual_tokens", "text_description", "question", "text_ids")
_PADDINGS = ("text_padding_position", "padding_mask")
_NOT_FIXED = ("attn_mask", "positions", "language_masked_pos", "incremental_state", "text_len")
_PAD = 1


class Capturable(nn.Module):
    """The method ``capture``, for the backbone and every task model."""

    # Whether outputs have the text's tokens at the end of their second dimension.
    _outputs_hold_text = False

    def capture(
        self,
        *inputs: Any,
        text_lengths: Sequence[int] | None = None,
        graphs: bool = True,
        **options: Any,
    ) -> Captured:
        """A callable that is this model's forward for inputs like these, without the cost of launching it.

        ``inputs`` and ``options`` are arguments of ``forward``: their shapes and dtypes are fixed, their values are not
        used; what is no tensor stays as it is. Texts may have any length up to the largest of ``text_lengths`` (default:
        the length given here); each takes one graph. Weights are read where they are: after a change capture again (a
        call says so). ``graphs=False`` runs the same buffers and lengths without CUDA graphs, on any device.

        Raises ConfigError for arguments that cannot be fixed, and for a model that is not on a GPU unless graphs=False;
        like every call, in training mode and under autocast. A call raises ShapeError for inputs of other shapes.
        """
        device = next(self.parameters()).device
        _check_state(self, device)
        if graphs and device.type != "cuda":
            raise ConfigError(
                f"CUDA graphs need a model on a GPU, this one is on {device}; graphs=False runs the same without them"
            )
        return Captured(self, inputs, options, text_lengths, graphs, device)


class Captured:
    """Made by ``model.capture``; calls with arguments of the model's ``forward``, one at a time."""

    def __init__(
        self,
        model: Any,
        inputs: tuple[Any, ...],
        options: dict[str, Any],
        text_lengths: Sequence[int] | None,
        graphs: bool,
        device: torch.device,
    ) -> None:
        self._model, self._signature = model, _signature(model)
        self._device, self._lock = device, threading.Lock()
        example = self._bind(inputs, options)
        self._constants = {k: v for k, v in example.items() if not isinstance(v, Tensor)}
        tensors = {k: v for k, v in example.items() if isinstance(v, Tensor)}
        unfit = [name for name in _NOT_FIXED if example.get(name) is not None]
        if unfit:
            raise ConfigError(f"the shape of {unfit[0]} cannot be fixed; call the model itself")
        self._text = next((name for name in _TEXTS if name in tensors), None)
        self._padding: str | None = None
        if self._text is not None:
            self._padding = next(name for name in _PADDINGS if name in example)
        self._constants.pop(self._padding or "", None)
        self._fixed = {
            name: torch.zeros_like(value, device=device)
            for name, value in tensors.items()
            if name not in (self._text, self._padding)
        }
        self._batch, self._text_dtype = 0, torch.int64
        lengths: tuple[int, ...] = (0,)
        if self._text is not None:
            text = tensors[self._text]
            if text.dim() != 2:
                raise ShapeError(f"{self._text} must be [B, Nt], got {list(text.shape)}")
            self._batch, self._text_dtype = text.shape[0], text.dtype
            lengths = _checked(text_lengths, text.shape[1], model.config.max_text_positions)
        elif text_lengths is not None:
            raise ConfigError("text_lengths was given, but no text")
        self._weights = Snapshot(model)
        pool = torch.cuda.graph_pool_handle() if graphs else None
        self._buckets = [self._bucket(length, device, pool) for length in lengths]

    @property
    def text_lengths(self) -> tuple[int, ...]:
        """Ascending lengths that texts are padded to; empty for a model without text."""
        return () if self._text is None else tuple(bucket.length for bucket in self._buckets)

    def __call__(self, *inputs: Any, **options: Any) -> Any:
        """The model's output for these inputs, not overwritten by the next call. Raises ShapeError and ConfigError."""
        _check_state(self._model, self._device)
        given = self._bind(inputs, options)
        with self._lock:
            length = self._check(given)
            bucket = next(own for own in self._buckets if own.length >= length)
            for name, buffer in self._fixed.items():
                buffer.copy_(given[name])
            if self._text is not None:
                self._fill(bucket, given, length)
            if not bucket.is_graph:
                self._check_weights()
            output = bucket.replay()
            if bucket.is_graph:  # it computes meanwhile, on memory that stays
                self._check_weights()
            return self._own(output, bucket.length - length, bucket.is_graph)

    def _bind(self, inputs: tuple[Any, ...], options: dict[str, Any]) -> dict[str, Any]:
        bound = self._signature.bind(*inputs, **options)
        bound.apply_defaults()
        return dict(bound.arguments)

    def _check(self, given: dict[str, Any]) -> int:
        """The length of the text. Raises ShapeError and ConfigError."""
        for name, value in self._constants.items():
            if given[name] is not value and (
                isinstance(given[name], Tensor) or given[name] != value
            ):
                raise ConfigError(f"{name} was captured as {value!r}; capture again for another")
        for name, buffer in self._fixed.items():
            _check_like(name, given[name], tuple(buffer.shape), buffer.dtype)
        if self._text is None:
            return 0
        text, padding = given[self._text], given.get(self._padding or "")
        length = text.shape[1] if isinstance(text, Tensor) and text.dim() == 2 else 0
        _check_like(self._text, text, (self._batch, length), self._text_dtype)
        if padding is not None:
            dtype = padding.dtype if isinstance(padding, Tensor) else torch.bool
            _check_like(str(self._padding), padding, tuple(text.shape), dtype)
        longest = self._buckets[-1].length
        if length > longest:
            raise ShapeError(
                f"{self._text} has {length} tokens, and the longest captured length is {longest}; capture with "
                f"text_lengths={(*self.text_lengths, length)}"
            )
        return length

    def _check_weights(self) -> None:
        if not self._weights.holds():
            raise ConfigError("the model's weights changed since it was captured; capture again")

    def _fill(self, bucket: Bucket, given: dict[str, Any], length: int) -> None:
        text, padding = given[str(self._text)], given.get(self._padding or "")
        bucket.text.fill_(_PAD)[:, :length] = text
        bucket.padding.fill_(True)[:, :length] = False if padding is None else padding != 0

    def _own(self, output: Any, excess: int, is_graph: bool) -> Any:
        cut = excess if self._model._outputs_hold_text else 0

        def own(tensor: Tensor) -> Tensor:
            if cut and tensor.dim() > 1:
                tensor = tensor[:, : tensor.shape[1] - cut]
            return tensor.clone() if is_graph else tensor

        return tree_map_only(Tensor, own, output)

    def _bucket(self, length: int, device: torch.device, pool: Any) -> Bucket:
        shape = (self._batch, length)
        text = torch.full(shape, _PAD, dtype=self._text_dtype, device=device)
        padding = torch.zeros(shape, dtype=torch.bool, device=device)
        call = {**self._constants, **self._fixed}
        if self._text is not None:
            call |= {self._text: text, str(self._padding): padding}

        @torch.no_grad()
        def run() -> Any:
            with fixed_shapes():
                return self._model(**call)

        if pool is None:
            return Bucket(length, text, padding, run, False, [])
        with keeping() as reads:
            replay = _graph(run, device, pool)
        return Bucket(length, text, padding, replay, True, reads)


class Bucket(NamedTuple):
    """Buffers for texts up to one length, and what computes the output of what they hold."""

    length: int
    text: Tensor
    padding: Tensor
    replay: Callable[[], Any]
    is_graph: bool
    reads: list[Any]  # derived values, whose memory the graph reads


def _graph(run: Callable[[], Any], device: torch.device, pool: Any) -> Callable[[], Any]:
    """``run`` as one CUDA graph: a callable that replays it and returns its outputs, always the same tensors."""
    with torch.cuda.device(device):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # kernels are compiled, checked and chosen, and weights packed
                run()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            outputs = run()

    def replay() -> Any:
        graph.replay()
        return outputs

    return replay


def _signature(model: nn.Module) -> inspect.Signature:
    """That of forward, without the further keywords that it takes and does not read."""
    own = inspect.signature(model.forward)
    named = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    return own.replace(parameters=named)


def _check_state(model: nn.Module, device: torch.device) -> None:
    if model.training:
        raise ConfigError("a captured model is for inference; call model.eval() first")
    if autocast_enabled(device.type):
        raise ConfigError("a captured model reads weights in their own dtype; leave torch.autocast")


def _checked(lengths: Sequence[int] | None, given: int, positions: int) -> tuple[int, ...]:
    wanted = (given,) if lengths is None else lengths
    most = positions - POSITION_OFFSET
    if (
        not isinstance(wanted, (list, tuple))
        or not wanted
        or not all(isinstance(n, int) and 1 <= n <= most for n in wanted)
    ):
        raise ConfigError(
            f"text_lengths must be a list of lengths from 1 to {most}, the model's position table, got {wanted!r}"
        )
    return tuple(sorted(set(wanted)))


def _check_like(name: str, value: Any, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    if not isinstance(value, Tensor) or tuple(value.shape) != shape or value.dtype != dtype:
        got = type(value).__name__
        if isinstance(value, Tensor):
            got = f"{value.dtype} of shape {list(value.shape)}"
        raise ShapeError(
            f"{name} was captured as {dtype} of shape {list(shape)}, got {got}; capture again for another"
        )
