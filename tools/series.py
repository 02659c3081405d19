"""Time series from CSV files: reading and checking, splitting, and cutting into windows.

docs/series.md is the table of what is read. What is decided about a file, and could be decided otherwise, is put into
words (`Series.notes`), which `tools/forecast.py` prints.
"""

import csv
import io
import math
import re
from collections import Counter
from dataclasses import dataclass, field
from datetime import timedelta, timezone, tzinfo
from pathlib import Path
from zoneinfo import ZoneInfo

import numpy as np

from common.options import ConstantError, UserError
from common.tables import unguard
from common.text import read_text
from tools.dates import DAY, Ambiguous, Step, find_step, read_dates, read_times, to_standard_time, to_utc

MISSING = {"", "na", "n/a", "#n/a", "nan", "null", "none", "nil", "?", "-", "--", "..", "...", "."}
INDEX = {"", "index", "id", "no", "no.", "nr", "nr.", "#", "row", "rowid", "row_id", "instant", "unnamed", "rownames"}
PARTS = {  # names of columns that together are a date
    "year": ("year", "yr", "yyyy", "jahr", "年", "年份"),
    "month": ("month", "mon", "mo", "mm", "mnth", "monat", "月", "月份"),
    "day": ("day", "dd", "tag", "日"),
    "hour": ("hour", "hr", "hh", "stunde", "时", "小时"),
}
TIMES = ("time", "hour", "hr", "hh", "uhrzeit", "zeit", "stunde", "时间", "时", "小时")
SEPARATORS = {"\t": "tabs", ";": "semicolons", "|": "bars", ",": "commas"}  # the rarer in text the earlier

# A number with a decimal point, or a decimal comma; thousands may be separated by the other one.
NUMBER = {
    decimal: re.compile(
        rf"[+-]?(?:(?:\d+|[1-9]\d{{0,2}}(?:[{other}]\d{{3}})+)(?:[{decimal}]\d*)?|[{decimal}]\d+)(?:[eE][+-]?\d+)?",
        re.ASCII,
    )
    for decimal, other in ((".", ","), (",", "."))
}
EITHER = re.compile(r"[+-]?[1-9]\d{0,2}[.,]\d{3}", re.ASCII)  # 1.004, 1,004: one, or a thousand
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

    def following(self, count):
        """The dates of the `count` rows after the last."""
        last = int(self.step.rows(self.clock[-1:])[0])
        return [self.show(self.step.at(last + number)) for number in range(1, count + 1)]


