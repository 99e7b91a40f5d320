"""Where a model is streamed, what a paused forward pass holds waits on the host.

A paused pass holds hidden states, masks and embeddings in the local variables of its frames. Their storages are copied
to the host and the tensors pointed at the copies; before the pass goes on, they are brought back. Shapes, strides and
views of one storage stay as they are. Tensors that are not found stay on the device, which costs memory alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor

from nmbench.calibration.arguments import tensors_of
from nmbench.models.bundle import Bundle


class Waiting:
    """The tensors of one pass of a streamed model; its `batch` of tokens, parameters and buffers stay on the device."""

    def __init__(self, bundle: Bundle, batch: Tensor) -> None:
        self.device = bundle.device
        self.stay = {address(tensor) for tensor in (batch, *bundle.tensors().values())}
        self.away: list[tuple[Tensor, Tensor, int]] = []  # tensors, their data on the host, their versions

    def leave(self, frame: FrameType | None) -> None:
        """Move what a pass that stands in `frame` holds to the host; what was there before and is unchanged is not
        copied again.
        """
        known = {id(tensor): home for tensor, home, version in self.away if tensor._version == version}
        copies: dict[int, Tensor] = {}
        self.away = []
        for tensor in held(frame):
            if tensor.device == self.device and address(tensor) not in self.stay:
                if (home := known.get(id(tensor))) is None:
                    if address(tensor) not in copies:
                        copies[address(tensor)] = whole(tensor).to("cpu", copy=True)
                    home = like(tensor, copies[address(tensor)])
                tensor.data = home
                self.away.append((tensor, home, tensor._version))

    def bring(self) -> None:
        """Move everything back to the device."""
        copies: dict[int, Tensor] = {}
        for tensor, home, _ in self.away:
            if address(home) not in copies:
                copies[address(home)] = whole(home).to(self.device, copy=True)
            tensor.data = like(home, copies[address(home)])


def address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def whole(tensor: Tensor) -> Tensor:
    """The storage of a tensor as bytes `[n]`."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def like(tensor: Tensor, storage: Tensor) -> Tensor:
    """The view of another storage, bytes `[n]`, that `tensor` is of its own."""
    view = torch.empty(0, dtype=tensor.dtype, device=storage.device)
    return view.set_(storage.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())


def held(frame: FrameType | None) -> Iterator[Tensor]:
    """The tensors in the local variables of a frame and of its callers, each once."""
    met: set[int] = set()
    while frame is not None:
        variables = frame.f_locals
        for tensor in tensors_of(list(variables.values())):
            if id(tensor) not in met:
                met.add(id(tensor))
                yield tensor
        if type(variables) is dict and variables is not frame.f_globals:
            variables.clear()  # until Python 3.12 a copy that the frame keeps, and with it the tensors
        frame = frame.f_back
