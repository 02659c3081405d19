"""UniRepLKNet: a large-kernel ConvNet (Ding et al., CVPR 2024, arXiv:2311.15599).

The network of https://github.com/AILab-CVC/UniRepLKNet (Apache-2.0), with the same `state_dict` names, order and
shapes, so that the released checkpoints load, and the same numbers. Each block is a large depthwise convolution with
parallel dilated branches, squeeze-and-excitation, and a two-layer MLP with global response normalisation; for
inference `fuse()` merges every batch norm, branch and scale into plain convolutions and linear layers.

What is deliberately different from the authors' file: nothing is printed, unknown arguments raise, merging computes
in float64 and leaves the merged block's original as it was, gradient checkpointing counts every batch once in the
batch-norm statistics, and under bfloat16 autocast the residual stream and GRN stay in bfloat16 (see
`published_arithmetic`).

    import models, timm
    model = timm.create_model("unireplknet_t", num_classes=12)               # training structure
    model.reparameterize_unireplknet()                                       # inference structure, in place
    merged = timm.utils.reparameterize_model(model)                          # the same, into a copy
"""

import contextlib

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, LayerNorm2d
from timm.models import adapt_input_conv, build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import nn
from torch.utils.checkpoint import checkpoint

from models.depthwise import DepthwiseConv2d

# timm adds the nine constructors.
__all__ = ["VARIANTS", "UniRepLKNet", "UniRepLKNetBlock", "DilatedReparamBlock", "load_weights"]

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


def fold_bn(weight, bias, bn):
    """Fold a batch norm with running statistics into the layer before it.

    Args:
        weight: (C_out, ...) weight of a convolution or linear layer.
        bias: (C_out,) its bias, or 0.
        bn: `nn.BatchNorm2d` or `nn.SyncBatchNorm` over C_out channels.

    Returns:
        (weight, bias) of the one layer that computes both, in float64 on the CPU.
    """
    mean, var, gain, shift = map(to_float64, (bn.running_mean, bn.running_var, bn.weight, bn.bias))
    scale = gain / torch.sqrt(var + bn.eps)
    weight = to_float64(weight)
    bias = to_float64(bias) if torch.is_tensor(bias) else bias
    return weight * scale.view(-1, *[1] * (weight.ndim - 1)), shift + (bias - mean) * scale


def embed_dilated(kernel, dilation, size):
    """Write a dilated kernel as an undilated one: (C, 1, k, k) -> (C, 1, size, size), zeros between the taps."""
    extent = (kernel.shape[-1] - 1) * dilation + 1
    assert extent <= size, f"a kernel of extent {extent} does not fit into {size}"
    start = (size - extent) // 2
    taps = slice(start, start + extent, dilation)
    embedded = kernel.new_zeros(kernel.shape[0], 1, size, size)
    embedded[:, :, taps, taps] = kernel
    return embedded


def to_float64(tensor):
    """A detached float64 copy on the CPU, since not every device has float64."""
    return tensor.detach().to("cpu", torch.float64)


@contextlib.contextmanager
def frozen_statistics(module):
    """Within this context batch norms normalise with the batch as before, but leave their running statistics alone."""
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


class GlobalResponseNorm(torch.autograd.Function):
    """What `GRNwithNHWC` computes, without tensors of x's size in float32 under autocast, and with a short way back.

    Its tensors are the widest of the network, and by autograd, PyTorch passes over them more often.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta):
        gx, mean = spatial_norms(x)
        nx = gx / mean
        ctx.save_for_backward(x, gamma, gx, mean)
        ctx.has_beta = beta is not None
        scale = (gamma * nx + 1).to(x.dtype)
        return x * scale if beta is None else torch.addcmul(beta.to(x.dtype), x, scale)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, gamma, gx, mean = ctx.saved_tensors
        nx = gx / mean
        grad_scale = sum_pixels(grad * x)
        grad_nx = grad_scale * gamma
        # nx depends on gx directly and by the mean over channels, and gx on x by x / gx: 0 where a map is all zeros.
        grad_gx = (grad_nx - (grad_nx * nx).mean(-1, keepdim=True)) / mean
        towards_x = torch.where(gx > 0, grad_gx / gx, 0).to(x.dtype)
        grad_x = torch.addcmul(grad * (gamma * nx + 1).to(x.dtype), x, towards_x)
        grad_beta = sum_pixels(grad).sum(0, keepdim=True) if ctx.has_beta else None
        return grad_x, (grad_scale * nx).sum(0, keepdim=True), grad_beta


def sum_pixels(x):
    """(N, H, W, C) -> (N, 1, 1, C), float32 or float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu":  # adds in float32 in any case; asked for it, PyTorch makes a float32 copy of x first
        return x.sum((1, 2), keepdim=True).to(dtype)
    return x.sum((1, 2), keepdim=True, dtype=dtype)


