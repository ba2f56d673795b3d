"""Run a model block by block: from the output of one block, kept from before, to the output of a later one."""

import functools
import re
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from utils import UserError, first_line

IMAGES = -1  # the place before the first block, where the stream is the images


class _Done(Exception):
    """Raised inside a forward pass that need not go on."""


class Segments:
    """A model in evaluation mode, cut behind each of its blocks.

    Between two blocks runs whatever the model's own `forward` has there. Blocks that are not wanted are skipped: they
    return zeros of the right shape for one image, or the stream that was kept. So no code here knows how a family
    builds its forward pass. `blocks` are the blocks' names in the order in which they run, `shapes` their outputs' for
    one image, after that of the image itself at index IMAGES.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: str,
        image_shape: Sequence[int],
        name: str,
        prepare: Callable[[Tensor], Tensor] = lambda images: images,
    ) -> None:
        """`layers` is the pattern of `selection.family.Family`; `prepare` makes of images of `image_shape` the model's.

        UserError if the model does not run at this size.
        """
        self.model = model.eval().requires_grad_(False)
        self.names = {id(tensor): key for key, tensor in [*model.named_parameters(), *model.named_buffers()]}
        self.inside: str | None = None  # the block that runs
        self.active = False  # whether what runs belongs to the part that was asked for
        self.blocks: list[str] = []
        self._prepare, self._image_shape, self._first, self._last = prepare, tuple(image_shape), 0, None
        shapes: dict[str, tuple[int, ...]] = {}
        for block, module in model.named_modules():
            if re.fullmatch(layers, f"{block}."):
                module.forward = functools.partial(self._forward, block, module.forward, shapes)
        self._stream: Tensor | None = None
        try:
            with torch.no_grad():
                model(prepare(torch.zeros(1, *image_shape)))
        except (AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            size = " x ".join(map(str, image_shape[1:]))
            raise UserError(f"{name} does not take images of {size}: {first_line(error)}; see --input_size") from error
        self.blocks = list(shapes)
        self._number = {block: number for number, block in enumerate(self.blocks)}
        self.shapes = [*shapes.values(), self._image_shape]

    @torch.no_grad()
    def run(self, stream: Tensor, after: int, last: int | None) -> Tensor:
        """Run from the output `stream` of block number `after` (IMAGES: from images) to the output of block `last`.

        `last` None: to the model's own output.
        """
        self._stream, self._first, self._last, self.active = stream, after + 1, last, after == IMAGES
        images = stream if after == IMAGES else torch.zeros(1, *self._image_shape, dtype=stream.dtype)
        try:
            return self.model(self._prepare(images))
        except _Done as done:
            return done.args[0]
        finally:
            self._stream, self.inside, self.active = None, None, False

    def stop(self) -> None:
        """End the forward pass that calls this from inside; its `run` returns None."""
        raise _Done(None)

    def _forward(self, block: str, forward, shapes: dict, x: Tensor, *args, **kwargs) -> Tensor:
        if not self.blocks:  # the first pass, which records shapes
            output = forward(x, *args, **kwargs)
            shapes[block] = tuple(output.shape[1:])
            return output
        number = self._number[block]
        if number < self._first:
            self.active = number == self._first - 1
            return self._stream if self.active else x.new_zeros(1, *self.shapes[number])
        self.inside = block
        output = forward(x, *args, **kwargs)
        self.inside = None
        if number == self._last:
            raise _Done(output)
        return output
