"""Names of tensors in checkpoint files against names of parameters, by the mapping of transformers itself.

A file may call a parameter by another name than the model does: `language_model.model.layers.0...` of Gemma 3 with
vision is `model.language_model.layers.0...` in the model. It may also store a parameter in several tensors, such as one
for every expert. transformers derives both mappings from the class of the model; no architecture is known here.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, dot_natural_key, rename_source_key


@dataclass(frozen=True)
class Parts:
    """The stored tensors that make up parameters of a model: stored name -> pattern of the converter.

    `target` is the first of these parameters. A tensor that is a parameter as stored has no pattern.
    """

    target: str
    sources: Mapping[str, str | None]

    @property
    def plain(self) -> bool:
        """True if one stored tensor is the parameter, under whatever name."""
        return not any(self.sources.values())


@dataclass(frozen=True)
class StoredNames:
    """The mapping from stored names to the parameters and buffers of one model; without a model it changes no name."""

    model: Any = None
    conversions: tuple[Any, ...] = ()
    shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict, repr=False)  # of parameters and buffers

    @classmethod
    def of(cls, model: nn.Module) -> StoredNames:
        """Return the mapping of a model; the model may lie on the meta device."""
        shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        if not isinstance(model, PreTrainedModel):
            return cls(shapes=shapes)
        own = getattr(model, "_checkpoint_conversion_mapping", None)  # the mapping of a class in transformers 5.0
        return cls(model, tuple(get_model_conversion_mapping(model, own or None)), shapes)

    def parameter(self, stored: str) -> str:
        """Return the name of the parameter that is stored as `stored`.

        A tensor that is part of a parameter, or of none, keeps its stored name.
        """
        target, pattern = self.target(stored)
        return target if pattern is None and target in self.shapes else stored

    def target(self, stored: str) -> tuple[str, str | None]:
        """Return the parameter that a stored tensor is read for, and the pattern of its converter, if it has one."""
        if self.model is None:
            return stored, None
        prefix = self.model.base_model_prefix
        target, pattern = rename_source_key(stored, self.renamings, self.converters, prefix, self.shapes)
        if target not in self.shapes and stored in self.shapes:
            target, pattern = rename_source_key(stored, [], [], prefix, self.shapes)
        return target, pattern

    @cached_property
    def converters(self) -> list[Any]:
        return [entry for entry in self.conversions if isinstance(entry, WeightConverter)]

    @cached_property
    def renamings(self) -> list[Any]:
        return [entry for entry in self.conversions if not isinstance(entry, WeightConverter)]

    def parts(self, stored: Iterable[str]) -> list[Parts]:
        """Return what of a checkpoint makes up the parameters of the model, in natural order of the stored names."""
        found: dict[str, dict[str, str | None]] = {}
        for name in sorted(stored, key=dot_natural_key):
            target, pattern = self.target(name)
            if target in self.shapes:
                found.setdefault(target, {})[name] = pattern
        return [Parts(target, sources) for target, sources in found.items()]

    def read(self, parts: Parts, tensor: Callable[[str], Tensor]) -> Iterator[tuple[str, Tensor]]:
        """Yield name and value of every parameter that `parts` make up; `tensor` reads a stored tensor by its name."""
        if parts.plain:
            yield parts.target, tensor(next(iter(parts.sources)))
            return
        patterns = {pattern: entry for entry in self.converters for pattern in entry.source_patterns}
        converter = copy.deepcopy(patterns[next(iter(parts.sources.values()))])
        for name, pattern in parts.sources.items():
            converter.add_tensor(parts.target, name, pattern, tensor(name))
        values = converter.convert(parts.target, model=self.model, config=self.model.config)
        for name, value in values.items():
            yield name, value[0] if isinstance(value, list) else value