def spatial_norms(x):
    """L2 norm of each channel's map (N, 1, 1, C), and its mean over the channels plus epsilon (N, 1, 1, 1)."""
    gx = sum_pixels(x.square()).sqrt()  # not by torch.norm, which is slow on a CPU
    return gx, gx.mean(dim=-1, keepdim=True) + 1e-6


class GRNwithNHWC(nn.Module):
    """Global response normalisation (ConvNeXt V2, arXiv:2301.00808, Section 3): (N, H, W, C) -> (N, H, W, C).

    Args:
        dim: C.
        use_bias: whether `beta` is added; the merged structure has it in the next linear layer.
        published_arithmetic: see `UniRepLKNet`.
    """

    def __init__(self, dim, use_bias=True, published_arithmetic=False):
        super().__init__()
        self.published_arithmetic = published_arithmetic
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        if use_bias:
            self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))
        else:
            self.register_parameter("beta", None)

    def forward(self, x):
        # The squares of float16 overflow from 256 on.
        if not self.published_arithmetic and x.dtype != torch.float16:
            return GlobalResponseNorm.apply(x, self.gamma, self.beta)
        gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)  # (N, 1, 1, C)
        nx = gx / (gx.mean(dim=-1, keepdim=True) + 1e-6)
        x = (self.gamma * nx + 1) * x
        return x if self.beta is None else x + self.beta


class SEBlock(nn.Module):
    """Squeeze-and-excitation (arXiv:1709.01507): (N, C, H, W) -> (N, C, H, W), each channel scaled by 0 to 1."""

    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.down = nn.Conv2d(dim, hidden_dim, kernel_size=1)
        self.up = nn.Conv2d(hidden_dim, dim, kernel_size=1)

    def forward(self, x):
        scale = x.mean((2, 3), keepdim=True)  # (N, C, 1, 1)
        return x * torch.sigmoid(self.up(F.relu(self.down(scale))))


class NCHWtoNHWC(nn.Module):
    """(N, C, H, W) -> (N, H, W, C), a view."""

    def forward(self, x):
        return x.permute(0, 2, 3, 1)


class NHWCtoNCHW(nn.Module):
    """(N, H, W, C) -> (N, C, H, W), a view."""

    def forward(self, x):
        return x.permute(0, 3, 1, 2)


