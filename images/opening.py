"""Image files as Pillow opens them, made ready for RGB: deep greys become 8 bits, and EXIF may turn the image."""

import re
import warnings
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps
from PIL.TiffImagePlugin import PHOTOMETRIC_INTERPRETATION

from utils import UserError

# Up to twice its limit of pixels Pillow only warns, without the file's name, and decodes.
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)
# Converting such an image to RGB leaves its transparency out, as torchvision does, and as the documentation says.
warnings.filterwarnings("ignore", "Palette images with Transparency expressed in bytes", UserWarning)


def open_image(file: str | BinaryIO) -> Image.Image:
    """Open an image file without decoding it; UserError if it has more pixels than Pillow allows."""
    try:
        return Image.open(file)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UserError(f"{str(error).split(',')[0]}; shrink it") from error


def prepared(image: Image.Image, *, upright: bool) -> Image.Image:
    """Return an image that `convert("RGB")` does justice to; `upright` turns it as its EXIF orientation says.

    Pillow converts grey of more than 8 bits by clipping it at 255. Here its white, 65535 with 16 bits, becomes 255,
    and nothing depends on the pixels. Any other image passes through, not yet decoded unless it is turned.
    UserError for 32 bits and floats: their files do not say which value is white.
    """
    white = white_level(image)  # first: once the image is decoded, what the file says of its samples is gone
    white_is_zero = white and image.format == "TIFF" and image.tag_v2.get(PHOTOMETRIC_INTERPRETATION) == 0
    if upright and image.getexif().get(ExifTags.Base.Orientation, 1) != 1:
        image = ImageOps.exif_transpose(image)
    if white is None:
        return image
    grey = np.asarray(image).astype(np.uint32)
    if white_is_zero:  # Pillow inverts these with 8 bits only
        grey = white - grey
    return Image.fromarray(((grey * 255 + white // 2) // white).astype(np.uint8))


def white_level(image: Image.Image) -> int | None:
    """Return the value of white in an undecoded grey image of 9 to 16 bits, None for other modes; UserError as above.

    Mode "I" has 32 bits, but Pillow uses it for some files of 16 bits too; which ones depends on its version. The tile
    says how the file stores its samples, such as "I;16B".
    """
    if not image.mode.startswith(("I", "F")):
        return None
    tiles = getattr(image, "tile", ())  # an image that comes from no file has none
    stored = tiles[0][3] if tiles else ""
    stored = stored if isinstance(stored, str) else str(stored[0])
    unsigned = re.fullmatch(r"I;(\d+)[BLNR]?", stored)
    if unsigned and int(unsigned[1]) <= 16:
        return 2 ** int(unsigned[1]) - 1
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):  # stretched to 16 bits by Pillow
        return 65535
    kind = "floats" if image.mode == "F" else "signed 16-bit" if stored.startswith("I;16") else "32-bit"
    raise UserError(f"mode {image.mode}, {kind}: nothing says which value is white; store it with 8 or 16 bits")
