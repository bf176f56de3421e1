"""Networks whose weights stay in their safetensors files: mapped into memory, a page of them read when it is used and dropped when room is needed.

The safetensors library maps files too, but so that every page may become the process's own, which a limit on its memory counts in advance. Here
the files are mapped as what they are, for reading, or for writing through to the disk. The header is what the format's description says: 8 bytes with
the length of a JSON object, which holds each tensor's dtype, shape and place behind it.
"""

from __future__ import annotations

import json
import mmap
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nettrim.errors import ArgumentError, FormatError
from nettrim.sharing import turn

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "I64": torch.int64, "I32": torch.int32,
           "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool}  # fmt: skip


def tensors(folder: Path, *, writable: bool, ignore: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, by name, none of them read yet.

    Parameters
    ----------
    folder : Path
    writable : bool
        What is written into them is then written into the files; otherwise they must not be written into.
    ignore : collection of str
        Names of files that hold something else.

    Raises
    ------
    ArgumentError
        There are no such files, or two of them hold the same name.
    FormatError
        One is damaged, or of a dtype that torch lacks.
    """
    found: dict[str, Tensor] = {}
    files = sorted(path for path in folder.glob("*.safetensors") if path.name not in ignore)
    if not files:
        raise ArgumentError(f"{folder} holds no .safetensors file; expected the weights of a network, in one or several")
    for path in files:
        for name, tensor in _of_file(path, writable).items():
            if name in found:
                raise ArgumentError(f"{folder} holds {name!r} twice, the second time in {path.name}; expected the files of one network")
            found[name] = tensor
    return found


def new_masks(path: Path, shapes: Mapping[str, torch.Size]) -> dict[str, Tensor]:
    """Write a file of boolean tensors, all False, and map it for writing: the library's own writer wants all of them in memory."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + shape.numel()
        header[name] = {"dtype": "BOOL", "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
    return _of_file(path, writable=True)


def _of_file(path: Path, writable: bool) -> dict[str, Tensor]:
    try:
        with safetensors.safe_open(path, "pt") as file:  # which checks that the header fits the file
            names = list(file.keys())
        with path.open("rb") as raw:
            length = int.from_bytes(raw.read(8), "little")
            header = json.loads(raw.read(length))
    except safetensors.SafetensorError as error:
        raise FormatError(f"{path} is no whole safetensors file: {error}") from error
    whole = _mapped(path, writable)
    found = {}
    for name in names:
        entry = header[name]
        if entry["dtype"] not in _DTYPES:
            raise FormatError(f"{path}: {name!r} has dtype {entry['dtype']}; expected one of {', '.join(_DTYPES)}")
        start, end = (8 + length + place for place in entry["data_offsets"])
        part = whole[start:end]
        dtype = _DTYPES[entry["dtype"]]
        if start % torch.empty(0, dtype=dtype).element_size():
            part = part.clone()  # where a writer did not align it: no view has that dtype
            if writable:
                raise FormatError(f"{path}: {name!r} does not lie at a multiple of its elements' size; write the file anew with safetensors")
        found[name] = part.view(dtype).view(entry["shape"])
    return found


def _mapped(path: Path, writable: bool) -> Tensor:
    """A file's bytes."""
    if writable:
        return torch.from_file(str(path), shared=True, size=path.stat().st_size, dtype=torch.uint8)
    with path.open("rb") as file, warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given buffer is not writable")
        return torch.frombuffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ), dtype=torch.uint8)


class _EmptyOnMeta(TorchFunctionMode):
    """What is not filled yet takes no memory: so begin the parameters of torch's own modules."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if func is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return func(*args, **kwargs)


@contextmanager
def without_weights() -> Iterator[None]:
    """Modules made meanwhile have parameters on the meta device, which take no memory; their buffers are what they are."""
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and param.device.type != "meta":
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    with turn():
        nn.Module.register_parameter = register  # type: ignore[method-assign]
        try:
            with _EmptyOnMeta():
                yield
        finally:
            nn.Module.register_parameter = original  # type: ignore[method-assign]


def network(factory: Callable[[], Any], named: dict[str, Tensor]) -> nn.Module:
    """The network that ``factory()`` makes, its parameters those ``named``; buffers are copied.

    Raises
    ------
    ArgumentError
        The factory makes no module, or the names or shapes are not its own, or there are integers in the place of floating-point numbers. Of these
        the files say the dtype: a network that is made in float32 becomes one in bfloat16.
    """
    with without_weights():
        model = factory()
    if not isinstance(model, nn.Module):
        raise ArgumentError(f"the factory returned a {type(model).__name__}; expected a torch.nn.Module")
    if hasattr(model, "tie_weights"):
        model.tie_weights()  # type: ignore[operator]
    places: dict[int, list[tuple[nn.Module, str, str]]] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, parameter in module._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((module, key, f"{prefix}.{key}".lstrip(".")))
    missing, used = [], set()
    for same in places.values():
        names = [name for _, _, name in same if name in named]
        if not names:
            missing.append(same[0][2])
            continue
        used.update(names)
        value = named[names[0]]
        expected = same[0][0]._parameters[same[0][1]]
        assert expected is not None
        _require_alike(names[0], value, expected)
        made = nn.Parameter(value, requires_grad=False)
        for module, key, _ in same:
            module._parameters[key] = made
    for prefix, module in model.named_modules(remove_duplicate=False):
        for key, buffer in module._buffers.items():
            name = f"{prefix}.{key}".lstrip(".")
            if name in named:
                used.add(name)
                if buffer is not None:
                    _require_alike(name, named[name], buffer)
                module._buffers[key] = named[name].clone()
    for name, left in model.named_buffers():
        if left.is_meta:
            raise ArgumentError(f"buffer {name!r} is made by torch.empty and is not in the files; expected the factory to fill it another way")
    unknown = sorted(named.keys() - used)
    if missing or unknown:
        parts = [f"{what} {', '.join(map(repr, names[:3]))}" for what, names in (("they lack", missing), ("the network has no", unknown)) if names]
        raise ArgumentError(f"the files do not fit the {type(model).__name__}: {'; '.join(parts)}; expected the weights of the same architecture")
    return model.eval()


def _require_alike(name: str, value: Tensor, expected: Tensor) -> None:
    """Of floating-point numbers the files say how wide they are; all else is the network's."""
    floating = value.is_floating_point() and expected.is_floating_point()
    if value.shape != expected.shape or not (floating or value.dtype == expected.dtype):
        there, here = (f"{tensor.dtype} {tuple(tensor.shape)}" for tensor in (value, expected))
        raise ArgumentError(f"the files hold {name!r} as {there}, and the network as {here}; expected its own")