def read_series(
    path,
    date_column=None,
    columns=(),
    encoding="utf-8-sig",
    *,
    order="auto",
    decimal="auto",
    zone=None,
    gaps="refuse",
):
    """Read a CSV file with a header.

    Args:
        path: the file; fields are separated by commas, semicolons, tabs or bars.
        date_column: name of the date column; None: the first one that holds dates.
        columns: names of the number columns to read; empty reads all that vary.
        encoding: text encoding of the file; "utf-8-sig" also skips a byte order mark.
        order: "dmy", "mdy" or "ymd": order of day, month and year where all are numbers; "auto": the column decides.
        decimal: "." or ",": decimal sign; "auto": the columns decide.
        zone: IANA time zone of local times, such as "Europe/Berlin".
        gaps: "refuse" missing rows and empty cells, or fill them: "carry" the last value forward, or "interpolate".

    Returns:
        `Series`.

    Raises:
        UserError: if the file cannot be read as a series; the message names column and line as shown by an editor.
    """
    path = Path(path)
    table = read_cells(path, encoding)
    dates = choose_dates(table, date_column, order)
    check_names(table, dates.columns, columns)
    drop_footer(table, dates)
    if len(table.rows) < 2:
        raise UserError(f"{path} has {len(table.rows)} rows of numbers; add more rows")
    problem = next((row for row, date in enumerate(dates.reading.dates) if date is None), None)
    if problem is not None:
        raise UserError(
            f"{path}, line {table.lines[problem]}, column {dates.columns[0]}: {dates.reading.problem}; correct it, or "
            "set DATE to another column"
        )
    chosen, values = read_numbers(table, dates.columns, columns, decimal)
    series = Series([], None, chosen, values, dates.columns[0], notes=table.notes)
    arrange(series, table, dates.columns, dates.reading, zone)
    fill(series, path, gaps)
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
    """

    path: Path
    names: list
    rows: list
    lines: list
    separator: str
    notes: list

    def cells(self, name):
        place = self.names.index(name)
        return [row[place] for row in self.rows]

    def drop(self, keep):
        """Keep only the rows with the numbers `keep`."""
        self.rows = [self.rows[row] for row in keep]
        self.lines = [self.lines[row] for row in keep]


def read_cells(path, encoding):
    """`Table` of a CSV file; UserError if it is none."""
    if not path.is_file():
        raise UserError(f"there is no file {path}; set CSV to the path of a CSV file")
    try:
        text = read_text(path, encoding, "strict")
    except UnicodeError as error:
        reason = f"{error.reason} at byte {error.start}" if isinstance(error, UnicodeDecodeError) else error
        raise UserError(
            f"{path} is not encoded in {encoding} ({reason}); save it as UTF-8, or set ENCODING to its encoding, such "
            "as gb18030, cp1252 or utf-16"
        ) from error
    notes, skipped = [], 0
    while text.startswith("#") or text.partition("\n")[0].strip(" \t,;|") == "" and text:
        skipped, text = skipped + 1, text.partition("\n")[2]
    if skipped:
        notes.append(f"the first {skipped} lines are empty or begin with #, and are left out")
    separator = find_separator(text)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, skipinitialspace=True)
    try:
        names = [unguard(name.strip()) for name in next(reader, [])]
        rows = [(reader.line_num + skipped, [cell.strip() for cell in row]) for row in reader]
    except csv.Error as error:
        line = reader.line_num + skipped
        raise UserError(f"{path}, line {line}: not valid CSV ({error}); save the table as CSV") from error
    blank = [line for line, row in rows if row and not any(row) and len(row) > 1]
    rows = [(line, row) for line, row in rows if any(row)]
    if blank:
        notes.append(f"{some_of(blank, 'line')} without any value left out")
    table = Table(path, names, [row for _, row in rows], [line for line, _ in rows], separator, notes)
    level(table)
    return table


def find_separator(text):
    """The separator that gives the first lines as many fields as the header, outside quotes."""
    lines = text.split("\n", 200)[:200]
    best = 0, 0, ","
    for separator in SEPARATORS:
        try:
            rows = [row for row in csv.reader(lines, delimiter=separator, skipinitialspace=True) if row]
        except csv.Error:
            continue
        if not rows or len(rows[0]) < 2:
            continue
        widths = [len(row) for row in rows]
        usual, count = Counter(widths).most_common(1)[0]
        score = round(count / len(rows), 1), min(usual, widths[0] + 1), separator
        if score[:2] > best[:2]:
            best = score
    return best[2]


def level(table):
    """Give each row of a table as many cells as there are names; UserError where that is impossible."""
    names, rows = table.names, table.rows
    width = len(names)
    if rows and width and all(len(row) == width + 1 for row in rows) and any(row[-1] for row in rows):
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
            raise UserError(f"{table.path}, line {line}: expected {width} fields, got {len(row)}; fix this line")
    for place in range(width - 1, -1, -1):
        if not names[place]:
            if any(row[place] for row in rows) or width == 1:
                names[place] = f"column {place + 1}"
            else:
                del names[place]
                for row in rows:
                    del row[place]


def check_names(table, dates, columns):
    """UserError if names are doubled or lacking."""
    path, names = table.path, table.names
    unknown = [name for name in columns if name not in names or name in dates]
    if unknown:
        raise UserError(
            f"{path} has no number column {unknown[0]!r}, only {', '.join(names)}; choose among these, or give a file "
            "that has it"
        )
    if not set(names) - set(dates):
        raise UserError(f"{path} has no column besides {', '.join(dates)}; add columns of numbers")


@dataclass
class Dates:
    """The date of each row: names of the columns that hold it, and their `Reading`."""

    columns: list
    reading: object


def choose_dates(table, name, order):
    """`Dates` of a table: of the column `name`, or the first that holds dates; UserError if there are none."""
    path, names = table.path, table.names
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise UserError(f"{path} has several columns named {duplicates[0]!r}; rename all but one")
    found = candidate = None
    try:
        if name is None:
            for numbers in (False, True):
                for candidate in names if not found else ():
                    reading = read_dates(table.cells(candidate), order, numbers)
                    if reading:
                        found = Dates([candidate], reading)
                        break
                found = found or join_parts(table, order)
        elif name in names:
            cells = table.cells(name)
            reading = read_dates(cells, order)
            found = Dates([name], reading) if reading else join_parts(table, order, name)
            if not found:
                reading = read_dates(cells, order, numbers=True, anything=True)
                found = Dates([name], reading) if reading else None
    except Ambiguous as error:
        column = name or candidate
        raise UserError(f"{path}, column {column}: {error}") from error
    if name is not None and name not in names:
        raise UserError(
            f"{path} has no date column {name!r}, only {', '.join(names) or 'an empty first line'}; set DATE to the "
            "name of the date column"
        )
    if found and any(read_dates([column], order, number(column), anything=True) for column in found.columns):
        raise UserError(
            f"{path} has no header: its first line, {', '.join(names)}, holds a date; add a line with names of columns"
        )
    if not found and name is None:
        raise UserError(
            f"{path} has no date column, only {', '.join(names) or 'an empty first line'}; set DATE to the name of the "
            "date column (docs/series.md lists the dates that are read)"
        )
    if not found:
        line, cell = next(((line, cell) for line, cell in zip(table.lines, table.cells(name)) if cell), (1, ""))
        raise UserError(
            f"{path}, line {line}, column {name}: {cell!r} is not a date, nor are most cells of the column; "
            "write dates as 2016-07-01 13:00:00 or 2016-07-01, or set DATE to another column"
        )
    return add_times(table, found)


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
    if len(parts) < 2 or (name is not None and name not in columns):
        return None
    rows = list(zip(*(table.cells(column) for column in columns)))
    cells = ["" if not all(row) else "-".join(row[:3]) + "".join(f" {hour}:00" for hour in row[3:]) for row in rows]
    cells = [re.sub(r"\.0+(?=\D|$)", "", cell) for cell in cells]
    reading = read_dates(cells, order)
    if reading is None:
        return None
    reading.note = "years, months, days and hours in columns of their own"
    return Dates(columns, reading)


def add_times(table, dates):
    """`Dates` with the times of day of a column of their own, if there is one."""
    reading = dates.reading
    if len(dates.columns) > 1 or not reading.days_only or len(set(reading.dates)) == len(reading.dates):
        return dates
    for name in table.names:
        cells = table.cells(name)
        if name in dates.columns or not (name.lower() in TIMES or all(":" in cell for cell in cells)):
            continue
        times = read_times(cells)
        if times and len(set(times)) > 1:
            reading.dates = [date and date + time for date, time in zip(reading.dates, times)]
            reading.note += f", times of day in column {name}"
            return Dates([*dates.columns, name], reading)
    return dates


def drop_footer(table, dates):
    """Leave out the last rows if they hold no date and no number: notes below a table."""
    reading = dates.reading
    end = len(table.rows)
    while end and reading.dates[end - 1] is None and not any(map(number, table.rows[end - 1])):
        end -= 1
    if end < len(table.rows):
        table.notes.append(f"{some_of(table.lines[end:], 'line')} below the table left out: no date and no numbers")
        table.drop(range(end))
        reading.dates, reading.offsets = reading.dates[:end], reading.offsets[:end]


def some_of(items, what, most=3):
    """"line 5", "lines 5, 6", "12 lines (5, 6, 7, ...)"."""
    if len(items) == 1:
        return f"{what} {items[0]}"
    if len(items) <= most:
        return f"{what}s {', '.join(map(str, items))}"
    return f"{len(items):,} {what}s ({', '.join(map(str, items[:most]))}, ...)"


def read_numbers(table, dates, columns, decimal):
    """Names and values of the number columns: (list, float64 array (rows, columns)), NaN for missing values.

    Args:
        dates: names of the columns that hold the dates.
        columns: names of the columns to read; empty: all that hold numbers that vary.
        decimal: see `read_series`.
    """
    chosen = list(columns) or [name for name in table.names if name not in dates]
    texts, empty, cells, plain = [], [], {}, {}
    for name in chosen:
        found = [clean(cell) for cell in table.cells(name)]
        known = [cell for cell in found if cell is not None]
        values = to_plain_numbers(found)
        if values is not None and decimal != ",":
            plain[name] = values
        numbers = sum(map(number, known)) if values is None else len(known)
        if columns or numbers > 0.5 * len(known):
            cells[name] = found
        else:
            (texts if known else empty).append(name)
    signs = decimal_signs(table, cells, decimal, plain)
    values = {
        name: plain[name] if name in plain else to_numbers(table, name, cells[name], signs[name]) for name in cells
    }
    left = {"text": texts, "empty": empty, "constant": [], "numbers of the rows": []}
    if not columns:
        for name, column in list(values.items()):
            known = column[~np.isnan(column)]
            if len(known) > 1 and (known == known[0]).all():
                left["constant"].append(name)
                del values[name]
            elif is_row_number(name, column):
                left["numbers of the rows"].append(name)
                del values[name]
    note = "; ".join(f"{', '.join(names)} ({why})" for why, names in left.items() if names)
    if not values:
        raise UserError(
            f"{table.path} has no column of numbers that vary besides {', '.join(dates)}: {note or 'nothing'}; add "
            "columns of numbers, or name some with COLUMNS"
        )
    if note:
        table.notes.append(f"columns left out: {note}; COLUMNS names those to read")
    return list(values), np.stack(list(values.values()), 1)


def is_row_number(name, column):
    """Whether a column only counts the rows: 0, 1, 2 or 1, 2, 3, ..., under a name for such numbers."""
    plain = name.lower().partition(":")[0].strip()
    named = plain in INDEX or re.fullmatch(r"column \d+", plain)
    return bool(named and len(column) > 1 and (np.abs(np.diff(column)) == 1).all() and len(set(np.diff(column))) == 1)


def clean(cell):
    """The text of a number without separators of thousands that are no sign; None if it is missing."""
    cell = cell.replace("\u2212", "-")
    if cell.lower() in MISSING:
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
    signs, either = {}, []
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
        else:
            point, comma = (re.sub("[.,]", by, cell) for by in (".", ""))
            raise UserError(
                f"{table.path}, column {name}: {cell} can be {point} or {comma}, and no other number decides it; set "
                "DECIMAL to . or , (the decimal sign)"
            )
    if "," in signs.values():
        names = [name for name, sign in signs.items() if sign == ","]
        table.notes.append(f"decimal comma in {some_of(names, 'column')}")
    return signs


def to_numbers(table, name, cells, sign):
    """float64 array of texts, NaN for None; UserError for the first that is not a finite number."""
    result = np.empty(len(cells))
    pattern, other = NUMBER[sign], "." if sign == "," else ","
    for row, cell in enumerate(cells):
        if cell is None:
            result[row] = math.nan
            continue
        where = f"{table.path}, line {table.lines[row]}, column {name}: {cell!r}"
        if pattern.fullmatch(cell):
            result[row] = float(cell.replace(other, "").replace(",", "."))
            if math.isfinite(result[row]):
                continue
        elif not re.fullmatch("[+-]?inf(inity)?", cell, re.IGNORECASE):
            hint = f" with the decimal sign {sign!r}" if number(cell) else ""
            raise UserError(
                f"{where} is not a number{hint}; fix this cell, exclude the column with COLUMNS"
                + (", or set DECIMAL" if hint else "")
            )
        raise UserError(f"{where} is not finite; fill it in, or exclude the column with COLUMNS")
    return result


def arrange(series, table, columns, reading, name):
    """Set clock, step and time zone of a series, and sort its rows.

    Args:
        series: whose values have the order of the file.
        table: its `Table`.
        columns: names of the columns that hold the dates.
        reading: its `Reading`.
        name: of the time zone of local times, or None.
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
    order = sorted(range(len(clock)), key=lambda place: clock[place])
    moved = [place for place, then in zip(order, range(len(order))) if place != then]
    if moved:
        notes.append(f"rows sorted by date, {some_of([lines[rows[place]] for place in sorted(moved)], 'line')} moved")
    clock, rows = [clock[place] for place in order], [rows[place] for place in order]
    keep = drop_doubles(series, table, clock, rows)
    series.clock, series.values = [clock[place] for place in keep], series.values[[rows[place] for place in keep]]
    lines = [lines[rows[place]] for place in keep]
    if len(keep) < 2:
        raise UserError(f"{path} has {len(keep)} different dates; add more rows")
    step = series.step = find_step(series.clock)
    numbers = step.rows(series.clock)
    off = [place for place in range(len(numbers)) if numbers[place] < 0 or numbers[place] in numbers[place - 1 : place]]
    if off:
        examples = ", ".join(f"line {lines[place]} ({series.show(series.clock[place])})" for place in off[:3])
        raise UserError(
            f"{path}: most rows are {step} apart, but {len(off):,} of {len(numbers):,} lie between these steps: "
            f"{examples}{', ...' if len(off) > 3 else ''}; resample the series to equal steps"
        )
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


