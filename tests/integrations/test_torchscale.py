"""``accelerate`` on unmodified torchscale models: what it changes, what it leaves, and what it says."""

from __future__ import annotations

import copy
import importlib.util
import inspect
import io
import logging
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from _compat import (
    SHAPES,
    fill,
    impls,
    import_torchscale,
    need_torchscale,
    official_task,
    torchscale_args,
    torchscale_beit3,
    torchscale_model,
)
from torch import Tensor, nn

import beit3_fast
from beit3_fast import derived
from beit3_fast.config import SIZES
from beit3_fast.errors import ConfigError, KernelUnavailable
from beit3_fast.integrations.torchscale import accelerate, accelerated_status, restore
from beit3_fast.model import BEiT3
from beit3_fast.parity import assert_parity, model_parity

need_torchscale()

CONFIG = SHAPES["base"]
BATCH, TEXT, VISION = 3, 6, 10


def pair(**changes: Any) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    padding = torch.arange(TEXT)[None] >= torch.tensor([[6], [2], [4]])
    call = {
        "visual_tokens": torch.randn(BATCH, 3, 48, 48, generator=generator),
        "textual_tokens": torch.randint(0, 120, (BATCH, TEXT), generator=generator),
        "text_padding_position": padding,
    }
    return {name: value for name, value in {**call, **changes}.items() if value is not None}


def image() -> dict[str, Any]:
    return {"visual_tokens": pair()["visual_tokens"]}


def text() -> dict[str, Any]:
    return pair(visual_tokens=None)


def encoder_call(seed: int = 2, **changes: Any) -> dict[str, Any]:
    """Arguments of ``Encoder.forward`` for a pair of 10 + 6 tokens."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = torch.randn(BATCH, VISION + TEXT, CONFIG.embed_dim, generator=generator)
    call = {"src_tokens": None, "token_embeddings": embeddings, "multiway_split_position": VISION}
    return {**call, **changes}


def accelerated_copy(model: Any = None, impl: str = "auto") -> Any:
    return accelerate(copy.deepcopy(torchscale_model("base") if model is None else model), impl)


@torch.no_grad()
def assert_same(ours: Any, theirs: Any, call: dict[str, Any]) -> None:
    """Equal to torchscale by the rule, where there is no padding."""
    mine, truth = ours(**call), theirs(**call)
    assert set(mine) == set(truth)
    real = ~truth["encoder_padding_mask"].bool()
    for key in ("encoder_out", "encoder_embedding"):
        assert_parity(model_parity(mine[key][real], truth[key][real]), key)
    for one, other in zip(mine["encoder_states"], truth["encoder_states"], strict=True):
        assert_parity(model_parity(one[real], other[real]), "encoder_states")


def reasons(model: Any) -> tuple[str, ...]:
    return tuple(reason for s in accelerated_status(model) for reason in s.fallback_reasons)


@pytest.fixture
def runs_fast(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any, dict[str, Any]], bool]:
    """Whether a call of a model reaches the packed computation."""
    from beit3_fast.integrations import _encoder_forward

    calls: list[str] = []
    for name in ("encode_rows", "encode_incremental"):
        real = getattr(_encoder_forward, name)

        def spy(*args: Any, real: Any = real, name: str = name, **kwargs: Any) -> Any:
            calls.append(name)
            return real(*args, **kwargs)

        monkeypatch.setattr(_encoder_forward, name, spy)

    def runs(model: Any, call: dict[str, Any]) -> bool:
        calls.clear()
        model(**call)
        return bool(calls)

    return runs


# What stays as it was


def test_nothing_but_one_forward_changes() -> None:
    model = torchscale_beit3(CONFIG)
    state, names = model.state_dict(), [name for name, _ in model.named_parameters()]
    parameters, modules = list(model.parameters()), dict(model.named_modules())
    attributes = {name: set(vars(module)) for name, module in modules.items()}
    assert accelerate(model) is model
    assert all(a is b for a, b in zip(model.parameters(), parameters, strict=True))
    assert [name for name, _ in model.named_parameters()] == names
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    assert dict(model.named_modules()) == modules
    changed = {n: set(vars(m)) ^ attributes[n] for n, m in model.named_modules()}
    assert {name: change for name, change in changed.items() if change} == {"encoder": {"forward"}}
    assert inspect.signature(model.encoder.forward) == inspect.signature(
        type(model.encoder).forward.__get__(model.encoder)
    )
    model.load_state_dict(state, strict=True)


def test_restore_leaves_no_trace() -> None:
    model = torchscale_beit3(CONFIG)
    before = dict(vars(model.encoder))
    assert restore(model) is model
    accelerate(model)
    model(**pair())
    assert restore(model) is model
    assert vars(model.encoder) == before
    assert not any(parameter in derived._store for parameter in model.parameters())
    assert torch.equal(
        model(**pair())["encoder_out"], torchscale_model("base")(**pair())["encoder_out"]
    )


def test_twice_is_once(runs_fast: Any) -> None:
    model = accelerated_copy()
    forward = model.encoder.forward
    assert accelerate(model, impl="reference") is model
    assert model.encoder.forward is forward
    assert accelerated_status(model)[0].impl == "reference"
    assert runs_fast(model, pair())
    restore(model)
    assert "forward" not in vars(model.encoder)


def test_modes_and_split_positions_survive_the_trial() -> None:
    model = torchscale_beit3(CONFIG)
    model.encoder.layers[0].train()
    model.encoder.layers[1].ffn.split_position = 3
    modes = [module.training for module in model.modules()]
    accelerate(model)
    assert [module.training for module in model.modules()] == modes
    assert model.encoder.layers[1].ffn.split_position == 3
    assert model.encoder.layers[0].ffn.split_position == -1


def test_optimizer_groups_see_the_same_parameters_and_updates() -> None:
    """Two steps of AdamW with layer decay give the same weights."""

    def groups(model: Any) -> list[dict[str, Any]]:
        decay: dict[int, list[nn.Parameter]] = {}
        for name, parameter in model.named_parameters():
            layer = int(name.split("layers.")[1].split(".")[0]) + 1 if "layers." in name else 0
            decay.setdefault(layer, []).append(parameter)
        return [{"params": p, "lr": 1e-3 * 0.7 ** (3 - n)} for n, p in sorted(decay.items())]

    models = [torchscale_beit3(CONFIG), accelerate(torchscale_beit3(CONFIG))]
    for model in models:
        optimizer = torch.optim.AdamW(groups(model.train()), betas=(0.9, 0.98), eps=1e-4)
        for call in (pair(), image()):
            optimizer.zero_grad()
            model(**call)["encoder_out"][:, 0].pow(2).sum().backward()
            optimizer.step()
    theirs, ours = (dict(model.named_parameters()) for model in models)
    for name, parameter in theirs.items():
        torch.testing.assert_close(ours[name], parameter, rtol=1e-4, atol=1e-5)
    assert not reasons(models[1])


@pytest.mark.parametrize("impl", ["composite", "auto"])
@torch.no_grad()
def test_weights_changed_in_place_are_seen(impl: str) -> None:
    """Nothing derived from old weights may be used: load_state_dict, an optimizer's step, a new dtype."""
    model, theirs = accelerated_copy(impl=impl), copy.deepcopy(torchscale_model("base"))
    assert_same(model, theirs, pair())
    smaller = {name: 0.9 * tensor for name, tensor in theirs.state_dict().items()}
    for one in (model, theirs):
        one.load_state_dict(smaller)
    assert_same(model, theirs, pair())
    for one in (model, theirs):
        for parameter in one.parameters():
            parameter.add_(0.01)
    assert_same(model, theirs, pair())
    model.double().float()
    assert_same(model, theirs, pair())


