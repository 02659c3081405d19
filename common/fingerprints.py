"""Fingerprints of the images of a run: what has changed since a checkpoint, and which images stand on both sides.

An image is known by its class, its name and the SHA-256 of its file. The same pixels in other files (another format,
saved again) are other images here; `python makedata.py --check` finds those.
"""

import hashlib
import os
from collections import Counter
from pathlib import Path

import numpy as np
import torch

from common.columns import iterate
from common.contents import hash_contents, recall

MAX_FILES = 65_536  # images of which a checkpoint holds each one's hashes, 16 bytes, to say how many changed
MAX_READ = 200_000  # images without a known hash that are read for it; of more, a start would take too long
SHOWN = 3  # names in a message


def content_hashes(dataset, folder):
    """SHA-256 of each image's file, in the set's order.

    Args:
        dataset: a `CachedImageFolder`.
        folder: data/cache, where hashes are remembered.

    Returns:
        (uint8 array (images, 32), whether these are hashes). If more than `MAX_READ` images are unknown there, as
        without makedata.py and a cache, the sizes of the files stand for all of the hashes.
    """
    if len(dataset) > MAX_READ:
        known, stamps = recall(dataset.files, folder)
        if np.count_nonzero(~known.digests.any(1)) > MAX_READ:
            print(f"contents    of the images in {dataset.root} are compared by the sizes of the files only")
            sizes = np.zeros((len(dataset), 4), "<i8")
            sizes[:, 0] = stamps["size"]
            return sizes.view(np.uint8), False
    return hash_contents(dataset.files, folder).digests, True


def image_names(dataset):
    """<class>/<file> of each image, in the set's order; an iterator."""
    files = dataset.files
    return (f"{files.classes[label]}/{name}" for name, label in zip(files.names, iterate(files.labels)))


def fingerprint_images(folder, train_set, val_set):
    """What checkpoints hold of the images; prints a warning about validation images that are also trained on.

    Args:
        folder: data/cache.
        train_set, val_set: of type `CachedImageFolder`, with the same classes.

    Returns:
        {"train": dict, "val": dict}, see `fingerprint_part`.
    """
    sets = dict(train=train_set, val=val_set)
    contents, hashed = {}, {}
    for part, dataset in sets.items():
        contents[part], hashed[part] = content_hashes(dataset, folder)
    warning = describe_common(train_set, val_set, contents["train"], contents["val"]) if all(hashed.values()) else ""
    if warning:
        print(warning)
    return {part: fingerprint_part(dataset, contents[part], hashed[part]) for part, dataset in sets.items()}


def fingerprint_part(dataset, contents, hashed=True):
    """Fingerprints of one set of images.

    Args:
        dataset: a `CachedImageFolder`.
        contents, hashed: see `content_hashes`.

    Returns:
        dict of plain types: images, their number; hashed, whether contents are known, not only sizes; names and
        contents, a hash of all names and of all files, both in order; by_class: [number, hash of the files in any
        order] of each class; files: int64 tensor (images, 2), the first bytes of the hash of each name and each file,
        or None for more than `MAX_FILES` images.
    """
    labels = np.asarray(dataset.targets, "<i4")
    named, files = hashlib.sha256(), []
    for name in image_names(dataset):
        name = os.fsencode(name)
        named.update(name + b"\0")
        if len(labels) <= MAX_FILES:
            files.append(hashlib.sha256(name).digest()[:8])
    short = shorten(contents)
    ordered = short[np.lexsort((short, labels))]  # class by class
    ends = np.cumsum(np.bincount(labels, minlength=len(dataset.classes)))
    parts = (ordered[start:end] for start, end in zip([0, *ends], ends))
    by_class = [[len(part), hashlib.sha256(part.tobytes()).hexdigest()[:16]] for part in parts]
    table = np.stack([np.frombuffer(b"".join(files), "<i8"), short], 1) if files else None
    return dict(
        images=len(labels),
        hashed=hashed,
        names=named.hexdigest(),
        contents=hashlib.sha256(contents.tobytes() + labels.tobytes()).hexdigest(),
        by_class=by_class,
        files=None if table is None else torch.from_numpy(table),
    )


