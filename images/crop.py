"""The random crop of `--augment device`: drawn for whole batches, and cut by a worker or on the device."""

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from images.draws import Draws, crop_boxes, integers
from images.images import Images
from images.settings import Augmentation, View
from utils import Stream, derive_seed

PADDING = 4  # pixels around an image of up to 32 px, from which the crop is taken


class RandomCrop:
    """Draws crops and flips from (seed, epoch, index), and cuts them out of single images."""

    def __init__(self, view: View, augmentation: Augmentation):
        self.size, self.seed = view.input_size, augmentation.seed
        self.hflip, self.interpolation = augmentation.hflip, augmentation.train_interpolation

    def draws(self, epoch: int, indices: np.ndarray) -> Draws:
        """The source of everything random about these images; the crop takes the draws of purpose 0."""
        return Draws(derive_seed(Stream.AUGMENT, self.seed, epoch), indices)

    def boxes(self, draws: Draws, height: np.ndarray, width: np.ndarray) -> np.ndarray:
        """The crops [batch, 8] of images of these sizes: top, left, height, width, shift down, shift right, flip, cubic."""
        flip, cubic, *place = draws.uniforms(0, 24)
        place, flip = np.stack(place), flip < self.hflip
        shift = np.zeros((2, len(flip)))
        if self.size <= 32:
            shift = integers(place[-2:], 2 * PADDING) - PADDING
            box = [np.broadcast_to(side, len(flip)) for side in (0, 0, height, width)]
            cubic = np.ones_like(cubic)
        else:
            box, cubic = crop_boxes(place, height, width), self.is_cubic(cubic)
        return np.stack((*box, *shift, flip, cubic), axis=1).astype(np.float64)

    def is_cubic(self, uniform: np.ndarray) -> np.ndarray:
        """Whether each image is resized bicubically, not bilinearly."""
        return uniform < {"bicubic": 2, "bilinear": -1, "random": 0.5}[self.interpolation]

    def cut(self, image: Image.Image, epoch: int, index: int) -> Image.Image:
        """Crop, resize and flip one image, which need not be decoded yet, to size x size."""
        height, width = image.height, image.width
        box = self.boxes(self.draws(epoch, np.array([index])), np.array([height]), np.array([width]))[0].tolist()
        top, left, down, across, shift_down, shift_right, flip, cubic = box
        if image.format == "JPEG":
            # The decoder can scale by a half, a quarter or an eighth while it decodes, which is faster than decoding
            # everything. Allow it as long as the crop keeps `size` pixels.
            shrink = max(1, min(down, across) / self.size)
            image.draft("RGB", (math.ceil(width / shrink), math.ceil(height / shrink)))
        by_height, by_width = image.height / height, image.width / width
        box = (left * by_width, top * by_height, (left + across) * by_width, (top + down) * by_height)
        image = image.convert("RGB")
        if all(side.is_integer() for side in box):  # resize(box=…) would let pixels outside the crop into its edge
            image, box = image.crop(tuple(map(int, box))), None
        kernel = Image.Resampling.BICUBIC if cubic else Image.Resampling.BILINEAR
        image = image.resize((self.size, self.size), kernel, box)
        if shift_down or shift_right:  # what comes in from outside is black
            start = (int(shift_right), int(shift_down))
            image = image.crop((*start, start[0] + self.size, start[1] + self.size))
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else image


class CroppedImages(Dataset):
    """Images that a worker crops, uint8 [S, S, 3], and their class indices, by keys (epoch, index).

    For images that the device cannot crop, because they are on disk or have several sizes: so that `--augment device`
    can train on ImageNet without a cache. The draws are those that the device would take.
    """

    def __init__(self, images: Images, crop: RandomCrop):
        self.images, self.crop = images, crop

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, key: tuple[int, int]) -> tuple[Tensor, int]:
        pixels, target = self.images.read(key[1], lambda image: np.array(self.crop.cut(image, *key)))
        return torch.from_numpy(pixels), target
