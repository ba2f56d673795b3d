"""What to do about a model and a batch that the memory does not hold."""

import argparse
import contextlib

import torch

from utils import UserError, first_line, ran_out_of_memory


@contextlib.contextmanager
def memory_errors_explained(options: argparse.Namespace, device: torch.device):
    """Turn any error about exhausted memory, of the device or of the host, into a UserError that names the sizes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not ran_out_of_memory(error):
            raise
        sizes = f"{options.model} with --batch_size {options.batch_size} at --input_size {options.input_size}"
        advice = "lower --batch_size" if options.eval else "lower --batch_size and raise --update_freq as much"
        raise UserError(f"out of memory on {device}: {sizes}; {advice} ({first_line(error)})") from error
