"""Processor and Batch: shapes, dtypes, the two masks, and the preset and size that a model asks for."""

from __future__ import annotations

import io
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from crafted import encoded
from PIL import Image
from torch.utils.data import DataLoader

from beit3_fast import BEiT3Config, create_model
from beit3_fast.config import SIZES
from beit3_fast.data import PRESETS, Batch, ImagePreset, Processor, Tokenizer, preprocess_image
from beit3_fast.errors import ConfigError, InputError


class StandIn:
    """What ``for_model`` reads of a model."""

    def __init__(self, config: BEiT3Config = SIZES["tiny"], preset: Any = None) -> None:
        self.config = config
        if preset is not None:
            self.preset = preset


class BEiT3ForImageClassification(StandIn):
    pass


class Finetuned(BEiT3ForImageClassification):
    pass


class TestCall:
    @pytest.fixture
    def processor(self, tokenizer: Tokenizer) -> Processor:
        return Processor(tokenizer, image_size=32)

    def test_images_and_texts(self, processor: Processor, photos: dict[str, np.ndarray]) -> None:
        names = ["chelsea", "coins", "china"]
        texts = ["A cat", "", "A pagoda with red pillars"]
        batch = processor(images=[photos[n] for n in names], text=texts)
        assert list(batch) == ["image", "text_tokens", "text_padding_mask", "attention_mask"]
        assert batch["image"].shape == (3, 3, 32, 32)
        assert batch["image"].dtype == torch.float32
        for index, name in enumerate(names):
            assert torch.equal(batch["image"][index], preprocess_image(photos[name], 32))
        assert processor.tokenizer is not None
        expected = processor.tokenizer(texts)
        for key in expected:
            assert torch.equal(batch[key], expected[key])
        # True is padding in one mask, 0 is padding in the other.
        assert batch["text_padding_mask"].dtype == torch.bool
        assert batch["attention_mask"].dtype == torch.int64
        assert torch.equal(batch["text_padding_mask"], batch["attention_mask"] == 0)
        assert torch.equal(batch["text_padding_mask"], batch["text_tokens"] == 1)
        assert batch["text_padding_mask"][1].sum() == batch["text_tokens"].shape[1] - 2

    @pytest.mark.parametrize("preset", PRESETS)
    def test_the_preset_is_used(self, photos: dict[str, np.ndarray], preset: str) -> None:
        image = Processor(preset=preset, image_size=32)(photos["coffee"])["image"]
        assert torch.equal(image[0], preprocess_image(photos["coffee"], 32, preset))

    def test_single_inputs(self, processor: Processor, photos: dict[str, np.ndarray]) -> None:
        cat = photos["chelsea"]
        content = encoded(Image.fromarray(cat))
        expected = processor(images=[cat], text=["A cat"])
        for image in (cat, torch.from_numpy(cat).permute(2, 0, 1), content, io.BytesIO(content)):
            batch = processor(images=image, text="A cat")
            assert all(torch.equal(batch[key], expected[key]) for key in expected)
            assert list(batch) == list(expected)

    def test_one_side_only(self, processor: Processor, photos: dict[str, np.ndarray]) -> None:
        assert list(processor(photos["coins"])) == ["image"]
        assert list(processor(text="A cat")) == [
            "text_tokens",
            "text_padding_mask",
            "attention_mask",
        ]

    def test_counts_may_differ(self, processor: Processor, photos: dict[str, np.ndarray]) -> None:
        batch = processor(images=photos["coins"], text=["A cat", "A cup"])
        assert len(batch["image"]) == 1
        assert len(batch["text_tokens"]) == 2

    def test_stacked_images(self, processor: Processor, photos: dict[str, np.ndarray]) -> None:
        stack = np.stack([photos["chelsea"][:40, :50], photos["coffee"][:40, :50]])
        expected = processor(images=list(stack))["image"]
        assert torch.equal(processor(images=stack)["image"], expected)
        tensor = torch.from_numpy(stack).permute(0, 3, 1, 2)
        assert torch.equal(processor(images=tensor)["image"], expected)

    def test_oblong(self, photos: dict[str, np.ndarray]) -> None:
        processor = Processor(image_size=(32, 48))
        assert processor(photos["coffee"])["image"].shape == (1, 3, 32, 48)

    def test_max_length_and_padding(self, tokenizer: Tokenizer) -> None:
        long = "A red motorcycle leans on its stand."
        assert Processor(tokenizer, max_length=9)(text=[long, ""])["text_tokens"].shape == (2, 9)
        padded = Processor(tokenizer, max_length=99, padding="max_length")(text=long)
        assert padded["text_tokens"].shape == (1, 99)
        ragged = Processor(tokenizer, padding=False)(text=[long, ""])
        assert [len(row) for row in ragged["text_tokens"]][1] == 2

    def test_tokenizer_from_a_path(self, spm_path: Path, tokenizer: Tokenizer) -> None:
        for source in (spm_path, str(spm_path), spm_path.read_bytes()):
            batch = Processor(source)(text="A cat")
            assert torch.equal(batch["text_tokens"], tokenizer("A cat")["text_tokens"])

    def test_text_without_a_tokenizer(self) -> None:
        with pytest.raises(ConfigError, match=r"no tokenizer.*beit3\.spm"):
            Processor()(text="A cat")

    @pytest.mark.parametrize(
        ("inputs", "message"),
        [
            ({}, "got neither"),
            ({"images": []}, "at least one image"),
            ({"text": []}, "at least one text"),
            ({"images": None, "text": None}, "got neither"),
            ({"images": [Image.new("RGB", (4, 4)), b"junk"]}, "image 1: the given bytes"),
            ({"images": [Image.new("RGB", (4, 4)), None]}, "image 1: expected an image"),
            ({"images": "nowhere.jpg"}, "^the image file 'nowhere.jpg'"),
            ({"images": np.zeros((0, 4, 4, 3), np.uint8)}, "at least one image"),
            ({"images": {"a": 1}}, "expected an image"),
            ({"text": ["a", None]}, "text 1: text must be a str"),
            ({"text": ["a", "\udc00"]}, "text 1: text has a lone surrogate"),
            ({"text": b"a"}, "a str or a list of str"),
        ],
        ids=range(12),
    )
    def test_inputs_that_cannot_be_used(
        self, processor: Processor, inputs: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(InputError, match=message):
            processor(**inputs)

    @pytest.mark.parametrize(
        "wrong",
        [
            {"preset": "inception"},
            {"image_size": 0},
            {"image_size": (224, 224, 3)},
            {"max_length": 1},
            {"max_length": "64"},
            {"padding": "longest"},
        ],
        ids=str,
    )
    def test_wrong_options(self, wrong: dict[str, Any]) -> None:
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            Processor(**wrong)

    def test_max_pixels(self) -> None:
        with pytest.raises(InputError, match="max_pixels"):
            Processor(max_pixels=15)(np.zeros((4, 4), np.uint8))

    def test_repr(self, processor: Processor) -> None:
        assert "90 pieces" in repr(processor)
        assert "square" in repr(processor)


class TestForModel:
    @pytest.mark.parametrize(
        ("name", "preset"),
        [
            ("beit3_tiny_patch16_32_imageclassification", "imagenet"),
            ("beit3_tiny_patch16_32_retrieval", "square"),
            ("beit3_tiny_patch16_32", "square"),
        ],
    )
    def test_real_models(self, spm_path: Path, name: str, preset: str) -> None:
        processor = Processor.for_model(create_model(name), spm_path)
        assert processor.preset == PRESETS[preset]
        assert processor.image_size == (32, 32)
        assert processor.max_length == 64

    def test_the_model_takes_the_batch(self, spm_path: Path, photos: dict[str, np.ndarray]) -> None:
        torch.manual_seed(0)
        model = create_model("beit3_tiny_patch16_32_vqav2", num_classes=5)
        processor = Processor.for_model(model, spm_path)
        texts = ["What colour is the cup?", "A cat", ""]
        inputs = processor([photos[n] for n in ("coffee", "chelsea", "coins")], texts)
        keys = ("image", "text_tokens", "text_padding_mask")
        with torch.inference_mode():
            answers = model(*(inputs[key] for key in keys))
            alone = processor(photos["chelsea"], "A cat")
            assert alone["text_tokens"].shape < inputs["text_tokens"].shape
            answer = model(*(alone[key] for key in keys))
        assert answers.shape == (3, 5)
        # Padding, said in the right mask, changes nothing.
        assert torch.allclose(answers[1], answer[0], atol=1e-6)

    @pytest.mark.parametrize(
        ("kind", "preset"),
        [(StandIn, "square"), (BEiT3ForImageClassification, "imagenet"), (Finetuned, "imagenet")],
    )
    def test_the_task_chooses_the_preset(self, kind: type[StandIn], preset: str) -> None:
        assert Processor.for_model(kind()).preset == PRESETS[preset]

    @pytest.mark.parametrize("form", ["name", "preset", "dictionary"])
    def test_the_checkpoint_has_the_last_word(self, form: str) -> None:
        own = ImagePreset(name="own", resize="crop", crop_pct=0.9, mean=(0.1, 0.2, 0.3))
        preset = {"name": "square", "preset": own, "dictionary": own.to_dict()}[form]
        expected = PRESETS["square"] if form == "name" else own
        assert Processor.for_model(BEiT3ForImageClassification(preset=preset)).preset == expected

    def test_options_override(self) -> None:
        processor = Processor.for_model(
            StandIn(), preset="imagenet", image_size=48, max_length=20, padding="max_length"
        )
        assert processor.preset == PRESETS["imagenet"]
        assert processor.image_size == (48, 48)
        assert (processor.max_length, processor.padding) == (20, "max_length")

    def test_oblong_model(self) -> None:
        config = SIZES["tiny"].replace(img_size=(32, 64))
        assert Processor.for_model(StandIn(config)).image_size == (32, 64)

    def test_short_position_table(self) -> None:
        config = SIZES["tiny"].replace(max_text_positions=34)
        assert Processor.for_model(StandIn(config)).max_length == 32
        for length in (33, None):
            with pytest.raises(ConfigError, match="at most 32"):
                Processor.for_model(StandIn(config), max_length=length)

    def test_a_tokenizer_that_is_too_large(self, spm_path: Path) -> None:
        Processor.for_model(StandIn(SIZES["tiny"].replace(vocab_size=92)), spm_path)
        with pytest.raises(ConfigError, match="92 ids, but the model only 91"):
            Processor.for_model(StandIn(SIZES["tiny"].replace(vocab_size=91)), spm_path)

    @pytest.mark.parametrize(
        "model", [None, 5, torch.nn.Linear(2, 2), SimpleNamespace(config=None)], ids=repr
    )
    def test_no_model(self, model: Any) -> None:
        with pytest.raises(ConfigError, match="expected a beit3_fast model"):
            Processor.for_model(model)


class TestBatch:
    @pytest.fixture
    def batch(self, tokenizer: Tokenizer) -> Batch:
        return Processor(tokenizer, image_size=16)(np.zeros((4, 4), np.uint8), "A cat")

    @pytest.mark.parametrize(
        "call",
        [
            lambda b: b.to("cpu", torch.bfloat16),
            lambda b: b.to(torch.device("cpu"), dtype="bfloat16"),
            lambda b: b.to(torch.bfloat16),
            lambda b: b.to(dtype=torch.bfloat16, non_blocking=True),
        ],
    )
    def test_floats_are_cast_and_ids_are_not(self, batch: Batch, call: Any) -> None:
        moved = call(batch)
        assert isinstance(moved, Batch)
        assert moved is not batch
        assert {key: value.dtype for key, value in moved.items()} == {
            "image": torch.bfloat16,
            "text_tokens": torch.int64,
            "text_padding_mask": torch.bool,
            "attention_mask": torch.int64,
        }
        assert batch["image"].dtype == torch.float32
        assert torch.equal(moved["text_tokens"], batch["text_tokens"])

    def test_device(self, batch: Batch) -> None:
        moved = batch.to("meta")
        assert all(value.device.type == "meta" for value in moved.values())
        assert moved["image"].dtype == torch.float32

    def test_nothing_to_do(self, batch: Batch) -> None:
        same = batch.to()
        assert all(same[key] is batch[key] for key in batch)

    def test_ragged_rows_and_other_values(self) -> None:
        batch = Batch(rows=[torch.zeros(2), torch.zeros(3)], ids=(torch.tensor([1]),), name="x")
        moved = batch.to(dtype=torch.float16)
        assert [row.dtype for row in moved["rows"]] == [torch.float16] * 2
        assert isinstance(moved["ids"], tuple)
        assert moved["ids"][0].dtype == torch.int64
        assert moved["name"] == "x"

    @pytest.mark.parametrize(
        "dtype", [torch.int64, "int8", "float17", "cuda", torch.bool, 5], ids=str
    )
    def test_not_a_floating_dtype(self, batch: Batch, dtype: Any) -> None:
        with pytest.raises(ConfigError, match="floating-point"):
            batch.to(dtype=dtype)

    def test_two_dtypes(self, batch: Batch) -> None:
        with pytest.raises(ConfigError, match="two dtypes"):
            batch.to(torch.float16, torch.float32)


class _Photos(torch.utils.data.Dataset[Batch]):
    def __init__(self, processor: Processor, sources: list[bytes]) -> None:
        self.processor = processor
        self.sources = sources

    def __len__(self) -> int:
        return len(self.sources)

    def __getitem__(self, index: int) -> Batch:
        return self.processor(self.sources[index], f"A cat {index}")


class TestSharing:
    @pytest.fixture
    def sources(self, photos: dict[str, np.ndarray]) -> list[bytes]:
        return [encoded(Image.fromarray(photo), "JPEG") for photo in photos.values()]

    @pytest.fixture
    def processor(self, tokenizer: Tokenizer) -> Processor:
        return Processor(tokenizer, "imagenet", 32, 20, padding="max_length")

    def test_pickle(self, processor: Processor, sources: list[bytes]) -> None:
        again = pickle.loads(pickle.dumps(processor))
        expected, result = (p(sources, "A cat") for p in (processor, again))
        assert all(torch.equal(result[key], expected[key]) for key in expected)
        batch = pickle.loads(pickle.dumps(expected))
        assert isinstance(batch, Batch)
        assert torch.equal(batch["image"], expected["image"])

    def test_threads(self, processor: Processor, sources: list[bytes]) -> None:
        expected = processor(sources, "A cat")
        start = threading.Barrier(8)

        def work(_: int) -> list[Batch]:
            start.wait()
            return [processor(sources, "A cat") for _ in range(3)]

        with ThreadPoolExecutor(8) as pool:
            for results in pool.map(work, range(8)):
                for result in results:
                    assert all(torch.equal(result[key], expected[key]) for key in expected)

    def test_workers(self, processor: Processor, sources: list[bytes]) -> None:
        dataset = _Photos(processor, sources)
        loader = DataLoader(dataset, batch_size=None, num_workers=1, multiprocessing_context="fork")
        for index, batch in enumerate(loader):
            expected = dataset[index]
            assert torch.equal(batch["image"], expected["image"])
            assert torch.equal(batch["text_tokens"], expected["text_tokens"])
