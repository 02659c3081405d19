"""Constants at the top of a script that can also be set on its command line.

A script declares its constants as annotated upper-case names, each with a comment behind it:

    EPOCHS: int = 30  # passes over data/train

and ends with

    if __name__ == "__main__":
        run(main)

Then `python train.py --epochs 3` overrides `EPOCHS`, `python train.py --help` shows the comments, and a wrong name or
value gets one sentence. The constants stay the primary interface: the command line only changes their values.
"""

import argparse
import ast
import difflib
import errno
import sys
import types
import typing
from pathlib import Path


class UserError(Exception):
    """Something that the user can mend; the message is one sentence that names the file or value and the remedy."""


def read_constants(path):
    """Read the annotated upper-case constants of a script and the comment behind each.

    Args:
        path: the script.

    Returns:
        {name: comment}, in order.
    """
    source = Path(path).read_text(encoding="utf-8")
    lines = source.splitlines()
    constants = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.AnnAssign) and node.target.id.isupper():
            comment = lines[node.end_lineno - 1][node.end_col_offset :].strip()
            constants[node.target.id] = comment.removeprefix("#").strip()
    return constants


def converter(annotation):
    """The function that turns a word of the command line into a value of `annotation`.

    Args:
        annotation: int, float, str, one of these `| None`, or a list of one of these.
    """
    choices = [kind for kind in typing.get_args(annotation) if kind is not types.NoneType]
    optional = isinstance(annotation, types.UnionType)

    def convert(word):
        if optional and word.lower() == "none":
            return None
        kind = choices[0] if optional else annotation
        if typing.get_origin(kind) is list:
            return [typing.get_args(kind)[0](part) for part in word.split(",")]
        return kind(word)

    kind = choices[0] if optional else annotation
    convert.__name__ = str(annotation) if typing.get_args(annotation) else kind.__name__
    return convert


class Parser(argparse.ArgumentParser):
    """argparse whose error is one sentence, with the nearest option where one is misspelt."""

    def error(self, message):
        for word in message.split():
            if word.startswith("--"):
                near = difflib.get_close_matches(word.split("=")[0], self._option_string_actions, 1)
                if near and "unrecognized" in message:
                    message += f"; did you mean {near[0]}?"
                break
        self.exit(2, f"error: {message} (see python {self.prog} --help)\n")


def override_constants(namespace, argv, positional=None, preset=None):
    """Set the constants of a script from the command line.

    Args:
        namespace: the script's globals; changed in place.
        argv: the words after the script's name.
        positional: name of a list constant that also takes the words without an option in front.
        preset: function that returns constants which depend on others, {name: value}; the command line goes before it.
    """
    script, root = Path(namespace["__file__"]).resolve(), Path(__file__).resolve().parent.parent
    parser = Parser(
        prog=script.relative_to(root).as_posix() if script.is_relative_to(root) else script.name,
        description=namespace["__doc__"],
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,  # what is not given stays as the script has it
    )
    # From Python 3.14 on, annotations are made when asked for.
    kinds = namespace["__annotations__"] if "__annotations__" in namespace else namespace["__annotate__"](1)
    for name, comment in read_constants(namespace["__file__"]).items():
        default = namespace[name]
        help_text = f"{comment} (default: {default})".replace("%", "%%")
        dashed = "--" + name.lower().replace("_", "-")
        options = dict.fromkeys([dashed, "--" + name.lower()])
        if name == positional:
            parser.add_argument(name.lower(), nargs="*", help=help_text)
        elif kinds[name] is bool:
            parser.add_argument(*options, action=argparse.BooleanOptionalAction, help=help_text)
        else:
            metavar = str(getattr(kinds[name], "__name__", kinds[name])).upper()
            parser.add_argument(*options, type=converter(kinds[name]), metavar=metavar, help=help_text)
    given = {name.upper(): value for name, value in vars(parser.parse_args(argv)).items()}
    namespace.update(given)
    if preset is not None:
        namespace.update(preset() | given)


def run(main, positional=None, preset=None):
    """Run a script: constants, then the command line (see `override_constants`), then `main`.

    Exit status: 0, or what `main` returns; 1 with one sentence for what the user can mend; 2 for a wrong option; 130
    for Ctrl-C.
    """
    for stream in (sys.stdout, sys.stderr):
        # A class name that the console cannot show must not end a run; a log file is to show each line at once.
        stream.reconfigure(errors="replace", line_buffering=True)
    override_constants(main.__globals__, sys.argv[1:], positional, preset)
    try:
        sys.exit(main())
    except (UserError, OSError) as error:  # OSError: disk full, no permission, ...; it names the file
        message = str(error).strip()
        if "Traceback (most recent call last)" in message:  # a DataLoader's worker puts it in front of its error
            message = message.splitlines()[-1].split("Error: ", 1)[-1]
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:  # which names no file when a write fails
            message += "; make room on the disk and give the same command again"
        sys.exit(f"error: {message}")
    except KeyboardInterrupt:
        print("\ninterrupted", file=sys.stderr)
        sys.exit(130)
