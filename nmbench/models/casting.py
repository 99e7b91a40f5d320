"""Parameters of a loaded model in another dtype, as if the model had been loaded in it."""

from __future__ import annotations

import copy
import re
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel


def cast_parameters(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast the parameters of `model` in place, as loading the model in `dtype` would; return it.

    transformers keeps some parameters in float32, such as the routers of some mixtures of experts; these stay so.
    Buffers, such as the float32 frequencies of rotary embeddings, and integers, such as 8-bit weights, keep theirs.
    """
    own = loaded_dtypes(model, dtype)
    for name, parameter in model.named_parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(own.get(name, dtype))
    return model


def loaded_dtypes(model: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """Return parameter name -> dtype after loading in `dtype`, for parameters that would not be of `dtype`.

    Such a parameter is listed by the class of the model as one to keep in float32, or the class makes it in a dtype of
    its own. Models of other libraries have none.
    """
    if not isinstance(model, PreTrainedModel):
        return {}
    with torch.device("meta"):
        empty = type(model)._from_config(copy.deepcopy(model.config), dtype=dtype)
    own = {name: p.dtype for name, p in empty.named_parameters() if p.dtype != dtype and p.is_floating_point()}
    if plan := keeping_plan(model, dtype):
        kept = re.compile("|".join(f"({part.replace('*', '.*')})" for part in plan))  # as transformers matches them
        own |= {name: torch.float32 for name, _ in model.named_parameters() if kept.search(name)}
    return own


def keeping_plan(model: Any, dtype: torch.dtype) -> list[str]:
    """Return the patterns of names that transformers loads in float32 where `dtype` is asked for."""
    if hasattr(model, "_get_dtype_plan"):
        return list(model._get_dtype_plan(dtype))
    return list(getattr(model, "dtype_plan", None) or ()) if dtype != torch.float32 else []  # transformers 5.0
