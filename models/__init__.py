"""Importing this package registers the nine UniRepLKNet variants with timm: `timm.create_model("unireplknet_t")`."""

from models.depthwise import DepthwiseConv2d, describe_implementation
from models.pretrained import load_weights
from models.unireplknet import *  # noqa: F403  the network, its blocks and the nine constructors
