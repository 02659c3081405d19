"""Constants at the top of a script: what each accepts, and how the command line sets them.

A script declares its constants as annotated upper-case names, each with a comment behind it, and ends with `run(main)`:

    from common.options import answer_early
    answer_early(__name__, __file__)  # --help and wrong options, before imports that take seconds
    import torch

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
import atexit
import builtins
import contextlib
import difflib
import errno
import functools
import importlib.util
import math
import multiprocessing
import os
import signal
import sys
import threading
import tokenize
import traceback
import types
import typing
import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from common.output import guard_output
from common.renamed import RENAMED

# What requirements.txt installs, by the names of the modules, but for torchtoolbox, which can be done without.
PACKAGES = ("torch", "torchvision", "timm", "sklearn", "numpy", "PIL", "matplotlib", "tqdm", "filelock")
LISTS = ("positional", "unknown")  # arguments of `run` that name a list constant, see `set_constants`
READER = "reader"  # name of the threads of common/workers.py, which may never end


class UserError(Exception):
    """Something that the user can fix; the message is one sentence that names the file or value and the remedy."""


class ConstantError(UserError):
    """A constant that does not accept its value; the script ends with exit status 2, like for an unknown option."""


def raise_all(problems, kind=UserError, most=20):
    """Raise one error of `kind` that holds all `problems`, a sentence each, so that all can be fixed at once.

    Args:
        problems: sentences; nothing happens if there are none.
        most: sentences that are shown; the rest is counted.
    """
    shown = problems[:most]
    if len(problems) > most:
        shown.append(f"... and {len(problems) - most} more of this kind")
    if problems:
        raise kind("\nerror: ".join(shown))


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
ImageSize = Annotated[int, Limits(32, 4096)]  # the network divides an image's sides by 32
MultipleOf32 = Annotated[int, Limits(32, multiple=32)]
Channels = Annotated[list[Probability], Length(3)]
# A smaller standard deviation would blow up the last bit of a pixel; a class of one colour has 0.
PositiveChannels = Annotated[list[Annotated[float, Limits(1e-6, 1e6)]], Length(3)]
Workers = Annotated[int, Limits(0, 256)]
Port = Annotated[int, Limits(0, 65535)]
Name = Annotated[str, NotEmpty()]
Rotation = Annotated[float, Limits(0, 180)] | Literal["quarter"]  # see `common.augment.train_transform`

DASHES = "-‐‑‒–—−－"  # what word processors, web pages and input methods make of a hyphen
NOUNS = {int: ("a whole number", "whole numbers"), float: ("a number", "numbers"), str: ("text", "texts")}
NOUNS |= {list: ("a list", "lists"), dict: ("a dictionary", "dictionaries")}  # in files only


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
        return any(type(value) is type(choice) and value == choice for choice in typing.get_args(plain))
    if origin is list:
        [element] = typing.get_args(plain)
        fits = isinstance(value, (list, tuple)) and all(accepts(element, item) for item in value)
    elif plain is float:
        fits = isinstance(value, (int, float)) and not isinstance(value, bool) and is_finite(value)
    elif plain is int:
        fits = isinstance(value, int) and not isinstance(value, bool)
    else:
        fits = value is None if plain in (None, types.NoneType) else isinstance(value, plain)
    return fits and all(restriction.accepts(value) for restriction in restrictions)


def is_finite(number):
    """Whether a number is finite as a float; an integer may be too large for one."""
    try:
        return math.isfinite(number)
    except OverflowError:
        return False


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
    if plain in (int, float) or origin is list and split_kind(typing.get_args(plain)[0])[0] in (int, float):
        word = unicodedata.normalize("NFKC", word)  # full-width digits, commas and signs of an input method
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
    with tokenize.open(path) as file:  # as Python itself reads it, with or without a byte order mark
        source = file.read()
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
            words = message.partition("unrecognized arguments: ")[2].split()
            near, replaced = [], []
            for word in words:
                if word[0] not in DASHES and "=" not in word:
                    continue
                option = word.split("=")[0].lstrip(DASHES).replace("_", "-")
                name = option.removeprefix("no-").replace("-", "_").upper()
                if name in self.renamed:
                    replaced.append(f"{word.split('=')[0]}: {self.renamed[name]}")
                elif found := self.nearest(option):
                    near.append(found)
            if near:
                message += f"; did you mean {', '.join(near)}?"
            elif not replaced and any(word.lower() in ("true", "false", "yes", "no", "0", "1") for word in words):
                message += "; a switch takes no value: --name turns it on, --no-name off"
            message = "; ".join([*replaced, *([message] if near or not replaced else [])])
        elif "ignored explicit argument" in message:
            message += "; a switch takes no value: --name turns it on, --no-name off"
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


def set_constants(namespace, argv, positional=None, unknown=None):
    """Set the constants of a script from the command line, and check all of them.

    Args:
        namespace: the script's globals; changed in place.
        argv: the words after the script's name.
        positional: name of a list constant that also takes the words without an option in front.
        unknown: name of a list constant that also takes all words that are no option of this script, in order.

    Returns:
        {name: value} of the constants that the command line set.

    Raises:
        ConstantError: for values that constants do not accept; it names all of them.
        SystemExit: after --help, and for an unknown option (status 2).
    """
    script = script_name(namespace)
    renamed = RENAMED.get(script, {})
    kinds = read_kinds(namespace)
    constants = read_constants(namespace["__file__"])
    parser = build_parser(namespace, constants, kinds, positional, renamed) if argv else None
    given, wrong, problems = {}, set(), []
    words, others = {}, []
    if argv:
        parsed, others = parser.parse_known_args(argv) if unknown else (parser.parse_args(argv), [])
        words = vars(parsed)
    if others:
        given[unknown] = [word for word in others if word != "--"]
    for key, word in words.items():
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
            hint = f"; write {word.replace(',', '.')}" if can_parse(kinds[name], word.replace(",", ".")) else ""
            problems.append(f"{name} must be {describe(kinds[name])}, got {word!r} (set by {option}){hint}")
            wrong.add(name)
    for name in [name for name in constants if name not in wrong]:
        value, where = (given[name], f"by {to_option(name)}") if name in given else (namespace[name], f"in {script}")
        needed = describe(kinds[name]) if not accepts(kinds[name], value) else find_slip(value, name not in given)
        if needed:
            problems.append(f"{name} must be {needed}, got {value!r} (set {where})")
    for name in renamed:
        if name in namespace and name not in constants:
            problems.append(f"{name}: {renamed[name]} (set in {script})")
    raise_all(problems, ConstantError)
    overridden = {name: namespace[name] for name in given}
    namespace.update({name: expand_home((namespace | given)[name]) for name in constants})
    return {name: (value, overridden[name]) for name, value in given.items()}


def can_parse(kind, word):
    """Whether a word of the command line stands for a value of `kind`."""
    try:
        parse(kind, word)
        return True
    except (ValueError, OverflowError):
        return False


def find_slip(value, in_file):
    """What a text, or a list of texts, must be that was plainly not meant so; "" for any other value.

    Args:
        value: of a constant.
        in_file: whether it stands in the script, where a backslash has a meaning.
    """
    for text in value if isinstance(value, (list, tuple)) else [value]:
        if not isinstance(text, str) or os.path.exists(text.replace("\0", "")):
            continue
        if in_file and any(unicodedata.category(char) == "Cc" for char in text):  # of Windows paths: \n, \t, ...
            return 'text without control characters, such as "data/new" or r"data\\new" for a path'
        if len(text) > 1 and text[0] + text[-1] in ("''", '""', "``", "“”", "‘’", "”“", "「」"):
            return "text without quotation marks around it"
    return ""


def expand_home(value):
    """`value` with the home folder for a leading ~, which shells replace in some places only."""
    if isinstance(value, list):
        return [expand_home(item) for item in value]
    begins = isinstance(value, str) and (value == "~" or value.startswith(("~/", "~\\")))
    return os.path.expanduser(value) if begins and not os.path.exists(value) else value


def describe_overrides(overrides, script):
    """One line that says which values of the file the command line replaces; None if it replaces none."""
    texts = []
    for name, (value, before) in overrides.items():
        if value != before and before not in ("", None, []):  # an empty default is nothing that a person set
            texts.append(f"{name} {value} ({script}: {before})")
    return f"options     {', '.join(texts)}" if texts else None


def answer_early(name, path, packages=PACKAGES):
    """Answer --help, and refuse options and constants that the script does not accept, before its slow imports.
    Name the packages that are missing, too.

    For that the script's constants are read from its source. They are evaluated with what it imports from here and from
    `typing`; a script whose constants need more is left to `run`, as are notebooks and all but the first of several
    processes.

    Args:
        name: the script's `__name__`; nothing happens where it is imported.
        path: its `__file__`.
        packages: modules that it cannot do without.

    Raises:
        SystemExit: after the answer.
    """
    if name != "__main__" or hasattr(builtins, "__IPYTHON__") or "RANK" in os.environ:
        return
    prepare_streams()
    with tokenize.open(path) as file:
        tree = ast.parse(file.read())
    namespace = {"__file__": path, "__doc__": ast.get_docstring(tree, clean=False), "__annotations__": {}}
    plain = {name for name, value in vars(builtins).items() if isinstance(value, type)}
    evaluate = lambda node: eval(compile(ast.Expression(node), path, "eval"), namespace)  # noqa: E731
    for node in tree.body:
        names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Load)}
        unknown = names - namespace.keys()
        from_here = isinstance(node, ast.ImportFrom) and node.module in ("typing", __name__)
        if from_here or isinstance(node, ast.Assign) and not unknown - plain:  # such as Share = Annotated[float, ...]
            exec(compile(ast.Module([node], []), path, "exec"), namespace)
        elif isinstance(node, ast.AnnAssign) and node.value:
            if unknown - vars(builtins).keys():
                return
            namespace["__annotations__"][node.target.id] = evaluate(node.annotation)
            namespace[node.target.id] = evaluate(node.value)
    runs = (node for node in ast.walk(tree) if isinstance(node, ast.Call) and ast.unparse(node.func) == "run")
    lists = {word.arg: word.value.value for call in runs for word in call.keywords if word.arg in LISTS}
    with guard_output("end"):
        try:
            set_constants(namespace, sys.argv[1:], **lists)
            require_packages(packages)
        except UserError as error:
            leave(2 if isinstance(error, ConstantError) else 1, str(error))


def require_packages(modules):
    """UserError that names all of the modules that are not installed, by the names that pip knows."""
    names = {"sklearn": "scikit-learn", "PIL": "pillow"}
    missing = [names.get(module, module) for module in modules if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(
            f"not installed in this Python, {sys.executable}: {', '.join(missing)}; activate the environment that you "
            "made for this repository, or give: python -m pip install -r requirements.txt"
        )


def prepare_streams():
    """Let nothing that is printed end the script."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # in notebooks and IDLE they are other objects, which stay as they are
            # A class name that the console cannot show must not end a run; a log file is to show each line at once.
            stream.reconfigure(errors="replace", line_buffering=True)


