"""Dates as people write them: a column of texts becomes points in time at equal steps.

A column is read as a whole, by one pattern, so that no two rows of it are read in different ways. What several readings
would fit (1/2/2020) is decided by the rest of the column, or refused with the option that decides it. `datetime` and
`zoneinfo` do the calendar. `datetime.fromisoformat` and the parsers of pandas and dateutil are not used: what the first
accepts depends on the version of Python, and the others take the order of day and month for granted.
"""

import re
from calendar import monthrange
from collections import Counter
from dataclasses import dataclass
from datetime import datetime, timedelta, timezone

import numpy as np

ORDERS = ("dmy", "mdy", "ymd")
MONTHS = {  # English, German, French, Spanish, Italian and Portuguese
    name: number
    for number, names in enumerate(
        (
            "jan january januar jänner janv janvier ene enero gen gennaio janeiro",
            "feb february februar fév févr février fevrier febrero febbraio fev fevereiro",
            "mar march mär märz mrz maerz mars marzo março marco",
            "apr april avr avril abr abril aprile",
            "may mai mayo mag maggio maio",
            "jun june juni juin junio giu giugno junho",
            "jul july juli juil juillet julio lug luglio julho",
            "aug august août aout ago agosto",
            "sep sept september septembre septiembre setiembre set settembre setembro",
            "oct october okt oktober octobre octubre ott ottobre out outubro",
            "nov november novembre noviembre novembro",
            "dec december dez dezember déc décembre decembre dic diciembre dicembre dezembro",
        ),
        1,
    )
    for name in names.split()
}
MONTH = timedelta(days=365.2425 / 12)
DAY = timedelta(days=1)
YEARS = range(1500, 2300)  # in which people measure

_NAME = rf"(?P<name>{'|'.join(sorted(MONTHS, key=len, reverse=True))})\.?"
_WEEKDAY = r"(?:(?:mon|tues?|wed(?:nes)?|thu(?:rs?)?|fri|sat(?:ur)?|sun)(?:day)?\.?,?\s+)?"
ZONES = dict(z=0, utc=0, gmt=0, wet=0, west=1, cet=1, cest=2, mez=1, mesz=2, eet=2, eest=3, jst=9, kst=9)  # hours
ZONES |= dict(est=-5, edt=-4, mst=-7, mdt=-6, pst=-8, pdt=-7)  # CST is also that of China
_CLOCK = (
    r"(?:(?P<before>上午|下午|오전|오후)\s*)?(?P<hour>\d{1,2})(?::?(?P<minute>\d{2})(?::?(?P<second>\d{2})(?:[.,](?P<fraction>\d+))?)?)?"
    r"(?:\s*(?P<half>[ap])\.?m\.?)?"
)
_TIME = (
    rf"(?:(?:t|,?\s+|:(?=\d\d)){_CLOCK}\s*"
    rf"(?P<zone>(?:utc|gmt)?[+-]\d{{2}}(?::?\d{{2}})?|{'|'.join(sorted(ZONES, key=len, reverse=True))})?)?"
)
_YEAR, _ANY_YEAR = r"(?P<year>\d{4})", r"(?P<year>\d{4}|\d{2})"

