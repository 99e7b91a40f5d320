"""Laws of the contexts that allow and refuse TF32 products."""

import pytest
import torch

from nmbench.calibration import full_float32, tf32


@pytest.fixture
def allowed():
    """Return the setting of torch, and restore it after the test."""
    before = torch.backends.cuda.matmul.allow_tf32
    yield lambda: torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("before", [False, True])
def test_contexts_nest_and_restore(allowed, before):
    """The inner context decides, and each end brings back the setting before its context."""
    torch.backends.cuda.matmul.allow_tf32 = before
    with full_float32():
        with tf32():
            assert allowed()
            with full_float32():
                assert not allowed()
            assert allowed()
        assert not allowed()
    assert allowed() == before


@pytest.mark.parametrize(("context", "before"), [(tf32, False), (full_float32, True)])
def test_an_exception_restores_the_setting(allowed, context, before):
    """An exception leaves the setting as it was."""
    torch.backends.cuda.matmul.allow_tf32 = before
    with pytest.raises(ZeroDivisionError), context():
        raise ZeroDivisionError
    assert allowed() == before
