"""The same job on Ray Data: actors make shards, Ray restarts those that die and gives their shard to another."""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from beit3_fast import errors
from beit3_fast.embed.work import Bar, Work, telling_of_dead_workers
from beit3_fast.errors import ConfigError, InputError


def check_ray() -> None:
    """Raises ConfigError where Ray Data does not import."""
    try:
        import ray.data  # noqa: F401
    # its parts need packages of certain versions
    except Exception as error:
        raise ConfigError(
            f"engine='ray' needs Ray Data, which does not import ({error}); pip install 'ray[data]', or use torchrun"
        ) from error


def make_with_ray(
    count: int | None,
    work: Work,
    todo: Sequence[int],
    bar: Bar,
    record: Callable[[int, dict[str, Any]], None],
) -> None:
    """The engine of ``count`` actors. Raises ConfigError where the cluster has no room for them."""
    import ray

    if not todo:
        return
    if not ray.is_initialized():
        ray.init(include_dashboard=False, configure_logging=False)
    there = ray.cluster_resources()
    gpus = int(there.get("GPU", 0)) if next(work.model.parameters()).is_cuda else 0
    nodes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    count = min(count or gpus or len(nodes), len(todo))
    processors = int(there.get("CPU", 1))
    if count > (gpus or processors):
        raise ConfigError(
            f"engine_workers must be at most {gpus or processors}, the {'GPUs' if gpus else 'processors'} of this Ray "
            f"cluster, got {count}"
        )
    # an actor lives on one node
    share = max(1, min(processors // count, int(max(nodes))))
    needs = {"num_gpus": 1} if gpus else {"num_cpus": share}
    # kept here as long as the job takes: an actor that is started again asks for it once more
    reference = ray.put(work)
    with _quiet():
        rows = ray.data.from_items(
            [{"number": number} for number in todo], override_num_blocks=len(todo)
        )
        made = rows.map(
            _Maker,
            fn_constructor_args=([reference],),
            compute=ray.data.ActorPoolStrategy(size=count),
            **needs,
        )
        try:
            for row in made.iter_rows():
                if row["error"]:
                    kind = getattr(errors, row["error"], errors.Beit3FastError)
                    raise kind(row["shard"])
                shard = json.loads(row["shard"])
                bar.add(work.left(row["number"]), shard["skipped"])
                record(row["number"], shard)
        except ray.exceptions.RayError as error:
            first = str(error).strip().splitlines()[0]
            raise InputError(
                f"Ray ended the job ({first}); the same call again goes on from the shards that are done"
            ) from error


class _Maker:
    """An actor. An error of ours is told as such: Ray would wrap it, and try the same again."""

    def __init__(self, reference: list[Any]) -> None:
        import ray

        self.work: Work = ray.get(reference[0])

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        number = row["number"]
        try:
            with telling_of_dead_workers():
                ((_, shard),) = self.work.shards([number], _Silent())
        except errors.Beit3FastError as error:
            return {"number": number, "error": type(error).__name__, "shard": str(error)}
        return {"number": number, "error": "", "shard": json.dumps(shard)}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Ray Data without its own progress: there is a bar already, and stdout belongs to the report."""
    import ray

    context, log = ray.data.DataContext.get_current(), logging.getLogger("ray.data")
    before = context.enable_progress_bars, log.level
    context.enable_progress_bars = False
    log.setLevel(logging.WARNING)
    try:
        yield
    finally:
        context.enable_progress_bars = before[0]
        log.setLevel(before[1])


class _Silent:
    def add(self, done: int, skipped: int = 0) -> None:
        pass

    def clear_line(self) -> None:
        pass
