"""Measure weight_selection.py --refit: seconds after imports, private memory, disk, for 256 and 1,024 images at 224 px.

    python -m bench.refit [--out results/refit/speed.md] [--folder FOLDER]

Each measurement is a process of its own, which imports everything before it begins. Teachers have random values, images
are noise of 256 px as JPEG: neither changes what is computed. Needs Linux (/proc) and 3 GB of disk.
"""

import argparse
import contextlib
import gc
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path
from unittest import mock

from bench.selection import PAIRS, ROOT, hardware, make_teacher, sampled
from options.parser import Parser

MOST_SECONDS = {"vit_s": 90, "convnext_t": 180}  # aims for 256 images, on two idle cores
MOST_MB = 1500


def make_images(folder: Path, count: int) -> None:
    """Write so many JPEG files of noise, unless they exist."""
    import numpy as np
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    generator = np.random.default_rng(0)
    for number in range(count):
        path = folder / f"{number:04}.jpg"
        if not path.exists():
            pixels = generator.integers(0, 256, (16, 16, 3), dtype=np.uint8)
            Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(path, quality=90)


def measure(name: str, images: int, folder: Path) -> dict[str, float]:
    """Select and refit once."""
    import weight_selection  # here, so that the process that starts the others stays small
    from selection.activations import scratch

    pair = PAIRS[name]
    make_teacher(pair, folder / pair.file)
    make_images(folder / "images", images)
    argv = f"--pretrained_model {pair.teacher} --pretrained_path {folder / pair.file} --student_model {pair.student}"
    argv += f" --refit true --data_path {folder / 'images'} --calibration_images {images}"
    gc.freeze()
    measured = {"pair": name, "images": images}
    with (
        tempfile.TemporaryDirectory(dir=folder) as output,
        contextlib.redirect_stdout(sys.stderr),
        mock.patch.object(scratch, "_reserve", wraps=scratch._reserve) as reserve,
        sampled(measured),
    ):
        weight_selection.main([*argv.split(), "--output_dir", output])
    return measured | {"disk_mib": sum(size for (_, size), _ in reserve.call_args_list) / 2**20}


def report(results: list[dict]) -> str:
    """Write a table in Markdown, the aims, and the environment."""
    from utils import revision

    lines = ["| pair | images | seconds | private memory, MB | disk, MiB |", "|---|---:|---:|---:|---:|"]
    for each in results:
        cells = (PAIRS[each["pair"]].title, each["images"], each["seconds"], each["private_mb"], each["disk_mib"])
        lines.append("| {} | {} | {:.0f} | {:.0f} | {:.0f} |".format(*cells))
    lines += ["", f"Aims, on two idle cores: {MOST_MB} MB at most; with 256 images"]
    lines[-1] += ", ".join(f" {PAIRS[name].title} {seconds} s at most" for name, seconds in MOST_SECONDS.items()) + "."
    threads = os.environ.get("OMP_NUM_THREADS", "not set")
    lines += [
        "",
        f"n = 1 each. Hardware: {hardware()}; OMP_NUM_THREADS {threads}; this code {revision() or 'outside git'}.",
    ]
    return "\n".join([*lines, f"Command: `python -m bench.refit {shlex.join(sys.argv[1:])}`"])


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a Markdown file for the report")
    parser.add_argument("--folder", type=Path, help="for teachers and images, kept; default: a temporary one, removed")
    parser.add_argument("--pairs", nargs="+", choices=MOST_SECONDS, default=list(MOST_SECONDS))
    parser.add_argument("--images", nargs="+", type=int, default=[256, 1024])
    parser.add_argument("--one", nargs=2, metavar=("PAIR", "IMAGES"), help="measure once and print a line of JSON")
    options = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = options.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        if options.one:
            print(json.dumps(measure(options.one[0], int(options.one[1]), folder.resolve())))
            return
        results = []
        for images in options.images:
            for name in options.pairs:
                command = [sys.executable, "-m", "bench.refit", "--one", name, str(images), "--folder", str(folder)]
                run = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True)
                results.append(json.loads(run.stdout))
        text = report(results)
    print(text)
    if options.out:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
