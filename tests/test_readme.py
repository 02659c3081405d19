"""The READMEs tell the truth about constants, files and commands, and both tell the same."""

import ast
import re
from pathlib import Path

import pytest

from common.options import read_constants

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ("tools/visualize.py", "tools/export.py", "tools/demo.py", "tools/forecast.py")
SCRIPTS = ("makedata.py", "mean_std.py", "train.py", "test.py", *TOOLS)
READMES = ("README.md", "README.zh-CN.md")


def rows(readme, script):
    """{constant: (default, meaning)} of the table under the heading of `script`."""
    section = (ROOT / readme).read_text(encoding="utf-8").split(f"### `{script}`")[1].split("\n#")[0]
    found = re.findall(r"^\| `([A-Z_0-9]+)` \| `(.*?)` \| (.*) \|$", section, re.MULTILINE)
    return {name: (default, meaning) for name, default, meaning in found}


def defaults(script):
    """{constant: default as it stands in the script}."""
    source = (ROOT / script).read_text(encoding="utf-8")
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.AnnAssign) and node.target.id.isupper()]
    return {node.target.id: ast.get_source_segment(source, node.value) for node in nodes}


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_constant_has_a_comment_and_stands_in_both_readmes(script):
    comments = read_constants(ROOT / script)
    assert all(comments.values()) and comments.keys() == defaults(script).keys()
    for readme in READMES:
        assert {name: default for name, (default, _) in rows(readme, script).items()} == defaults(script)
    english = {name: meaning.replace("&lt;", "<") for name, (_, meaning) in rows("README.md", script).items()}
    assert english == comments


def test_both_readmes_give_the_same_commands():
    blocks = []
    for readme in READMES:
        text = (ROOT / readme).read_text(encoding="utf-8")
        blocks.append(re.findall(r"```(?:bash|bat|bibtex)\n.*?```", text, re.DOTALL))
    assert len(blocks[0]) >= 3 and blocks[0] == blocks[1]


@pytest.mark.parametrize("readme", READMES)
def test_files_named_in_the_readme_exist(readme):
    text = (ROOT / readme).read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link]
    paths = re.findall(r"`((?:models|common|tests|benchmarks|tools|examples)/[\w./]*)`", text)
    assert links and paths
    for path in links + paths:
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("readme", ["README.md", "README.zh-CN.md"])
def test_ci_runs_the_readme_s_test_command(readme):
    command = (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()[-1]
    assert "pytest" in command
    assert command in (ROOT / readme).read_text(encoding="utf-8").splitlines()


def test_options_in_the_readme_s_commands_are_known():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for script in SCRIPTS:
        known = {"--" + name.lower().replace("_", "-") for name in read_constants(ROOT / script)}
        for command in re.findall(rf"python {script} ([^`&\n]*)", text):
            for option in re.findall(r"--[a-z-]+", command):
                assert option in known | {"--help"}, f"{script} {option}"
