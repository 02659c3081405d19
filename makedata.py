"""Split data1/<class>/ into data/train/<class>/ and data/val/<class>/, 70 to 30 in every class.

    python makedata.py              images or recordings that you put into data1/<class>/
    python makedata.py --demo       draws a small demo data set into an empty data1 first
    python makedata.py --check      only inspects: classes, sizes, broken files, duplicates across classes and the split
    python makedata.py --test-ratio 0.15                 also data/test/<class>/, which training never opens
    python makedata.py --labels labels.csv               a flat folder, and a table with the columns image and class

Every image is opened and checked; unusable files are listed and skipped. The side of the split depends only on an
image's content and the seed, so that the split is the same on every system, and hardly changes when images are added.
Identical files land on the same side. data/manifest.csv records which file went where, and data/manifest.json how.

WAV, FLAC, OGG, Opus, MP3 and AIFF files become log-mel spectrograms, as the constants below say:
data/train/<class>/x.wav.png is the image that a network sees of data1/<class>/x.wav.

docs/images.md lists which images are read. The values of images with more than 8 bits are scaled as each file states;
of 12 bits in 16, which files do not state, by a constant:

    python makedata.py --value-range 0,4095

With GROUP, whole groups of files land on one side, such as all images of a plant or all recordings of a speaker:

    python makedata.py --group "_([a-z]+)_"                         3_anna_12.wav belongs to the group anna
    python makedata.py --group "_([a-z]+)_" --val-groups anna       validate on anna's recordings

LABELS is for images in one folder, or in folders that are not classes: a CSV file with a row for each image, whose
columns split (train, val or test) and group may be missing; see prepare/labels.py.

Exit status: 0 all files used; 1 an error, nothing changed; 2 a wrong option or constant; 3 done, but some files were
skipped, or --check found something to fix.
"""

import contextlib
import hashlib
import io
import os
import shutil
import tempfile
import time
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from common.options import answer_early

# --help and wrong options, before imports that take seconds
answer_early(__name__, __file__, packages=("numpy", "PIL", "tqdm", "filelock"))

import numpy as np

from common.audio import Spectrogram, duration, input_kind, is_sound
from common.columns import Files, Hashes, Texts, digest_texts, find, iterate
from common.contents import TICK, hash_file, is_settled, read_stamp, read_stamps, remember
from common.decoding import READER
from common.file_checks import PARTS
from common.files import write_json
from common.images import SYSTEM_FILES, ImageError, is_directory, is_image, level_sums, scan_class_folders
from common.locks import hold_lock
from common.manifest import CACHE, CACHE_FILES, MANIFEST, STATISTICS, TABLE, Table, fingerprint, read_table
from common.options import Ascending, ConstantError, Length, Limits, Name, Rate, UserError, raise_all, run
from common.progress import Progress
from common.text import label, pad, width
from common.workers import map_in_processes, watched
from prepare.drawn_data import SPECIES, draw_data_set
from prepare.groups import compile_group, find_groups, split_by_group
from prepare.labels import read_labels
from prepare.pixels import Pixels, describe_pixels, look_at

SOURCE: Name = "data1"  # folder that contains <class>/<image or recording>
TARGET: Name = "data"  # folder to make: train/<class>, val/<class>, manifest.json, manifest.csv
LABELS: str = ""  # CSV file with columns image and class (and split, group) for the images in SOURCE; "": class folders
VAL_RATIO: Annotated[float, Limits(above=0, below=1)] = 0.3  # fraction of each class that becomes validation images
TEST_RATIO: Rate = 0.0  # fraction of each class that becomes test images, which train.py never opens; 0: none
SEED: int = 42  # seed of the split
LINK: bool = True  # hard links, which need no disk space, where the file system allows; False always copies
WORKERS: Annotated[int, Limits(0, 61)] | None = None  # processes that check files; 0: none; None: one per core
DEMO: bool = False  # draw a small data set of 12 species into SOURCE first, which must be empty
DEMO_IMAGES: Annotated[int, Limits(2)] = 80  # drawn images per class
CHECK: bool = False  # change nothing, but report what is wrong with SOURCE and how to fix it
CHECK_NEAR: Annotated[int, Limits(0, 64)] = 4  # near duplicates for CHECK: maximum of 64 hash bits that differ
CHECK_OUTPUT: Name = "results"  # output folder of CHECK: report.txt and pairs.png

