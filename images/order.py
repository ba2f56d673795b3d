"""The order of an epoch and each rank's share of the images."""

from collections.abc import Iterator

from utils import Stream, UserError, permutation


class TrainBatches:
    """One rank's micro-batches, lists of (epoch, index), in an order that does not depend on the number of processes.

    Each epoch permutes all images by (seed, epoch) and cuts the result into chunks of batch_size. Micro-step m of rank r
    is chunk m * world_size + r; an update takes update_freq micro-steps. What is left at the end is not used.
    """

    def __init__(self, num_images: int, *, batch_size: int, update_freq: int, world_size: int, rank: int, seed: int):
        self.num_images, self.batch_size, self.update_freq = num_images, batch_size, update_freq
        self.world_size, self.rank, self.seed = world_size, rank, seed
        self.steps_per_epoch = num_images // (batch_size * update_freq * world_size)
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Let the next pass be this epoch, from its update `first_step` on."""
        self.epoch, self.first_step = epoch, first_step

    def __len__(self) -> int:
        return max(0, self.steps_per_epoch - self.first_step) * self.update_freq

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        return self._batches(self.epoch, self.first_step)  # as arguments, set_epoch cannot change them during the pass

    def _batches(self, epoch: int, first_step: int) -> Iterator[list[tuple[int, int]]]:
        order = permutation(self.num_images, Stream.ORDER, self.seed, epoch)
        for micro_step in range(first_step * self.update_freq, self.steps_per_epoch * self.update_freq):
            start = (micro_step * self.world_size + self.rank) * self.batch_size
            yield [(epoch, int(index)) for index in order[start : start + self.batch_size]]


MOST_UPDATES = 10**8  # the schedules hold a value per update: 0.8 GB each


def check_batches(num_images: int, batch_size: int, update_freq: int, world_size: int, epochs: int = 1) -> None:
    """Raise UserError if one update takes more images than the training set has, or if the updates are too many."""
    total = batch_size * update_freq * world_size
    if total > num_images:
        if batch_size > num_images:
            mend = f"--batch_size can be {num_images} at most"
        elif batch_size * world_size > num_images:
            mend = f"with this --batch_size there can be {num_images // batch_size} processes at most"
        else:
            mend = f"--update_freq can be {num_images // (batch_size * world_size)} at most"
        product = f"--batch_size {batch_size} x --update_freq {update_freq} x {world_size} processes"
        raise UserError(f"{product} = {total} images per update, but the training set has {num_images}: {mend}")
    steps = num_images // total
    if epochs * steps > MOST_UPDATES:
        raise UserError(
            f"--epochs {epochs} of {steps} updates are {epochs * steps}, more than {MOST_UPDATES} updates: "
            f"give at most --epochs {MOST_UPDATES // steps}"
        )


def shard(num_images: int, rank: int, world_size: int) -> range:
    """List the indices that one rank evaluates: each image exactly once over all ranks, without padding."""
    return range(rank, num_images, world_size)