# Name of a pattern, as it is printed, and its regular expression. Texts first, then what could be plain numbers.
TEXTS = {
    "year-month-day": rf"{_YEAR}(?P<sep>[-/.]\s?)(?P<month>\d{{1,2}})(?P=sep)(?P<day>\d{{1,2}})\.?{_TIME}",
    "year-month-day-hour-minute-second": rf"{_YEAR}(?P<sep>[-._])(?P<month>\d{{2}})(?P=sep)(?P<day>\d{{2}})[-_ T]"
    r"(?P<hour>\d{2})(?P<mark>[-._])(?P<minute>\d{2})(?P=mark)(?P<second>\d{2})",
    "year 年 month 月 day 日": rf"{_YEAR}\s*年(?:\s*(?P<month>\d{{1,2}})\s*月(?:\s*(?P<day>\d{{1,2}})\s*[日号]\s*"
    rf"(?:{_CLOCK})?)?)?",
    "fiscal years": rf"(?:fy ?)?{_YEAR}[-/\u2013](?P<next>\d{{4}}|\d{{2}})",
    "three numbers": r"(?P<a>\d{1,2})(?P<sep>[-/.]\s?| )(?P<b>\d{1,2})(?P=sep)(?P<c>\d{4}|\d{2})\.?" + _TIME,
    "year-month": r"(?P<year>\d{4})[-/ ](?P<month>\d{1,2})",
    "month-year": r"(?P<month>\d{1,2})[-/ ](?P<year>\d{4})",
    "month.year": r"(?P<month>0[1-9]|1[0-2])\.(?P<year>(?:19|20)\d{2})",
    "day, month's name, year": rf"{_WEEKDAY}(?P<day>\d{{1,2}})(?:st|nd|rd|th)?[-/. ]*{_NAME}[-/., ]*{_ANY_YEAR}{_TIME}",
    "month's name, day, year": rf"{_WEEKDAY}{_NAME}[ -]*(?P<day>\d{{1,2}})(?:st|nd|rd|th)?,?[ -]+{_YEAR}{_TIME}",
    "month's name, day, time, year": rf"{_WEEKDAY}{_NAME} +(?P<day>\d{{1,2}}) +{_CLOCK} +(?:(?P<zone>utc) +)?{_YEAR}",
    "year, month's name, day": rf"{_YEAR}[-/. ]*{_NAME}[-/. ]*(?P<day>\d{{1,2}}){_TIME}",
    "year, month's name": rf"{_YEAR}[-/.: ]*{_NAME}",
    "month's name, year": rf"{_NAME}[-/., ']*{_ANY_YEAR}",
    "year and quarter": rf"{_YEAR}[-/.: ]*q0?(?P<quarter>[1-4])",
    "quarter and year": rf"q(?P<quarter>[1-4])[-/.: ']*{_ANY_YEAR}",
    "number of the quarter, year": rf"(?P<quarter>[1-4])q[-/.: ']*{_ANY_YEAR}",
    "year 年 quarter 季度": rf"{_YEAR}\s*年\s*第?\s*(?P<quarter>[1-4])\s*季度?",
    "year and month M": rf"{_YEAR}[-: ]?m(?P<month>\d{{1,2}})",
    "ISO week": rf"{_YEAR}-?w(?P<week>\d{{1,2}})(?:-?(?P<weekday>[1-7]){_TIME})?",
    "yyyymmddThhmm": rf"{_YEAR}(?P<month>\d{{2}})(?P<day>\d{{2}})(?=[t :]){_TIME}",
    "year [YR year]": rf"{_YEAR} ?\[yr(?P=year)\]",
}
NUMBERS = {
    "yyyymmdd": rf"{_YEAR}(?P<month>\d{{2}})(?P<day>\d{{2}})(?:(?P<hour>\d{{2}})(?:(?P<minute>\d{{2}})"
    r"(?P<second>\d{2})?)?)?",
    "yyyymm": rf"{_YEAR}(?P<month>\d{{2}})",
    "yyyyww, ISO weeks": rf"{_YEAR}(?P<week>0[1-9]|[1-4]\d|5[0-3])",
    "Unix time in seconds": r"(?P<unix>\d{9,10})(?:\.(?P<fraction>\d+))?",
    "Unix time in milliseconds": r"(?P<unix>\d{12,13})(?:\.0+)?",
    "Unix time in microseconds": r"(?P<unix>\d{16})",
    "Unix time in nanoseconds": r"(?P<unix>\d{19})",
    "years": r"(?P<year>\d{4})(?:\.0+)?",
    "year.month": r"(?P<year>\d{4})\.(?P<month>\d{2})",
    "years and fractions of a year": r"(?P<years>\d{4}(?:\.\d+)?)",
    "days since 1900 as Excel counts them": r"(?P<serial>[2-5]\d{4}(?:\.\d+)?)",
}
UNIX = {"Unix time in seconds": 10**6, "Unix time in milliseconds": 10**3, "Unix time in microseconds": 1}
UNIX |= {"Unix time in nanoseconds": 10**-3}
PATTERNS = {name: re.compile(text, re.IGNORECASE) for name, text in (TEXTS | NUMBERS).items()}
CLOCK = re.compile(_CLOCK.replace("(?::?(?P<minute>", "(?::(?P<minute>", 1), re.IGNORECASE)