class DilatedReparamBlock(nn.Module):
    """Dilated Reparam Block (paper, Section 3.2): (N, C, H, W) -> (N, C, H, W).

    The sum of a large depthwise convolution and of small dilated ones, each with its batch norm. Together they equal
    one large convolution, which is what the merged structure (`deploy=True`) holds.

    Args:
        dim: C.
        kernel_size: edge of the large kernel, a key of `DILATED_BRANCHES`.
        deploy: True builds the merged structure.
        attempt_use_lk_impl: see `DepthwiseConv2d`.
        norm_layer: class of the batch norms.
    """

    def __init__(self, dim, kernel_size, deploy=False, attempt_use_lk_impl=True, norm_layer=nn.BatchNorm2d):
        super().__init__()
        self.kernel_size = kernel_size
        self.branches = () if deploy else DILATED_BRANCHES[kernel_size]
        self.lk_origin = DepthwiseConv2d(dim, kernel_size, bias=deploy, attempt_use_lk_impl=attempt_use_lk_impl)
        self.origin_bn = nn.Identity() if deploy else norm_layer(dim)
        for k, r in self.branches:
            self.add_module(f"dil_conv_k{k}_{r}", DepthwiseConv2d(dim, k, r, attempt_use_lk_impl=attempt_use_lk_impl))
            self.add_module(f"dil_bn_k{k}_{r}", norm_layer(dim))

    def branch(self, k, r):
        """The convolution and the batch norm of the branch with kernel `k` and dilation `r`."""
        return self.get_submodule(f"dil_conv_k{k}_{r}"), self.get_submodule(f"dil_bn_k{k}_{r}")

    def forward(self, x):
        if x.device.type == "cpu":
            x = x.contiguous()  # once for all branches: large kernels need it there, and so does the gradient
        out = self.origin_bn(self.lk_origin(x))
        for k, r in self.branches:
            conv, bn = self.branch(k, r)
            out = out + bn(conv(x))
        return out

    def merged(self):
        """The one convolution that equals all branches: weight (C, 1, k, k) and bias (C,), float64 on the CPU."""
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
        kernel_size: edge of the depthwise kernel: 3 or 5 (one convolution), 7 to 17 odd (`DilatedReparamBlock`).
        drop_path: probability with which the residual of a picture is dropped in training.
        layer_scale_init_value: first value of gamma; None or 0 means no layer scale.
        deploy: True builds the merged structure.
        attempt_use_lk_impl: see `DepthwiseConv2d`.
        with_cp: gradient checkpointing, less memory for a second forward pass.
        use_sync_bn: batch norms that synchronise over processes.
        ffn_factor: width of the MLP as a multiple of C.
        published_arithmetic: see `UniRepLKNet`.

    Raises:
        ValueError: for a kernel size that the paper does not define.
    """

    def __init__(
        self,
        dim,
        kernel_size,
        *,
        drop_path=0.0,
        layer_scale_init_value=1e-6,
        deploy=False,
        attempt_use_lk_impl=True,
        with_cp=False,
        use_sync_bn=False,
        ffn_factor=4,
        published_arithmetic=False,
    ):
        super().__init__()
        # Everything that `fuse` needs to build the merged twin.
        self.config = dict(
            dim=dim,
            kernel_size=kernel_size,
            attempt_use_lk_impl=attempt_use_lk_impl,
            with_cp=with_cp,
            use_sync_bn=use_sync_bn,
            ffn_factor=ffn_factor,
            published_arithmetic=published_arithmetic,
        )
        self.deploy = deploy
        self.with_cp = with_cp
        self.published_arithmetic = published_arithmetic
        norm_layer = nn.SyncBatchNorm if use_sync_bn else nn.BatchNorm2d
        ffn_dim = int(ffn_factor * dim)

        if kernel_size in DILATED_BRANCHES:
            self.dwconv = DilatedReparamBlock(dim, kernel_size, deploy, attempt_use_lk_impl, norm_layer)
        elif kernel_size in SINGLE_KERNELS:
            self.dwconv = DepthwiseConv2d(dim, kernel_size, bias=deploy, attempt_use_lk_impl=attempt_use_lk_impl)
        else:
            choices = ", ".join(map(str, (*SINGLE_KERNELS, *DILATED_BRANCHES)))
            raise ValueError(f"kernel_size must be one of {choices}, got {kernel_size}")
        self.norm = nn.Identity() if deploy else norm_layer(dim)
        self.se = SEBlock(dim, dim // 4)
        self.pwconv1 = nn.Sequential(NCHWtoNHWC(), nn.Linear(dim, ffn_dim))  # -> (N, H, W, 4C)
        self.act = nn.Sequential(nn.GELU(), GRNwithNHWC(ffn_dim, not deploy, published_arithmetic))
        self.pwconv2 = nn.Sequential(nn.Linear(ffn_dim, dim, bias=deploy), NHWCtoNCHW())  # -> (N, C, H, W)
        if not deploy:
            self.pwconv2.append(norm_layer(dim))
        if layer_scale_init_value and not deploy:
            self.gamma = nn.Parameter(layer_scale_init_value * torch.ones(dim))
        else:
            self.register_parameter("gamma", None)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x):
        if self.with_cp and torch.is_grad_enabled():
            # The second forward pass sees the same batch again, so it must not count in the running statistics.
            contexts = lambda: (contextlib.nullcontext(), frozen_statistics(self))  # noqa: E731
            return checkpoint(self.forward_block, x, use_reentrant=False, context_fn=contexts)
        return self.forward_block(x)

    def forward_block(self, x):
        """The block without gradient checkpointing."""
        y = self.se(self.norm(self.dwconv(x)))
        y = self.pwconv2(self.act(self.pwconv1(y)))
        gamma = self.gamma
        if y.dtype == torch.bfloat16 and not self.published_arithmetic:
            # The float32 layer scale and stream would turn everything from here on to float32.
            x, gamma = x.to(y.dtype), None if gamma is None else gamma.to(y.dtype)
        if gamma is not None:
            y = gamma.view(1, -1, 1, 1) * y
        return x + self.drop_path(y)

    @torch.no_grad()
    def fuse(self):
        """Merge batch norms, branches, GRN bias and layer scale (paper, Section 3.2).

        Computes in float64 and stores in the block's dtype. This block stays as it is.

        Returns:
            A new block with the merged structure; a block that is merged already returns itself.
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
        fused.drop_path = self.drop_path
        return fused.train(self.training)