# --- images with more than 8 bits
ValueRange = Annotated[list[float], Length(2), Ascending()]
VALUE_RANGE: ValueRange | None = None  # stored values of black and white, such as 0,4095; None: as each file states

# --- split by group
GROUP: str = ""  # regular expression; files with the same match, or first group, in the name stay together; "": off
VAL_GROUPS: list[Name] = []  # the validation groups; []: chosen by VAL_RATIO and SEED
TEST_GROUPS: list[Name] = []  # the test groups; []: chosen by TEST_RATIO and SEED

# --- spectrograms of recordings
SAMPLE_RATE: Annotated[int, Limits(1_000, 1_000_000)] = 16000  # Hz; recordings at another rate are resampled
SECONDS: Annotated[float, Limits(high=3600, above=0)] = 1.0  # s, length of the excerpt: the beginning of a recording
PADDING: Literal["silence", "repeat"] = "silence"  # around a shorter recording; "repeat": itself, repeated
WINDOW: Annotated[float, Limits(high=1000, above=0)] = 32.0  # ms, length of one spectrum's window
HOP: Annotated[float, Limits(high=1000, above=0)] = 10.0  # ms between windows, which is one pixel to the right
MELS: Annotated[int, Limits(32, 1024)] = 64  # mel bands: the image's height in pixels
DECIBELS: Annotated[float, Limits(high=1000, above=0)] = 80.0  # dynamic range; what is fainter is black


