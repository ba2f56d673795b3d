"""A set of images without transforms: read one by one, with its path where one cannot be read, or past those."""

import errno
import logging
import os
import re
from collections.abc import Callable, Sequence

import numpy as np
import torch
from PIL import Image

from utils import UserError

log = logging.getLogger(__name__)

BAD_IN_A_ROW = 100  # so many say that it is not the images: a disk is gone, or a whole folder was not copied
# what this machine lacks and not the image, which is read the next time: too many files open, no memory
_LACKS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN)


class BadImage(UserError):
    """An image that cannot be decoded; the message is one line that names it, also after a worker's re-raise."""

    def __init__(self, text: str):
        # a DataLoader raises a worker's error anew with the whole traceback as its text: its last line is the message
        super().__init__(re.sub(r"^(\w+\.)*BadImage: ", "", text.strip().splitlines()[-1]))

    def blames_image(self) -> bool:
        """Whether it is the image that cannot be read, not the machine that lacks something."""
        cause = self.__cause__
        return not isinstance(cause, MemoryError) and getattr(cause, "errno", None) not in _LACKS


class Images:
    """A map-style set without transforms: `[i]` is (PIL image in RGB, class index); raises BadImage, or skips bad ones.

    Made of files, `paths`, or of a `source` whose `[i][0]` is the image. `classes` is the number of classes,
    `class_names` their list[str] or None.
    """

    def __init__(self, name: str, labels, *, source=None, paths=None, class_names=None, classes: int | None = None):
        if len(labels) == 0:
            raise UserError(f"--data_set {name}: no images found")
        self.name, self._source = name, source
        self._labels = np.asarray(labels, dtype=np.int64)
        # bytes in one array: a list of str would be copied, page by page, into every forked worker
        self._paths = None if paths is None else np.array([os.fsencode(path) for path in paths])
        self._indices, self._bad = np.arange(len(labels)), None
        self.class_names = class_names and [n if isinstance(n, str) else ", ".join(n) for n in class_names]
        self.classes = classes or len(self.class_names or ()) or int(self._labels.max()) + 1
        for index in np.flatnonzero((self._labels < 0) | (self._labels >= self.classes)):
            raise UserError(f"{self.describe(index)} has label {self._labels[index]}, outside 0 to {self.classes - 1}")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index, lambda image: image.convert("RGB"))

    def read(self, index: int, decode: Callable) -> tuple:
        """(what `decode` makes of the PIL image, which is opened and not decoded yet, class index); raises BadImage.

        Of a set that is `skipping_bad` the next image that can be read is given in place of one that cannot.
        """
        if self._bad is None:
            return self._read(index, decode)
        row = range(index, index + min(BAD_IN_A_ROW, len(self)))
        for neighbour in (place % len(self) for place in row):
            if self._bad[self._indices[neighbour]]:
                continue
            try:
                return self._read(neighbour, decode)
            except BadImage as error:
                if not error.blames_image():
                    raise
                # an error, for ranks other than 0 log nothing below, and this one alone meets the image
                log.error("%s; the next one takes its place", error)
                self.mark_bad([neighbour])
        first, last = (self.describe(place % len(self)) for place in (row[0], row[-1]))
        raise BadImage(f"{len(row)} images one behind the other cannot be read, from {first} to {last}")

    def _read(self, index: int, decode: Callable) -> tuple:
        position = int(self._indices[index])
        try:
            if self._paths is None:
                image = decode(self._source[position][0])
            else:
                path = os.fsdecode(self._paths[position])
                with open(path, "rb", opener=_open_at_once) as file, Image.open(file) as opened:
                    image = decode(opened)
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            raise BadImage(f"cannot read {self.describe(index)} ({reason})") from error
        return image, int(self._labels[position])

    def skipping_bad(self) -> "Images":
        """The same set, where the next image that can be read, and its label, stand for one that cannot be read."""
        # shared, so that what workers find is known here, and what is known here is not tried in workers
        return self._changed(_bad=torch.zeros(len(self._labels), dtype=torch.uint8).share_memory_())

    def bad_images(self) -> list[int]:
        """The images that this process and its workers could not read so far, ascending; [] unless `skipping_bad`."""
        return [] if self._bad is None else np.flatnonzero(self._bad.numpy()[self._indices]).tolist()

    def mark_bad(self, indices: Sequence[int]) -> None:
        """Skip these images without trying to read them again; the set has to be `skipping_bad`."""
        self._bad[self._indices[indices]] = 1

    def targets(self) -> np.ndarray:
        """All labels, int64 [len]; nothing is decoded."""
        return self._labels[self._indices]

    def describe(self, index: int) -> str:
        """The path of an image, in quotes where it does not print, or "image 17 of CIFAR100" where it has none."""
        position = self._indices[index]
        return f"image {position} of {self.name}" if self._paths is None else printable(self._paths[position])

    def subset(self, indices: np.ndarray) -> "Images":
        """The same set with these images only, in this order."""
        return self._changed(_indices=self._indices[indices])

    def _changed(self, **attributes) -> "Images":
        changed = object.__new__(Images)
        changed.__dict__ = {**self.__dict__, **attributes}
        return changed


def _open_at_once(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)  # a named pipe would wait for somebody to write to it


def printable(path: str | bytes) -> str:
    """A path as it is, or quoted and escaped: line breaks and bytes that are no text would spoil a message."""
    text = os.fsdecode(path)
    return text if text.isprintable() else repr(text)
