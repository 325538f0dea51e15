"""Images, from whatever holds them to a normalised tensor, as the official recipes do it, on Pillow alone.

``load_image`` turns any source into an upright 8-bit RGB image and ``preprocess_image`` adds an ImagePreset. For
8-bit RGB images the result equals torchvision's Resize, CenterCrop, ToTensor and Normalize on Pillow images.

What becomes of images that are not 8-bit RGB:

- EXIF orientation is applied (unreadable EXIF counts as none); ICC profiles are ignored;
- animations give their first frame, images that are already Pillow's their current one;
- grey, 1-bit, palette, CMYK and YCbCr become RGB as Pillow has it;
- transparency of any kind is laid over the background, white unless the preset says otherwise;
- 16-bit channels keep their high byte (Pillow's mode "I" counts as 16-bit, values above 65535 are an error);
- floating-point pixels must lie in [0, 1] and are rounded to 8 bits;
- a file is whole when Pillow finds all pixels: an end mark or checksum missing behind the last one is no error.
"""

from __future__ import annotations

import io
import os
import stat
from numbers import Integral
from os import PathLike
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from beit3_fast import unreadable
from beit3_fast.data.presets import PRESETS, ImagePreset, image_size_pair
from beit3_fast.errors import ConfigError, InputError

if TYPE_CHECKING:
    from PIL import Image

__all__ = [
    "IMAGE_SUFFIXES",
    "MAX_PIXELS",
    "PRESETS",
    "ImagePreset",
    "load_image",
    "preprocess_image",
]

# Where Pillow itself begins to warn: a quarter of a GiB as RGB.
MAX_PIXELS = 89_478_485

# EPS would start Ghostscript, ICO hides an image of another size in the one that it declares, and what Pillow
# decodes in Python may take minutes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "MPO")

# What is taken from a folder; a file that is named is tried whatever it is called.
IMAGE_SUFFIXES = (
    ".jpg",
    ".jpeg",
    ".png",
    ".webp",
    ".gif",
    ".bmp",
    ".tif",
    ".tiff",
    ".ppm",
    ".avif",
    ".jp2",
)

# A thin image grows beyond all bounds when its short side is fitted; past this many times the crop, only what
# the crop keeps is resampled.
_MAX_OVERHANG = 64


def preprocess_image(
    source: Any,
    size: int | tuple[int, int],
    preset: str | ImagePreset = "square",
    *,
    max_pixels: int | None = MAX_PIXELS,
) -> Tensor:
    """One image, from any source that ``load_image`` takes, as float32 [3, H, W].

    ``size`` is H = W or (H, W) in pixels. Raises InputError for an image that cannot be used, ConfigError for an
    unknown preset or a size that is not positive.
    """
    from PIL import Image

    preset = ImagePreset.get(preset)
    height, width = image_size_pair(size)
    image = load_image(source, background=preset.background, max_pixels=max_pixels)
    filter_ = Image.Resampling[preset.interpolation.upper()]
    if preset.resize == "squash":
        image = image.resize((width, height), filter_)
    else:
        image = _cover(image, width, height, preset.crop_pct, filter_)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (preset.mean, preset.std))
    # Three steps and no fused factor: bit for bit what torchvision's ToTensor and Normalize compute.
    return pixels.to(torch.float32).div_(255).sub_(mean).div_(std)


