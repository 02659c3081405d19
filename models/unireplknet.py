"""UniRepLKNet: a large-kernel ConvNet (Ding et al., CVPR 2024, arXiv:2311.15599).

The network of https://github.com/AILab-CVC/UniRepLKNet (Apache-2.0), with the same `state_dict` names, order and
shapes, so that the released checkpoints load, and the same numbers. Each block is a large depthwise convolution with
parallel dilated branches, squeeze-and-excitation, and a two-layer MLP with global response normalisation; for
inference `fuse()` merges every batch norm, branch and scale into plain convolutions and linear layers. The depthwise
convolution is in `models/depthwise.py`, GRN in `models/grn.py`, the loading of weights in `models/pretrained.py`.

Deliberate differences from the authors' file: nothing is printed, unknown arguments raise, merging computes in float64
and leaves the original block unchanged, gradient checkpointing counts each batch once in the batch-norm statistics,
and under bfloat16 autocast the residual stream and GRN stay in bfloat16 (see `published_arithmetic`).

    import timm, models                                                      # models registers the variants with timm
    model = timm.create_model("unireplknet_t", num_classes=12)               # training structure
    model.reparameterize_unireplknet()                                       # inference structure, in place
    merged = timm.utils.reparameterize_model(model)                          # the same, into a copy
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.fx
import torch.nn.functional as F
from timm.layers import DropPath, LayerNorm2d, SelectAdaptivePool2d
from timm.models import build_model_with_cfg, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.depthwise import DepthwiseConv2d, convolve_together, is_stacked, lay_out_stream
from models.depthwise_methods import unstack
from models.grn import GRN, PublishedGRN
from models.pretrained import checkpoint_filter_fn, default_cfgs  # noqa: F401  timm looks for default_cfgs here

# timm adds the nine constructors.
__all__ = ["VARIANTS", "UniRepLKNet", "UniRepLKNetBlock", "DilatedReparamBlock"]

# Large kernel -> (kernel, dilation) of each parallel branch (paper, Section 3.2 and appendix).
DILATED_BRANCHES = {
    7: ((5, 1), (3, 2), (3, 3)),
    9: ((5, 1), (5, 2), (3, 3), (3, 4)),
    11: ((5, 1), (5, 2), (3, 3), (3, 4), (3, 5)),
    13: ((5, 1), (7, 2), (3, 3), (3, 4), (3, 5)),
    15: ((5, 1), (7, 2), (3, 3), (3, 5), (3, 7)),
    17: ((5, 1), (9, 2), (3, 4), (3, 5), (3, 7)),
}
SINGLE_KERNELS = (3, 5)  # too small for dilated branches: one convolution


def fold_bn(weight: torch.Tensor, bias: torch.Tensor | int, bn: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """Fold a batch norm with running statistics into the layer before it.

    Args:
        weight: (C_out, ...) weight of a convolution or linear layer.
        bias: (C_out,) its bias, or 0.
        bn: `nn.BatchNorm2d` or `nn.SyncBatchNorm` over C_out channels.

    Returns:
        (weight, bias) of the single equivalent layer, in float64 on the CPU.
    """
    mean, var, gain, shift = map(to_float64, (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    scale = gain / torch.sqrt(var + bn.eps)
    weight = to_float64(weight)
    bias = to_float64(bias) if torch.is_tensor(bias) else bias
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift + (bias - mean) * scale


def embed_dilated(kernel: torch.Tensor, dilation: int, size: int) -> torch.Tensor:
    """Write a dilated kernel as an undilated one: (C, 1, k, k) -> (C, 1, size, size), zeros between the taps."""
    extent = (kernel.shape[-1] - 1) * dilation + 1
    assert extent <= size, f"a kernel of extent {extent} does not fit into {size}"
    start = (size - extent) // 2
    taps = slice(start, start + extent, dilation)
    embedded = kernel.new_zeros(kernel.shape[0], 1, size, size)
    embedded[:, :, taps, taps] = kernel
    return embedded


def to_float64(tensor: torch.Tensor) -> torch.Tensor:
    """A detached float64 copy on the CPU, since not every device has float64."""
    return tensor.detach().to("cpu", torch.float64)


@contextlib.contextmanager
def frozen_statistics(module: nn.Module) -> Iterator[None]:
    """Within this context batch norms still normalise with the batch, but do not update their running statistics."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    before = [(norm.momentum, norm.num_batches_tracked.clone()) for norm in norms]
    for norm in norms:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, (momentum, num_batches_tracked) in zip(norms, before):
            norm.momentum = momentum
            norm.num_batches_tracked.copy_(num_batches_tracked)


