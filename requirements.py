"""Whether the packages of requirements.txt are there, and new enough. Standard library only, to be asked before torch."""

import re
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from utils import UserError, run_script

REQUIREMENTS = Path(__file__).parent / "requirements.txt"


def require_packages() -> None:
    """End the process, with one line, if a package of requirements.txt is missing or older than it asks for.

    Until `run_script`, Ctrl-C then ends the process without a traceback: the imports of these packages take seconds.
    """
    if run_script(check_packages):
        sys.exit(1)
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not if it is ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)


def check_packages() -> None:
    """UserError naming a package of requirements.txt that is missing or older than it asks for, and both versions."""

    def numbers(text: str) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", text.partition("+")[0])]  # behind + stands the build

    for line in REQUIREMENTS.read_text(encoding="utf-8").split():
        name, _, lowest = line.partition(">=")
        try:
            found = version(name)
        except PackageNotFoundError as error:
            raise UserError(f"{name} is not installed: pip install -r requirements.txt") from error
        if numbers(found) < numbers(lowest):
            raise UserError(f"{name} {found} is too old, the lowest is {lowest}: pip install -U '{line}'")