# An interval: its beginning, and its end, which may be a time of day alone and then look like a distance from UTC.
INTERVAL = re.compile(
    r"(?P<begin>.{8,}?)(?:\s*[-\u2013\u2014/~]\s*|\s+(?:to|bis)\s+)(?P<end>\d{1,2}:\d{2}.*|.{8,})", re.IGNORECASE
)


class Ambiguous(ValueError):
    """Several readings fit; the message says which, and the option that decides."""


@dataclass(frozen=True)
class Step:
    """The distance between two rows of a series.

    Attributes:
        unit: "time" (always as long), "weekday" (days of the week that `mask` has) or "month".
        size: a `timedelta`, or a number of weekdays or months.
        first: the first date, a `datetime` without a time zone.
        mask: seven "0" or "1" from Monday on, for weekdays.
        day: day of the month, at most the last one; 0: its last weekday; -1: its first weekday.
    """

    unit: str
    size: object
    first: datetime
    mask: str = "1111111"
    day: int = 1

    @property
    def interval(self):
        """The mean distance, a `timedelta`."""
        if self.unit == "weekday":
            return timedelta(days=7) / self.mask.count("1")
        return self.size if self.unit == "time" else self.size * MONTH

    def at(self, number):
        """The date of row `number`."""
        if self.unit == "time":
            return self.first + number * self.size
        if self.unit == "weekday":
            day = np.busday_offset(np.datetime64(self.first, "D"), number, weekmask=self.mask).item()
            return datetime.combine(day, self.first.time())
        year, month = divmod(month_number(self.first) + number * self.size, 12)
        return datetime.combine(day_of_month(year, month + 1, self.day), self.first.time())

    def rows(self, dates):
        """Row numbers of `dates`; -1 for a date between two rows."""
        if self.unit == "time":
            pairs = [divmod(date - self.first, self.size) for date in dates]
            return np.array([-1 if rest else whole for whole, rest in pairs])
        if self.unit == "weekday":
            days = np.array(dates, "datetime64[D]")
            rows = np.busday_count(np.datetime64(self.first, "D"), days, weekmask=self.mask)
            inside = np.is_busday(days, weekmask=self.mask) & [date.time() == self.first.time() for date in dates]
            return np.where(inside, rows, -1)
        pairs = [divmod(month_number(date) - month_number(self.first), self.size) for date in dates]
        return np.array([-1 if rest else whole for whole, rest in pairs])

    def __str__(self):
        return describe_interval(self.interval)