@torch.no_grad()
def test_float64() -> None:
    """torchscale's softmax and GELU stay in fp32 then, so it is no closer than that."""
    theirs = torchscale_model("base")
    model = accelerate(copy.deepcopy(theirs).double())
    call = {**pair(), "visual_tokens": pair()["visual_tokens"].double()}
    out, truth = model(**call)["encoder_out"], theirs(**pair())["encoder_out"]
    assert out.dtype is torch.float64
    assert_parity(model_parity(out[0].float(), truth[0]))


@pytest.mark.parametrize("how", ["deepcopy", "pickle", "torch.save"])
def test_copies_are_accelerated_and_independent(how: str, runs_fast: Any) -> None:
    model = accelerated_copy()
    model(**pair())
    if how == "deepcopy":
        other = copy.deepcopy(model)
    elif how == "pickle":
        other = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        other = torch.load(file, weights_only=False)
    with torch.no_grad():
        expected = model(**pair())["encoder_out"]
        for parameter in model.parameters():
            parameter.zero_()
    assert runs_fast(other, pair())
    assert_parity(model_parity(other(**pair())["encoder_out"].detach(), expected), how)
    # Its own modules are watched, not those of the model that it was copied from.
    other.encoder.layers[0].ffn.A.fc1.register_forward_hook(lambda *_: None)
    assert not runs_fast(other, pair())
    assert runs_fast(model, pair())
    other = copy.deepcopy(model)
    own_forward(other)
    assert not runs_fast(other, pair())
    assert runs_fast(model, pair())
    restore(other)
    assert "forward" in vars(model.encoder)
    assert "forward" not in vars(other.encoder)


# What is recognised


@pytest.mark.parametrize("task", ["imageclassification", "vqav2", "captioning"])
def test_a_wrapper_that_holds_a_beit3(task: str) -> None:
    model = accelerate(official_task(task, CONFIG))
    assert [(s.name, s.obstacle) for s in accelerated_status(model)] == [("beit3.encoder", None)]


def test_several_models_in_one_and_an_encoder_alone(runs_fast: Any) -> None:
    towers = nn.ModuleDict({n: torchscale_beit3(CONFIG) for n in ("student", "teacher")})
    accelerate(towers)
    names = [status.name for status in accelerated_status(towers)]
    assert names == ["student.encoder", "teacher.encoder"]
    assert runs_fast(towers["teacher"], pair())
    encoder = accelerate(torchscale_beit3(CONFIG).encoder)
    assert accelerated_status(encoder)[0].name == ""
    assert runs_fast(encoder, encoder_call())


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(3, 3),
        lambda: BEiT3(SIZES["tiny"]),
        lambda: nn.TransformerEncoderLayer(8, 2),
    ],
    ids=["linear", "our own", "torch's"],
)
def test_nothing_to_accelerate(make: Callable[[], nn.Module]) -> None:
    with pytest.raises(ConfigError, match="Encoder"):
        accelerate(make())


