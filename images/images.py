"""A set of images without transforms, read one at a time; an image that cannot be read is named or skipped."""

import copy
import errno
import hashlib
import logging
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from PIL import Image

from files import regular
from images.opening import open_image, prepared
from training.distributed import of_all_ranks
from utils import UserError

log = logging.getLogger(__name__)

# after so many the disk is gone, or a whole folder was not copied, and skipping on would hide it
BAD_IN_A_ROW = 100
ROWS_AT_ONCE = 1 << 14  # of a list of paths: few megabytes, which a processor's cache holds
# Errors of the system about the file itself. Any other, such as a stale handle, a lost connection, too many open files or
# an exhausted memory, is about the disk, the network or the machine: the image may be readable a moment later.
ABOUT_THE_FILE = {errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP}
ABOUT_THE_FILE |= {errno.ENAMETOOLONG, errno.ENXIO, errno.ENODEV, errno.EINVAL, errno.EOVERFLOW, errno.EFBIG}
PAUSES = (0.1, 1.0, 5.0)  # seconds before the next tries to read an image after such an error


class BadImage(UserError):
    """An image cannot be read. The message is one line that names it, also if a worker process raised it."""

    def __init__(self, text: str):
        # a DataLoader raises a worker's error again with the whole traceback as its text; the last line is the message
        super().__init__(re.sub(r"^(\w+\.)*BadImage: ", "", text.strip().splitlines()[-1]))


