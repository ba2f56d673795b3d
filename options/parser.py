"""What the scripts' options have in common: the parser, types of values, defaults in the help.

This folder needs the standard library only, and is imported before torch, so that `-h` and usage errors answer at once.
"""

import argparse
import os
import re

MODEL_KEY = "model|module|state_dict"  # where training checkpoints keep their weights


class Settings:
    """The base of dataclasses whose fields are options of the same names: what one part of a run takes of them."""

    @classmethod
    def from_options(cls, options: argparse.Namespace, **others):
        """Take the fields' values from the options, or from `others` if they are there."""
        from dataclasses import fields  # here, because -h need not wait for it

        names = [field.name for field in fields(cls) if field.name not in others]
        return cls(**{name: getattr(options, name) for name in names}, **others)


def boolean(text: str) -> bool:
    """Parse true/false, yes/no, t/f, y/n or 1/0, in any case."""
    if text.lower() in ("yes", "true", "t", "y", "1"):
        return True
    if text.lower() in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"{text!r} is neither true nor false")


BOOLEAN = {"type": boolean, "nargs": "?", "const": True, "metavar": "true|false"}  # the option alone means true


def keyword(text: str) -> tuple[str, object]:
    """Parse `name=value`: the value as a Python literal, with true, false and none in any case, or else as text."""
    name, equals, value = text.partition("=")
    if not (equals and name.isidentifier()):
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=value")
    return name, _literal(value)


def _literal(text: str) -> object:
    """Return the value of a Python literal in which true, false and none have any case; other text as it is."""
    import ast  # here, because -h need not wait for it

    class Words(ast.NodeTransformer):
        def visit_Name(self, node):
            words = {"true": True, "false": False, "none": None}
            return ast.Constant(words[node.id.lower()]) if node.id.lower() in words else node

    try:
        return ast.literal_eval(Words().visit(ast.parse(text.strip(), mode="eval")))
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):  # what literal_eval raises
        return text


def keyword_text(name: str, value: object) -> str:
    """Write `name=value` so that `keyword` reads it back."""
    text = f"{name}={value}"
    return text if isinstance(value, str) and keyword(text) == (name, value) else f"{name}={value!r}"


class Keywords(argparse.Action):
    """Collect `name=value …` into a dict."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, {**getattr(namespace, self.dest), **dict(values)})


def add_keywords(group, name: str, help: str) -> None:
    group.add_argument(name, type=keyword, action=Keywords, nargs="+", default={}, metavar="NAME=VALUE", help=help)


def text_values(options: argparse.Namespace) -> list[str]:
    """Return a line that lists the NAME=VALUE that are text, and one for those that are None; none if there are none.

    Text is no number, true or false, and timm drops arguments that are None.
    """
    given = [
        (f"--{option} {name}={value}", value)
        for option, values in vars(options).items()
        if option.endswith("_kwargs") and values
        for name, value in values.items()
    ]
    text = [shown for shown, value in given if isinstance(value, str)]
    dropped = [shown for shown, value in given if value is None]
    return [
        *([f"taken as text, not as a number, true, false or none: {', '.join(text)}"] if text else []),
        *([f"left at the constructor's default, as timm does with None: {', '.join(dropped)}"] if dropped else []),
    ]


LARGEST = {int: 10**9, float: 3.4e38}  # more than a size can be, and than float32 holds


def number(kind: type, low: float | None = None, high: float | None = None, *, or_inf: bool = False):
    """Return a parser for finite numbers of `kind` from `low` to `high`, both included, and for inf with `or_inf`."""
    least, most = -LARGEST[kind] if low is None else low, LARGEST[kind] if high is None else high

    def parse(text: str):
        value = kind(text)
        if or_inf and value == float("inf"):
            return value
        if least <= value <= most:
            return value
        if value != value or value in (float("inf"), float("-inf")):
            wanted = "a finite number"
        elif high is None and value < least:
            wanted = f"at least {least}"
        else:
            wanted = f"from {least} to {most}"
        raise argparse.ArgumentTypeError(f"{text} is not {wanted}")

    parse.__name__ = kind.__name__
    return parse


def epochs(text: str) -> float:
    """Parse a number of epochs, at least 0; a whole one is an int."""
    value = number(float, 0)(text)
    return int(value) if value.is_integer() else value


def below_one(text: str) -> float:
    """Parse the weight that a moving average gives to what was before: from 0 to below 1."""
    value = number(float, 0, 1)(text)
    if value == 1:
        raise argparse.ArgumentTypeError(f"{text} is not below 1")
    return value


def expression(text: str) -> str:
    """Return a regular expression that compiles."""
    try:
        re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(f"{text} is not a regular expression: {error}") from None
    return text


def gain(text: str) -> float:
    """Parse a power from -10 to 10, or `width`: 0.5, which keeps the variance of what independent inputs add up to."""
    try:
        return 0.5 if text == "width" else number(float, -10, 10)(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is neither width nor a number from -10 to 10") from None


class Formatter(argparse.ArgumentDefaultsHelpFormatter):
    """Add the default to every help text that has a use for it."""

    def _get_help_string(self, action):
        if action.default in (None, "", {}) or "default" in (action.help or ""):
            return action.help
        return super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """The parser of each script. A usage error is one line, which names what is nearest to a mistyped word."""

    def __init__(self, **given) -> None:
        super().__init__(allow_abbrev=False, **given)  # an abbreviation would let a mistyped option pass as another one

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        options, unknown = self.parse_known_args(args, namespace)
        if unknown:
            from utils import hint  # here, because -h need not wait for it

            dashes = ("-", "–", "—")  # noqa: RUF001 (word processors make such dashes)
            word = next((word for word in unknown if word.startswith(dashes)), unknown[0]).partition("=")[0]
            self.error(f"unrecognized argument {word}{hint(word, self._option_string_actions)}")
        return options

    def error(self, message: str) -> None:
        """End the process with code 2 and a line, which only the first process of several prints."""
        from utils import UserError, is_first_process

        line = f"{self.prog}: error: {UserError(message)}; -h lists the options\n"
        self.exit(2, line if is_first_process() else None)

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is not None and value not in action.choices:
            from utils import hint

            known = list(map(str, action.choices))
            message = f"{value} is none of {', '.join(known)}{hint(str(value), known)}"
            raise argparse.ArgumentError(action, message)

    def _print_message(self, message: str, file=None) -> None:
        """Write what the stream can show. It is None if it is closed; its reader may have gone, as in `-h | head -1`."""
        if not (message and file):
            return
        encoding = file.encoding or "utf-8"
        try:
            file.write(message.encode(encoding, "replace").decode(encoding))
            file.flush()
        except OSError:  # Python flushes once more at exit, which must not fail
            os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def changed(options: argparse.Namespace, names: list[str], parser: argparse.ArgumentParser) -> list[str]:
    """Return those of `names` whose values are not the parser's defaults."""
    return [name for name in names if getattr(options, name) != parser.get_default(name)]
