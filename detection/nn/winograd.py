"""3×3 convolution by Winograd's algorithm, for float32 on a CPU, with a quarter of the multiplications.

A tile of 4 × 4 outputs needs a patch of 6 × 6 inputs. Patches and filters are transformed to 36 values each, whose
products are 36 matrix products, and these are transformed back to tiles (Lavin and Gray, 2016). With the points below,
the rounding error is two to three times that of direct convolution. The gradients are the transposes of the same steps.

B images, C input channels, K output channels, T tiles of all maps.
"""

import math
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from detection.runtime.device import match_memory_format

FILTER, TILE, PATCH = 3, 4, 6
POINTS = (0.0, 1.0, -1.0, 0.5, -2.0)  # and infinity; with 2 instead of 0.5, the rounding error is 1.5 times as large
BLOCK_BYTES = 2**24  # of intermediate results, so that they stay in the cache, and in memory that malloc keeps
MIN_CHANNELS, MIN_TILES = 128, 64  # below, the transforms cost more than the products save


def make_transforms() -> tuple[Tensor, Tensor, Tensor]:
    """Return the matrices of a filter (6, 3), of a patch (6, 6) and of a tile's products (4, 6), for each axis."""
    finite = len(POINTS)
    filters, patches, tiles = np.zeros((PATCH, FILTER)), np.zeros((PATCH, PATCH)), np.zeros((TILE, PATCH))
    for row, point in enumerate(POINTS):
        others = np.delete(POINTS, row)
        filters[row] = point ** np.arange(FILTER) / np.prod(point - others)
        patches[row, :finite] = np.poly(others)[::-1]
        tiles[:, row] = point ** np.arange(TILE)
    filters[finite, -1] = tiles[-1, finite] = 1  # the point at infinity
    patches[finite] = np.poly(POINTS)[::-1]
    return torch.from_numpy(filters).float(), torch.from_numpy(patches).float(), torch.from_numpy(tiles).float()


FILTER_TRANSFORM, PATCH_TRANSFORM, TILE_TRANSFORM = make_transforms()

ALL_ONES = (PATCH + 1) * POINTS.index(1)
"""Index of the product at point 1 of both axes, which adds to all outputs of a tile alike."""


def use_winograd(model: nn.Module) -> None:
    """Let the convolutions of a model use this algorithm where it is faster. Names and weights stay the same."""
    for module in model.modules():
        if type(module) is nn.Conv2d and is_suitable(module):
            module.__class__ = WinogradConv2d


def is_suitable(conv: nn.Conv2d) -> bool:
    """Return whether a convolution is 3×3 with stride 1 and zero padding that keeps the size, and wide enough."""
    geometry = conv.kernel_size, conv.stride, conv.padding, conv.dilation, conv.groups, conv.padding_mode
    is_3x3 = geometry == ((3, 3), (1, 1), (1, 1), (1, 1), 1, "zeros")
    return is_3x3 and min(conv.in_channels, conv.out_channels) >= MIN_CHANNELS


class WinogradConv2d(nn.Conv2d):
    """3×3 convolution that selects the algorithm by the size of its input."""

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return convolve([input], weight, bias)[0]


def convolve_levels(conv: nn.Module, levels: Sequence[Tensor]) -> list[Tensor]:
    """Apply a convolution to maps (B, C, h, w) of several sizes."""
    if isinstance(conv, WinogradConv2d):
        return convolve(levels, conv.weight, conv.bias)
    return [conv(level) for level in levels]


