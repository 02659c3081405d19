"""The structure of the repository: who reads constants, who imports whom, and that every constant is checked."""

import ast
import importlib.util
import os
import subprocess
import sys
import types
import typing
from pathlib import Path

import pytest

from common.options import (
    Ascending,
    ConstantError,
    Length,
    Limits,
    accepts,
    alternatives,
    read_constants,
    read_kinds,
    set_constants,
    split_kind,
    to_option,
)

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ("makedata.py", "mean_std.py", "train.py", "test.py")
PACKAGES = ("common", "models", "prepare", "tools", "examples", "benchmarks")


def python_files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).glob("*.py"))


def parse_file(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def ends_in_run(tree):
    """Whether a file is a script of ours: it ends in `run(main)`."""
    last = tree.body[-1]
    return isinstance(last, ast.If) and "run(main" in ast.unparse(last) and "__name__" in ast.unparse(last.test)


EVERY = [*(ROOT / name for name in SCRIPTS), *python_files(*PACKAGES)]
STARTED = [path for path in EVERY if ends_in_run(parse_file(path))]
TOOLS = [path for path in STARTED if path.parent == ROOT or path.parent.name == "tools"]
ids = dict(ids=lambda value: value.relative_to(ROOT).as_posix() if isinstance(value, Path) else None)


def test_all_scripts_are_found():
    names = {path.relative_to(ROOT).as_posix() for path in STARTED}
    assert set(SCRIPTS) < names and len([name for name in names if name.startswith("tools/")]) >= 5
    assert any(name.startswith("examples/") for name in names) and any(name.startswith("benchmarks/") for name in names)


@pytest.mark.parametrize("path", STARTED, **ids)
def test_only_main_reads_constants(path):
    constants, readers = set(read_constants(path)), []
    for node in parse_file(path).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and node.name != "main":
            names = {inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name)}
            readers += [f"{node.name}: {name}" for name in sorted(names & constants)]
            assert "globals" not in names, node.name
    assert constants and readers == []


@pytest.mark.parametrize("path", STARTED, **ids)
def test_main_comes_first_and_what_it_calls_in_that_order(path):
    """A function stands below the first function that uses it; `main` is the first of all."""
    nodes = [node for node in parse_file(path).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    functions = [node for node in nodes if isinstance(node, ast.FunctionDef)]
    assert functions[0].name == "main"
    place = {node.name: number for number, node in enumerate(functions)}
    first_use = {}
    for node in nodes:
        for inner in ast.walk(node):
            if isinstance(inner, ast.Name) and inner.id in place and inner.id != node.name:
                first_use.setdefault(inner.id, node)
    above = [
        f"{name} stands above {user.name}, which calls it first"
        for name, user in first_use.items()
        if user.name in place and place[name] < place[user.name]
    ]
    assert above == []


def test_train_is_a_page():
    path = ROOT / "train.py"
    lines = path.read_text(encoding="utf-8").splitlines()
    assert len(lines) < 560 and len(read_constants(path)) < 55 and max(map(len, lines)) <= 120
    functions = {node.name: node for node in parse_file(path).body if isinstance(node, ast.FunctionDef)}
    calls = {ast.unparse(node.func) for node in ast.walk(functions["main"]) if isinstance(node, ast.Call)}
    assert "train_one_epoch" in calls
    calls = {ast.unparse(node.func) for node in ast.walk(functions["train_one_epoch"]) if isinstance(node, ast.Call)}
    assert "network" in calls  # the forward pass


def imports(path):
    """Top-level names of our own that a file imports, wherever it does."""
    found = set()
    for node in ast.walk(parse_file(path)):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module.split(".")[0])
    return found & {*PACKAGES, *(Path(name).stem for name in SCRIPTS), "ema"} - {path.parent.name}


@pytest.mark.parametrize("path", python_files(*PACKAGES), **ids)
def test_no_import_points_upwards(path):
    # A benchmark that replaces a part of train.py to compare the two stands above it.
    above = {"train"} if path.name == "class_weights.py" else set()
    assert (imports(path) - above).isdisjoint(Path(name).stem for name in SCRIPTS)


def test_packages_do_not_import_each_other_in_a_circle():
    graph = {name: set() for name in PACKAGES}
    for path in python_files(*PACKAGES):
        graph[path.parent.name] |= imports(path) & set(PACKAGES)
    while leaves := [name for name, needed in graph.items() if not needed & set(graph)]:
        for name in leaves:
            del graph[name]
    assert graph == {}


def test_sounds_do_not_run_through_everything():
    names = []
    for path in EVERY:
        for node in ast.walk(parse_file(path)):
            if isinstance(node, (ast.FunctionDef, ast.Lambda)):
                every = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
                names += [f"{path.name}: {getattr(node, 'name', '')}" for arg in every if arg.arg == "sound"]
    assert len(names) <= 10, names


# --- every constant of every script and tool refuses what it does not accept


