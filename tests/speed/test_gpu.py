"""`nmbench speed` through the command line: on a machine with the hardware, and on one without."""

import json

import pytest
import torch

there = torch.cuda.is_available()


@pytest.mark.skipif(there, reason="this machine has a CUDA GPU")
def test_without_the_hardware(nmbench):
    """One line names the hardware that is needed and what this machine has; exit status 1; no model is loaded."""
    result = nmbench("speed", "--model", "tiny:llama")
    assert result.exit_code == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: 2:4 products need an NVIDIA GPU")
    assert f"torch {torch.__version__} sees no CUDA GPU." in line


def test_a_pattern_that_no_hardware_multiplies(nmbench):
    """The pattern is refused before the hardware is checked, on any machine."""
    result = nmbench("speed", "--pattern", "4:8")
    assert result.exit_code == 1
    assert "sparse tensor cores multiply 2:4" in result.stderr


@pytest.mark.parametrize(
    ("capability", "cusparselt", "expected"),
    [((9, 0), True, "cusparselt"), ((8, 0), False, "cutlass"), ((9, 0), False, None), ((7, 5), True, None)],
)
def test_which_library_multiplies(monkeypatch, capability, cusparselt, expected):
    """cuSPARSELt where torch has it, CUTLASS on 8.x, else an error that says why."""
    from nmbench.errors import NMBenchError
    from nmbench.speed.gpu import library

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Some GPU")
    monkeypatch.setattr(torch.backends.cusparselt, "is_available", lambda: cusparselt)
    if expected:
        assert library() == expected
    else:
        with pytest.raises(NMBenchError, match=r"has 7\.5|without cuSPARSELt"):
            library()


@pytest.mark.skipif(not there, reason="needs an NVIDIA GPU with sparse tensor cores")
def test_with_the_hardware(nmbench):
    """Products and the whole model have times, the sparse weights are smaller, and a backend was dispatched."""
    result = nmbench("speed", "--model", "demo", "--tokens", 1, "--tokens", 256, "--json")
    assert result.exit_code == 0, result.output
    report = json.loads(result.stdout)
    assert report["converted"] == report["layers"] > 0
    for product in report["products"]:
        assert product["speedup"] > 0
        assert product["sparse_bytes"] < 0.7 * product["dense_bytes"]
        assert product["backend"] in ("cusparselt", "cutlass")
        assert product["relative_error"] < 0.02
    assert {model["task"].split()[0] for model in report["models"]} == {"prefill", "decode"}
