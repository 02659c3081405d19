"""READMEs and docs are true of the code (constants, options, files), the same in both languages, in plain English."""

import ast
import functools
import importlib.util
import re
from pathlib import Path

import pytest

from common.options import read_constants
from common.run_folder import format_row

ROOT = Path(__file__).resolve().parent.parent
READMES = ("README.md", "README.zh-CN.md")
TRANSLATED = ("README", *sorted(f"docs/{path.name[:-9]}" for path in (ROOT / "docs").glob("*.zh-CN.md")))
ENGLISH = (
    *(f"{name}.md" for name in TRANSLATED),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks").glob("*.md")),
    "checkpoints/README.md",
    "tests/golden/README.md",
)
CHINESE = tuple(f"{name}.zh-CN.md" for name in TRANSLATED)
PAGES = (*ENGLISH, *CHINESE, "CHANGELOG.md", "CONTRIBUTING.md")
PYTHON = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"))
    if not path.relative_to(ROOT).parts[0].startswith(("data", "checkpoints", "results"))
)

# What the field does not say, in lower case.
BANNED = (
    "picture",
    "sureness",
    "surest",
    "likeliest",
    "edge in pixels",
    "smallest share of",
    "right for images from above",
    "probability that the last block is skipped",
    "highest learning rate for",
    "share that matrices and kernels lose",
    "factor on the learning rate from each layer to the one before it",
    "batches for one step of the optimizer",
    "largest norm of the gradient",
    "as it is or the newest before it that is whole",
    "mend the line",
    "images a second",
    "ms an image",
)
# Keys in files that users have, quoted or as a keyword of dict(...).
OLD_KEYS = r"pictures_train|pictures_fingerprint|train_pictures|val_pictures|pictures"
PASS_ON = ("accuracy", "label_errors", "trust")  # benchmarks with the constant OPTIONS, of train.py
# The places that are about the former names of constants.
ABOUT_FORMER_NAMES = ("common/renamed.py", "tests/test_readme.py")


def read(page):
    return (ROOT / page).read_text(encoding="utf-8")


