"""From torchscale's model to what compilers and other runtimes take: tensors in, one tensor out, fixed shapes."""

from __future__ import annotations

import contextlib
import io
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.runtime import Weights
from bench.torchscale_heads import MODELS
from bench.workloads import Workload

Engine = Callable[[Sequence[Tensor]], Tensor]


def load(
    make: Callable[[], nn.Module], weights: Weights, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The model with these weights; its own initialisation, which takes seconds, is left out."""
    with torch.device("meta"):
        model = make()
    if list(model.buffers()):
        # A buffer may hold what only the constructor can compute.
        model = make().to(device, dtype)
    else:
        model = model.to(dtype).to_empty(device=device)
    model.load_state_dict(weights, strict=True)
    return model.eval()


def load_torchscale(
    workload: Workload, weights: Weights, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """torchscale's model of the workload, as it is."""
    return load(lambda: MODELS[workload.task.model](workload.config), weights, dtype, device)


class SdpaAttention(nn.Module):
    """torchscale's attention by `scaled_dot_product_attention`, on the same projections.

    masked: whether a text is padded. torchscale makes a padding mask of zeros where there is none.
    """

    def __init__(self, attention: Any) -> None:
        super().__init__()
        self.q_proj, self.k_proj = attention.q_proj, attention.k_proj
        self.v_proj, self.out_proj = attention.v_proj, attention.out_proj
        self.inner_attn_ln = attention.inner_attn_ln
        self.num_heads, self.head_dim = attention.num_heads, attention.head_dim
        self.masked = True

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        attn_mask: Tensor | None = None,
        rel_pos: None = None,
        incremental_state: None = None,
    ) -> tuple[Tensor, None]:
        """[B, N, C] -> ([B, N, C], None), for the calls that torchscale's EncoderLayer makes here."""
        batch, tokens, width = query.shape
        q, k, v = (
            projection(x).view(batch, tokens, self.num_heads, self.head_dim).transpose(1, 2)
            for projection, x in (
                (self.q_proj, query),
                (self.k_proj, key),
                (self.v_proj, value),
            )
        )
        seen = None
        if self.masked and key_padding_mask is not None:
            seen = ~key_padding_mask.bool()[:, None, None, :]
        if attn_mask is not None:
            allowed = (attn_mask == 0)[None, None]
            seen = allowed if seen is None else seen & allowed
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        x = x.transpose(1, 2).reshape(batch, tokens, width)
        if self.inner_attn_ln is not None:
            x = self.inner_attn_ln(x)
        return self.out_proj(x), None


def use_sdpa(model: nn.Module) -> nn.Module:
    """The same model, with every attention by one call of PyTorch instead of four."""
    for layer in encoder_of(model).layers:
        layer.self_attn = SdpaAttention(layer.self_attn)
    return model


def encoder_of(model: Any) -> Any:
    """The encoder of torchscale's backbone or of a task model around it."""
    return getattr(model, "beit3", model).encoder


class TensorModel(nn.Module):
    """A task model as tracers and exporters want it: positional tensors in, one tensor out."""

    def __init__(self, model: nn.Module, names: Sequence[str]) -> None:
        super().__init__()
        self.model = model
        self.names = tuple(names)

    def forward(self, *tensors: Tensor) -> Tensor:
        """The tensor that the task is about: states, logits or embeddings."""
        raw = self.model(**dict(zip(self.names, tensors, strict=True)))
        if isinstance(raw, dict):
            return raw["encoder_out"]
        if isinstance(raw, tuple):
            return next(part for part in raw if part is not None)
        return raw


class Converted(nn.Module):
    """Takes the official arguments, and runs what was made of the model for inputs of those shapes.

    The first call with new shapes converts, which takes from seconds to minutes.
    """

    def __init__(self, workload: Workload, source: nn.Module) -> None:
        super().__init__()
        self.source = source
        self.workload = workload
        self._engines: dict[tuple[object, ...], Engine] = {}

    @property
    def converted_bytes(self) -> int:
        """About what the conversions hold beside the source's own weights."""
        return len(self._engines) * sum(p.nbytes for p in self.source.parameters())

    def forward(self, only_infer: bool = True, **inputs: Tensor) -> Any:
        """What torchscale's model gives for these inputs."""
        key = tuple((name, *tensor.shape) for name, tensor in inputs.items())
        engine = self._engines.get(key)
        if engine is None:
            for module in self.source.modules():
                if isinstance(module, SdpaAttention):
                    module.masked = any("padding" in name for name in inputs)
            with torch.inference_mode(False), torch.no_grad(), _silence():
                engine = self._convert(TensorModel(self.source, list(inputs)), inputs)
            self._engines[key] = engine
        found = engine(list(inputs.values()))
        model = self.workload.task.model
        if model == "backbone":
            return {"encoder_out": found}
        return {"retrieval": (None, found), "captioning": (found, None)}.get(model, found)

    @abstractmethod
    def _convert(self, model: TensorModel, inputs: Mapping[str, Tensor]) -> Engine:
        """What runs `model` on tensors of the shapes of `inputs`."""


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Keeps what converters print, progress bars and advice, off the report; what goes wrong is raised."""
    sink = io.StringIO()
    with warnings.catch_warnings(), contextlib.redirect_stdout(sink):
        warnings.simplefilter("ignore")
        with contextlib.redirect_stderr(sink):
            yield
