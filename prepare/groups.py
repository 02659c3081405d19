"""Split by groups, given by the file names, such as all photographs of one plant or all recordings of one speaker.

Files of a group land on one side of the split. Otherwise a network is validated on plants or voices that it has seen in
training, and looks better than it is.
"""

import hashlib
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


def split_by_group(contents, pattern, val_groups, val_ratio, seed):
    """Split files by group.

    Args:
        contents: {path: SHA-256}; the name of a path's folder is its class.
        pattern: see `find_groups`.
        val_groups: the validation groups; []: see `choose_val_groups`.
        val_ratio, seed: see `choose_val_groups`.

    Returns:
        (set of the validation paths, sorted list of their groups).

    Raises:
        UserError: if `pattern` or `val_groups` do not fit the files.
    """
    paths = list(contents)
    groups = find_groups(paths, pattern)
    first = {}
    for path, content in contents.items():
        twin = first.setdefault(content, path)
        if groups[twin] != groups[path]:
            raise UserError(
                f"{twin} and {path} are identical, but belong to the groups {groups[twin]} and {groups[path]}; delete "
                "the wrong one"
            )
    counts = count_groups(paths, groups)
    unknown = [group for group in val_groups if group not in counts]
    if unknown:
        known = ", ".join([*counts][:24]) + (", ..." if len(counts) > 24 else "")
        raise UserError(f"VAL_GROUPS names {', '.join(unknown)}, which GROUP does not find; it finds {known}")
    chosen = set(val_groups) or choose_val_groups(counts, val_ratio, seed)
    missing = ~is_on_both_sides(counts, chosen)
    if missing.any():
        name = sorted({path.parent.name for path in paths})[missing.argmax()]
        raise UserError(
            f"with these groups one side would have no file of the class {name!r}; change GROUP or VAL_GROUPS, or "
            "add files of more groups"
        )
    return {path for path in paths if groups[path] in chosen}, sorted(chosen)


def find_groups(paths, pattern):
    """The group of each file: the first group of `pattern` in its name or, if it has none, the whole match.

    Args:
        paths: the files.
        pattern: compiled regular expression.

    Returns:
        {path: group}.

    Raises:
        UserError: if `pattern` does not match every name, or puts all files into one group.
    """
    found = {path: pattern.search(path.name) for path in paths}
    groups = {path: match[min(pattern.groups, 1)] for path, match in found.items() if match}
    lost = [path for path in paths if groups.get(path) is None]
    if lost:
        raise UserError(
            f"GROUP {pattern.pattern!r} finds nothing in {len(lost)} of {len(paths)} file names, such as {lost[0]}; "
            "change the pattern or the names"
        )
    if len(set(groups.values())) == 1:
        raise UserError(
            f"GROUP {pattern.pattern!r} puts all files into one group, {groups[paths[0]]!r}, and a split needs two; "
            "change the pattern"
        )
    return groups


def count_groups(paths, groups):
    """{group: int array (classes,) of its files in each class, the classes in the order of their names}."""
    classes = {name: number for number, name in enumerate(sorted({path.parent.name for path in paths}))}
    counts = {group: np.zeros(len(classes), int) for group in sorted(set(groups.values()))}
    for path in paths:
        counts[groups[path]][classes[path.parent.name]] += 1
    return counts


def choose_val_groups(counts, val_ratio, seed):
    """Choose validation groups so that each class comes as close to `val_ratio` as whole groups allow.

    Greedy, in a random order: a group is taken if it reduces the sum of squares of what the classes still lack. The
    best of `ORDERS` orders is used.

    Args:
        counts: see `count_groups`.
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