def run(main, positional=None, closed_output="finish", fail=lambda message, status: None, unknown=None):
    """Run a script: constants, then the command line (see `set_constants`), then `main`.

    Exit status: 0, or what `main` returns; 1 with one sentence for what the user can fix; 2 for a wrong option or a
    constant with a value that it does not accept; 130 for Ctrl-C; 141 for a closed pipe, see `guard_output`.

    Args:
        main: function of the script.
        positional, unknown: see `set_constants`.
        closed_output: what follows where nobody reads the output any more, see `guard_output`.
        fail: function (message, exit status) that is called before an error is printed, and may end the process.
    """
    with guard_output(closed_output):
        run_main(main, positional, fail, unknown)


def run_main(main, positional, fail, unknown=None):
    """`run` on streams that can be written to."""
    prepare_streams()
    # Processes that are spawned know the script's classes by this name, which in IPython stands for IPython's own.
    sys.modules["__mp_main__"] = sys.modules["__main__"]
    with nothing_left_running():
        try:
            if "__file__" not in main.__globals__:  # exec, or the code pasted into a console
                how = "python train.py in a terminal, %run train.py in a notebook"
                raise UserError(f"start the script as a file: {how}")
            overrides = set_constants(main.__globals__, sys.argv[1:], positional, unknown)
            line = describe_overrides(overrides, script_name(main.__globals__))
            if line and os.environ.get("RANK", "0") == "0":
                print(line)
            leave(main())
        except (UserError, OSError) as error:  # OSError: disk full, no permission, ...; it names the file
            message = str(error).strip()
            message += find_remedy(error, message)
            leave(2 if isinstance(error, ConstantError) else 1, message, fail)
        except (RuntimeError, MemoryError) as error:
            from common.faults import is_out_of_memory  # needs PyTorch, which not every script imports

            if not is_out_of_memory(error):
                raise
            reason = next(iter(str(error).strip().splitlines()), "MemoryError")
            leave(1, f"memory is full ({reason}); close other programs, or lower a BATCH_SIZE", fail)
        except SystemExit as end:  # after --help, or a wrong option
            leave(end.code)
        except KeyboardInterrupt:
            print("\ninterrupted", file=sys.stderr)
            leave(130)