def main():
    source, target = Path(SOURCE), Path(TARGET)
    spectrogram = Spectrogram(SAMPLE_RATE, SECONDS, PADDING, WINDOW, HOP, MELS, DECIBELS)
    named, ratios = (VAL_GROUPS, TEST_GROUPS), (VAL_RATIO, TEST_RATIO)
    check_constants(source, target, DEMO, CHECK, VALUE_RANGE, LABELS, GROUP, named, ratios, spectrogram)
    if DEMO:
        draw_demo(source, DEMO_IMAGES, SEED)
    folders = read_labels(LABELS, source) if LABELS else scan_class_folders(source)
    sound = None
    if are_recordings(folders):
        spectrogram.check_filters()
        sound = asdict(spectrogram)
    kind = input_kind(sound, VALUE_RANGE and list(VALUE_RANGE))
    hidden = folders.describe_passed(kind.fits, with_files=False)
    if hidden:
        print(hidden)
    if CHECK:
        from prepare.check import check  # imports PyTorch and matplotlib, which nothing else here needs

        return check(source, target, CHECK_NEAR, CHECK_OUTPUT, kind, VALUE_RANGE)

    with tempfile.TemporaryFile() as spectrograms:
        checked, skipped = check_files(folders.files, kind, WORKERS, spectrograms)
        skipped += [f"{path} is not in a class folder" for path in folders.beside if kind.fits(path)]
        for reason in skipped:
            print(f"skipped: {reason}")
        duplicates, problems = find_duplicates(checked, kind.name)
        files = checked.files
        if GROUP and files.groups is not None:
            raise ConstantError(f'GROUP must be "" where {LABELS} has a column group, got {GROUP!r}')
        groups = find_groups(files, compile_group(GROUP)) if GROUP else files.groups
        if any(named) and (groups is None or files.parts is not None):
            raise ConstantError("VAL_GROUPS and TEST_GROUPS need groups, and LABELS without a column split; empty them")
        if files.parts is not None:
            raise_all(problems + find_split_problems(checked, groups, LABELS, kind.name))
            parts, chosen = files.parts, ([], [])
        else:
            raise_all(problems + find_small_classes(checked, source, kind.name, 3 if TEST_RATIO else 2, LABELS))
            if groups is None:
                parts, chosen = split_classes(checked, ratios, SEED), ([], [])
            else:
                parts, chosen = split_by_group(files, checked.sha256, groups, named, ratios, SEED)
        manifest = dict(source=source.as_posix(), seed=SEED, val_ratio=VAL_RATIO, reader=READER)
        manifest |= dict(test_ratio=TEST_RATIO) if TEST_RATIO else {}
        manifest |= dict(labels=Path(LABELS).as_posix()) if LABELS else {}
        manifest |= dict(group=GROUP, val_groups=chosen[0]) if groups is not None else {}
        manifest |= dict(test_groups=chosen[1]) if chosen[1] else {}
        if sound is not None:
            manifest["sound"] = sound
        elif VALUE_RANGE is not None:
            manifest["value_range"] = list(VALUE_RANGE)

        linked = target.resolve() if target.is_symlink() else target
        refusal = f"another makedata.py is making {target}; wait until it has ended, or set TARGET to another folder"
        alone = linked.with_name(f"{linked.name}.makedata-lock")
        with hold_lock(alone, refusal, remove=True):
            placed = replace_target(linked, checked, parts, groups, manifest, LINK, spectrograms)
        remember_contents(target, checked, *placed)
    report(checked, parts, duplicates)
    if sound is not None:
        print(f"\n{describe_lengths(checked.seconds, SECONDS)}")
    for name, some in zip(("validation", "test"), chosen):
        if some:
            print(f"\n{name} groups ({len(some)}): {', '.join(some[:24])}{', ...' if len(some) > 24 else ''}")
    for sentence in describe_pixels(checked.pixels, VALUE_RANGE):
        print(f"\n{sentence}")
    how = describe_split(files.parts is not None and LABELS, groups, named, ratios, SEED)
    print(f"\n{len(files)} {kind.name}s in {target}, split {how}")
    return 3 if skipped else 0


def check_constants(source, target, demo, check, value_range, labels, group, named, ratios, spectrogram):
    """Check how the constants relate to each other; ConstantError if they contradict."""
    if target.resolve().is_relative_to(source.resolve()):
        raise ConstantError(f"TARGET must be outside SOURCE ({source}), got {target}; set it to another folder")
    if demo and check:
        raise ConstantError("DEMO must be False where CHECK, which changes nothing, is True, got True")
    if value_range is not None and value_range[0] == value_range[1]:
        raise ConstantError(f"VALUE_RANGE must be two different values, got {value_range}")
    if labels and (demo or check):
        raise ConstantError(f'LABELS must be "" with {"DEMO" if demo else "CHECK"}, which is for class folders')
    for constant, some in zip(("VAL_GROUPS", "TEST_GROUPS"), named):
        if some and not group and not labels:
            raise ConstantError(f"{constant} must be empty where GROUP is, got {', '.join(some)}; set GROUP, too")
    twice = set(named[0]) & set(named[1])
    if twice:
        raise ConstantError(f"VAL_GROUPS and TEST_GROUPS must differ, but both name {', '.join(sorted(twice))}")
    if sum(ratios) >= 1:
        raise ConstantError(f"VAL_RATIO + TEST_RATIO must be below 1, got {ratios[0]} + {ratios[1]}")
    compile_group(group)
    spectrogram.check()


def draw_demo(source, images_per_class, seed):
    """Draw the demo data set into `source`, which must be empty."""
    if source.is_dir() and any(entry.name != ".gitkeep" for entry in source.iterdir()):
        raise UserError(f"{source} is not empty, and --demo draws into an empty folder only; omit --demo")
    drawing = draw_data_set(source, images_per_class, seed=seed)
    list(Progress(drawing, total=images_per_class * len(SPECIES), desc="drawing", unit="img", leave=False))


