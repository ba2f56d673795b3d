"""Errors that follow from the sizes of a run: what memory, batch norm or float32 does not take."""

import argparse
import contextlib

import torch

from utils import UserError, first_line, ran_out_of_memory


@contextlib.contextmanager
def errors_of_sizes_explained(options: argparse.Namespace, device: torch.device):
    """Turn errors that follow from the options' sizes into a UserError that names them.

    Exhausted memory of the device or of the host; batch norm with a single value per channel, as of one image that is
    small by then; an update whose factors, such as `--lr` times `--weight_decay`, are beyond float32.
    """
    try:
        yield
    except (RuntimeError, ValueError, MemoryError, OSError) as error:
        explanation = _explanation(error, options, device)
        if explanation is None:
            raise
        raise UserError(explanation) from error


def _explanation(error: Exception, options: argparse.Namespace, device: torch.device) -> str | None:
    """Return the message for an error that follows from the options' sizes; None for any other."""
    if ran_out_of_memory(error):
        sizes = f"{options.model} with --batch_size {options.batch_size} at --input_size {options.input_size}"
        advice = "lower --batch_size" if options.eval else "lower --batch_size and raise --update_freq as much"
        return f"out of memory on {device}: {sizes}; {advice} ({first_line(error)})"
    if "more than 1 value per channel" in str(error):  # torch.compile puts it into an error of its own
        return (
            f"--batch_size {options.batch_size}: batch norm in {options.model} has a single value per channel at "
            f"--input_size {options.input_size}; give --batch_size 2 or more"
        )
    if "cannot be converted to type float without overflow" in str(error):
        return f"--lr {options.lr:g}, --weight_decay {options.weight_decay:g}: the update is beyond float32; give lower ones"
    return None