def _cover(
    image: Image.Image, width: int, height: int, crop_pct: float, filter_: Image.Resampling
) -> Image.Image:
    """Keep the aspect ratio, fit the sides to (width, height) / crop_pct, cut out the centre."""
    old_width, old_height = image.size
    fit_width, fit_height = int(width / crop_pct), int(height / crop_pct)
    if old_width * fit_height <= old_height * fit_width:
        new_width, new_height = fit_width, max(fit_width * old_height // old_width, fit_height)
    else:
        new_width, new_height = max(fit_height * old_width // old_height, fit_width), fit_height
    # round() goes to the even number at a half, as torchvision's centre crop does.
    left, top = round((new_width - width) / 2), round((new_height - height) / 2)
    if new_width * new_height <= _MAX_OVERHANG * max(width * height, fit_width * fit_height):
        whole = image.resize((new_width, new_height), filter_)
        return whole.crop((left, top, left + width, top + height))
    across, down = old_width / new_width, old_height / new_height
    box = (left * across, top * down, (left + width) * across, (top + height) * down)
    return image.resize((width, height), filter_, box=box)


def load_image(
    source: Any,
    *,
    background: tuple[int, int, int] = (255, 255, 255),
    max_pixels: int | None = MAX_PIXELS,
) -> Image.Image:
    """An upright 8-bit RGB Pillow image; the module's docstring says what becomes of other kinds.

    ``source`` is one of

    - a path, the bytes of an encoded file, or a seekable binary file object, which is read from its start;
    - a Pillow image, which is left as it was (and returned, if it is upright RGB);
    - a numpy array [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], uint8, uint16 or floating-point in [0, 1], in either
      byte order;
    - a torch tensor [H, W], [1, H, W], [3, H, W] or [4, H, W] of the same dtypes.

    Four channels are RGBA. The file formats are those in FORMATS. Width times height above ``max_pixels`` is an
    error before any pixel is decoded; None lifts this limit, but not the one of Pillow
    (``PIL.Image.MAX_IMAGE_PIXELS``), which belongs to the process and is left alone. Raises InputError when there
    is no such file, when it is no image, damaged or too large, and for arrays of another kind.
    """
    from PIL import Image

    check_max_pixels(max_pixels)
    if isinstance(source, Image.Image):
        return _decode(source, "the Pillow image", background, max_pixels)
    if isinstance(source, Tensor):
        source = _tensor_to_array(source)
    if isinstance(source, np.ndarray):
        return _to_rgb(_array_to_image(source, max_pixels), background)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _from_file(io.BytesIO(source), "the given bytes", background, max_pixels)
    if isinstance(source, (str, PathLike)):
        return _from_path(source, background, max_pixels)
    if hasattr(source, "read") and hasattr(source, "seek"):
        return _from_file(source, "the file object", background, max_pixels)
    raise InputError(
        "expected an image as a path, bytes, seekable binary file object, Pillow image, numpy array or torch tensor, "
        f"got {type(source).__name__}"
    )


def check_max_pixels(max_pixels: object) -> None:
    """Raises ConfigError unless this can be the largest number of pixels of an image."""
    if max_pixels is not None and not (isinstance(max_pixels, Integral) and int(max_pixels) > 0):
        raise ConfigError(f"max_pixels must be a positive integer or None, got {max_pixels!r}")


def _from_path(
    path: str | PathLike[str], background: tuple[int, int, int], max_pixels: int | None
) -> Image.Image:
    name = os.fspath(path)
    try:
        mode = os.stat(name).st_mode
        if stat.S_ISDIR(mode):
            raise InputError(f"{name!r} is a folder; name the image files in it")
        # A pipe or a device would block or never end.
        if not stat.S_ISREG(mode):
            raise InputError(f"{name!r} is not a regular file; name an image file")
        file = open(name, "rb")  # noqa: SIM115
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = "fetch it first" if "://" in str(name) else unreadable.why(error)
        raise InputError(f"the image file {name!r} cannot be opened ({reason})") from error
    with file:
        return _from_file(file, f"the image file {name!r}", background, max_pixels)


def _from_file(
    file: IO[bytes], what: str, background: tuple[int, int, int], max_pixels: int | None
) -> Image.Image:
    from PIL import Image

    Image.init()
    try:
        file.seek(0)
        start = bytes(file.read(24))
        opened = Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN])
    except Image.UnidentifiedImageError as error:
        if not start:
            raise InputError(f"{what} is empty") from error
        raise InputError(
            f"{what} is not an image, or not of a supported format ({', '.join(FORMATS)}): it begins with {start!r}"
        ) from error
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise InputError(
            f"{what} is larger than Pillow's own limit allows ({error}); if you trust it, raise "
            "PIL.Image.MAX_IMAGE_PIXELS as well as max_pixels"
        ) from error
    # File parsers answer damage with errors of every kind, and none of them may pass for a bug of ours.
    except Exception as error:
        raise _unfit(what, "cannot be read as an image", error) from error
    with opened:
        return _decode(opened, what, background, max_pixels)


def _decode(
    image: Image.Image, what: str, background: tuple[int, int, int], max_pixels: int | None
) -> Image.Image:
    _check_size(*image.size, what, max_pixels)
    colours_of_16_bits = any("RGB;16" in str(tile[3:]) for tile in getattr(image, "tile", ()))
    try:
        image.load()
        transparent = image.info.get("transparency")
        # Once an image is loaded, only a value beyond 8 bits tells.
        if isinstance(transparent, tuple) and (colours_of_16_bits or max(transparent) > 255):
            # Pillow keeps the high byte of every pixel, and all of the one colour that is transparent.
            image = image.copy()
            image.info["transparency"] = tuple(value >> 8 for value in transparent)
        return _to_rgb(_upright(image), background)
    except InputError:
        raise
    except Exception as error:
        raise _unfit(what, "is truncated or damaged", error) from error


