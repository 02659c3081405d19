"""What is known of each of a million files, in a few arrays instead of millions of Python objects.

A list of a million paths takes 130 MB, and each process that reads from it gets a copy of its own, since counting
references writes into every object. The arrays here take 30 MB, are shared by processes that fork, and are sent to
others as they are.
"""

import hashlib
import os
from array import array
from collections.abc import Sequence

import numpy as np

UNKNOWN = "0" * 64  # hex digits of a hash that is not known


class Texts(Sequence):
    """A sequence of str, such as file names, in two arrays.

    Args:
        texts: any iterable of str.
    """

    def __init__(self, texts=()):
        data, ends = bytearray(), array("q", [0])
        for text in texts:
            data += os.fsencode(text)
            ends.append(len(data))
        # Copies, which are not longer than need be.
        self.data = np.array(np.frombuffer(data, np.uint8))  # uint8 (bytes,)
        self.ends = np.array(np.frombuffer(ends, np.int64))  # int64 (texts + 1,), the first one is 0

    @classmethod
    def join(cls, columns):
        """One `Texts` of several."""
        joined, columns = cls(), list(columns)
        joined.data = np.concatenate([joined.data, *(column.data for column in columns)])
        lengths = np.concatenate([[0], *(np.diff(column.ends) for column in columns)])
        joined.ends = np.cumsum(lengths, dtype=np.int64)
        return joined

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, index):
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                return Texts(self[i] for i in range(start, stop, step))
            part, stop = Texts(), max(start, stop)
            part.data = self.data[self.ends[start] : self.ends[stop]]
            part.ends = self.ends[start : stop + 1] - self.ends[start]
            return part
        return os.fsdecode(self.data[slice(*self.bounds(index))].tobytes())

    def bounds(self, index):
        """Where text `index` begins and ends in `data`."""
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index = index % len(self)
        return self.ends[index], self.ends[index + 1]

    def __iter__(self):
        data, ends = self.data.tobytes(), self.ends
        for block in range(0, len(self), 4096):  # as Python numbers, which are faster one by one
            some = ends[block : block + 4097].tolist()
            for start, end in zip(some, some[1:]):
                yield os.fsdecode(data[start:end])


class Files(Sequence):
    """Paths of files in class folders, root/<class>/<name>, each a str.

    Args:
        root: the folder that holds the class folders, as str.
        classes: their names.
        names: `Texts`, the name of each file.
        labels: int array (files,): the class of each.

    Attributes:
        parts, groups: of files that a table lists, see `prepare.labels.LabelledFiles`; None.
    """

    parts = groups = None

    def __init__(self, root, classes, names, labels):
        self.root = root
        self.classes = classes
        self.names = names
        self.labels = labels

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        if isinstance(index, slice):
            return Files(self.root, self.classes, self.names[index], self.labels[index])
        return os.path.join(self.folder(self.labels[index]), self.names[index])

    def __iter__(self):
        folders = [self.folder(label) for label in range(len(self.classes))]
        for name, label in zip(self.names, iterate(self.labels)):
            yield os.path.join(folders[label], name)

    def folder(self, label):
        """Folder of a class."""
        return self.classes[label] if self.root == os.curdir else os.path.join(self.root, self.classes[label])

    def choose(self, indices):
        """The `Files` of these indices, an int array."""
        if len(indices) and (np.diff(indices) == 1).all():
            return self[int(indices[0]) : int(indices[-1]) + 1]
        return Files(
            self.root, self.classes, Texts(self.names[index] for index in iterate(indices)), self.labels[indices]
        )


class Hashes(Sequence):
    """SHA-256 of many files, each a str of 64 hex digits; "" where it is not known.

    Args:
        digests: uint8 array (files, 32); zeros where it is not known.
    """

    def __init__(self, digests):
        self.digests = digests

    @classmethod
    def from_hex(cls, texts):
        """From an iterable of hex digits; ValueError if they are not those of SHA-256."""
        digests = bytearray()
        for text in texts:
            digest = bytes.fromhex(text or UNKNOWN)
            if len(digest) != 32:
                raise ValueError(f"{text} is no SHA-256")
            digests += digest
        return cls(np.frombuffer(bytes(digests), np.uint8).reshape(-1, 32))

    def __len__(self):
        return len(self.digests)

    def __getitem__(self, index):
        if isinstance(index, (slice, np.ndarray)):
            return Hashes(self.digests[index])
        return self.digests[index].tobytes().hex() if self.digests[index].any() else ""

    def __iter__(self):
        for start in range(0, len(self), 4096):
            text = self.digests[start : start + 4096].tobytes().hex()
            for place in range(0, len(text), 64):
                digits = text[place : place + 64]
                yield "" if digits == UNKNOWN else digits

    def keys(self):
        """The hashes as an array (files,) of NumPy's bytes type, which sorts as the hex digits do."""
        return np.ascontiguousarray(self.digests).view("S32").ravel()


def iterate(values, block=4096):
    """Each value of an array as a plain Python one, without a list of all."""
    for start in range(0, len(values), block):
        yield from values[start : start + block].tolist()


def find(keys, among):
    """Where each of `keys` stands in `among`: int array (keys,); -1 if it is not there.

    Args:
        keys, among: arrays of one bytes type of fixed length.
    """
    if not len(among):
        return np.full(len(keys), -1)
    order = np.argsort(among, kind="stable")
    place = np.searchsorted(among, keys, sorter=order)
    place = order[np.minimum(place, len(among) - 1)]
    return np.where(among[place] == keys, place, -1)


def digest_texts(texts):
    """A short hash of each text, with which `find` finds it: array (texts,) of 16 bytes each."""
    digests = bytearray()
    for text in texts:
        digests += hashlib.blake2b(os.fsencode(text), digest_size=16).digest()
    return np.frombuffer(bytes(digests), "S16")
