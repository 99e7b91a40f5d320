"""Another cuSPARSELt: found in a folder, asked for its version, refused where it comes too late. No GPU is needed."""

import shutil
import subprocess
import sys

import pytest

from nmbench.errors import NMBenchError
from nmbench.speed import preload

SOURCE = """
int cusparseLtGetProperty(int part, int* value) { int version[] = {0, 10, 3}; *value = version[part]; return 0; }
"""
ASK = "cusparseLtGetProperty(1, &v); return v; }"
compiler = shutil.which("cc") or shutil.which("gcc")
SHARED = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{preload.NAME}"]
with_compiler = pytest.mark.skipif(compiler is None, reason="needs a C compiler for a stand-in of the library")


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pip") / "nvidia" / "cu13" / "lib"
    folder.mkdir(parents=True)
    (folder / "x.c").write_text(SOURCE)
    made = folder / preload.NAME
    subprocess.run([*SHARED, "-o", made, folder / "x.c"], check=True)
    return made


@with_compiler
def test_the_library_of_a_folder_is_loaded_and_asked(library):
    """A folder of pip is searched; the process then has that library, and the version is the library's own."""
    code = (
        "import sys; from pathlib import Path; from nmbench.speed.preload import *;"
        "print(preload_cusparselt(Path(sys.argv[1])), loaded_version(), 'torch' in sys.modules)"
    )
    folder = library.parents[3]
    done = subprocess.run([sys.executable, "-c", code, folder], check=True, capture_output=True, text=True)
    assert done.stdout.split() == [str(library), "0.10.3", "False"]


@with_compiler
def test_the_option_acts_before_torch(library, tmp_path):
    """`nmbench speed --cusparselt` loads the library before torch."""
    code = (
        "import sys; from nmbench.speed import preload\n"
        "real = preload.preload_cusparselt\n"
        "def spy(path): print('torch' in sys.modules, real(path).name); sys.exit()\n"
        "preload.preload_cusparselt = spy\n"
        "from nmbench.cli import main; main(['speed', '--pattern', '4:8', '--cusparselt', sys.argv[1]])"
    )
    done = subprocess.run([sys.executable, "-c", code, library], capture_output=True, text=True)
    assert done.stdout.split() == ["False", preload.NAME], done.stderr


def test_too_late(monkeypatch, tmp_path):
    """A process that has another one loaded refuses; the message names that one."""
    (tmp_path / preload.NAME).write_bytes(b"")
    monkeypatch.setattr(preload, "loaded_path", lambda: tmp_path / "torch" / preload.NAME)
    with pytest.raises(NMBenchError, match=r"comes too late: this process has loaded .*torch/libcusparseLt"):
        preload.preload_cusparselt(tmp_path)


def test_what_is_no_library(tmp_path):
    """A folder without one, and a file that is none, are refused with the remedy or the linker's reason."""
    with pytest.raises(NMBenchError, match=r"holds no libcusparseLt.so.0; give the library, or the folder of `pip"):
        preload.preload_cusparselt(tmp_path)
    (tmp_path / "text").write_text("not a library")
    with pytest.raises(NMBenchError, match=r"cannot be loaded: .*text"):
        preload.preload_cusparselt(tmp_path / "text")


def test_which_one_is_loaded():
    """The first one loaded, by its path; without one it is unknown."""
    own, other = "/opt/nvidia/lib/libcusparseLt.so.0", "/opt/torch/lib/libcusparseLt.so.0"
    assert preload.loaded_path(lambda: ["", "/usr/lib/libc.so.6"]) is None
    assert str(preload.loaded_path(lambda: ["", "/usr/lib/libc.so.6", own, other])) == own
    assert any("libc.so" in path for path in preload.loaded_libraries())


@with_compiler
def test_a_library_that_names_another_gets_the_one_loaded_before(library, tmp_path):
    """As torch's does: a library that names cuSPARSELt, with a path of its own to another, uses the one preloaded.

    So it is told, although the other one is loaded later by its full path, as torch does.
    """
    own = tmp_path / "torch"
    own.mkdir()
    (own / "x.c").write_text(SOURCE.replace("10, 3", "8, 0"))
    (own / "y.c").write_text("int cusparseLtGetProperty(int, int*); int minor() { int v; " + ASK)
    subprocess.run([*SHARED, "-o", own / preload.NAME, own / "x.c"], check=True)
    linked = ["-o", own / "y.so", own / "y.c", own / preload.NAME, "-Wl,--disable-new-dtags,-rpath," + str(own)]
    subprocess.run([*SHARED[:3], *linked], check=True)
    code = (
        "import ctypes, sys; from pathlib import Path; from nmbench.speed.preload import *;"
        "sys.argv[3:] and preload_cusparselt(Path(sys.argv[3])); ctypes.CDLL(sys.argv[2]);"
        "print(ctypes.CDLL(sys.argv[1]).minor(), loaded_version())"
    )
    for other, expected in (([], ["8", "0.8.0"]), ([library], ["10", "0.10.3"])):
        paths = own / "y.so", own / preload.NAME, *other
        done = subprocess.run([sys.executable, "-c", code, *paths], capture_output=True, text=True)
        assert done.stdout.split() == expected, done.stderr
