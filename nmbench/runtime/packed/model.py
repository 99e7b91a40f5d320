"""Folders of packed weights, and the transformers models made of them.

`packed.json` names the files, and the shape and pattern of every packed layer. The files hold all tensors of the model
by the names of its state: `LAYER.values` and `LAYER.codes` in place of a packed `LAYER.weight`. They are not named as
loaders of transformers expect weight files, so that no loader takes a packed model for a dense one without weights.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern
from nmbench.runtime.dtypes import dtype_name
from nmbench.runtime.packed.linear import PackedLinear

PACKED = "packed.json"
FORMAT = "nmbench packed model 1"
SHARD = 5 * 10**9  # bytes of a file, as transformers writes them


def packed_layers(model: nn.Module) -> dict[str, PackedLinear]:
    """Return the packed layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, PackedLinear)}


def save_packed(model: nn.Module, masks: Mapping[str, tuple[Pattern, Tensor]], folder: Path) -> dict[str, PackedLinear]:
    """Write the state of `model` to `folder`, with the layers of `masks` packed; return these layers.

    masks: layer name -> pattern and mask, bool `[out, in]`. The model does not change. Tensors that share memory, as
    tied embeddings do, are written once. Raises `NotStrict` if a weight is not zero off its mask.
    """
    layers = {name: PackedLinear.of(model.get_submodule(name), *kept) for name, kept in masks.items()}
    tensors = {name: tensor for name, tensor in without_copies(model.state_dict()) if layer_of(name) not in layers}
    for name, layer in layers.items():
        tensors.update({f"{name}.{part}": tensor for part, tensor in layer.state_dict().items()})
    files = []
    for number, part in enumerate(shards(tensors), 1):
        files.append(f"packed-{number:05}.safetensors")
        ready = {name: tensor.detach().cpu().contiguous() for name, tensor in part.items()}
        safetensors.torch.save_file(ready, folder / files[-1], {"format": "pt"})
    about = {"format": FORMAT, "files": files, "layers": {name: described(layer) for name, layer in layers.items()}}
    (folder / PACKED).write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")
    return layers


def layer_of(tensor: str) -> str:
    """Return the name of the module that holds a tensor of a model's state."""
    return tensor.rpartition(".")[0]


def described(layer: PackedLinear) -> dict[str, Any]:
    """Return all that is needed to make an empty layer of the same form."""
    return {
        "shape": list(layer.packed.shape),
        "pattern": str(layer.pattern),
        "dtype": dtype_name(layer.values.dtype),
        "bias": layer.bias is not None,
        "transposed": layer.transposed,
    }


def without_copies(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """Yield the entries of a model's state, the first name alone of tensors that are the same memory."""
    seen = set()
    for name, tensor in state.items():
        place = (tensor.data_ptr(), tuple(tensor.shape), tensor.dtype) if tensor.numel() else name
        if place not in seen:
            seen.add(place)
            yield name, tensor


def shards(tensors: Mapping[str, Tensor], largest: int = SHARD) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors in order, in parts of at most `largest` bytes or of one tensor."""
    part: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if part and sum(other.nbytes for other in part.values()) + tensor.nbytes > largest:
            yield part
            part = {}
        part[name] = tensor
    if part:
        yield part


def load_packed(folder: Path | str, device: torch.device | str = "cpu") -> nn.Module:
    """Return the model in a folder that `nmbench export --for packed` wrote, for inference, its weights packed.

    The dense weights are never in memory at once. Raises `NMBenchError` if the folder is not such an export, its files
    and its configuration disagree, or its model needs code of its own.
    """
    folder = Path(folder)
    about = description(folder)
    model = skeleton(folder)
    for name, layer in about["layers"].items():
        replace(model, name, empty_layer(layer), folder)
    state: dict[str, Tensor] = {}
    for file in about["files"]:
        try:
            state.update(safetensors.torch.load_file(folder / Path(file).name, str(device)))
        except (OSError, safetensors.SafetensorError) as error:
            raise NMBenchError(f"cannot read {folder / file}: {error}. Export the row again.") from error
    fill(model, state, folder)
    return model.to(device).eval()


def description(folder: Path) -> dict[str, Any]:
    """Return the content of the packed model's description. Raises `NMBenchError` for any other folder."""
    try:
        about = json.loads((folder / PACKED).read_bytes())
    except (OSError, ValueError) as error:
        raise NMBenchError(
            f"{folder} holds no packed model ({PACKED}: {error}); write one with `nmbench export --for packed`."
        ) from error
    if not isinstance(about, dict) or about.get("format") != FORMAT:
        raise NMBenchError(f"{folder / PACKED} is not of the format {FORMAT!r}; export the row again.")
    return about


def empty_layer(layer: Mapping[str, Any]) -> PackedLinear:
    """Return the layer of one entry of the description, on the meta device."""
    rows, inputs = layer["shape"]
    dtype = getattr(torch, layer["dtype"])
    return PackedLinear.empty(
        (rows, inputs), Pattern.parse(layer["pattern"]), dtype, layer["bias"], layer["transposed"]
    )


def skeleton(folder: Path) -> nn.Module:
    """Return the model of a folder's `config.json`, with buffers but without weights: they are on the meta device."""
    import transformers

    config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    made = next(iter(config.architectures or ()), "")
    cls = getattr(transformers, made, None)
    if cls is None:
        raise NMBenchError(f"{folder} is of the class {made!r}, which transformers does not have.")
    with without_weights():
        model = cls(config)
    if (folder / "generation_config.json").is_file():
        model.generation_config = transformers.GenerationConfig.from_pretrained(folder)
    return model


@contextmanager
def without_weights() -> Iterator[None]:
    """Put every parameter that a module registers on the meta device; buffers, which are computed, stay real."""
    usual = nn.Module.register_parameter

    def register(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        usual(module, name, None if parameter is None else nn.Parameter(parameter.detach().to("meta"), False))

    nn.Module.register_parameter = register  # type: ignore[method-assign,assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = usual  # type: ignore[method-assign]


def replace(model: nn.Module, name: str, layer: PackedLinear, folder: Path) -> None:
    """Put a packed layer in the place of the dense one. Raises `NMBenchError` if the model has no layer of the name."""
    try:
        model.get_submodule(name)
    except AttributeError as error:
        raise NMBenchError(f"{folder / PACKED} names {name}, which the model of config.json does not have.") from error
    model.set_submodule(name, layer)


def fill(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
    """Give the model the tensors of `state`. Raises `NMBenchError` if one is left over, missing or of another shape."""
    try:
        unexpected = model.load_state_dict(state, strict=False, assign=True).unexpected_keys
    except RuntimeError as error:
        raise NMBenchError(f"{folder} does not fit its config.json: {' '.join(str(error).split())}") from error
    model.tie_weights()  # type: ignore[operator]
    missing = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if unexpected or missing:
        problem = f"{unexpected[0]} is of no layer" if unexpected else f"{missing[0]} is missing"
        raise NMBenchError(f"{folder} does not fit its config.json: {problem}. Export the row again.")
