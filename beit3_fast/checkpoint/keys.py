"""Names in checkpoint files: what they may be wrapped in, and which a model may do without.

The official layout is the layout of our models, so there is nothing to translate; these tables say what a file may
carry beside or instead of it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from beit3_fast.checkpoint import timm_names
from beit3_fast.errors import CheckpointError

WRAPPERS = ("model", "module", "model_ema", "model_state", "state_dict")
"""Entries of a file that hold the weights, the preferred one first."""

_MAX_WRAPPERS = 8

PREFIXES = ("module.", "_orig_mod.", "model.")
"""What DistributedDataParallel, torch.compile and Lightning put before every name."""

BACKBONE = "beit3."
"""What the official task models put before the names of the backbone."""

_BACKBONE_ROOTS = ("text_embed.", "vision_embed.", "encoder.")

HEADS = (
    "head",
    "fc_norm",
    "pooler",
    "mlm_head",
    "mim_head",
    "vision_head",
    "language_head",
    "logit_scale",
)
"""The heads of all tasks, as prefixes: ``allow_missing=HEADS`` starts fine-tuning from a backbone or another task."""

FOREIGN_HEADS = {
    "masked-language head": r"mlm_head\.(weight|bias)",
    "masked-image head": r"mim_head\.(weight|bias)",
    "classification head": r"(head|fc_norm)\.(weight|bias)",
    "question-answering head": r"(pooler\.(norm|dense)|head\.[013])\.(weight|bias)",
    "visual-reasoning head": r"head\.(norm[12]|dense[12])\.(weight|bias)",
    "contrastive head": r"(vision|language)_head\.weight|logit_scale",
}
"""Heads that a file may carry and a model of another task has no place for: dropped, and reported.

