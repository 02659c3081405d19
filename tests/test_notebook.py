"""examples/quick_start.ipynb runs from top to bottom, and the Dockerfile copies what there is."""

import json
import re
import shutil
from pathlib import Path

import pytest
from conftest import ROOT
from test_readme import known_options

NOTEBOOK = ROOT / "examples" / "quick_start.ipynb"


def code_cells():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    return ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]


def test_the_notebook_is_kept_without_results():
    cells = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    cells = [cell for cell in cells if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in cells)


def test_every_command_of_the_notebook_is_known():
    commands = [line for cell in code_cells() for line in cell.splitlines() if line.startswith("%run ")]
    scripts = [re.match(r"%run (\w+)\.py", line)[1] for line in commands]
    assert scripts == ["makedata", "mean_std", "train", "test", "test"]
    commands += [line for cell in code_cells() for line in cell.splitlines() if line.startswith("recipe")]
    for line in commands:
        line = line.replace('recipe = "', "%run train.py ")
        script = line.split()[1]
        assert (ROOT / script).is_file()
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", line)) <= known_options(script)


def test_the_notebook_runs_from_an_empty_folder_to_a_prediction(tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="tests/requirements.txt has it")
    nbformat = pytest.importorskip("nbformat")
    pytest.importorskip("ipykernel")
    for folder in ("common", "models", "prepare"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for script in ROOT.glob("*.py"):
        shutil.copy(script, tmp_path)
    (tmp_path / "examples").mkdir()
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    changed = {"images, size, epochs = 80, 64, 16": "images, size, epochs = 4, 32, 1", "%pip install": "# "}
    for cell in notebook.cells:
        for before, after in changed.items():
            cell.source = cell.source.replace(before, after)
    assert any("epochs = 4, 32, 1" in cell.source for cell in notebook.cells)
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources=dict(metadata=dict(path=str(tmp_path / "examples")))
    )
    client.execute()
    texts = [
        "".join(output.get("text", "") for output in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]
    assert "best acc1" in "".join(texts)
    assert re.search(r"data/val/Maize/\S+: .* \d\.\d{4}", texts[-1].replace("\\", "/"))
    assert (tmp_path / "results" / "predictions.csv").is_file()
    shown = [output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in str(output)]
    assert len(shown) >= 2  # learning curve and confusion matrix


def test_the_dockerfile_copies_what_there_is():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    [line] = re.findall(r"^COPY (.*) \./$", text, re.MULTILINE)
    assert all((ROOT / name).is_file() for name in line.split())
    for folder in re.findall(r"/app/(\w+)", text):
        assert f"/{folder}/" in (ROOT / ".gitignore").read_text(encoding="utf-8")
    assert Path(ROOT / ".dockerignore").is_file()