def test_unknown_and_unavailable_implementations() -> None:
    model = torchscale_beit3(CONFIG)
    with pytest.raises(ConfigError, match="'fastest'"):
        accelerate(model, impl="fastest")
    with pytest.raises(KernelUnavailable, match="cuda"):
        accelerate(model, impl="cuda")
    assert "forward" not in vars(model.encoder)


def test_a_forward_put_there_by_others_is_not_overwritten() -> None:
    model = torchscale_beit3(CONFIG)
    model.encoder.forward = lambda **_: {}
    for act in (accelerate, restore):
        with pytest.raises(ConfigError, match="other code"):
            act(model)


@pytest.fixture(scope="module")
def vendored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str], Any]:
    """torchscale's BEiT3 from a copy of its source under another name, one line of it changed."""
    import_torchscale()
    import torchscale

    source = Path(inspect.getfile(torchscale)).parent

    def make(name: str, old: str = "", new: str = "") -> Any:
        root = tmp_path_factory.mktemp(name)
        found = False
        for file in source.rglob("*.py"):
            code = file.read_text()
            found |= old in code
            code = code.replace("torchscale", name).replace(old or "\0", new)
            target = root / name / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(code)
        assert found, old
        sys.path.insert(0, str(root))
        try:
            module = importlib.import_module(f"{name}.model.BEiT3")
        finally:
            sys.path.remove(str(root))
        model = module.BEiT3(torchscale_args(CONFIG)).eval()
        fill(model)
        return model

    return make


def test_a_vendored_copy_is_recognised(vendored: Any, runs_fast: Any) -> None:
    model = accelerate(vendored("vendored_torchscale"))
    assert type(model).__module__ == "vendored_torchscale.model.BEiT3"
    assert runs_fast(model, pair())
    assert_same(model, torchscale_model("base"), pair())


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "x = self.activation_fn(x.float()).type_as(x)",
            "x = F.gelu(x, approximate='tanh')",
        ),
        ("q *= self.scaling", "q *= self.scaling * 1.2"),
        ("return residual * self.alpha + x", "return residual + x * 0.9"),
        ("if key_padding_mask is not None:", "if False:"),
        ("attn_mask = attn_mask.unsqueeze(0)", "attn_mask = 0 * attn_mask.unsqueeze(0)"),
        ("x = self.layer_norm(x)", "x = self.layer_norm(x) + 0.01"),
        ("torch.arange(2, x.size(1) + 2", "torch.arange(1, x.size(1) + 1"),
    ],
    ids=["activation", "scaling", "residual", "padding", "mask", "output", "positions"],
)
@torch.no_grad()
def test_a_vendored_copy_that_computes_something_else_is_left_alone(
    old: str, new: str, vendored: Any, runs_fast: Any, request: pytest.FixtureRequest
) -> None:
    model = vendored(f"changed_{abs(hash(request.node.name))}", old, new)
    before = model(**pair())["encoder_out"]
    accelerate(model)
    same = "torch.arange" in old  # Position tables are called as modules, changes in them included.
    assert (accelerated_status(model)[0].obstacle is None) == same
    assert runs_fast(model, pair()) == same
    if not same:
        assert torch.equal(model(**pair())["encoder_out"], before)


def test_a_copy_with_another_signature_is_left_alone(vendored: Any) -> None:
    model = vendored(
        "another_signature",
        "        encoder_padding_mask=None,\n        attn_mask=None,\n        return_all_hiddens=False,",
        "        attn_mask=None,\n        encoder_padding_mask=None,\n        return_all_hiddens=False,",
    )
    accelerate(model)
    assert "signature" in str(accelerated_status(model)[0].obstacle)


# Calls that torchscale's users make


@pytest.mark.parametrize(("impl", "dtype"), impls("fp32"))
@pytest.mark.parametrize("split", [None, -1, 0, 1, 2, VISION])
@pytest.mark.parametrize("hiddens", [False, True])
def test_the_encoder_called_directly(
    split: int | None, hiddens: bool, impl: str, dtype: str, runs_fast: Any
) -> None:
    model = accelerate(torchscale_beit3(CONFIG), impl)
    call = encoder_call(multiway_split_position=split, return_all_hiddens=hiddens)
    if split in (None, -1):
        call["token_embeddings"] = call["token_embeddings"][:, :VISION]
    if split == 2:
        call["token_embeddings"] = call["token_embeddings"][:, :3]
    assert runs_fast(model.encoder, call)
    assert_same(model.encoder, torchscale_beit3(CONFIG).encoder, call)


@pytest.mark.parametrize("split", [-1, 0])
@pytest.mark.parametrize("batch", [1, BATCH])
@torch.no_grad()
def test_positions_given_for_one_modality(split: int, batch: int, runs_fast: Any) -> None:
    model, theirs = accelerated_copy(), torchscale_model("base")
    positions = torch.randint(0, 12, (batch, VISION + TEXT))
    call = encoder_call(multiway_split_position=split, positions=positions)
    assert runs_fast(model.encoder, call)
    assert_same(model.encoder, theirs.encoder, call)


