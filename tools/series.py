"""Time series from CSV files: reading and checking, splitting, and cutting into windows."""

import csv
import io
import math
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import numpy as np

from common.options import UserError
from common.tables import unguard
from common.text import read_text


@dataclass
class Series:
    """A multivariate time series sampled at equal intervals.

    Attributes:
        dates: one `datetime` per row, ascending.
        interval: `timedelta` between consecutive rows.
        columns: names of the number columns.
        values: float64 array (rows, columns), all finite.
    """

    dates: list
    interval: timedelta
    columns: list
    values: np.ndarray


def read_series(path, date_column, columns=(), encoding="utf-8-sig"):
    """Read a CSV file with a header, separated by commas, semicolons or tabs.

    Args:
        path: the file.
        date_column: name of the date column; dates are in ISO 8601, such as 2016-07-01 13:00:00 or 2016-07-01.
        columns: names of the number columns to read; empty reads all of them.
        encoding: text encoding of the file; "utf-8-sig" also skips a byte order mark.

    Returns:
        `Series`.

    Raises:
        UserError: if the file cannot be read, or for the first invalid cell, date or gap in it; the message names the
            column and the line number as shown by an editor.
    """
    path = Path(path)
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
    header = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(",;\t", key=header.count))
    try:
        names = [unguard(name.strip()) for name in next(reader, [])]
        rows = [(reader.line_num, row) for row in reader if row]  # skips blank lines
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: not valid CSV ({error}); save the table as CSV") from error
    chosen = check_header(path, names, date_column, columns)

    dates, values = [], []
    for line, row in rows:
        if len(row) != len(names):
            raise UserError(f"{path}, line {line}: expected {len(names)} fields, got {len(row)}; fix this line")
        cells = dict(zip(names, row))
        dates.append(parse_date(cells[date_column], f"{path}, line {line}, column {date_column}"))
        values.append([parse_number(cells[name], f"{path}, line {line}, column {name}") for name in chosen])
    lines = [line for line, _ in rows]
    return Series(dates, check_dates(path, dates, lines), chosen, np.array(values))


def check_header(path, names, date_column, columns):
    """Names of the number columns to read; UserError if the header lacks one of them."""
    if date_column not in names:
        raise UserError(
            f"{path} has no date column {date_column!r}, only {', '.join(names) or 'an empty first line'}; set DATE to "
            "the name of the date column"
        )
    duplicates = [name for name, count in Counter(names).items() if count > 1]
    if duplicates:
        raise UserError(f"{path} has several columns named {duplicates[0]!r}; rename all but one")
    unknown = [name for name in columns if name not in names or name == date_column]
    if unknown:
        raise UserError(
            f"{path} has no number column {unknown[0]!r}, only {', '.join(names)}; choose among these, or give a file "
            "that has it"
        )
    chosen = list(columns) or [name for name in names if name != date_column]
    if not chosen:
        raise UserError(f"{path} has no column besides {date_column}; add columns of numbers")
    return chosen


def parse_date(text, where):
    """Parse an ISO 8601 date into a `datetime`; the UserError for anything else starts with `where`."""
    try:
        return datetime.fromisoformat(text.strip())
    except ValueError as error:
        raise UserError(
            f"{where}: {text.strip()!r} is not a date; write dates as 2016-07-01 13:00:00 or 2016-07-01"
        ) from error


def parse_number(text, where):
    """Parse a finite float; the UserError for anything else starts with `where`."""
    if not text.strip():
        raise UserError(f"{where}: the cell is empty; fill it in, for example by interpolation")
    try:
        value = float(text)
    except ValueError as error:
        raise UserError(
            f"{where}: {text.strip()!r} is not a number; fix this cell, or exclude the column with COLUMNS"
        ) from error
    if not math.isfinite(value):
        raise UserError(f"{where}: {text.strip()} is not finite; fill it in, or exclude the column with COLUMNS")
    return value


def check_dates(path, dates, lines):
    """Interval between the dates; UserError for the first one that is out of order or off the interval."""
    if len(dates) < 2:
        raise UserError(f"{path} has {len(dates)} rows of numbers; add more rows")
    if len({date.tzinfo is None for date in dates}) > 1:
        raise UserError(f"{path}: some dates have a time zone and some do not; use one form for all")
    steps = [later - earlier for earlier, later in zip(dates, dates[1:])]
    for earlier, later, step, line in zip(dates, dates[1:], steps, lines[1:]):
        if step <= timedelta(0):
            problem = "is a duplicate" if not step else f"follows the later date {earlier}"
            raise UserError(f"{path}, line {line}: the date {later} {problem}; sort the rows, and keep each date once")
    interval = Counter(steps).most_common(1)[0][0]
    for earlier, later, step, line in zip(dates, dates[1:], steps, lines[1:]):
        if step != interval:
            raise UserError(
                f"{path}, line {line}: {later} follows {earlier}, but most rows are {interval} apart; fill in the "
                "missing rows, or cut the file there"
            )
    return interval


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


def choose_period(interval):
    """Number of rows in the most likely seasonal period: a day, week, 364 days, hour or minute.

    Args:
        interval: `timedelta` between consecutive rows.

    Raises:
        UserError: if none of these has between 4 and 500 rows.
    """
    for unit in (timedelta(days=1), timedelta(weeks=1), timedelta(days=364), timedelta(hours=1), timedelta(minutes=1)):
        rows = unit / interval
        if rows.is_integer() and 4 <= rows <= 500:
            return int(rows)
    raise UserError(f"rows {interval} apart have no usual period; set PERIOD to the number of rows in one period")
