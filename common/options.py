"""Constants at the top of a script: what each accepts, and how the command line sets them.

A script declares its constants as annotated upper-case names, each with a comment behind it, and ends with `run(main)`:

    EPOCHS: PositiveInt = 30  # passes over data/train
    AMP: Literal["auto", "bf16", "off"] = "auto"  # mixed precision

    if __name__ == "__main__":
        run(main)

`python train.py --epochs 3` overrides `EPOCHS`, `python train.py --help` shows the comments. The annotation says what a
constant accepts. Anything else, in the file or on the command line, is refused in one sentence before `main` starts.

This module imports the standard library only.
"""

import argparse
import ast
import difflib
import errno
import functools
import math
import os
import sys
import types
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from common.renamed import RENAMED


class UserError(Exception):
    """Something that the user can fix; the message is one sentence that names the file or value and the remedy."""


class ConstantError(UserError):
    """A constant that does not accept its value; the script ends with exit status 2, like for an unknown option."""


@dataclass(frozen=True)
class Limits:
    """Range of a number: `low` and `high` are included, `above` and `below` are not."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf
    below: float = math.inf
    multiple: int = 1

    def accepts(self, value):
        inside = self.low <= value <= self.high and self.above < value < self.below
        return inside and (self.multiple == 1 or value % self.multiple == 0)

    def __str__(self):
        if self.multiple > 1:
            text = f"that is a multiple of {self.multiple}"
            return f"{text} and at least {self.low}" if self.low > -math.inf else text
        start, end = max(self.low, self.above), min(self.high, self.below)
        if start > -math.inf and end < math.inf and start == self.low and end == self.high:
            return f"from {start} to {end}"
        texts = [(f"of at least {start}" if start == self.low else f"above {start}")] if start > -math.inf else []
        texts += [(f"of at most {end}" if end == self.high else f"below {end}")] if end < math.inf else []
        return " and ".join(texts)


@dataclass(frozen=True)
class Length:
    """Number of elements of a list."""

    count: int

    def accepts(self, value):
        return len(value) == self.count


@dataclass(frozen=True)
class Ascending:
    """A list whose elements do not decrease."""

    def accepts(self, value):
        return sorted(value) == list(value)

    def __str__(self):
        return "in ascending order"


@dataclass(frozen=True)
class NotEmpty:
    """Text, or a list, that holds something."""

    def accepts(self, value):
        return bool(value)

    def __str__(self):
        return "that is not empty"


PositiveInt = Annotated[int, Limits(1)]
NonNegativeInt = Annotated[int, Limits(0)]
Positive = Annotated[float, Limits(above=0)]
NonNegative = Annotated[float, Limits(0)]
Probability = Annotated[float, Limits(0, 1)]
Rate = Annotated[float, Limits(0, below=1)]  # a probability or factor that must stay below 1
Fraction = Annotated[float, Limits(high=1, above=0)]
ImageSize = Annotated[int, Limits(32)]  # the network divides an image's sides by 32
MultipleOf32 = Annotated[int, Limits(32, multiple=32)]
Channels = Annotated[list[Probability], Length(3)]
PositiveChannels = Annotated[list[Positive], Length(3)]
Workers = Annotated[int, Limits(0, 256)]
Port = Annotated[int, Limits(0, 65535)]
Name = Annotated[str, NotEmpty()]

NOUNS = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), str: ("text", "texts")}


def split_kind(kind):
    """(kind without `Annotated`, its restrictions)."""
    if typing.get_origin(kind) is Annotated:
        return kind.__origin__, kind.__metadata__
    return kind, ()


def alternatives(kind):
    """The members of a union; [kind] for anything else."""
    return list(typing.get_args(kind)) if typing.get_origin(kind) in (typing.Union, types.UnionType) else [kind]


def accepts(kind, value):
    """Whether a constant annotated with `kind` accepts `value`."""
    if len(alternatives(kind)) > 1:
        return any(accepts(member, value) for member in alternatives(kind))
    plain, restrictions = split_kind(kind)
    origin = typing.get_origin(plain)
    if origin is typing.Literal:
        return any(value == choice and type(value) is type(choice) for choice in typing.get_args(plain))
    if origin is list:
        [element] = typing.get_args(plain)
        fits = isinstance(value, (list, tuple)) and all(accepts(element, item) for item in value)
    elif plain is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    elif plain is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = value is None if plain in (None, types.NoneType) else isinstance(value, plain)
    return fits and all(restriction.accepts(value) for restriction in restrictions)


def describe(kind, plural=False):
    """What a constant annotated with `kind` accepts, in words: "a whole number of at least 1"."""
    members = alternatives(kind)
    if len(members) > 1:
        return " or ".join(describe(member) for member in sorted(members, key=lambda m: m is types.NoneType))
    plain, restrictions = split_kind(kind)
    origin = typing.get_origin(plain)
    if plain in (None, types.NoneType):
        return "None"
    if plain is bool:
        return "True or False"
    if origin is typing.Literal:
        choices = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in typing.get_args(plain)]
        return choices[0] if len(choices) == 1 else f"{', '.join(choices[:-1])} or {choices[-1]}"
    if origin is list:
        count = next((f"{r.count} " for r in restrictions if isinstance(r, Length)), "")
        [element] = typing.get_args(plain)
        noun = f"a list of {count}{describe(element, plural=True)}"
        restrictions = [r for r in restrictions if not isinstance(r, Length)]
    else:
        noun = NOUNS[plain][plural]
    text = " ".join([noun, *filter(None, map(str, restrictions))])
    return text.replace("that is", "that are") if plural else text


def parse(kind, word):
    """The value of `kind` that a word of the command line stands for; ValueError if it stands for none."""
    members = alternatives(kind)
    if len(members) > 1:
        if types.NoneType in members and word.lower() == "none":
            return None
        for member in members:
            if member is types.NoneType:  # which only the word "none" stands for
                continue
            try:
                return parse(member, word)
            except ValueError:
                pass
        raise ValueError(word)
    plain, _ = split_kind(kind)
    origin = typing.get_origin(plain)
    if origin is list:
        [element] = typing.get_args(plain)
        value = [parse(element, part) for part in word.split(",")] if word else []
    elif origin is typing.Literal:
        value = next((choice for choice in typing.get_args(plain) if str(choice) == word), None)
    else:
        value = None if plain is types.NoneType else plain(word)
    if not accepts(kind, value):
        raise ValueError(word)
    return value


@functools.lru_cache
def parse_script(path, modified):
    """{name: comment} of a script's constants; `modified` is its time of change: an edited file is read anew."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines()
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and node.target.id.isupper():
            comment = lines[node.end_lineno - 1][node.end_col_offset :].strip()
            constants[node.target.id] = comment.removeprefix("#").strip()
    return constants


