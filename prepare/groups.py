"""Split by groups, given by the file names, such as all photographs of one plant or all recordings of one speaker.

Files of a group land on one side of the split. Otherwise a network is validated on plants or voices that it has seen in
training, and looks better than it is.
"""

import hashlib
import os
import re

import numpy as np

from common.options import ConstantError, UserError

ORDERS = 50  # random orders in which the groups are tried


def compile_group(pattern):
    """The constant GROUP as a compiled regular expression.

    Raises:
        ConstantError: if it is not one.
    """
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ConstantError(f"GROUP must be a regular expression ({error}), got {pattern!r}") from error


def split_by_group(files, contents, pattern, val_groups, val_ratio, seed):
    """Split files by group.

    Args:
        files: a `common.columns.Files`.
        contents: `common.columns.Hashes`, the content of each.
        pattern: see `find_groups`.
        val_groups: the validation groups; []: see `choose_val_groups`.
        val_ratio, seed: see `choose_val_groups`.

    Returns:
        (bool array (files,): the validation files, sorted list of their groups).

    Raises:
        UserError: if `pattern` or `val_groups` do not fit the files.
    """
    groups = find_groups(files, pattern)
    names = sorted(set(groups))
    number = {name: place for place, name in enumerate(names)}
    groups = np.array([number[group] for group in groups])
    # Files of equal content stand one after the other.
    keys = contents.keys()
    order = np.argsort(keys, kind="stable")
    first, second = order[:-1], order[1:]
    split = np.flatnonzero((keys[first] == keys[second]) & (groups[first] != groups[second]))
    if len(split):
        twin, other = first[split[0]], second[split[0]]
        raise UserError(
            f"{files[twin]} and {files[other]} are identical, but belong to the groups {names[groups[twin]]} and "
            f"{names[groups[other]]}; delete the wrong one"
        )
    table = np.zeros((len(names), len(files.classes)), int)
    np.add.at(table, (groups, files.labels), 1)
    counts = dict(zip(names, table))
    unknown = [group for group in val_groups if group not in counts]
    if unknown:
        known = ", ".join(names[:24]) + (", ..." if len(names) > 24 else "")
        raise UserError(f"VAL_GROUPS names {', '.join(unknown)}, which GROUP does not find; it finds {known}")
    chosen = set(val_groups) or choose_val_groups(counts, val_ratio, seed)
    missing = ~is_on_both_sides(counts, chosen)
    if missing.any():
        name = files.classes[missing.argmax()]
        raise UserError(
            f"with these groups one side would have no file of the class {name!r}; change GROUP or VAL_GROUPS, or "
            "add files of more groups"
        )
    return np.isin(groups, [number[group] for group in chosen]), sorted(chosen)


def find_groups(paths, pattern):
    """The group of each file: the first group of `pattern` in its name or, if it has none, the whole match.

    Args:
        paths: the files.
        pattern: compiled regular expression.

    Returns:
        list of the groups, in which equal ones are the same object.

    Raises:
        UserError: if `pattern` does not match every name, or puts all files into one group.
    """
    groups, seen, lost = [], {}, []
    for path in paths:
        match = pattern.search(os.path.basename(path))
        group = match and match[min(pattern.groups, 1)]
        if group is None:
            lost.append(path)
        else:
            groups.append(seen.setdefault(group, group))
    if lost:
        raise UserError(
            f"GROUP {pattern.pattern!r} finds nothing in {len(lost)} of {len(paths)} file names, such as {lost[0]}; "
            "change the pattern or the names"
        )
    if len(seen) == 1:
        raise UserError(
            f"GROUP {pattern.pattern!r} puts all files into one group, {groups[0]!r}, and a split needs two; "
            "change the pattern"
        )
    return groups


def choose_val_groups(counts, val_ratio, seed):
    """Choose validation groups so that each class comes as close to `val_ratio` as whole groups allow.

    Greedy, in a random order: a group is taken if it reduces the sum of squares of what the classes still lack. The
    best of `ORDERS` orders is used.

    Args:
        counts: {group: int array (classes,) of its files in each class}.
        val_ratio: fraction of each class to choose; at least one file lands on either side.
        seed: any integer.

    Returns:
        The set of chosen groups; empty if no order leaves files of every class on both sides.
    """
    total = sum(counts.values())
    best, nearest = set(), np.inf
    for number in range(ORDERS):

        def shuffled(group, number=number):
            return hashlib.sha256(f"{seed}:{number}:{group}".encode(errors="surrogateescape")).hexdigest()

        chosen, lacking = set(), val_ratio * total
        for group in sorted(counts, key=shuffled):
            rest = lacking - counts[group]
            if rest @ rest < lacking @ lacking:
                chosen.add(group)
                lacking = rest
        if lacking @ lacking < nearest and is_on_both_sides(counts, chosen).all():
            best, nearest = chosen, lacking @ lacking
    return best


def is_on_both_sides(counts, chosen):
    """Whether training and validation have files of each class: bool array (classes,), for `chosen` of the groups."""
    total = sum(counts.values())
    val = sum((counts[group] for group in chosen), start=0 * total)
    return (0 < val) & (val < total)
