"""The depthwise convolution as matrix products on a GPU's tensor cores, in Triton, which comes with PyTorch for Linux.

A depthwise convolution with a 13 x 13 kernel does about 84 multiplications for each byte that it moves. That is far
beyond what a GPU's ordinary units can do in the time, and PyTorch's kernels use no others. Tensor cores can, but they
want matrix products, and within one channel a convolution is one: an output pixel is a sum over the input pixels near
it, and the factors depend only on where the two lie relative to each other.

So the map of each channel is cut into blocks of ROWS x COLUMNS output pixels. All pixels that a block needs form its
window of WINDOW_ROWS x WINDOW_COLUMNS input pixels. Then

    y[m, o] = sum over q of  x[m, q] * taps[q, o]

where m counts the blocks of all images, o the pixels of a block and q those of its window. `taps` is a Toeplitz
matrix: taps[q, o] is the kernel's tap that lies between o and q, or 0 where there is none. It is the same for all
blocks of a channel, so it is gathered once for a whole tile of blocks. Pixels outside the map are read as 0, which is
the padding. In larger blocks each pixel is read fewer times, but more products fall on zeros of `taps`; `cut` weighs
the two.

- `spread_kernel` writes the kernel with zeros between and around its taps, from which `taps` is gathered.
- `convolve_kernel` computes y, and with the kernel turned by 180 degrees (FLIP) the gradient of x.
- `product_kernel` computes P[o, q] = sum over m of grad[m, o] * x[m, q]. The weight gradient's tap (i, j) is the sum of
  those P[o, q] whose pixels are (i, j) apart, which `gather_kernel` adds up. Nothing is added by atomics, so the same
  input gives the same bits.

A dilated kernel sees only every `dilation`-th row, so a block may hold rows that are STEP = dilation apart, and its
window too: then no row is read in vain. Products are bf16 or fp16, sums fp32. Where x is infinite or NaN, outputs
of the same block may become NaN although the plain sum is finite.

Sizes that only cost integer arithmetic are values at run time, since each constant makes another kernel to compile in
the first step; those that decide how `convolve_kernel` and `product_kernel` read memory are constants.

Verified without a GPU by tests/test_depthwise_triton.py (in Triton's interpreter) and tests/compile_ahead.py
(registers, shared memory and fences on four generations of GPUs).
"""

import functools
import math
import re
from typing import NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

MAX_PIXELS = 128  # of a block: with MAX_TILE, as many sums as fit into the registers of 8 warps
MAX_PIXELS_GRADIENT = 64  # of a block of the weight gradient, whose sums go through memory
MAX_TILE = 128  # blocks computed by one program
CHUNK = 32  # pixels of the window that are multiplied at once
CHUNK_GRADIENT = 128  # pixels of the window in one program of the weight gradient
TILE_GRADIENT = 64  # blocks that are multiplied at once for the weight gradient
PROGRAMS = 1024  # enough programs for a large GPU; a constant, so that the order of sums is the same on every GPU
LOAD_COST = 64  # cost of reading a single pixel, in multiplications of the tensor cores (counted in machine code)
BLOCK_COST = 4096  # cost of starting and storing a block, likewise

# The tensor cores of compute capability 9 to 11 read shared memory by a proxy of their own, which sees what another
# one has copied there only behind a fence. Triton before 3.7.1 leaves it out where a pipelined loop copies both factors
# (pull request 10537 of triton-lang/triton), as `product_kernel` does; a loop with a single stage has the fence. Triton
# 3.3 leaves it out everywhere on 10 and 11.
PROXY_CAPABILITIES = (9, 10, 11)
FIRST_TRITON_WITH_FENCE = (3, 7, 1)
FIRST_TRITON = {10: (3, 4), 11: (3, 4)}  # that is right on these


def parse_version(version):
    """The first three numbers of a version such as "3.6.0+git9844da95"."""
    return tuple(map(int, re.findall(r"\d+", version)[:3]))


TRITON = parse_version(triton.__version__)