def find_remedy(error, message):
    """What to add to the message of an error so that it says what to do."""
    folder, root = Path.cwd(), Path(__file__).resolve().parent.parent
    if isinstance(error, UserError) and "there is no " in message and root in folder.parents:
        return f" (paths are relative to the current folder, {folder}; cd to {root})"
    if not isinstance(error, OSError):
        return ""
    if error.errno == errno.ENOSPC:  # which names no file when a write fails
        return "; make room on the disk and give the same command again"
    if isinstance(error, (FileExistsError, NotADirectoryError)):
        return "; a folder is needed there, so move this file away or set another path"
    if isinstance(error, IsADirectoryError):
        return "; a file is needed there, so set the path of a file"
    if isinstance(error, PermissionError) or error.errno == errno.EROFS:
        return "; allow writing there, close programs that have it open, or set another path"
    return ""


def leave(status, message="", fail=lambda message, status: None):
    """End the process with an exit status; in IPython and Jupyter, which have no use for it, return to the prompt.

    Args:
        status: exit status.
        message: of an error, which is printed; "": none.
        fail: see `run`.
    """
    if message:
        fail(message, status)
        print(f"error: {message}", file=sys.stderr)
    if not hasattr(builtins, "__IPYTHON__"):
        sys.exit(status)


@contextlib.contextmanager
def nothing_left_running():
    """On every way out, end what the script has started, so that none of it keeps the script from ending.

    Processes that read files ignore signals, and Python waits for them when it ends. It waits for threads, too, and one
    that stands in the middle of a read cannot be ended but with the process.
    """
    before = set(threading.enumerate())
    try:
        yield
    except BaseException as error:
        stuck, threads = end_processes(), [one for one in threading.enumerate() if one.name.startswith(READER)]
        threads = [one for one in threads if one not in before]
        for thread in threads:
            thread.join(0.2)
        if not stuck and not any(thread.is_alive() for thread in threads):
            raise
        if not isinstance(error, SystemExit):
            traceback.print_exc()
        status = error.code if isinstance(error, SystemExit) else 1
        if not stuck:  # for which multiprocessing would wait
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError, ValueError):
                stream.flush()
        os._exit(status if isinstance(status, int) else 0)


def end_processes():
    """Kill the processes that this one has started by multiprocessing; returns those that cannot be killed."""
    processes = multiprocessing.active_children()
    with no_answer_to_killed_processes() if processes else contextlib.nullcontext():
        for process in processes:
            process.kill()
        for process in processes:
            process.join(1)  # the system kills none in the middle of a read from a network drive
    return [process for process in processes if process.is_alive()]


@contextlib.contextmanager
def no_answer_to_killed_processes():
    """Within this context PyTorch raises no error for a process of a DataLoader that is killed."""
    if not hasattr(signal, "SIGCHLD") or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        yield
    finally:
        signal.signal(signal.SIGCHLD, before if before is not None else signal.SIG_DFL)