def test_positional_arguments() -> None:
    model, theirs = accelerated_copy(), torchscale_model("base")
    padding = torch.zeros(BATCH, VISION + TEXT, dtype=torch.bool)
    padding[1, -2:] = True
    call = encoder_call()
    args = (None, padding, None, True, call["token_embeddings"], VISION, False)
    mine, truth = model.encoder(*args), theirs.encoder(*args)
    assert len(mine["encoder_states"]) == 3
    assert_parity(model_parity(mine["encoder_out"][0].detach(), truth["encoder_out"][0].detach()))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float32])
@pytest.mark.parametrize(
    "where", ["text", "vision", "both", "all text of one", "all vision of one"]
)
def test_padding_anywhere_in_any_dtype(where: str, dtype: torch.dtype, runs_fast: Any) -> None:
    """The encoder's mask covers image tokens too; forks pad there."""
    padding = torch.zeros(BATCH, VISION + TEXT, dtype=torch.bool)
    if where in ("text", "both"):
        padding[0, -3:] = padding[2, VISION + 1] = True
    if where in ("vision", "both"):
        padding[1, 2:5] = padding[2, VISION - 1] = True
    if where == "all text of one":
        padding[1, VISION:] = True
    if where == "all vision of one":
        padding[0, :VISION] = True
    model, theirs = accelerated_copy(), torchscale_model("base")
    call = encoder_call(encoder_padding_mask=padding.to(dtype), return_all_hiddens=True)
    assert runs_fast(model.encoder, call)
    assert_same(model.encoder, theirs.encoder, call)
    out = model.encoder(**call)
    assert out["encoder_padding_mask"] is call["encoder_padding_mask"]
    for states in (out["encoder_out"], *out["encoder_states"]):
        assert not states[padding].any()


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["seq2seq", "causal", "arbitrary"])
@pytest.mark.parametrize("padded", [False, True])
def test_masks(kind: str, dtype: torch.dtype, padded: bool, runs_fast: Any) -> None:
    tokens = VISION + TEXT
    blocked = torch.ones(tokens, tokens)
    if kind == "causal":
        blocked = blocked.triu(1)
    elif kind == "seq2seq":
        blocked[:, :VISION] = 0
        blocked[VISION:, VISION:] = torch.ones(TEXT, TEXT).triu(1)
    else:
        blocked = (torch.rand(tokens, tokens) > 0.5).float().fill_diagonal_(0) * float("-inf")
        blocked = blocked.nan_to_num(0.0, neginf=-1e30)
        if dtype in (torch.int64, torch.int32):
            blocked = (blocked != 0).float()
    call = pair(attn_mask=blocked.to(dtype), **({} if padded else {"text_padding_position": None}))
    model = accelerated_copy()
    assert runs_fast(model, call)
    assert_same(model, torchscale_model("base"), call)


@pytest.mark.parametrize("impl", ["composite", "auto"])
def test_scaled_embeddings_output_projection_and_no_sublayer_norm(
    impl: str, runs_fast: Any
) -> None:
    theirs = torchscale_beit3(
        CONFIG, no_scale_embedding=False, subln=False, no_output_layer=False, vocab_size=120
    )
    model = accelerated_copy(theirs, impl)
    assert model.encoder.output_projection is not None
    for call in (pair(), image(), text()):
        assert runs_fast(model, call)
        assert_same(model, theirs, call)
    call = encoder_call(features_only=True)
    assert model.encoder(**call)["encoder_out"].shape[-1] == CONFIG.embed_dim
    assert_same(model.encoder, theirs.encoder, call)


def test_gradients_reach_the_embeddings() -> None:
    """Prompt tuning: the token embeddings are what is learnt."""
    grads = []
    for model in (torchscale_model("base"), accelerated_copy()):
        call = encoder_call()
        call["token_embeddings"].requires_grad_()
        padding = torch.zeros(BATCH, VISION + TEXT, dtype=torch.bool)
        padding[1, -2:] = True
        model.encoder(**call, encoder_padding_mask=padding)["encoder_out"][:, :3].sum().backward()
        grads.append(call["token_embeddings"].grad)
    assert_parity(model_parity(grads[1], grads[0], gradient=True))


