"""Time series from CSV files: reading and checking, splitting, and cutting into windows.

docs/series.md is the table of what is read. What is decided about a file, and could be decided otherwise, is put into
words (`Series.notes`), which `tools/forecast.py` prints.
"""

import csv
import io
import math
import re
from collections import Counter
from dataclasses import dataclass, field, replace
from datetime import datetime, time, timedelta, timezone, tzinfo
from itertools import combinations
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np

from common.options import ConstantError, UserError
from common.tables import unguard
from common.text import label, read_text
from tools.dates import DAY, MONTHS, NUMBERS, YEARS, Ambiguous, Step, find_step, is_regular, read_dates, read_times
from tools.dates import read_numbered, to_standard_time, to_utc

MISSING = {"", "na", "n/a", "n.a.", "#n/a", "nan", "null", "none", "nil", "?", "-", "--", "..", "...", ".", "*", "***"}
MISSING |= {":", "/", "\u2013", "\u2014", "nd", "n.d.", "no data", "nodata", "missing", "unavailable", "not available"}
MISSING |= {"k.a.", "<na>", "\\n", "(null)", "-nan", "-nan(ind)", "1.#qnan", "-1.#ind", "无", "缺失"}
MISSING |= {"#div/0!", "#null!", "#num!", "#ref!", "#value!", "#name?"}  # as spreadsheets write errors
MISSING |= {"#wert!", "#bezug!", "#zahl!", "#nv", "#valeur!"}
# Numbers, as `str` writes them, by which programs mark missing values.
SENTINEL = re.compile(r"-(?:99+|200|32767|32768)\.[09]+|(?:999+|32767|65535)\.[09]+|-?[\d.]+e\+[23]\d")
INDEX = {"", "index", "id", "no", "no.", "nr", "nr.", "#", "row", "rowid", "row_id", "instant", "unnamed", "rownames"}
INDEX |= {"obs"}
PARTS = {  # names of columns that together are a date
    "year": ("year", "yr", "yyyy", "jahr", "año", "ano", "année", "annee", "anno", "rok", "年", "年份"),
    "month": ("month", "mon", "mo", "mm", "mnth", "monat", "mes", "mês", "mois", "mese", "miesiąc", "月", "月份"),
    "day": ("day", "dd", "dy", "mday", "tag", "día", "dia", "jour", "日", "day_of_month", "dayofmonth"),
    "hour": ("hour", "hr", "hh", "stunde", "hora", "heure", "时", "小时"),
    "minute": ("minute", "min", "mi", "分", "分钟"),
}
QUARTERS, WEEKS = ("quarter", "qtr", "q", "quartal", "kwartał", "kwartal", "季度"), ("week", "wk", "kw", "woche", "周")
DAYS_OF_YEAR, PERIODS = ("doy", "day_of_year", "dayofyear", "yday"), ("period",)  # M01 or Q01 behind a year
# Words in the names of columns that hold dates, and of columns that tell one series from another.
DATE_WORDS = set(
    "date datetime dteday time timestamp year yr month day week quarter period ds datum zeit fecha jahr monat mes data "
    "日期 时间 年份 月份".split()
)
SERIES_WORDS = set(
    "store shop station site sensor device meter machine country region state city county province district location "
    "place product item sku symbol ticker company customer client household patient subject animal building house room "
    "plant farm branch market series variable indicator entity".split()
)
TIMES = ("time", "hour", "hr", "hh", "uhrzeit", "zeit", "stunde", "时间", "时", "小时")
DATE_NAME = re.compile("date|time|year|month|day|week|quarter|datum|zeit|fecha|jahr|日期|时间|年|月", re.IGNORECASE)
SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}  # the rarer in text the earlier

OTHERS = {  # how files of other kinds begin
    b"PK\x03\x04": "ZIP",
    b"PAR1": "Parquet",
    b"\x1f\x8b": "gzip",
    b"\xd0\xcf\x11\xe0": "Excel (.xls)",
    b"\x89HDF": "HDF5",
    b"CDF\x01": "NetCDF",
    b"SQLite format": "SQLite",
    b"ARROW1": "Arrow",
    b"%PDF": "PDF",
    b"<!DOCTYPE": "HTML",
    b"<html": "HTML",
    b"<?xml": "XML",
}

# A number with a decimal point, or a decimal comma; thousands may be separated by the other one.
NUMBER = {
    decimal: re.compile(
        rf"[+-]?(?:(?:\d+|[1-9]\d{{0,2}}(?:[{other}]\d{{3}})+)(?:[{decimal}]\d*)?|[{decimal}]\d+)(?:[eE][+-]?\d+)?",
        re.ASCII,
    )
    for decimal, other in ((".", ","), (",", "."))
}
EITHER = re.compile(r"[+-]?[1-9]\d{0,2}[.,]\d{3}", re.ASCII)  # 1.004, 1,004: one, or a thousand
INFINITE = re.compile("[+-]?inf(inity)?", re.IGNORECASE)
SPACED = re.compile(r"(?<=\d)[ \u00a0\u202f'\u2019](?=\d{3}(?!\d))")  # 1 234 567


@dataclass
class Series:
    """A multivariate time series at equal steps.

    Attributes:
        clock: one `datetime` without time zone per row, ascending: UTC if `utc`, else the times of the file.
        step: `Step` between the rows.
        columns: names of the number columns.
        values: float64 array (rows, columns), all finite.
        date: name of the date column.
        zone: `tzinfo` of `dates`, or None.
        utc: whether `clock` is in UTC.
        notes: what was decided about the file, a sentence each.
    """

    clock: list
    step: Step
    columns: list
    values: np.ndarray
    date: str
    zone: tzinfo | None = None
    utc: bool = False
    notes: list = field(default_factory=list)

    @property
    def interval(self):
        """Mean `timedelta` between the rows."""
        return self.step.interval

    @property
    def dates(self):
        """The dates as the file has them: `datetime`s with its time zone, if it has one."""
        return [self.show(date) for date in self.clock]

    def show(self, date):
        if self.utc:
            return date.replace(tzinfo=timezone.utc).astimezone(self.zone)
        return date.replace(tzinfo=self.zone)

    def at_midnight(self):
        """Whether all dates are days, without a time of day."""
        return all(date.time() == time() for date in self.dates)

    def following(self, count):
        """The dates of the `count` rows after the last."""
        last = int(self.step.rows(self.clock[-1:])[0])
        return [self.show(self.step.at(last + number)) for number in range(1, count + 1)]


class Choice(UserError):
    """An error that options of `read_series` end: those which the message proposes, {name: value}."""

    def __init__(self, message, **options):
        super().__init__(message)
        self.options = options


def read_series(path, date_column=None, columns=(), encoding="utf-8-sig", **options):
    """Read a CSV file.

    Args:
        path: the file; fields are separated by commas, semicolons, tabs or bars.
        date_column: name of the date column; None: the first one that holds dates.
        columns: names of the number columns to read; empty reads all that vary.
        encoding: text encoding of the file; "utf-8-sig" also skips a byte order mark.
        order: "dmy", "mdy" or "ymd": order of day, month and year where all are numbers; "auto": the column decides.
        decimal: "." or ",": decimal sign; "auto": the columns decide.
        zone: IANA time zone of local times, such as "Europe/Berlin".
        gaps: "refuse" missing rows and empty cells, or fill them: "carry" the last value forward, or "interpolate".
        where: texts "column=value"; only rows with these values are read.
        missing: cells that mean a missing value, besides the usual ones.

    Returns:
        `Series`.

    Raises:
        UserError: if the file cannot be read as a series; the message names column and line as shown by an editor, and
            all options that are needed, one after the other.
    """
    given = dict(date_column=date_column, columns=columns, encoding=encoding) | options
    try:
        return read_file(Path(path), **given)
    except Choice as error:
        choice = error
    repeated = date_column is not None and "date_column" in choice.options  # as two columns refer to each other
    repeated |= any(value[-1] in value[:-1] for value in choice.options.values() if isinstance(value, list))
    if not repeated:
        try:
            read_series(path, **given | choice.options)
        except Choice as then:
            further = str(then).removeprefix(str(path))
            further = f"it{further}" if further.startswith(" ") else further.lstrip(":, ")
            value = next(iter(choice.options.values()))
            value = value if isinstance(value, str) else ",".join(value)
            raise Choice(f"{choice}; with {value}, {further}", **choice.options) from choice
        except UserError:
            pass  # no option helps, or it is the wrong one
    raise choice


def read_file(
    path,
    date_column,
    columns,
    encoding,
    *,
    order="auto",
    decimal="auto",
    zone=None,
    gaps="refuse",
    where=(),
    missing=(),
):
    """`Series` of a CSV file; see `read_series`."""
    table = read_cells(path, encoding)
    add_header(table)
    if table.names and not table.rows:
        raise UserError(f"{path} has no row below the header {list_names(table.names)}; add rows, or give another file")
    drop_units(table)
    rename_doubles(table)
    transpose(table, select_rows(table, where))
    spread_months(table, columns)
    dates = choose_dates(table, date_column, order, open_zone(zone))
    check_names(table, dates.columns, columns)
    drop_other_rows(table, dates)
    if len(table.rows) < 2:
        raise UserError(f"{path} has {len(table.rows)} rows of numbers; add more rows")
    check_years(table, dates)
    problem = next((row for row, date in enumerate(dates.reading.dates) if date is None), None)
    if problem is not None:
        other = other_dates(table, dates.columns)
        message = (
            f"{path}, line {table.lines[problem]}, column {dates.columns[0]}: {dates.reading.problem}; correct it, or "
            f"set DATE to {other or 'another column'}"
        )
        raise Choice(message, date_column=other) if other else UserError(message)
    check_one_series(table, dates, where)
    chosen, values = read_numbers(table, dates.columns, columns, decimal, missing)
    series = Series([], None, chosen, values, dates.columns[0], notes=table.notes)
    arrange(series, table, dates.columns, dates.reading, zone, gaps, where)
    drop_empty_ends(series, table)
    fill(series, path, gaps, chosen=bool(columns))
    return series


