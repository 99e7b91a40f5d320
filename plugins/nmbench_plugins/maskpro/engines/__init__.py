"""Engines, which compute the steps of MaskPro: in plain torch, or by fused kernels inside the forward pass."""

from nmbench_plugins.maskpro.engines.base import Engine as Engine
from nmbench_plugins.maskpro.engines.choice import choose as choose
from nmbench_plugins.maskpro.engines.streamed_engine import StreamedEngine as StreamedEngine
from nmbench_plugins.maskpro.engines.torch_engine import TorchEngine as TorchEngine