def are_recordings(folders):
    """Whether the files of `ClassFolders` are recordings, not images; UserError if there are both."""
    sounds, images = map(folders.choose, (is_sound, is_image))
    if len(sounds) and len(images):
        fewer = min(sounds, images, key=len)
        raise UserError(
            f"{sounds[0]} is a recording and {images[0]} an image, and one network cannot learn both; keep one of the "
            f"two kinds here, and move the other to another folder, such as the {len(fewer)} in "
            f"{', '.join(sorted({os.path.dirname(path) for path in fewer})[:5])}"
        )
    return len(sounds) > 0


@dataclass
class File:
    """A file of SOURCE: what the manifest records of it, and of a recording its spectrogram; or why it is skipped.
    `pixels` are for the messages only."""

    path: str
    reason: str = ""
    record: dict | None = None
    png: bytes = b""
    pixels: Pixels | None = None


@dataclass
class Checked:
    """The usable files of SOURCE, in columns: what the manifest will record of them."""

    files: Files
    stamps: np.ndarray  # array (files,) of `STAMP`, taken before they were read
    sha256: Hashes
    sums: np.ndarray  # int64 (files, 7), see `common.manifest.Table`
    # Of recordings; of images empty.
    seconds: np.ndarray
    image_sha256: Hashes
    image_bytes: np.ndarray
    pixels: dict  # {path: `Pixels`} of images that may be remarkable, for messages

    @property
    def are_recordings(self):
        return len(self.seconds) > 0


