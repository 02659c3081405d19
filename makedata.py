"""Split data1/<class>/ into data/train/<class>/ and data/val/<class>/, 70 to 30 in every class.

    python makedata.py              photographs, or recordings, that you put into data1/<class>/
    python makedata.py --demo       draws a small demo set into an empty data1 first
    python makedata.py --check      only looks: classes, sizes, broken files, duplicates across classes and the split

Every picture is opened and checked; what cannot be used is listed and left out. On which side a picture lands depends
only on its content and the seed, so that the split is the same on every system, and hardly changes when pictures are
added. Identical files land on the same side. data/manifest.json records what was put where.

With GROUP, whole groups of files land on one side, such as all photographs of a plant or all recordings of a speaker:

    python makedata.py --group "_([a-z]+)_"                         3_anna_12.wav belongs to the group anna
    python makedata.py --group "_([a-z]+)_" --val-groups anna       validation is what anna said

WAV, FLAC, OGG and MP3 files become log-mel spectrograms; the constants below say how, and data/manifest.json takes them
along.

Exit status: 0 all pictures used; 1 an error, nothing changed; 2 a wrong option; 3 done, but some files were left out,
or --check found something to mend.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections import defaultdict
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from tqdm import tqdm

from common.groups import split_by_group
from common.images import SYSTEM_FILES, ImageError, is_image, level_sums, scan_class_folders
from common.manifest import CACHE, CACHE_FILES, MANIFEST, STATISTICS, fingerprint, hash_file, read_json
from common.options import UserError, run
from common.sounds import check_settings, duration, file_kind, is_sound

SOURCE: str = "data1"  # folder that holds <class>/<picture>
TARGET: str = "data"  # folder that is made: train/<class>, val/<class>, manifest.json
VAL_RATIO: float = 0.3  # share of each class that becomes validation pictures
SEED: int = 42  # another seed gives another split
LINK: bool = True  # hard links, which take no disk space, where the file system allows; False always copies
WORKERS: int = -1  # processes that check pictures; -1: one for each core; 0: check in the main process
DEMO: bool = False  # draw a small data set of 12 species into data1 first, which must be empty
DEMO_IMAGES: int = 80  # drawn pictures of each class
CHECK: bool = False  # change nothing, but say what is wrong with SOURCE and what to do about it
CHECK_NEAR: int = 4  # bits of 64 in which the perceptual hashes of near duplicates may differ, for CHECK
CHECK_OUTPUT: str = "results"  # folder for report.txt and pairs.png of CHECK

# --- split by group
GROUP: str = ""  # regular expression: names with the same first group in it, or match, land on one side; "": off
VAL_GROUPS: list[str] = []  # the groups for validation; []: chosen by VAL_RATIO and SEED

# --- sounds
SAMPLE_RATE: int = 16000  # Hz; recordings at another rate are resampled
SECONDS: float = 1.0  # of a recording that the network hears: the first ones of a longer recording
PADDING: str = "silence"  # what surrounds a shorter recording: "silence", or "repeat": itself over and over
WINDOW: float = 32.0  # milliseconds that one spectrum looks at
HOP: float = 10.0  # milliseconds from one spectrum to the next, which is one pixel to the right
MELS: int = 64  # mel bands, each a pixel high
DECIBELS: float = 80.0  # what is so much fainter than the loudest place of a recording is black


def sound_settings():
    """The constants for sounds as common/sounds.py takes them.

    Raises:
        UserError: if no recording can be heard so.
    """
    names = ("SAMPLE_RATE", "SECONDS", "PADDING", "WINDOW", "HOP", "MELS", "DECIBELS")
    sound = {name.lower(): globals()[name] for name in names}
    check_settings(sound)
    return sound


def holds_sounds(paths):
    """Whether the files are recordings, not pictures; UserError if there are both."""
    sound, picture = (next(filter(kind, paths), None) for kind in (is_sound, is_image))
    if sound is not None and picture is not None:
        raise UserError(
            f"{sound} is a recording and {picture} a picture, and one network cannot learn both; keep one of the two "
            "kinds here, and the other in another folder"
        )
    return sound is not None


def check_picture(path, sound=None):
    """Read one file: (what the manifest holds of its content, "") or, if it cannot be used, (None, reason).

    Args:
        path: the file.
        sound: None for pictures; for recordings see common/sounds.py.
    """
    kind = file_kind(sound)
    if not kind.fits(path):
        return None, f"{path} is not named like a {kind.name} ({', '.join(kind.extensions)})"
    try:
        sums = level_sums(kind.load(path)).tolist()  # for mean_std.py, which then need not decode it once more
        content = dict(sha256=hash_file(path), bytes=path.stat().st_size, sums=sums)
    except ImageError as error:
        return None, str(error)
    return content if sound is None else content | dict(seconds=duration(path)), ""


def check_pictures(paths, workers, sound=None):
    """`check_picture` for every path, in parallel, in order."""
    workers = (os.cpu_count() or 1) if workers < 0 else workers
    bar = dict(total=len(paths), desc="checking", unit="file", leave=False)
    check_one = partial(check_picture, sound=sound)
    if workers < 2 or len(paths) < 64:  # a process is not worth starting for a few pictures
        return list(tqdm(map(check_one, paths), **bar))
    with ProcessPoolExecutor(min(workers, 61)) as pool:  # Windows allows no more than 61
        return list(tqdm(pool.map(check_one, paths, chunksize=16), **bar))


def find_duplicates(contents, name="picture"):
    """Group files by content.

    Args:
        contents: {path: SHA-256}.
        name: of what they hold.

    Returns:
        Lists of two or more paths that hold the same bytes.

    Raises:
        UserError: if one of them stands under two classes.
    """
    by_content = defaultdict(list)
    for path, content in contents.items():
        by_content[content].append(path)
    groups = [paths for paths in by_content.values() if len(paths) > 1]
    for paths in groups:
        other = next((path for path in paths if path.parent.name != paths[0].parent.name), None)
        if other is not None:
            raise UserError(f"{paths[0]} and {other} are the same {name} under two classes; delete the wrong one")
    return groups


def choose_val(contents, val_ratio, seed):
    """Choose the validation pictures of one class.

    Args:
        contents: SHA-256 of each picture of the class; equal ones count once.
        val_ratio: share to choose; at least one picture lands on either side.
        seed: any integer.

    Returns:
        The set of chosen SHA-256.
    """
    # A hash of content and seed is a random order that no file name, system or library version can change.
    order = sorted(set(contents), key=lambda content: hashlib.sha256(f"{seed}:{content}".encode()).hexdigest())
    count = min(max(round(len(order) * val_ratio), 1), len(order) - 1)
    return set(order[:count])


def find_foreign_file(target):
    """The first file in `target` that these scripts did not put there, or that was changed since; None if none is."""
    manifest = read_json(target / MANIFEST) if (target / MANIFEST).is_file() else {"files": []}
    try:
        ours = {file["path"]: (Path(file["source"]), file["bytes"], file["sha256"]) for file in manifest["files"]}
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{target / MANIFEST} is damaged, so it is unknown what {target} holds; move {target} away"
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
        if source.exists() and source.samefile(file):  # a change was made to both, and nothing is lost
            continue
        if file.stat().st_size != size or hash_file(file) != content:
            return file
    return None


def place(source, target, link):
    """Put `source` at `target` as a hard link where that is wanted and possible, else as a copy."""
    if link:
        try:
            os.link(source.resolve(), target)
            return
        except OSError:  # another drive, a file system without links, or no permission: a copy does the same
            pass
    shutil.copy2(source, target)


def main():
    source, target = Path(SOURCE), Path(TARGET)
    if not 0 < VAL_RATIO < 1:
        raise UserError(f"VAL_RATIO must lie between 0 and 1, got {VAL_RATIO}")
    if target.resolve().is_relative_to(source.resolve()):
        raise UserError(f"TARGET {target} must lie outside SOURCE {source}; set it to another folder")
    if VAL_GROUPS and not GROUP:
        raise UserError("VAL_GROUPS names groups, but GROUP does not say what a group is; set it, too")
    if DEMO:
        draw_demo(source)
    classes, beside = scan_class_folders(source)
    paths = [path for files in classes.values() for path in files]
    sound = sound_settings() if holds_sounds(paths) else None
    kind = file_kind(sound)
    if CHECK:
        from common.doctor import check

        return check(source, target, CHECK_NEAR, CHECK_OUTPUT, sound)

    results = check_pictures(paths, WORKERS, sound)
    left_out = [reason for _, reason in results if reason]
    left_out += [f"{path} does not lie in a class folder" for path in beside if kind.fits(path)]
    for reason in left_out:
        print(f"left out: {reason}")
    checked = {path: content for path, (content, reason) in zip(paths, results) if not reason}
    contents = {path: content["sha256"] for path, content in checked.items()}
    duplicates = find_duplicates(contents, kind.name)

    val = set()
    for name in classes:
        mine = {path: contents[path] for path in classes[name] if path in contents}
        if len(set(mine.values())) < 2:
            raise UserError(
                f"class {name!r} is too small to split (different usable {kind.name}s: {len(set(mine.values()))}); "
                f"put at least two into {source / name}, or remove the folder"
            )
        chosen = choose_val(mine.values(), VAL_RATIO, SEED)
        val |= {path for path, content in mine.items() if content in chosen}
    about = {} if sound is None else dict(sound=sound)
    if GROUP:
        val, groups = split_by_group(contents, GROUP, VAL_GROUPS, VAL_RATIO, SEED)
        about |= dict(group=GROUP, val_groups=groups)
    files = []
    for path, content in checked.items():
        place_in_target = f"{'val' if path in val else 'train'}/{path.parent.name}/{path.name}"
        files.append(dict(path=place_in_target, source=path.as_posix(), **content))

    replace_target(source, target, files, about)
    report(classes, files, duplicates)
    if sound is not None:
        print(f"\n{describe_lengths([file['seconds'] for file in files])}")
    if GROUP:
        print(f"\nvalidation is of {len(groups)} groups: {', '.join(groups[:24])}{', ...' if len(groups) > 24 else ''}")
    print(f"\n{len(files)} {kind.name}s in {target}, split with seed {SEED}")
    return 3 if left_out else 0


def draw_demo(source):
    """Draw the demo set into `source`, which must be empty."""
    from common.demo import SPECIES, draw_data_set

    if DEMO_IMAGES < 2:
        raise UserError(f"DEMO_IMAGES must be at least 2, one for each side, got {DEMO_IMAGES}")
    if source.is_dir() and any(entry.name != ".gitkeep" for entry in source.iterdir()):
        raise UserError(f"{source} is not empty, and --demo draws into an empty folder only; leave --demo out")
    drawing = draw_data_set(source, DEMO_IMAGES, seed=SEED)
    list(tqdm(drawing, total=DEMO_IMAGES * len(SPECIES), desc="drawing", unit="img", leave=False))


def describe_lengths(seconds):
    """One sentence on how long the recordings are, and how many are heard in part."""
    seconds = sorted(seconds)
    longer = sum(length > SECONDS for length in seconds)
    return (
        f"the recordings last {seconds[0]:.2f} to {seconds[-1]:.2f} s, half of them up to "
        f"{seconds[len(seconds) // 2]:.2f}; of {longer} only the first {SECONDS:g} s are heard (SECONDS)"
    )


def replace_target(source, target, files, about):
    """Build the new folder beside `target`, then swap: whoever stops this leaves the old or the new one, whole.

    Args:
        source, target: folders.
        files: what the manifest holds of each file.
        about: what it holds besides.
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
        for file in tqdm(files, desc="placing", unit="img", leave=False):
            destination = new / file["path"]
            destination.parent.mkdir(parents=True, exist_ok=True)
            place(Path(file["source"]), destination, LINK)
        manifest = dict(
            source=source.as_posix(),
            seed=SEED,
            val_ratio=VAL_RATIO,
            fingerprint=fingerprint(file["sha256"] for file in files),
            **about,
            files=files,
        )
        text = json.dumps(manifest, indent=1, ensure_ascii=False)
        # Names from another system's archive may be no UTF-8; their bytes are kept as they are.
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
    with contextlib.suppress(OSError):  # decoded pictures that are still right; else they are decoded again
        (old / CACHE).rename(target / CACHE)
    shutil.rmtree(old, ignore_errors=True)


def report(classes, files, duplicates):
    """Print which files are identical, and the table of classes."""
    for paths in duplicates:
        print(f"identical, kept on one side: {', '.join(map(str, paths))}")
    counts = {side: defaultdict(int) for side in ("train", "val")}
    for file in files:
        side, name, _ = file["path"].split("/", 2)
        counts[side][name] += 1
    width = max(len("class"), *map(len, classes))
    print(f"{'class':{width}}  train    val")
    for name in classes:
        print(f"{name:{width}}  {counts['train'][name]:5}  {counts['val'][name]:5}")
    print(f"{'total':{width}}  {sum(counts['train'].values()):5}  {sum(counts['val'].values()):5}")


if __name__ == "__main__":
    run(main)
