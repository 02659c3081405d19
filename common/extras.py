"""Packages that only some tools need; requirements-extra.txt lists them."""

import importlib

from common.options import UserError


def require(module, package=None):
    """Import an optional module.

    Args:
        module: its name, such as "onnxruntime.quantization".
        package: what pip calls it; None: the first part of `module`.

    Raises:
        UserError: if it cannot be imported.
    """
    package = package or module.split(".")[0]
    try:
        return importlib.import_module(module)
    except (ImportError, OSError) as error:  # OSError: a system library that the package needs is missing
        raise UserError(f"this needs the package {package} ({error}); pip install {package}") from error