def scale_layer(y: torch.Tensor, gamma: torch.Tensor, keep_bfloat16: bool) -> torch.Tensor:
    """gamma * y for y (N, C, H, W) and gamma (C,), by PyTorch's rules for mixed dtypes, or in bfloat16 where y is."""
    if keep_bfloat16 and y.dtype == torch.bfloat16:
        gamma = gamma.to(y.dtype)  # a float32 gamma would turn everything from here on to float32
    return gamma.view(1, -1, 1, 1) * y


def add_residual(x: torch.Tensor, y: torch.Tensor, keep_bfloat16: bool) -> torch.Tensor:
    """x + y for x, y (N, C, H, W), by PyTorch's rules for mixed dtypes, or in bfloat16 where y is."""
    if keep_bfloat16 and y.dtype == torch.bfloat16:
        x = x.to(y.dtype)
    return x + y


def are_alike(norms: Sequence[nn.Module]) -> bool:
    """Whether these are batch norms in training mode with the same settings, as `add_normalised` needs them."""
    kinds = {(type(norm), norm.training, getattr(norm, "momentum", None)) for norm in norms}
    return len(kinds) == 1 and kinds.pop()[:2] == (nn.BatchNorm2d, True) and norms[0].momentum is not None


def add_normalised(x: torch.Tensor, norms: Sequence[nn.BatchNorm2d]) -> torch.Tensor:
    """Sum of several batch norms in training mode, each of its own tensor, as if it were one batch norm.

    Args:
        x: (C, number of norms, values of a channel).

    Returns:
        (C, values of a channel).
    """
    parts = ("weight", "bias", "running_mean", "running_var")
    weight, bias, mean, var = (torch.stack([getattr(norm, part) for norm in norms], 1).flatten() for part in parts)
    out = F.batch_norm(x.view(1, -1, x.shape[2]), mean, var, weight, bias, True, norms[0].momentum, norms[0].eps)
    with torch.no_grad():
        for index, norm in enumerate(norms):
            norm.running_mean.copy_(mean[index :: len(norms)])
            norm.running_var.copy_(var[index :: len(norms)])
            norm.num_batches_tracked.add_(1)
    return out.view(x.shape).sum(1)


# torch.fx stores calls of these instead of tracing their tests of the dtype.
torch.fx.wrap("scale_layer")
torch.fx.wrap("add_residual")
torch.fx.wrap("lay_out_stream")


class SEBlock(nn.Module):
    """Squeeze-and-excitation (arXiv:1709.01507): (N, C, H, W) -> (N, C, H, W), each channel scaled by 0 to 1."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.down = nn.Conv2d(dim, hidden_dim, kernel_size=1)
        self.up = nn.Conv2d(hidden_dim, dim, kernel_size=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = x.mean((2, 3))  # (N, C), on which a convolution of 1 x 1 is a linear layer, and faster as one
        scale = F.linear(scale, self.down.weight.flatten(1), self.down.bias)
        scale = F.linear(F.relu(scale), self.up.weight.flatten(1), self.up.bias)
        return x * torch.sigmoid(scale)[:, :, None, None]


class NCHWtoNHWC(nn.Module):
    """(N, C, H, W) -> (N, H, W, C), a view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 2, 3, 1)