def read_constants(path):
    """Read the annotated upper-case constants of a script and the comment behind each.

    Args:
        path: the script.

    Returns:
        {name: comment}, in order.
    """
    path = Path(path).resolve()
    return dict(parse_script(path, path.stat().st_mtime_ns))


def current_values(namespace):
    """{name: value} of the constants of a script, given its globals."""
    return {name: namespace[name] for name in read_constants(namespace["__file__"])}


def fill_in(values, defaults, purpose):
    """`values` of constants with the defaults of a purpose where they are None; prints which these are.

    Args:
        values: {name: value}.
        defaults: {purpose: {name: value}}.
        purpose: such as "fine-tuning".
    """
    chosen = {name: value for name, value in defaults[purpose].items() if values[name] is None}
    if chosen:
        print(f"chosen      {', '.join(f'{name} {value}' for name, value in chosen.items())} for {purpose}")
    return values | chosen


def read_kinds(namespace):
    """{name: annotation} of the globals of a script."""
    # From Python 3.14 on, annotations are evaluated on demand.
    return namespace["__annotations__"] if "__annotations__" in namespace else namespace["__annotate__"](1)


def to_option(name):
    """The option that sets a constant: --img-size for IMG_SIZE."""
    return "--" + name.lower().replace("_", "-")


def script_name(namespace):
    """The script as one types it: tools/export.py."""
    script, root = Path(namespace["__file__"]).resolve(), Path(__file__).resolve().parent.parent
    return script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name


class Parser(argparse.ArgumentParser):
    """argparse whose error is one sentence that says what became of an old option, or names the nearest one.

    Args:
        renamed: {old name of a constant: what became of it}.
    """

    def __init__(self, *args, renamed, **kwargs):
        super().__init__(*args, **kwargs)
        self.renamed = renamed

    def error(self, message):
        if "unrecognized arguments" in message:
            unknown = next((word for word in message.split() if word.startswith("-")), "")
            option = unknown.split("=")[0].lstrip("-").replace("_", "-")
            name = option.removeprefix("no-").replace("-", "_").upper()
            if name in self.renamed:
                message = f"{unknown.split('=')[0]}: {self.renamed[name]}"
            elif near := self.nearest(option):
                message += f"; did you mean {near}?"
        self.exit(2, f"error: {message} (see python {self.prog} --help)\n")

    def nearest(self, option):
        """The option whose initials `option` spells (--lr), or that reads most like it; None if none does."""
        known = [name for name in self._option_string_actions if name.startswith("--") and name != "--help"]
        initials = (name for name in known if "".join(part[0] for part in name[2:].split("-")) == option)
        return next(initials, next(iter(difflib.get_close_matches(f"--{option}", known, 1)), None))