def describe_interval(interval):
    """A mean distance in words: "1:00:00", "7 days", "1 month", "1 weekday of 5 a week"."""
    months = interval / MONTH
    if abs(months - round(months)) < 1e-9 and months > 0.5:
        count, unit = (round(months) // 12, "year") if round(months) % 12 == 0 else (round(months), "month")
        return f"{count} {unit}{'s' * (count > 1)}"
    if interval % DAY == timedelta(0):
        return f"{interval // DAY} day{'s' * (interval > DAY)}"
    for days in (4, 5, 6):
        if interval == timedelta(days=7) / days:
            return f"1 weekday of {days} a week"
    return str(interval)


def month_number(date):
    return 12 * date.year + date.month - 1


def day_of_month(year, month, day):
    """A day as in `Step.day`."""
    last = monthrange(year, month)[1]
    if day > 0:
        return datetime(year, month, min(day, last)).date()
    date = datetime(year, month, 1 if day else last)
    while date.weekday() > 4:
        date += DAY if day else -DAY
    return date.date()


def find_step(dates):
    """The `Step` of ascending, different dates, most of which are equally far apart; None if there is none.

    Dates between two rows (see `Step.rows`) may remain; whether rows are missing is not asked here.
    """
    if len(dates) < 2:
        return None
    steps = Counter(later - earlier for earlier, later in zip(dates, dates[1:]))
    usual = max(steps, key=lambda step: (steps[step], -step))
    if usual >= 28 * DAY:
        step = find_months(dates)
        if step:
            return step
    step = Step("time", usual, dates[0])
    if usual == DAY and steps.keys() - {DAY} and dates[-1] - dates[0] >= 10 * DAY:
        weekdays = {date.weekday() for date in dates}
        if len(weekdays) in (4, 5, 6):
            return Step("weekday", 1, dates[0], "".join("01"[day in weekdays] for day in range(7)))
    return step


def find_months(dates):
    """The `Step` of dates in different months, most of which are as many months apart; None if they are not."""
    months = [month_number(date) for date in dates]
    steps = Counter(later - earlier for earlier, later in zip(months, months[1:]))
    size = max(steps, key=lambda step: (steps[step], -step))
    if 0 in steps or len({date.time() for date in dates}) > 1 or any(step % size for step in steps):
        return None
    lasts = [monthrange(date.year, date.month)[1] for date in dates]
    highest = 31 if all(date.day == last for date, last in zip(dates, lasts)) else max(date.day for date in dates)
    for day in (highest, 0, -1):
        if all(date.date() == day_of_month(date.year, date.month, day) for date in dates):
            return Step("month", size, dates[0], day=day)
    if steps[size] < len(dates) - 1:  # with days at random and months missing, nothing is regular
        return None
    return Step("month", size, dates[0], day=dates[-1].day)


def is_regular(dates, share=0.0):
    """Whether dates are at one step when sorted, at most `share` of the rows missing."""
    dates = sorted(set(dates))
    step = find_step(dates)
    if step is None:
        return False
    rows = step.rows(dates)
    if step.unit == "month" and [step.at(int(row)) for row in rows] != dates:
        return False
    return rows.min() >= 0 and len(set(rows)) == len(rows) and rows[-1] + 1 - len(rows) <= share * len(rows)


@dataclass
class Reading:
    """A column of dates.

    Attributes:
        dates: a `datetime` without time zone for each cell; None where a cell is not a date.
        offsets: minutes from UTC for each cell; None where it has none.
        note: how it was read, to be printed.
        problem: what is not right with the first cell that is not a date; "".
    """

    dates: list
    offsets: list
    note: str
    problem: str = ""

    @property
    def days_only(self):
        return all(date is None or date.time() == datetime.min.time() for date in self.dates)


def read_dates(cells, order="auto", numbers=False, anything=False, share=0.8, gaps=0.0):
    """Read a column of dates, or of intervals, of which the beginnings are read.

    Args:
        cells: texts without white space around them.
        order: "dmy", "mdy" or "ymd" for three numbers; "auto": the column decides.
        numbers: try numbers instead of texts: years, yyyymmdd, Unix time.
        anything: numbers need not be at equal steps.
        share: of the cells must match a pattern.
        gaps: fraction of the rows that may be missing where numbers are to be at equal steps.

    Returns:
        `Reading`; None if these are not dates.

    Raises:
        Ambiguous: if several orders of the three numbers fit, or nothing tells days from years.
    """
    reading = read_points(cells, order, numbers, anything, share, gaps)
    if not numbers and (reading is None or len({*reading.offsets} - {None}) > 4):  # no place changes its zone as often
        pairs = [INTERVAL.fullmatch(cell) for cell in cells]
        ends = [re.sub(r"\s*\(.*", "", pair["end"]) for pair in pairs if pair]
        dated = all(re.match(r"\d{1,2}:\d{2}", end) for end in ends) or read_points(ends, order, share=share)
        if len(ends) > share * sum(map(bool, cells)) and dated:
            begins = [pair["begin"] if pair else cell for pair, cell in zip(pairs, cells)]
            reading = read_points(begins, order, share=share)
            if reading:
                reading.note += ", the beginnings of intervals"
    return reading


def read_points(cells, order, numbers=False, anything=False, share=0.8, gaps=0.0):
    """`Reading` of points in time, see `read_dates`."""
    if re.search("[时時]", "".join(cells[:1])):  # 13时, 13时30分
        cells = [re.sub(":$", ":00", re.sub(r"[时時](?:(\d\d)分?)?$", r":\1", cell)) for cell in cells]
    sample = [cell for cell in cells if cell]
    if not sample:
        return None
    some = sample[:: max(1, len(sample) // 50)]
    for name in NUMBERS if numbers else TEXTS:
        pattern = PATTERNS[name]
        if sum(pattern.fullmatch(cell) is not None for cell in some) < share * len(some):
            continue
        matches = [pattern.fullmatch(cell) for cell in cells]
        if sum(match is not None for match in matches) < share * len(sample):
            continue
        reading = read_matches(name, matches, cells, order)
        known = [date for date in reading.dates if date is not None]
        if len(known) < share * len(sample):
            continue
        if name.startswith("yyyyww") and len({date.isocalendar()[0] for date in known}) < 2:
            continue  # only a new year, where the numbers jump, tells weeks from numbers
        named = gaps or anything or "." in sample[0]  # else whole numbers of five digits may be anything
        if "Excel" in name and not (named and sorted(known) in (known, known[::-1])):
            continue
        if not numbers or anything or (len(known) == len(sample) and is_plausible(known, gaps)):
            return reading
    return None


def is_plausible(dates, gaps=0.0):
    """Whether numbers are dates: at equal steps but for the fraction `gaps`, and in years that people measure."""
    return dates[0] != dates[-1] and min(dates).year in YEARS and max(dates).year in YEARS and is_regular(dates, gaps)


def read_matches(name, matches, cells, order):
    """`Reading` of cells that one pattern matches; cells without a match are None."""
    if name == "month's name, year":
        check_short_years(matches)
    if name != "three numbers":
        return in_one_century(name, matches, cells)
    readings = {}
    two_digits = any(match and len(match["c"]) == 2 for match in matches)
    for candidate in ORDERS if two_digits else ORDERS[:2]:
        readings[candidate] = in_one_century(f"{name}, {candidate}", matches, cells, candidate)
    if order in readings:
        return readings[order]
    fewest = min(reading.dates.count(None) for reading in readings.values())
    fitting = {key: reading for key, reading in readings.items() if reading.dates.count(None) == fewest}
    by = "the only order in which all are dates"
    if len(fitting) > 1:
        for share in (0, 0.2):
            regular = {
                key: reading
                for key, reading in fitting.items()
                if is_regular([date for date in reading.dates if date], share)
            }
            if regular:
                fitting = regular
                break
        by = "the order in which the rows are equally far apart"
    if len(fitting) > 1 and any(reading.dates != next(iter(fitting.values())).dates for reading in fitting.values()):
        cell = next(cell for cell, match in zip(cells, matches) if match)
        raise Ambiguous(
            f"{cell!r} can be {' or '.join(fitting)} (d: day, m: month, y: year), and the other rows do not decide it; "
            f"set DATE_ORDER to one of these"
        )
    chosen = next(iter(fitting.values()))
    chosen.note += f" ({by}; DATE_ORDER sets another)"
    return chosen


def check_short_years(matches):
    """`Ambiguous` if what would be years of two digits behind a month's name follow each other as its days do."""
    matches = [match for match in matches if match]
    days = [(MONTHS[match["name"].lower()], match["year"]) for match in matches if int(match["year"]) < 32]
    steps = [int(later) - int(day) for (name, day), (then, later) in zip(days, days[1:]) if name == then]
    if len(days) == len(matches) and 2 * len(steps) > len(days) > 2 and all(0 < abs(step) < 8 for step in steps):
        raise Ambiguous(f"{matches[0][0]!r} is a day without its year, or a year of two digits; write years with four")


def in_one_century(name, matches, cells, order=None):
    """`convert_all`, years of two digits as POSIX and Python do it, or in the 20th century if only that is regular."""
    reading, short = convert_all(name, matches, cells, order)
    if short and not is_regular([date for date in reading.dates if date]):
        other, _ = convert_all(name, matches, cells, order, pivot=0)
        if is_regular([date for date in other.dates if date]):
            other.note += ", years of two digits in the 20th century"
            return other
    if short:
        reading.note += ", years 69 to 99 in the 20th century, 00 to 68 in the 21st"
    return reading


def convert_all(name, matches, cells, order=None, pivot=69):
    """(`Reading` of the matches of one pattern, whether there are years of two digits); see `convert`."""
    reading = Reading([], [], name)
    short = False
    for match, cell in zip(matches, cells):
        date = offset = None
        if match is None:
            reason = f"{cell!r} is not a date like the others ({name})" if cell else "the date is empty"
        else:
            groups = match.groupdict()
            try:
                if order:
                    a, b, c = groups.pop("a"), groups.pop("b"), groups.pop("c")
                    parts = dict(zip(order, (a, b, c)))
                    groups |= dict(day=parts["d"], month=parts["m"], year=parts["y"])
                short |= len(groups.get("year") or "year") == 2
                date, offset = convert(name, groups, pivot)
            except (ValueError, OverflowError) as error:
                reason = f"{cell!r} is not a date ({error})"
        if date is None:
            reading.problem = reading.problem or reason
        reading.dates.append(date)
        reading.offsets.append(offset)
    return reading, short


def convert(name, groups, pivot):
    """(datetime, minutes from UTC or None) of the groups of a match; ValueError for an impossible date.

    Years of two digits from `pivot` on are those of the 20th century.
    """
    if "unix" in groups:
        micro = int((groups.get("fraction") or "0")[:6].ljust(6, "0"))
        return datetime(1970, 1, 1) + timedelta(microseconds=int(int(groups["unix"]) * UNIX[name]) + micro), 0
    if "years" in groups:
        year, fraction = divmod(float(groups["years"]), 1)
        months = 12 * fraction
        if abs(months - round(months)) > 0.13:  # .08, .17, .25 and .333 are meant as twelfths
            raise ValueError("not a twelfth of a year")
        years, month = divmod(round(months), 12)
        return datetime(int(year) + years, month + 1, 1), None
    if "serial" in groups:
        return datetime(1899, 12, 30) + timedelta(seconds=round(86400 * float(groups["serial"]))), None
    year = int(groups["year"])
    if groups.get("next") and int(groups["next"]) not in (year + 1, (year + 1) % 100):
        raise ValueError("the second year does not follow the first")
    if len(groups["year"]) == 2:
        year += 1900 if year >= pivot else 2000
    if groups.get("week"):
        date = datetime.fromisocalendar(year, int(groups["week"]), int(groups.get("weekday") or 1))
    else:
        month = int(groups.get("month") or 1)
        if groups.get("name"):
            month = MONTHS[groups["name"].lower()]
        if groups.get("quarter"):
            month = 3 * int(groups["quarter"]) - 2
        date = datetime(year, month, int(groups.get("day") or 1))
    return date + read_clock(groups), read_offset(groups.get("zone"))


def read_clock(groups):
    """Time of day as a `timedelta`; 24:00 is the next day."""
    if not groups.get("hour"):
        return timedelta()
    hour = int(groups["hour"])
    half = {"上午": "a", "오전": "a", "下午": "p", "오후": "p"}.get(groups.get("before"), groups.get("half"))
    if half:
        if not 1 <= hour <= 12:
            raise ValueError("an hour with AM or PM is from 1 to 12")
        hour = hour % 12 + 12 * (half.lower() == "p")
    minute, second = int(groups.get("minute") or 0), int(groups.get("second") or 0)
    fraction = int((groups.get("fraction") or "0")[:6].ljust(6, "0"))
    if hour > 24 or minute > 59 or second > 59 or (hour == 24 and (minute or second or fraction)):
        raise ValueError("there is no such time of day")
    return timedelta(hours=hour, minutes=minute, seconds=second, microseconds=fraction)


def read_offset(zone):
    if not zone:
        return None
    if zone.lower() in ZONES:
        return 60 * ZONES[zone.lower()]
    zone = zone.lower().removeprefix("utc").removeprefix("gmt")
    digits = zone[1:].replace(":", "")
    minutes = 60 * int(digits[:2]) + int(digits[2:] or 0)
    if minutes > 14 * 60:
        raise ValueError(f"there is no time zone {zone}")
    return -minutes if zone[0] == "-" else minutes


OTHER_TIMES = {  # of day, and how they are read
    r"^(\d{1,2})\.(\d{2})\.(\d{2})$": r"\1:\2:\3",
    r"^(\d{2})(\d{2})(\d{2})$": r"\1:\2:\3",
    r"^(\d{1,2}) ?(?:h|uhr|时|時|点)$": r"\1:00",
    r"^(\d{1,2}) ?(?:h|时|時|点)(\d{2})$": r"\1:\2",
    r"^(\d{1,2}:\d{2}(?::\d{2})?)\s*(?:[-\u2013]|to)\s*\d.*": r"\1",  # 13:00 - 14:00
}


def read_times(cells):
    """Times of day as `timedelta`s, or hours from 0 to 23 or from 1 to 24; None if these are not."""
    for pattern, time in OTHER_TIMES.items():
        cells = [re.sub(pattern, time, cell, flags=re.IGNORECASE) for cell in cells]
    matches = [CLOCK.fullmatch(cell) for cell in cells]
    if not all(matches):
        return None
    try:
        times = [read_clock(match.groupdict()) for match in matches]
    except ValueError:
        return None
    return times


def read_numbered(cells, days, zone=None):
    """Points in time from days, and numbers that count their hours, half or quarter hours, or are as 1330.

    Where daylight saving changes, a day has an hour less or more.

    Args:
        cells: 0 to 23, 1 to 24 or 25 (the hour that ends then), 1 to 48 or 50, 1 to 96 or 100, or 0 to 2359.
        days: a `datetime` without time zone for each.
        zone: `ZoneInfo` of the days; None: days with an hour less or more show where daylight saving begins and ends.

    Returns:
        (`datetime`s, what they are: "", "UTC" or "standard time"); None if these are not such numbers.
    """
    if not all(re.fullmatch(r"\d{1,4}(?:\.0+)?", cell) for cell in cells):
        return None
    numbers = [int(float(cell)) for cell in cells]
    low, high = min(numbers), max(numbers)
    if 100 < high <= 2400 and all(number % 100 < 60 for number in numbers):
        return [day + timedelta(hours=number // 100, minutes=number % 100) for day, number in zip(days, numbers)], ""
    rows = next((rows for rows in (24, 48, 96) if high - low < rows + rows // 24), None)  # per day
    if low > 1 or rows is None or high < 20:
        return None
    length = DAY / rows
    ends = low == 1 and rows == 24
    elapsed = [(number - low + ends) * length for number in numbers]
    if zone:
        starts = {day: day.replace(tzinfo=zone).astimezone(timezone.utc).replace(tzinfo=None) for day in set(days)}
        return [starts[day] + time for day, time in zip(days, elapsed)], "UTC"
    counts, last = Counter(days), {}
    for day, number in zip(days, numbers):
        last[day] = max(last.get(day, 0), number - low + 1)
    hour = rows // 24
    changes = {day: count - rows for day, count in counts.items() if count == last[day] and abs(count - rows) == hour}
    if hour not in changes.values():
        return [day + time for day, time in zip(days, elapsed)], ""
    late = -hour if changes[min(changes)] == hour else 0
    starts = {}
    for day in sorted(counts):
        starts[day] = day + late * length
        late = max(-hour, min(0, late + changes.get(day, 0)))
    return [starts[day] + time for day, time in zip(days, elapsed)], "standard time"


def to_utc(dates, zone, where):
    """Local times in UTC. Where the end of daylight saving doubles an hour, its first row is the earlier one.

    Args:
        dates: `datetime`s without time zone.
        zone: `ZoneInfo`.
        where: a function of a row number, for messages.

    Raises:
        ValueError: for a time that daylight saving skips.
    """
    result, seen = [], set()
    for row, date in enumerate(dates):
        utc = date.replace(tzinfo=zone, fold=int(date in seen)).astimezone(timezone.utc)
        seen.add(date)
        if utc.astimezone(zone).replace(tzinfo=None) != date:
            raise ValueError(f"{where(row)}: {date} does not exist in {zone.key}: daylight saving skips this hour")
        result.append(utc.replace(tzinfo=None))
    return result


def to_standard_time(dates):
    """Local times in standard time, if the hours that daylight saving skips and doubles show in them; else None.

    Args:
        dates: `datetime`s without time zone in the order of the rows, more than one an hour or one each.

    Every second change doubles an hour and every other skips one, about half a year apart, and with both put right the
    rows are equally far apart.
    """
    hour = timedelta(hours=1)
    step = Counter(later - earlier for earlier, later in zip(dates, dates[1:])).most_common(1)[0][0]
    if not timedelta(0) < step <= hour:
        return None
    changes = []  # (row, whether daylight saving begins)
    for row, (earlier, later) in enumerate(zip(dates, dates[1:]), 1):
        if later - earlier == step + hour:
            changes.append((row, True))
        elif later - earlier == step - hour:
            changes.append((row, False))
        elif later - earlier != step:
            return None
    if len(changes) < 2:
        return None
    for (row, begins), (after, then) in zip(changes, changes[1:]):
        if begins == then or not 120 * DAY < dates[after] - dates[row] < 250 * DAY:
            return None
    shift = timedelta(0) if changes[0][1] else hour
    result, turns = [], dict(changes)
    for row, date in enumerate(dates):
        if row in turns:
            shift = hour if turns[row] else timedelta(0)
        result.append(date - shift)
    return result