def load(path):
    """The globals of a script, without running it."""
    spec = importlib.util.spec_from_file_location(f"script_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return vars(module)


@pytest.fixture(scope="module")
def namespaces():
    """Globals of each script, loaded once."""
    loaded = {}

    def get(path):
        if path not in loaded:
            loaded[path] = load(path)
        return dict(loaded[path])

    return get


def outside(kind):
    """Values that a constant of `kind` must refuse: of other types, beyond each limit, of other lengths."""
    candidates = ["", "no such choice", -1, 0, 1.5, 2.5, 1e300, float("nan"), float("inf"), True, None]
    candidates += [[], {}, ["x", 3]]
    for member in alternatives(kind):
        plain, restrictions = split_kind(member)
        for rule in restrictions:
            if isinstance(rule, Limits):
                kind_of = int if plain is int else float
                for bound in (rule.low, rule.high, rule.above, rule.below):
                    if abs(bound) != float("inf"):
                        candidates += [kind_of(bound) - 1, kind_of(bound) + 1, kind_of(bound)]
                candidates.append(rule.multiple + 1)
            if isinstance(rule, Length):
                candidates += [[0.5] * (rule.count + 1), [0.5] * (rule.count - 1)]
            if isinstance(rule, Ascending):
                candidates.append([0.9, 0.1])
        if typing.get_origin(plain) is list:
            candidates += [[value] for value in outside(typing.get_args(plain)[0])]
    return [value for value in candidates if not accepts(kind, value)]


def words_outside(kind):
    """Words of the command line that a constant of `kind` must refuse."""
    return [word for value in outside(kind) if (word := to_word(value)) is not None and not reads_as(kind, word, value)]


def to_word(value):
    """A value as one writes it on the command line; None where that has no such form."""
    if isinstance(value, (list, tuple)):
        words = [to_word(item) for item in value]
        return None if None in words or len(words) == 1 and words[0] in ("", "none") else ",".join(words)
    return None if isinstance(value, (dict, bool)) else "none" if value is None else str(value)


def reads_as(kind, word, value):
    """Whether the word of a refused value means another, accepted one: "1.5" is a text, "3" a list of one number."""
    for member in alternatives(kind):
        plain, _ = split_kind(member)
        origin = typing.get_origin(plain)
        element, _ = split_kind(typing.get_args(plain)[0] if origin is list else plain)
        text = element is str or origin is typing.Literal and word in map(str, typing.get_args(plain))
        one = origin is list and not isinstance(value, (list, tuple))
        if text or one or element is types.NoneType and word == "none" or origin is list and word == "":
            return True
    return False


@pytest.mark.parametrize("path", STARTED, **ids)
def test_every_constant_refuses_what_it_does_not_accept(path, namespaces, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = namespaces(path)
    kinds = {name: read_kinds(namespace)[name] for name in read_constants(path)}
    set_constants(dict(namespace), [])  # the defaults are accepted
    for name, kind in kinds.items():
        values = outside(kind)
        assert values, name
        for value in values:
            with pytest.raises(ConstantError) as error:
                set_constants(namespace | {name: value}, [])
            message = str(error.value)
            assert message.startswith(f"{name} must be ") and repr(value) in message and "\n" not in message
        if kind is bool:
            continue
        words = words_outside(kind)
        for word in dict.fromkeys(words[:3] + words[-2:]):
            with pytest.raises(ConstantError) as error:
                set_constants(dict(namespace), [f"{to_option(name)}={word}"])
            assert str(error.value).startswith(f"{name} must be ") and repr(word) in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("path", TOOLS, **ids)
def test_a_refused_constant_ends_a_script_with_status_2_and_nothing_written(path, namespaces, tmp_path):
    """Two processes for each script: a value on the command line, and one in a copy of the file."""
    kinds, text = read_kinds(namespaces(path)), path.read_text(encoding="utf-8")
    names = [name for name in read_constants(path) if kinds[name] is not bool and f'positional="{name}"' not in text]
    name = next(name for name in names if words_outside(kinds[name]))
    word = words_outside(kinds[name])[0]
    line = next(row for row in text.splitlines() if row.startswith(f"{name}:"))
    copy = tmp_path / "copy" / path.name
    copy.parent.mkdir()
    copy.write_text(text.replace(line, f"{line.partition(' = ')[0]} = {{}}  # a mistake"), encoding="utf-8")
    place = tmp_path / "place"
    place.mkdir()
    for command in ([path, f"{to_option(name)}={word}"], [copy]):
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(
            [sys.executable, *command], cwd=place, env=environment, capture_output=True, encoding="utf-8"
        )
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"error: {name} must be ") and done.stderr.count("\n") == 1, done.stderr
    assert not list(place.iterdir())


LIGHT = {
    "makedata.py": {"torch", "torchvision", "timm", "sklearn", "scipy", "pandas", "matplotlib"},
    "mean_std.py": {"torchvision", "timm", "sklearn", "scipy", "pandas", "matplotlib"},
    "tools/compare.py": {"sklearn", "scipy", "pandas", "matplotlib"},
}


@pytest.mark.parametrize("script", LIGHT)
def test_a_script_imports_no_package_that_it_does_not_need(script):
    """Which costs seconds at each start, and in each process that it starts."""
    code = "import runpy, sys; runpy.run_path(sys.argv[1], run_name='x'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not LIGHT[script] & set(done.stdout.split())