def test_activation_checkpointing(monkeypatch: pytest.MonkeyPatch, runs_fast: Any) -> None:
    """fairscale's wrapper becomes PyTorch's: same gradients, and every layer is computed twice."""
    from beit3_fast.model import encoder

    theirs = torchscale_beit3(CONFIG, checkpoint_activations=True, drop_path_rate=0.3).train()
    models = [
        theirs,
        accelerate(torchscale_beit3(CONFIG, checkpoint_activations=True, drop_path_rate=0.3)),
    ]
    models[1].train()
    layers: list[Any] = []
    real = encoder.encoder_layer

    def count(layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        layers.append(layer)
        return real(layer, *args, **kwargs)

    monkeypatch.setattr(encoder, "encoder_layer", count)
    grads = []
    for model in models:
        torch.manual_seed(4)
        model(**pair())["encoder_out"][:, 0].sum().backward()
        grads.append({name: p.grad for name, p in model.named_parameters()})
    assert len(layers) == 2 * CONFIG.num_layers
    for name, grad in grads[0].items():
        if grad is not None and not name.endswith(("k_proj.A.bias", "k_proj.B.bias")):
            mine = grads[1][name]
            assert mine is not None
            assert_parity(model_parity(mine, grad, gradient=True), name)
    assert runs_fast(models[1], pair())
    assert not reasons(models[1])


def test_decoding_can_change_sides() -> None:
    """A cache filled on the fast path is good for torchscale's own code, and the other way round."""
    models = {"theirs": torchscale_model("base"), "ours": accelerated_copy()}
    outputs = []
    for turns in (
        ("theirs",) * 4,
        ("ours", "theirs", "ours", "ours"),
        ("theirs", "ours", "theirs", "ours"),
    ):
        state: dict[int, dict[str, Tensor]] = {i: {} for i in range(CONFIG.num_layers)}
        for step, turn in enumerate(turns):
            call = {"textual_tokens": pair()["textual_tokens"][:, [step, 5]]}
            if step == 0:
                call["visual_tokens"] = pair()["visual_tokens"]
            else:
                call["positions"] = torch.tensor([[step + 2, step + 3]])
            with torch.no_grad():
                out = models[turn](incremental_state=state, **call)["encoder_out"]
            for cache in state.values():
                for key in cache:
                    cache[key] = cache[key][:, :, :-1]
        outputs.append(out)
    for out in outputs[1:]:
        assert_parity(model_parity(out, outputs[0]))
    assert not reasons(models["ours"])


def test_decoding_with_padding_and_a_list_of_caches(runs_fast: Any) -> None:
    """Padding zeroes embeddings and masks nothing while decoding, as in torchscale."""
    model, theirs = accelerated_copy(), torchscale_model("base")
    padding = torch.zeros(BATCH, VISION + TEXT, dtype=torch.int64)
    padding[1, -2:] = 1
    outputs = []
    for one in (model, theirs):
        call = encoder_call(encoder_padding_mask=padding, return_all_hiddens=True)
        out = one.encoder(**call, incremental_state=[{} for _ in range(CONFIG.num_layers)])
        outputs.append([out["encoder_out"], *out["encoder_states"]])
    for mine, true in zip(*outputs, strict=True):
        assert_parity(model_parity(mine.detach(), true.detach()))


@pytest.mark.parametrize("kind", ["tuple", "empty", "short"])
def test_caches_in_another_form_are_left_to_torchscale(kind: str) -> None:
    outcomes = []
    for one in (accelerated_copy(), torchscale_model("base")):
        state: Any = {
            "tuple": tuple({} for _ in range(CONFIG.num_layers)),
            "empty": {},
            "short": [{}],
        }[kind]
        try:
            outcomes.append(one.encoder(**encoder_call(), incremental_state=state)["encoder_out"])
        except (KeyError, IndexError) as error:
            outcomes.append(repr(error))
    mine, true = outcomes
    assert torch.equal(mine, true) if isinstance(true, Tensor) else mine == true


# The split position that torchscale keeps in its modules


def set_split(model: Any, split: int) -> None:
    for module in model.modules():
        if hasattr(module, "split_position"):
            module.split_position = split


@pytest.mark.parametrize(
    "script", ["stored", "implied", "stored after", "fallback between", "then own"]
)
@torch.no_grad()
def test_no_split_argument_means_what_it_means_to_torchscale(script: str) -> None:
    outputs = []
    for model in (torchscale_beit3(CONFIG), accelerate(torchscale_beit3(CONFIG))):
        if script == "stored":
            set_split(model.encoder, 4)
        else:
            model.encoder(**encoder_call(multiway_split_position=4))
        if script == "stored after":
            set_split(model.encoder, 7)
        if script == "fallback between":
            tokens = VISION + TEXT
            model.encoder(
                **encoder_call(
                    multiway_split_position=9,
                    attn_mask=torch.zeros(tokens, tokens, dtype=torch.bool),
                )
            )
        call = encoder_call(multiway_split_position=None)
        if script == "then own":
            call["anything"] = 1
        outputs.append(model.encoder(**call)["encoder_out"])
    assert_parity(model_parity(outputs[1], outputs[0]))


def test_modules_that_disagree_on_the_split_run_torchscale() -> None:
    models = [torchscale_beit3(CONFIG), accelerate(torchscale_beit3(CONFIG))]
    for model in models:
        set_split(model.encoder, 4)
        model.encoder.layers[1].ffn.split_position = 9
    theirs, ours = (m.encoder(**encoder_call(multiway_split_position=None)) for m in models)
    assert torch.equal(ours["encoder_out"], theirs["encoder_out"])
    assert "different ones" in reasons(models[1])[0]


def test_explicit_splits_do_not_touch_the_modules() -> None:
    model = accelerate(torchscale_beit3(CONFIG))
    model(**pair())
    model(**text())
    assert {m.split_position for m in model.modules() if hasattr(m, "split_position")} == {-1}


# What is left to torchscale


def lora(model: Any) -> None:
    class LoraLinear(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 1.1

    old = model.encoder.layers[1].self_attn.q_proj.A
    new = LoraLinear(old.in_features, old.out_features)
    new.load_state_dict(old.state_dict())
    model.encoder.layers[1].self_attn.q_proj.A = new


def class_changed(model: Any) -> None:
    class Half(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 0.5 * super().forward(x)

    model.encoder.layers[1].ffn.A.fc2.__class__ = Half


def own_forward(model: Any) -> None:
    layer = model.encoder.layers[0]
    real = type(layer).forward.__get__(layer)

    def forward(x: Tensor, **kwargs: Any) -> Any:
        x, aux = real(x, **kwargs)
        return x * 1.1, aux

    layer.forward = forward


def parametrized(model: Any) -> None:
    class Double(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * x

    nn.utils.parametrize.register_parametrization(
        model.encoder.layers[0].ffn.A.fc1, "weight", Double()
    )


def adapter(model: Any) -> None:
    layer = model.encoder.layers[1]
    layer.adapter = nn.Linear(CONFIG.embed_dim, CONFIG.embed_dim)
    own_forward(model)


def wrapped_layer(model: Any) -> None:
    """As FSDP and torch.compile do: another module in its place that hands attributes on."""

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def __getattr__(self, name: str) -> Any:
            return self._modules[name] if name in self._modules else getattr(self.inner, name)

        def forward(self, *args: Any, **kwargs: Any) -> Any:
            x, aux = self.inner(*args, **kwargs)
            return x + 1, aux

    model.encoder.layers[0] = Wrapped(model.encoder.layers[0])


def identity_norm(model: Any) -> None:
    model.encoder.layer_norm = nn.Identity()


def ffn_relu(model: Any) -> None:
    for layer in model.encoder.layers:
        layer.ffn.B.activation_fn = F.relu


def set_on_layers(name: str, value: Any) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        for layer in model.encoder.layers:
            setattr(layer, name, value)

    return change


def rescaled(model: Any) -> None:
    model.encoder.layers[1].self_attn.scaling *= 1.5


def hook(register: str, path: str) -> Callable[[Any], None]:
    def change(model: Any) -> None:
        module = model.encoder.get_submodule(path)
        if register == "forward":
            module.register_forward_hook(lambda module, args, out: out * 1.1)
        elif register == "pre":
            module.register_forward_pre_hook(lambda module, args: tuple(1.1 * a for a in args))
        else:
            module.register_full_backward_hook(lambda *_: None)

    return change


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "a replaced class": (lora, "LoraLinear"),
    "a class changed in place": (class_changed, "Half"),
    "a layer's own forward": (own_forward, "forward of its own"),
    "a parametrization": (parametrized, "unknown part|Parametrized"),
    "an adapter": (adapter, "adapter|forward"),
    "a wrapped layer": (wrapped_layer, "Wrapped"),
    "another output norm": (identity_norm, "Identity"),
    "a forward hook": (hook("forward", "layers.1.ffn.B.fc2"), "hook on layers.1.ffn.B.fc2"),
    "a pre-hook": (hook("pre", "layers.0.self_attn.k_proj.A"), "hook"),
    "a backward hook": (hook("backward", "layers.0.final_layer_norm.A"), "hook"),
    "a hook on the output norm": (hook("forward", "layer_norm.A"), "hook on layer_norm.A"),
    "a hook on a position table": (hook("forward", "embed_positions.B"), "hook on embed_positions"),
    "relu": (ffn_relu, "activation"),
    "alpha": (set_on_layers("alpha", 1.3), "DeepNorm"),
    "post-norm": (set_on_layers("normalize_before", False), "normalize_before"),
    "another scale": (rescaled, "scaled by"),
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("change", CHANGES)
@torch.no_grad()
def test_a_changed_encoder_runs_its_own_code(change: str, when: str, runs_fast: Any) -> None:
    """Whether it was changed before or after accelerate, and fast again once the change is gone."""
    make, reason = CHANGES[change]
    theirs, model = torchscale_beit3(CONFIG), torchscale_beit3(CONFIG)
    make(theirs)
    if when == "before":
        make(model)
        accelerate(model)
    else:
        accelerate(model)
        assert runs_fast(model, pair())
        make(model)
    assert not runs_fast(model, pair())
    assert torch.equal(model(**pair())["encoder_out"], theirs(**pair())["encoder_out"])
    (status,) = accelerated_status(model)
    pattern = pytest.importorskip("re").compile(reason)
    assert pattern.search(status.fallback_reasons[0]), status
    assert status.obstacle is not None


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"deepnorm": True, "subln": False}, "DeepNorm"),
        ({"encoder_normalize_before": False, "subln": False}, "normalize_before"),
        ({"rel_pos_buckets": 8, "max_rel_pos": 16}, "relative_position"),
        ({"xpos_rel_pos": True}, "xpos|xPos"),
        ({"layernorm_embedding": True}, "layernorm_embedding"),
        ({"activation_fn": "relu"}, "activation"),
    ],
)
@torch.no_grad()
def test_settings_that_are_not_those_of_beit3(
    settings: dict[str, Any], reason: str, runs_fast: Any
) -> None:
    theirs = torchscale_beit3(CONFIG, **settings)
    model = accelerated_copy(theirs)
    assert not runs_fast(model, pair())
    assert torch.equal(model(**pair())["encoder_out"], theirs(**pair())["encoder_out"])
    assert pytest.importorskip("re").search(reason, reasons(model)[0])