def build_parser(namespace, constants, kinds, positional, renamed):
    """The `Parser` of a script with an option for each constant; see `set_constants`."""
    parser = Parser(
        prog=script_name(namespace),
        description=namespace["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given stays as the script has it
        renamed=renamed,
    )
    for name, comment in constants.items():
        help_text = f"{comment} (accepts {describe(kinds[name])}; default: {namespace[name]!r})".replace("%", "%%")
        options = dict.fromkeys([to_option(name), "--" + name.lower()])
        if name == positional:
            parser.add_argument(name.lower(), nargs="*", help=help_text)
        elif kinds[name] is bool:
            parser.add_argument(*options, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            parser.add_argument(*options, metavar="VALUE", help=help_text)
    return parser


def set_constants(namespace, argv, positional=None):
    """Set the constants of a script from the command line, and check all of them.

    Args:
        namespace: the script's globals; changed in place.
        argv: the words after the script's name.
        positional: name of a list constant that also takes the words without an option in front.

    Returns:
        {name: value} of the constants that the command line set.

    Raises:
        ConstantError: for a value that a constant does not accept.
        SystemExit: after --help, and for an unknown option (status 2).
    """
    script = script_name(namespace)
    renamed = RENAMED.get(script, {})
    kinds = read_kinds(namespace)
    constants = read_constants(namespace["__file__"])
    parser = build_parser(namespace, constants, kinds, positional, renamed) if argv else None
    given = {}
    for key, word in vars(parser.parse_args(argv)).items() if argv else ():
        name = key.upper()
        try:
            if isinstance(word, list):  # words without an option in front; a comma in them separates nothing
                [element] = typing.get_args(split_kind(kinds[name])[0])
                given[name] = [parse(element, part) for part in word]
            else:
                given[name] = parse(kinds[name], word) if isinstance(word, str) else word
        except (ValueError, OverflowError):
            option = "the command line" if isinstance(word, list) else to_option(name)
            word = " ".join(word) if isinstance(word, list) else word
            raise ConstantError(f"{name} must be {describe(kinds[name])}, got {word!r} (set by {option})") from None
    for name in constants:
        if name not in given and not accepts(kinds[name], namespace[name]):
            raise ConstantError(f"{name} must be {describe(kinds[name])}, got {namespace[name]!r} (set in {script})")
    for name in renamed:
        if name in namespace and name not in constants:
            raise ConstantError(f"{name}: {renamed[name]} (set in {script})")
    overridden = {name: namespace[name] for name in given}
    namespace.update(given)
    return {name: (value, overridden[name]) for name, value in given.items()}


def describe_overrides(overrides, script):
    """One line that says which values of the file the command line replaces; None if it replaces none."""
    texts = []
    for name, (value, before) in overrides.items():
        if value != before and before not in ("", None, []):  # an empty default is nothing that a person set
            texts.append(f"{name} {value} ({script}: {before})")
    return f"options     {', '.join(texts)}" if texts else None


def run(main, positional=None):
    """Run a script: constants, then the command line (see `set_constants`), then `main`.

    Exit status: 0, or what `main` returns; 1 with one sentence for what the user can fix; 2 for a wrong option or a
    constant with a value that it does not accept; 130 for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # A class name that the console cannot show must not end a run; a log file is to show each line at once.
        stream.reconfigure(errors="replace", line_buffering=True)
    try:
        overrides = set_constants(main.__globals__, sys.argv[1:], positional)
        line = describe_overrides(overrides, script_name(main.__globals__))
        if line and os.environ.get("RANK", "0") == "0":
            print(line)
        sys.exit(main())
    except (UserError, OSError) as error:  # OSError: disk full, no permission, ...; it names the file
        message = str(error).strip()
        if "Traceback (most recent call last)" in message:  # a DataLoader's worker puts it in front of its error
            message = message.splitlines()[-1].split("Error: ", 1)[-1]
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # which names no file when a write fails
            message += "; make room on the disk and give the same command again"
        print(f"error: {message}", file=sys.stderr)
        sys.exit(2 if isinstance(error, ConstantError) else 1)
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
