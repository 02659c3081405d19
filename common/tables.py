"""CSV files for people, who open them in Excel and similar programs: a name must not become a formula there.

Such programs compute a cell that begins with =, +, - or @, whoever chose it, and formulas can start programs and send
data. An apostrophe in front makes it a text; `read_table` takes it off again. Numbers stay numbers.
"""

import csv
import re
from pathlib import Path

# Also behind white space, and in the full-width forms of Chinese and Japanese keyboards.
FORMULA = re.compile("'*([\\s\ufeff\u200b]*[=+\\-@\uff1d\uff0b\uff0d\uff20\ufe66\ufe62\ufe63\ufe6b]|[\\t\\r\\n])")
NUMBER = re.compile(r"[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?|[+-](inf|nan)", re.ASCII)


def guard(cell):
    """A cell as it is written: with an apostrophe in front if a program could take it for a formula."""
    text = str(cell)
    return f"'{text}" if FORMULA.match(text) and not NUMBER.fullmatch(text) else cell


def unguard(cell):
    """The inverse of `guard`, for the text of a cell."""
    return cell[1:] if cell.startswith("'") and FORMULA.match(cell) and not NUMBER.fullmatch(cell[1:]) else cell


class TableWriter:
    """A `csv.writer` whose cells no program takes for formulas.

    Args:
        file: text file, opened with newline="".
    """

    def __init__(self, file):
        self.writer = csv.writer(file)

    def writerow(self, cells):
        self.writer.writerow([cell if cell is None else guard(cell) for cell in cells])

    def writerows(self, rows):
        for row in rows:
            self.writerow(row)

    def write_dicts(self, rows):
        """Write a header and a row for each of `rows`, which are dicts; a key that a row lacks is an empty cell."""
        names = list(dict.fromkeys(name for row in rows for name in row))
        self.writerow(names)
        self.writerows([row.get(name) for name in names] for row in rows)


def read_table(path):
    """Read a table that `TableWriter` wrote: a list of rows, which are lists of texts."""
    with open(Path(path), newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        return [[unguard(cell) for cell in row] for row in csv.reader(file)]
