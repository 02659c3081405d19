"""Split data1/<class>/ into data/train/<class>/ and data/val/<class>/, 70 to 30 in every class.

    python makedata.py              images or recordings that you put into data1/<class>/
    python makedata.py --demo       draws a small demo data set into an empty data1 first
    python makedata.py --check      only inspects: classes, sizes, broken files, duplicates across classes and the split

Every image is opened and checked; unusable files are listed and skipped. The side of the split depends only on an
image's content and the seed, so that the split is the same on every system, and hardly changes when images are added.
Identical files land on the same side. data/manifest.json records which file went where.

WAV, FLAC, OGG and MP3 files become log-mel spectrograms, as the constants below say: data/train/<class>/x.wav.png is
the image that a network sees of data1/<class>/x.wav.

With GROUP, whole groups of files land on one side, such as all images of a plant or all recordings of a speaker:

    python makedata.py --group "_([a-z]+)_"                         3_anna_12.wav belongs to the group anna
    python makedata.py --group "_([a-z]+)_" --val-groups anna       validate on anna's recordings

Exit status: 0 all files used; 1 an error, nothing changed; 2 a wrong option or constant; 3 done, but some files were
skipped, or --check found something to fix.
"""

import contextlib
import hashlib
import io
import json
import os
import shutil
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm

from common.audio import Spectrogram, duration, input_kind, is_sound
from common.images import SYSTEM_FILES, ImageError, is_image, level_sums, scan_class_folders
from common.manifest import CACHE, CACHE_FILES, MANIFEST, STATISTICS, fingerprint, hash_file, read_json
from common.options import ConstantError, Limits, Name, UserError, run
from prepare.drawn_data import SPECIES, draw_data_set
from prepare.groups import compile_group, split_by_group

SOURCE: Name = "data1"  # folder that contains <class>/<image or recording>
TARGET: Name = "data"  # folder to make: train/<class>, val/<class>, manifest.json
VAL_RATIO: Annotated[float, Limits(above=0, below=1)] = 0.3  # fraction of each class that becomes validation images
SEED: int = 42  # seed of the split
LINK: bool = True  # hard links, which need no disk space, where the file system allows; False always copies
WORKERS: Annotated[int, Limits(0, 61)] | None = None  # processes that check files; 0: none; None: one per core
DEMO: bool = False  # draw a small data set of 12 species into SOURCE first, which must be empty
DEMO_IMAGES: Annotated[int, Limits(2)] = 80  # drawn images per class
CHECK: bool = False  # change nothing, but report what is wrong with SOURCE and how to fix it
CHECK_NEAR: Annotated[int, Limits(0, 64)] = 4  # near duplicates for CHECK: maximum of 64 hash bits that differ
CHECK_OUTPUT: Name = "results"  # output folder of CHECK: report.txt and pairs.png

# --- split by group
GROUP: str = ""  # regular expression; files with the same match, or first group, in the name stay together; "": off
VAL_GROUPS: list[Name] = []  # the validation groups; []: chosen by VAL_RATIO and SEED

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
    check_constants(source, target, DEMO, CHECK, GROUP, VAL_GROUPS, spectrogram)
    if DEMO:
        draw_demo(source, DEMO_IMAGES, SEED)
    classes, beside = scan_class_folders(source)
    paths = [path for files in classes.values() for path in files]
    sound = None
    if are_recordings(paths):
        spectrogram.check_filters()
        sound = asdict(spectrogram)
    kind = input_kind(sound)
    if CHECK:
        from prepare.check import check  # imports PyTorch and matplotlib, which nothing else here needs

        return check(source, target, CHECK_NEAR, CHECK_OUTPUT, kind)

    files = check_files(paths, kind, WORKERS)
    skipped = [file.reason for file in files if file.reason]
    skipped += [f"{path} is not in a class folder" for path in beside if kind.fits(path)]
    for reason in skipped:
        print(f"skipped: {reason}")
    files = [file for file in files if not file.reason]
    duplicates = find_duplicates(files, kind.name)
    val = split_classes(files, source, classes, VAL_RATIO, SEED, kind.name)
    manifest = dict(source=source.as_posix(), seed=SEED, val_ratio=VAL_RATIO)
    if sound is not None:
        manifest["sound"] = sound
    how = f"with seed {SEED}"
    if GROUP:
        contents = {file.path: file.record["sha256"] for file in files}
        val, groups = split_by_group(contents, compile_group(GROUP), VAL_GROUPS, VAL_RATIO, SEED)
        manifest |= dict(group=GROUP, val_groups=groups)
        how = f"by group, with seed {SEED}"
    if VAL_GROUPS:
        how = f"by VAL_GROUPS, so that VAL_RATIO {VAL_RATIO} and SEED {SEED} have no effect"

    replace_target(target, files, val, manifest, LINK)
    report(classes, files, val, duplicates)
    if sound is not None:
        print(f"\n{describe_lengths([file.record['seconds'] for file in files], SECONDS)}")
    if GROUP:
        print(f"\nvalidation groups ({len(groups)}): {', '.join(groups[:24])}{', ...' if len(groups) > 24 else ''}")
    print(f"\n{len(files)} {kind.name}s in {target}, split {how}")
    return 3 if skipped else 0


