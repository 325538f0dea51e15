"""How a model is trained by several processes: DistributedDataParallel, or FSDP2 with a part of the weights in each.

Both take the mean of the processes' gradients, and so does the loop's scale: see ``Engine.backward``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from beit3_fast.checkpoint import load_checkpoint
from beit3_fast.derived import forget
from beit3_fast.errors import ConfigError
from beit3_fast.model.stack import layers_of
from beit3_fast.train.options import TrainOptions
from beit3_fast.train.processes import Processes

if TYPE_CHECKING:
    from beit3_fast.train.loop import TrainReport

M = TypeVar("M", bound=nn.Module)


class Engine:
    """One process. ``model`` has the parameters, ``called`` is what the objective calls."""

    def __init__(self, model: nn.Module, options: TrainOptions, processes: Processes) -> None:
        self.model = model
        self.called: Any = model
        self.device = next(model.parameters()).device
        self.processes = processes
        self.half = options.precision == "bfloat16"

    def moved(self, batch: Any) -> Any:
        """A batch on the model's device."""
        return batch.to(self.device)

    def precision(self) -> AbstractContextManager[Any]:
        """In which the objective is computed."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.half)

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """In which a micro-batch goes forward and backward; gradients are exchanged in a step's ``last`` one."""
        return nullcontext()

    def backward(self, share: Tensor) -> None:
        """Add the gradient of a share of the step's loss."""
        # The engines divide by the number of processes, and shares are to be added.
        (share * self.processes.size).backward()

    def settle(self) -> None:
        """After a step's last micro-batch, before gradients are read."""


class Replicated(Engine):
    """All weights in each process; gradients are exchanged while the backward pass runs."""

    def __init__(self, model: nn.Module, options: TrainOptions, processes: Processes) -> None:
        super().__init__(model, options, processes)
        # A batch may lack a kind of sample. Buckets are then never laid out anew, which a continuation would not repeat.
        self.called = DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            find_unused_parameters=True,
        )

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """See Engine."""
        return nullcontext() if last else self.called.no_sync()


class Sharded(Engine):
    """A part of each layer's weights, gradients and optimizer state in each process.

    In bfloat16 a layer's weights are gathered and used in bfloat16, without autocast; gradients are added in float32.
    A parameter that is a single number is whole in each.
    """

    def __init__(self, model: nn.Module, options: TrainOptions, processes: Processes) -> None:
        super().__init__(model, options, processes)
        _check_version()
        self._watched: set[str] = set()
        self._used: set[str] = set()
        policy = MixedPrecisionPolicy()
        if self.half:
            policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
        # Losses are views of one tensor; nobody writes into them.
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")
        mesh = init_device_mesh(self.device.type, (processes.size,))
        singles = {parameter for parameter in model.parameters() if not parameter.dim()}
        for name, module in (*layers_of(model).items(), ("", model)):
            self.called = fully_shard(module, mesh=mesh, mp_policy=policy, ignored_params=singles)
            module.register_forward_pre_hook(
                lambda module, _, name=name: self._gathered(module, name)
            )
        self.called.set_reduce_scatter_unused_params(True)
        self._parameters = dict(model.named_parameters())

    def moved(self, batch: Any) -> Any:
        """See Engine."""
        return batch.to(self.device, torch.bfloat16) if self.half else super().moved(batch)

    def precision(self) -> AbstractContextManager[Any]:
        """See Engine."""
        return nullcontext()

    def micro_batch(self, last: bool) -> AbstractContextManager[Any]:
        """See Engine."""
        self.called.set_requires_gradient_sync(last)
        return nullcontext()

    def settle(self) -> None:
        """What no process used gets zeros from FSDP2; as without it, it is to have no gradient, and not to decay.

        Single numbers get the mean of the processes' gradients here, as the parts get it from FSDP2.
        """
        used = torch.tensor([name in self._used for name in self._parameters], dtype=torch.uint8)
        used = used.to(self.device)
        dist.all_reduce(used, dist.ReduceOp.MAX)
        for parameter, one in zip(self._parameters.values(), used.tolist(), strict=True):
            if not one:
                parameter.grad = None
            elif not parameter.dim():
                mean = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                dist.all_reduce(mean)
                parameter.grad = mean / self.processes.size
        self._used.clear()

    def _gathered(self, module: nn.Module, name_of_module: str) -> None:
        """The whole weights of a unit are in memory: the same tensors as in the last step, with other values."""
        forget(module)
        for name, parameter in module.named_parameters(name_of_module):
            trained = parameter.requires_grad and not isinstance(parameter, DTensor)
            if trained and name not in self._watched:
                self._watched.add(name)
                parameter.register_post_accumulate_grad_hook(
                    lambda _, name=name: self._used.add(name)
                )


def engine_for(model: nn.Module, options: TrainOptions, processes: Processes) -> Engine:
    """Raises ConfigError for a model that cannot be shared as ``options.parallel`` says."""
    if processes.size == 1:
        return Engine(model, options, processes)
    kind = {"ddp": Replicated, "fsdp2": Sharded}[options.parallel]
    return kind(model, options, processes)


def own_numbers(step: int, accumulation: int, processes: Processes) -> range:
    """The micro-batches of a step that this process takes; all processes' are the step's, however many they are.

    Raises ConfigError where they cannot be shared evenly.
    """
    own, left = divmod(accumulation, processes.size)
    if left or not own:
        raise ConfigError(
            f"accumulation, the micro-batches of a step, must be a multiple of the {processes.size} processes, got "
            f"{accumulation}; set it to one and [mix] to the samples of one micro-batch"
        )
    first = step * accumulation + processes.rank * own
    return range(first, first + own)


def clip(parameters: Iterable[Tensor], limit: float) -> float:
    """The norm of the whole gradient, of all processes' parts, before it is cut down to ``limit``."""
    parameters = list(parameters)
    # PyTorch takes parts and whole tensors in calls of their own.
    kinds = [[p for p in parameters if isinstance(p, DTensor) is parts] for parts in (True, False)]
    kinds = [kind for kind in kinds if any(p.grad is not None for p in kind)]
    norms = [nn.utils.get_total_norm([p.grad for p in own if p.grad is not None]) for own in kinds]
    norms = [own.full_tensor() if isinstance(own, DTensor) else own for own in norms]
    norm = (
        norms[0]
        if len(norms) == 1
        else torch.linalg.vector_norm(torch.stack(norms or [torch.zeros(())]))
    )
    for own in kinds:
        nn.utils.clip_grads_with_norm_(own, limit, norm)
    return float(norm)


def whole(state: Mapping[str, Tensor], processes: Processes) -> dict[str, Tensor]:
    """Tensors with the parts of all processes, on rank 0; nothing elsewhere."""
    found = {}
    for name, tensor in state.items():
        full = tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
        if processes.leads:
            found[name] = full
    return found


def read_again(
    model: M, make: Callable[[], M], folder: Path, done: TrainReport, processes: Processes
) -> M:
    """The model of a run that is done, whole: of several processes each may have a part, the run's folder has all."""
    if not done.complete or processes.size == 1:
        return model
    model = make()
    load_checkpoint(model, folder / "model.safetensors")
    return model


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _check_version() -> None:
    if not hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        raise ConfigError(
            f'parallel = "fsdp2" needs a newer PyTorch, such as 2.13, this is {torch.__version__}'
        )