def drop_doubles(series, table, clock, rows):
    """Places of the sorted rows without those that repeat the one before; UserError for one that contradicts it."""
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
    if different:
        groups = len(clock) / len(set(clock))
        hint = "keep each date once"
        places = {}
        for name in table.names:
            cells = table.cells(name)
            few = len(set(cells)) < len(cells) / 2 and name != series.date
            places[name] = few and len(set(zip(clock, (cells[row] for row in rows)))) == len(clock)
        telling = [name for name, tells in places.items() if tells]
        if groups > 1.5:
            hint = "a file with several series needs a column of numbers for each, with each date once"
            if telling:
                hint = f"column {telling[0]} tells them apart: {hint}"
        elif len(different) < len(clock) / 100:
            hint += "; if daylight saving doubles the hour, set TIMEZONE"
        rows_have = "rows have" if len(different) > 1 else "row has"
        lines = {place: table.lines[rows[place]] for place in different[:3]}
        examples = ", ".join(f"line {line} ({series.show(clock[place])})" for place, line in lines.items())
        raise UserError(
            f"{table.path}: {len(different):,} {rows_have} a date that another row has, with other "
            f"values: {examples}{', ...' if len(different) > 3 else ''}; {hint}"
        )
    if same:
        lines = [table.lines[rows[place]] for place in same]
        series.notes.append(f"{some_of(lines, 'line')} left out: a row with this date and these values is there")
    return keep