def _check_size(width: int, height: int, what: str, max_pixels: int | None) -> None:
    if not width or not height:
        raise InputError(f"{what} is empty: {width} x {height} pixels")
    if max_pixels is not None and width * height > max_pixels:
        raise InputError(
            f"{what} has {width} x {height} pixels, more than the limit max_pixels = {max_pixels} "
            "of the Processor; make it smaller, or raise the limit if you trust it"
        )


def _upright(image: Image.Image) -> Image.Image:
    from PIL import ExifTags, Image

    turn = Image.Transpose
    turns = {
        2: turn.FLIP_LEFT_RIGHT,
        3: turn.ROTATE_180,
        4: turn.FLIP_TOP_BOTTOM,
        5: turn.TRANSPOSE,
        6: turn.ROTATE_270,
        7: turn.TRANSVERSE,
        8: turn.ROTATE_90,
    }
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation)
    # The pixels are whole; what cannot be read beside them does not matter.
    except Exception:
        return image
    method = turns.get(orientation) if isinstance(orientation, int) else None
    return image if method is None else image.transpose(method)


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    from PIL import Image

    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise InputError(
                f"integer pixels must lie in [0, 65535], got [{values.min()}, {values.max()}]"
            )
        transparent = image.info.get("transparency")
        image = Image.fromarray((values >> 8).astype(np.uint8))
        if isinstance(transparent, int):
            image = image.convert("RGB")
            image.paste(background, mask=Image.fromarray(values == transparent))
    elif image.mode == "F":
        image = Image.fromarray(_unit_to_bytes(np.asarray(image)))
    elif image.has_transparency_data:
        if image.mode == "La":
            image = image.convert("LA")
        opaque = Image.new("RGB", image.size, background)
        layer = image.convert("RGBA")
        opaque.paste(layer, mask=layer.getchannel("A"))
        return opaque
    return image if image.mode == "RGB" else image.convert("RGB")


def _tensor_to_array(tensor: Tensor) -> np.ndarray:
    plain = tensor.layout == torch.strided and not tensor.is_quantized and not tensor.is_nested
    if not plain or tensor.is_meta or tensor.is_complex():
        raise InputError(f"an image tensor must hold plain numbers, got {_kind(tensor)}")
    if tensor.dim() == 3 and tensor.shape[0] not in _CHANNELS:
        raise InputError(
            f"an image tensor must be [H, W], [1, H, W], [3, H, W] or [4, H, W], got {list(tensor.shape)}; "
            "use permute(2, 0, 1) for channels that come last"
        )
    tensor = tensor.detach().cpu()
    if tensor.is_floating_point():
        tensor = tensor.float()
    return (tensor.permute(1, 2, 0) if tensor.dim() == 3 else tensor).numpy()


def _array_to_image(array: np.ndarray, max_pixels: int | None) -> Image.Image:
    from PIL import Image

    if array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in _CHANNELS):
        raise InputError(
            "an image array must be [H, W], [H, W, 1], [H, W, 3] or [H, W, 4], and a tensor have its channels first, "
            f"got {list(array.shape)}"
        )
    _check_size(array.shape[1], array.shape[0], "the image array", max_pixels)
    if array.dtype.newbyteorder("=") == np.uint16:
        array = (array >> 8).astype(np.uint8)
    elif np.issubdtype(array.dtype, np.floating):
        array = _unit_to_bytes(array)
    elif array.dtype != np.uint8:
        raise InputError(
            f"pixels must be uint8, uint16 or floating-point in [0, 1], got {array.dtype}; use astype or to"
        )
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    return Image.fromarray(np.ascontiguousarray(array))


def _unit_to_bytes(values: np.ndarray) -> np.ndarray:
    low, high = values.min(), values.max()
    # Written so that NaN, which min and max pass on, fails.
    if not (low >= 0 and high <= 1):
        raise InputError(
            f"floating-point pixels must lie in [0, 1], got [{low}, {high}]; divide by 255 what runs to 255, and pass "
            "pixels, not normalised values"
        )
    return np.rint(values * 255).astype(np.uint8)


_CHANNELS = (1, 3, 4)


def _kind(tensor: Tensor) -> str:
    return f"{tensor.dtype}, {tensor.layout}, {tensor.device}"


def _unfit(what: str, reason: str, error: Exception) -> InputError:
    """The error for an image of which that is the reason, unless the system failed."""
    if unreadable.may_pass(error):
        return InputError(f"{what} cannot be read ({unreadable.why(error)})")
    words = " ".join(f"{type(error).__name__}: {error}".split())[:200]
    return InputError(f"{what} {reason} ({words})")