class Blocks(NamedTuple):
    """How a map is cut into blocks. Rows of a block and of its window are STEP apart, columns 1."""

    ROWS: int  # of a block
    COLUMNS: int
    STEP: int
    GROUPS: int  # blocks in vertical direction, for each of the STEP first rows
    TILES: int  # blocks in horizontal direction
    WINDOW_ROWS: int
    WINDOW_COLUMNS: int
    TOP: int  # first row of the window relative to the block's, in steps
    LEFT: int  # first column of the window relative to the block's

    @property
    def pixels(self):
        return self.ROWS * self.COLUMNS

    @property
    def window(self):
        return self.WINDOW_ROWS * self.WINDOW_COLUMNS

    @property
    def per_map(self):
        return self.STEP * self.GROUPS * self.TILES

    @property
    def band(self):
        """Lines, and their length, of the table of taps: all distances between a pixel of a block and its window."""
        return self.WINDOW_ROWS + self.ROWS - 1, self.WINDOW_COLUMNS + self.COLUMNS - 1


def power_of_2(number, smallest=16):
    """The next power of 2, at least 16, the smallest size that tensor cores multiply."""
    return max(smallest, triton.next_power_of_2(number))


def round_up(window, chunk):
    """Pixels of a window that are multiplied: whole chunks, or for less than one the next power of 2."""
    return triton.cdiv(window, chunk) * chunk if window > chunk else power_of_2(window)


def cut_side(size, block, reach):
    """Cut `size` pixels into blocks: (number of blocks, length of the window, its start relative to the block)."""
    if block >= size:
        return 1, size, 0
    return triton.cdiv(size, block), block + 2 * reach, -reach