@torch.no_grad()
def test_an_encoder_that_is_not_multiway_is_left_alone() -> None:
    import_torchscale()
    from torchscale.architecture.encoder import Encoder

    table = nn.Embedding(20, CONFIG.embed_dim)
    encoder = Encoder(torchscale_args(CONFIG, multiway=False), embed_tokens=table).eval()
    tokens = torch.randint(0, 20, (2, 5))
    before = encoder(tokens)["encoder_out"]
    accelerate(encoder)
    assert torch.equal(encoder(tokens)["encoder_out"], before)
    assert "MultiwayNetwork" in reasons(encoder)[0]


@pytest.mark.parametrize("name", ["dropout", "attention_dropout", "activation_dropout"])
def test_dropout_runs_torchscale_in_training_only(name: str, runs_fast: Any) -> None:
    theirs = torchscale_beit3(CONFIG, **{name: 0.1})
    model = accelerated_copy(theirs)
    assert runs_fast(model, pair())
    assert_same(model, theirs, pair())
    model.train(), theirs.train()
    assert not runs_fast(model, pair())
    outputs = []
    for one in (model, theirs):
        torch.manual_seed(8)
        outputs.append(one(**pair())["encoder_out"])
    assert torch.equal(*outputs)
    assert reasons(model) == ("dropout of 0.1 in train mode",)
    assert runs_fast(model.eval(), pair())


