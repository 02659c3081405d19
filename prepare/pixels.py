"""Images that are probably not read as they should be: of a single colour, or dark since their white is unknown; and
recordings of which only silence is used.

A file of 16 bits may hold the values of a camera of 12 bits, and hardly ever says so; read as 16 bits it is almost
black.
"""

from typing import NamedTuple

from common.audio import is_sound

SLIVER = 1 / 4  # fraction of the range below which all values of an image are remarkable: 14 bits or fewer in 16
MAX_LISTED = 5  # files of a kind that are named


class Pixels(NamedTuple):
    """What is remembered of an image's pixels.

    Attributes:
        single: whether all have the same colour.
        values: (lowest, highest) value as it is stored, of images with more than 8 bits; else None.
        range: (low, high), the values that became black and white; likewise.
    """

    single: bool
    values: tuple | None
    range: tuple | None


def look_at(image):
    """The `Pixels` of an image that `common.images.load_image` returned."""
    single = all(low == high for low, high in image.getextrema())
    return Pixels(single, image.info.get("values"), image.info.get("range"))


def describe_pixels(pixels, value_range):
    """Sentences on images that are probably not read as they should be, with the remedies.

    Args:
        pixels: {path: `Pixels`}.
        value_range: the constant VALUE_RANGE.
    """
    single = [path for path, image in pixels.items() if image.single]
    silent = list(filter(is_sound, single))
    if silent:
        what = f"{len(silent)} recording{'s' * (len(silent) > 1)}"
        yield f"{what} of which only silence is used: {name_some(silent)}; raise SECONDS, or remove what is silent"
        single = [path for path in single if not is_sound(path)]
    if single:
        yield f"{count(single)} of a single colour: {name_some(single)}; remove what a viewer shows like this, too"
    deep = {path: image for path, image in pixels.items() if image.values is not None}
    dark = {path: image for path, image in deep.items() if image.values[1] < SLIVER * image.range[1]}
    if dark:
        high = max(image.values[1] for image in dark.values())
        white = max(255, 2 ** int(high).bit_length() - 1)
        remedy = f"if {white} is white, set VALUE_RANGE to 0,{white}"
        if value_range is not None:
            remedy = "if they are too dark, change VALUE_RANGE, which holds for the whole data set"
        yield (
            f"{count(dark)} with more than 8 bits of which only a sliver is used, values up to {high:g} of "
            f"{max(image.range[1] for image in dark.values()):g}: {name_some(dark)}; {remedy}"
        )
    if value_range is not None:
        low, high = value_range
        beyond = {path: image for path, image in deep.items() if image.values[0] < low or image.values[1] > high}
        if beyond:
            lowest = min(image.values[0] for image in beyond.values())
            highest = max(image.values[1] for image in beyond.values())
            yield (
                f"{count(beyond)} with values outside of VALUE_RANGE, from {lowest:g} to {highest:g}, which become "
                f"black or white: {name_some(beyond)}; widen it if details are lost"
            )


def count(paths):
    return f"{len(paths)} image{'s' if len(paths) > 1 else ''}"


def name_some(paths):
    """The first of some paths, and how many more there are."""
    paths = list(map(str, paths))
    more = f", and {len(paths) - MAX_LISTED} more" if len(paths) > MAX_LISTED else ""
    return ", ".join(paths[:MAX_LISTED]) + more