def shorten(contents):
    """The first eight bytes of each hash: uint8 array (images, 32) -> int64 array (images,)."""
    return np.ascontiguousarray(contents[:, :8]).view("<i8").ravel()


def describe_common(train_set, val_set, train_contents, val_contents):
    """A warning about validation images that are also trained on; "" if there is none.

    Args:
        train_set, val_set: of type `CachedImageFolder`.
        train_contents, val_contents: see `content_hashes`.
    """
    known, places = np.unique(shorten(train_contents), return_index=True)
    val = shorten(val_contents)
    indices = np.flatnonzero(np.isin(val, known))
    if not len(indices):
        return ""
    twins = places[np.searchsorted(known, val[indices])]
    pairs = [(val_set.files[i], train_set.files[j]) for i, j in zip(indices[:SHOWN], twins[:SHOWN])]
    named = ", ".join(f"{Path(one)} is {Path(other)}" for one, other in pairs)
    others = int((np.asarray(val_set.targets)[indices] != np.asarray(train_set.targets)[twins]).sum())
    named += ", ..." if len(indices) > SHOWN else ""
    elsewhere = f", {others} of them in another class" if others else ""
    return (
        f"warning: {len(indices)} of {len(val)} validation images are also training images{elsewhere} ({named}); "
        "accuracy on them says nothing about new images. Split by makedata.py, which keeps identical files on one "
        f"side, or remove them from {train_set.root}"
    )


def describe_change(old, new, classes):
    """How a set of images differs from that of a checkpoint.

    Args:
        old, new: see `fingerprint_part`.
        classes: names of the classes, the same for both.

    Returns:
        (text, whether classes and contents are others, whether they are in another order); text is "" if nothing
        differs.
    """
    if old["hashed"] != new["hashed"]:  # then only names can be compared
        others = old["names"] != new["names"]
        return "have other names" if others else "", others, others
    if (old["names"], old["contents"]) == (new["names"], new["contents"]):
        return "", False, False
    others = old["by_class"] != new["by_class"]
    details = []
    if old["files"] is not None and new["files"] is not None:
        details = count_changes(old, new)
    elif others:
        changed = [name for name, *pair in zip(classes, old["by_class"], new["by_class"]) if pair[0] != pair[1]]
        details = [f"{old['images']} before, {new['images']} now"]
        details += [f"in {', '.join(changed[:SHOWN])}{', ...' if len(changed) > SHOWN else ''}"]
    counts = f" ({', '.join(details)})" if details else ""
    text = f"are others{counts}" if others else f"are the same, under other names or in another order{counts}"
    return text, others, old["contents"] != new["contents"]


def count_changes(old, new):
    """What happened to how many images, in words: ["3 of 28 replaced", "1 removed"]; see `describe_change`."""
    before, after = map(read_rows, (old, new))
    counted, counted_now = Counter(before.values()), Counter(after.values())
    gone, come = counted - counted_now, counted_now - counted
    renamed = sum(before.get(name) != row and row not in come for name, row in after.items())
    moved = (count_contents(come) & count_contents(gone)).total()
    replaced = sum(name in before and row in come and before[name] in gone for name, row in after.items())
    replaced = min(replaced, come.total() - moved, gone.total() - moved)
    counts = {
        f"of {old['images']} replaced": replaced,
        "added": come.total() - moved - replaced,
        "removed": gone.total() - moved - replaced,
        "moved to another class": moved,
        "renamed": renamed,
    }
    return [f"{count} {action}" for action, count in counts.items() if count]


def read_rows(part):
    """{name: (label, content)} of a fingerprinted set, names and contents as hashes."""
    labels = np.repeat(np.arange(len(part["by_class"])), [count for count, _ in part["by_class"]])
    names, contents = part["files"].T.tolist()
    return dict(zip(names, zip(labels.tolist(), contents)))


def count_contents(counted):
    """Counter of the contents in a Counter of (label, content)."""
    contents = Counter()
    for (_, content), count in counted.items():
        contents[content] += count
    return contents
