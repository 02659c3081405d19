"""Published weights: from the cache of the Hugging Face Hub, or downloaded; a hub that cannot be reached is no wait.

The environment variable HF_ENDPOINT names another address of the hub, such as https://hf-mirror.com in mainland China.
"""

import ssl
import urllib.error
import urllib.request
from pathlib import Path

import timm
from huggingface_hub import constants, try_to_load_from_cache

from common.options import UserError

TIMEOUT = 10  # s within which a server must answer; huggingface_hub asks six times for each of several files
FILES = ("model.safetensors", "pytorch_model.bin")  # of timm's weights in the hub


def published_network(name, remedy, **arguments):
    """timm's network `name` with its published weights.

    Args:
        name: such as "resnet50.a1_in1k".
        remedy: what to do with a file that was downloaded by hand, or else instead.
        arguments: further ones of `timm.create_model`.

    Raises:
        UserError: at once if the hub cannot be reached; if the download fails.
    """
    about = timm.get_pretrained_cfg(name)
    cached = None if about.custom_load else find_in_cache(about)
    if cached:
        return timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=cached), **arguments)
    return download(describe_source(about), remedy, timm.create_model, name, pretrained=True, **arguments)


def find_in_cache(about):
    """Path of the weights that an earlier download left; None if there are none.

    Args:
        about: timm's `PretrainedCfg`.
    """
    if not about.hf_hub_id:
        return None
    repository, _, revision = about.hf_hub_id.partition("@")
    names = [about.hf_hub_filename] if about.hf_hub_filename else FILES
    found = (try_to_load_from_cache(repository, name, revision=revision or None) for name in names)
    return next((path for path in found if isinstance(path, str)), None)


def describe_source(about):
    """(name of the file, address of the page that has it) of published weights."""
    if about.hf_hub_id:
        return about.hf_hub_filename or FILES[0], f"{constants.ENDPOINT}/{about.hf_hub_id}"
    return Path(about.url).name, about.url.rpartition("/")[0]


def download(source, remedy, function, *arguments, **options):
    """What `function(*arguments, **options)` returns, which downloads.

    Args:
        source: (what is downloaded, address of the page that has it).
        remedy: see `published_network`.

    Raises:
        UserError: if that fails.
    """
    what, address = source
    try:
        if not can_reach(address):
            raise ConnectionError("it cannot be reached")
        return function(*arguments, **options)
    except Exception as error:  # a proxy, a hub that is down, a file that is gone: many kinds
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        mirror = ", or set the environment variable HF_ENDPOINT=https://hf-mirror.com"
        raise UserError(
            f"cannot download {what} from {address} ({reason}); {remedy}"
            f"{mirror if address.startswith(constants.ENDPOINT) else ''}"
        ) from error


def can_reach(address):
    """Whether a server answers, by way of the proxies that the environment names."""
    if any(kind == "all" or place.startswith("socks") for kind, place in urllib.request.getproxies().items()):
        return True  # urllib does not know these
    try:
        request = urllib.request.Request(address, method="HEAD", headers={"User-Agent": "UniRepLKNet-Demo"})
        urllib.request.urlopen(request, timeout=TIMEOUT).close()
    except urllib.error.HTTPError:  # which is an answer, too
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # of certificates that other clients may know
    except (OSError, ValueError):
        return False
    return True