def check_constants(source, target, demo, check, group, val_groups, spectrogram):
    """Check how the constants relate to each other; ConstantError if they contradict."""
    if target.resolve().is_relative_to(source.resolve()):
        raise ConstantError(f"TARGET must be outside SOURCE ({source}), got {target}; set it to another folder")
    if demo and check:
        raise ConstantError("DEMO must be False where CHECK, which changes nothing, is True, got True")
    if val_groups and not group:
        raise ConstantError(f"VAL_GROUPS must be empty where GROUP is, got {', '.join(val_groups)}; set GROUP, too")
    compile_group(group)
    spectrogram.check()


def draw_demo(source, images_per_class, seed):
    """Draw the demo data set into `source`, which must be empty."""
    if source.is_dir() and any(entry.name != ".gitkeep" for entry in source.iterdir()):
        raise UserError(f"{source} is not empty, and --demo draws into an empty folder only; omit --demo")
    drawing = draw_data_set(source, images_per_class, seed=seed)
    list(tqdm(drawing, total=images_per_class * len(SPECIES), desc="drawing", unit="img", leave=False))


def are_recordings(paths):
    """Whether the files are recordings, not images; UserError if there are both."""
    sound, image = (next(filter(fits, paths), None) for fits in (is_sound, is_image))
    if sound is not None and image is not None:
        raise UserError(
            f"{sound} is a recording and {image} an image, and one network cannot learn both; keep one of the two "
            "kinds here, and move the other to another folder"
        )
    return sound is not None


@dataclass
class File:
    """A file of SOURCE: what the manifest records of it, and of a recording its spectrogram; or why it is skipped."""

    path: Path
    reason: str = ""
    record: dict | None = None
    png: bytes = b""

    @property
    def name_in_target(self):
        return f"{self.path.name}.png" if self.png else self.path.name


def check_files(paths, kind, workers):
    """`check_file` for every path, in parallel, in order.

    Args:
        paths: the files.
        kind: a `common.audio.Kind`.
        workers: processes; 0: this one; None: one per core, but for a few files this one.
    """
    if workers is None:  # processes do not pay off for a few files
        workers = 0 if len(paths) < 64 else min(os.cpu_count() or 1, 61)  # Windows allows no more than 61
    bar = dict(total=len(paths), desc="checking", unit="file", leave=False)
    check_one = partial(check_file, kind=kind)
    if workers == 0:
        return list(tqdm(map(check_one, paths), **bar))
    with ProcessPoolExecutor(workers) as pool:
        return list(tqdm(pool.map(check_one, paths, chunksize=16), **bar))


def check_file(path, kind):
    """Read one file completely; returns a `File`."""
    if not kind.fits(path):
        return File(path, f"{path} has no {kind.name} extension ({', '.join(kind.extensions)})")
    if is_sound(path) and len(os.fsencode(path.name) if os.name == "posix" else path.name) > 251:
        return File(path, f"{path} has a name that is too long to append .png; shorten it")
    try:
        image = kind.load(path)
        # The sums are for mean_std.py, which then need not decode the file again.
        record = dict(sha256=hash_file(path), bytes=path.stat().st_size, sums=level_sums(image).tolist())
    except ImageError as error:
        return File(path, str(error))
    if not is_sound(path):
        return File(path, record=record)
    buffer = io.BytesIO()
    image.getchannel(0).save(buffer, "png")  # grey: the three channels are equal
    png = buffer.getvalue()
    record |= dict(seconds=duration(path), image_sha256=hashlib.sha256(png).hexdigest(), image_bytes=len(png))
    return File(path, record=record, png=png)


def find_duplicates(files, name):
    """Group files by content.

    Args:
        files: list of `File`.
        name: what they are, for messages.

    Returns:
        Lists of two or more paths that have the same content.

    Raises:
        UserError: if the same content is in two classes.
    """
    by_content = defaultdict(list)
    for file in files:
        by_content[file.record["sha256"]].append(file.path)
    groups = [paths for paths in by_content.values() if len(paths) > 1]
    for paths in groups:
        other = next((path for path in paths if path.parent.name != paths[0].parent.name), None)
        if other is not None:
            raise UserError(f"{paths[0]} and {other} are the same {name} in two classes; delete the wrong one")
    return groups


