"""Global response normalisation (ConvNeXt V2, arXiv:2301.00808, Section 3), in two arithmetics with one formula.

    gx = L2 norm of each channel's map
    nx = gx / (mean of gx over the channels + 1e-6)
    y = (gamma * nx + 1) * x + beta

`PublishedGRN` computes it as the authors' code does: under autocast `torch.norm` returns float32, and so does every
step after it. `GRN` keeps the tensors in the dtype of x with float32 sums; the two differ by rounding only.
"""

import torch
import torch.fx
from torch import nn

EPS = 1e-6


class PublishedGRN(nn.Module):
    """Global response normalisation, arithmetic of the authors' code: (N, H, W, C) -> (N, H, W, C).

    Args:
        dim: C.
        use_bias: whether `beta` is added; the merged structure has it in the next linear layer.
    """

    def __init__(self, dim: int, use_bias: bool = True):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.register_parameter("beta", nn.Parameter(torch.zeros(1, 1, 1, dim)) if use_bias else None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalise_as_published(x, self.gamma, self.beta)


class GRN(PublishedGRN):
    """Global response normalisation without float32 tensors of x's size under bfloat16 autocast; fast gradients.

    Same parameters, shapes and formula as `PublishedGRN`, whose arithmetic float16 still gets.
    """

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return normalise_response(x, self.gamma, self.beta)


def normalise_as_published(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
    """The function of `PublishedGRN`: x (N, H, W, C), gamma (1, 1, 1, C), beta (1, 1, 1, C) or None."""
    gx = torch.norm(x, p=2, dim=(1, 2), keepdim=True)  # (N, 1, 1, C)
    nx = gx / (gx.mean(dim=-1, keepdim=True) + EPS)
    x = (gamma * nx + 1) * x
    return x if beta is None else x + beta


def normalise_response(x: torch.Tensor, gamma: torch.Tensor, beta: torch.Tensor | None) -> torch.Tensor:
    """The function of `GRN`; one node of a torch.fx graph, which cannot hold a test of the dtype."""
    if x.dtype == torch.float16:  # in which squares overflow from 256 on
        return normalise_as_published(x, gamma, beta)
    if not torch.is_grad_enabled():
        return apply_scale(x, gamma, beta, *spatial_norms(x))
    return GlobalResponseNorm.apply(x, gamma, beta)


torch.fx.wrap("normalise_response")


class GlobalResponseNorm(torch.autograd.Function):
    """The function of `GRN`: x (N, H, W, C), gamma (1, 1, 1, C), beta (1, 1, 1, C) or None -> (N, H, W, C).

    Its tensors are the widest of the network; a backward pass derived by autograd would read them more often.
    """

    @staticmethod
    def forward(ctx, x, gamma, beta):
        gx, mean = spatial_norms(x)
        ctx.save_for_backward(x, gamma, gx, mean)
        ctx.has_beta = beta is not None
        return apply_scale(x, gamma, beta, gx, mean)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, gamma, gx, mean = ctx.saved_tensors
        nx = gx / mean
        grad_scale = sum_pixels(grad * x)
        grad_nx = grad_scale * gamma
        # nx depends on gx directly and through the mean over channels, and gx on x through x / gx: 0 for a zero map.
        grad_gx = (grad_nx - (grad_nx * nx).mean(-1, keepdim=True)) / mean
        towards_x = torch.where(gx > 0, grad_gx / gx, 0).to(x.dtype)
        grad_x = torch.addcmul(grad * (gamma * nx + 1).to(x.dtype), x, towards_x)
        grad_beta = sum_pixels(grad).sum(0, keepdim=True) if ctx.has_beta else None
        return grad_x, (grad_scale * nx).sum(0, keepdim=True), grad_beta


def spatial_norms(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """L2 norm of each channel's map (N, 1, 1, C), and its mean over the channels plus EPS (N, 1, 1, 1)."""
    gx = sum_pixels(x.square()).sqrt()  # torch.norm is slow on a CPU
    return gx, gx.mean(dim=-1, keepdim=True) + EPS


def apply_scale(x, gamma, beta, gx, mean):
    """The output for what `spatial_norms` returned."""
    scale = (gamma * (gx / mean) + 1).to(x.dtype)
    return x * scale if beta is None else torch.addcmul(beta.to(x.dtype), x, scale)


def sum_pixels(x: torch.Tensor) -> torch.Tensor:
    """(N, H, W, C) -> (N, 1, 1, C), float32 or float64."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if x.device.type == "cpu":  # sums are float32 there anyway; with a dtype PyTorch would copy x to float32 first
        return x.sum((1, 2), keepdim=True).to(dtype)
    return x.sum((1, 2), keepdim=True, dtype=dtype)
