"""A network that does not answer costs one attempt, and one line says what is wrong; the cache is read all the same."""

from __future__ import annotations

import socket
import threading
import time

import huggingface_hub
import pytest
from huggingface_hub import constants

from nmbench.runtime.hub import hub_obstacle, hub_or_cache, offline
from nmbench_plugins.tiny import TinyModel

SECONDS = 15  # the hub's client alone pauses for 24 s


@pytest.fixture
def proxy(monkeypatch):
    """A function that sends all requests to a local port; the client of the hub is made anew."""

    def through(port: int) -> None:
        for name in ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://127.0.0.1:{port}")
        for name in ("NO_PROXY", "no_proxy"):
            monkeypatch.setenv(name, "")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)
        huggingface_hub.close_session()

    yield through
    huggingface_hub.close_session()


@pytest.fixture
def dead(proxy):
    """A proxy whose port refuses connections."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # bound, and nobody listens
        proxy(taken.getsockname()[1])
        yield


@pytest.mark.parametrize(
    ("flags", "what"),
    [
        (["--model", "hf:org/name"], "cannot load model hf:org/name"),
        (["--model", "tiny:llama", "--calibration", "c4"], "data set allenai/c4 cannot be loaded"),
        (["--model", "tiny:llama", "--calibration", "wikitext2"], "data set Salesforce/wikitext cannot be loaded"),
    ],
)
def test_a_dead_proxy_is_one_line_at_once(flags, what, dead, nmbench):
    """Nothing is tried again, and the error says that the hub does not answer, and why."""
    start = time.monotonic()
    result = nmbench("run", "--method", "magnitude", *flags, "--metric", "ppl:demo@64")
    assert time.monotonic() - start < SECONDS
    assert result.exit_code == 1
    (line,) = (line for line in result.stderr.splitlines() if line.startswith("Error:"))
    assert what in line and "does not answer (" in line and "check network and proxy" in line
    assert "Retrying" not in result.stderr


def test_the_cache_is_read_behind_a_dead_proxy(dead, nmbench, tmp_path, texts, monkeypatch):
    """A model that was downloaded before is run."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    repository = tmp_path / "cache" / "models--org--name"
    bundle = TinyModel().load("llama")
    for part in (bundle.model, bundle.tokenizer):
        part.save_pretrained(repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    flags = ["--calibration", f"text:{texts}/cal.txt", "--metric", f"ppl:text:{texts}/test.txt@64", "--windows", 4]
    start = time.monotonic()
    result = nmbench("run", "--model", "hf:org/name", "--method", "magnitude", *flags, "--window-tokens", 64)
    assert result.exit_code == 0, result.stderr
    assert time.monotonic() - start < SECONDS


def test_a_silent_proxy_is_waited_for_once(proxy, monkeypatch):
    """A proxy that accepts and says nothing is waited for as long as the hub's client waits for one answer."""
    monkeypatch.setattr(constants, "HF_HUB_ETAG_TIMEOUT", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        proxy(silent.getsockname()[1])
        start = time.monotonic()
        reason = hub_obstacle()
        assert 0.4 < time.monotonic() - start < 5
    assert reason and "does not answer" in reason


def test_a_hub_that_answers_is_used(monkeypatch):
    """Any answer will do, an error page too: what it means is the library's business."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with socket.create_server(("127.0.0.1", 0)) as hub:
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{hub.getsockname()[1]}")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        huggingface_hub.close_session()
        answering = threading.Thread(target=answer, args=(hub,))
        answering.start()
        with hub_or_cache() as reason:
            assert reason is None and constants.HF_HUB_OFFLINE is False
        answering.join()


def answer(hub: socket.socket) -> None:
    """Answer one request with an error."""
    connection, _ = hub.accept()
    with connection:
        connection.recv(4096)
        connection.sendall(b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")


def test_requests_are_forbidden_for_the_moment(monkeypatch):
    """Both libraries have their switches back at the end, also after an error."""
    import datasets

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", False)

    def failing():
        with offline():
            assert constants.HF_HUB_OFFLINE and datasets.config.HF_HUB_OFFLINE
            assert hub_obstacle() == "HF_HUB_OFFLINE is set"
            raise KeyError

    with pytest.raises(KeyError):
        failing()
    assert constants.HF_HUB_OFFLINE is False and datasets.config.HF_HUB_OFFLINE is False
