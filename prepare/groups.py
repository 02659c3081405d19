"""Split by groups, given by the file names, such as all photographs of one plant or all recordings of one speaker.

Files of a group land in one part: training, validation or test. Otherwise a network is validated on plants or voices
that it has seen in training, and looks better than it is.
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


def split_by_group(files, contents, groups, named, ratios, seed):
    """Split files by group.

    Args:
        files: a `common.columns.Files`.
        contents: `common.columns.Hashes`, the content of each.
        groups: the group of each, see `find_groups`.
        named: (validation groups, test groups), two lists; []: see `choose_groups`.
        ratios: (fraction of each class to validate on, fraction to test on); 0: none.
        seed: see `choose_groups`.

    Returns:
        (int8 array (files,): the index in `PARTS` of each, [sorted validation groups, sorted test groups]).

    Raises:
        UserError: if `groups` or `named` do not fit the files.
    """
    names = sorted(set(groups))
    if len(names) == 1:
        raise UserError(
            f"all files are in one group, {names[0]!r}, and a split needs two or more; change the column group"
        )
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
    for constant, chosen in zip(("VAL_GROUPS", "TEST_GROUPS"), named):
        unknown = [group for group in chosen if group not in counts]
        if unknown:
            known = ", ".join(names[:24]) + (", ..." if len(names) > 24 else "")
            raise UserError(f"{constant} names {', '.join(unknown)}, which GROUP does not find; it finds {known}")
    chosen = choose_groups(counts, ratios, seed, named)
    missing = ~is_in_every_part(counts, *filter(None, chosen))
    if missing.any() or not chosen[0]:
        name = files.classes[missing.argmax()]
        raise UserError(
            f"with these groups one side would have no file of the class {name!r}; change the groups (GROUP, or the "
            "column group) or VAL_GROUPS, or add files of more groups"
        )
    parts = np.zeros(len(groups), np.int8)
    for part, some in enumerate(chosen, start=1):
        parts[np.isin(groups, [number[group] for group in some])] = part
    return parts, list(map(sorted, chosen))


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


def choose_groups(counts, ratios, seed, named=((), ())):
    """Choose validation and test groups so that each class comes as close to the ratios as whole groups allow.

    Greedy, in a random order: a group is taken if it reduces the sum of squares of what the classes still lack. The
    best of `ORDERS` orders is used.

    Args:
        counts: {group: int array (classes,) of its files in each class}.
        ratios: fraction of each class to choose for each part; at least one file is in every part. 0: no such part.
        seed: any integer.
        named: groups of each part that are chosen already; empty: to be chosen.

    Returns:
        A set of groups for each ratio; all empty if no order leaves files of every class in every part.
    """
    total = sum(counts.values())
    best, nearest = [set(some) for some in named[: len(ratios)]], np.inf
    if all(some or not ratio for some, ratio in zip(named, ratios)):
        return best
    free = counts.keys() - set().union(*named)
    for number in range(ORDERS):

        def shuffled(group, number=number):
            return hashlib.sha256(f"{seed}:{number}:{group}".encode(errors="surrogateescape")).hexdigest()

        left, chosen, error = sorted(free, key=shuffled), [], 0.0
        for ratio, some in zip(ratios, named):
            taken, lacking = set(some), ratio * total
            for group in left if ratio and not some else ():
                rest = lacking - counts[group]
                if rest @ rest < lacking @ lacking:
                    taken.add(group)
                    lacking = rest
            if ratio and left and not taken:  # each group is more than twice as large as the part
                taken = {min(left, key=lambda group, lacking=lacking: np.sum((lacking - counts[group]) ** 2))}
                lacking = lacking - counts[next(iter(taken))]
            error += 0 if some else lacking @ lacking
            left = [group for group in left if group not in taken]
            chosen.append(taken)
        wanted = [taken for taken, ratio, some in zip(chosen, ratios, named) if ratio or some]
        if error < nearest and is_in_every_part(counts, *wanted).all():
            best, nearest = chosen, error
    return best if nearest < np.inf else [set() for _ in ratios]


def is_in_every_part(counts, *chosen):
    """Whether all of the `chosen` sets of groups, and the rest, have files of each class: bool array (classes,)."""
    total = sum(counts.values())
    parts = [sum((counts[group] for group in some), start=0 * total) for some in chosen]
    return np.all([0 < part for part in (*parts, total - sum(parts, start=0 * total))], axis=0) & (len(chosen) > 0)