@pytest.mark.parametrize("kind", ["always dropped", "not rescaled"])
def test_drop_path_of_another_kind_runs_torchscale_in_training_only(
    kind: str, runs_fast: Any
) -> None:
    theirs = torchscale_beit3(CONFIG, drop_path_rate=1.0 if kind == "always dropped" else 0.5)
    if kind == "not rescaled":
        from timm.layers import DropPath

        for layer in theirs.encoder.layers:
            layer.drop_path = DropPath(0.5, scale_by_keep=False).eval()
    model = accelerated_copy(theirs)
    assert runs_fast(model, pair())
    assert_same(model, theirs, pair())
    outputs = []
    for one in (model.train(), theirs.train()):
        torch.manual_seed(8)
        outputs.append(one(**pair())["encoder_out"])
    assert torch.equal(*outputs)
    assert "drop path" in reasons(model)[0]


SEES_NOTHING = torch.zeros(VISION + TEXT, VISION + TEXT, dtype=torch.int64)
SEES_NOTHING[3] = 1
SEES_PADDING = torch.ones(VISION + TEXT, VISION + TEXT, dtype=torch.int64).fill_diagonal_(0)
SEES_PADDING[0] = 1
SEES_PADDING[0, -1] = 0
LAST_PADDED = torch.zeros(BATCH, VISION + TEXT, dtype=torch.bool)
LAST_PADDED[1, -1] = True
VISION_PADDED = LAST_PADDED.roll(-TEXT, dims=1)
ARBITRARY = SEES_PADDING.clone()
ARBITRARY[:, :2] = 0
CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "a bool mask": ({"attn_mask": ARBITRARY.bool()}, "torch.bool"),
    "a query without keys": ({"attn_mask": SEES_NOTHING}, "every key"),
    "a query that sees padding only": (
        {"attn_mask": SEES_PADDING, "encoder_padding_mask": LAST_PADDED},
        "every key",
    ),
    "a mask over padded image tokens": (
        {"attn_mask": ARBITRARY, "encoder_padding_mask": VISION_PADDED},
        "padded image tokens",
    ),
    "soft padding": (
        {"encoder_padding_mask": LAST_PADDED.float() * 0.5},
        "other than 0 and 1",
    ),
    "unknown arguments": ({"relative_position": None}, "relative_position"),
    "a split at the end": (
        {"multiway_split_position": 4, "token_embeddings": torch.ones(BATCH, 4, CONFIG.embed_dim)},
        "split position",
    ),
}


@pytest.mark.parametrize("kind", CALLS)
@torch.no_grad()
def test_a_call_that_only_torchscale_can_do(
    kind: str, runs_fast: Any, caplog: pytest.LogCaptureFixture
) -> None:
    changes, reason = CALLS[kind]
    call = encoder_call(**changes)
    model, theirs = accelerated_copy(), torchscale_beit3(CONFIG)
    with caplog.at_level(logging.WARNING, "beit3_fast"):
        for _ in range(3):
            assert not runs_fast(model.encoder, call)
    assert torch.equal(model.encoder(**call)["encoder_out"], theirs.encoder(**call)["encoder_out"])
    assert len(reasons(model)) == 1
    assert reason in reasons(model)[0]
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1, "one line a reason"
    assert reason in said[0]
    assert runs_fast(model.encoder, encoder_call())