Pretraining files carry the masked-language and masked-image heads, contrastively tuned ones the contrastive head.
"""

TEACHER = re.compile(r"(teacher_model|scaling_layer|loss)\..*")
"""What files of a visual tokenizer carry of its training: the teacher, and how images were scaled for it."""

_CODEBOOK = "quantize.embedding.weight"

FINAL_NORM = re.compile(r"(^|.*\.)encoder\.layer_norm\..*")
"""Absent in classification and question-answering models (``normalize_output=False``), present in pretraining files."""

_BRANCH_PARTS = {
    "vision": {"A", "vision_embed", "vision_head", "mim_head"},
    "text": {"B", "text_embed", "language_head", "mlm_head"},
}
_BRANCH_MARKS = {"vision": {"A", "vision_embed"}, "text": {"B", "text_embed"}}
_EXPERT = "C"

_FOLDS = (
    r"\blayers\.(\d{1,6})\.",
    r"\.(weight|bias)$",
    r"\.([ABC])\.",
    r"\.(q|k|v|out)_proj\.",
)


def unwrap(
    content: Any, key: str | None, depth: int = 0
) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """The table of named tensors in what a file holds, and the names of the entries beside it.

    ``key`` names the entry to take; ``depth`` counts the dictionaries around ``content``. Raises CheckpointError when
    there is no such table.
    """
    if depth > _MAX_WRAPPERS:
        raise CheckpointError(f"its weights lie in more than {_MAX_WRAPPERS} dictionaries")
    if not isinstance(content, Mapping):
        raise CheckpointError(
            f"it holds a {type(content).__name__} where a dictionary of named tensors was expected"
        )
    # an unpickled dictionary may carry attributes that hide its methods
    items = dict(dict.items(content)) if isinstance(content, dict) else dict(content.items())
    if key is not None and key not in items:
        raise CheckpointError(f"it has no entry {key!r}; its entries are {_some(items)}")
    names = [key] if key is not None else [name for name in WRAPPERS if name in items]
    wrapper = next((name for name in names if isinstance(items[name], Mapping)), None)
    if wrapper is not None:
        state, _ = unwrap(items.pop(wrapper), None, depth + 1)
        return state, tuple(str(name) for name in items)
    if not items:
        raise CheckpointError("it holds no tensors")
    if not any(isinstance(value, Tensor) for value in items.values()):
        what = "an optimizer's state but no weights" if _is_optimizer(items) else "no weights"
        raise CheckpointError(
            f"it holds {what}: its entries are {_some(items)}, "
            f"and weights are looked for under {', '.join(WRAPPERS)}"
        )
    for name, value in items.items():
        if not isinstance(name, str):
            raise CheckpointError(f"a tensor in it is named by {name!r}, which is no text")
        if not isinstance(value, Tensor):
            raise CheckpointError(
                f"{name} in it is a {type(value).__name__} and should be a tensor"
            )
    return items, ()


def fit(state: Mapping[str, Tensor], wanted: Iterable[str]) -> tuple[dict[str, Tensor], list[str]]:
    """``state`` under the names that a model with the names ``wanted`` uses, and remarks on what was done.

    Raises CheckpointError when two entries would get one name.
    """
    wanted = set(wanted)
    remarks: list[str] = []
    names = {name: name for name in state}
    while prefix := next((p for p in PREFIXES if _all_start(names.values(), p)), None):
        names = {name: new.removeprefix(prefix) for name, new in names.items()}
        remarks.append(f"the prefix {prefix!r} was taken off every name")
    renamed = {new: state[name] for name, new in names.items()}
    if timm_names.recognise(renamed):
        renamed = timm_names.translate(renamed)
        remarks.append(
            "names were translated from timm's vision-only layout; the parts that timm does not keep (mask token, "
            "the two position rows that nothing reads) are zeros"
        )
    has_prefix = any(name.startswith(BACKBONE) for name in renamed)
    wants_prefix = any(name.startswith(BACKBONE) for name in wanted)
    if wants_prefix and not has_prefix:
        renamed = {
            BACKBONE + name if name.startswith(_BACKBONE_ROOTS) else name: tensor
            for name, tensor in renamed.items()
        }
        remarks.append(f"the prefix {BACKBONE!r} was put before the names of the backbone")
    elif has_prefix and not wants_prefix:
        short = {name.removeprefix(BACKBONE): tensor for name, tensor in renamed.items()}
        if len(short) < len(renamed):
            raise CheckpointError(f"two of its names become one when {BACKBONE!r} is taken off")
        renamed = short
        remarks.append(f"the prefix {BACKBONE!r} was taken off the names of the backbone")
    return renamed, remarks


def wrapper_of(names: Iterable[str]) -> str | None:
    """The attribute of a wrapper, such as DistributedDataParallel, in which the model with these names lies."""
    names = list(names)
    prefix = next((p for p in PREFIXES if _all_start(names, p)), None)
    return None if prefix is None else prefix.rstrip(".")


class Wanted:
    """The names of a model, and what they say about names that it does not have."""

    def __init__(self, names: Iterable[str]) -> None:
        names = list(names)
        parts = {part for name in names for part in name.split(".")}
        self._branches = {branch for branch, marks in _BRANCH_MARKS.items() if parts & marks}
        self._codebook = _CODEBOOK in names
        self._final_norm = any(FINAL_NORM.fullmatch(name) for name in names)
        self._heads = {
            head
            for head, pattern in FOREIGN_HEADS.items()
            if any(re.fullmatch(pattern, name) for name in names)
        }

    def why_foreign(self, name: str) -> str | None:
        """Why the model has no place for ``name`` and may drop it; None where that would hide a mistake."""
        parts = set(name.split("."))
        for branch, belongs in _BRANCH_PARTS.items():
            if parts & belongs and self._branches and branch not in self._branches:
                return f"the model has no {branch} branch"
        if _EXPERT in parts and len(self._branches) == 1:
            return "the model has one branch and so no vision-language experts"
        if self._codebook and TEACHER.fullmatch(name):
            return "the tokenizer's teacher is not part of it"
        if FINAL_NORM.fullmatch(name) and not self._final_norm:
            return "the model has no final LayerNorm"
        for head, pattern in FOREIGN_HEADS.items():
            if re.fullmatch(pattern, name) and head not in self._heads:
                return f"the model has no {head}"
        return None


def all_heads(names: Iterable[str]) -> bool:
    """True when every name lies in the head of some task."""
    return all(matches(name, HEADS) for name in names)


def matches(name: str, prefixes: str | Sequence[str]) -> bool:
    """True when ``name`` is one of the prefixes or lies under one: "head" covers head.weight, not head_norm.weight."""
    listed = (prefixes,) if isinstance(prefixes, str) else prefixes
    return any(name == p.rstrip(".") or name.startswith(p.rstrip(".") + ".") for p in listed)


def shorten(names: Iterable[str]) -> list[str]:
    """All names, those that differ in one place only folded into one: ``layers.{0-11}.ffn.{A,B}.fc1.{weight,bias}``."""
    folded = list(names)
    for pattern in _FOLDS:
        groups: dict[tuple[str, str], list[str]] = defaultdict(list)
        for name in folded:
            match = re.search(pattern, name)
            place = (name[: match.start(1)], name[match.end(1) :]) if match else (name, "")
            groups[place].extend(match.groups() if match else ())
        folded = [before + _braces(found) + after for (before, after), found in groups.items()]
    return folded


def size_of(shapes: Mapping[str, Sequence[int]]) -> tuple[int, int | None]:
    """Number of layers and embed width, told from names and shapes; None for an unknown width."""
    layers = {m[1] for name in shapes if (m := re.search(r"\blayers\.(\d{1,6})\.", name))}
    tables = (shape for name, shape in shapes.items() if "embed_positions" in name and shape)
    return len(layers), next((shape[-1] for shape in tables), None)


def describe(shapes: Mapping[str, Sequence[int]]) -> str:
    """The size of a model and its heads in a few words, told from names and shapes."""
    layers, width = size_of(shapes)
    words = [f"{len(shapes)} tensors", f"{layers} layers"]
    if width is not None:
        words.append(f"width {width}")
    heads = [head for head, p in FOREIGN_HEADS.items() if any(re.fullmatch(p, n) for n in shapes)]
    return ", ".join(words + [f"a {head}" for head in heads])


def _braces(values: list[str]) -> str:
    if len(values) < 2:
        return "".join(values)
    if not all(value.isdigit() for value in values):
        return "{" + ",".join(values) + "}"
    runs: list[list[int]] = []
    for number in sorted(map(int, values)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{a}-{b}" if a < b else f"{a}" for a, b in runs) + "}"


def _all_start(names: Iterable[str], prefix: str) -> bool:
    names = list(names)
    return bool(names) and all(name.startswith(prefix) for name in names)


def _is_optimizer(items: Mapping[Any, Any]) -> bool:
    return "optimizer" in items or {"state", "param_groups"} <= set(items)


def _some(items: Iterable[Any], limit: int = 12) -> str:
    names = [str(item) for item in items]
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