def load_generator():
    spec = importlib.util.spec_from_file_location("constants", ROOT / "docs" / "constants.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def commands(page):
    """What a page shows as code, in blocks or between backticks, one command a line."""
    text = read(page)
    blocks = re.findall(r"```(?:bash|bat)\n(.*?)```", text, re.DOTALL)
    spans = re.findall(r"`([^`]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL))
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [" ".join(command.split()) for command in (*lines, *spans)]


def started_scripts(command):
    """(script, its options) of everything that a command line starts."""
    for script, words in re.findall(r"(?:python|torchrun)\S* (?:-\S+ )*([\w/]+\.py)([^&|;]*)", command):
        yield script, re.findall(r"(?<![\w-])--[a-z][a-z-]*", words)


def known_options(script):
    """The options of a script: of its constants, or those of its argparse parser."""
    names = [name.lower().replace("_", "-") for name in read_constants(ROOT / script)]
    options = {"--help", *(f"--{name}" for name in names), *(f"--no-{name}" for name in names)}
    return options | set(re.findall(r'add_argument\("(--[a-z-]+)"', read(script)))


@functools.cache
def known_anywhere():
    """The options of all scripts."""
    scripts = [path for path in PYTHON if "run(main" in read(path) or "add_argument" in read(path)]
    return set().union(*map(known_options, scripts))


# --- constants


def test_every_constant_has_a_comment():
    for script in load_generator().scripts():
        assert all(read_constants(ROOT / script).values()), script


def test_the_table_of_constants_is_what_the_scripts_say():
    assert read("docs/constants.md") == load_generator().document(), "run python docs/constants.py"


def test_the_generator_needs_no_pytorch():
    names = {
        name.split(".")[0]
        for page in ("docs/constants.py", "common/options.py", "common/renamed.py")
        for node in ast.walk(ast.parse(read(page)))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for name in ([node.module] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names])
    }
    assert not names & {"torch", "timm", "numpy"}


def test_the_chinese_table_has_the_same_constants_and_defaults():
    generator, text = load_generator(), read("docs/constants.zh-CN.md")
    assert re.findall(r"^## `(.*)`$", text, re.MULTILINE) == generator.scripts()
    for script in generator.scripts():
        section = text.split(f"## `{script}`\n")[1].split("\n## ")[0]
        rows = re.findall(r"^\| `([A-Z_0-9]+)` \| `(.*?)` \| (.*) \|$", section, re.MULTILINE)
        assert {name: default for name, default, _ in rows} == generator.read_defaults(script), script
        assert all(meaning for _, _, meaning in rows), script


@pytest.mark.parametrize("readme", READMES)
def test_constants_named_in_the_recipe_are_those_of_train_py(readme):
    section = re.split(r"^## ", read(readme), flags=re.MULTILINE)[3]
    named = set(re.findall(r"`([A-Z][A-Z_]+)`", section)) - {"PATIENCE"}
    assert len(named) > 20 and named <= read_constants(ROOT / "train.py").keys()


@pytest.mark.parametrize("readme", READMES)
def test_every_column_of_the_log_is_explained(readme):
    section = re.split(r"^\| .*`log.csv`.* \|$", read(readme), flags=re.MULTILINE)[-1].split("\n\n")[0]
    columns = [name for row in section.strip().splitlines()[1:] for name in re.findall("`(.*?)`", row.split("|")[1])]
    assert sorted(columns) == sorted([*format_row(None, True).split(), "skipped"])


# --- commands and files


@pytest.mark.parametrize("page", PAGES)
def test_options_in_commands_are_known(page):
    for command in commands(page):
        for script, options in started_scripts(command):
            assert (ROOT / script).is_file(), f"{page}: {command}"
            known = known_options(script)
            # These pass options of train.py on.
            if script in (*(f"benchmarks/{name}.py" for name in PASS_ON), "tools/cross_validate.py"):
                known |= known_options("train.py")
            assert not set(options) - known, f"{page}: {command}"
        if command.startswith("--"):  # an option alone
            options = re.findall(r"(?<![\w-])--[a-z][a-z-]*", command)
            assert not set(options) - known_anywhere(), f"{page}: {command}"


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_give_the_same_commands(name):
    blocks = [
        re.findall(r"```(?:bash|bat|bibtex)\n.*?```", read(f"{name}{suffix}"), re.DOTALL)
        for suffix in (".md", ".zh-CN.md")
    ]
    assert blocks[0] == blocks[1] and (name != "README" or len(blocks[0]) == 5)
    spans = [
        sorted(set(command for command in commands(f"{name}{suffix}") if re.match("python|torchrun|pip|--", command)))
        for suffix in (".md", ".zh-CN.md")
    ]
    assert spans[0] == spans[1]


@pytest.mark.parametrize("name", TRANSLATED)
def test_both_languages_have_the_same_structure(name):
    def structure(page):
        text = re.sub(r"```.*?```", "code", read(page), flags=re.DOTALL)
        marks = (re.match(r"#+ |!\[|\||\d+\. |- |code", line) for line in text.splitlines())
        return [mark[0] for mark in marks if mark]

    assert structure(f"{name}.md") == structure(f"{name}.zh-CN.md")


@pytest.mark.parametrize("page", PAGES)
def test_files_and_headings_that_a_page_names_exist(page):
    text = re.sub(r"```.*?```", "", read(page), flags=re.DOTALL)
    folder = (ROOT / page).parent
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (folder / path) if path else ROOT / page
        assert target.exists(), f"{page}: {link}"
        assert not anchor or anchor in anchors(target), f"{page}: {link}"
    if page != "CHANGELOG.md":  # which also names files that are gone
        folders = "models|common|tests|benchmarks|tools|examples|prepare|docs"
        for path in re.findall(rf"`((?:(?:{folders})/[\w./]*)|\w+\.py)`", text):
            inside = [ROOT / path, *ROOT.glob(f"*/{path}")]  # tables of a folder give the names alone
            assert any(candidate.exists() for candidate in inside), f"{page}: {path}"


def anchors(path):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("readme", READMES)
def test_ci_runs_the_readme_s_test_command(readme):
    command = read(".ci/run").splitlines()[-1]
    assert "pytest" in command
    assert command in read(readme).splitlines()


def test_github_runs_the_readme_s_test_command_with_the_oldest_and_newest_python_on_each_system():
    workflow = read(".github/workflows/tests.yml")
    command = read(".ci/run").splitlines()[-1]
    assert command in [line.strip() for line in workflow.splitlines()]
    oldest, newest = re.search(r"Python (3\.\d+) to (3\.\d+)", read("README.md")).groups()
    assert f'python: ["{oldest}", "{newest}"]' in workflow
    assert "[ubuntu-latest, windows-latest, macos-latest]" in workflow


# --- language


@pytest.mark.parametrize(
    "english, chinese",
    [
        ("class weights", "类别权重"),
        ("class imbalance", "类别不平衡"),
        ("long tail", "长尾"),
        ("hf_endpoint", "HF_ENDPOINT"),
        ("hf-hub:", "hf-hub:"),
        ("torchvision", "torchvision"),
        ("swanlab", "SwanLab"),
        ("fine-tuning", "微调"),
        ("transfer learning", "迁移学习"),
        ("early stopping", "早停"),
        ("resume", "断点续训"),
        ("data augmentation", "数据增强"),
        ("confusion matrix", "混淆矩阵"),
        ("mixed precision", "混合精度"),
        ("exponential moving average", "指数移动平均"),
        ("learning-rate warm-up", "学习率预热"),
        ("pretrained weights", "预训练权重"),
        ("stochastic depth", "随机深度"),
        ("label smoothing", "标签平滑"),
        ("cross-validation", "交叉验证"),
        ("test set", "测试集"),
        ("label errors", "标签错误"),
        ("labels from a csv file", "CSV 文件读取标签"),
        ("aspect ratio", "长宽比"),
    ],
)
def test_a_search_for_a_standard_term_finds_it(english, chinese):
    assert english in " ".join(read("README.md").lower().split())
    assert chinese in read("README.zh-CN.md")


@pytest.mark.parametrize("readme", READMES)
def test_readmes_are_short(readme):
    assert len(read(readme).splitlines()) <= 290


def banned(text):
    """The phrases of BANNED in a text, keys of users' files aside."""
    text = re.sub(rf"""(["'])(?:{OLD_KEYS})\1|\b(?:{OLD_KEYS})=""", "", text)
    text = " ".join(text.lower().split())
    return [phrase for phrase in BANNED if phrase in text]


@pytest.mark.parametrize("page", [*ENGLISH, *(path for path in PYTHON if path not in ABOUT_FORMER_NAMES)])
def test_the_language_is_that_of_the_field(page):
    assert not banned(read(page))


def test_a_banned_phrase_would_be_found():
    assert banned("# a PICTURE of a plant") == ["picture"]
    assert banned('images = dict(pictures_seen=1, ["pictures_of"])') == ["picture"]
    assert banned("the surest\n    predictions, 3 images a\nsecond") == ["surest", "images a second"]
    assert not banned('checkpoint["pictures_train"], dict(pictures=3), checkpoint.get("pictures")')
