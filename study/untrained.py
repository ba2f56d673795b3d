"""Measure a student before any training.

    python -m study.untrained FILE.json [options of main.py]

evaluates the weights of --initialize as `main.py --eval true` does and writes what it measures to FILE.json.
"""

import json
import sys
from pathlib import Path

import main as training
from utils import run_script


def main(argv: list[str] | None = None) -> None:
    file, *options = sys.argv[1:] if argv is None else argv
    record = training.main([*options, "--eval", "true"])
    Path(file).write_text(json.dumps(record) + "\n", encoding="utf-8")


if __name__ == "__main__":
    sys.exit(run_script(main))
