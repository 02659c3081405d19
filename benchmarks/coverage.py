"""How many true values lie inside the 80 % band of tools/forecast.py, on series of different kinds.

    python benchmarks/coverage.py airline-passengers.csv ETTh1.csv          one row for each file and horizon
    python benchmarks/coverage.py sales.csv --options "--seeds 1,2,3"       with options of tools/forecast.py

The band is measured on the validation part, the coverage on the test part. Prints a table in Markdown: the coverage of
the network, of DLinear, and of repeating the last period, mean over the seeds; below it, the network's coverage of each
file, mean over its horizons, and the mean over the files. Files whose results are in OUTPUT are not trained again.
"""

import json
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Annotated

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # common/
from common.options import answer_early

answer_early(__name__, __file__)  # --help and wrong options, before anything is trained

from common.options import Name, NotEmpty, UserError, run

FILES: Annotated[list[Name], NotEmpty()] = ["ETTh1.csv"]  # CSV files, see docs/series.md
OPTIONS: str = "--gaps carry"  # of tools/forecast.py, for every file; "": none
OUTPUT: Name = "checkpoints/coverage"  # folder in which <name of the CSV file>/ is created

ROOT = Path(__file__).resolve().parent.parent
METHODS = ("unireplknet", "dlinear", "last period")


def main():
    stems = [Path(path).stem for path in FILES]
    if len(set(stems)) < len(stems):
        raise UserError("two of FILES have the same name, which is that of the results; rename one")
    lines, means = [], {}
    for path, stem in zip(FILES, stems):
        results = Path(OUTPUT, stem, "results.json")
        if not results.is_file():
            command = [sys.executable, ROOT / "tools" / "forecast.py", "--csv", path, "--output", OUTPUT]
            if subprocess.run([*command, "--resume", "auto", *OPTIONS.split()]).returncode:
                raise UserError(f"tools/forecast.py did not finish with {path}, see above; leave the file out")
        rows = json.loads(results.read_text(encoding="utf-8"))["results"]
        for horizon in dict.fromkeys(row["horizon"] for row in rows):
            found = {}
            for method in METHODS:
                of_method = [row for row in rows if (row["horizon"], row["method"]) == (horizon, method)]
                found[method] = statistics.mean(row["coverage"] for row in of_method)
            means.setdefault(stem, []).append(found["unireplknet"])
            cells = " | ".join(f"{100 * coverage:.1f}" for coverage in found.values())
            lines.append(f"| {stem} | {horizon} | {of_method[0]['windows']:,} | {cells} |")
    print("\n| series | horizon | test windows | UniRepLKNet | DLinear | last period |\n|---|---|---|---|---|---|")
    print("\n".join(lines))
    means = {stem: 100 * statistics.mean(values) for stem, values in means.items()}
    print("\n" + ", ".join(f"{stem} {value:.1f}" for stem, value in means.items()))
    print(f"mean over the series: {statistics.mean(means.values()):.1f} %")


if __name__ == "__main__":
    run(main, positional="FILES")
