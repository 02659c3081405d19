"""Names as people read them, in figures and tables, and text files as people save them.

Class and file names come from folders, where they may be of any length and hold any character. This module imports the
standard library only.
"""

import codecs
import unicodedata
from pathlib import Path

WIDE = 28  # characters of a name in a figure


def read_text(path, encoding="utf-8", errors="surrogateescape"):
    """Read a text file: UTF-8 with or without a byte order mark, or UTF-16 with one, as some Windows programs write.

    Args:
        path: the file.
        encoding: of a file without a byte order mark.
        errors: what becomes of bytes that are no text, see `bytes.decode`; by default they are kept as surrogates.

    Returns:
        The text, its lines ended by a line feed.

    Raises:
        UnicodeError: for such bytes, if `errors` is "strict".
    """
    content = Path(path).read_bytes()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        encoding = "utf-16"
    elif content.startswith(codecs.BOM_UTF8):
        encoding = "utf-8-sig"
    return content.decode(encoding, errors).replace("\r\n", "\n").replace("\r", "\n")


def printable(text):
    """`text` on one line: line breaks and tabs become spaces, characters that show nothing are dropped, and bytes of a
    file name that are no UTF-8 become question marks."""
    return text if text.isascii() and text.isprintable() else "".join(shown(char) for char in text)


def shown(char):
    """What is drawn of a character: itself, a space, "?" or nothing."""
    category = unicodedata.category(char)
    if char.isspace() or category in ("Zl", "Zp"):
        return " "
    if category == "Cs":
        return "?"
    # Joiners, direction marks, variation selectors: nothing to see, but fonts have boxes for them.
    return "" if category in ("Cc", "Cf") or 0xFE00 <= ord(char) <= 0xFE0F else char


def width(text):
    """Columns that `text` takes in a table of a terminal: two for each Chinese, Japanese or Korean character."""
    if text.isascii():
        return len(text)
    return sum(0 if unicodedata.combining(char) else 1 + (unicodedata.east_asian_width(char) in "WF") for char in text)


def label(name, limit=WIDE):
    """A name for a figure or a table: on one line, in the middle shortened to `limit` columns."""
    name = printable(str(name))
    if width(name) <= limit:
        return name
    # Names of one data set often differ in their ends.
    start, end = cut(name, limit - 1 - limit // 3), cut(name[::-1], limit // 3)[::-1]
    return f"{start}…{end}"


def cut(text, limit):
    """The beginning of `text`, of at most `limit` columns."""
    while width(text) > limit:
        text = text[: max(limit, 1)] if len(text) > 2 * limit else text[:-1]
    return text


def pad(text, columns):
    """`text` and spaces behind it up to `columns` columns of a terminal."""
    return text + " " * (columns - width(text))
