"""The CUDA program of packed products without a GPU: run on the CPU, or compiled only."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from nmbench.runtime.packed import by_cuda
from nmbench.runtime.packed.by_cuda import Launch

SHIM = Path(__file__).with_name("emulated.cpp")


def emulated(group: int, dtype: torch.dtype, launch: Launch, folder: Path) -> Any:
    """The very source, compiled for a CPU, as the program that `by_cuda.product` calls; skips without a compiler."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("needs g++, to run the CUDA source on a CPU")
    constants = by_cuda.constants(group, dtype, launch)
    library = folder / ("-".join(map(str, constants.values())) + ".so")
    flags = [f"-D{name}={value}" for name, value in constants.items()] + [f'-DPROGRAM="{by_cuda.SOURCE}"']
    command = [compiler, "-O1", "-shared", "-fPIC", "-std=c++17", "-w", *flags, str(SHIM), "-o", str(library)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    run = ctypes.CDLL(str(library)).run
    run.argtypes, run.restype = [ctypes.c_void_p] * 5 + [ctypes.c_int] * 5, ctypes.c_long

    def program(grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any]) -> None:
        assert block[0] == 32 * launch.warps
        given = [value.data_ptr() if isinstance(value, torch.Tensor) else value for value in arguments]
        assert run(*given, grid[0]) == 0, "the program read outside its arrays, or an address that is not aligned"

    return program


@functools.cache
def nvrtc() -> ctypes.CDLL | None:
    """NVIDIA's compiler as a library, of whatever version is installed."""
    names = [f"libnvrtc.so.{major}" for major in (13, 12)]
    found = importlib.util.find_spec("nvidia")
    folders = [Path(place) for place in (found.submodule_search_locations or [] if found else [])]
    paths = [str(path) for folder in folders for name in names for path in sorted(folder.glob(f"*/lib/{name}"))]
    for name in [*paths, *names]:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


def assembled(capability: int, group: int, dtype: torch.dtype, launch: Launch) -> bytes:
    """Machine code of the program for a compute capability such as 90; skips without NVRTC."""
    library = nvrtc()
    if library is None:
        pytest.skip("needs NVRTC, as with torch for CUDA")
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = by_cuda.SOURCE.read_bytes()
    assert library.nvrtcCreateProgram(ctypes.byref(program), source, b"program.cu", 0, None, None) == 0
    constants = by_cuda.constants(group, dtype, launch)
    options = [f"--gpu-architecture=sm_{capability}", *(f"-D{name}={value}" for name, value in constants.items())]
    given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
    result = library.nvrtcCompileProgram(program, len(options), given)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(size.value)
    library.nvrtcGetProgramLog(program, log)
    assert result == 0, log.value.decode()
    library.nvrtcGetCUBINSize(program, ctypes.byref(size))
    code = ctypes.create_string_buffer(size.value)
    library.nvrtcGetCUBIN(program, code)
    library.nvrtcDestroyProgram(ctypes.byref(program))
    return code.raw