def fill(series, path, gaps):
    """Insert missing rows and fill empty cells of a series as `gaps` says (see `read_series`)."""
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
    if texts and gaps == "refuse":
        shown = "; ".join(texts[:4]) + (f"; and {len(texts) - 4} more columns" if len(texts) > 4 else "")
        choice = 'set GAPS to "carry" (the last value) or "interpolate"'
        raise UserError(f"{path}: {shown}; {choice}, fill them in, or exclude a column with COLUMNS")
    series.notes += [f"{text}: filled, GAPS {gaps}" for text in texts]
    first = max((int(np.argmin(column)) for column in empty.T), default=0)
    if empty.all(0).any() or first > rows / 2:
        names = [name for name, column in zip(series.columns, empty.T) if np.argmin(column) == first or column.all()]
        raise UserError(f"{path}: {some_of(names, 'column')} begins in the second half only; exclude it with COLUMNS")
    if first:
        late = next(name for name, column in zip(series.columns, empty.T) if np.argmin(column) == first)
        series.notes.append(f"the first {first:,} rows are left out: column {late} has no value before")
    values, clock, empty = values[first:], clock[first:], empty[first:]
    for place in np.flatnonzero(empty.any(0)):
        known = np.flatnonzero(~empty[:, place])
        if gaps == "interpolate":
            values[:, place] = np.interp(np.arange(len(values)), known, values[known, place])
        else:
            last = np.maximum.accumulate(np.where(empty[:, place], 0, np.arange(len(values))))
            values[:, place] = values[last, place]
    series.values, series.clock = values, clock


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
