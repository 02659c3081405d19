"""Packages that only some tools need; requirements-extra.txt lists them."""

import importlib

from common.options import UserError

PACKAGES = {"pillow_heif": "pillow-heif"}  # modules that pip knows by another name


def require(*modules, task=()):
    """Import optional modules.

    Args:
        modules: their names, such as "onnxruntime.quantization"; pip calls a package by the first part.
        task: modules that the same task may need later; they are imported, and named, only if one of `modules` is
            missing, so that nobody installs one package after the other.

    Returns:
        List of the modules.

    Raises:
        UserError: if some cannot be imported; it names all of them.
    """
    found, missing = [], {}
    for number, name in enumerate((*modules, *task)):
        if number >= len(modules) and not missing:
            break
        try:
            found.append(importlib.import_module(name))
        except (ImportError, OSError) as error:  # OSError: a system library that the package needs is missing
            package = name.split(".")[0]
            missing[PACKAGES.get(package, package)] = error
    if missing:
        packages, reasons = " ".join(missing), "; ".join(map(str, missing.values()))
        what = "packages" if len(missing) > 1 else "package"
        raise UserError(f"this needs the {what} {packages} ({reasons}); pip install {packages}")
    return found
