"""A tiny UniRepLKNet for tests, whose checkpoints take 1 MB instead of 70; as a script, train.py with it registered.

    python tests/tiny.py --model unireplknet_test --img-size 32
"""

import os
import sys
from functools import partial
from pathlib import Path

from timm.models import register_model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import train
from common import checkpoint, distributed
from common.options import run
from models.unireplknet import VARIANTS, create_unireplknet

VARIANTS["unireplknet_test"] = dict(
    depths=(1, 1, 2, 1), dims=(8, 16, 16, 32), kernel_sizes=((3,), (13,), (13, 3), (7,))
)


@register_model
def unireplknet_test(pretrained=False, **kwargs):
    return create_unireplknet("unireplknet_test", pretrained, **kwargs)


if __name__ == "__main__":
    checkpoint.PAUSES = (0.1, 0.1)  # a test of a full disk need not wait for half a minute
    if "TEST_HOST" in os.environ:  # one computer plays several machines
        distributed.host_name = partial(os.environ.get, "TEST_HOST")
    run(train.main, closed_output="ignore", fail=distributed.fail)