@torch.no_grad()
def test_positions_for_a_pair_and_errors_are_torchscales() -> None:
    model, theirs = accelerated_copy(), torchscale_beit3(CONFIG)
    for call in (
        {"src_tokens": None},
        encoder_call(positions=torch.arange(2, 18)[None]),
        encoder_call(attn_mask=torch.zeros(3, 4)),
        encoder_call(attn_mask=torch.zeros(16, 16, dtype=torch.float16).fill_diagonal_(1)),
        encoder_call(encoder_padding_mask=torch.zeros(BATCH, 3)),
        encoder_call(multiway_split_position=-2),
        encoder_call(multiway_split_position=99),
    ):
        errors = []
        for one in (model, theirs):
            try:
                one.encoder(**call)
                errors.append(None)
            except Exception as error:
                errors.append((type(error), str(error)))
        assert errors[1] is not None
        assert errors[0] == errors[1]


@torch.no_grad()
def test_decoding_calls_that_only_torchscale_can_do(runs_fast: Any) -> None:
    tokens = VISION + TEXT
    nothing = torch.zeros(tokens, tokens, dtype=torch.int64)
    nothing[2] = 1
    for changes, reason in (
        ({"attn_mask": nothing}, "every key"),
        ({"attn_mask": torch.zeros(1, tokens)}, "attn_mask of shape"),
    ):
        model, theirs = accelerated_copy(), torchscale_beit3(CONFIG)
        outputs = []
        for one in (model, theirs):
            state: dict[int, dict[str, Tensor]] = {i: {} for i in range(CONFIG.num_layers)}
            out = one.encoder(**encoder_call(**changes), incremental_state=state)
            outputs.append(out["encoder_out"])
        assert torch.equal(*outputs)
        assert reason in reasons(model)[0]
    theirs = torchscale_beit3(CONFIG, drop_path_rate=0.5)
    model = accelerated_copy(theirs).train()
    state = {i: {} for i in range(CONFIG.num_layers)}
    assert not runs_fast(model.encoder, encoder_call(incremental_state=state))
    assert "drop path" in reasons(model)[0]


def test_a_hook_on_all_modules(runs_fast: Any) -> None:
    model = accelerated_copy()
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert not runs_fast(model, pair())
    finally:
        handle.remove()
    assert runs_fast(model, pair())
    assert "all modules" in reasons(model)[0]


def test_hooks_outside_and_on_the_encoder_still_work(runs_fast: Any) -> None:
    model, seen = accelerated_copy(), []
    for name in ("encoder", "text_embed", "vision_embed"):
        model.get_submodule(name).register_forward_hook(lambda *_, name=name: seen.append(name))
    assert runs_fast(model, pair())
    assert seen == ["vision_embed", "text_embed", "encoder"]


def test_explain_names_the_implementation_and_the_reasons(
    capsys: pytest.CaptureFixture[str],
) -> None:
    model = accelerated_copy(torchscale_beit3(CONFIG, dropout=0.1), impl="reference")
    choices = {item.op: item for item in beit3_fast.explain(model)}
    assert choices["expert_linear (inference)"].impl == "reference"
    assert choices["encoder encoder"].impl == "beit3_fast"
    model.train()(**pair())
    beit3_fast.explain(model)
    assert "dropout of 0.1 in train mode" in capsys.readouterr().out
    restore(model)
    with pytest.raises(ConfigError, match="neither a beit3_fast model nor accelerated"):
        beit3_fast.explain(model, quiet=True)


@pytest.mark.full
def test_torch_compile_keeps_the_result() -> None:
    model = torch.compile(accelerated_copy(), backend="eager")
    for call in (pair(), image()):
        assert_same(model, torchscale_model("base"), call)


@pytest.mark.parametrize("padded", [True, False])
def test_training_and_inference_in_many_threads(padded: bool) -> None:
    """Eight threads, three modes, one model: torchscale's own split position would race here."""
    model = accelerated_copy()
    calls = [image(), text(), pair()] if padded else [image(), pair(text_padding_position=None)]
    with torch.no_grad():
        alone = [model(**call)["encoder_out"] for call in calls]
    start = threading.Barrier(8)

    def work(thread: int) -> None:
        start.wait()
        for step in range(12):
            index = (thread + step) % len(calls)
            with torch.set_grad_enabled(thread % 2 == 0):
                out = model(**calls[index])["encoder_out"]
            torch.testing.assert_close(out.detach(), alone[index], rtol=0, atol=1e-5)

    with ThreadPoolExecutor(8) as pool:
        for future in [pool.submit(work, thread) for thread in range(8)]:
            future.result()


def test_the_check_of_each_call_is_cheap_in_calls() -> None:
    """It looks at the structure once, and again only after a change."""
    from beit3_fast.integrations import _encoder_forward

    model = accelerated_copy()
    looks: list[Any] = []

    class Counted(_encoder_forward.Structure):
        def __init__(self, encoder: Any) -> None:
            looks.append(encoder)
            super().__init__(encoder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_encoder_forward, "Structure", Counted)
        for _ in range(3):
            model(**pair())
        assert not looks
        handle = model.encoder.layers[0].register_forward_hook(lambda *_: None)
        for _ in range(3):
            model(**pair())
        assert len(looks) == 1
        handle.remove()
        model(**pair())
        assert len(looks) == 2


@pytest.fixture(autouse=True)
def _quiet_logger() -> Iterator[None]:
    yield
    assert logging.getLogger("beit3_fast").level == logging.NOTSET