def split_classes(files, source, classes, val_ratio, seed, name):
    """Choose the validation files of every class: the set of their paths; UserError if a class is too small."""
    by_class = {class_name: {} for class_name in classes}
    for file in files:
        by_class[file.path.parent.name][file.path] = file.record["sha256"]
    val = set()
    for class_name, contents in by_class.items():
        usable = len(set(contents.values()))
        if usable < 2:
            raise UserError(
                f"class {class_name!r} is too small to split (different usable {name}s: {usable}); put at least two "
                f"into {source / class_name}, or remove the folder"
            )
        chosen = choose_val(contents.values(), val_ratio, seed)
        val |= {path for path, content in contents.items() if content in chosen}
    return val


def choose_val(contents, val_ratio, seed):
    """Choose the validation images of one class.

    Args:
        contents: SHA-256 of each image of the class; equal ones count once.
        val_ratio: fraction to choose; at least one image lands on either side.
        seed: any integer.

    Returns:
        The set of chosen SHA-256.
    """
    # A hash of content and seed is a random order that no file name, system or library version can change.
    order = sorted(set(contents), key=lambda content: hashlib.sha256(f"{seed}:{content}".encode()).hexdigest())
    count = min(max(round(len(order) * val_ratio), 1), len(order) - 1)
    return set(order[:count])


def replace_target(target, files, val, manifest, link):
    """Build the new folder beside `target`, then swap: if this is stopped, the old or the new one is there, complete.

    Args:
        target: folder.
        files: list of `File`.
        val: set of the validation paths.
        manifest: what manifest.json records besides the files.
        link: whether to try hard links.
    """
    target = target.resolve() if target.is_symlink() else target
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
        records = []
        for file in tqdm(files, desc="placing", unit="img", leave=False):
            side = "val" if file.path in val else "train"
            place_in_target = f"{side}/{file.path.parent.name}/{file.name_in_target}"
            records.append(dict(path=place_in_target, source=file.path.as_posix(), **file.record))
            destination = new / place_in_target
            destination.parent.mkdir(parents=True, exist_ok=True)
            place(file, destination, link)
        manifest = manifest | dict(fingerprint=fingerprint(r["sha256"] for r in records), files=records)
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        # Names from another system's archive may not be UTF-8; their bytes are kept as they are.
        (new / MANIFEST).write_text(text + "\n", encoding="utf-8", errors="surrogateescape")
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


def find_foreign_file(target):
    """The first file in `target` that these scripts did not put there, or that was changed since; None if none is."""
    manifest = read_json(target / MANIFEST) if (target / MANIFEST).is_file() else {"files": []}
    try:
        ours = {
            file["path"]: (
                Path(file["source"]),
                file.get("image_bytes", file["bytes"]),  # of a spectrogram; otherwise the file is the source's content
                file.get("image_sha256", file["sha256"]),
            )
            for file in manifest["files"]
        }
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(
            f"{target / MANIFEST} is damaged, so it is unknown what {target} contains; move {target} away"
        ) from error
    for file in sorted(target.rglob("*")):
        name = file.relative_to(target).as_posix()
        if (
            file.is_dir()
            or file.name.lower() in SYSTEM_FILES
            or name in (MANIFEST, STATISTICS)
            or CACHE_FILES.fullmatch(name)
        ):
            continue
        if name not in ours:
            return file
        source, size, content = ours[name]
        if source.exists() and source.samefile(file):  # a hard link: both were changed, and nothing is lost
            continue
        if file.stat().st_size != size or hash_file(file) != content:
            return file
    return None


def place(file, destination, link):
    """Write a recording's spectrogram; put an image as a hard link where wanted and possible, else as a copy."""
    if file.png:
        destination.write_bytes(file.png)
        return
    if link:
        try:
            os.link(file.path.resolve(), destination)
            return
        except OSError:  # another drive, a file system without links, or no permission: a copy does the same
            pass
    shutil.copy2(file.path, destination)


def report(classes, files, val, duplicates):
    """Print which files are identical, and the table of classes."""
    for paths in duplicates:
        print(f"identical, kept on one side: {', '.join(map(str, paths))}")
    counts = {name: [0, 0] for name in classes}
    for file in files:
        counts[file.path.parent.name][file.path in val] += 1
    total = [sum(numbers) for numbers in zip(*counts.values())]
    width = max(len("class"), *map(len, classes))
    print(f"{'class':{width}}  train    val")
    for name, (train, validation) in [*counts.items(), ("total", total)]:
        print(f"{name:{width}}  {train:5}  {validation:5}")


def describe_lengths(seconds, heard):
    """One sentence on how long the recordings are, and of how many only the first `heard` seconds are used."""
    seconds = sorted(seconds)
    longer = sum(length > heard for length in seconds)
    return (
        f"the recordings last {seconds[0]:.2f} to {seconds[-1]:.2f} s, median {seconds[len(seconds) // 2]:.2f}; of "
        f"{longer} only the first {heard:g} s are used (SECONDS)"
    )


if __name__ == "__main__":
    run(main)
