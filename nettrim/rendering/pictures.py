"""Weight masks as pictures: every weight a dot where there is room for it, else how many of a cell's weights are kept."""

import base64
import io
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nettrim.errors import ArgumentError
from nettrim.rendering.text import percent

if TYPE_CHECKING:
    from nettrim.report import LayerReport

_SIDE = 512  # pixels at most, either way
_PIXELS = 2**21  # of all pictures together: two megabytes at the very worst
_CELLS = 2**22  # weights that are averaged at a time


@dataclass(frozen=True)
class Picture:
    """A mask as a PNG in a ``data:`` address: the parameter's first dimension from top to bottom, all others from left to right, dark where kept.

    Attributes
    ----------
    name : str
    address : str
    width, height : int
        Pixels.
    cell : tuple of int
        Rows and columns behind a pixel; (1, 1) shows every weight.
    says : str
        The picture in words.
    """

    name: str
    address: str
    width: int
    height: int
    cell: tuple[int, int]
    says: str


def pictures(masks: Mapping[str, Tensor], layers: "tuple[LayerReport, ...]") -> list[Picture]:
    """A picture for each mask, in the layers' order; the errors are those of `checked`."""
    return [_picture(name, mask, _PIXELS // len(masks)) for name, mask in checked(masks, layers)]


def checked(masks: Mapping[str, Tensor], layers: "tuple[LayerReport, ...]") -> list[tuple[str, Tensor]]:
    """The masks in the layers' order, each as a matrix, by the name of its layer, or of its parameter where that is no layer's one weight.

    Raises
    ------
    ArgumentError
        A mask of no pruned layer, or of a layer's one weight that does not keep what the report says.
    """
    found = []
    for parameter, given in masks.items():
        module, _, last = parameter.rpartition(".")
        names = [layer.name for layer in layers]
        inside = [name for name in names if name.startswith(f"{module}." if module else "")]  # of a module that holds several matrices
        if module not in names and not inside:
            raise ArgumentError(
                f"masks: {parameter!r} belongs to no pruned layer of this report; expected the masks of the same run, whose layers are "
                f"{', '.join(names)}"
            )
        tensor = torch.as_tensor(given).detach().cpu()
        mask = tensor if tensor.dtype == torch.bool else tensor != 0
        place = names.index(module if module in names else inside[0])
        layer = layers[place]
        own = layer.name == module and last == "weight"
        if own and (mask.numel() != math.prod(layer.shape) or int(mask.sum()) != layer.nonzeros):
            raise ArgumentError(
                f"masks: {parameter!r} has shape {tuple(mask.shape)} and keeps {int(mask.sum())} weights; the report says {layer.nonzeros} of "
                f"{layer.shape[0]} x {layer.shape[1]}: give the masks of the same run"
            )
        found.append((place, layer.name if own else parameter, mask.reshape(len(mask), -1)))
    return [(name, mask) for _, name, mask in sorted(found, key=lambda item: item[0])]


def density_map(mask: Tensor, pixels: int) -> tuple[Tensor, tuple[int, int]]:
    """Shares of weights kept in cells of a mask (M, N), no more cells than ``pixels`` and no side above 512; and the cells' size."""
    rows, columns = mask.shape
    down, across = math.ceil(rows / _SIDE), math.ceil(columns / _SIDE)
    while math.ceil(rows / down) * math.ceil(columns / across) > max(pixels, 1):
        down, across = (down + 1, across) if rows / down > columns / across else (down, across + 1)
    step = down * max(1, _CELLS // (down * columns))
    # with ceil_mode the cells at the edges average what there is of them
    shares = [torch.nn.functional.avg_pool2d(part[None].float(), (down, across), ceil_mode=True)[0] for part in mask.split(step)]
    return torch.cat(shares), (down, across)


def _picture(name: str, mask: Tensor, pixels: int) -> Picture:
    from PIL import Image

    shares, cell = density_map(mask, pixels)
    darkest = float(shares.max())
    grey = 255 - (255 * shares / (darkest or 1.0)).round().to(torch.uint8)
    image = Image.fromarray(grey.numpy())
    if cell == (1, 1):
        image = image.convert("1")  # an eighth of the size
    out = io.BytesIO()
    image.save(out, format="PNG", optimize=True)
    says = f"{percent(int(mask.count_nonzero()) / max(mask.numel(), 1))} of {mask.shape[0]} by {mask.shape[1]} weights kept"
    for what, axis in (("rows", 1), ("columns", 0)):
        empty = int((~mask.any(axis)).sum())
        says += f"; empty {what}: {empty}" if empty else ""
    if cell != (1, 1):
        says += f"; a dot stands for {cell[0]} by {cell[1]} weights, the darkest for {percent(darkest)} kept"
    return Picture(
        name,
        "data:image/png;base64," + base64.b64encode(out.getvalue()).decode("ascii"),
        image.width,
        image.height,
        cell,
        says,
    )
