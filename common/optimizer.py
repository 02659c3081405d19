"""The optimizer of train.py."""

from collections import defaultdict
from functools import partial, wraps

import torch
import torch.distributed as dist
from timm.optim import Muon, create_optimizer_v2, muon

from common.device import has_bfloat16

STACKED = 1 << 20  # elements; small matrices of equal shape are faster together, large ones are not


def create_optimizer(model, name, learning_rate, weight_decay, layer_decay, device):
    """timm's optimizer `name`.

    Muon (Jordan et al., 2024) takes the momentum of each matrix, and of each dense kernel as a matrix, to the nearest
    orthogonal one, so that all directions learn equally fast; depthwise kernels and vectors are left to AdamW.
    """
    fused = dict(fused=True) if name == "adamw" and device.type in ("cpu", "cuda") else {}
    decay = layer_decay if layer_decay != 1 else None
    optimizer = create_optimizer_v2(model, name, learning_rate, weight_decay, layer_decay=decay, **fused)
    if isinstance(optimizer, Muon) and not has_bfloat16(device):
        if optimizer.defaults.get("algo", "muon") == "muon":
            return GramMuon(optimizer.param_groups, **optimizer.defaults)
        optimizer.step = orthogonalise_in_float32(optimizer.step)
    return optimizer


class GramMuon(Muon):
    """timm's Muon for a device without bfloat16: the same update and state, computed in float32, in half the time.

    A group of parameters with `gram` False is computed as timm does it, one matrix at a time and in float32; a run that
    was begun so is resumed so, to the same bits.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for group in self.param_groups:
            group.setdefault("gram", True)

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        hidden = []
        for group in self.param_groups:
            matrices = [p for p in group["params"] if p.grad is not None and self.takes(p, group)]
            self.update(matrices, group)
            hidden += [(parameter, parameter.grad) for parameter in matrices]
        for parameter, _ in hidden:
            parameter.grad = None
        try:
            super().step()  # AdamW for all others
        finally:
            for parameter, gradient in hidden:
                parameter.grad = gradient
        return loss

    def takes(self, parameter, group):
        """Whether Muon, not AdamW, updates `parameter`; timm keeps this in the state as well."""
        state = self.state[parameter]
        if "use_muon" not in state:
            state["use_muon"] = not group.get("use_fallback", False) and muon._is_suitable_for_muon(parameter)
        return state["use_muon"]

    def update(self, parameters, group):
        """Update matrices and dense kernels of one group as timm's `muon` does."""
        lr, momentum = group["lr"], group["momentum"]
        directions = []
        for parameter in parameters:
            state = self.state[parameter]
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            average = state["momentum_buffer"].lerp_(parameter.grad, 1 - momentum)
            direction = parameter.grad.lerp(average, momentum) if group["nesterov"] else average
            directions.append(direction.flatten(1))
        coefficients = muon.resolve_ns_coefficients(group["ns_coefficients"], muon._COEFFICIENTS)
        steps = group["ns_steps"]
        settings = dict(eps=group["eps"], safety_factor=group["safety_factor"])
        if group["gram"] and not group["scale_eps"]:
            coefficients = (coefficients + [coefficients[-1]] * steps)[:steps]
            directions = orthogonalise(directions, coefficients, **settings)
        else:
            settings |= dict(scale_eps=group["scale_eps"], dtype=torch.float32)
            settings |= dict(steps=steps, coefficients=coefficients)
            directions = map(partial(muon.zeropower_via_newtonschulz, **settings), directions)
        for parameter, direction in zip(parameters, directions):
            scale = muon.get_lr_scale(direction.shape, group["adjust_lr_fn"]) if group["adjust_lr_fn"] else 1.0
            parameter.mul_(1 - lr * group["weight_decay"])
            parameter.add_(direction.reshape(parameter.shape), alpha=-lr * scale)


def orthogonalise(matrices, coefficients, eps, safety_factor):
    """The nearest orthogonal matrix to each of `matrices`, by Newton-Schulz iterations.

    Small matrices of equal shape are computed together. Of several processes each computes a share.

    Args:
        matrices: list of tensors (m, n).
        coefficients: (a, b, c) of each iteration.
        eps: smallest Frobenius norm that a matrix is divided by.
        safety_factor: of that norm.

    Returns:
        list of float32 tensors of the same shapes.
    """
    by_shape = defaultdict(list)
    for number, matrix in enumerate(matrices):
        by_shape[tuple(sorted(matrix.shape))].append(number)
    stacks = []
    for (height, width), numbers in by_shape.items():
        count = max(1, STACKED // (height * width))
        stacks += [numbers[start : start + count] for start in range(0, len(numbers), count)]
    result = [None] * len(matrices)
    processes = dist.get_world_size() if dist.is_initialized() else 1
    for index, numbers in enumerate(stacks):
        tall = [matrices[number].shape[0] > matrices[number].shape[1] for number in numbers]
        wide = torch.stack([matrices[n].float().mT if t else matrices[n].float() for n, t in zip(numbers, tall)])
        owner = index % processes
        if processes == 1 or owner == dist.get_rank():
            wide = orthogonalise_on_gram_matrix(wide, coefficients, eps, safety_factor)
        if processes > 1:
            dist.broadcast(wide, owner)
        for number, transposed, matrix in zip(numbers, tall, wide):
            result[number] = matrix.mT if transposed else matrix
    return result


def orthogonalise_on_gram_matrix(matrices, coefficients, eps, safety_factor):
    """Newton-Schulz iterations of `matrices` (N, m, n), m <= n, computed on their Gram matrices (m, m).

    Each iteration multiplies X from the left by a polynomial of X X^T, and all of these commute: so the product Q of
    the polynomials is found with small square matrices, and the wide X is touched at the end only (Zhang, Amsel, Chen
    and Dao, "Gram Newton-Schulz", 2026). In float32 it needs none of the restarts of half precision.
    """
    norm = torch.linalg.matrix_norm(matrices, keepdim=True) * safety_factor
    matrices = matrices / norm.clamp(min=eps)
    gram = matrices @ matrices.mT
    product = None
    for number, (a, b, c) in enumerate(coefficients, start=1):
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        polynomial.diagonal(dim1=-2, dim2=-1).add_(a)
        product = polynomial if product is None else product @ polynomial
        if number < len(coefficients):
            gram = gram @ polynomial @ polynomial
    return product @ matrices


def orthogonalise_in_float32(step):
    """The `step` of another kind of Muon, orthogonalising in float32: timm's has no option for it, and bfloat16 is many
    times slower on a device without it. timm's function is exchanged only while the step runs."""

    @wraps(step)
    def step_in_float32(closure=None):
        original = muon.zeropower_via_newtonschulz
        muon.zeropower_via_newtonschulz = partial(original, dtype=torch.float32)
        try:
            return step(closure)
        finally:
            muon.zeropower_via_newtonschulz = original

    return step_in_float32