@dataclass
class Table:
    """The cells of a CSV file.

    Attributes:
        path: the file.
        names: of the columns, different from each other.
        rows: lists of as many texts, without white space around them.
        lines: line number of each row.
        separator: a key of `SEPARATORS`.
        notes: see `Series`.
        sources: {column: line} if the table was turned.
    """

    path: Path
    names: list
    rows: list
    lines: list
    separator: str
    notes: list
    sources: dict = field(default_factory=dict)

    def where(self, row, name):
        """Where the file has a cell, for messages."""
        if name in self.sources:
            return f"line {self.sources[name]}, column {self.rows[row][0]}"
        return f"line {self.lines[row]}, column {name}"

    def cells(self, name):
        place = self.names.index(name)
        return [row[place] for row in self.rows]

    def drop(self, keep):
        """Keep only the rows with the numbers `keep`."""
        self.rows = [self.rows[row] for row in keep]
        self.lines = [self.lines[row] for row in keep]


def read_cells(path, encoding):
    """`Table` of a CSV file; UserError if it is none."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; set CSV to the path of a CSV file in it")
    if not path.is_file():
        raise UserError(f"there is no file {path}; set CSV to the path of a CSV file")
    refuse_others(path)
    try:
        text = read_text(path, encoding, "strict")
    except UnicodeError as error:
        reason = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else error
        fitting = [name for name in ("gb18030", "big5", "cp949", "shift_jis", "cp1252") if decodes(path, name)]
        message = f"{path} is not encoded in {encoding} ({reason}); save it as UTF-8, or set ENCODING to its encoding"
        if not fitting:
            raise UserError(f"{message}, such as utf-16") from error
        raise Choice(f"{message}, which may be {' or '.join(fitting)}", encoding=fitting[0]) from error
    notes, skipped, line = [], 0, ""
    while re.match("#|sep=.\n", text) or text.partition("\n")[0].strip(" \t,;|") == "" and text:
        line, _, text = text.partition("\n")
        skipped += 1
    if line.startswith("#") and is_header(line[1:], text):
        text, skipped = f"{line[1:]}\n{text}", skipped - 1
    if skipped:
        lines_are = f"{skipped} lines are" if skipped > 1 else "line is"
        notes.append(f"the first {lines_are} empty or a note that begins with # or sep=, left out")
    separator = find_separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    rows, starts = [], [skipped + 1]
    try:
        for row in reader:
            rows.append((reader.line_num + skipped, row))
            starts.append(reader.line_num + skipped + 1)
    except csv.Error as error:  # a field of more than 131,072 characters
        hint = "a quotation mark is not closed, or this is no CSV file; remove it, or save the table as CSV"
        raise UserError(f"{path}, line {starts[-1]}: not valid CSV ({error}): {hint}") from error
    above = count_above(rows)
    for start, (_, row) in zip(starts, rows):
        if has_open_quote(row, separator, len(rows[above][1])):
            raise UserError(f"{path}, line {start}: a quotation mark is not closed; remove it")
    rows = [(line, [cell.strip() for cell in row]) for line, row in rows]
    if above:
        lines = [line for line, row in rows[:above] if any(row)]
        notes.append(f"{some_of(lines, 'line')} above the header left out: not the fields of the table")
    names, rows = [unguard(name) for name in rows[above][1]] if rows else [], rows[above + 1 :]
    blank = [line for line, row in rows if row and not any(row) and len(row) > 1]
    rows = [(line, row) for line, row in rows if any(row)]
    if blank:
        notes.append(f"{some_of(blank, 'line')} without any value left out")
    table = Table(path, names, [row for _, row in rows], [line for line, _ in rows], separator, notes)
    level(table)
    return table


def decodes(path, encoding):
    """Whether the bytes of a file are text in an encoding."""
    try:
        return bool(read_text(path, encoding, "strict"))
    except UnicodeError:
        return False


def is_header(line, text):
    """Whether a line, written as a comment, names the columns of a table that begins with the first line of `text`."""
    below = text.partition("\n")[0]
    separator = find_separator(text)
    names, cells = (next(csv.reader([row], delimiter=separator), []) for row in (line, below))
    return len(names) == len(cells) > 1 and not any(map(number, names)) and any(map(number, cells))


def drop_units(table, most=5):
    """Leave out rows below the header without a number or a date, such as units, if those below have numbers.

    So are rows above them that have no date, if those below have, and a block above the header that is as wide as the
    table: the header is the first line in which all cells are filled and different.
    """
    above = next((place for place, row in enumerate(table.rows[:50]) if any(map(number, row))), 0)
    lines = [["" if re.fullmatch(r"column \d+", name) else name for name in table.names], *table.rows[:above]]
    full = (place for place, row in enumerate(lines) if all(row) and len(set(row)) == len(row))
    header = next((place for place in full if not any(map(is_date, lines[place]))), 0)
    if header > 1 and not all(lines[0]):  # else these are names that take several lines, or units
        table.notes.append(f"{header} lines above the header left out: not the fields of the table")
        table.names = [unguard(name) for name in lines[header]]
        table.drop(range(header, len(table.rows)))
    rows = table.rows[: most + 1]
    units = next((place for place, row in enumerate(rows) if any(number(cell) or is_date(cell) for cell in row)), 0)
    dated = next((place for place, row in enumerate(rows) if any(map(is_date, row))), 0)
    if dated and not any(map(number, rows[dated - 1])):
        units = dated
    if units and any(map(number, rows[units])):
        if len(set(table.names)) < len(table.names):  # names that take several lines, as pandas writes them
            table.names = [" ".join(filter(None, name)) for name in zip(table.names, *rows[:units])]
            table.notes.append(f"names of columns continue in {some_of(table.lines[:units], 'line')}")
            table.drop(range(units, len(table.rows)))
            return
        table.notes.append(f"{some_of(table.lines[:units], 'line')} below the header left out: no date and no numbers")
        table.drop(range(units, len(table.rows)))


def rename_doubles(table):
    """Append its number to a column called like one before it, but for numbers, which may be a row of the table."""
    for place, name in enumerate(table.names):
        if name in table.names[:place] and not number(name):
            table.names[place] = f"{name} (column {place + 1})"
            table.notes.append(f"a second column {name} is called {table.names[place]}")


def refuse_others(path):
    """UserError for a file that is empty, or of another kind than CSV."""
    with open(path, "rb") as file:
        head = file.read(4096)
    if not head.strip(b"\xef\xbb\xbf \t\r\n"):
        raise UserError(f"{path} is empty; give a CSV file with a header and rows")
    kind = next((kind for start, kind in OTHERS.items() if head.startswith(start)), None)
    if kind == "ZIP" and path.suffix.lower() in (".xlsx", ".xlsm", ".ods"):
        kind = "Excel" if path.suffix.lower() != ".ods" else "OpenDocument"
    if re.match(rb"\s*(\[\s*)?\{|\s*\[\s*[\[\"]", head.removeprefix(b"\xef\xbb\xbf")):
        kind = "JSON"
    if kind:
        remedy = "unpack it" if kind in ("ZIP", "gzip") else "save its table as CSV"
        raise UserError(f"{path} is {'an' if kind[0] in 'AEOHX' else 'a'} {kind} file, not CSV; {remedy}")


def has_open_quote(row, separator, width):
    """Whether a cell swallowed lines of the table: such a line has `width` fields or more, and a number among them."""
    for cell in row:
        if "\n" in cell:
            inner = [line.split(separator) for line in cell.split("\n")[1:]]
            if any(len(fields) >= max(width, 2) and any(map(number, fields)) for fields in inner):
                return True
    return False


def count_above(rows, most=50):
    """How many of the first rows are notes above the header.

    They have another number of fields than the table, or leave its second half empty, as spreadsheets write them. The
    first row of its width is the header if it holds names and the next one numbers; else the first row of all is: one
    without a name for the first column, or one that is broken.

    Args:
        rows: pairs of line number and texts.
        most: maximum number.
    """
    rows = [row for _, row in rows[:200]]
    widths = [len(row) for row in rows if row]
    if not widths:
        return 0
    usual, count = Counter(widths).most_common(1)[0]
    rows = [shorten(row, usual) for row in rows]
    full = [number for number, row in enumerate(rows) if len(row) == usual]
    if len(full) < 2 or len(rows[0]) == usual or count < len(widths) / 2 or full[0] > most:
        return 0
    if full[0] == 1 and len(rows[0]) == usual - 1 and len(rows[0]) > 1:
        return 0
    names, below = rows[full[0]], [cell for row in full[1:] for cell in rows[row]]
    numbers = sum(map(number, names))
    named = not numbers and not any(is_date(cell.strip()) for cell in names)
    return full[0] if any(map(number, below)) and (named or date_run(names)) else 0


def shorten(row, width):
    """A row without the empty cells at its end: those beyond `width`, or all if they are half of `width` or more."""
    end = max((place for place, cell in enumerate(row, 1) if cell.strip()), default=0)
    return row[:end] if 2 * end <= width else row[: max(end, width)]


def find_separator(text):
    """The separator that gives the first lines as many fields as the header, outside quotes."""
    lines = text.split("\n", 200)[:200]
    best = 0, 0, ","
    for title in (False, True):  # if nothing separates the first line, it may be a title above the header
        for separator in SEPARATORS:
            try:
                rows = [row for row in csv.reader(lines, delimiter=separator, skipinitialspace=True) if row]
            except csv.Error:
                continue
            widths = [len(row) for row in rows]
            usual, count = Counter(widths).most_common(1)[0] if rows else (0, 0)
            if not rows or usual < 2 or (widths[0] < 2) != title:
                continue
            score = round(count / len(rows), 1), usual if title else min(usual, widths[0] + 1), separator
            if score[:2] > best[:2]:
                best = score
        if best[0]:
            break
    return best[2]


def level(table):
    """Give each row of a table as many cells as there are names; UserError where that is impossible."""
    names, rows = table.names, table.rows
    width = len(names)
    commas = "numbers seem to have commas, which separate fields here: put such numbers in quotes"
    if rows and width and all(len(row) == width + 1 for row in rows) and any(row[-1] for row in rows):
        if table.separator == "," and DATE_NAME.search(names[0]) and (is_date(rows[0][0]) or len(rows[0][0]) in (6, 8)):
            halves = all(row[-1].isdigit() for row in rows)
        else:  # names of rows, as in tables from R, are different
            halves = table.separator == "," and all(row[0].isdigit() for row in rows)
            halves = halves and len({row[0] for row in rows}) < len(rows)
        if halves:
            raise UserError(f"{table.path}, line {table.lines[0]}: expected {width} fields, got {width + 1}; {commas}")
        if DATE_NAME.search(names[0]) and is_date(rows[0][0]) and not is_date(rows[0][1]):
            names.append("")
            table.notes.append("the header lacks a name, for the last column, as dates are in the first")
        else:
            names.insert(0, "")  # as R writes row names
            table.notes.append("the header lacks a name for the first column, as in tables from R")
        width += 1
    for place in range(width - 1, 0, -1):  # separators at the ends of all lines
        if names[place] or any(len(row) > place and row[place] for row in rows):
            break
        width = place
    del names[width:]
    for line, row in zip(table.lines, rows):
        while len(row) > width and not row[-1]:
            row.pop()
        if len(row) < width and not any(map(number, row)):
            row.extend([""] * (width - len(row)))  # may be a note below the table
        if len(row) != width:
            hint = commas if table.separator == "," and len(row) > width and row[-1].isdigit() else "fix this line"
            raise UserError(f"{table.path}, line {line}: expected {width} fields, got {len(row)}; {hint}")
    for place in range(width - 1, -1, -1):
        if not names[place]:
            if any(row[place] for row in rows) or width == 1:
                names[place] = f"column {place + 1}"
            else:
                del names[place]
                for row in rows:
                    del row[place]


def is_date(cell):
    """Whether a text alone is a date, and no plain number."""
    try:
        return read_dates([cell]) is not None
    except Ambiguous:
        return True


def date_run(names):
    """(first, end) of the columns whose names are dates at equal steps, six or more and most of all; None.

    Names that are no dates may precede and follow them.
    """
    for numbers in (False, True):
        dated = [number(name) if numbers else is_date(name) for name in names]
        end = len(names) - dated[::-1].index(True) if True in dated else 0
        for first in range(min(end, 12)):
            run = [name for name in names[first:end] if name]
            if len(run) < 6 or 2 * len(run) < len(names) or not dated[first]:
                continue
            try:
                reading = read_dates(run, numbers=numbers, share=1)
            except Ambiguous:
                return first, first + len(run)
            if reading:
                return first, first + len(run)
    return None


def holds_dates(cells, index=False):
    """Whether a column holds dates, most of them at equal steps, or numbers that are such dates if no `index`."""
    for numbers in (False, True)[: 2 - index]:
        try:
            reading = read_dates(cells, numbers=numbers, gaps=0.2)
        except Ambiguous:
            return True
        dates = {date for date in reading.dates if date} if reading else ()
        if len(dates) > 2 and is_regular(dates, 0.5):
            return True
    return False


def other_dates(table, columns):
    """Name of the first column that holds dates, see `holds_dates`, besides `columns`; None if there is none."""
    others = {name: table.cells(name) for name in table.names if name not in columns}
    return next((name for name, cells in others.items() if holds_dates(cells, is_index(name))), None)


def add_header(table):
    """Give the columns of a table names if its first line has none: if it holds a date where the rows below do."""
    if date_run(table.names):
        return
    named = [name for name in table.names if not re.fullmatch(r"column \d+", name)]
    bare = all(map(number, named)) and (  # no names at all
        len(set(named)) < len(named) or (len(named) == len(table.names) and any("." in name for name in named))
    )
    bare = bare and not any(is_date(cell) for row in table.rows[:20] for cell in row)
    for place, name in enumerate(table.names):
        below = [row[place] for row in table.rows[:20]]
        if is_date(name):
            dated = sum(map(is_date, below)) > 0.8 * len(below)
        else:
            first = number(name) and read_dates([name], numbers=True, anything=True)
            dated = first and all(map(number, table.names)) and read_dates([name, *below], numbers=True)
        if dated or bare:
            row = ["" if re.fullmatch(r"column \d+", name) else name for name in table.names]
            table.rows.insert(0, row)
            table.lines.insert(0, table.lines[0] - 1 if table.lines else 1)
            table.names[:] = [f"column {place + 1}" for place in range(len(row))]
            table.notes.append("the file has no header, so the columns are column 1, column 2, ...")
            return


def select_rows(table, where):
    """Keep the rows of a table with the values of `where`, see `read_series`; UserError if there are none.

    Returns the names of the columns in it.
    """
    parts, used = [], []
    for part in where:  # a comma in a value separates two parts of a list
        if "=" not in part and parts:
            parts[-1] += f",{part}"
        else:
            parts.append(part)
    total = len(table.rows)
    for part in parts:
        names = [name for name in table.names if part.startswith(f"{name}=")]
        if not names:
            raise UserError(
                f"WHERE {part!r} must be a column and its value, such as Country=Norway; {table.path} has the columns "
                f"{list_names(table.names)}"
            )
        name = max(names, key=len)
        value = part[len(name) + 1 :].strip()
        cells = table.cells(name)
        keep = [row for row, cell in enumerate(cells) if cell == value]
        if not keep:
            known = list(dict.fromkeys(cells))
            raise UserError(
                f"no row of {table.path} has {value!r} in column {name}; set WHERE to one of its values, "
                f"{list_names(known, 5)}"
            )
        table.drop(keep)
        used.append(name)
    if parts:
        table.notes.append(f"WHERE {', '.join(parts)}: {len(table.rows):,} of {total:,} rows read")
    return used


def transpose(table, used):
    """Turn a table whose header holds the dates, with a row for each series, into one with a row for each date.

    Args:
        used: names of the columns in WHERE, which name a single series.
    """
    run = date_run(table.names)
    if not run or not table.rows:
        return
    first, end = run
    if any(holds_dates(table.cells(name), is_index(name)) for name in [*table.names[:first], *table.names[end:]]):
        return  # the names are numbers of sensors, say
    labels = [place for place in range(first) if any(not number(row[place]) for row in table.rows if row[place])]
    labels = [table.names.index(name) for name in used] + labels or list(range(first))
    names = None
    for place in labels:  # the first column that tells the rows apart, else all together
        cells = [row[place] for row in table.rows]
        if all(cells) and len(set(cells)) == len(cells):
            names = cells
            break
    names = names or [" ".join(row[place] for place in labels if row[place]) for row in table.rows]
    counts = Counter(names)
    numbered = [f"{name} line {line}".strip() for name, line in zip(names, table.lines)]
    names = [name if name and counts[name] == 1 else other for name, other in zip(names, numbered)]
    dates = [name for name in table.names[first:end]]
    unused = [table.names[place] for place in range(len(table.names)) if not first <= place < end]
    table.notes.append(
        f"dates in the header, so the table is turned: {len(names):,} column{'s' * (len(names) > 1)}, one for each line"
        + (f"; not read as numbers: {some_of(unused, 'column')}" if unused else "")
    )
    table.sources = dict(zip(names, table.lines))
    table.rows = [[date, *(row[first + place] for row in table.rows)] for place, date in enumerate(dates)]
    table.lines = [1] * len(dates)
    date = "date"
    while date in names:
        date += "_"
    table.names = [date, *names]


def spread_months(table, columns):
    """Turn a table with a row for each year and a column for each month into one with a row for each month.

    Args:
        columns: names of the columns to read; a table of which single months are wanted stays as it is.
    """
    numbered = [bool(re.fullmatch(r"0?[1-9]|1[0-2]", name)) for name in table.names]
    months = {}
    for place, name in enumerate(table.names):
        match = re.fullmatch(r"(0?[1-9]|1[0-2])\s*月?", name)
        month = int(match[1]) if match else MONTHS.get(name.lower().rstrip("."))
        if month in months or (number(name) and not numbered[place]):
            return
        if month:
            months[month] = place
    others = [place for place in range(len(table.names)) if place not in months.values()]
    years = [place for place in others if all(re.fullmatch(r"\d{4}", row[place]) for row in table.rows)]
    years = [place for place in years if len({row[place] for row in table.rows}) == len(table.rows)]
    if len(months) < 12 or not years or any(table.names[place] in columns for place in months.values()):
        return
    unused = [table.names[place] for place in others if place != years[0]]
    table.notes.append(
        f"a row for each year and a column for each month: {12 * len(table.rows):,} months, named value"
        + (f"; not read as numbers: {some_of(unused, 'column')}" if unused else "")
    )
    lines = [(line, row) for line, row in sorted(zip(table.lines, table.rows), key=lambda pair: pair[1][years[0]])]
    table.rows = [[f"{row[years[0]]}-{month:02}", row[months[month]]] for _, row in lines for month in range(1, 13)]
    table.lines = [line for line, _ in lines for _ in range(12)]
    table.names = ["date", "value"]


def check_names(table, dates, columns):
    """UserError if names are doubled or lacking."""
    path, names = table.path, table.names
    unknown = [name for name in columns if name not in names or name in dates]
    if unknown:
        raise UserError(
            f"{path} has no number column {unknown[0]!r}, only {list_names(names)}; choose among these, or give a file "
            "that has it"
        )
    if not set(names) - set(dates):
        raise UserError(f"{path} has no column besides {list_names(dates)}; add columns of numbers")


@dataclass
class Dates:
    """The date of each row: names of the columns that hold it, and their `Reading`."""

    columns: list
    reading: object


def choose_dates(table, name, order, zone=None):
    """`Dates` of a table: of the column `name`, or the first that holds dates; UserError if there are none."""
    path, names = table.path, table.names
    if len(set(names)) < len(names):
        raise UserError(
            f"{path}, line 1: {list_names(names)} is read as the header, but looks like a row whose date is not read; "
            "write dates as 2016-07-01 13:00:00 or 2016-07-01, and add a header"
        )
    found = candidate = None
    try:
        if name is None:
            cells = {name: table.cells(name) for name in names}
            fixed = [name for name in names if len(set(cells[name])) < 2]  # LAST UPDATE, say; or the date of one day
            moving = [name for name in names if name not in fixed]
            for candidate in moving:
                reading = read_dates(cells[candidate], order)
                if reading:
                    found = Dates([candidate], reading)
                    break
            found = found or join_parts(table, order)
            for candidate in sorted(moving, key=date_named, reverse=True) if not found else ():
                named = date_named(candidate)
                if not named and any(date_named(name) and looks_dated(cells[name]) for name in moving):
                    break  # rather none than numbers beside a column that is called a date
                if named or not is_index(candidate) or not all(map(str.isdecimal, cells[candidate])):
                    reading = read_dates(cells[candidate], order, numbers=True, gaps=0.5 * named)
                    if reading:
                        found = Dates([candidate], reading)
                        break
            for candidate in fixed if not found else ():
                reading = read_dates(cells[candidate], order)
                if reading:
                    found = Dates([candidate], reading)
                    break
        elif name in names:
            cells = table.cells(name)
            reading = read_dates(cells, order)
            found = Dates([name], reading) if reading else join_parts(table, order, name)
            if not found:
                reading = read_dates(cells, order, numbers=True, anything=True)
                found = Dates([name], reading) if reading else None
    except Ambiguous as error:
        message = f"{path}, column {name or candidate}: {error}"
        fitting = re.findall(r"\b[dmy]{3}\b", message.rpartition(" can be ")[2])
        raise (Choice(message, order=fitting[0]) if fitting else UserError(message)) from error
    if name is not None and name not in names:
        raise UserError(
            f"{path} has no date column {name!r}, only {list_names(names)}; set DATE to the name of the date "
            "column"
        )
    if not found and name is None:
        remedy, column = advise_date(table, order)
        message = f"{path} has no date column, only {list_names(names)}; set DATE {remedy}"
        raise Choice(message, date_column=column, gaps="carry") if column else UserError(message)
    if not found:
        line, cell = next(((line, cell) for line, cell in zip(table.lines, table.cells(name)) if cell), (1, ""))
        raise UserError(
            f"{path}, line {line}, column {name}: {label(cell)!r} is not a date, nor are most cells of the column; "
            "write dates as 2016-07-01 13:00:00 or 2016-07-01, or set DATE to another column"
        )
    return add_times(table, add_months(table, found), zone)


def advise_date(table, order):
    """(The end of a sentence: to which column DATE may be set, and why it was not read; this column or None)."""
    columns = sorted(table.names, key=lambda name: (not date_named(name), is_index(name)))
    for name in filter(date_named, columns):
        cells = table.cells(name)
        try:
            reading = read_dates(cells, order, share=0.3)
        except Ambiguous:
            continue
        if reading and None in reading.dates:
            kinds = [bool(date) for date in reading.dates]
            row, example = kinds.index(False), cells[kinds.index(True)]
            return (
                f"to the name of the date column, and write all dates in one form: {label(cells[row])!r} in "
                f"{table.where(row, name)}, is not one like {example!r} ({reading.note})"
            ), None
    for name in columns:
        cells = table.cells(name)
        reading = read_dates(cells, order, numbers=True, anything=True)
        known = sorted({date for date in reading.dates if date}) if reading else ()
        if len(known) > len(cells) / 2 and known[0].year in YEARS and known[-1].year in YEARS:
            why = f"{cells[0]!r}: {reading.note}"
            return f"to {name} if these are dates with gaps ({why}), and GAPS to fill these", name
    row, cell = next(((row, cell) for row, cell in enumerate(table.cells(columns[0])) if cell), (0, ""))
    return (
        f"to the name of the date column, and write dates as 2016-07-01 13:00:00 or 2016-07-01 ({label(cell)!r} in "
        f"{table.where(row, columns[0])}, is not read as one; docs/series.md lists what is)"
    ), None


def name_words(name):
    return re.findall(r"[^\W\d_]+", re.sub("(?<=[a-z])(?=[A-Z])", " ", name).lower())


def date_named(name):
    return not DATE_WORDS.isdisjoint(name_words(name))


def tells_series(name):
    """Whether a column is called like stations or products: store, station_name, Item ID, but not store_type."""
    words = name_words(name)
    if len(words) > 1 and words[-1] in ("id", "no", "nr", "number", "name", "code"):
        words.pop()
    return bool(words) and words[-1] in SERIES_WORDS


def is_index(name):
    """Whether a column is called a number of rows or things: id, No., customer_id."""
    plain = name.lower().partition(":")[0].strip()
    return plain in INDEX or not {"id", "no", "nr", "index", "number", "code"}.isdisjoint(name_words(name)[-1:])


def looks_dated(cells):
    """Whether cells that could not be read may be dates all the same: texts with digits, or different long numbers."""
    known = [cell for cell in cells if cell]
    if all(re.fullmatch(r"\d{4,}", cell) for cell in known):
        return sorted(set(known), key=int) in (known, known[::-1])
    return all(re.search(r"\d", cell) and not number(cell) for cell in known) and not read_times(known)


def check_years(table, dates):
    """UserError if most dates are in years in which nobody measures, as those of other calendars seem to be."""
    reading = dates.reading
    years = sorted(date.year for date in reading.dates if date)
    if years and years[len(years) // 2] not in YEARS and reading.note not in NUMBERS:
        row = next(row for row, date in enumerate(reading.dates) if date)
        raise UserError(
            f"{table.path}, line {table.lines[row]}, column {dates.columns[0]}: {table.cells(dates.columns[0])[row]!r} "
            f"is in the year {reading.dates[row].year}, but years from {YEARS[0]} to {YEARS[-1]} are read; convert "
            "dates of other calendars, such as the Buddhist or the Persian one, to the Gregorian calendar"
        )


def check_one_series(table, dates, where):
    """UserError if a column tells several series apart that have no date in common, and so would be read as one.

    Their rows are in blocks, or alternate. A column called like a station or a product is believed to tell series
    apart, another one only if its blocks are where the dates go back.
    """
    clock = dates.reading.dates
    if len(clock) > 1.2 * len(set(clock)):
        return  # see `drop_doubles`
    ascending = sum(later > earlier for earlier, later in zip(clock, clock[1:])) > len(clock) / 2
    for name in table.names:
        cells, named = table.cells(name), tells_series(name)
        kinds = len(set(cells))
        if name in dates.columns or date_named(name) or not 1 < kinds <= len(cells) / 4:
            continue
        if not named and any(map(number, cells)):
            continue
        changes = [row for row in range(1, len(cells)) if cells[row] != cells[row - 1]]
        steps = [clock[row] - clock[row - 1] for row in changes]
        back = all(abs(step) > DAY / 8 and (step > timedelta()) != ascending for step in steps)
        if (len(changes) == kinds - 1 and (named or back)) or (named and cells[kinds:] == cells[:-kinds]):
            example = f"{name}={Counter(cells).most_common(1)[0][0]}"
            raise Choice(
                f"{table.path}: column {name} tells several series apart, {list_names(list(dict.fromkeys(cells)), 3)}; "
                f'choose one with WHERE, such as --where "{example}", or delete the column if all rows are one series',
                where=[*where, example],
            )


def list_names(names, most=8):
    """Up to `most` names, each shortened, and how many more there are."""
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(map(label, names[:most])) + more


def number(cell):
    return bool(NUMBER["."].fullmatch(cell) or NUMBER[","].fullmatch(cell))


def join_parts(table, order, name=None):
    """`Dates` from columns for year, month, day and hour; None if there are none, or `name` is not among them."""
    lower = {column.lower(): column for column in table.names}
    parts = {}
    for part, spellings in PARTS.items():
        column = next((lower[spelling] for spelling in spellings if spelling in lower), None)
        if column is None:
            break
        parts[part] = column
    columns = list(parts.values())
    letter = ""
    for kind, spellings in dict(Q=QUARTERS, W=WEEKS, D=DAYS_OF_YEAR, P=PERIODS).items() if len(parts) == 1 else ():
        column = next((lower[spelling] for spelling in spellings if spelling in lower), None)
        if column is not None:
            letter = kind
            columns.append(column)
            break
    if len(columns) < 2 or (name is not None and name not in columns):
        return None
    rows = list(zip(*(table.cells(column) for column in columns)))
    cells = ["" if not all(row) else "-".join(row[:3]) for row in rows]
    cells = [f"{cell} {':'.join((*row[3:], '00')[:2])}" if row[3:] and cell else cell for cell, row in zip(cells, rows)]
    cells = [re.sub(r"\.0+(?=\D|$)", "", cell) for cell in cells]
    cells = [re.sub(r":(\d)$", r":0\1", cell) for cell in cells]
    kind = "periods"
    if letter and letter != "P":
        pairs = [re.fullmatch(rf"(\d{{4}})-{letter}?(\d{{1,3}})", cell, re.IGNORECASE) for cell in cells]
        pairs = [pair and (int(pair[1]), int(pair[2])) for pair in pairs]
        if letter == "W":
            kind, cells = number_weeks(pairs)
        elif letter == "D":
            kind, days = "days of the year", [pair and datetime(pair[0], 1, 1) + DAY * (pair[1] - 1) for pair in pairs]
            cells = ["" if day is None else f"{day:%Y-%m-%d}" for day in days]
        else:
            kind, cells = "quarters", [f"{pair[0]}-Q{pair[1]}" if pair else "" for pair in pairs]
    reading = read_dates(cells, order)
    if reading is None:
        return None
    reading.note = "years, months, days and hours in columns of their own"
    if letter:
        reading.note = f"years and {kind} in columns of their own"
    return Dates(columns, reading)


def number_weeks(pairs):
    """(what the weeks are, their first days as texts) of pairs of year and week, "" for None.

    Weeks begin on Monday as in ISO 8601, or, if only then the rows are equally far apart, on Sunday as in the
    epidemiological weeks of the United States. In both, 4 January is in the first week.
    """
    found = {}
    for kind, shift in (("ISO weeks", 0), ("weeks from Sunday on", 1)):
        days = []
        for pair in pairs:
            fourth = datetime(pair[0], 1, 4) if pair else None
            first = pair and fourth - DAY * ((fourth.weekday() + shift) % 7)
            days.append(first and first + 7 * DAY * (pair[1] - 1))
        found[kind] = ["" if day is None else f"{day:%Y-%m-%d}" for day in days]
        different = {day for day in days if day}  # which is fewer than the pairs if two weeks are one
        if len(different) == len({pair for pair in pairs if pair}) and is_regular(different, 0.2):
            return kind, found[kind]
    return "ISO weeks", found["ISO weeks"]


def add_months(table, dates):
    """`Dates` with the months or quarters that a column beside repeated years names: January, Jan., Quarter 1, Q1."""
    reading = dates.reading
    years = set(reading.dates)
    if len(years) == len(reading.dates) or any(date is None or (date.month, date.day) != (1, 1) for date in years):
        return dates
    for name in table.names:
        months = [read_month(cell) for cell in table.cells(name)] if name not in dates.columns else [None]
        if None not in months and len(set(months)) > 3:
            points = [date.replace(month=month) for date, month in zip(reading.dates, months)]
            if is_regular(points, 0.5):
                reading.dates = points
                reading.note += f", months in column {name}"
                return Dates([*dates.columns, name], reading)
    return dates


def read_month(cell):
    """Number of the month that a cell names, or of the first of a quarter; None if it names none."""
    quarter = re.fullmatch(r"(\D*)([1-4])(\D*)", cell)
    if quarter and f"{quarter[1]}{quarter[3]}".strip(" .-第").lower() in QUARTERS:
        return 3 * int(quarter[2]) - 2
    return MONTHS.get(cell.lower().rstrip("."))


def add_times(table, dates, zone=None):
    """`Dates` with the times of day of a column of their own, if there is one.

    It is called like one, or makes the dates different and regular, and its times follow each other in each day.

    Args:
        zone: `ZoneInfo` of local times, or None.
    """
    reading = dates.reading
    days = reading.dates
    if None in days or not reading.days_only or len(set(days)) == len(days):
        return dates
    others = {name: table.cells(name) for name in table.names if name not in dates.columns}
    for name, cells in others.items():
        if " ".join(name_words(name)) in TIMES or all(":" in cell for cell in cells):
            times = read_times(cells)
            if times and len(set(times)) > 1:
                reading.dates = [day + time for day, time in zip(days, times)]
                reading.note += f", times of day in column {name}"
                return Dates([*dates.columns, name], reading)
    for name, cells in others.items():
        times = read_times(cells) if not all(map(number, cells)) else None
        numbered = read_numbered(cells, days, zone) if times is None else None
        points, kind = numbered or ([day + time for day, time in zip(days, times or ())], "")
        many = len(set(points)) > max(0.99 * len(points), len(set(days)))
        if many and not tells_series(name):
            rising = sum(later > earlier for earlier, later in zip(points, points[1:]))
            if not 0.1 * len(points) < rising < 0.9 * (len(points) - 1) and is_regular(points, 0.5):
                reading.dates = points
                reading.note += f", times of day in column {name}{kind and f', in {kind}'}"
                if kind == "UTC":
                    reading.offsets = [0] * len(points)
                return Dates([*dates.columns, name], reading)
    return dates


def drop_other_rows(table, dates):
    """Leave out rows without a date that are none of the table.

    These are rows whose values are in columns of their own, such as the name of a station, and the last rows if they
    hold no date and no number, or a word such as Total instead of the date.
    """
    reading = dates.reading
    places = [{place for place, cell in enumerate(row) if cell} for row in table.rows]
    filled = set().union(*(cells for cells, date in zip(places, reading.dates) if date))
    keep = [row for row, cells in enumerate(places) if reading.dates[row] or not cells or cells & filled]
    if len(keep) < len(table.rows):
        lines = [table.lines[row] for row in np.setdiff1d(np.arange(len(table.rows)), keep)]
        table.notes.append(f"{some_of(lines, 'line')} left out: no date, and no value in the columns of the others")
        table.drop(keep)
        reading.dates, reading.offsets = ([some[row] for row in keep] for some in (reading.dates, reading.offsets))
    cells = table.cells(dates.columns[0])
    end = len(table.rows)
    while end and reading.dates[end - 1] is None:
        total = re.fullmatch(r"\D*[^\W\d_]\D*", clean(cells[end - 1]) or "")
        if any(map(number, table.rows[end - 1])) and not total:
            break
        end -= 1
    if end < len(table.rows):
        words = list(dict.fromkeys(filter(None, cells[end:])))
        why = f"{list_names(words, 3)} instead of a date" if words else "no date and no numbers"
        table.notes.append(f"{some_of(table.lines[end:], 'line')} below the table left out: {why}")
        table.drop(range(end))
        reading.dates, reading.offsets = reading.dates[:end], reading.offsets[:end]


def some_of(items, what, most=3):
    """"line 5", "lines 5, 6", "12 lines (5, 6, 7, ...)"."""
    if len(items) == 1:
        return f"{what} {items[0]}"
    if len(items) <= most:
        return f"{what}s {', '.join(map(str, items))}"
    return f"{len(items):,} {what}s ({', '.join(map(str, items[:most]))}, ...)"


def read_numbers(table, dates, columns, decimal, missing=()):
    """Names and values of the number columns: (list, float64 array (rows, columns)), NaN for missing values.

    Args:
        dates: names of the columns that hold the dates.
        columns: names of the columns to read; empty: all that hold numbers that vary.
        decimal, missing: see `read_series`.
    """
    absent = MISSING | {whole(cell) for cell in missing} if missing else MISSING
    chosen = list(columns) or [name for name in table.names if name not in dates]
    texts, empty, cells, plain, mixed = [], [], {}, {}, {}
    for name in chosen:
        found = [clean(cell, absent) for cell in table.cells(name)]
        known = [cell for cell in found if cell is not None]
        values = to_plain_numbers(found)
        if values is not None and decimal != ",":
            plain[name] = values
        numbers = sum(map(number, known)) if values is None else len(known)
        if columns or numbers > 0.5 * len(known):
            cells[name] = found
            if numbers < len(known):
                mixed[name] = found
        else:
            example = next((cell for cell in known if re.search(r"\d", cell)), "")
            (texts if known else empty).append(f"{name}: {label(example)!r}" if example else name)
    check_texts(table, mixed, missing)
    signs = decimal_signs(table, cells, decimal, plain)
    values = {
        name: plain[name] if name in plain else to_numbers(table, name, cells[name], signs[name]) for name in cells
    }
    left = {"text": texts, "empty": empty, "constant": [], "numbers of the rows": [], "dates": []}
    if not columns:
        for name, column in list(values.items()):
            known = column[~np.isnan(column)]
            if len(known) > 1 and (known == known[0]).all():
                left["constant"].append(name)
                del values[name]
            elif is_row_number(name, column):
                left["numbers of the rows"].append(name)
                del values[name]
            elif date_named(name) and rises_by_dates(table.cells(name)):
                left["dates"].append(name)
                del values[name]
    note = "; ".join(
        f"{', '.join(names[:8])}{f' and {len(names) - 8} more' if len(names) > 8 else ''} ({why})"
        for why, names in left.items()
        if names
    )
    if not values:
        raise UserError(
            f"{table.path} has no column of numbers that vary besides {', '.join(dates)}: {note or 'nothing'}; add "
            "columns of numbers, or name some with COLUMNS"
        )
    if MISSING.isdisjoint(cell.lower() for cell in missing):
        check_sentinels(table, values, missing)
    if note:
        table.notes.append(f"columns left out: {note}; COLUMNS names those to read")
    return list(values), np.stack(list(values.values()), 1)


def rises_by_dates(cells):
    """Whether numbers are dates, such as 20160701 or years, and follow each other as the rows do."""
    reading = read_dates(cells, numbers=True, gaps=0.2)
    dates = [date for date in reading.dates if date] if reading else []
    return bool(dates) and sorted(dates) in (dates, dates[::-1])


def is_row_number(name, column):
    """Whether a column only counts the rows: 0, 1, 2 or 1, 2, 3, ..., under a name for such numbers."""
    plain = name.lower().partition(":")[0].strip()
    named = plain in INDEX or date_named(name) or re.fullmatch(r"column \d+", plain)
    return bool(named and len(column) > 1 and (np.abs(np.diff(column)) == 1).all() and len(set(np.diff(column))) == 1)


def check_sentinels(table, columns, missing):
    """UserError if columns hold numbers far outside the others by which programs mark missing values.

    Args:
        table: `Table`.
        columns: {name: float64 array}.
        missing: texts that are known to mark missing values.
    """
    found = {}  # {number: what to say of it}
    for name, column in columns.items():
        kinds = np.unique(column[~np.isnan(column)])
        marks = {value for value in (*kinds[:4], *kinds[-4:]) if SENTINEL.fullmatch(str(float(value)))}
        others = [value for value in kinds if value not in marks] if marks else ()
        for value in sorted(marks) if len(others) else ():
            low, high = others[0], others[-1]
            if value > high + (high - low) or value < low - (high - low) / 2 or value < 0 <= low:
                rows = np.flatnonzero(column == value)
                times = f" ({len(rows):,} times)" if len(rows) > 1 else ""
                where = f"{table.where(rows[0], name)}: {value:.15g}{times} is far outside the other values"
                found.setdefault(f"{value:.15g}", f"{where}, {low:g} to {high:g}")
    if found:
        it, value = ("it means a missing value", "it is a value")
        if len(found) > 1:
            it, value = ("they mean missing values", "they are values")
        marks, values = ",".join([*missing, *found]), ",".join([*missing, "NA"])
        raise Choice(
            f"{table.path}, {'; '.join(list(found.values())[:3])}; set MISSING_VALUES to {marks} if {it} (GAPS fills "
            f"these), or to {values} if {value}",
            missing=[*missing, *found],
            gaps="carry",
        )


def whole(cell):
    """A text in small letters, or a number in one form of several."""
    try:
        return str(float(cell.replace(",", ".")))
    except ValueError:
        return cell.lower()


def clean(cell, missing=MISSING):
    """The text of a number without separators of thousands that are no sign; None if it is among `missing`."""
    cell = cell.replace("\u2212", "-").lstrip("'").strip("$€£¥% ")  # an apostrophe marks texts in spreadsheets
    if (cell.lower() if missing is MISSING else whole(cell)) in missing:
        return None
    return cell if cell.isascii() and " " not in cell and "'" not in cell else SPACED.sub("", cell)


def to_plain_numbers(cells):
    """float64 array of texts that can only be numbers with a decimal point, or without; None for all others.

    This is what most files hold, and it is told quickly.
    """
    if None in cells or not set("".join(cells)) <= set("0123456789.+-eE"):
        return None
    if all(cell.isdigit() or EITHER.fullmatch(cell) for cell in cells) and "." in "".join(cells):
        return None
    try:
        values = np.array([float(cell) for cell in cells])
    except ValueError:
        return None
    return values if np.isfinite(values).all() and all(map(NUMBER["."].fullmatch, cells)) else None


def decimal_signs(table, cells, decimal, plain):
    """{column: "." or ","} for the texts of number columns; UserError if that cannot be told.

    The columns in `plain` have a decimal point.
    """
    if decimal != "auto":
        return dict.fromkeys(cells, decimal)
    signs, either, grouped = {}, [], set()
    for name, column in cells.items():
        if name in plain:
            signs[name] = "."
            continue
        marked = [cell for cell in column if cell is not None and not cell.isdigit() and number(cell)]
        marked = [cell for cell in marked if "." in cell or "," in cell]
        fits = {
            sign: sum(pattern.fullmatch(cell) is not None for cell in marked) for sign, pattern in NUMBER.items()
        }
        if fits["."] != fits[","]:
            signs[name] = max(fits, key=fits.get)
        elif marked and all(EITHER.fullmatch(cell) for cell in marked):
            either.append((name, marked[0]))
            lengths = {len(cell) for cell in column if cell and cell.isdigit() and cell.strip("0")}
            if any(cell[-1] == "0" for cell in marked) and lengths and max(lengths) < 4:
                grouped.add("," if "." in marked[0] else ".")  # as many decimals in all others would show there, too
        else:
            signs[name] = "."
    told = {sign for name, sign in signs.items() if any(re.search("[.,]", cell or "") for cell in cells[name])}
    for name, cell in either:
        if len(told) == 1:
            signs[name] = told.copy().pop()
            table.notes.append(
                f"column {name}: {cell} has the decimal sign of the other columns, {signs[name]!r}; DECIMAL sets it"
            )
        elif "." in cell and table.separator == ",":
            signs[name] = "."
            table.notes.append(
                f"column {name}: {cell} is read with a decimal point, as {float(cell):g}, not as "
                f"{cell.replace('.', '')}; DECIMAL=, reads the other"
            )
        elif len(grouped) == 1:
            signs[name], other = grouped.copy().pop(), "," if "," in cell else "."
            table.notes.append(
                f"column {name}: {cell} is read as {re.sub('[.,]', '', cell)}, since smaller numbers have no decimals; "
                f"DECIMAL={other} reads the other"
            )
        else:
            point, comma = (re.sub("[.,]", by, cell) for by in (".", ""))
            raise Choice(
                f"{table.path}, column {name}: {cell} can be {point} or {comma}, and no other number decides it; set "
                "DECIMAL to . or , (the decimal sign)",
                decimal=".",
            )
    if "," in signs.values():
        names = [name for name, sign in signs.items() if sign == ","]
        table.notes.append(f"decimal comma in {some_of(names, 'column')}")
    return signs


def check_texts(table, columns, missing):
    """UserError if there are texts among the numbers of columns, {name: texts or None}."""
    found, counts = {}, Counter()  # where each is first
    for name, column in columns.items():
        for row, cell in enumerate(column):
            if cell is not None and not number(cell) and not INFINITE.fullmatch(cell):
                found.setdefault(cell, (row, name))
                counts[cell] += 1
    if found:
        (cell, place), *others = found.items()
        more = [f"{label(other)!r} ({counts[other]:,} times)" for other in list(found)[1:5]]
        more = f", nor are {', '.join(more)}{' and others' if len(others) > 4 else ''}" if others else ""
        times = f" ({counts[cell]:,} times)" if counts[cell] > 1 else ""
        remedy = "this cell, exclude the column with COLUMNS, or name it in MISSING_VALUES if it means a missing value"
        if others:
            remedy = "these cells, exclude columns with COLUMNS, or name them in MISSING_VALUES if values are missing"
        remedy += " (GAPS fills these)"
        message = f"{table.path}, {table.where(*place)}: {cell!r}{times} is not a number{more}; fix {remedy}"
        raise Choice(message, missing=[*missing, *found], gaps="carry")


def to_numbers(table, name, cells, sign):
    """float64 array of texts, NaN for None; UserError for the first that is not a finite number."""
    result = np.empty(len(cells))
    pattern, other = NUMBER[sign], "." if sign == "," else ","
    for row, cell in enumerate(cells):
        if cell is None:
            result[row] = math.nan
            continue
        where = f"{table.path}, {table.where(row, name)}: {cell!r}"
        if pattern.fullmatch(cell):
            result[row] = float(cell.replace(other, "").replace(",", "."))
            if math.isfinite(result[row]):
                continue
        elif not INFINITE.fullmatch(cell):
            raise UserError(
                f"{where} is not a number with the decimal sign {sign!r}; fix this cell, exclude the column with "
                "COLUMNS, or set DECIMAL"
            )
        raise UserError(
            f"{where} is not finite; fill it in, exclude the column with COLUMNS, or name it in MISSING_VALUES if it "
            "means a missing value"
        )
    return result


def arrange(series, table, columns, reading, name, gaps, where):
    """Set clock, step and time zone of a series, and sort its rows.

    Args:
        series: whose values have the order of the file.
        table: its `Table`.
        columns: names of the columns that hold the dates.
        reading: its `Reading`.
        name: of the time zone of local times, or None.
        gaps, where: see `read_series`.
    """
    path, notes = table.path, series.notes
    dates, offsets = reading.dates, reading.offsets
    notes.insert(0, f"dates in {some_of(columns, 'column')}: {reading.note}")
    if len({offset is None for offset in offsets}) > 1:
        raise UserError(f"{path}: some dates have a time zone and some do not; use one form for all")
    lines, rows = table.lines, list(range(len(dates)))
    if len(dates) > 1 and sum(later < earlier for earlier, later in zip(dates, dates[1:])) > 0.9 * (len(dates) - 1):
        rows.reverse()
        notes.append("the newest row is the first, so the rows are reversed")
    zone = open_zone(name)
    dates, offsets = [dates[row] for row in rows], [offsets[row] for row in rows]
    daily = len({date.time() for date in dates}) == 1
    useless = "TIMEZONE has no effect: all dates have the same time of day, and count as local days"
    if offsets[0] is not None:
        same = len(set(offsets)) == 1
        if daily or (same and zone is None):
            clock, series.zone = dates, timezone(timedelta(minutes=offsets[0])) if same else None
            if not same:
                notes.append("distances from UTC differ, but all dates have one time of day: they count as local days")
            if zone is not None:
                notes.append(useless)
        else:
            clock = [date - timedelta(minutes=offset) for date, offset in zip(dates, offsets)]
            series.zone, series.utc = zone or timezone.utc, True
            if zone is None:
                notes.append("distances from UTC differ, so the dates are shown in UTC; TIMEZONE sets another")
    elif zone is not None and not daily:
        try:
            clock = to_utc(dates, zone, lambda row: f"{path}, line {lines[rows[row]]}")
        except ValueError as error:
            raise UserError(f"{error}; correct it, or set another TIMEZONE") from error
        series.zone, series.utc = zone, True
        notes.append(f"local times of {name}, equally far apart but for daylight saving")
    else:
        clock = dates
        if zone is not None:
            notes.append(useless)
        elif len(set(dates)) < len(dates):
            standard = to_standard_time(dates)
            if standard:
                clock = standard
                notes.append(
                    "local times: an hour is missing every spring and doubled every autumn: daylight saving; "
                    "the dates are shown in standard time (TIMEZONE names the place)"
                )
    skipped = [place for place, date in enumerate(clock) if date.time() != datetime.min.time()]
    if not series.utc and len(skipped) < len(clock) / 100 and {clock[place].time() for place in skipped} == {time(1)}:
        clock = [date.replace(hour=0) for date in clock]
        notes.append(
            f"{some_of([lines[rows[place]] for place in skipped], 'line')} at 01:00 count as the whole day: daylight "
            "saving skips midnight"
        )
    order = sorted(range(len(clock)), key=lambda place: clock[place])
    moved = [place for place, then in zip(order, range(len(order))) if place != then]
    if moved:
        notes.append(f"rows sorted by date, {some_of([lines[rows[place]] for place in sorted(moved)], 'line')} moved")
    clock, rows = [clock[place] for place in order], [rows[place] for place in order]
    keep = drop_doubles(series, table, clock, rows, gaps, where)
    series.clock, series.values = [clock[place] for place in keep], series.values[[rows[place] for place in keep]]
    lines = [lines[rows[place]] for place in keep]
    if len(keep) < 2:
        raise UserError(f"{path} has {len(keep)} different dates; add more rows")
    step = series.step = find_step(series.clock)
    numbers = step.rows(series.clock)
    off = [place for place in range(len(numbers)) if numbers[place] < 0 or numbers[place] in numbers[place - 1 : place]]
    if len(off) > len(numbers) / 2:
        steps = sorted(later - earlier for earlier, later in zip(series.clock, series.clock[1:]))
        other = other_dates(table, columns)
        remedy = f"set DATE to {other}, which holds dates at equal steps, or " if other else ""
        message = (
            f"{path}: the rows are not at equal steps, but from {steps[0]} to {steps[-1]} apart, half of them at most "
            f"{steps[len(steps) // 2]}; {remedy}resample the series to equal steps"
        )
        raise Choice(message, date_column=other) if other else UserError(message)
    few = len(off) < len(numbers) / 100
    if off and few and gaps != "refuse":
        notes.append(f"{some_of([lines[place] for place in off], 'line')} left out: between the steps of {step}")
        keep = np.setdiff1d(np.arange(len(numbers)), off)
        series.clock, series.values = [series.clock[place] for place in keep], series.values[keep]
    elif off:
        examples = ", ".join(f"line {lines[place]} ({series.show(series.clock[place])})" for place in off[:3])
        remedy = ", or set GAPS, which leaves these rows out and fills the steps" if few else ""
        message = (
            f"{path}: most rows are {step} apart, but {len(off):,} of {len(numbers):,} lie between these steps: "
            f"{examples}{', ...' if len(off) > 3 else ''}; resample the series to equal steps{remedy}"
        )
        raise Choice(message, gaps="carry") if few else UserError(message)
    if step.unit == "weekday":
        days = "Mon Tue Wed Thu Fri Sat Sun".split()
        notes.append(f"no row is ever on {' or '.join(day for day, on in zip(days, step.mask) if on == '0')}, so the "
                     "other days of the week count one after the other")  # fmt: skip


def open_zone(name):
    """`ZoneInfo` of a name, or None; UserError if there is none."""
    if name is None:
        return None
    try:
        return ZoneInfo(name)
    except (ValueError, OSError, KeyError) as error:  # ZoneInfoNotFoundError is a KeyError
        raise ConstantError(
            f"TIMEZONE must be an IANA time zone, such as Europe/Berlin (on Windows pip install tzdata), got {name!r}"
        ) from error


def drop_doubles(series, table, clock, rows, gaps, where):
    """Places of the sorted rows without those that repeat the one before; UserError for one that contradicts it.

    Unless `gaps` are to be filled: then the few dates with contradicting rows are left out, to be filled like others.
    """
    keep, same, different = [], [], []
    for place, date in enumerate(clock):
        if not keep or date != clock[keep[-1]]:
            keep.append(place)
        elif table.rows[rows[place]] == table.rows[rows[keep[-1]]] or np.array_equal(
            series.values[rows[place]], series.values[rows[keep[-1]]], equal_nan=True
        ):
            same.append(place)
        else:
            different.append(place)
    few = len(different) < len(clock) / 100
    local = not series.utc and series.zone is None and len({date.time() for date in clock}) > 1
    saving = few and local and all(may_be_doubled(clock[place]) for place in different)
    if different and few and not saving and gaps != "refuse":
        doubled = {clock[place] for place in different}
        lines = [table.lines[row] for date, row in zip(clock, rows) if date in doubled]
        series.notes.append(f"{some_of(sorted(lines), 'line')} left out: rows with other values have the same date")
        keep = [place for place in keep if clock[place] not in doubled]
    elif different:
        groups = len(clock) / len(set(clock))
        hint, options = "keep each date once", {}
        telling = find_telling(table, clock, rows, series.date) if groups > 1.2 else None
        enough = max(0.99 * len(clock), (len(clock) + len(set(clock))) / 2)  # it must tell half of the doubles apart
        enough = min(enough, 9 * len(set(clock)))  # or be much finer, as times beside days in several series
        others = [name for name in table.names if name != series.date]
        other = next((name for name in others if count_dates(table.cells(name)) > enough), None)
        if other:
            hint, options = f"column {other} has different dates: set DATE to {other}", dict(date_column=other)
        elif telling:
            names, values = telling
            each = f"column {names[0]} tells" if len(names) == 1 else f"columns {' and '.join(names)} tell"
            options = dict(where=[*where, *(f"{name}={value}" for name, value in zip(names, values))])
            example = ",".join(options["where"][len(where) :])
            hint = f'{each} several series apart: choose one with WHERE, such as --where "{example}"'
            in_file = [date for _, date in sorted(zip(rows, clock))]
            follow = sum(date == then for date, then in zip(in_file, in_file[1:])) > 0.4 * len(in_file)
            if follow and not any(map(tells_series, names)):
                hint = f"if {' and '.join(names)} is a part of the date, write it into column {series.date}; if it "
                hint += f'tells several series apart, choose one with WHERE, such as --where "{example}"'
        elif groups > 1.5:
            hint = "a file with several series needs a column of numbers for each, with each date once"
        elif saving:
            hint += "; if daylight saving doubles the hour, set TIMEZONE"
        elif few:
            hint += ", or set GAPS, which leaves these rows out and fills their dates like missing ones"
            options = dict(gaps="carry")
        rows_have = "rows have" if len(different) > 1 else "row has"
        lines = {place: table.lines[rows[place]] for place in different[:3]}
        examples = ", ".join(f"line {line} ({series.show(clock[place])})" for place, line in lines.items())
        message = (
            f"{table.path}: {len(different):,} {rows_have} a date that another row has, with other "
            f"values: {examples}{', ...' if len(different) > 3 else ''}; {hint}"
        )
        raise Choice(message, **options) if options else UserError(message)
    if same:
        lines = [table.lines[rows[place]] for place in same]
        series.notes.append(f"{some_of(lines, 'line')} left out: a row with this date and these values is there")
    return keep


def count_dates(cells):
    """Number of different dates of a column; 0 if it holds none."""
    try:
        reading = read_dates(cells)
    except Ambiguous:
        return len(set(cells))
    return len(set(reading.dates)) if reading else 0


def find_telling(table, clock, rows, date, most=3):
    """The fewest columns, up to `most`, that tell rows with the same date apart: (names, values of one of the series).

    It is the longest that has each date once, for 1 % of the rows may be double.

    None if there are none. Numbers of the rows, and columns in which most values are different, are none.

    Args:
        clock: the date of each row, in another order than that of the table.
        rows: row of the table for each date.
        date: name of the date column.
    """
    different = {(date, *table.rows[row]): (date, row) for date, row in zip(clock, rows)}
    clock, rows = zip(*different.values())  # without rows that are twice in the file
    columns, points = {}, [clock]
    for name in table.names:
        cells = table.cells(name)
        cells = [cells[row] for row in rows]
        kinds = len(set(cells))
        fractions = sum(number(cell) and re.search("[.,]0*[1-9]", cell) is not None for cell in cells)
        timed = kinds in (24, 25, 48, 50, 96, 100) and (all(map(number, cells)) or read_times(cells))
        if timed and not tells_series(name):
            points.append(cells)  # hours or parts of them
            continue
        if name != date and 1 < kinds < len(cells) / 3 and fractions < len(cells) / 2:
            columns[name] = cells
    texts = [name for name, cells in columns.items() if not all(map(number, cells))]
    for count in range(1, most + 1):
        for names in [*combinations(texts, count), *combinations(columns, count)][:300]:
            keys = list(zip(*(columns[name] for name in names)))
            counts = Counter(zip(keys, *points))
            if len(counts) > 0.99 * len(clock):
                double = {key for (key, *_), count in counts.items() if count > 1}
                return names, Counter([key for key in keys if key not in double] or keys).most_common(1)[0][0]
    return None


def drop_empty_ends(series, table):
    """Leave out the first and last rows in which every number is missing."""
    known = np.flatnonzero(~np.isnan(series.values).all(1))
    if not len(known):
        return
    first, end = known[0], known[-1] + 1
    for count, place in ((first, "first"), (len(series.clock) - end, "last")):
        if count:
            rows = f"{count:,} rows have" if count > 1 else "row has"
            series.notes.append(f"the {place} {rows} no numbers, left out")
    series.clock, series.values = series.clock[first:end], series.values[first:end]
    series.step = replace(series.step, first=series.clock[0])


def fill(series, path, gaps, chosen=False):
    """Insert missing rows and fill empty cells of a series as `gaps` says (see `read_series`).

    Columns without values in the first half are left out unless they are `chosen` by name.
    """
    numbers = series.step.rows(series.clock)
    rows = int(numbers[-1]) + 1
    missing = rows - len(numbers)
    if missing > len(numbers):
        raise UserError(
            f"{path}: most rows are {series.step} apart, but from {series.show(series.clock[0])} to "
            f"{series.show(series.clock[-1])} {missing:,} rows are missing, more than there are; cut the file, or "
            "resample it to longer steps"
        )
    values = np.full((rows, len(series.columns)), math.nan)
    values[numbers] = series.values
    clock = [series.step.at(row) for row in range(rows)] if missing else series.clock
    for row, date in zip(numbers, series.clock):
        clock[row] = date
    empty = np.isnan(values)
    absent = np.ones(rows, bool)
    absent[numbers] = False
    texts = []
    if missing:
        rows_are = "rows are" if missing > 1 else "row is"
        texts.append(f"{missing:,} {rows_are} missing{describe_runs(absent, clock, series)}")
    for name, column in zip(series.columns, (empty & ~absent[:, None]).T):
        if column.any():
            count = int(column.sum())
            cells = f"cell{'s are' if count > 1 else ' is'}"
            texts.append(f"column {name}: {count:,} {cells} empty{describe_runs(column, clock, series)}")
    late = np.argmin(empty, 0) > rows / 2
    late |= empty.all(0)
    if texts and gaps == "refuse":
        shown = "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more columns" if len(texts) > 4 else "")
        choice = 'set GAPS to "carry" (the last value) or "interpolate"'
        absent_dates = [clock[row] for row in np.flatnonzero(absent)]
        if missing and not series.utc and all(may_be_skipped(date) for date in absent_dates):
            choice = f"if daylight saving skips these hours, set TIMEZONE; else {choice}"
        message = f"{path}: {shown}; {choice}, fill them in, or exclude a column with COLUMNS"
        raise Choice(message, gaps="carry")
    if late.all() or (late.any() and chosen):
        names = [name for name, begins_late in zip(series.columns, late) if begins_late]
        raise UserError(f"{path}: {some_of(names, 'column')} begins in the second half only; exclude it with COLUMNS")
    if late.any():
        names = [name for name, begins_late in zip(series.columns, late) if begins_late]
        series.notes.append(f"{some_of(names, 'column')} left out: the first value is in the second half")
        texts = [text for text in texts if not text.startswith(tuple(f"column {name}: " for name in names))]
        series.columns = [name for name, begins_late in zip(series.columns, late) if not begins_late]
        values, empty = values[:, ~late], empty[:, ~late]
    series.notes += [f"{text}: filled, GAPS {gaps}" for text in texts[:8]]
    if len(texts) > 8:
        series.notes.append(f"empty cells of {len(texts) - 8} more columns: filled, GAPS {gaps}")
    first = max((int(np.argmin(column)) for column in empty.T), default=0)
    if first:
        last = next(name for name, column in zip(series.columns, empty.T) if np.argmin(column) == first)
        rows_are = f"{first:,} rows are" if first > 1 else "row is"
        series.notes.append(f"the first {rows_are} left out: column {last} has no value before")
    for place in np.flatnonzero(empty.any(0)):
        known = np.flatnonzero(~empty[:, place])
        if gaps == "interpolate":
            values[:, place] = np.interp(np.arange(len(values)), known, values[known, place])
        else:
            last = np.maximum.accumulate(np.where(empty[:, place], 0, np.arange(len(values))))
            values[:, place] = values[last, place]
    series.values, series.clock = values[first:], clock[first:]


def may_be_skipped(date):
    """Whether daylight saving may skip a local time: a Sunday from midnight to three, in March, or in the south."""
    return date.weekday() == 6 and date.hour < 4 and date.month in (3, 4, 9, 10) and date.time() != time()


def may_be_doubled(date):
    """Whether daylight saving may end at a local time: from Saturday 23:00 to Sunday 3:59, in autumn of either half."""
    later = date + timedelta(hours=1)
    return later.weekday() == 6 and later.hour < 5 and date.month in (3, 4, 9, 10, 11)


def describe_runs(missing, clock, series):
    """The longest run and the first places of True in `missing`: " (longest run 3, first after ...)"."""
    edges = np.flatnonzero(np.diff(np.r_[0, missing.astype(int), 0]))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    first = ", ".join(
        f"{series.show(clock[start])}" + (f" ({length} rows)" if length > 1 else "")
        for start, length in zip(starts[:3], lengths)
    )
    longest = int(np.argmax(lengths))
    more = ", ..." if len(starts) > 3 else ""
    text = f" ({first}{more}"
    if len(starts) > 3 and longest > 2:
        text += f"; the longest: {lengths[longest]:,} rows from {series.show(clock[starts[longest]])}"
    return f"{text})"


def default_windows(ends, period):
    """Look-back and horizons that fit the parts of a series: (periods, list of numbers of rows, rows for DLinear).

    The look-back takes a third of the training part at most, so that there are windows to learn from, and 21 periods.
    A horizon takes half of the validation and of the test part at most, so that both have many windows.
    """
    train, shortest = ends[0], min(ends[1] - ends[0], ends[2] - ends[1])
    most = max(1, min(shortest // 2, train // 3))
    horizons = [period * count for count in (1, 4, 14) if period * count <= most] or [most]
    return max(2, min(21, train // (3 * period))), horizons, max(1, min(336, train // 3))


def split_rows(rows, interval, split):
    """Row numbers at which the training, validation and test parts end.

    Args:
        rows: number of rows.
        interval: `timedelta` between consecutive rows.
        split: sizes of the three parts, as fractions of the rows if they sum to 1, otherwise in months of 30 days, as
            in the published tables for the ETT data (12, 4, 4: Zhou et al., Informer, AAAI 2021; later rows are not
            used).

    Returns:
        Three row numbers, each exclusive.

    Raises:
        UserError: if the series has fewer rows than `split` asks for.
    """
    if math.isclose(sum(split), 1):
        train, test = int(rows * split[0]), int(rows * split[2])
        return train, rows - test, rows
    month = timedelta(days=30) / interval
    ends = [round(min(sum(split[: part + 1]) * month, rows + 1)) for part in range(3)]
    if ends[2] > rows:
        raise UserError(
            f"SPLIT {split} asks for {sum(split):g} months of 30 days, but the series has {rows / month:.1f}; set "
            "smaller numbers, or fractions such as 0.7,0.1,0.2"
        )
    return tuple(ends)


def check_parts(ends, lookback, horizon):
    """UserError if a part is too short for one window of `lookback` input rows and `horizon` rows to forecast."""
    for name, start, end in zip(("training", "validation", "test"), (lookback, *ends), ends):
        if start < lookback or end - start < horizon:
            raise UserError(
                f"the {name} part of the series is too short for windows of {lookback} input rows and {horizon} rows "
                f"to forecast: training ends at row {ends[0]}, validation at {ends[1]}, test at {ends[2]}; lower "
                "LOOKBACK, DLINEAR_LOOKBACK or HORIZONS, or change SPLIT"
            )


def split_windows(values, ends, lookback, horizon):
    """All windows of `lookback` input rows and `horizon` rows to forecast, for each part.

    The input rows of validation and test windows may lie in the part before; the rows to forecast do not.

    Args:
        values: tensor (rows, columns).
        ends: the result of `split_rows`.

    Returns:
        Three views (windows, columns, lookback + horizon): training, validation and test.

    Raises:
        UserError: if a part is too short for one window.
    """
    check_parts(ends, lookback, horizon)
    starts = (0, ends[0] - lookback, ends[1] - lookback)
    return [values[start:end].unfold(0, lookback + horizon, 1) for start, end in zip(starts, ends)]


def drop_flat(series, rows):
    """Leave out the columns that are constant in the first `rows` rows, unless all are."""
    flat = np.array([len(set(column[:rows])) < 2 for column in series.values.T])
    if rows and flat.any() and not flat.all():
        names = [name for name, still in zip(series.columns, flat) if still]
        series.notes.append(f"{some_of(names, 'column')} left out: constant in the training part; COLUMNS names others")
        series.columns = [name for name, still in zip(series.columns, flat) if not still]
        series.values = series.values[:, ~flat]


def column_statistics(series, rows, path):
    """Mean and standard deviation of each column over the first `rows` rows: two float64 arrays (columns,).

    Raises:
        UserError: for a column that cannot be standardised.
    """
    mean, std = series.values[:rows].mean(0), series.values[:rows].std(0)
    for name, value in zip(series.columns, std):
        if not 1e-9 < value < 1e150:
            raise UserError(
                f"{path}: column {name} is constant in the training part, or its values are too large (standard "
                f"deviation {value:g}); exclude it with COLUMNS"
            )
    return mean, std


def choose_period(step, rows=None):
    """Number of rows in the most likely seasonal period, of which `rows` hold six: a day, week, year, hour or minute.

    Args:
        step: `Step` between the rows.
        rows: number of rows; None: enough.

    Returns:
        The number, and its name; 1 and "none" if none of these fits.
    """
    candidates = []
    if step.unit == "month":
        candidates = [(12 / step.size, "a year")]
    elif step.unit == "weekday":
        candidates = [(step.mask.count("1"), "a week")]
    else:
        for unit, name in (
            (DAY, "a day"),
            (7 * DAY, "a week"),
            (364 * DAY, "52 weeks"),
            (28 * DAY, "4 weeks"),
            (timedelta(hours=1), "an hour"),
            (timedelta(minutes=1), "a minute"),
        ):
            candidates.append((unit / step.size, name))
    for count, name in candidates:
        if float(count).is_integer() and 4 <= count <= 500 and (rows is None or 6 * count <= rows):
            return int(count), name
    return 1, "none"