class NHWCtoNCHW(nn.Module):
    """(N, H, W, C) -> (N, C, H, W), a view."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.permute(0, 3, 1, 2)


class DilatedReparamBlock(nn.Module):
    """Dilated Reparam Block (paper, Section 3.2): (N, C, H, W) -> (N, C, H, W).

    The sum of a large depthwise convolution and of small dilated ones, each with its batch norm. Together they equal
    one large convolution, which is what the merged structure (`deploy=True`) holds.

    Args:
        dim: C.
        kernel_size: size of the large kernel, a key of `DILATED_BRANCHES`.
        deploy: True builds the merged structure: no branches, no batch norms.
        attempt_use_lk_impl: see `DepthwiseConv2d`.
        norm_layer: class of the batch norms.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        deploy: bool = False,
        attempt_use_lk_impl: bool | str = True,
        norm_layer: Callable[[int], nn.Module] = nn.BatchNorm2d,
    ):
        super().__init__()
        self.kernel_size = kernel_size
        self.branches = () if deploy else DILATED_BRANCHES[kernel_size]
        self.lk_origin = DepthwiseConv2d(dim, kernel_size, bias=deploy, attempt_use_lk_impl=attempt_use_lk_impl)
        self.origin_bn = nn.Identity() if deploy else norm_layer(dim)
        for k, r in self.branches:
            self.add_module(f"dil_conv_k{k}_{r}", DepthwiseConv2d(dim, k, r, attempt_use_lk_impl=attempt_use_lk_impl))
            self.add_module(f"dil_bn_k{k}_{r}", norm_layer(dim))

    def branch(self, k: int, r: int) -> tuple[nn.Module, nn.Module]:
        """The convolution and the batch norm of the branch with kernel size `k` and dilation `r`."""
        return self.get_submodule(f"dil_conv_k{k}_{r}"), self.get_submodule(f"dil_bn_k{k}_{r}")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.branches and is_stacked(x, self.lk_origin):
            convs, norms = zip((self.lk_origin, self.origin_bn), *(self.branch(k, r) for k, r in self.branches))
            if are_alike(norms):
                return unstack(add_normalised(convolve_together(x, convs), norms), x.shape)
        x = self.lk_origin.lay_out(x)  # once for all branches
        out = self.origin_bn(self.lk_origin(x))
        for k, r in self.branches:
            conv, bn = self.branch(k, r)
            out = out + bn(conv(x))
        return out

    def merged(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The single convolution that equals all branches: weight (C, 1, k, k) and bias (C,), float64 on the CPU."""
        kernel, bias = fold_bn(self.lk_origin.weight, 0, self.origin_bn)
        for k, r in self.branches:
            conv, bn = self.branch(k, r)
            branch_kernel, branch_bias = fold_bn(conv.weight, 0, bn)
            kernel = kernel + embed_dilated(branch_kernel, r, self.kernel_size)
            bias = bias + branch_bias
        return kernel, bias


class UniRepLKNetBlock(nn.Module):
    """One residual block (paper, Figure 2): (N, C, H, W) -> (N, C, H, W).

    x + drop_path(gamma * pwconv2(GRN(GELU(pwconv1(SE(norm(dwconv(x))))))))

    Args:
        dim: C.
        kernel_size: size of the depthwise kernel: 3 or 5 (one convolution), 7 to 17 odd (`DilatedReparamBlock`).
        drop_path: probability that an image skips the residual branch in training.
        layer_scale_init_value: initial value of gamma; None or 0 means no layer scale.
        deploy: True builds the merged structure.
        attempt_use_lk_impl: see `DepthwiseConv2d`.
        with_cp: gradient checkpointing: less memory, for a second forward pass.
        use_sync_bn: batch norms that synchronise over processes.
        ffn_factor: width of the MLP as a multiple of C.
        published_arithmetic: see `UniRepLKNet`.

    Raises:
        ValueError: for a kernel size that the paper does not define.
    """

    def __init__(
        self,
        dim: int,
        kernel_size: int,
        *,
        drop_path: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        deploy: bool = False,
        attempt_use_lk_impl: bool | str = True,
        with_cp: bool = False,
        use_sync_bn: bool = False,
        ffn_factor: float = 4,
        published_arithmetic: bool = False,
    ):
        super().__init__()
        # What `fuse` needs to build the merged twin.
        self.config = dict(
            dim=dim,
            kernel_size=kernel_size,
            attempt_use_lk_impl=attempt_use_lk_impl,
            ffn_factor=ffn_factor,
            published_arithmetic=published_arithmetic,
        )
        self.deploy = deploy
        self.with_cp = with_cp
        grn = PublishedGRN if published_arithmetic else GRN
        self.keep_bfloat16 = not published_arithmetic
        # The merged structure has norms, layer scale and GRN bias in the biases of its convolution and linear layer.
        norm_layer = nn.Identity if deploy else nn.SyncBatchNorm if use_sync_bn else nn.BatchNorm2d
        if deploy:
            layer_scale_init_value = None
        ffn_dim = int(ffn_factor * dim)

        if kernel_size in DILATED_BRANCHES:
            self.dwconv = DilatedReparamBlock(dim, kernel_size, deploy, attempt_use_lk_impl, norm_layer)
        elif kernel_size in SINGLE_KERNELS:
            self.dwconv = DepthwiseConv2d(dim, kernel_size, bias=deploy, attempt_use_lk_impl=attempt_use_lk_impl)
        else:
            choices = ", ".join(map(str, (*SINGLE_KERNELS, *DILATED_BRANCHES)))
            raise ValueError(f"kernel_size must be one of {choices}, got {kernel_size}")
        self.norm = norm_layer(dim)
        self.se = SEBlock(dim, dim // 4)
        self.pwconv1 = nn.Sequential(NCHWtoNHWC(), nn.Linear(dim, ffn_dim))
        self.act = nn.Sequential(nn.GELU(), grn(ffn_dim, use_bias=not deploy))
        self.pwconv2 = nn.Sequential(nn.Linear(ffn_dim, dim, bias=deploy), NHWCtoNCHW(), norm_layer(dim))
        gamma = nn.Parameter(layer_scale_init_value * torch.ones(dim)) if layer_scale_init_value else None
        self.register_parameter("gamma", gamma)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.with_cp and torch.is_grad_enabled():
            # The second forward pass sees the same batch again, which must not count in the running statistics.
            contexts = lambda: (contextlib.nullcontext(), frozen_statistics(self))  # noqa: E731
            return checkpoint(self.forward_block, x, use_reentrant=False, context_fn=contexts)
        return self.forward_block(x)

    def forward_block(self, x: torch.Tensor) -> torch.Tensor:
        """The block without gradient checkpointing."""
        y = self.se(self.norm(self.dwconv(x)))  # (N, C, H, W)
        y = self.act(self.pwconv1(y))  # (N, H, W, ffn_factor * C)
        y = self.pwconv2(y)  # (N, C, H, W)
        if self.gamma is not None:
            y = scale_layer(y, self.gamma, self.keep_bfloat16)
        return add_residual(x, self.drop_path(y), self.keep_bfloat16)

    @torch.no_grad()
    def fuse(self) -> "UniRepLKNetBlock":
        """Merge batch norms, branches, GRN bias and layer scale (paper, Section 3.2).

        Computes in float64 and stores in the block's dtype. This block itself is not changed.

        Returns:
            A new block with the merged structure; a merged block returns itself.
        """
        if self.deploy:
            return self
        if isinstance(self.dwconv, DilatedReparamBlock):
            name, (kernel, bias) = "dwconv.lk_origin", self.dwconv.merged()
        else:
            name, (kernel, bias) = "dwconv", (self.dwconv.weight, 0)
        kernel, bias = fold_bn(kernel, bias, self.norm)

        # pwconv2(x + beta) = W x + W beta, so the GRN bias becomes a bias of the linear layer.
        linear, _, bn = self.pwconv2
        grn_bias = to_float64(linear.weight) @ to_float64(self.act[1].beta).flatten()
        pwconv2_weight, pwconv2_bias = fold_bn(linear.weight, grn_bias, bn)
        if self.gamma is not None:
            gamma = to_float64(self.gamma)
            pwconv2_weight, pwconv2_bias = pwconv2_weight * gamma[:, None], pwconv2_bias * gamma

        fused = UniRepLKNetBlock(**self.config, deploy=True).to(linear.weight.device, linear.weight.dtype)
        fused.load_state_dict(
            {
                f"{name}.weight": kernel,
                f"{name}.bias": bias,
                "pwconv2.0.weight": pwconv2_weight,
                "pwconv2.0.bias": pwconv2_bias,
                "act.1.gamma": self.act[1].gamma,
                **{f"se.{key}": value for key, value in self.se.state_dict().items()},
                **{f"pwconv1.{key}": value for key, value in self.pwconv1.state_dict().items()},
            }
        )
        fused.drop_path, fused.with_cp = self.drop_path, self.with_cp
        return fused.train(self.training)


class UniRepLKNet(nn.Module):
    """UniRepLKNet (paper, Section 3): images (N, in_chans, H, W) -> logits (N, num_classes).

    Args:
        in_chans: channels of the images.
        num_classes: outputs of the head; 0 builds none and returns the pooled features (N, dims[3]).
        global_pool: "avg", "max", "avgmax", or "" (with num_classes 0) for the last stage's map
            (N, dims[3], H / 32, W / 32).
        depths: blocks in each of the four stages.
        dims: channels in each of the four stages.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this value at the last.
        layer_scale_init_value: initial value of each block's layer scale; None or 0 means none.
        head_init_scale: factor on the head's initial weights.
        kernel_sizes: for each stage the kernel size of each block; None means the published ones for `depths`.
        deploy: True builds the merged structure for inference.
        with_cp: gradient checkpointing: less memory, for a second forward pass.
        attempt_use_lk_impl: implementation of the depthwise convolutions, see `DepthwiseConv2d`.
        use_sync_bn: batch norms that synchronise over processes.
        published_arithmetic: True computes under bfloat16 autocast as the authors' code does: layer scale, GRN and the
            residual stream turn tensors to float32, which takes twice the memory. False keeps them in bfloat16, with
            float32 sums. The two differ by rounding: bfloat16 loses a residual smaller than 1/512 of the stream, so
            set True to train with a layer scale as small as the paper's 1e-6. In float32 only the sums of GRN round
            differently; float16, whose range is too small, always computes as published.
        output_stride: 32; timm's argument for backbones that can be dilated, which this one cannot.

    Raises:
        ValueError: where sizes do not fit together; the message names the remedy.
        TypeError: for an unknown argument.
    """

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: Sequence[int] = (3, 3, 27, 3),
        dims: Sequence[int] = (96, 192, 384, 768),
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        layer_scale_init_value: float | None = 1e-6,
        head_init_scale: float = 1.0,
        kernel_sizes: Sequence[Sequence[int]] | None = None,
        deploy: bool = False,
        with_cp: bool = False,
        attempt_use_lk_impl: bool | str = True,
        use_sync_bn: bool = False,
        published_arithmetic: bool = False,
        output_stride: int = 32,
    ):
        super().__init__()
        if output_stride != 32:
            raise ValueError(
                f"output_stride must be 32, got {output_stride}; for finer maps set features_only=True, which gives "
                "those of strides 4, 8 and 16, too"
            )
        depths, dims = tuple(depths), tuple(dims)
        if kernel_sizes is None:
            if depths not in KERNEL_SIZES:
                raise ValueError(
                    f"no published kernel sizes for depths {depths}; set kernel_sizes, for each block of each stage "
                    "one, such as ((3, 3), (13, 13), (13, 13, 13, 13, 13, 13), (13, 13))"
                )
            kernel_sizes = KERNEL_SIZES[depths]
        if tuple(map(len, kernel_sizes)) != depths:
            raise ValueError(f"kernel_sizes {kernel_sizes} must hold one value per block, depths are {depths}")

        self.num_classes = num_classes
        self.num_features = self.head_hidden_size = dims[-1]
        self.drop_rate = drop_rate
        self.feature_info = [dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)]

        self.downsample_layers = nn.ModuleList()  # (N, in_chans, H, W) -> H / 4, then H / 8, H / 16, H / 32, likewise W
        self.downsample_layers.append(
            nn.Sequential(
                nn.Conv2d(in_chans, dims[0] // 2, kernel_size=3, stride=2, padding=1),
                LayerNorm2d(dims[0] // 2, eps=1e-6),
                nn.GELU(),
                nn.Conv2d(dims[0] // 2, dims[0], kernel_size=3, stride=2, padding=1),
                LayerNorm2d(dims[0], eps=1e-6),
            )
        )
        for dim_in, dim_out in zip(dims[:-1], dims[1:]):
            self.downsample_layers.append(
                nn.Sequential(
                    nn.Conv2d(dim_in, dim_out, kernel_size=3, stride=2, padding=1), LayerNorm2d(dim_out, eps=1e-6)
                )
            )

        num_blocks = sum(depths)
        drop_path_rates = iter([drop_path_rate * i / max(num_blocks - 1, 1) for i in range(num_blocks)])
        self.stages = nn.ModuleList(
            nn.Sequential(
                *[
                    UniRepLKNetBlock(
                        dim,
                        kernel_size,
                        drop_path=next(drop_path_rates),
                        layer_scale_init_value=layer_scale_init_value,
                        deploy=deploy,
                        attempt_use_lk_impl=attempt_use_lk_impl,
                        with_cp=with_cp,
                        use_sync_bn=use_sync_bn,
                        published_arithmetic=published_arithmetic,
                    )
                    for kernel_size in stage_kernel_sizes
                ]
            )
            for dim, stage_kernel_sizes in zip(dims, kernel_sizes)
        )
        self.norm = nn.LayerNorm(dims[-1], eps=1e-6)
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(init_weights)
        self.reset_classifier(num_classes, global_pool)
        if num_classes > 0:
            with torch.no_grad():
                self.head.weight.mul_(head_init_scale)

    @property
    def deploy(self) -> bool:
        """Whether all blocks have the merged structure."""
        return all(block.deploy for stage in self.stages for block in stage)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x: torch.Tensor) -> torch.Tensor:
        """Images (N, in_chans, H, W) -> the last stage's map (N, dims[3], H / 32, W / 32)."""
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(lay_out_stream(downsample(x)))
        return x

    def forward_head(self, x: torch.Tensor, pre_logits: bool = False) -> torch.Tensor:
        """The last stage's map -> logits (N, num_classes), or with `pre_logits` the features (N, dims[3])."""
        if not self.global_pool:
            return x
        x = x.mean((-2, -1)) if self.pool is None else self.pool(x)  # (N, dims[3], H / 32, W / 32) -> (N, dims[3])
        x = self.head_drop(self.norm(x))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self,
        x: torch.Tensor,
        indices: int | Sequence[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[torch.Tensor] | tuple[torch.Tensor, list[torch.Tensor]]:
        """The maps of several stages, as timm's `features_only` and `FeatureGetterNet` ask for them.

        Args:
            x: images (N, in_chans, H, W).
            indices: which stages: the last n if an int, all if None.
            norm: accepted for timm's sake; this network's norm acts on pooled features only.
            stop_early: do not compute the stages after the last of `indices`.
            output_fmt: "NCHW".
            intermediates_only: do not return the last computed map.

        Returns:
            [map of each selected stage], or (last computed map, [maps]).

        Raises:
            ValueError: for another `output_fmt`.
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for index, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            x = stage(lay_out_stream(downsample(x)))
            if index in take_indices:
                intermediates.append(x)
            if stop_early and index == max_index:
                break
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(
        self, indices: int | Sequence[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the stages after the last of `indices`, norm and head as asked; returns the stages' indices."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: max_index + 1]
        self.downsample_layers = self.downsample_layers[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def reparameterize_unireplknet(self) -> "UniRepLKNet":
        """Merge every block into the inference structure, in place (the authors' name); returns the network.

        The replaced blocks are not changed. For a merged copy call `timm.utils.reparameterize_model(model)`.
        """
        for stage in self.stages:
            for i, block in enumerate(stage):
                stage[i] = block.fuse()
        return self

    def get_classifier(self) -> nn.Module:
        """The head, an `nn.Linear`, or `nn.Identity` where num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one for `num_classes` (0: none).

        Raises:
            ValueError: for an unknown `global_pool`, or a head without pooling.
        """
        if global_pool is not None:
            if global_pool not in ("avg", "max", "avgmax", ""):
                raise ValueError(f"global_pool must be 'avg', 'max', 'avgmax' or '', got {global_pool!r}")
            self.global_pool = global_pool
            # The mean stays as it is, to the last bit.
            self.pool = SelectAdaptivePool2d(pool_type=global_pool, flatten=True) if "max" in global_pool else None
        if num_classes > 0 and not self.global_pool:
            raise ValueError("a head needs pooled features: set global_pool='avg', or num_classes=0")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        init_weights(self.head)
        self.head.to(next(self.parameters()).device)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing on or off in every block."""
        for stage in self.stages:
            for block in stage:
                block.with_cp = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Regular expressions that order the parameters by depth, for timm's layer-wise learning-rate decay."""
        blocks = [
            (r"^downsample_layers\.(\d+)", (0,)),
            (r"^stages\.(\d+)\.(\d+)", None),
            (r"^norm", (99999,)),
        ]
        return dict(
            stem=r"^downsample_layers\.0",
            blocks=r"^(?:downsample_layers|stages)\.(\d+)" if coarse else blocks,
        )

    def no_weight_decay(self) -> set[str]:
        """Names of the scales (layer scale, GRN), which like biases and norms get no weight decay."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in ("gamma", "beta")}


def init_weights(module: nn.Module) -> None:
    """The published initialisation: truncated normal with std 0.02, zero biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


# depths -> kernel size of each block (paper, Section 4.1)
KERNEL_SIZES = {
    (2, 2, 6, 2): ((3,) * 2, (13,) * 2, (13,) * 6, (13,) * 2),
    (2, 2, 8, 2): ((3,) * 2, (13,) * 2, (13,) * 8, (13,) * 2),
    (3, 3, 18, 3): ((3,) * 3, (13,) * 3, (13, 3) * 9, (13,) * 3),
    (3, 3, 27, 3): ((3,) * 3, (13,) * 3, (13, 3, 3) * 9, (13,) * 3),
}

# variant -> structure (paper, Table 3)
VARIANTS = {
    "unireplknet_a": dict(depths=(2, 2, 6, 2), dims=(40, 80, 160, 320)),
    "unireplknet_f": dict(depths=(2, 2, 6, 2), dims=(48, 96, 192, 384)),
    "unireplknet_p": dict(depths=(2, 2, 6, 2), dims=(64, 128, 256, 512)),
    "unireplknet_n": dict(depths=(2, 2, 8, 2), dims=(80, 160, 320, 640)),
    "unireplknet_t": dict(depths=(3, 3, 18, 3), dims=(80, 160, 320, 640)),
    "unireplknet_s": dict(depths=(3, 3, 27, 3), dims=(96, 192, 384, 768)),
    "unireplknet_b": dict(depths=(3, 3, 27, 3), dims=(128, 256, 512, 1024)),
    "unireplknet_l": dict(depths=(3, 3, 27, 3), dims=(192, 384, 768, 1536)),
    "unireplknet_xl": dict(depths=(3, 3, 27, 3), dims=(256, 512, 1024, 2048)),
}


def create_unireplknet(variant: str, pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """Build a row of `VARIANTS` with timm's builder; `kwargs` are those of `UniRepLKNet` and of timm."""
    return build_model_with_cfg(
        UniRepLKNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **VARIANTS[variant] | kwargs,
    )


@register_model
def unireplknet_a(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-A, 4.6 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_a", pretrained, **kwargs)


@register_model
def unireplknet_f(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-F, 6.5 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_f", pretrained, **kwargs)


@register_model
def unireplknet_p(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-P, 11 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_p", pretrained, **kwargs)


@register_model
def unireplknet_n(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-N, 19 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_n", pretrained, **kwargs)


@register_model
def unireplknet_t(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-T, 32 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_t", pretrained, **kwargs)


@register_model
def unireplknet_s(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-S, 56 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_s", pretrained, **kwargs)


@register_model
def unireplknet_b(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-B, 99 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_b", pretrained, **kwargs)


@register_model
def unireplknet_l(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-L, 220 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_l", pretrained, **kwargs)


@register_model
def unireplknet_xl(pretrained: bool = False, **kwargs: Any) -> UniRepLKNet:
    """UniRepLKNet-XL, 389 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_xl", pretrained, **kwargs)