class UniRepLKNet(nn.Module):
    """UniRepLKNet (paper, Section 3): images (N, in_chans, H, W) -> logits (N, num_classes).

    Args:
        in_chans: channels of the images.
        num_classes: width of the head; 0 leaves it out, and the pooled features (N, dims[3]) come out.
        global_pool: "avg", or "" (with num_classes 0) for the last stage's map (N, dims[3], H / 32, W / 32).
        depths: blocks in each of the four stages.
        dims: channels in each of the four stages.
        drop_rate: dropout before the head.
        drop_path_rate: stochastic depth, rising linearly from 0 at the first block to this value at the last.
        layer_scale_init_value: first value of each block's layer scale; None or 0 means none.
        head_init_scale: factor on the head's first weights.
        kernel_sizes: for each stage the kernel size of each block; None means the published ones for `depths`.
        deploy: True builds the merged structure for inference.
        with_cp: gradient checkpointing, less memory for a second forward pass.
        attempt_use_lk_impl: which implementation of the depthwise convolutions runs, see `DepthwiseConv2d`.
        use_sync_bn: batch norms that synchronise over processes.
        published_arithmetic: True computes under bfloat16 autocast as the authors' code does: layer scale, GRN and the
            residual stream turn tensors to float32, which takes twice the memory. False keeps them in bfloat16, with
            float32 sums. The two differ by rounding: a residual that is smaller than 1/512 of the stream is lost, so
            take True to train with a layer scale as small as the paper's 1e-6. In float32 the sums of GRN round
            differently, and float16, whose range is too small, is always as published.

    Raises:
        ValueError: where sizes do not fit together; the message names the remedy.
        TypeError: for an unknown argument.
    """

    def __init__(
        self,
        in_chans=3,
        num_classes=1000,
        global_pool="avg",
        depths=(3, 3, 27, 3),
        dims=(96, 192, 384, 768),
        drop_rate=0.0,
        drop_path_rate=0.0,
        layer_scale_init_value=1e-6,
        head_init_scale=1.0,
        kernel_sizes=None,
        deploy=False,
        with_cp=False,
        attempt_use_lk_impl=True,
        use_sync_bn=False,
        published_arithmetic=False,
    ):
        super().__init__()
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
        self.deploy = deploy
        self.feature_info = [dict(num_chs=dim, reduction=4 * 2**i, module=f"stages.{i}") for i, dim in enumerate(dims)]

        self.downsample_layers = nn.ModuleList()  # (N, in_chans, H, W) -> H / 4, then H / 8, H / 16, H / 32
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

    def forward(self, x):
        return self.forward_head(self.forward_features(x))

    def forward_features(self, x):
        """Images (N, in_chans, H, W) -> the last stage's map (N, dims[3], H / 32, W / 32)."""
        for downsample, stage in zip(self.downsample_layers, self.stages):
            x = stage(downsample(x))
        return x

    def forward_head(self, x, pre_logits=False):
        """The last stage's map -> logits (N, num_classes), or with `pre_logits` the features (N, dims[3])."""
        if not self.global_pool:
            return x
        x = self.head_drop(self.norm(x.mean((-2, -1))))
        return x if pre_logits else self.head(x)

    def forward_intermediates(
        self, x, indices=None, norm=False, stop_early=False, output_fmt="NCHW", intermediates_only=False
    ):
        """The maps of several stages, as timm's `features_only` and `FeatureGetterNet` ask for them.

        Args:
            x: images (N, in_chans, H, W).
            indices: which stages: the last n if an int, all if None.
            norm: accepted for timm's sake; this network's norm acts on pooled features only.
            stop_early: do not compute the stages after the last one asked for.
            output_fmt: "NCHW".
            intermediates_only: leave out the last map.

        Returns:
            [map of each stage asked for], or (last map, [maps]).
        """
        if output_fmt != "NCHW":
            raise ValueError(f"output_fmt must be 'NCHW', got {output_fmt!r}")
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        intermediates = []
        for index, (downsample, stage) in enumerate(zip(self.downsample_layers, self.stages)):
            x = stage(downsample(x))
            if index in take_indices:
                intermediates.append(x)
            if stop_early and index == max_index:
                break
        return intermediates if intermediates_only else (x, intermediates)

    def prune_intermediate_layers(self, indices=1, prune_norm=False, prune_head=True):
        """Drop the stages after the last of `indices`, and norm and head with them; returns the indices kept."""
        take_indices, max_index = feature_take_indices(len(self.stages), indices)
        self.stages = self.stages[: max_index + 1]
        self.downsample_layers = self.downsample_layers[: max_index + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return take_indices

    def reparameterize_unireplknet(self):
        """Merge every block into the inference structure, in place (the authors' name); returns the network.

        The blocks that were replaced stay usable. For a merged copy call `timm.utils.reparameterize_model(model)`.
        """
        for stage in self.stages:
            for i, block in enumerate(stage):
                stage[i] = block.fuse()
        self.deploy = True
        return self

    def get_classifier(self):
        """The head, an `nn.Linear`, or `nn.Identity` where num_classes is 0."""
        return self.head

    def reset_classifier(self, num_classes, global_pool=None):
        """Replace the head by a new one for `num_classes` (0: none)."""
        if global_pool is not None:
            if global_pool not in ("avg", ""):
                raise ValueError(f"global_pool must be 'avg' or '', got {global_pool!r}")
            self.global_pool = global_pool
        if num_classes > 0 and not self.global_pool:
            raise ValueError("a head needs pooled features: set global_pool='avg', or num_classes=0")
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes > 0 else nn.Identity()
        init_weights(self.head)
        self.head.to(next(self.parameters()).device)

    def set_grad_checkpointing(self, enable=True):
        """Turn gradient checkpointing on or off in every block."""
        for stage in self.stages:
            for block in stage:
                block.with_cp = enable

    def group_matcher(self, coarse=False):
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

    def no_weight_decay(self):
        """Names of the scales (layer scale, GRN), which like biases and norms are not to be decayed."""
        return {name for name, _ in self.named_parameters() if name.rsplit(".", 1)[-1] in ("gamma", "beta")}


def init_weights(module):
    """The published initialisation: truncated normal with std 0.02, zero biases."""
    if isinstance(module, (nn.Conv2d, nn.Linear)):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def checkpoint_filter_fn(state_dict, model):
    """Bring a checkpoint into the form of `model.state_dict()`: unwrapped, without prefixes of wrappers.

    Raises:
        ValueError: if it holds the other structure (training or merged) than the model.
    """
    for key in ("state_dict_ema", "state_dict", "model"):
        if isinstance(state_dict.get(key), dict):
            state_dict = state_dict[key]
            break
    state_dict = {
        name.removeprefix("module.").removeprefix("_orig_mod."): tensor for name, tensor in state_dict.items()
    }
    merged = "stages.0.0.norm.weight" not in state_dict
    if merged != model.deploy and "stages.0.0.se.down.weight" in state_dict:
        raise ValueError(
            "these weights are merged (inference structure): load them into a model built with deploy=True"
            if merged
            else "these weights have the training structure: load them with deploy=False, then call "
            "reparameterize_unireplknet()"
        )
    return state_dict


def load_weights(model, state_dict):
    """Load what fits: another number of classes or input channels is no obstacle, another network is.

    Args:
        model: a `UniRepLKNet`.
        state_dict: a checkpoint in any of the forms that `checkpoint_filter_fn` reads.

    Returns:
        One line that says how many tensors were loaded and which were not, and why.

    Raises:
        ValueError: if anything but the head and the stem's input channels differs; names the first such tensor.
    """
    state_dict = checkpoint_filter_fn(state_dict, model)
    own = model.state_dict()
    stem = "downsample_layers.0.0.weight"
    notes = []
    if stem in state_dict and state_dict[stem].shape != own[stem].shape and state_dict[stem].shape[1] == 3:
        state_dict[stem] = adapt_input_conv(own[stem].shape[1], state_dict[stem])
        notes.append(f"{stem} adapted from 3 to {own[stem].shape[1]} input channels")

    fits = {name: tensor for name, tensor in state_dict.items() if name in own and own[name].shape == tensor.shape}
    wrong = [name for name in own if name not in fits]
    unused = [name for name in state_dict if name not in own]
    foreign = [name for name in (*wrong, *unused) if not name.startswith("head.")]
    if foreign:
        raise ValueError(
            f"these weights are of another network: {len(foreign)} tensors do not fit, the first of them "
            f"{foreign[0]}; build the network as the one that they were trained as"
        )
    model.load_state_dict(fits, strict=False)
    for name in wrong:
        theirs = tuple(state_dict[name].shape) if name in state_dict else "absent"
        notes.append(f"skipped {name} ({theirs} there, {tuple(own[name].shape)} here)")
    return "; ".join([f"loaded {len(fits)} of {len(own)} tensors", *notes])


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


def published(filename, num_classes=1000, size=224):
    """timm's description of one released checkpoint; the file holds the state dict under `model`, or bare."""
    return dict(
        hf_hub_id="DingXiaoH/UniRepLKNet",
        hf_hub_filename=filename,
        num_classes=num_classes,
        input_size=(3, size, size),
        pool_size=(size // 32, size // 32),
        crop_pct=0.875 if size < 384 else 1.0,
        interpolation="bicubic",
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="downsample_layers.0.0",
        classifier="head",
        license="apache-2.0",
        paper_ids="arXiv:2311.15599",
        paper_name="UniRepLKNet: A Universal Perception Large-Kernel ConvNet",
        origin_url="https://github.com/AILab-CVC/UniRepLKNet",
    )


IN22K_CLASSES = 21841
default_cfgs = generate_default_cfgs(
    {
        "unireplknet_a.in1k": published("unireplknet_a_in1k_224_acc77.03.pth"),
        "unireplknet_f.in1k": published("unireplknet_f_in1k_224_acc78.58.pth"),
        "unireplknet_p.in1k": published("unireplknet_p_in1k_224_acc80.23.pth"),
        "unireplknet_n.in1k": published("unireplknet_n_in1k_224_acc81.64.pth"),
        "unireplknet_t.in1k": published("unireplknet_t_in1k_224_acc83.21.pth"),
        "unireplknet_s.in1k": published("unireplknet_s_in1k_224_acc83.91.pth"),
        "unireplknet_s.in22k": published("unireplknet_s_in22k_pretrain.pth", IN22K_CLASSES),
        "unireplknet_s.in22k_ft_in1k_384": published("unireplknet_s_in22k_to_in1k_384_acc86.44.pth", size=384),
        "unireplknet_b.in22k_ft_in1k_384": published("unireplknet_b_in22k_to_in1k_384_acc87.40.pth", size=384),
        "unireplknet_b.in22k": published("unireplknet_b_in22k_pretrain.pth", IN22K_CLASSES),
        "unireplknet_l.in22k_ft_in1k_384": published("unireplknet_l_in22k_to_in1k_384_acc87.88.pth", size=384),
        "unireplknet_l.in22k": published("unireplknet_l_in22k_pretrain.pth", IN22K_CLASSES),
        "unireplknet_xl.in22k_ft_in1k_384": published("unireplknet_xl_in22k_to_in1k_384_acc87.96.pth", size=384),
        "unireplknet_xl.in22k": published("unireplknet_xl_in22k_pretrain.pth", IN22K_CLASSES),
    }
)


def create_unireplknet(variant, pretrained=False, **kwargs):
    """Build a row of `VARIANTS` by timm's own means; `kwargs` are those of `UniRepLKNet` and of timm."""
    return build_model_with_cfg(
        UniRepLKNet,
        variant,
        pretrained,
        pretrained_filter_fn=checkpoint_filter_fn,
        feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls="getter"),
        **VARIANTS[variant] | kwargs,
    )


@register_model
def unireplknet_a(pretrained=False, **kwargs):
    """UniRepLKNet-A, 4.6 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_a", pretrained, **kwargs)


@register_model
def unireplknet_f(pretrained=False, **kwargs):
    """UniRepLKNet-F, 6.5 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_f", pretrained, **kwargs)


@register_model
def unireplknet_p(pretrained=False, **kwargs):
    """UniRepLKNet-P, 11 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_p", pretrained, **kwargs)


@register_model
def unireplknet_n(pretrained=False, **kwargs):
    """UniRepLKNet-N, 19 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_n", pretrained, **kwargs)


@register_model
def unireplknet_t(pretrained=False, **kwargs):
    """UniRepLKNet-T, 32 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_t", pretrained, **kwargs)


@register_model
def unireplknet_s(pretrained=False, **kwargs):
    """UniRepLKNet-S, 56 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_s", pretrained, **kwargs)


@register_model
def unireplknet_b(pretrained=False, **kwargs):
    """UniRepLKNet-B, 99 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_b", pretrained, **kwargs)


@register_model
def unireplknet_l(pretrained=False, **kwargs):
    """UniRepLKNet-L, 220 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_l", pretrained, **kwargs)


@register_model
def unireplknet_xl(pretrained=False, **kwargs):
    """UniRepLKNet-XL, 389 million parameters with 1000 classes."""
    return create_unireplknet("unireplknet_xl", pretrained, **kwargs)
