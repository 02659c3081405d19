"""Write docs/constants.md, a table of the constants of every script and tool, from their source.

    python docs/constants.py

Needs neither PyTorch nor timm: the scripts are parsed, not imported.
"""

import ast
import sys
import typing
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # common/
from common import options
from common.options import describe, read_constants, run

STEPS = ("makedata.py", "mean_std.py", "train.py", "test.py")  # in the order in which they are run
HEAD = """\
# Constants

[中文](constants.zh-CN.md) · [README](../README.md)

Written by `python docs/constants.py` from the scripts; do not edit it.

Each constant stands at the top of its script and can also be set on the command line: `IMG_SIZE` by `--img-size 128`,
a switch by `--merge` or `--no-merge`, a list by `--mean 0.4,0.4,0.3`, None by the word `none`. `python train.py
--help` shows the same. A value that a constant does not accept is refused before any work starts (exit status 2).
"""


def main():
    (ROOT / "docs" / "constants.md").write_text(document(), encoding="utf-8")


def document():
    """The text of docs/constants.md."""
    return "\n".join([HEAD, *(section(script) for script in scripts())])


def scripts():
    """The scripts and tools that have constants, as paths relative to the repository."""
    tools = sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "tools").glob("*.py"))
    return [*STEPS, *(path for path in tools if read_constants(ROOT / path))]


def section(script):
    """Heading and table of one script."""
    comments, kinds, values = read_constants(ROOT / script), read_annotations(script), read_defaults(script)
    lines = [f"## `{script}`\n", "| constant | default | accepts | meaning |", "|---|---|---|---|"]
    for name, comment in comments.items():
        lines.append(f"| `{name}` | `{values[name]}` | {describe(kinds[name])} | {escape(comment)} |")
    return "\n".join(lines) + "\n"


def declarations(script):
    """The syntax trees of the annotated constants of a script."""
    body = ast.parse((ROOT / script).read_text(encoding="utf-8")).body
    return [node for node in body if isinstance(node, ast.AnnAssign) and node.target.id.isupper()]


def read_defaults(script):
    """{constant: default, as written in the script}."""
    source = (ROOT / script).read_text(encoding="utf-8")
    return {node.target.id: ast.get_source_segment(source, node.value) for node in declarations(script)}


def read_annotations(script):
    """{constant: annotation}, evaluated with the names of typing, of common/options.py, and of the script's aliases."""
    names = vars(typing) | vars(options)
    for node in ast.parse((ROOT / script).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.value).startswith(("Annotated[", "Literal[")):
            names[node.targets[0].id] = eval(ast.unparse(node.value), names)
    return {node.target.id: eval(ast.unparse(node.annotation), names) for node in declarations(script)}


def escape(text):
    """`text` for a cell of a Markdown table."""
    return text.replace("<", "&lt;").replace("|", "\\|")


if __name__ == "__main__":
    run(main)
