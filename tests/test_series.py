"""tools/series.py and tools/dates.py: files as people have them, made here kind by kind, and the values read."""

from collections import Counter
from datetime import datetime, timedelta, timezone
from zoneinfo import ZoneInfo

import numpy as np
import pytest

from common.options import UserError
from tools.dates import Step, describe_interval, find_step, read_dates
from tools.series import drop_flat, find_separator, read_series

NAMES = "January February March April May June July August September October November December".split()
GERMAN = "Januar Februar März April Mai Juni Juli August September Oktober November Dezember".split()
SPANISH = "ene feb mar abr may jun jul ago sept oct nov dic".split()
FRENCH = "janv. févr. mars avr. mai juin juil. août sept. oct. nov. déc.".split()
HOUR, DAY = timedelta(hours=1), timedelta(days=1)


def month(number, day=1):
    return datetime(number // 12, number % 12 + 1, day)


def month_end(number):
    return month(number + 1) - DAY


@pytest.fixture
def read(tmp_path):
    """Read a file with a text: read(text, **options of `read_series`)."""

    def read(text, **options):
        path = tmp_path / "series.csv"
        path.write_bytes(text.encode(options.get("encoding", "utf-8")))
        return read_series(path, **options)

    return read


def write(dates, form, name="date", separator=",", number=lambda row: f"{row * row % 17}.5"):
    """Text of a file with a row for each date."""
    lines = [f"{name}{separator}value"]
    lines += [f"{form(date)}{separator}{number(row)}" for row, date in enumerate(dates)]
    return "\n".join(lines) + "\n"


def check(series, dates, values=None):
    """That a series has these dates without a time zone, and the values of `write`."""
    assert [date.replace(tzinfo=None) for date in series.dates] == list(dates)
    expected = [row * row % 17 + 0.5 for row in range(len(series.dates))] if values is None else values
    assert series.values[:, 0].tolist() == expected and series.columns == ["value"]


# --- dates

HOURS = [datetime(2016, 2, 28) + HOUR * row for row in range(60)]
DAYS = [datetime(2019, 12, 20) + DAY * row for row in range(60)]
MONTHS = [month(12 * 1989 + row) for row in range(150)]
QUARTERS = [month(12 * 1970 + 3 * row) for row in range(30)]
YEARS = [datetime(1947 + row, 1, 1) for row in range(40)]
WEEKS = [datetime(2019, 12, 2) + 7 * DAY * row for row in range(60)]


def quarter(date):
    return (date.month + 2) // 3


FORMS = {
    # ISO 8601, and what is near to it
    "2016-07-01 13:00:00": (HOURS, str),
    "2016-07-01T13:00": (HOURS, lambda d: f"{d:%Y-%m-%dT%H:%M}"),
    "2016-07-01T13": (HOURS, lambda d: f"{d:%Y-%m-%dT%H}"),
    "2016-07-01T13:00:00Z": (HOURS, lambda d: f"{d:%Y-%m-%dT%H:%M:%SZ}"),
    "2016-07-01T13:00:00.0000000Z": (HOURS, lambda d: f"{d:%Y-%m-%dT%H:%M:%S}.0000000Z"),
    "2016-07-01T13:00:00.000": (HOURS, lambda d: f"{d:%Y-%m-%dT%H:%M:%S}.000"),
    "2016-07-01T13:00:00,123456789": (HOURS, lambda d: f'"{d:%Y-%m-%dT%H:%M:%S},000000789"'),
    "2016-07-01T13:00:00+02": (HOURS, lambda d: f"{d:%Y-%m-%dT%H:%M:%S}+02"),
    "2016-07-01 13:00:00 -0530": (HOURS, lambda d: f"{d:%Y-%m-%d %H:%M:%S} -0530"),
    "2016-07-01 13:00 UTC": (HOURS, lambda d: f"{d:%Y-%m-%d %H:%M} UTC"),
    "20160701T130000": (HOURS, lambda d: f"{d:%Y%m%dT%H%M%S}"),
    "20160701T1300+0100": (HOURS, lambda d: f"{d:%Y%m%dT%H%M}+0100"),
    "20160701": (DAYS, lambda d: f"{d:%Y%m%d}"),
    "201607011300": (HOURS, lambda d: f"{d:%Y%m%d%H%M}"),
    "2016070113": (HOURS, lambda d: f"{d:%Y%m%d%H}"),
    "2016-W05": (WEEKS, lambda d: "{0}-W{1:02}".format(*d.isocalendar())),
    "2016W051": (DAYS, lambda d: "{0}W{1:02}{2}".format(*d.isocalendar())),
    "2016-W05-1": (DAYS, lambda d: "{0}-W{1:02}-{2}".format(*d.isocalendar())),
    "2016-7-1": (DAYS, lambda d: f"{d.year}-{d.month}-{d.day}"),
    "2016/07/01": (DAYS, lambda d: f"{d:%Y/%m/%d}"),
    "2016.7.1": (DAYS, lambda d: f"{d.year}.{d.month}.{d.day}"),
    "2016/3/1 0:00": (HOURS, lambda d: f"{d.year}/{d.month}/{d.day} {d.hour}:00"),
    "quoted": (HOURS, lambda d: f'"{d}"'),
    "days and times mixed": (HOURS, lambda d: f"{d:%Y-%m-%d}" if d.hour == 0 else str(d)),
    "24:00": (HOURS, lambda d: str(d) if d.hour else f"{d - DAY:%Y-%m-%d} 24:00"),
    # Chinese
    "2016年3月1日": (DAYS, lambda d: f"{d.year}年{d.month}月{d.day}日"),
    "2016年03月01日 13:00": (HOURS, lambda d: f"{d.year}年{d.month:02}月{d.day:02}日 {d:%H:%M}"),
    "2016年3月": (MONTHS, lambda d: f"{d.year}年{d.month}月"),
    "2016年": (YEARS, lambda d: f"{d.year}年"),
    "2016年第1季度": (QUARTERS, lambda d: f"{d.year}年第{quarter(d)}季度"),
    # day, month and year as numbers
    "31.12.2019": (DAYS, lambda d: f"{d:%d.%m.%Y}"),
    "31/12/2019": (DAYS, lambda d: f"{d:%d/%m/%Y}"),
    "12/31/2019": (DAYS, lambda d: f"{d:%m/%d/%Y}"),
    "12-31-2019": (DAYS, lambda d: f"{d.month}-{d.day}-{d.year}"),
    "31.12.2019 13:00": (HOURS, lambda d: f"{d:%d.%m.%Y %H:%M}"),
    "12/31/2019 1:00:00 PM": (HOURS, lambda d: f"{d:%m/%d/%Y %I:%M:%S %p}"),
    "12/31/2019, 1:00 p.m.": (HOURS, lambda d: f'"{d:%m/%d/%Y, %I:%M} {"ap"[d.hour > 11]}.m."'),
    "31/12/19": (DAYS, lambda d: f"{d:%d/%m/%y}"),
    "12/31/19": (DAYS, lambda d: f"{d:%m/%d/%y}"),
    "12/1/2019 for months": (MONTHS, lambda d: f"{d.month}/1/{d.year}"),
    "1/12/2019 for months": (MONTHS, lambda d: f"1/{d.month}/{d.year}"),
    "01.01.2019 for years": (YEARS, lambda d: f"{d:%d.%m.%Y}"),
    # months, quarters, years
    "1949-01": (MONTHS, lambda d: f"{d:%Y-%m}"),
    "1949/1": (MONTHS, lambda d: f"{d.year}/{d.month}"),
    "01/1949": (MONTHS, lambda d: f"{d:%m/%Y}"),
    "1991 Jul": (MONTHS, lambda d: f"{d.year} {NAMES[d.month - 1][:3]}"),
    "1991-JUL": (MONTHS, lambda d: f"{d.year}-{NAMES[d.month - 1][:3].upper()}"),
    "July 1991": (MONTHS, lambda d: f"{NAMES[d.month - 1]} {d.year}"),
    "Jul-91": (MONTHS, lambda d: f"{NAMES[d.month - 1][:3]}-{d:%y}"),
    "Jul-61": ([month(12 * 1961 + row) for row in range(150)], lambda d: f"{NAMES[d.month - 1][:3]}-{d:%y}"),
    "1-Jul-91": (DAYS, lambda d: f"{d.day}-{NAMES[d.month - 1][:3]}-{d:%y}"),
    "01 July 1991": (DAYS, lambda d: f"{d.day:02} {NAMES[d.month - 1]} {d.year}"),
    "01Jul1991": (DAYS, lambda d: f"{d.day:02}{NAMES[d.month - 1][:3]}{d.year}"),
    "Jul 1, 1991": (DAYS, lambda d: f'"{NAMES[d.month - 1][:3]} {d.day}, {d.year}"'),
    "Sept. 1st, 1991": (DAYS, lambda d: f'"{NAMES[d.month - 1][:3]}. {d.day}th, {d.year}"'),
    "Mon, 1 Jul 1991": (DAYS, lambda d: f'"{"Mon Tue Wed Thu Fri Sat Sun".split()[d.weekday()]}, {d.day} '
                        f'{NAMES[d.month - 1][:3]} {d.year}"'),  # fmt: skip
    "1991-Jul-01": (DAYS, lambda d: f"{d.year}-{NAMES[d.month - 1][:3]}-{d.day:02}"),
    "1991M7": (MONTHS, lambda d: f"{d.year}M{d.month}"),
    "199107": (MONTHS, lambda d: f"{d:%Y%m}"),
    "199127 for weeks": (WEEKS, lambda d: "{}{:02}".format(*d.isocalendar()[:2])),
    "1991.07": (MONTHS, lambda d: f"{d:%Y.%m}"),
    "1991.583": (MONTHS, lambda d: f"{d.year + (d.month - 1) / 12:.3f}"),
    "1991.58333333333": (MONTHS, lambda d: f"{d.year + (d.month - 1) / 12:.11f}"),
    "1991.58": (MONTHS, lambda d: f"{d.year + (d.month - 1) / 12:.2f}"),
    "1970.25 for quarters": (QUARTERS, lambda d: f"{d.year + (d.month - 1) / 12:g}"),
    "1970 Q1": (QUARTERS, lambda d: f"{d.year} Q{quarter(d)}"),
    "1970q1": (QUARTERS, lambda d: f"{d.year}q{quarter(d)}"),
    "1970-Q1": (QUARTERS, lambda d: f"{d.year}-Q{quarter(d)}"),
    "Q1 1970": (QUARTERS, lambda d: f"Q{quarter(d)} {d.year}"),
    "Q1-70": (QUARTERS, lambda d: f"Q{quarter(d)}-{d:%y}"),
    "1947": (YEARS, lambda d: str(d.year)),
    "1947.0": (YEARS, lambda d: f"{d.year}.0"),
    "1991 [YR1991]": (YEARS, lambda d: f"{d.year} [YR{d.year}]"),
    # as programs and other countries write them
    "1Q1970": (QUARTERS, lambda d: f"{quarter(d)}Q{d.year}"),
    "2016-W5": (WEEKS, lambda d: "{0}-W{1}".format(*d.isocalendar())),
    "01.1949": (MONTHS, lambda d: f"{d:%m.%Y}"),
    "31.12.2019.": (DAYS, lambda d: f"{d:%d.%m.%Y}."),
    "2020. 1. 5": (DAYS, lambda d: f"{d.year}. {d.month}. {d.day}"),
    "2020. 1. 5. 오후 1:00": (HOURS, lambda d: f"{d.year}. {d.month}. {d.day}. 오{'전후'[d.hour // 12]} {d:%I:%M}"),
    "2020/1/5 下午1:00": (HOURS, lambda d: f"{d.year}/{d.month}/{d.day} {'上下'[d.hour // 12]}午{d:%I:%M}"),
    "2020年1月3日13时": (HOURS, lambda d: f"{d.year}年{d.month}月{d.day}日{d.hour}时"),
    "2020年1月3日 13时00分": (HOURS, lambda d: f"{d.year}年{d.month}月{d.day}日 {d:%H时%M分}"),
    "Fri Jul  1 13:00:00 2016": (HOURS, datetime.ctime),
    "Fri Jul 01 2016 13:00:00 GMT+0100": (HOURS, lambda d: f"{d:%a %b %d %Y %H:%M:%S GMT+0100}"),
    "01/Jul/2016:13:00:00 +0000": (HOURS, lambda d: f"{d:%d/%b/%Y:%H:%M:%S} +0000"),
    "20160701:1300": (HOURS, lambda d: f"{d:%Y%m%d:%H%M}"),
    "2016-07-01 13:00 CET": (HOURS, lambda d: f"{d:%Y-%m-%d %H:%M} CET"),
    "2016-07-01 13:00 UTC+01:00": (HOURS, lambda d: f"{d:%Y-%m-%d %H:%M} UTC+01:00"),
    "1. Juli 1991": (DAYS, lambda d: f"{d.day}. {GERMAN[d.month - 1]} {d.year}"),
    "Okt 91": (MONTHS, lambda d: f"{GERMAN[d.month - 1][:3]} {d:%y}"),
    "sept. 1991": (MONTHS, lambda d: f"{FRENCH[d.month - 1]} {d.year}"),
    "01-ene-1991": (DAYS, lambda d: f"{d.day:02}-{SPANISH[d.month - 1]}-{d.year}"),
    "2016-07-01-13-00-00": (HOURS, lambda d: f"{d:%Y-%m-%d-%H-%M-%S}"),
    "2016-07-01_13-00-00": (HOURS, lambda d: f"{d:%Y-%m-%d_%H-%M-%S}"),
    "2016_07_01_13_00_00": (HOURS, lambda d: f"{d:%Y_%m_%d_%H_%M_%S}"),
    "2016.07.01 13.00.00": (HOURS, lambda d: f"{d:%Y.%m.%d %H.%M.%S}"),
    "16 digits": (HOURS, lambda d: f"{d.replace(tzinfo=timezone.utc).timestamp():.0f}000000"),
    # seconds since 1970
    "Unix time in seconds": (HOURS, lambda d: str(int(d.replace(tzinfo=timezone.utc).timestamp()))),
    "Unix time in milliseconds": (HOURS, lambda d: str(1000 * int(d.replace(tzinfo=timezone.utc).timestamp()))),
}


@pytest.mark.parametrize("form", FORMS)
def test_dates_are_read_as_they_are(form, read):
    dates, function = FORMS[form]
    check(read(write(dates, function)), dates)


@pytest.mark.parametrize("form", FORMS)
def test_a_date_column_is_found_behind_others_and_below_a_strange_name(form, read):
    dates, function = FORMS[form]
    series = read(
        "id,what,,value\n" + "".join(f"{row + 1},a,{function(date)},{row % 7}\n" for row, date in enumerate(dates))
    )
    check(series, dates, [row % 7 for row in range(len(dates))])
    assert series.date == "column 3" and any("what (text); id (numbers of the rows)" in note for note in series.notes)


@pytest.mark.parametrize("name", ["rownames", "", "index", "id"])
def test_row_names_may_be_dates(read, name):
    """As R writes a quarterly series; whole numbers in such a column are the numbers of rows."""
    rows = [f"{date.year + (date.month - 1) / 12:g},{row % 7}" for row, date in enumerate(QUARTERS)]
    assert read("\n".join([f"{name},value", *rows])).dates == QUARTERS
    with pytest.raises(UserError, match="has no date column"):
        read("\n".join([f"{name or 'id'},value", *(f"{2001 + row},{row % 7}" for row in range(60))]))


def test_date_names_another_column(read):
    text = "made,valid,value\n" + "".join(f"2020-01-0{date.day % 9 + 1},{date:%d.%m.%Y},{date.day}\n" for date in DAYS)
    check(read(text, date_column="valid"), DAYS, [date.day for date in DAYS])
    with pytest.raises(UserError, match="42 rows have a date that another row has"):
        read(text)
    with pytest.raises(UserError, match="no date column 'when', only made, valid, value; set DATE"):
        read(text, date_column="when")
    with pytest.raises(UserError, match="line 2, column value: '20' is not a date"):
        read(text, date_column="value")


@pytest.mark.parametrize(
    ("form", "rest", "words"),
    [
        ("{0}/{1}/2020", [(1, 2), (3, 4), (7, 9)], "'1/2/2020' can be dmy or mdy .* set DATE_ORDER"),
        ("{0:02}.{1:02}.20", [(1, 2), (3, 4), (7, 9)], "can be dmy or mdy or ymd"),
        ("{0}-{1}-2020", [(1, 1), (2, 2), (3, 5)], "set DATE_ORDER"),
    ],
)
def test_an_order_that_nothing_decides_is_refused_and_can_be_set(form, rest, words, read):
    text = "date,value\n" + "".join(f"{form.format(*pair)},{row}\n" for row, pair in enumerate(rest))
    with pytest.raises(UserError, match=words):
        read(text)
    first = datetime(2020, rest[0][1], rest[0][0])
    gaps = dict(order="dmy", gaps="carry")
    try:
        assert read(text, **gaps).dates[0] == first
    except UserError as error:  # days at random
        assert "apart" in str(error)


def test_the_order_that_was_chosen_is_printed(read):
    for form, word in (("%d/%m/%Y", "dmy"), ("%m/%d/%Y", "mdy")):
        [note] = [note for note in read(write(DAYS, lambda d: f"{d:{form}}")).notes if "DATE_ORDER" in note]
        assert word in note
    with pytest.raises(UserError, match="'13/01/2020' is not a date|is not a date"):
        read(write(DAYS, lambda d: f"{d:%d/%m/%Y}"), order="mdy", date_column="date")


def test_days_since_1900_as_excel_counts_them(read):
    start = datetime(1899, 12, 30)
    exact = [f"{(date - start) / DAY:.10f},{row % 7}\n" for row, date in enumerate(HOURS)]
    for name in ("time", "GH"):
        series = read(f"{name},value\n" + "".join(exact))
        check(series, HOURS, [row % 7 for row in range(60)])
        assert f"dates in column {name}: days since 1900 as Excel counts them" in series.notes
    whole = "".join(f"{(day - start).days},{row % 7}\n" for row, day in enumerate(DAYS))
    check(read(f"date,value\n{whole}"), DAYS, [row % 7 for row in range(60)])
    for text in (f"meter,value\n{whole}", "date,value\n" + "".join(f"{43000 + row % 9},{row}\n" for row in range(60))):
        with pytest.raises(UserError, match="no date column"):  # numbers of things, or up and down
            read(text)


def test_numbers_are_dates_only_at_equal_steps(read):
    for cells in ([1950, 1951, 1953, 1954], [12, 13, 14, 15], [201313, 201314, 201315, 201316], [1e3, 2e3, 3e3, 4e3]):
        text = "n,value\n" + "".join(f"{cell:.0f},{row}\n" for row, cell in enumerate(cells))
        with pytest.raises(UserError, match="has no date column, only n, value"):
            read(text)


@pytest.mark.parametrize(
    ("header", "form"),
    [
        ("year,month,day,hour", lambda d: f"{d.year},{d.month},{d.day},{d.hour}"),
        ("Year,Mo,DD,Hr", lambda d: f"{d.year},{d.month:02},{d.day:02},{d.hour:02}"),
        ("date,time,x,y", lambda d: f"{d:%d/%m/%Y},{d:%H:%M:%S},a,b"),
        ("x,date,hour,y", lambda d: f"a,{d:%Y-%m-%d},{d.hour},b"),
        ("x,Date,Uhrzeit,y", lambda d: f"a,{d:%d.%m.%Y},{d:%I:%M %p},b"),
    ],
)
def test_dates_in_several_columns(header, form, read):
    dates = [datetime(2019, 12, 20) + HOUR * row for row in range(24 * 20)]
    text = f"{header},value\n" + "".join(f"{form(date)},{row}\n" for row, date in enumerate(dates))
    series = read(text)
    check(series, dates, list(range(len(dates))))
    assert read(text, date_column=series.date).dates == dates  # as from a checkpoint


def test_years_and_months_in_columns(read):
    text = "Year,Month,value\n" + "".join(f"{d.year},{NAMES[d.month - 1]},{d.month}\n" for d in MONTHS)
    check(read(text), MONTHS, [d.month for d in MONTHS])


# --- steps

STEPS = {
    "hours": ([datetime(2020, 1, 1) + HOUR * row for row in range(50)], "1:00:00"),
    "15 minutes": ([datetime(2020, 1, 1) + HOUR / 4 * row for row in range(50)], "0:15:00"),
    "10 seconds": ([datetime(2020, 1, 1) + HOUR / 360 * row for row in range(50)], "0:00:10"),
    "days": (DAYS, "1 day"),
    "weeks": (WEEKS, "7 days"),
    "business days": ([d for d in DAYS if d.weekday() < 5], "1 weekday of 5 a week"),
    "Sunday to Thursday": ([d for d in DAYS if d.weekday() not in (4, 5)], "1 weekday of 5 a week"),
    "Monday to Saturday": ([d for d in DAYS if d.weekday() != 6], "1 weekday of 6 a week"),
    "months": (MONTHS, "1 month"),
    "ends of months": ([month_end(12 * 2019 + row) for row in range(40)], "1 month"),
    "the 15th": ([month(12 * 2019 + row, 15) for row in range(40)], "1 month"),
    "the 30th": ([min(month(12 * 2019 + row) + 29 * DAY, month_end(12 * 2019 + row)) for row in range(40)], "1 month"),
    "quarters": (QUARTERS, "3 months"),
    "ends of quarters": ([month_end(12 * 2019 + 2 + 3 * row) for row in range(40)], "3 months"),
    "half years": ([month(12 * 2019 + 6 * row) for row in range(40)], "6 months"),
    "years": (YEARS, "1 year"),
    "ends of years": ([datetime(1980 + row, 12, 31) for row in range(30)], "1 year"),
    "decades": ([datetime(1800 + 10 * row, 1, 1) for row in range(30)], "10 years"),
    "4 weeks": ([datetime(2019, 1, 1) + 28 * DAY * row for row in range(40)], "28 days"),
}
for weekday, ends in (("last", month_end), ("first", month)):
    dates = []
    for row in range(40):
        dates.append(ends(12 * 2019 + row))
        while dates[-1].weekday() > 4:
            dates[-1] += DAY * (1 if weekday == "first" else -1)
    STEPS[f"{weekday} weekdays of months"] = dates, "1 month"


@pytest.mark.parametrize("kind", STEPS)
def test_steps_are_found_and_go_on(kind, read):
    dates, words = STEPS[kind]
    series = read(write(dates[:-4], str))
    check(series, dates[:-4])
    assert str(series.step) == words and series.following(4) == dates[-4:]
    assert describe_interval(timedelta(seconds=series.interval.total_seconds())) == words  # as from a checkpoint


@pytest.mark.parametrize("kind", STEPS)
def test_missing_rows_are_refused_at_once_or_filled(kind, read):
    dates, _ = STEPS[kind]
    kept = [date for row, date in enumerate(dates) if row not in (5, 6, 20)]
    text = write(kept, str, number=lambda row: dates.index(kept[row]))
    with pytest.raises(UserError, match=rf"3 rows are missing .{dates[5]} .2 rows., {dates[20]}.; set GAPS"):
        read(text)
    series = read(text, gaps="carry")
    check(series, dates, [4 if row in (5, 6) else 19 if row == 20 else row for row in range(len(dates))])
    assert any("3 rows are missing" in note and "filled, GAPS carry" in note for note in series.notes)
    check(read(text, gaps="interpolate"), dates, list(range(len(dates))))


def test_empty_cells_are_refused_or_filled(read):
    cells = ["1", "", "3", "NA", "?", "6", "nan", "8", "null", "10", "-", "12"]
    text = write(DAYS[:12], str, number=lambda row: cells[row])
    with pytest.raises(UserError, match="column value: 6 cells are empty .* the longest|6 cells are empty"):
        read(text)
    check(read(text, gaps="interpolate"), DAYS[:12], list(range(1, 13)))
    check(read(text, gaps="carry"), DAYS[:12], [1, 1, 3, 3, 3, 6, 6, 8, 8, 10, 10, 12])
    late = write(DAYS[:12], str, number=lambda row: row if row > 2 else "")
    series = read(late, gaps="carry")
    check(series, DAYS[3:12], list(range(3, 12)))
    assert "the first 3 rows have no numbers, left out" in series.notes
    lines = [f"{day},{row},{row if row > 8 else ''}" for row, day in enumerate(DAYS[:12])]
    text = "\n".join(["date,value,new", *lines])
    series = read(text, gaps="carry")
    check(series, DAYS[:12], list(range(12)))
    assert "column new left out: the first value is in the second half" in series.notes
    lines = [f"{day},{row},{row or ''}" for row, day in enumerate(DAYS)]
    series = read("\n".join(["date,value,new", *lines]), gaps="carry")
    assert "the first row is left out: column new has no value before" in series.notes
    with pytest.raises(UserError, match="column new begins in the second half only; exclude it"):
        read(text, gaps="carry", columns=["value", "new"])
    with pytest.raises(UserError, match="rows are missing, more than there are"):
        read(write([*DAYS[:12], datetime(2999, 1, 1)], str), gaps="carry")


def test_irregular_dates_are_refused(read):
    dates = [date + HOUR / 60 * (row in (7, 30)) for row, date in enumerate(HOURS)]
    with pytest.raises(UserError, match=r"most rows are 1:00:00 apart, but 2 of 60 lie between .* line 9 .* line 32"):
        read(write(dates, str))


@pytest.mark.parametrize("form", ["%Y-%m-%d %H:%M:%S", "%d.%m.%Y %H:%M", "%Y%m%d%H%M"])
def test_rows_are_sorted_and_doubled_ones_named(form, read):
    text = write(HOURS, lambda d: f"{d:{form}}")
    header, *lines = text.splitlines(keepends=True)
    series = read(header + "".join(reversed(lines)))
    check(series, HOURS)
    assert any("newest row is the first" in note for note in series.notes)
    series = read(header + "".join([*lines[:10], lines[11], lines[10], *lines[12:]]))
    check(series, HOURS)
    assert any("rows sorted by date, lines 12, 13 moved" in note for note in series.notes)
    series = read(header + "".join([*lines[:10], lines[9], *lines[10:]]))
    check(series, HOURS)
    assert any("line 12 left out: a row with this date and these values" in note for note in series.notes)
    with pytest.raises(UserError, match=r"1 row has a date that another row has, with other values: line 12"):
        read(header + "".join([*lines[:10], lines[9].replace(".5", ".75"), *lines[10:]]))


def test_several_series_below_each_other_are_refused_with_the_column_that_tells_them_apart(read):
    rows = [f"{date},{store},{date.day * store}\n" for store in (1, 2, 3) for date in DAYS]
    text = "date,store,value\n" + "".join(rows)
    with pytest.raises(UserError, match='column store tells several .* such as --where "store=1"'):
        read(text)
    series = read(text, where=["store=2"])
    check(series, DAYS, [2 * date.day for date in DAYS])
    assert "WHERE store=2: 60 of 180 rows read" in series.notes


def test_where_names_several_columns_and_values_with_commas(read):
    pairs = [("Korea, South", "f"), ("Korea, South", "m"), ("Norway", "f"), ("Norway", "m")]
    rows = [f'{date},"{name}",{sex},{row * place}\n' for place, (name, sex) in enumerate(pairs, 1)
            for row, date in enumerate(DAYS)]  # fmt: skip
    text = "date,Country,sex,value\n" + "".join(rows)
    with pytest.raises(UserError, match='columns Country and sex tell several .*--where "Country=Korea, South,sex=f"'):
        read(text)
    series = read(text, where="Country=Korea, South,sex=m".split(","))  # as the command line splits a list
    check(series, DAYS, [2 * row for row in range(len(DAYS))])
    with pytest.raises(UserError, match=r"no row .* 'Norge' in column Country; .* Korea, South, Norway"):
        read(text, where=["Country=Norge"])
    with pytest.raises(UserError, match="WHERE 'Land=Norway' must be a column and its value.* Country, sex"):
        read(text, where=["Land=Norway"])


def test_a_column_with_an_early_gap_is_filled_before_rows_are_left_out(read):
    lines = [f"{day},{row if row > 3 else ''},{row if row not in (2, 3, 4, 5) else ''}" for row, day in enumerate(DAYS)]
    series = read("date,value,other\n" + "\n".join(lines), gaps="carry")
    assert series.dates == DAYS[4:] and series.values[:, 0].tolist() == list(range(4, 60))
    assert series.values[:3, 1].tolist() == [1, 1, 6]
    assert any("the first 4 rows are left out: column value has no value before" in note for note in series.notes)


def test_rows_without_numbers_at_both_ends_are_left_out(read):
    series = read(write(MONTHS, str, number=lambda row: row if 2 < row < 140 else ""))
    check(series, MONTHS[3:140], list(range(3, 140)))
    assert "the first 3 rows have no numbers, left out" in series.notes
    assert "the last 10 rows have no numbers, left out" in series.notes
    assert series.following(1) == [MONTHS[140]]


# --- daylight saving

ZONES = ("Europe/Berlin", "America/New_York", "Australia/Sydney", "Europe/London")


def local(zone, step=HOUR, first=datetime(2018, 6, 1), days=330):
    """(UTC, local time with its zone) of the rows."""
    utc = [first + step * row for row in range(int(DAY * days / step))]
    return utc, [date.replace(tzinfo=timezone.utc).astimezone(ZoneInfo(zone)) for date in utc]


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("step", [HOUR, HOUR / 2])
def test_daylight_saving_with_a_time_zone(zone, step, read):
    utc, dates = local(zone, step)
    text = write(dates, lambda d: f"{d:%Y-%m-%d %H:%M}")
    series = read(text, zone=zone)
    assert series.clock == utc and series.dates == dates and series.interval == step
    assert [str(date) for date in series.dates] == [str(date) for date in dates]
    following = series.following(2)
    assert following[0] == (utc[-1] + step).replace(tzinfo=timezone.utc) and following[0].tzinfo == ZoneInfo(zone)
    header, *lines = text.splitlines(keepends=True)
    assert read(header + "".join(reversed(lines)), zone=zone).clock[0] == utc[0]


@pytest.mark.parametrize("zone", ZONES)
@pytest.mark.parametrize("first", [datetime(2018, 1, 1), datetime(2018, 7, 15)])
def test_daylight_saving_shows_itself(zone, first, read):
    utc, dates = local(zone, first=first)
    series = read(write(dates, lambda d: f"{d:%Y-%m-%d %H:%M}"))
    distances = {date.replace(tzinfo=None) - clock for date, clock in zip(series.dates, utc)}
    assert len(distances) == 1 and any("daylight saving" in note for note in series.notes)


def test_daylight_saving_that_does_not_show_itself_is_refused(read):
    _, dates = local("Europe/Berlin", first=datetime(2018, 10, 1), days=60)
    text = write(dates, lambda d: f"{d:%Y-%m-%d %H:%M}")
    with pytest.raises(UserError, match="if daylight saving doubles the hour, set TIMEZONE"):
        read(text)
    assert len(read(text, zone="Europe/Berlin").clock) == 60 * 24
    with pytest.raises(UserError, match="line .*: 2020-03-29 02:00:00 does not exist in Europe/Berlin"):
        read(write([datetime(2020, 3, 28) + HOUR * row for row in range(60)], str), zone="Europe/Berlin")


def test_another_column_of_dates_is_named_only_if_it_helps(read):
    """The end of each interval is doubled in autumn, too."""
    utc, dates = local("Europe/Berlin", first=datetime(2018, 10, 1), days=60)
    rows = [f"{date:%Y-%m-%d %H:%M},{date + HOUR:%Y-%m-%d %H:%M},{row % 7}" for row, date in enumerate(dates)]
    text = "\n".join(["start,end,value", *rows])
    with pytest.raises(UserError, match="1 row has a date .*; keep each date once; if daylight saving .* TIMEZONE"):
        read(text)
    assert read(text, zone="Europe/Berlin").clock == utc
    text = "day,time,value\n" + "".join(f"{date:%Y-%m-%d},{date},{date.hour}.5\n" for date in HOURS)
    with pytest.raises(UserError, match="column time has different dates: set DATE to time"):
        read(text, date_column="day")


def test_daylight_saving_doubles_no_days(read):
    lines = [f"{day},{row}" for row, day in enumerate([*DAYS, DAYS[3]])]
    with pytest.raises(UserError, match="1 row has a date that another row has.*keep each date once, or set GAPS"):
        read("\n".join(["date,value", *lines, *(f"{DAYS[-1] + DAY * row},1" for row in range(1, 60))]))


@pytest.mark.parametrize("zone", ZONES)
def test_distances_from_utc_that_change(zone, read):
    utc, dates = local(zone)
    series = read(write(dates, lambda d: d.isoformat()))
    assert series.clock == utc and series.dates == [date.astimezone(timezone.utc) for date in dates]
    assert [str(date) for date in read(write(dates, str), zone=zone).dates] == [str(date) for date in dates]
    midnights = [datetime(2018, 1, 1) + DAY * row for row in range(500)]
    series = read(write(midnights, lambda d: d.replace(tzinfo=ZoneInfo(zone)).isoformat()))
    assert series.dates == midnights and any("local days" in note for note in series.notes)


# --- numbers

SIGNS = {
    "decimal comma": (";", ["1,5", "-2,25", "0,125", "3"], [1.5, -2.25, 0.125, 3]),
    "decimal comma in quotes": (",", ['"1,5"', '"-2,25"', '"0,125"', "3"], [1.5, -2.25, 0.125, 3]),
    "thousands with commas": (",", ['"1,234.5"', '"12,345,678"', "7.25", "-0.5"], [1234.5, 12345678, 7.25, -0.5]),
    "thousands with points": (";", ["1.234,5", "12.345.678", "7,25", "-0,5"], [1234.5, 12345678, 7.25, -0.5]),
    "several thousands": (";", ["1.234.567", "2", "3.000.000", "5"], [1234567, 2, 3000000, 5]),
    "thousands with spaces": (";", ["1 234,5", "12 345 678", "7,25", "1"], [1234.5, 12345678, 7.25, 1]),
    "thousands with thin spaces": (";", ["1\u202f234,5", "12\u00a0345\u00a0678", "7,5"], [1234.5, 12345678, 7.5]),
    "thousands with apostrophes": (";", ["1'234.5", "12\u2019345.25", "7.25", "1"], [1234.5, 12345.25, 7.25, 1]),
    "plain": (",", ["1.5", "-.25", "+3.", "1e-3"], [1.5, -0.25, 3, 0.001]),
    "powers with a decimal comma": (";", ["1,5E+03", "-2,5e-1", "1", "2"], [1500, -0.25, 1, 2]),
    "minus as a sign of its own": (",", ["\u22121.5", "2", "\u22123", "4"], [-1.5, 2, -3, 4]),
    "zero before": (";", ["0.125", "0.250", "0.375", "0.500"], [0.125, 0.25, 0.375, 0.5]),
    "four digits before": (";", ["1234.125", "1.250", "7.375", "1.500"], [1234.125, 1.25, 7.375, 1.5]),
}


@pytest.mark.parametrize("kind", SIGNS)
def test_numbers_are_read_as_they_are(kind, read):
    separator, cells, values = SIGNS[kind]
    dates = DAYS[: len(cells)]
    check(read(write(dates, str, separator=separator, number=lambda row: cells[row])), dates, values)


def test_a_number_that_could_be_either_is_named(read):
    rows = range(1, 10)
    for separator, cell, words in ((";", "{}.004", "1.004 or 1004"), (";", "{},004", "1.004 or 1004")):
        text = write(DAYS[:9], str, separator=separator, number=lambda row: cell.format(row + 1))
        with pytest.raises(UserError, match=f"column value: .* can be {words}, .* set DECIMAL"):
            read(text)
        sign = cell[2]
        check(read(text, decimal=sign), DAYS[:9], [row + 0.004 for row in rows])
        check(read(text, decimal="," if sign == "." else "."), DAYS[:9], [1000 * row + 4 for row in rows])
    series = read(write(DAYS[:9], str, number=lambda row: f"{row + 1}.004"))
    check(series, DAYS[:9], [row + 0.004 for row in rows])
    assert any("1.004 is read with a decimal point" in note and "DECIMAL" in note for note in series.notes)
    text = "date;value;other\n" + "".join(f"{date};{row + 1}.004;{row},5\n" for row, date in enumerate(DAYS[:9]))
    series = read(text)
    assert series.values.tolist() == [[1000 * row + 4, row - 1 + 0.5] for row in rows]
    assert any("column value: 1.004 has the decimal sign of the other columns" in note for note in series.notes)


def test_smaller_numbers_without_decimals_tell_thousands(read):
    cells, values = ["9,700", "980", "1,234", "0", "12,345"], [9700, 980, 1234, 0, 12345]
    for separator, mark in ((",", ","), (";", ","), (";", "."), ("\t", ".")):
        text = f"date{separator}value{separator}large\n" + "".join(
            f'{day}{separator}"{cell}"{separator}"{row + 1},00{row}"\n'.replace(",00", f"{mark}00")
            for row, (day, cell) in enumerate(zip(DAYS, [cell.replace(",", mark) for cell in cells]))
        )
        series = read(text)
        assert series.values.T.tolist() == [values, [1000, 2001, 3002, 4003, 5004]]
        assert any("is read as 9700, since smaller numbers have no decimals; DECIMAL=" in note for note in series.notes)
    for cells in (["9,701", "980", "1,234"], ["9,700", "1980", "1,234"], ["9,700", "0", "1,234"]):  # does not tell
        with pytest.raises(UserError, match="set DECIMAL"):
            read(write(DAYS[:3], str, number=lambda row: f'"{cells[row]}"'))


def test_numbers_of_two_kinds_in_a_column_are_refused(read):
    cells = ["1.5", "2.5", "3,5", "4.5"]
    text = write(DAYS[:4], str, separator=";", number=lambda row: cells[row])
    with pytest.raises(UserError, match="line 4, column value: '3,5' is not a number with the decimal sign '.'"):
        read(text)


# --- tables


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize(
    "header",
    ["date{0}value", '"date"{0}"value"', 'date{0}"value, in; all | of\tit"', "date{0}value{0}", "date{0}value{0}{0}"],
)
def test_separators_are_found_outside_quotes_and_at_the_ends_of_lines(separator, header, read):
    end = separator * (header.count("{0}") - 1)
    lines = [header.format(separator), *(f"{date}{separator}{row}.5{end}" for row, date in enumerate(DAYS))]
    lines += [separator * 3, ""]
    series = read("\n".join(lines[:-2] + [separator * (1 + len(end))]))
    assert len(series.columns) == 1 and series.values[:, 0].tolist() == [row + 0.5 for row in range(60)]
    assert any(f"line {len(DAYS) + 2} without any value left out" in note for note in series.notes)
    assert find_separator("\n".join(lines)) == separator


def test_decimal_commas_do_not_separate(read):
    text = "date;load, MW;temperature, C\n" + "".join(f"{d:%d.%m.%Y};{d.day},5;{d.month},25\n" for d in DAYS)
    series = read(text)
    assert series.columns == ["load, MW", "temperature, C"] and series.values[0].tolist() == [20.5, 12.25]


def test_columns_that_are_no_numbers_to_forecast_are_left_out_and_named(read):
    text = ",date,store,constant,empty,value,id\n"
    text += "".join(f"{row},{date:%Y-%m-%d},north,7,,{row % 5},{row + 1000}\n" for row, date in enumerate(DAYS))
    series = read(text)
    assert series.columns == ["value"]
    [note] = [note for note in series.notes if note.startswith("columns left out")]
    assert "store (text); empty (empty); constant (constant); column 1, id (numbers of the rows)" in note
    series = read(text, columns=["id", "value"])
    assert series.columns == ["id", "value"] and series.values[3].tolist() == [1003, 3]
    with pytest.raises(UserError, match="column store: 'north' .60 times. is not a number"):
        read(text, columns=["store"])
    with pytest.raises(UserError, match="no column of numbers that vary besides date: .*constant .constant"):
        read("date,constant\n" + "".join(f"{date:%Y-%m-%d},7\n" for date in DAYS))


def test_comments_above_notes_below_and_names_of_rows_from_r(read):
    lines = write(DAYS, lambda d: f"{d:%Y-%m-%d}").splitlines()
    notes = "Source: the office, in the town", "kept as it was"
    series = read("\n".join(["# made by x", "# of 2020", *lines, "", *notes]))
    check(series, DAYS)
    assert any("first 2 lines are empty or a note that begins with #" in note for note in series.notes)
    assert any("lines 65, 66 below the table left out" in note for note in series.notes)
    rows = [lines[0], *(f'"{row}",{line}' for row, line in enumerate(lines[1:], 1))]
    check(read("\n".join(rows)), DAYS)


def test_every_reading_is_the_same_again(read):
    text = write([date for row, date in enumerate(DAYS) if row % 9], lambda d: f"{d:%d/%m/%y}")
    first, second = read(text, gaps="interpolate"), read(text, gaps="interpolate")
    assert np.array_equal(first.values, second.values) and first.notes == second.notes and first.clock == second.clock


def test_a_step_needs_two_dates():
    assert find_step([datetime(2020, 1, 1)]) is None and read_dates(["", ""]) is None
    step = Step("month", 1, datetime(2020, 1, 31), day=31)
    assert [step.at(row).day for row in range(4)] == [31, 29, 31, 30]


# --- tables that begin otherwise

@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("above", ["Monthly sales\n", "Monthly sales\nSource: office\n\n", "# made by hand\nSales\n"])
def test_lines_above_the_header_are_left_out(read, above, separator):
    series = read(above + write(MONTHS, lambda date: f"{date:%Y-%m}", separator=separator))
    check(series, MONTHS)
    assert any("above the header left out" in note for note in series.notes)


ABOVE = {  # {0} is the separator, in a table of four columns
    "a title with empty cells": "Sales{0}{0}{0}\n",
    "two cells and an empty row": "Period{0}2016{0}{0}\n{0}{0}{0}\n",
    "names and values of a station": "Source{0}City{0}Latitude{0}Longitude{0}Zone\nX{0}Bonn{0}50.7{0}7.1{0}1\n",
    "numbers of a station": "703165{0}55.3{0}{0}\n",
}


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("above", ABOVE)
@pytest.mark.parametrize("end", ["", "{0}"])
def test_notes_above_the_header_may_be_filled_up_or_wider(read, above, separator, end):
    rows = [f"{date}{{0}}{row % 7}{{0}}{{0}}{row % 5}.5" for row, date in enumerate(HOURS)]
    lines = ["date{0}north{0}new{0}south" + end, *rows]
    series = read((ABOVE[above] + "\n".join(lines)).replace("{0}", separator))
    assert series.dates == HOURS and series.columns == ["north", "south"]
    assert series.values.tolist() == [[row % 7, row % 5 + 0.5] for row in range(60)]
    assert any("above the header left out" in note or "first 2 lines" in note for note in series.notes)


def test_a_short_first_row_is_no_header(read):
    lines = [f"{date:%Y-%m-%d},NA,NA,{'NA' if row < 3 else row}" for row, date in enumerate(DAYS)]
    with pytest.raises(UserError, match="expected 5 fields, got 4"):
        read("\n".join(["date,a,b,c,d", *lines]))


@pytest.mark.parametrize("word", ["Summe", "Total", "Grand total:", "合计", "Average"])
def test_a_row_of_totals_below_the_table_is_left_out(word, read):
    text = write(DAYS, lambda d: f"{d:%Y-%m-%d}")
    series = read(f"{text}{word},466.5\n")
    check(series, DAYS)
    assert f"line 62 below the table left out: {word} instead of a date" in series.notes
    text = "\n".join(["Year,Month,value", *(f"{d.year},{d.month},{row % 7}" for row, d in enumerate(MONTHS))])
    assert read(f"{text}\n{word},,7\n{word},,8").dates == MONTHS


@pytest.mark.parametrize("cell", ["", "NaN", "n/a", "Total 2020", "20th", "======="])
def test_other_last_rows_without_a_date_are_refused(cell, read):
    with pytest.raises(UserError, match="line 62, column date: "):
        read(f"{write(DAYS, str)}{cell},466.5\n")


@pytest.mark.parametrize("name", ["time", "Time.1", "period", "obs", "id", "year_number"])
def test_a_column_called_like_a_date_that_counts_the_rows_is_left_out(name, read):
    text = f"date,{name},value\n" + "".join(f"{day},{row},{row % 7}\n" for row, day in enumerate(HOURS))
    series = read(text)
    assert series.columns == ["value"]
    assert f"columns left out: {name} (numbers of the rows); COLUMNS names those to read" in series.notes
    assert read(text, columns=[name]).columns == [name]


@pytest.mark.parametrize("form", ["%Y%m%d", "%Y", "%Y%m"])
def test_a_second_column_of_dates_is_no_series(form, read):
    days = [datetime(2019, 1, 1) + DAY * row for row in range(800)]
    rows = [f"{day:{form}},{day:%Y-%m-%d},{row % 7},{1900 + row * row % 97}" for row, day in enumerate(days)]
    for lines in (rows, rows[::-1]):
        series = read("\n".join(["MapDate,valid,value,travel_time", *lines]))
        assert series.columns == ["value", "travel_time"] and series.dates == days
        assert "columns left out: MapDate (dates); COLUMNS names those to read" in series.notes


def test_apostrophes_of_spreadsheets_and_infinite_numbers(read):
    lines = [f"{date},{cell}" for date, cell in zip(DAYS, ["1", "'2", "'-", "'-4.5", *("5" * 30)])]
    series = read("\n".join(["date,value", *lines]), gaps="carry")
    assert series.values[:5, 0].tolist() == [1, 2, 2, -4.5, 5]
    text = "\n".join(["date,value", *lines, f"{DAYS[len(lines)]},Inf"])
    with pytest.raises(UserError, match="'Inf' is not finite; .*name it in MISSING_VALUES"):
        read(text, gaps="carry")
    assert len(read(text, gaps="carry", missing=["Inf"]).dates) == len(lines)


def test_a_file_without_header_gets_names(read):
    lines = [f"{day},{3 * row},{row % 7}" for row, day in enumerate(HOURS)]
    series = read("\n".join(lines))
    assert series.columns == ["column 2", "column 3"] and series.date == "column 1"
    assert series.dates == HOURS and series.values[:, 0].tolist() == list(range(0, 180, 3))
    assert any("no header" in note for note in series.notes)
    numbers = read("\n".join(f"{day:%Y%m%d},{2 * row}" for row, day in enumerate(DAYS)))
    assert numbers.dates == DAYS and numbers.values[:, 0].tolist() == list(range(0, 120, 2))


@pytest.mark.parametrize("forms", ["{0.year}", "{0.month}/{0.day}/{0:%y}", "{0:%Y-%m-%d}"])
def test_dates_in_the_header_turn_the_table(read, forms):
    dates = YEARS if forms == "{0.year}" else DAYS
    header = ",".join(forms.format(date) for date in dates)
    rows = [",".join(str(place * row % 13) for row in range(len(dates))) for place in (3, 5)]
    text = f"Region,Country,Lat,{header}\nWest,Norway,60.5,{rows[0]}\nWest,Japan,-3,{rows[1]}\n"
    series = read(text)
    assert series.columns == ["Norway", "Japan"] and series.dates == dates
    assert series.values.T.tolist() == [[place * row % 13 for row in range(len(dates))] for place in (3, 5)]
    assert any("dates in the header, so the table is turned: 2 columns" in note for note in series.notes)
    assert read(text, where=["Country=Japan"]).columns == ["Japan"]


@pytest.mark.parametrize("names", ["Jan Feb Mar Apr May Jun Jul Aug Sep Oct Nov Dec".split(), NAMES, range(1, 13)])
@pytest.mark.parametrize("more", ["", ",Annual"])
def test_a_column_for_each_month_is_a_series_of_months(read, names, more):
    header = ",".join(map(str, names))
    cells = [[12 * year + place for place in range(12)] for year in range(10)]
    lines = [f"{1990 + year},{','.join(map(str, row))}{',7' if more else ''}" for year, row in enumerate(cells)]
    lines[-1] = lines[-1].replace(",118,119", ",,")  # the last year is not over
    text = f"YEAR,{header}{more}\n" + "\n".join(lines)
    series = read(text)
    check(series, [month(12 * 1990 + row) for row in range(118)], list(range(118)))
    assert series.columns == ["value"] and any("120 months, named value" in note for note in series.notes)
    assert any("column Annual" in note for note in series.notes) == bool(more)
    single = read(text, columns=[str(names[2])])
    assert single.columns == [str(names[2])] and len(single.dates) == 10


def test_twelve_numbers_of_more_are_no_months(read):
    lines = [f"{1990 + year},{','.join(str(year * hour % 7) for hour in range(24))}" for year in range(12)]
    series = read("year," + ",".join(map(str, range(1, 25))) + "\n" + "\n".join(lines))
    assert len(series.dates) == 12 and len(series.columns) > 12


def test_a_table_without_rows_is_called_that(read):
    with pytest.raises(UserError, match="no row below the header date, a; add rows"):
        read("date,a\n")


def test_quarters_and_weeks_beside_a_year(read):
    quarters = [f"{date.year},{(date.month + 2) // 3},{row}" for row, date in enumerate(QUARTERS)]
    for names in ("year,quarter", "Rok,Kwartal"):
        check(read(f"{names},value\n" + "\n".join(quarters)), QUARTERS, list(range(30)))
    weeks = [datetime(2019, 12, 2) + 7 * DAY * row for row in range(120)]
    lines = ["{},{},{}".format(*date.isocalendar()[:2], row) for row, date in enumerate(weeks)]
    check(read("Year,Week,value\n" + "\n".join(lines)), weeks, list(range(120)))
    # 2014 has 53 weeks from Sunday on, 2015 has 53 in ISO 8601
    sundays = [datetime(2013, 12, 29) + 7 * DAY * row for row in range(80)]
    numbers = [(2014, row + 1) if row < 53 else (2015, row - 52) for row in range(80)]
    series = read("YEAR,WEEK,value\n" + "\n".join(f"{y},{w},{row}" for row, (y, w) in enumerate(numbers)))
    check(series, sundays, list(range(80)))
    assert any("weeks from Sunday on" in note for note in series.notes)


def test_a_header_without_its_last_name(read):
    lines = [f"{date:%Y-%m},{row},{row % 5 / 2}" for row, date in enumerate(MONTHS)]
    series = read("Date,Price\n" + "\n".join(lines))
    assert series.date == "Date" and series.columns == ["Price", "column 3"]


def test_errors_of_spreadsheets_are_missing_values(read):
    cells = ["1", "#DIV/0!", "3", "#REF!", "***", "6"]
    check(read(write(DAYS[:6], str, number=lambda row: cells[row]), gaps="interpolate"), DAYS[:6], list(range(1, 7)))


def test_columns_that_only_move_after_the_training_part_are_left_out(read):
    lines = [f"{day},{row},{max(0, row - 50)}" for row, day in enumerate(DAYS)]
    series = read("date,value,late\n" + "\n".join(lines))
    drop_flat(series, 40)
    check(series, DAYS, list(range(60)))
    assert any("column late left out: constant in the training part" in note for note in series.notes)


def test_days_whose_midnight_daylight_saving_skips(read):
    days = [datetime(2018, 6, 1) + DAY * row for row in range(300)]
    dates = [date + HOUR * (date == datetime(2018, 11, 4)) for date in days]  # as in Brazil
    series = read(write(dates, str))
    check(series, days)
    assert any("line 158 at 01:00 count as the whole day" in note for note in series.notes)


# --- what was once read as something else

LINES = [f"{date:%Y-%m-%d},{row},ok" for row, date in enumerate(DAYS)]


@pytest.mark.parametrize("line", ['{},3,"12 inch', '"{},3,12 inch', '{},"3,12 inch', '{},3, "12 inch'])
@pytest.mark.parametrize("again", [None, 40])
def test_a_quotation_mark_that_is_not_closed_is_refused_with_its_line(line, again, read):
    lines = list(LINES)
    for place in (20, again):
        if place:
            lines[place] = line.format(f"{DAYS[place]:%Y-%m-%d}")
    with pytest.raises(UserError, match="line 22: a quotation mark is not closed; remove it"):
        read("date,value,note\n" + "\n".join(lines))
    lines = [*LINES[:20], LINES[20].replace("ok", '"two\nlines, of 3"'), *LINES[21:]]
    check(read("date,value,note\n" + "\n".join(lines)), DAYS, list(range(60)))


INTERVALS = {
    "2020-01-01 08:00-09:00": lambda d: f"{d:%Y-%m-%d %H:%M}-{d + HOUR:%H:%M}",
    "2020-01-01 08:00 - 09:00": lambda d: f"{d:%Y-%m-%d %H:%M} - {d + HOUR:%H:%M}",
    "01.01.2020 00:00 - 01.01.2020 01:00": lambda d: f"{d:%d.%m.%Y %H:%M} - {d + HOUR:%d.%m.%Y %H:%M}",
    "01.01.2020 00:00 - 01.01.2020 01:00 (CET)": lambda d: f"{d:%d.%m.%Y %H:%M} - {d + HOUR:%d.%m.%Y %H:%M} (CET)",
    "2020-01-01T00:00Z/2020-01-01T01:00Z": lambda d: f"{d:%Y-%m-%dT%H:%MZ}/{d + HOUR:%Y-%m-%dT%H:%MZ}",
    "1/31/2020 1:00 PM to 1/31/2020 2:00 PM": lambda d: f"{d:%m/%d/%Y %I:%M %p} to {d + HOUR:%m/%d/%Y %I:%M %p}",
}


@pytest.mark.parametrize("form", INTERVALS)
def test_intervals_are_read_by_their_beginnings(form, read):
    series = read(write(HOURS, INTERVALS[form]))
    check(series, HOURS)
    assert "the beginnings of intervals" in series.notes[0]


@pytest.mark.parametrize("form", ["%Y-%m-%d-%Hh%Mm%Ss", "%Y-%m-%d-hour %H of a day", "%d.%m.%Y - %H %M %S %f"])
def test_what_follows_a_date_is_the_end_of_an_interval_only_if_it_is_a_date(form, read):
    with pytest.raises(UserError, match="has no date column"):
        read(write(HOURS, lambda d: f"{d:{form}}"))


@pytest.mark.parametrize("form", ["{0}/{2:02}", "{0}-{2:02}", "{0}/{1}", "FY{0}-{2:02}", "{0}\u2013{1}"])
@pytest.mark.parametrize("last", [2011, 2014])
def test_fiscal_years(form, last, read):
    years = [datetime(year, 1, 1) for year in range(2000, last)]
    check(read(write(years, lambda d: form.format(d.year, d.year + 1, (d.year + 1) % 100))), years)


@pytest.mark.parametrize("names", [range(2001, 2011), range(1601, 1609), [f"2001{month:02}" for month in range(1, 13)]])
@pytest.mark.parametrize("form", ["%Y-%m-%d", "%Y%m%d", "%d.%m.%Y"])
@pytest.mark.parametrize("first", [True, False])
def test_names_of_sensors_that_look_like_years_do_not_turn_a_table(names, form, first, read):
    columns = [["date", *(f"{date:{form}}" for date in DAYS)]]
    columns += [[str(name), *(str(row * place % 13) for row in range(60))] for place, name in enumerate(names, 1)]
    series = read("\n".join(map(",".join, zip(*(columns if first else reversed(columns))))))
    assert series.dates == DAYS and sorted(series.columns) == [str(name) for name in names]


def test_columns_behind_the_dates_of_the_header(read):
    header = ",".join(map(str, range(1990, 2010)))
    rows = [f"{name},{','.join(str(year * place % 11) for year in range(20))},{2013 + place % 3},7,"
            for place, name in enumerate("ABCDEFGHIJ", 1)]  # fmt: skip
    series = read(f"Country,{header},Estimates Start After,Total,Unnamed: 66\n" + "\n".join(rows))
    assert series.columns == list("ABCDEFGHIJ") and [date.year for date in series.dates] == list(range(1990, 2010))
    assert any("Country, Estimates Start After, Total" in note for note in series.notes)


@pytest.mark.parametrize("numbers", [range(2001, 2100), range(100000001, 100000100), range(20200101, 20200132)])
@pytest.mark.parametrize("name", ["id", "customer_id", "Nr.", "key"])
def test_numbers_are_no_dates_beside_a_column_of_that_name(numbers, name, read):
    header = f"{name},date,value\n"
    with pytest.raises(UserError, match="no date column"):
        read(header + "".join(f"{n},{n % 7}th day of {n},{n % 5}\n" for n in numbers))
    days = [date for date in DAYS if date.weekday() < 5 and date != datetime(2020, 1, 1)]
    text = header + "".join(f"{n},{date:%Y%m%d},{n % 5}\n" for n, date in zip(numbers, days))
    with pytest.raises(UserError, match="1 row is missing .2020-01-01 00:00:00.; set GAPS"):
        read(text)
    assert read(text, gaps="carry").date == "date"


def test_a_date_that_is_the_same_in_all_rows_is_not_the_column(read):
    lines = [f"15/02/24 23:00:00,DE,{1990 + row},{row % 7}" for row in range(30)]
    series = read("LAST UPDATE,geo,TIME_PERIOD,OBS_VALUE\n" + "\n".join(lines))
    assert series.date == "TIME_PERIOD" and series.dates[0].year == 1990
    lines = [f"2020-01-01,{hour}:00,{hour % 7}" for hour in range(24)]  # unless the rows are those of one day
    assert read("date,time,value\n" + "\n".join(lines)).dates[23] == datetime(2020, 1, 1, 23)


@pytest.mark.parametrize("mark", ["-200", "-9999", "-999.0", "9999.9", "-99", "99999", "-99.90", "1e20", "-32768"])
def test_numbers_that_mark_missing_values_are_refused_or_named(mark, read):
    def cell(row):
        return mark if row in (5, 9, 30) else row / 4

    text = write(DAYS, str, number=cell)
    with pytest.raises(UserError, match=r"line 7, column value: .* .3 times. is far outside .* set MISSING_VALUES to"):
        read(text)
    check(read(text, missing=[mark], gaps="interpolate"), DAYS, [row / 4 for row in range(60)])
    check(read(text, missing=["NA"]), DAYS, [float(cell(row)) for row in range(60)])
    values = [999 if row in (5, 30) else row * 25 for row in range(60)]
    check(read(write(DAYS, str, number=lambda row: values[row])), DAYS, values)


@pytest.mark.parametrize(
    "mark", "ND : / \u2013 No\tData unavailable <NA> \\N -nan (null) #WERT! n.d. 缺失".replace("\t", "_").split()
)
def test_texts_that_mark_missing_values(mark, read):
    text = write(DAYS, str, number=lambda row: mark.replace("_", " ") if row == 5 else row)
    check(read(text, gaps="interpolate"), DAYS, list(range(60)))
    other = write(DAYS, str, number=lambda row: "<1" if row == 5 else row)
    with pytest.raises(UserError, match="line 7, column value: '<1' is not a number; .* name it in MISSING_VALUES"):
        read(other)
    check(read(other, gaps="interpolate", missing=["<1"]), DAYS, list(range(60)))


@pytest.mark.parametrize(
    ("header", "row"), [("date,price", "{0:%Y-%m-%d},1,{1}"), ("date,price", "{0:%Y%m%d},1,{1}"),
                        ("price,date", "1,{1},{0:%Y-%m-%d}"), ("date,a,b", "{0:%Y-%m-%d},1,{1},2,{1}")]
)  # fmt: skip
def test_decimal_commas_that_separate_fields_are_refused(header, row, read):
    lines = [row.format(date, place % 50 + 10) for place, date in enumerate(DAYS)]
    with pytest.raises(UserError, match="line 2: expected . fields, got .; numbers seem to have commas"):
        read(header + "\n" + "\n".join(lines))


@pytest.mark.parametrize("first", [637134336000000000, 132223104000000000])
def test_ticks_of_windows_are_no_unix_time(first, read):
    with pytest.raises(UserError, match="no date column"):
        read("ticks,value\n" + "".join(f"{first + 600000000 * row},{row % 7}\n" for row in range(50)))


@pytest.mark.parametrize("years", [543, -621, -1800])
def test_other_calendars_are_refused(years, read):
    cells = [f"{date.year + years:04}-{date:%m-%d}" for date in DAYS]
    with pytest.raises(UserError, match=f"line 2, column date: .* is in the year {2019 + years}, .* Gregorian"):
        read("date,value\n" + "".join(f"{cell},{row}\n" for row, cell in enumerate(cells)))


def test_days_without_a_year_are_refused(read):
    for days in (DAYS[:31], DAYS, DAYS[::7]):
        with pytest.raises(UserError, match="'Dec 20' is a day without its year, or a year of two digits"):
            read(write(days, lambda d: f"{d:%b %d}"))
    months = [month(12 * 2001 + row) for row in range(240)]
    check(read(write(months, lambda d: f"{d:%b %y}")), months)


def test_several_series_without_a_date_in_common_are_refused(read):
    def text(name, label, dates=DAYS):
        return f"date,{name},value\n" + "".join(f"{d:%Y-%m-%d},{label(row)},{row}\n" for row, d in enumerate(dates))

    for name, label in (("store", lambda row: "AB"[row // 30]), ("Station ID", lambda row: row // 20),
                        ("country", lambda row: "ABC"[row % 3])):  # fmt: skip
        with pytest.raises(UserError, match=f'column {name} tells several series apart, .* --where "{name}='):
            read(text(name, label))
    with pytest.raises(UserError, match="column x tells several"):
        read(text("x", lambda row: "AB"[row // 30], DAYS[30:] + DAYS[:30]))
    for name, label in (("flag", lambda row: "AP"[row // 30]), ("weekday", lambda row: NAMES[row % 7]),
                        ("season name", lambda row: "winter spring summer autumn".split()[row // 15]),
                        ("machine_status", lambda row: "on off".split()[row // 30]),
                        ("customers", lambda row: row // 20), ("store", lambda row: "A")):  # fmt: skip
        assert read(text(name, label)).dates == DAYS


# --- parts of a date, which are no series to choose from with WHERE

MONTH_HOURS = [datetime(2020, 1, 1) + HOUR * row for row in range(24 * 30)]
HALVES = [datetime(2020, 1, 1) + HOUR / 2 * row for row in range(48 * 20)]
HOUR_FROM_1 = [date + HOUR for date in MONTH_HOURS]
PART_COLUMNS = {  # header: (dates, what the columns hold)
    "Date,Time": (MONTH_HOURS, lambda d: f"{d:%d/%m/%Y},{d:%H.%M.%S}"),
    "<DATE>,<TIME>": (MONTH_HOURS, lambda d: f"{d:%Y%m%d},{d:%H%M%S}"),
    "YEAR,MO,DY,HR": (MONTH_HOURS, lambda d: f"{d.year},{d.month},{d.day},{d.hour}"),
    "YEAR,DOY": (DAYS, lambda d: f"{d.year},{d.timetuple().tm_yday}"),
    "Year,Month,Day,Hour,Minute": (HALVES, lambda d: f"{d.year},{d.month},{d.day},{d.hour},{d.minute}"),
    "SETTLEMENT_DATE,SETTLEMENT_PERIOD": (HALVES, lambda d: f"{d:%d-%b-%Y},{2 * d.hour + d.minute // 30 + 1}"),
    "date,Hour Number": (HOUR_FROM_1, lambda d: f"{d - HOUR:%Y-%m-%d},{(d - HOUR).hour + 1}"),
    "date,Hour of Day": (MONTH_HOURS, lambda d: f"{d:%Y-%m-%d},{d.hour}"),
    "date,HHMM": (MONTH_HOURS, lambda d: f"{d:%Y-%m-%d},{100 * d.hour}"),
    "date,Time HHMM": (HALVES, lambda d: f"{d:%Y-%m-%d},{d:%H%M}"),
    "date,h": (MONTH_HOURS, lambda d: f"{d:%Y-%m-%d},{d.hour}h"),
    "date,heure": (HALVES, lambda d: f"{d:%Y-%m-%d},{d:%Hh%M}"),
    "date,interval": (MONTH_HOURS, lambda d: f"{d:%Y-%m-%d},{d:%H:%M} - {d + HOUR:%H:%M}"),
    "Year,Month,Day,Period No": (HALVES, lambda d: f"{d.year},{d.month},{d.day},{2 * d.hour + d.minute // 30 + 1}"),
    "Jahr,Monat": (MONTHS, lambda d: f"{d.year},{GERMAN[d.month - 1]}"),
    "Año,Mes": (MONTHS, lambda d: f"{d.year},{SPANISH[d.month - 1]}"),
    "ano,mês": (MONTHS, lambda d: f"{d.year},{d.month}"),
    "Year,Period": (MONTHS, lambda d: f"{d.year},M{d.month:02}"),
    "Year,period": (QUARTERS, lambda d: f"{d.year},Q{quarter(d):02}"),
}


@pytest.mark.parametrize("header", PART_COLUMNS)
@pytest.mark.parametrize("above", ["", "x"])
def test_a_part_of_the_date_in_a_column_of_its_own(header, above, read):
    dates, form = PART_COLUMNS[header]
    text = f"{header},what,value\n" + "".join(f"{form(date)},x,{row}\n" for row, date in enumerate(dates))
    series = read(text)
    check(series, dates, list(range(len(dates))))
    assert read(text, date_column=series.date).dates == dates


@pytest.mark.parametrize("first", [datetime(2019, 1, 31, 23), datetime(2019, 6, 30, 22)])
@pytest.mark.parametrize("length", [HOUR, HOUR / 2])
def test_numbered_hours_where_daylight_saving_changes(first, length, read):
    utc = [first + length * row for row in range(int(330 * DAY / length))]
    rows_of, lines = Counter(), []
    for row, date in enumerate(utc):
        day = date.replace(tzinfo=timezone.utc).astimezone(ZoneInfo("Europe/Berlin")).date()
        rows_of[day] += 1
        lines.append(f"{day},{rows_of[day]},{row * row % 17}")
    text = "date,Hour,value\n" + "\n".join(lines)
    values = [row * row % 17 for row in range(len(utc))]
    standard = [date + HOUR + (HOUR if length == HOUR else 0 * HOUR) for date in utc]  # hours end then, halves begin
    check(read(text), standard, values)
    series = read(text, zone="Europe/Berlin")
    assert series.clock == [date - HOUR for date in standard] and series.utc and series.values[:, 0].tolist() == values


def test_what_is_no_time_of_day_is_not_taken_for_one(read):
    lines = [f"{day:%Y-%m-%d},{store},{day.day * store}" for day in DAYS for store in range(1, 25)]
    with pytest.raises(UserError, match='column store tells several series apart: choose one with WHERE'):
        read("date,store,value\n" + "\n".join(lines))
    lines = [f"{day:%Y-%m-%d},{'abc'[place]},{place * day.day}" for day in DAYS for place in range(3)]
    with pytest.raises(UserError, match="if part is a part of the date, write it into column date; if it tells"):
        read("date,part,value\n" + "\n".join(lines))
    lines = [f"{date:%Y-%m-%d},{date},{row}" for row, date in enumerate(MONTH_HOURS)]
    with pytest.raises(UserError, match="column valid has different dates: set DATE to valid"):
        read("issued,valid,value\n" + "\n".join(lines))
    lines = [f"{d:%Y-%m-%d},{store},{2 * d.hour + d.minute // 30 + 1},{d.day}" for store in "AB" for d in HALVES]
    with pytest.raises(UserError, match='column store tells several series apart: .* --where "store=A"'):
        read("date,store,period,value\n" + "\n".join(lines))


def test_a_number_that_never_changes_is_no_time_of_day(read):
    days = [datetime(2019, 1, 1) + DAY * row for row in range(200)]
    rows = [f"{day:%Y-%m-%d},1004,{row}\n" for row, day in enumerate([*days, days[7]])]
    text = "date,altitude,value\n" + "".join(rows)
    with pytest.raises(UserError, match="1 row has a date that another row has"):
        read(text)
    series = read(text, gaps="carry")
    assert series.at_midnight() and series.columns == ["value"]


# --- messages


def test_a_file_without_a_date_column_is_told_what_to_set(read):
    days = [date for date in DAYS if date.day != 20]
    for form, words in (("%Y%m%d", "'20191221': yyyymmdd"), ("%Y%m%d%H", "'2019122100': yyyymmdd")):
        text = write(days, lambda d: f"{d:{form}}", name="n")
        with pytest.raises(UserError, match=f"set DATE to n if these are dates with gaps .{words}., and GAPS"):
            read(text)
        assert read(text, date_column="n", gaps="carry").dates == DAYS[1:]
    for name in ("date", "TIME_PERIOD"):  # whose name says so
        assert read(write(days, lambda d: f"{d:%Y%m%d}", name=name), gaps="carry").dates == DAYS[1:]
    kept = [date for date in HOURS if date.hour != 5]
    with pytest.raises(UserError, match="3 rows are missing .* set GAPS"):
        read(write(kept, lambda d: f"{d.replace(tzinfo=timezone.utc).timestamp():.0f}", "time"))
    with pytest.raises(UserError, match="write dates as .* .'the 20th' in line 2, column when, is not read as one"):
        read(write(DAYS, lambda d: f"the {d.day}th", "when"))
    names = ",".join(f"a name of some length, number {row}".replace(",", "") for row in range(2000))
    with pytest.raises(UserError) as error:
        read(f"{names}\n{names}\n")
    assert len(str(error.value)) < 800


KINDS = {
    "an Excel file": (b"PK\x03\x04", "series.xlsx"),
    "a ZIP file": (b"PK\x03\x04", "series.csv"),
    "a gzip file": (b"\x1f\x8b\x08", "series.csv.gz"),
    "a Parquet file": (b"PAR1", "series.parquet"),
    "a JSON file": (b'[{"date": "2020-01-01", "value": 1}]' * 9000, "series.json"),
    "an HTML file": (b"<!DOCTYPE html>", "series.csv"),
    "empty": (b"\xef\xbb\xbf\r\n", "series.csv"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_files_of_other_kinds_are_called_that(kind, tmp_path):
    content, name = KINDS[kind]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} is {kind}"):
        read_series(tmp_path / name)
    with pytest.raises(UserError, match="is a folder"):
        read_series(tmp_path)


def test_a_cell_of_a_turned_table_is_named_as_in_the_file(read):
    header = ",".join(map(str, range(1990, 2010)))
    row = ",".join("x" if year == 5 else str(year) for year in range(20))
    with pytest.raises(UserError, match="line 3, column 1995: 'x' is not a number"):
        read(f"Country,{header}\nA,{header}\nB,{row}\n")


def test_a_first_row_with_an_unreadable_date_is_no_header_with_doubled_names(read):
    with pytest.raises(UserError, match="line 1: x1 y, 0.5, 0.5 is read as the header, but looks like a row"):
        read("".join(f"x{day} y,0.5,{day / 2}\n" for day in range(1, 30)))


def test_rows_at_no_equal_steps_get_a_true_sentence(read):
    dates = [date + HOUR / 360 * (row * row % 7) for row, date in enumerate(HOURS)]
    with pytest.raises(UserError, match="not at equal steps, but from 0:59:30 to 1:00:30 apart, half of them at most"):
        read(write(dates, str))


def test_an_hour_that_daylight_saving_may_skip(read):
    dates = [datetime(2020, 3, 1) + HOUR * row for row in range(900)]
    dates.remove(datetime(2020, 3, 29, 2))
    with pytest.raises(UserError, match="1 row is missing .* if daylight saving skips these hours, set TIMEZONE; else"):
        read(write(dates, str))
    assert len(read(write(dates, str), zone="Europe/Berlin").clock) == 899


# --- what stands beside numbers, and around the header


def test_signs_of_currencies_and_percent_are_no_part_of_a_number(read):
    for form in ("${}.50", "{}.50 %", "€ {}.50", "{}.50€"):
        check(read(write(DAYS, str, number=form.format)), DAYS, [row + 0.5 for row in range(60)])


def test_a_column_with_units_is_left_out_with_an_example(read):
    lines = [f"{date},{row} kWh,({row}.5),{row}" for row, date in enumerate(DAYS)]
    series = read("date,load,profit,value\n" + "\n".join(lines))
    check(series, DAYS, list(range(60)))
    assert any("columns left out: load: '0 kWh', profit: '(0.5)' (text)" in note for note in series.notes)


@pytest.mark.parametrize(
    ("above", "separator", "line"),
    [("sep=;\ndate;value\n", ";", "first line is empty"), ("# x\n# date,value\n", ",", "first line"),
     ("date,value\n,kW\n", ",", "line 2 below the header"), ("date,value\nTicker,A\nDate,\n", ",", "lines 2, 3")]
)  # fmt: skip
def test_lines_around_the_header(above, separator, line, read):
    text = write(DAYS, lambda date: f"{date:%Y-%m-%d}", separator=separator, number=lambda row: row * row % 17)
    series = read(above + text.partition("\n")[2])
    check(series, DAYS, [row * row % 17 for row in range(60)])
    assert any(line in note for note in series.notes)


def test_zones_by_name_that_change_with_daylight_saving(read):
    utc, dates = local("Europe/Berlin")
    series = read(write(dates, lambda d: f"{d:%Y-%m-%d %H:%M %Z}"))
    assert series.clock == utc and series.dates == [date.astimezone(timezone.utc) for date in dates]


# --- kinds found in public repositories


def test_marks_that_are_values_or_texts_are_all_named_at_once(read):
    text = write(DAYS, str, number=lambda row: -99999999.9 if row == 7 else row)
    with pytest.raises(UserError, match="set MISSING_VALUES to -99999999.9 if"):
        read(text)
    assert read(text, missing=["-99999999.9"], gaps="carry").values[7, 0] == 6
    """Another mark of missing values stays refused where one is named."""
    def cell(row):
        return {3: "T", 7: "V", 9: "T", 20: "-99999", 21: "-999.99"}.get(row, row)

    text = write(DAYS, str, number=cell)
    with pytest.raises(UserError, match="line 5, column value: 'T' .2 times. is not a number, nor are 'V' .1 times."):
        read(text)
    with pytest.raises(UserError, match=r"far outside .* to T,V,-99999,-999\.99 if .*GAPS.* T,V,NA if they"):
        read(text, missing=["T", "V"], gaps="carry")
    with pytest.raises(UserError, match="-999.99 is far outside .* MISSING_VALUES to T,V,-99999,-999.99 if"):
        read(text, missing=["T", "V", "-99999"], gaps="carry")
    known = [row for row in range(60) if not isinstance(cell(row), str)]
    values = np.interp(range(60), known, known).tolist()
    check(read(text, missing=["T", "V", "-99999", "-999.99"], gaps="interpolate"), DAYS, values)
    assert read(text, missing=["T", "V", "NA"], gaps="carry").values.min() == -99999


@pytest.mark.parametrize("doubled", [[5], [5, 300]])
def test_a_few_contradicting_dates_are_filled_if_gaps_is_set(doubled, read):
    dates = [datetime(2019, 1, 7) + HOUR * row for row in range(400)]
    lines = [f"{date},{row}" for row, date in enumerate(dates)]
    text = "date,value\n" + "\n".join(lines + [f"{dates[row]},{-row}" for row in doubled])
    with pytest.raises(UserError, match="keep each date once, or set GAPS, which leaves these rows out"):
        read(text)
    series = read(text, gaps="interpolate")
    check(series, dates, list(range(400)))
    assert any("left out: rows with other values have the same date" in note for note in series.notes)
    many = "date,value\n" + "\n".join(lines + [f"{date},-1" for date in dates[9:20]])
    with pytest.raises(UserError, match="11 rows have a date .*keep each date once$"):
        read(many, gaps="carry")


@pytest.mark.parametrize("late", [[30], [30, 31, 300], range(30, 40)])
def test_a_few_rows_between_the_steps_are_left_out_if_gaps_is_set(late, read):
    dates = [datetime(2019, 1, 7) + HOUR * row for row in range(400)]
    text = write([date + HOUR / 60 * (row in late) for row, date in enumerate(dates)], str, number=lambda row: row)
    few = len(late) < 4
    with pytest.raises(UserError, match="line 32 .*; resample the series to equal steps" + few * ", or set GAPS"):
        read(text)
    if few:
        check(read(text, gaps="interpolate"), dates, list(range(400)))
    else:
        with pytest.raises(UserError, match="10 of 400 lie between these steps"):
            read(text, gaps="interpolate")


def test_contradicting_hours_that_daylight_saving_may_double_are_not_filled(read):
    _, dates = local("Europe/Berlin", first=datetime(2018, 10, 1), days=60)
    with pytest.raises(UserError, match="if daylight saving doubles the hour, set TIMEZONE"):
        read(write(dates, lambda d: f"{d:%Y-%m-%d %H:%M}"), gaps="carry")


NAMED = {  # dates, and how years and the rest are written
    "months": (MONTHS, lambda d: f"{d.year},{NAMES[d.month - 1]}"),
    "Jan.": (MONTHS, lambda d: f"{d.year},{NAMES[d.month - 1][:3]}."),
    "Quarter 1": (QUARTERS, lambda d: f"{d.year},Quarter {quarter(d)}"),
    "1. Quartal": (QUARTERS, lambda d: f"{d.year},{quarter(d)}. Quartal"),
}


@pytest.mark.parametrize("kind", NAMED)
@pytest.mark.parametrize("header", ["Year,Month (abbr)", ","])
def test_names_of_months_and_quarters_beside_years(kind, header, read):
    dates, form = NAMED[kind]
    text = f"{header},value\n" + "".join(f"{form(date)},{row}\n" for row, date in enumerate(dates))
    check(read(text), dates, list(range(len(dates))))
    rows = "".join(f"{form(date)},{place},{ord(place) * row}\n" for place in "AB" for row, date in enumerate(dates))
    with pytest.raises(UserError, match='column place tells several series apart: .* --where "place=A"'):
        read(f"{header},place,value\n{rows}")
    assert read(f"{header},place,value\n{rows}", where=["place=B"]).dates == dates


def test_rows_for_names_of_stations_are_left_out(read):
    rows = "".join(f"{day:%Y-%m-%d},{row},,\n" for row, day in enumerate(DAYS))
    series = read(f'date,value,site,name\n,,023000,"Adelaide"\n{rows}')
    check(series, DAYS, list(range(60)))
    assert "line 2 left out: no date, and no value in the columns of the others" in series.notes
    with pytest.raises(UserError, match="line 2, column date: the date is empty"):
        read(f"date,value,site,name\n,5,023000,Adelaide\n{rows}")


def test_names_of_columns_in_several_lines(read):
    rows = "".join(f"{day:%Y-%m-%d},{row},{row % 7},{row % 5}\n" for row, day in enumerate(DAYS))
    more = "attribute,,,\nsource,,,\n"
    assert read(f"Price,Close,Close,Open\n{more}Ticker,AAPL,MSFT,AAPL\nDate,,,\n{rows}").dates == DAYS
    series = read(f"Price,Close,Close,Open\nTicker,AAPL,MSFT,AAPL\nDate,,,\n{rows}")
    assert series.dates == DAYS and series.columns == ["Close AAPL", "Close MSFT", "Open AAPL"]
    assert read(f"Price,Close,High,Open\nTicker,AAPL,AAPL,AAPL\n{rows}").columns == ["Close", "High", "Open"]
    series = read(f"Price,Close,Close,Open\nTicker,A,A,A\n{rows}")
    assert series.columns == ["Close A", "Close A (column 3)", "Open A"]
    assert "a second column Close A is called Close A (column 3)" in series.notes


def test_a_column_in_which_all_rows_have_a_date_is_named(read):
    rows = "".join(f"{row},{day:%Y%m%d},{'NA' if row < 5 else day.date()}\n" for row, day in enumerate(DAYS))
    with pytest.raises(UserError, match="line 2, column when: 'NA' is not a date .* set DATE to day$"):
        read(f"value,day,when\n{rows}")
    check(read(f"value,day,when\n{rows}", date_column="day"), DAYS, list(range(60)))


def test_columns_of_one_name(read):
    rows = "".join(f"{day:%Y-%m-%d},{row},{row % 7},{day:%d.%m.%Y},{row % 5}\n" for row, day in enumerate(DAYS))
    series = read(f"date,wind,wind,date,wind\n{rows}")
    assert series.columns == ["wind", "wind (column 3)", "wind (column 5)"] and series.dates == DAYS
    assert read(f"date,wind,wind,date,wind\n{rows}", columns=["wind (column 5)"]).values[6, 0] == 1


@pytest.mark.parametrize(
    "kind, notes",
    {
        "types": ",,209\ntype,date,float\nformat,yyyy-MM-dd,\n",
        "units": ",,\nid,UTC,mm\n",
    }.items(),
)
def test_rows_below_the_header_that_have_no_date(kind, notes, read):
    rows = "".join(f",{day:%Y-%m-%d},{row}\n" for row, day in enumerate(DAYS))
    check(read(f"@H,time,value\n{notes}{rows}"), DAYS, list(range(60)))
    with pytest.raises(UserError, match="line 2, column time: the date is empty"):  # may be a row of the table
        read(f"@H,time,value\n,,209\n{rows}")


def test_a_block_above_the_header_as_wide_as_the_table(read):
    block = "Export;7;;Station;A;B\nPeriod;2016;;Name;Alm;Bach\nSource;;;Operator;X;X\n".replace("7", "v")
    block = block.replace("2016", "20160101 00:00 - 20170101 00:00")
    rows = "".join(f"NO2;h;µg;{date:%Y%m%d %H:%M};{row},5;{row % 7},5\n" for row, date in enumerate(HOURS))
    series = read(f"{block}Component;Step;Unit;Begin;A;B\n{rows}")
    assert series.columns == ["A", "B"] and series.dates == HOURS and series.values[8].tolist() == [8.5, 1.5]
    assert "3 lines above the header left out: not the fields of the table" in series.notes


@pytest.mark.parametrize("form", [lambda d: f"{d:%Y%m%d},{d.hour + 1},7,7", lambda d: f"{d:%Y%m%d%H},0.5,3"])
def test_a_first_line_of_numbers_is_no_header(form, read):
    values = [row * row % 17 for row in range(len(MONTH_HOURS))]
    series = read("\n".join(f"{form(date)},{value}" for date, value in zip(MONTH_HOURS, values)))
    assert len(series.dates) == len(MONTH_HOURS) and series.values[:, -1].tolist() == values
    assert "the file has no header" in " ".join(series.notes)


def test_numbers_may_name_columns_beside_dates(read):
    series = read("0.0,1.0,2.0\n" + "".join(f"{date:%Y-%m-%d},{row},{row % 7}\n" for row, date in enumerate(DAYS)))
    assert series.columns == ["1.0", "2.0"] and series.dates == DAYS


def test_titles_above_rows_without_numbers(read):
    text = "Category: all\n\nTime,value\n" + "".join(
        f"{date:%Y-%m-%dT%H},{'<1' if row < 2 else row}\n" for row, date in enumerate(HOURS)
    )
    with pytest.raises(UserError, match="line 4, column value: '<1' .2 times. is not a number"):
        read(text)
    check(read(text, missing=["<1"], gaps="carry"), HOURS[2:], list(range(2, 60)))


def test_what_is_advised_helps(read):
    """Dates in two forms, and columns that tell rows apart or hold better dates, are named."""
    names = [NAMES[date.month - 1][:3] for date in MONTHS]
    cells = [f"{name}-{d:%y}" if d.year < 1996 else f"{d:%y}-{name}" for name, d in zip(names, MONTHS)]
    text = "date,value\n" + "".join(f"{cell},{row}\n" for row, cell in enumerate(cells))
    with pytest.raises(UserError, match="in one form: '96-Jan' in line 86, column date, is not one like 'Jan-89'"):
        read(text)

    text = "year,lowest,value\n" + "".join(f"{1990 + row},{1990 + row}-0{1 + row % 7}-0{1 + row % 5},{row}\n"
                                           for row in range(20))  # fmt: skip
    with pytest.raises(UserError, match="not at equal steps, .* set DATE to year, which holds dates at equal steps"):
        read(text)
    assert len(read(text, date_column="year").dates) == 20

    rows = "".join(f"{'ab'[kind]},{date:%Y-%m-%d},{date:%Y-%m-%dT%H:%M}Z,{kind * row % 7}\n"
                   for kind in (0, 1) for row, date in enumerate(MONTH_HOURS))  # fmt: skip
    with pytest.raises(UserError, match="column time_utc has different dates: set DATE to time_utc"):
        read(f"kind,date,time_utc,value\n{rows}")
    with pytest.raises(UserError, match="column kind tells several series apart"):
        read(f"kind,date,time_utc,value\n{rows}", date_column="time_utc")

    rows = [f"{day:%Y-%m-%d},{kind}.0,{kind * day.day}" for day in DAYS for kind in (8, 9, 11)]
    for again in ([], rows[:9]):  # rows that are twice in the file tell nothing
        with pytest.raises(UserError, match='if version is a part .* --where "version=8.0"'):
            read("date,version,value\n" + "\n".join(rows + again))


@pytest.mark.parametrize("date", ["2019-06-04 10:00", "2019-10-26 22:00", "2019-12-01 02:00"])
def test_hours_that_daylight_saving_does_not_double(date, read):
    dates = [datetime(2019, 6, 1) + HOUR * row for row in range(24 * 200)]
    text = write(dates, lambda d: f"{d:%Y-%m-%d %H:%M}") + f"{date},99\n"
    with pytest.raises(UserError) as error:
        read(text)
    assert "TIMEZONE" not in str(error.value) and "GAPS" in str(error.value)


def test_an_example_of_where_names_a_series_with_each_date_once(read):
    """Stations of 24 lines, some of two of these: the lines are no hours. And one that has a few dates twice."""
    pairs = [(f"L{n // 3}", f"S{n}" if n % 3 else f"T{n // 6}") for n in range(72)]
    rows = [f"{day},{line},{station},{day.day * n}.5" for day in DAYS for n, (line, station) in enumerate(pairs)]
    text = "date,line,station,value\n" + "\n".join(rows)
    with pytest.raises(UserError, match='--where "line=L0,station=T0"'):
        read(text)
    check(read(text, where=["line=L1", "station=T0"]), DAYS, [3 * day.day + 0.5 for day in DAYS])
    rows = [f"{day},{'TSUVW'[place]},{day.day * place}" for day in DAYS for place in range(5)]
    text = "date,station,value\n" + "\n".join([*rows, f"{DAYS[7]},T,99", f"{DAYS[9]},T,99"])
    with pytest.raises(UserError, match='column station tells .*--where "station=S"'):
        read(text)


STATIONS = [f"{date},{site},{row * row % 17}" for site in "AB" for row, date in enumerate(HOURS, ord(site)) if row % 9]
TWO_STEPS = {  # text, encoding, options that help, what the message says of the second
    "WHERE and GAPS": (
        "date,site,value\n" + "\n".join(STATIONS),
        "utf-8",
        dict(where=["site=A"]),
        "with site=A, . rows are missing",
    ),
    "ENCODING and GAPS": (
        "date,höhe\n" + "\n".join(f"{date},{row}.5" for row, date in enumerate(HOURS) if row != 7),
        "cp1252",
        dict(encoding="cp1252"),
        "with .*, 1 row is missing",
    ),
    "DATE_ORDER and GAPS": (
        "date,value\n" + "\n".join(f"04/05/2016 {hour}:00,{hour % 7}" for hour in range(3, 23) if hour != 15),
        "utf-8",
        dict(order="dmy"),
        "with dmy, 1 row is missing",
    ),
    "DECIMAL and GAPS": (
        "date;value\n" + "\n".join(f"{date};{row + 1}.004" for row, date in enumerate(HOURS) if row != 7),
        "utf-8",
        dict(decimal=","),
        "with [.], 1 row is missing",
    ),
    "DATE and WHERE": (
        "day,valid,site,value\n" + "\n".join(f"{row[:10]},{row}" for row in STATIONS),
        "utf-8",
        dict(date_column="valid", where=["site=A"]),
        'with valid, .*--where "site=A"; with site=A, . rows are missing',
    ),
    "MISSING_VALUES twice": (
        "date,value\n" + "\n".join(f"{date},{['bad', -999, row, row][row % 4] if row > 30 else row}"
                                    for row, date in enumerate(HOURS)),
        "utf-8",
        dict(missing=["bad", "-999"]),
        "with bad, .*MISSING_VALUES to bad,-999",
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", TWO_STEPS)
def test_all_options_that_are_needed_are_named_at_once(kind, tmp_path):
    text, encoding, options, words = TWO_STEPS[kind]
    path = tmp_path / "series.csv"
    path.write_text(text, encoding=encoding)
    with pytest.raises(UserError, match=f"{kind.split()[0]}.*{words}.*GAPS"):
        read_series(path)
    assert len(read_series(path, **options, gaps="carry").dates) > 15


def test_an_option_that_does_not_help_is_followed_by_none(read):
    rows = [f"{DAYS[0] + DAY * row * row},{kind},{ord(kind) * row}" for kind in "ab" for row in range(60)]
    with pytest.raises(UserError, match='--where "kind=a"$'):
        read("date,kind,value\n" + "\n".join(rows))


@pytest.mark.parametrize("encoding, text", dict(gb18030="温度", big5="協和", cp949="기온", cp1252="Höhe").items())
def test_encodings_that_may_be_meant_are_named(encoding, text, tmp_path):
    path = tmp_path / "series.csv"
    path.write_text(write(DAYS, str, name=f"date,{text}").replace("00:00:00", "00:00:00,1"), encoding=encoding)
    with pytest.raises(UserError, match=f"set ENCODING to its encoding, which may be .*{encoding}") as error:
        read_series(path)
    assert encoding == "cp1252" or f"{text}" in read_series(path, encoding=encoding).notes[-1], error.value