class Images:
    """A map-style set without transforms: `[i]` is (PIL image in RGB, class index), or raises BadImage.

    The images are files (`paths`), or `source[i][0]` is the image. `classes` is the number of classes.
    A set from `skipping_bad()` gives the next image that can be read, with its label, instead of raising.
    """

    def __init__(
        self,
        name: str,
        labels: Sequence[int],
        *,
        source: Sequence[tuple] | None = None,
        paths: Sequence[str | os.PathLike] | None = None,
        class_names: Sequence[str | tuple[str, ...]] | None = None,
        classes: int | None = None,
    ):
        if len(labels) == 0:
            raise UserError(f"--data_set {name}: no images found")
        self.name, self._source = name, source
        self._labels = np.asarray(labels, dtype=np.int64)
        # one array of bytes: reading a list of str counts references, which copies its pages into each forked worker
        self._paths = None if paths is None else np.array([os.fsencode(path) for path in paths])
        self._indices = np.arange(len(labels))  # which of the labels and paths belong to this set; see `subset`
        self._bad = None  # uint8 per label: 1 if the image could not be read; None if bad images are not skipped
        self._upright = False
        self.class_names = class_names and [n if isinstance(n, str) else ", ".join(n) for n in class_names]
        self.classes = classes or len(self.class_names or ()) or int(self._labels.max()) + 1
        for index in np.flatnonzero((self._labels < 0) | (self._labels >= self.classes)):
            raise UserError(f"{self.describe(index)} has label {self._labels[index]}, outside 0 to {self.classes - 1}")

    def __len__(self) -> int:
        return len(self._indices)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return self.read(index, lambda image: image.convert("RGB"))

    def read(self, index: int, decode: Callable) -> tuple:
        """Return (what `decode` makes of the PIL image, class index).

        The image can be converted to RGB (see `images.opening`); as a rule its pixels are not decoded yet.
        """
        if self._bad is None:
            return self._read(index, decode)
        candidates = [(index + step) % len(self) for step in range(min(BAD_IN_A_ROW, len(self)))]
        for candidate in candidates:
            if self._bad[self._indices[candidate]]:
                continue
            try:
                return self._read(candidate, decode)
            except BadImage as error:
                if not _is_about_the_file(error.__cause__):
                    raise
                # log.error, because ranks other than 0 log nothing below, and this rank alone may read this image
                log.error("%s; the next one takes its place", error)
                self.mark_bad([candidate])
        first, last = self.describe(candidates[0]), self.describe(candidates[-1])
        raise BadImage(f"{len(candidates)} consecutive images could not be read ({first} to {last})")

    def _read(self, index: int, decode: Callable, pauses: Sequence[float] = PAUSES) -> tuple:
        """Read one image; after an error that is not about its file, again after each of the pauses. Or raise BadImage."""
        try:
            return self._decode(index, decode), int(self._labels[self._indices[index]])
        except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, ...
            passing = not _is_about_the_file(error)
            if passing and pauses:
                time.sleep(pauses[0])
                return self._read(index, decode, pauses[1:])
            reason = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            reason = " ".join(reason.split())
            tried = f"; tried {len(PAUSES) + 1} times, the disk or the network may be at fault" if passing else ""
            raise BadImage(f"cannot read {self.describe(index)} ({reason}){tried}") from error

    def _decode(self, index: int, decode: Callable) -> object:
        position = int(self._indices[index])
        if self._paths is None:
            return decode(prepared(self._source[position][0], upright=self._upright))
        path = os.fsdecode(self._paths[position])
        with open(path, "rb", opener=regular) as file, open_image(file) as opened:
            return decode(prepared(opened, upright=self._upright))

    def upright(self) -> "Images":
        """Return the same set, but each image turned as its EXIF orientation says, not as its pixels are stored."""
        turned = copy.copy(self)
        turned._upright = True
        return turned

    def skipping_bad(self) -> "Images":
        """Return the same set, but skipping images that cannot be read."""
        skipping = copy.copy(self)
        # in shared memory: no process, run or worker, tries again what another one could not read
        skipping._bad = torch.zeros(len(self._labels), dtype=torch.uint8).share_memory_()
        return skipping

    def bad_images(self) -> list[int]:
        """List the images that this process and its workers have skipped so far, ascending."""
        return [] if self._bad is None else np.flatnonzero(self._bad.numpy()[self._indices]).tolist()

    def mark_bad(self, indices: Sequence[int]) -> None:
        """Skip these images from now on without trying to read them; only for a set that is `skipping_bad`."""
        self._bad[self._indices[indices]] = 1

    def targets(self) -> np.ndarray:
        """Return all labels, int64 [images]; nothing is decoded."""
        return self._labels[self._indices]

    def digest(self) -> str:
        """Return a digest of the list of images: the paths below the folder that holds all of them, and the labels.

        Equal lists at two places have one digest. It says nothing of pixels: reading them would take hours.
        """
        found = hashlib.sha256(self.targets().tobytes())
        if self._paths is not None:
            first = next(self._path_bytes())[0]
            same = np.logical_and.reduce([(rows == first).all(axis=0) for rows in self._path_bytes()])
            shared = first[: len(first) if same.all() else same.argmin()].tobytes()
            for rows in self._path_bytes():
                found.update(np.ascontiguousarray(rows[:, shared.rfind(os.fsencode(os.sep)) + 1 :]))
        return found.hexdigest()[:16]

    def _path_bytes(self) -> Iterator[np.ndarray]:
        """Yield the paths as rows of bytes, uint8 [some images, longest path]; a loop over them in Python is slow."""
        for start in range(0, len(self), ROWS_AT_ONCE):
            paths = self._paths[self._indices[start : start + ROWS_AT_ONCE]]
            yield paths.view(np.uint8).reshape(len(paths), -1)

    def describe(self, index: int) -> str:
        """Return the path of an image, or "image 17 of CIFAR100" if it is not a file."""
        position = self._indices[index]
        return f"image {position} of {self.name}" if self._paths is None else printable(self._paths[position])

    def subset(self, indices: np.ndarray) -> "Images":
        """Return a set of these images only, in this order."""
        part = copy.copy(self)
        part._indices = self._indices[indices]
        return part


def bad_of_all_ranks(images: Images) -> list[int]:
    """List the images that any process has skipped so far, ascending; from now on every process skips all of them.

    At the end of an epoch or an evaluation the list does not depend on the number of processes and workers.
    """
    bad = sorted(set().union(*of_all_ranks(images.bad_images())))
    images.mark_bad(bad)
    return bad


def count_bad(images: tuple[Images, Images | None]) -> dict[str, int]:
    """Count the training and the evaluation images that no process could read; a collective."""
    parts = zip(("train", "test"), images, strict=True)
    return {f"{name}_bad_images": len(bad_of_all_ranks(part)) for name, part in parts if part}


def _is_about_the_file(error: BaseException) -> bool:
    """Return whether the image itself is at fault for an error in reading it, not the disk, the network or the machine."""
    if isinstance(error, (MemoryError, ConnectionError, TimeoutError)):
        return False
    # decoders raise OSError too, but without a number
    return getattr(error, "errno", None) is None or error.errno in ABOUT_THE_FILE


def printable(path: str | bytes) -> str:
    """Return a path as text, quoted and escaped if it has line breaks or bytes that are no text."""
    text = os.fsdecode(path)
    return text if text.isprintable() else repr(text)
