"""A CSV file of dates and numbers as a time series: read and checked, split, and cut into windows."""

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from common.options import UserError


@dataclass
class Series:
    """Numbers at equal intervals.

    Attributes:
        dates: of each row, in order.
        interval: from each row to the next, a `timedelta`.
        columns: names.
        values: float64 array (rows, columns), all finite.
    """

    dates: list
    interval: timedelta
    columns: list
    values: np.ndarray


def read_series(path, date_column, columns=(), encoding="utf-8-sig"):
    """Read a CSV file with a header; commas, semicolons or tabs separate.

    Args:
        path: the file.
        date_column: the column of dates, as ISO 8601 writes them: 2016-07-01 13:00:00, 2016-07-01, ...
        columns: names of the number columns to take; () takes all.
        encoding: of the file; "utf-8-sig" also passes over a byte order mark.

    Returns:
        `Series`.

    Raises:
        UserError: for a file that cannot be read, and for the first cell, date or gap in it that is wrong; it names
            the line as an editor counts it, and the column.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no file {path}; give the path of a CSV file with CSV")
    try:
        text = path.read_text(encoding=encoding)
    except UnicodeError as error:
        raise UserError(
            f"{path} is not written in {encoding} ({error.reason} at byte {error.start}); save it as UTF-8, or set "
            "ENCODING, such as to gb18030, cp1252 or utf-16"
        ) from error
    except LookupError as error:
        raise UserError(f"ENCODING {encoding!r} is unknown; set it to one that Python knows, such as utf-8") from error
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    try:
        names = [name.strip() for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if row]  # blank lines are passed over
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: this is no CSV ({error}); save the table as CSV") from error
    chosen = check_header(path, names, date_column, columns)

    dates, values = [], []
    for line, row in rows:
        if len(row) != len(names):
            raise UserError(f"{path}, line {line} has {len(row)} cells, but the header {len(names)}; mend the line")
        cells = dict(zip(names, row))
        dates.append(parse_date(cells[date_column], f"{path}, line {line}, column {date_column}"))
        values.append([parse_number(cells[name], f"{path}, line {line}, column {name}") for name in chosen])
    lines = [line for line, _ in rows]
    return Series(dates, check_dates(path, dates, lines), chosen, np.array(values))


def check_header(path, names, date_column, columns):
    """The names of the number columns to take; UserError if the header does not have them."""
    if date_column not in names:
        raise UserError(
            f"{path} has no column {date_column!r} for the dates, only {', '.join(names) or 'an empty first line'}; "
            "set DATE to the name of yours"
        )
    doubled = [name for name, count in Counter(names).items() if count > 1]
    if doubled:
        raise UserError(f"{path} has several columns {doubled[0]!r}; give each a name of its own")
    unknown = [name for name in columns if name not in names or name == date_column]
    if unknown:
        raise UserError(
            f"{path} has no number column {unknown[0]!r}, only {', '.join(names)}; name one of these, or give a file "
            "that has it"
        )
    chosen = list(columns) or [name for name in names if name != date_column]
    if not chosen:
        raise UserError(f"{path} has no column besides {date_column}; a series needs numbers")
    return chosen


def parse_date(text, where):
    """ISO 8601 -> `datetime`; UserError with `where` if it is none."""
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise UserError(
            f"{where}: {text.strip()!r} is no date; write dates as 2016-07-01 13:00:00 or 2016-07-01"
        ) from error


def parse_number(text, where):
    """A finite float; UserError with `where` if `text` is none."""
    if not text.strip():
        raise UserError(f"{where}: the cell is empty; fill it in, for example from the rows before and after it")
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(
            f"{where}: {text.strip()!r} is no number; mend the cell, or leave the column out by COLUMNS"
        ) from error
    if not math.isfinite(value):
        raise UserError(f"{where}: {text.strip()} is not finite; fill it in, or leave the column out by COLUMNS")
    return value


def check_dates(path, dates, lines):
    """The interval of the dates; UserError for the first one that comes too early or too late."""
    if len(dates) < 2:
        raise UserError(f"{path} holds {len(dates)} rows of numbers; a series needs many")
    if len({date.tzinfo is None for date in dates}) > 1:
        raise UserError(f"{path}: some dates have a time zone and some have none; write all alike")
    steps = [later - earlier for earlier, later in zip(dates, dates[1:])]
    for earlier, later, step, line in zip(dates, dates[1:], steps, lines[1:]):
        if step <= timedelta(0):
            what = "stands twice" if not step else f"comes after {earlier}"
            raise UserError(f"{path}, line {line}: the date {later} {what}; sort the rows, and keep each date once")
    interval = Counter(steps).most_common(1)[0][0]
    for earlier, later, step, line in zip(dates, dates[1:], steps, lines[1:]):
        if step != interval:
            raise UserError(
                f"{path}, line {line}: {later} follows on {earlier}, but most rows are {interval} apart; fill in the "
                "rows that are missing, or cut the file there"
            )
    return interval


def split_rows(rows, interval, split):
    """Where training, validation and test end.

    Args:
        rows: number of rows.
        interval: `timedelta` from row to row.
        split: three sizes: months of 30 days, as the published tables of the ETT data have them (12, 4, 4: Zhou et
            al., Informer, AAAI 2021; rows after them are not used); or, if they sum to 1, shares of the rows.

    Returns:
        Three row numbers; a part ends before its own.

    Raises:
        UserError: if there are fewer rows, or `split` makes no sense.
    """
    if len(split) != 3 or min(split) <= 0:
        raise UserError(f"SPLIT must hold three sizes above 0, for training, validation and test, got {split}")
    if math.isclose(sum(split), 1):
        train, test = int(rows * split[0]), int(rows * split[2])
        return train, rows - test, rows
    month = timedelta(days=30) / interval
    ends = [round(sum(split[: part + 1]) * month) for part in range(3)]
    if ends[2] > rows:
        raise UserError(
            f"SPLIT {split} asks for {sum(split):g} months of 30 days, and the series has {rows / month:.1f}; set it "
            "to smaller numbers, or to shares such as 0.7,0.1,0.2"
        )
    return tuple(ends)


def split_windows(values, ends, lookback, horizon):
    """Every window of `lookback` rows seen and `horizon` rows to forecast, in each part.

    What validation and test look back on may lie in the part before; what they forecast lies in their own.

    Args:
        values: tensor (rows, columns).
        ends: what `split_rows` returned.

    Returns:
        Three views (windows, columns, lookback + horizon), for training, validation and test.

    Raises:
        UserError: if a part is too short for one window.
    """
    starts = (0, ends[0] - lookback, ends[1] - lookback)
    for name, start, end in zip(("training", "validation", "test"), starts, ends):
        if start < 0 or end - start < lookback + horizon:
            raise UserError(
                f"the {name} part of the series is too short for windows of {lookback} rows seen and {horizon} to "
                f"forecast: it ends at row {end}, begins at row {start + lookback if start else 0}, and training has "
                f"{ends[0]}; lower LOOKBACK or HORIZONS, or change SPLIT"
            )
    return [values[start:end].unfold(0, lookback + horizon, 1) for start, end in zip(starts, ends)]


def choose_period(interval):
    """The rows after which a series probably repeats itself: those of a day, a week, a year, an hour or a minute.

    Args:
        interval: `timedelta` from row to row.

    Raises:
        UserError: if none of them holds from 4 to 500 rows.
    """
    for unit in (timedelta(days=1), timedelta(weeks=1), timedelta(days=364), timedelta(hours=1), timedelta(minutes=1)):
        rows = unit / interval
        if rows.is_integer() and 4 <= rows <= 500:
            return int(rows)
    raise UserError(
        f"rows {interval} apart have no usual period; set PERIOD to the rows after which yours repeats itself"
    )