def convolve(maps: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> list[Tensor]:
    """Convolve maps (B, C, h, w) with a filter (K, C, 3, 3). Return (B, K, h, w), in the filter's layout."""
    if weight.dtype is not torch.float32 or sum(count_tiles([one.shape for one in maps])) < MIN_TILES:
        return [F.conv2d(one, weight, bias, padding=1) for one in maps]
    return list(_Convolution.apply(weight, bias, *maps))


class _Convolution(torch.autograd.Function):
    """Convolution of several maps with one filter. Images and output channels are computed in blocks."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor | None, *maps: Tensor) -> tuple[Tensor, ...]:
        shapes = [one.shape for one in maps]
        results = [make_map(len(one), len(weight), *one.shape[2:]) for one in maps]
        filters = [transform_filter(part) for part in weight.split(choose_block_size(shapes, len(weight)))]
        all_channels, blocks = split_channels(filters), []
        for images in split_images(shapes):
            blocks.append(patches := transform_patches([one[images] for one in maps]))
            for channels, block in zip(all_channels, filters, strict=True):
                products = torch.bmm(patches, block)
                if bias is not None:
                    products[ALL_ONES] += bias[channels]
                put_tiles(transform(TILE_TRANSFORM, products), [one[images, channels] for one in results])
        ctx.save_for_backward(weight, *filters, *blocks)
        ctx.num_filters, ctx.shapes = len(filters), shapes
        return tuple(match_memory_format(one, weight) for one in results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        weight, *saved = ctx.saved_tensors
        filters, blocks = saved[: ctx.num_filters], saved[ctx.num_filters :]
        needs_weight, needs_bias, *needs_maps = ctx.needs_input_grad
        all_channels, all_images = split_channels(filters), split_images(ctx.shapes)
        filter_grads: list[Tensor | None] = [None] * len(filters)
        bias_grad = torch.zeros(len(weight)) if needs_bias else None
        map_grads = [make_map(*shape) for shape in ctx.shapes] if any(needs_maps) else []
        for images, patches in zip(all_images, blocks, strict=True):
            patch_grad = None
            for index, (channels, block) in enumerate(zip(all_channels, filters, strict=True)):
                products_grad = transform(TILE_TRANSFORM.T, take_tiles([grad[images, channels] for grad in grads]))
                if bias_grad is not None:
                    bias_grad[channels] += products_grad[ALL_ONES].sum(dim=0)
                if needs_weight:
                    filter_grads[index] = add_product(filter_grads[index], patches.mT, products_grad)
                if map_grads:
                    patch_grad = add_product(patch_grad, products_grad, block.mT)
            if patch_grad is not None:
                add_patches(transform(PATCH_TRANSFORM.T, patch_grad), [grad[images] for grad in map_grads])
        weight_grad = None
        if needs_weight:
            parts = [transform_filter_gradient(grad) for grad in filter_grads if grad is not None]
            weight_grad = match_memory_format(torch.cat(parts), weight)
        grads_in_layout: list[Tensor | None] = [match_memory_format(grad, weight) for grad in map_grads]
        return weight_grad, bias_grad, *(grads_in_layout or [None] * len(grads))


def transform(matrix: Tensor, values: Tensor) -> Tensor:
    """Multiply both axes of values (n·n, T, C) by a matrix (m, n). Return (m·m, T, C)."""
    to, of = matrix.shape
    rows = (matrix @ values.reshape(of, -1)).view(to, of, -1)
    return torch.bmm(matrix.expand(to, to, of), rows).view(to * to, *values.shape[1:])


def add_product(total: Tensor | None, left: Tensor, right: Tensor) -> Tensor:
    """Return the products of a batch of matrices, added in place to `total` if there is one."""
    return torch.bmm(left, right) if total is None else total.baddbmm_(left, right)


def make_map(*shape: int) -> Tensor:
    """Return an uninitialized map (B, C, h, w)."""
    return torch.empty(shape, memory_format=torch.channels_last)


def count_rows_columns(height: int, width: int) -> tuple[int, int]:
    """Return the rows and columns of tiles that cover a map."""
    return -(-height // TILE), -(-width // TILE)


def count_tiles(shapes: Sequence[torch.Size]) -> list[int]:
    """Return the number of tiles of each map (B, C, h, w)."""
    return [batch * math.prod(count_rows_columns(*size)) for batch, _, *size in shapes]


def split_images(shapes: Sequence[torch.Size]) -> list[slice]:
    """Return ranges of images whose transformed patches have at most BLOCK_BYTES, or of one image."""
    batch, channels = shapes[0][:2]
    images = max(1, BLOCK_BYTES * batch // (4 * PATCH**2 * channels * sum(count_tiles(shapes))))
    return [slice(start, min(start + images, batch)) for start in range(0, batch, images)]


def choose_block_size(shapes: Sequence[torch.Size], out_channels: int) -> int:
    """Return the output channels whose filters and products of a block of images have about BLOCK_BYTES each."""
    batch, in_channels = shapes[0][:2]
    tiles = sum(count_tiles(shapes)) * split_images(shapes)[0].stop // batch
    blocks = math.ceil(4 * PATCH**2 * max(tiles, in_channels) * out_channels / BLOCK_BYTES)
    return math.ceil(out_channels / blocks)


def split_channels(filters: Sequence[Tensor]) -> list[slice]:
    """Return the ranges of output channels of transformed filters (36, C, k)."""
    return [slice(*ends) for ends in pairwise(accumulate((block.shape[2] for block in filters), initial=0))]


def transform_filter(weight: Tensor) -> Tensor:
    """Return the transformed filter (36, C, K) of a weight (K, C, 3, 3)."""
    return transform(FILTER_TRANSFORM, weight.permute(2, 3, 1, 0).reshape(FILTER**2, *weight.shape[1::-1]))


def transform_filter_gradient(grad: Tensor) -> Tensor:
    """Return the gradient of a weight (K, C, 3, 3) from that of its transformed filter (36, C, K)."""
    return transform(FILTER_TRANSFORM.T, grad).view(FILTER, FILTER, *grad.shape[1:]).permute(3, 2, 0, 1)


def transform_patches(maps: Sequence[Tensor]) -> Tensor:
    """Return the transformed patches (36, T, C) of maps (B, C, h, w)."""
    counts = count_tiles([one.shape for one in maps])
    patches = torch.empty(PATCH**2, sum(counts), maps[0].shape[1])
    for one, part in zip(maps, patches.split(counts, dim=1), strict=True):
        height, width = one.shape[2:]
        rows, columns = count_rows_columns(height, width)
        padding = 0, 0, 1, TILE * columns + 1 - width, 1, TILE * rows + 1 - height
        windows = F.pad(one.permute(0, 2, 3, 1), padding).unfold(1, PATCH, TILE).unfold(2, PATCH, TILE)
        part.view(PATCH, PATCH, *windows.shape[:4]).copy_(windows.permute(4, 5, 0, 1, 2, 3))
    return transform(PATCH_TRANSFORM, patches)


def add_patches(patches: Tensor, maps: Sequence[Tensor]) -> None:
    """Write the sum of overlapping patches (36, T, C) to maps (B, C, h, w)."""
    overlap = PATCH - TILE
    for one, part in zip(maps, patches.split(count_tiles([one.shape for one in maps]), dim=1), strict=True):
        batch, channels, height, width = one.shape
        rows, columns = count_rows_columns(height, width)
        part = part.view(PATCH, PATCH, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
        padded = part.new_zeros(batch, rows + 1, TILE, columns + 1, TILE, channels)
        padded[:, :-1, :, :-1] = part[:, :, :TILE, :, :TILE]
        padded[:, 1:, :overlap, :-1] += part[:, :, TILE:, :, :TILE]
        padded[:, :-1, :, 1:, :overlap] += part[:, :, :TILE, :, TILE:]
        padded[:, 1:, :overlap, 1:, :overlap] += part[:, :, TILE:, :, TILE:]
        padded = padded.view(batch, TILE * (rows + 1), TILE * (columns + 1), channels)
        one.copy_(padded[:, 1 : height + 1, 1 : width + 1].permute(0, 3, 1, 2))


def take_tiles(maps: Sequence[Tensor]) -> Tensor:
    """Return the tiles (16, T, K) of maps (B, K, h, w)."""
    counts = count_tiles([one.shape for one in maps])
    tiles = torch.empty(TILE**2, sum(counts), maps[0].shape[1])
    for one, part in zip(maps, tiles.split(counts, dim=1), strict=True):
        batch, channels, height, width = one.shape
        rows, columns = count_rows_columns(height, width)
        padding = 0, 0, 0, TILE * columns - width, 0, TILE * rows - height
        padded = F.pad(one.permute(0, 2, 3, 1), padding) if any(padding) else one.permute(0, 2, 3, 1)
        grid = padded.reshape(batch, rows, TILE, columns, TILE, channels).permute(2, 4, 0, 1, 3, 5)
        part.view(grid.shape).copy_(grid)
    return tiles


def put_tiles(tiles: Tensor, maps: Sequence[Tensor]) -> None:
    """Write tiles (16, T, K) to maps (B, K, h, w)."""
    for one, part in zip(maps, tiles.split(count_tiles([one.shape for one in maps]), dim=1), strict=True):
        batch, channels, height, width = one.shape
        rows, columns = count_rows_columns(height, width)
        grid = part.view(TILE, TILE, batch, rows, columns, channels).permute(2, 3, 0, 4, 1, 5)
        target = one.permute(0, 2, 3, 1)
        if (height, width) == (TILE * rows, TILE * columns):
            target.view(grid.shape).copy_(grid)
        else:
            target.copy_(grid.reshape(batch, TILE * rows, TILE * columns, channels)[:, :height, :width])