def check_files(files, kind, workers, spectrograms):
    """`check_file` for every path, in parallel.

    Args:
        files: a `Files`.
        kind: a `common.audio.Kind`.
        workers: processes; 0: this one; None: one per core, but for a few files this one.
        spectrograms: file to which the PNG files of recordings are written, one after the other.

    Returns:
        (`Checked`, list of reasons why others are skipped), both in the order of the files.
    """
    if workers is None:  # processes do not pay off for a few files
        workers = 0 if len(files) < 64 else min(os.cpu_count() or 1, 61)  # Windows allows no more than 61
    blocks = np.array_split(np.arange(len(files)), -(-len(files) // 64) or 1)
    check_one, what = partial(check_block, kind=kind), f"{kind.name}s"
    usable, columns, skipped, pixels = [], [], [], {}
    tasks = map(files.choose, blocks)
    with Progress(total=len(files), desc="checking", unit="file", leave=False) as bar:
        if workers == 0:
            results = watched(lambda: map(check_one, tasks), what)
        else:
            results = map_in_processes(check_one, tasks, workers, what)
        for block, (used, *values, pngs, remarkable, reasons) in zip(blocks, results):
            usable.append(block[used])
            columns.append(values)
            spectrograms.write(pngs)
            pixels |= remarkable
            skipped += reasons
            bar.update(len(block))
    stamps, digests, sums, seconds, image_digests, image_bytes = map(np.concatenate, zip(*columns))
    usable = np.concatenate(usable)
    files = files if len(usable) == len(files) else files.choose(usable)
    return Checked(files, stamps, Hashes(digests), sums, seconds, Hashes(image_digests), image_bytes, pixels), skipped


def check_block(files, kind):
    """`check_file` for some files.

    Returns:
        Columns of the usable ones (see `Checked`): their indices, stamps, digests, sums, seconds, digests and sizes of
        the spectrograms; then these one after the other, the `Pixels` that may be remarkable, and why the other files
        are skipped.
    """
    stamps, checked = read_stamps(files), [check_file(path, kind) for path in files]
    used = [index for index, file in enumerate(checked) if not file.reason]
    records = [checked[index].record for index in used]
    recordings = records if kind.name == "recording" else []
    sums = np.array([record["sums"] for record in records], np.int64).reshape(-1, 9)
    return (
        np.array(used, int),
        stamps[used],
        Hashes.from_hex(record["sha256"] for record in records).digests,
        sums[:, [0, 3, 4, 5, 6, 7, 8]],
        np.array([record["seconds"] for record in recordings]),
        Hashes.from_hex(record["image_sha256"] for record in recordings).digests,
        np.array([record["image_bytes"] for record in recordings], np.int64),
        b"".join(checked[index].png for index in used),
        {file.path: file.pixels for file in checked if file.pixels and (file.pixels.single or file.pixels.values)},
        [file.reason for file in checked if file.reason],
    )


def check_file(path, kind):
    """Read one file completely; returns a `File`."""
    if not kind.fits(path):
        return File(path, kind.why_not(path))
    name = os.path.basename(path)
    if is_sound(path) and len(os.fsencode(name) if os.name == "posix" else name) > 251:
        return File(path, f"{path} has a name that is too long to append .png; shorten it")
    try:
        image = kind.load(path)
        # The sums are for mean_std.py, which then need not decode the file again.
        record = dict(sha256=hash_file(path), sums=level_sums(image).tolist())
    except ImageError as error:
        return File(path, str(error))
    if not is_sound(path):
        return File(path, record=record, pixels=look_at(image))
    buffer = io.BytesIO()
    image.getchannel(0).save(buffer, "png")  # grey: the three channels are equal
    png = buffer.getvalue()
    record |= dict(seconds=duration(path), image_sha256=hashlib.sha256(png).hexdigest(), image_bytes=len(png))
    return File(path, record=record, pixels=look_at(image), png=png)


def find_duplicates(checked, name):
    """Group files by content.

    Args:
        checked: a `Checked`.
        name: what they are, for messages.

    Returns:
        (lists of two or more paths that have the same content, a sentence for each content that is in two classes).
    """
    keys, files = checked.sha256.keys(), checked.files
    order = np.argsort(keys, kind="stable")
    starts = np.flatnonzero(np.concatenate([[True], keys[order][1:] != keys[order][:-1]])) if len(keys) else []
    groups = [group for group in np.split(order, starts[1:]) if len(group) > 1] if len(starts) < len(keys) else []
    groups.sort(key=lambda group: group[0])
    problems = []
    for group in groups:
        other = group[files.labels[group] != files.labels[group[0]]]
        if len(other):
            problems.append(
                f"{files[group[0]]} and {files[other[0]]} are the same {name} in two classes; delete the wrong one"
            )
    return [[files[index] for index in group] for group in groups], problems


def find_split_problems(checked, groups, table, name):
    """A sentence for each content, and each group, that a table of labels puts into two parts, and for each class that
    has no usable file in the training or the validation part."""
    problems, files, parts = [], checked.files, checked.files.parts
    for what, keys in ((f"identical {name}s", checked.sha256), ("of one group", groups or ())):
        first = {}
        for index, key in enumerate(keys):
            twin = first.setdefault(key, index)
            if parts[twin] != parts[index]:
                problems.append(
                    f"{table}: {files[twin]} in {PARTS[parts[twin]]} and {files[index]} in {PARTS[parts[index]]} are "
                    f"{what}, which makes the accuracy too high; put them into one part, or remove the column split"
                )
    for part in (0, 1):
        lacking = np.setdiff1d(np.arange(len(files.classes)), files.labels[parts == part])
        problems += [
            f"class {files.classes[number]!r} has no usable {name} in {PARTS[part]}; correct {table}, or remove its "
            "column split"
            for number in lacking
        ]
    return problems


def find_small_classes(checked, source, name, least, table):
    """A sentence for each class that is too small to split, since it has fewer than `least` different files."""
    problems, labels, keys = [], checked.files.labels, checked.sha256.keys()
    for number, class_name in enumerate(checked.files.classes):
        usable = len(np.unique(keys[labels == number]))
        if usable < least:
            remedy = f"put at least {'two' if least == 2 else 'three'} into {source / class_name}, or remove the folder"
            if table:
                remedy = f"list at least {'two' if least == 2 else 'three'} in {table}, or remove its rows"
            problems.append(
                f"class {class_name!r} is too small to split (different usable {name}s: {usable}); {remedy}"
            )
    return problems


def split_classes(checked, ratios, seed):
    """Split the files of every class.

    Args:
        checked: a `Checked`; each class has at least one file for each part.
        ratios: (fraction to validate on, fraction to test on); 0: no test part.
        seed: any integer.

    Returns:
        int8 array (files,): the index in `PARTS` of each.
    """
    parts, labels = np.zeros(len(checked.files), np.int8), checked.files.labels
    for number in range(len(checked.files.classes)):
        indices = np.flatnonzero(labels == number)
        contents = list(checked.sha256[indices])
        val = choose_val(contents, ratios[0], seed, others=2 if ratios[1] else 1)
        test = choose_test(contents, ratios[1], seed, val) if ratios[1] else ()
        parts[indices] = [1 if content in val else 2 if content in test else 0 for content in contents]
    return parts


def choose_val(contents, val_ratio, seed, others=1):
    """Choose the validation images of one class.

    Args:
        contents: SHA-256 of each image of the class; equal ones count once.
        val_ratio: fraction to choose; at least one image.
        seed: any integer.
        others: images that are left at least.

    Returns:
        The set of chosen SHA-256.
    """
    order = shuffle(contents, seed)
    count = min(max(round(len(order) * val_ratio), 1), len(order) - others)
    return set(order[:count])


def shuffle(contents, seed):
    """The different ones of `contents` in a random order: by a hash of content and seed, which no file name, system or
    library version can change."""
    return sorted(set(contents), key=lambda content: hashlib.sha256(f"{seed}:{content}".encode()).hexdigest())


def choose_test(contents, test_ratio, seed, val):
    """Choose the test images of one class, from the other end of the order, so that VAL_RATIO does not change them.

    Args:
        contents, seed: see `choose_val`.
        test_ratio: fraction to choose; at least one image, and one is left for training.
        val: what `choose_val` chose.

    Returns:
        The set of chosen SHA-256.
    """
    order = [content for content in reversed(shuffle(contents, seed)) if content not in val]
    count = min(max(round((len(order) + len(val)) * test_ratio), 1), len(order) - 1)
    return set(order[:count])


def replace_target(target, checked, parts, groups, manifest, link, spectrograms):
    """Build the new folder beside `target`, then swap: if this is stopped, the old or the new one is there, complete.

    Args:
        target: folder, no link.
        checked: a `Checked`.
        parts: int array (files,): the index in `PARTS` of each.
        groups: the group of each; None: they were not split by group.
        manifest: what manifest.json records besides what follows from the files.
        link: whether to try hard links.
        spectrograms: file that contains the PNG files of recordings, one after the other.

    Returns:
        (the `Table` that was written, bool array (files,): which are still as they were when they were checked).
    """
    new, old = (target.with_name(f"{target.name}.makedata-{kind}") for kind in ("new", "old"))
    if old.exists() and not target.exists():  # an earlier run was stopped between the two renames below
        old.rename(target)
    for left_over in (new, old):
        shutil.rmtree(left_over, ignore_errors=True)
    if target.exists():
        foreign = find_foreign_file(target)
        if foreign is not None:
            raise UserError(
                f"{foreign} was not put there by makedata.py, or was changed since, and replacing {target} would "
                "lose it; move it away, or set TARGET to another folder"
            )
    try:
        unchanged = place_files(new, checked, parts, link, spectrograms)
        table = Table(
            Texts(places_in_target(checked, parts)),
            Texts(Path(path).as_posix() for path in checked.files),
            checked.sha256,
            checked.stamps["size"],
            checked.sums,
        )
        if checked.are_recordings:
            table.image_sha256, table.image_bytes = checked.image_sha256, checked.image_bytes
            table.seconds = checked.seconds
        table.group = None if groups is None else Texts(groups)
        table.write(new / TABLE)
        # That of the images whose statistics mean_std.py computes, so without those of the test part.
        images = checked.sha256[parts < PARTS.index("test")]
        manifest = manifest | dict(fingerprint=fingerprint(images), images=len(table))
        write_json(new / MANIFEST, manifest, indent=1)
        if (target / STATISTICS).is_file():
            shutil.copy2(target / STATISTICS, new / STATISTICS)
        if target.exists():
            target.rename(old)
        new.rename(target)
    except BaseException:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(new, ignore_errors=True)
        raise
    with contextlib.suppress(OSError):  # decoded images that are still valid; else they are decoded again
        (old / CACHE).rename(target / CACHE)
    shutil.rmtree(old, ignore_errors=True)
    return table, unchanged


def places_in_target(checked, parts):
    """Where each file is placed, below the target: text with slashes."""
    suffix, classes = ".png" if checked.are_recordings else "", checked.files.classes
    for name, number, part in zip(checked.files.names, iterate(checked.files.labels), iterate(parts)):
        yield f"{PARTS[part]}/{classes[number]}/{name}{suffix}"


def place_files(folder, checked, parts, link, spectrograms):
    """Place every file below `folder`; for the arguments see `replace_target`.

    Returns:
        bool array (files,): which are still as they were when they were checked.
    """
    for part in PARTS[: max(2, parts.max(initial=0) + 1)]:
        for name in checked.files.classes:
            (folder / part / name).mkdir(parents=True, exist_ok=True)
    spectrograms.seek(0)
    sizes = iterate(checked.image_bytes) if checked.are_recordings else [0] * len(parts)
    unchanged = np.zeros(len(parts), bool)
    work = zip(checked.files, places_in_target(checked, parts), sizes, iterate(checked.stamps))
    for index, (path, destination, size, stamp) in enumerate(
        Progress(work, total=len(parts), desc="placing", unit="img", leave=False)
    ):
        unchanged[index] = read_stamp(path) == stamp
        place(path, os.path.join(folder, destination), spectrograms.read(size), link)
    return unchanged


def remember_contents(target, checked, table, unchanged):
    """Write down which content each file and its place in `target` have, so that the next scripts need not read them.

    Only now, since the links that were made, and those of an earlier run that were removed, changed the files' ctime.

    Args:
        target: folder.
        checked, table: what was placed there.
        unchanged: see `place_files`.
    """
    time.sleep(TICK / 1e9)  # what is changed from now on gets another ctime
    now, places = time.time_ns(), Texts(os.path.join(target, *path.split("/")) for path in table.path)
    for files, hashes in ((checked.files, table.sha256), (places, table.image_sha256 or table.sha256)):
        stamps = read_stamps(files)
        same = unchanged & is_settled(stamps, now)
        if files is checked.files:
            for name in ("size", "mtime", "inode"):
                same &= stamps[name] == checked.stamps[name]
        elif not checked.are_recordings:  # copies have the times of the originals
            same &= (stamps["size"] == checked.stamps["size"]) & (stamps["mtime"] == checked.stamps["mtime"])
        indices = np.flatnonzero(same)
        remember([files[index] for index in indices], stamps[indices], hashes[indices], os.path.join(target, CACHE))


def find_foreign_file(target):
    """The first file in `target` that these scripts did not put there, or that was changed since; None if none is."""
    table = read_table(target) if (target / MANIFEST).is_file() else Table.empty()
    sizes, contents = table.bytes, table.sha256
    if table.image_sha256 is not None:  # of spectrograms; otherwise the file is the source's content
        sizes, contents = table.image_bytes, table.image_sha256
    found = Texts(list_tree(target))
    places = find(digest_texts(found), digest_texts(table.path))
    for name, index in zip(found, iterate(places)):
        file = os.path.join(target, name)
        if (
            os.path.basename(name).lower() in SYSTEM_FILES
            or name in (MANIFEST, TABLE, STATISTICS, f"{STATISTICS}.part")  # left by mean_std.py if it was killed
            or CACHE_FILES.fullmatch(name)
        ):
            continue
        if index < 0:
            return file
        source = table.source[index]
        with contextlib.suppress(OSError):  # a hard link: both were changed, and nothing is lost
            if os.path.samefile(source, file) and not Path(source).resolve().is_relative_to(target.resolve()):
                continue
        if os.path.getsize(file) != sizes[index] or hash_file(file) != contents[index]:
            return file
    return None


def list_tree(folder, prefix=""):
    """The files below `folder`, sorted in each folder, as text with slashes."""
    with os.scandir(folder) as entries:
        entries = sorted((entry.name, is_directory(entry) and not entry.is_symlink()) for entry in entries)
    for name, is_folder in entries:
        if is_folder:
            yield from list_tree(os.path.join(folder, name), f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}"


def place(path, destination, png, link):
    """Write a recording's spectrogram; put an image as a hard link where wanted and possible, else as a copy."""
    if png:
        with open(destination, "wb") as file:
            file.write(png)
        return
    if link:
        try:
            os.link(os.path.realpath(path) if os.path.islink(path) else path, destination)
            return
        except OSError:  # another drive, a file system without links, or no permission: a copy does the same
            pass
    shutil.copy2(path, destination)


def report(checked, parts, duplicates):
    """Print which files are identical, and the table of classes."""
    for paths in duplicates:
        print(f"identical, kept on one side: {', '.join(paths)}")
    classes, labels = checked.files.classes, checked.files.labels
    made = PARTS[: max(2, parts.max(initial=0) + 1)]
    counts = np.stack([np.bincount(labels[parts == part], minlength=len(classes)) for part in range(len(made))], 1)
    names = [label(name, 60) for name in classes]
    columns = max(map(width, ["class", *names]))
    print(f"{'class':{columns}}{''.join(f'  {part:>5}' for part in made)}")
    for name, row in zip([*names, "total"], [*counts, counts.sum(0)]):
        print(f"{pad(name, columns)}{''.join(f'  {count:5}' for count in row)}")


def describe_lengths(seconds, heard):
    """One sentence on how long the recordings are, and of how many only the first `heard` seconds are used."""
    seconds = np.sort(seconds)
    longer = np.count_nonzero(seconds > heard)
    return (
        f"the recordings last {seconds[0]:.2f} to {seconds[-1]:.2f} s, median {seconds[len(seconds) // 2]:.2f}; of "
        f"{longer} only the first {heard:g} s are used (SECONDS)"
    )


def describe_split(table, groups, named, ratios, seed):
    """How the files were split, and which constants have no effect on that.

    Args:
        table: path of the table whose column split did it; "" or False: none.
        groups: see `replace_target`.
        named: (VAL_GROUPS, TEST_GROUPS).
        ratios: (VAL_RATIO, TEST_RATIO).
        seed: SEED.
    """
    if table:
        test = f", TEST_RATIO {ratios[1]}" if ratios[1] else ""
        return f"by {table}, so that VAL_RATIO {ratios[0]}{test} and SEED {seed} have no effect"
    if groups is None:
        return f"with seed {seed}"
    if not any(named):
        return f"by group, with seed {seed}"
    constants = [name for name, some in zip(("VAL_GROUPS", "TEST_GROUPS"), named) if some]
    fractions = zip(("VAL_RATIO", "TEST_RATIO"), ratios, named)
    idle = [f"{name} {ratio}" for name, ratio, some in fractions if some and ratio]
    idle += [] if any(ratio and not some for ratio, some in zip(ratios, named)) else [f"SEED {seed}"]
    if not idle:
        return f"by {' and '.join(constants)}, the rest with seed {seed}"
    return f"by {' and '.join(constants)}, so that {' and '.join(idle)} ha{'ve' if len(idle) > 1 else 's'} no effect"


if __name__ == "__main__":
    run(main)