@functools.cache
def cut(height, width, kernel_size, dilation, chunk, max_pixels):
    """The cheapest `Blocks` of at most `max_pixels` for a map of height x width, by counting products and loads."""
    choices = []
    for step in {1, dilation}:
        lines = triton.cdiv(height, step)  # rows with the same remainder
        taps = min(kernel_size // 2, (height - 1) // dilation)  # above the middle that can meet the map
        reach = taps * dilation // step
        for columns in {min(width, max_pixels), *(size for size in (16, 32, 64) if size < min(width, max_pixels))}:
            side = cut_side(width, columns, min(kernel_size // 2, (width - 1) // dilation) * dilation)
            for rows in range(1, min(lines, max_pixels // columns) + 1):
                groups, window_rows, top = cut_side(lines, rows, reach)
                choice = Blocks(rows, columns, step, groups, side[0], window_rows, side[1], top, side[2])
                window = round_up(choice.window, chunk)
                line = width * rows if step == 1 and columns == width else math.gcd(columns, side[1], side[2])
                cost = window * (power_of_2(choice.pixels) + LOAD_COST // math.gcd(line, 8)) + BLOCK_COST
                choices.append((choice.per_map * cost, choice))
    return min(choices)[1]


@triton.jit
def locate(m, GROUPS: tl.constexpr, TILES: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr):
    """Image, first row and first column of block m."""
    PER_MAP: tl.constexpr = STEP * GROUPS * TILES
    block = m % PER_MAP
    line = block // TILES
    top = (line // STEP) * (ROWS * STEP) + line % STEP
    return m // PER_MAP, top, (block % TILES) * COLUMNS


@triton.jit
def pixels_at(
    plane, top, left, q, known, SIZE: tl.constexpr, LENGTH: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    STEP: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Positions of the pixels q of a block or window that has SIZE pixels in lines of LENGTH.

    Args:
        plane: (M, 1) int64, offset of each block's channel of its image.
        top, left: (M, 1) its first row and column, which may lie outside of the map.
        q: (1, Q).
        known: (M, 1) whether the block exists.

    Returns:
        (M, Q) offsets, (M, Q) whether each pixel lies in the block and on the map.
    """
    if TILES == 1 and STEP == 1:  # whole lines are contiguous; in this form Triton can read several at once
        offset = top * W + q
        inside = (offset >= 0) & (offset < H * W)
    else:
        row = top + q // LENGTH * STEP
        column = left + q % LENGTH
        offset = row * W + column
        inside = (row >= 0) & (row < H) & (column >= 0) & (column < W)
    return plane + offset, inside & known & (q < SIZE)


@triton.jit(do_not_specialize=["SIZE", "K", "DILATION", "ROWS", "COLUMNS", "STEP", "TOP", "LEFT", "LENGTH"])
def spread_kernel(
    weight, band, SIZE, K, DILATION, ROWS, COLUMNS, STEP, TOP, LEFT, LENGTH, FLIP: tl.constexpr, CHUNK: tl.constexpr
):
    """Write a kernel with zeros between and around its taps, so that `convolve_kernel` reads it without masks.

    weight (C, K, K); band (C, SIZE) holds lines of LENGTH: the tap between a block's last pixel and its window's first
    one comes first, the tap between the block's first pixel and the window's last one last.
    """
    SPREAD = DILATION // STEP  # rows between two taps, in steps
    channel = tl.program_id(1)
    at = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)
    i = at // LENGTH - (ROWS - 1) + TOP + K // 2 * SPREAD
    j = at % LENGTH - (COLUMNS - 1) + LEFT + K // 2 * DILATION
    tap = i // SPREAD * K + j // DILATION
    there = (i >= 0) & (i < K * SPREAD) & (i % SPREAD == 0) & (j >= 0) & (j < K * DILATION) & (j % DILATION == 0)
    if FLIP:
        tap = K * K - 1 - tap
    value = tl.load(weight + channel * (K * K) + tap, mask=there & (at < SIZE), other=0.0)
    tl.store(band + channel * SIZE + at, value.to(band.dtype.element_ty), mask=at < SIZE)


@triton.jit(do_not_specialize=["blocks", "C"])
def convolve_kernel(
    x, band, bias, y, blocks, C,
    H: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    TILE: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """y = x convolved with the kernel, for one channel and TILE blocks.

    x, y (N, C, H, W); band from `spread_kernel`; bias (C,) or None; `blocks` is their number in all images.
    """
    WINDOW: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    LENGTH: tl.constexpr = WINDOW_COLUMNS + COLUMNS - 1
    SIZE: tl.constexpr = (WINDOW_ROWS + ROWS - 1) * LENGTH
    channel = tl.program_id(1)
    m = tl.program_id(0) * TILE + tl.arange(0, TILE)
    image, top, left = locate(m, GROUPS, TILES, ROWS, COLUMNS, STEP)
    plane = ((image.to(tl.int64) * C + channel) * (H * W))[:, None]
    top, left, known = top[:, None], left[:, None], (m < blocks)[:, None]
    o = tl.arange(0, PIXELS)
    # Indices beyond the block or the window have no place in the band: use that of the last pixel instead.
    pixel = tl.minimum(o, ROWS * COLUMNS - 1)
    behind = (ROWS - 1 - pixel // COLUMNS) * LENGTH + COLUMNS - 1 - pixel % COLUMNS
    band += channel * SIZE

    total = tl.zeros((TILE, PIXELS), tl.float32)
    for start in range(0, WINDOW, CHUNK):
        q = start + tl.arange(0, CHUNK)
        at, inside = pixels_at(
            plane, top + TOP * STEP, left + LEFT, q[None, :], known, WINDOW, WINDOW_COLUMNS, H, W, STEP, TILES
        )
        window = tl.load(x + at, mask=inside, other=0.0)
        if WINDOW % CHUNK != 0:
            q = tl.minimum(q, WINDOW - 1)
        ahead = q // WINDOW_COLUMNS * LENGTH + q % WINDOW_COLUMNS
        taps = tl.load(band + (ahead[:, None] + behind[None, :]))
        total = tl.dot(window, taps, total, input_precision="ieee")

    if bias is not None:
        total += tl.load(bias + channel).to(tl.float32)
    at, inside = pixels_at(plane, top, left, o[None, :], known, ROWS * COLUMNS, COLUMNS, H, W, STEP, TILES)
    tl.store(y + at, total.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["C", "SPLITS"])
def product_kernel(
    x, grad, products, blocks, C, SPLITS,
    H: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, STEP: tl.constexpr, GROUPS: tl.constexpr, TILES: tl.constexpr,
    WINDOW_ROWS: tl.constexpr, WINDOW_COLUMNS: tl.constexpr, TOP: tl.constexpr, LEFT: tl.constexpr,
    TILE: tl.constexpr, PIXELS: tl.constexpr, CHUNK: tl.constexpr, WINDOW: tl.constexpr,
):  # fmt: skip
    """products[split, channel, o, q] = sum over m of grad[m, o] * x[m, q], for CHUNK of the q.

    x, grad (N, C, H, W); products (SPLITS, C, PIXELS, WINDOW) float32, WINDOW a multiple of CHUNK. Split s adds the
    tiles s, s + SPLITS, ... of the blocks.
    """
    SIZE: tl.constexpr = WINDOW_ROWS * WINDOW_COLUMNS
    channel, split = tl.program_id(1), tl.program_id(2)
    q = tl.program_id(0) * CHUNK + tl.arange(0, CHUNK)[None, :]
    o = tl.arange(0, PIXELS)
    total = tl.zeros((PIXELS, CHUNK), tl.float32)
    for start in range(split * TILE, blocks, SPLITS * TILE):
        m = start + tl.arange(0, TILE)
        image, top, left = locate(m, GROUPS, TILES, ROWS, COLUMNS, STEP)
        plane = ((image.to(tl.int64) * C + channel) * (H * W))[:, None]
        top, left, known = top[:, None], left[:, None], (m < blocks)[:, None]
        at, inside = pixels_at(plane, top + TOP * STEP, left + LEFT, q, known, SIZE, WINDOW_COLUMNS, H, W, STEP, TILES)
        window = tl.load(x + at, mask=inside, other=0.0)
        at, inside = pixels_at(plane, top, left, o[None, :], known, ROWS * COLUMNS, COLUMNS, H, W, STEP, TILES)
        block = tl.load(grad + at, mask=inside, other=0.0)
        total = tl.dot(tl.trans(block), window, total, input_precision="ieee")
    first = (channel.to(tl.int64) + split * C) * (PIXELS * WINDOW)
    tl.store(products + first + o[:, None] * WINDOW + q, total)


@triton.jit(
    do_not_specialize=[
        "C", "SPLITS", "K", "DILATION", "ROWS", "COLUMNS", "STEP", "WINDOW_ROWS", "WINDOW_COLUMNS", "TOP", "LEFT",
        "WINDOW",
    ]
)  # fmt: skip
def gather_kernel(
    products, out, C, SPLITS, K, DILATION, ROWS, COLUMNS, STEP, WINDOW_ROWS, WINDOW_COLUMNS, TOP, LEFT, WINDOW,
    PIXELS: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """One row of taps of one channel: the sums of those products whose pixels are that far apart.

    products as `product_kernel` leaves them; out (C, K, K) float32; TAPS at least K.
    """
    i, channel = tl.program_id(0), tl.program_id(1)
    o, j = tl.arange(0, PIXELS)[:, None], tl.arange(0, TAPS)
    row = o // COLUMNS + (i - K // 2) * (DILATION // STEP) - TOP
    column = o % COLUMNS + (j[None, :] - K // 2) * DILATION - LEFT
    inside = (row >= 0) & (row < WINDOW_ROWS) & (column >= 0) & (column < WINDOW_COLUMNS)
    inside = inside & (o < ROWS * COLUMNS) & (j < K)[None, :]
    at = o * WINDOW + row * WINDOW_COLUMNS + column
    total = tl.zeros((PIXELS, TAPS), tl.float32)
    for split in range(SPLITS):
        first = (channel.to(tl.int64) + split * C) * (PIXELS * WINDOW)
        total += tl.load(products + first + at, mask=inside, other=0.0)
    tl.store(out + (channel * K + i) * K + j, tl.sum(total, 0), mask=j < K)


@functools.cache
def plan_convolution(batch_size, height, width, kernel_size, dilation):
    """How `convolve_kernel` is launched: (`Blocks` of each map, total number of blocks, keyword arguments)."""
    blocks = cut(height, width, kernel_size, dilation, CHUNK, MAX_PIXELS)
    number = batch_size * blocks.per_map
    tile, pixels = min(power_of_2(number), MAX_TILE), power_of_2(blocks.pixels)
    warps = 8 if tile * pixels >= 64 * 64 else 4
    return blocks, number, dict(TILE=tile, PIXELS=pixels, CHUNK=CHUNK, num_warps=warps)


@functools.cache
def plan_gradient(batch_size, channels, height, width, kernel_size, dilation):
    """How `product_kernel` is launched: (`Blocks` of each map, total number of blocks, splits, keyword arguments)."""
    blocks = cut(height, width, kernel_size, dilation, CHUNK_GRADIENT, MAX_PIXELS_GRADIENT)
    number = batch_size * blocks.per_map
    chunk, window = min(power_of_2(blocks.window), CHUNK_GRADIENT), round_up(blocks.window, CHUNK_GRADIENT)
    tile = min(power_of_2(number), TILE_GRADIENT)
    # More programs keep the GPU busy, but each of them should add up at least four tiles.
    splits = min(PROGRAMS // (channels * window // chunk), number // (4 * tile))
    pixels = power_of_2(blocks.pixels)
    warps = 8 if pixels * chunk >= 64 * 128 else 4
    arguments = dict(TILE=tile, PIXELS=pixels, CHUNK=chunk, WINDOW=window, num_warps=warps)
    return blocks, number, max(splits, 1), arguments


def stages(capability, version=None):
    """The option of `product_kernel` that a GPU of this compute capability needs: {} or a loop with a single stage."""
    with_proxy = capability is not None and capability[0] in PROXY_CAPABILITIES
    return dict(num_stages=1) if with_proxy and (version or TRITON) < FIRST_TRITON_WITH_FENCE else {}


@functools.cache
def find_capability(device):
    """The compute capability of a GPU, (major, minor); None elsewhere, as in Triton's interpreter."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else None


@functools.cache
def check_compiler(device):
    """RuntimeError if the kernels that this Triton makes for a GPU lack fences."""
    capability = find_capability(device)
    if capability is not None and TRITON < FIRST_TRITON.get(capability[0], (0,)):
        raise RuntimeError(
            f"Triton {triton.__version__} leaves out fences on compute capability {capability[0]}.{capability[1]}; "
            "PyTorch 2.8 comes with one that does not"
        )


def convolve(x, weight, bias, dilation, flip):
    """Run `convolve_kernel`: x (N, C, H, W), weight (C, 1, K, K), bias (C,) or None -> (N, C, H, W) contiguous."""
    check_compiler(x.device)
    x, weight = x.contiguous(), weight.contiguous()
    y = torch.empty_like(x)
    batch_size, channels, height, width = x.shape
    kernel_size = weight.shape[-1]
    if not x.numel():
        return y
    blocks, number, arguments = plan_convolution(batch_size, height, width, kernel_size, dilation)
    lines, length = blocks.band
    band = x.new_empty(channels, lines, length)
    with torch.cuda.device_of(x):
        spread_kernel[triton.cdiv(lines * length, 1024), channels](
            weight, band, lines * length, kernel_size, dilation, blocks.ROWS, blocks.COLUMNS, blocks.STEP, blocks.TOP,
            blocks.LEFT, length, flip, CHUNK=1024,
        )  # fmt: skip
        convolve_kernel[triton.cdiv(number, arguments["TILE"]), channels](
            x, band, bias, y, number, channels, height, width, *blocks, **arguments
        )
    return y


def weight_gradient(x, grad, kernel_size, dilation):
    """Run `product_kernel` and `gather_kernel`: x, grad (N, C, H, W) -> (C, 1, K, K) float32."""
    x, grad = x.contiguous(), grad.contiguous()
    batch_size, channels, height, width = x.shape
    if not x.numel():
        return x.new_zeros(channels, 1, kernel_size, kernel_size, dtype=torch.float32)
    blocks, number, splits, arguments = plan_gradient(batch_size, channels, height, width, kernel_size, dilation)
    pixels, window = arguments["PIXELS"], arguments["WINDOW"]
    products = x.new_empty(splits, channels, pixels, window, dtype=torch.float32)
    out = x.new_empty(channels, 1, kernel_size, kernel_size, dtype=torch.float32)
    with torch.cuda.device_of(x):
        product_kernel[window // arguments["CHUNK"], channels, splits](
            x, grad, products, number, channels, splits, height, width, *blocks, **arguments,
            **stages(find_capability(x.device)),
        )  # fmt: skip
        gather_kernel[kernel_size, channels](
            products, out, channels, splits, kernel_size, dilation, blocks.ROWS, blocks.COLUMNS, blocks.STEP,
            blocks.WINDOW_ROWS, blocks.WINDOW_COLUMNS, blocks.TOP, blocks.LEFT, window,
            PIXELS=pixels, TAPS=power_of_2(kernel_size), num_warps=4,
        )  # fmt: skip
    return out


@torch.library.custom_op("unireplknet::depthwise_triton", mutates_args=())
def convolution_operator(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], dilation: int, flip: bool = False
) -> torch.Tensor:
    """`depthwise_conv2d` as an operator, which torch.compile does not look into."""
    return convolve(x, weight, bias, dilation, flip)


@torch.library.custom_op("unireplknet::depthwise_triton_weight", mutates_args=())
def weight_operator(x: torch.Tensor, grad: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """`depthwise_weight` as an operator."""
    return weight_gradient(x, grad, kernel_size, dilation)


@convolution_operator.register_fake
def _(x, weight, bias, dilation, flip=False):
    return torch.empty_like(x, memory_format=torch.contiguous_format)


@weight_operator.register_fake
def _(x, grad, kernel_size, dilation):
    return x.new_empty(x.shape[1], 1, kernel_size, kernel_size, dtype=torch.float32)


def save_convolution(ctx, inputs, output):
    x, weight, bias, ctx.dilation, ctx.flip = inputs
    ctx.save_for_backward(x, weight)
    ctx.bias_dtype = None if bias is None else bias.dtype


def convolution_gradients(ctx, grad):
    """Gradients of `depthwise_conv2d` for x, weight and bias."""
    x, weight = ctx.saved_tensors
    grad_x = grad_weight = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = depthwise_conv2d(grad, weight, None, ctx.dilation, not ctx.flip)
    if ctx.needs_input_grad[1]:
        pair = (grad, x) if ctx.flip else (x, grad)  # a turned kernel swaps what is read and what is written
        grad_weight = depthwise_weight(*pair, weight.shape[-1], ctx.dilation).to(weight.dtype)
    if ctx.needs_input_grad[2]:
        grad_bias = grad.sum((0, 2, 3), dtype=ctx.bias_dtype)
    return grad_x, grad_weight, grad_bias, None, None


def save_weight_gradient(ctx, inputs, output):
    x, grad, _, ctx.dilation = inputs
    ctx.save_for_backward(x, grad)


def weight_gradient_gradients(ctx, seed):
    """Gradients of `depthwise_weight`, for a second derivative."""
    x, grad = ctx.saved_tensors
    grad_x = depthwise_conv2d(grad, seed, None, ctx.dilation, True) if ctx.needs_input_grad[0] else None
    grad_grad = depthwise_conv2d(x, seed, None, ctx.dilation, False) if ctx.needs_input_grad[1] else None
    return grad_x, grad_grad, None, None


convolution_operator.register_autograd(convolution_gradients, setup_context=save_convolution)
weight_operator.register_autograd(weight_gradient_gradients, setup_context=save_weight_gradient)


class Convolution(torch.autograd.Function):
    """`convolve` with its gradients. A `setup_context` of its own takes the CPU longer than all the rest."""

    @staticmethod
    def forward(ctx, *inputs):
        output = convolve(*inputs)
        save_convolution(ctx, inputs, output)
        return output

    backward = staticmethod(convolution_gradients)


class WeightGradient(torch.autograd.Function):
    """`weight_gradient` with its gradients."""

    @staticmethod
    def forward(ctx, *inputs):
        output = weight_gradient(*inputs)
        save_weight_gradient(ctx, inputs, output)
        return output

    backward = staticmethod(weight_gradient_gradients)


def is_watched(x):
    """Whether operators on x are recorded or replaced: by torch.compile, a dispatch mode, or a subclass of Tensor."""
    return torch.compiler.is_compiling() or type(x) is not torch.Tensor or is_in_torch_dispatch_mode()


def depthwise_conv2d(
    x: torch.Tensor, weight: torch.Tensor, bias: Optional[torch.Tensor], dilation: int, flip: bool = False
) -> torch.Tensor:
    """Depthwise convolution with stride 1 and "same" zero padding on tensor cores.

    A network of small maps waits for the CPU to launch kernels. An operator of torch.library takes the CPU longer than
    an `autograd.Function`, so it is there only for what must not look into the function.

    Args:
        x: (N, C, H, W) bfloat16 or float16; one that is not contiguous is copied.
        weight: (C, 1, k, k), k odd, of x's dtype or float32; its gradient has its dtype.
        bias: (C,) or None.
        dilation: distance between neighbouring taps in pixels.
        flip: turn the kernel by 180 degrees, which gives the input gradient.

    Returns:
        (N, C, H, W) in x's dtype, contiguous; sums are float32.
    """
    if is_watched(x):
        return convolution_operator(x, weight, bias, dilation, flip)
    return (Convolution.apply if torch.is_grad_enabled() else convolve)(x, weight, bias, dilation, flip)


def depthwise_weight(x: torch.Tensor, grad: torch.Tensor, kernel_size: int, dilation: int) -> torch.Tensor:
    """Weight gradient of `depthwise_conv2d`, float32: x, grad (N, C, H, W) -> (C, 1, k, k)."""
    if is_watched(x):
        return weight_operator(x, grad, kernel_size, dilation)
    return (WeightGradient.apply if torch.is_grad_enabled() else weight_gradient)(x, grad, kernel_size, dilation)
