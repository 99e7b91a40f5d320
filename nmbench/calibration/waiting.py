"""Where a model is streamed, what a paused forward pass holds waits on the host, unless the device has room for it.

A paused pass holds hidden states, masks and embeddings in the local variables of its frames. Their storages are copied
to the host and the tensors pointed at the copies; before the pass goes on, they are brought back. Shapes, strides and
views of one storage stay as they are. Tensors that are not found stay on the device, which costs memory alone.

Copies of a GPU's tensors are in pinned memory, and nobody waits for them until all passes have left: pageable memory
takes several times as long as the block that is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import FrameType

import torch
from torch import Tensor, nn

from nmbench.calibration.arguments import tensors_of
from nmbench.models.bundle import Bundle, hidden_width
from nmbench.runtime.memory import free_bytes

PART = 8  # one eighth of the free memory of a GPU is what waiting passes may take
HELD = 3  # times the hidden states of their tokens are what waiting passes hold: in arguments, residuals and frames


class Waiting:
    """The tensors of one pass of a streamed model. What all passes share stays on the device: the `batch` of tokens,
    which is a part of all tokens, and the tensors that modules hold.
    """

    def __init__(self, bundle: Bundle, batch: Tensor) -> None:
        self.bundle, self.batch, self.device = bundle, batch, bundle.device
        self.stay: set[int] = set()  # storages
        self.away: list[tuple[Tensor, int]] = []  # tensors, and their versions when they left
        self.brought: list[tuple[Tensor, Tensor]] = []  # storages on the device, and what they are copies of

    def leave(self, frame: FrameType | None) -> None:
        """Move what a pass that stands in `frame` holds to the host; a storage that was there before and is unchanged
        is not copied again.
        """
        self.stay = self.stay or {address(tensor) for tensor in (self.batch, *in_modules(self.bundle.model))}
        homes = self._unchanged()
        self.away, self.brought = [], []
        for tensor in held(frame):
            place = address(tensor)
            if tensor.device == self.device and place not in self.stay:
                if place not in homes:
                    homes[place] = stored_on_host(tensor)
                tensor.data = like(tensor, homes[place])
                self.away.append((tensor, tensor._version))

    def bring(self) -> None:
        """Move everything back to the device."""
        copies: dict[int, Tensor] = {}
        for tensor, _ in self.away:
            home = address(tensor)
            if home not in copies:
                copies[home] = whole(tensor).to(self.device, non_blocking=True, copy=True)
                self.brought.append((copies[home], whole(tensor)))
            tensor.data = like(tensor, copies[home])

    def _unchanged(self) -> dict[int, Tensor]:
        """The storages on the host by the places of their copies, unless the pass has written into the latter."""
        written = {address(tensor) for tensor, version in self.away if tensor._version != version}
        return {address(copy): home for copy, home in self.brought if address(copy) not in written}


def in_modules(model: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of all modules, and the tensors in their other attributes, as tables made once."""
    for module in model.modules():
        yield from tensors_of(vars(module))


def leaves(bundle: Bundle, tokens: int, paths: int = 1) -> bool:
    """True if passes of so many tokens, on one path or on two, wait on the host: the model is streamed, and the device
    has no room for them.
    """
    return bundle.streaming is not None and hidden_bytes(bundle, tokens, paths) > room_for(bundle, bundle.device)


def hidden_bytes(bundle: Bundle, tokens: int, paths: int = 1) -> int:
    """The bytes that passes of so many tokens hold while they wait."""
    return HELD * paths * tokens * hidden_width(bundle) * bundle.dtype.itemsize


def room_for(bundle: Bundle, device: torch.device, taken: int = 0) -> int:
    """The bytes of a device that waiting passes of a streamed model may take: those that streaming allows, else a part
    of what is free. `taken`: bytes that are going to be taken before. None on a CPU.
    """
    allowed = bundle.streaming.room if bundle.streaming else None
    return max(free_bytes(device) - taken, 0) // PART if allowed is None else allowed


def stored_on_host(tensor: Tensor) -> Tensor:
    """A copy on the host of the storage of a tensor, bytes `[n]`; of a GPU's, it may still be on its way."""
    return copied_to_host(whole(tensor))


def copied_to_host(tensor: Tensor) -> Tensor:
    """A copy of a tensor on the host; of a GPU's, it may still be on its way, in the order of the GPU's work."""
    if tensor.device.type != "cuda":
        return tensor.to("cpu", copy=True)
    return torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)


def arrived(device: torch.device) -> None:
    """Wait for what is on its way to the host."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()


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
    """The tensors in the local variables of a frame and of its callers, and those that they are views of, each once."""
    met: set[int] = set()
    while frame is not None:
        variables = frame.f_locals
        for tensor in tensors_of(list(variables.values())):
            for part in (tensor, tensor._base):  # a view keeps the tensor that it was taken from, and so its storage
                if part is not None and id(part) not in met:
                    met.add(id(part))
                    yield part
        if type(variables) is dict and variables is not frame.f_globals:
            variables.clear()  # until Python 3.12 a copy that the frame keeps, and with it the tensors
        frame = frame.f_back
