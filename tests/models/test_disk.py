"""Laws of blocks on disk: results are those of the model in memory, memory is bounded, and files stay as they are."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from nmbench.errors import CannotWrite, ModelChanged
from nmbench.evaluation.losses import window_losses
from nmbench.experiment.measurement import in_parts
from nmbench.experiment.whereabouts import whereabouts
from nmbench.methods import Pruned
from nmbench.models import mapped, temporary
from nmbench.models.applying import apply
from nmbench.models.bundle import Bundle
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.keeping import Keeping
from nmbench.pattern import Pattern
from nmbench.pruning.live_weights import LiveWeights
from nmbench.pruning.one_shot import prune_one_shot
from nmbench.spec import MethodSpec, RunSpec
from nmbench.verification.strict import masks_digest
from nmbench_plugins.huggingface import Folder
from nmbench_plugins.huggingface.outline import outline_of_folder
from nmbench_plugins.magnitude import Magnitude
from nmbench_plugins.sparsegpt import SparseGPT
from nmbench_plugins.tiny import TinyModel
from nmbench_plugins.wanda import Wanda

CPU = torch.device("cpu")
NAME = "model.layers.1.mlp.up_proj"
FAMILIES = ["llama", "gemma3", "mixtral"]  # sharded; tied embeddings; experts that are fused while they load


def windows() -> Tensor:
    return torch.randint(256, (6, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Models in bfloat16 on disk, in several files each; nobody writes to them."""
    found = {}
    for family in FAMILIES:
        bundle = TinyModel(dtype="bfloat16").load(family)
        found[family] = tmp_path_factory.mktemp(family)
        bundle.model.save_pretrained(found[family], max_shard_size="60KB")
        bundle.tokenizer.save_pretrained(found[family])
        assert len(list(found[family].glob("*.safetensors"))) > 2
    return found


def load(folder: Path, dtype: str = "bfloat16", from_disk: bool = True) -> Bundle:
    bundle = Folder(dtype=dtype).load(str(folder))
    if from_disk:
        bundle.stream(CPU, from_disk=True)
    return bundle


def results(bundle: Bundle) -> list:
    """Everything that a row depends on, for methods that read no statistics, prune, and repair weights."""
    dense, found = DenseWeights(bundle), [bundle.digest()]
    patterns = dict.fromkeys(bundle.layers, Pattern(2, 4))
    for method in (Magnitude(), SparseGPT()):
        pruned = prune_one_shot(bundle, dense, method, patterns, windows(), "it").pruned
        apply(bundle, pruned)
        with torch.no_grad():
            losses = in_parts(bundle)(lambda part: window_losses(bundle.model, part), windows(), 4, lambda *_: None)
        found += [masks_digest(pruned.masks), bundle.digest(), losses.tolist()]
        dense.restore()
    return found


def test_results_are_the_same_where_passes_wait_on_the_device(folders):
    """With room for what passes hold, masks and losses are those of passes that wait on the host."""
    waiting, staying = load(folders["llama"]), load(folders["llama"])
    staying.streaming.room = 2**40
    assert results(staying) == results(waiting)


@pytest.mark.parametrize(("family", "dtype"), [*((f, "bfloat16") for f in FAMILIES), ("llama", "float32")])
def test_results_are_those_of_the_model_in_memory(folders, family, dtype):
    """Hashes, masks and losses are the same, whether files hold the weights as they are or they had to be copied."""
    files = {path: hashlib.sha256(path.read_bytes()).digest() for path in folders[family].iterdir()}
    ours = load(folders[family], dtype)
    assert results(ours) == results(load(folders[family], dtype, from_disk=False))
    assert bool(ours.disk.in_copies) == (family == "mixtral" or dtype == "float32")
    assert bool(ours.disk.in_files) == (dtype == "bfloat16")
    assert {path: hashlib.sha256(path.read_bytes()).digest() for path in folders[family].iterdir()} == files


def test_what_is_written_stays_until_it_is_restored(folders):
    """Weights that are written to a block, held or not, are seen by the next pass, also if it was read ahead."""
    bundle = load(folders["llama"])
    dense, layer, block = DenseWeights(bundle), bundle.layers[NAME], bundle.blocks["model.layers.1"]
    original = layer.read().clone()
    with torch.no_grad():
        before = window_losses(bundle.model, windows())
        window_losses(bundle.model, windows())  # ends by reading the first block ahead
        bundle.streaming.bring(bundle.blocks["model.layers.0"])  # and now the one that is written to
        bundle.streaming.drop(bundle.blocks["model.layers.0"])
        LiveWeights(bundle, {name: dense.layer(it) for name, it in bundle.layers.items()})[NAME].mul_(2)
        assert not torch.equal(window_losses(bundle.model, windows()), before)
        with bundle.holding(block):
            layer.write(original)
        assert torch.equal(window_losses(bundle.model, windows()), before)
        with bundle.holding(block, undo=True):
            layer.write(torch.zeros(layer.shape, dtype=torch.bfloat16))
        assert torch.equal(layer.read(), original)
    dense.restore()
    assert layer.read().data_ptr() == dense.layer(layer).data_ptr()


def test_a_file_that_changes_is_an_error(folders, tmp_path):
    """A weight file that is written, replaced or removed while it is in use ends the work in one line with its name."""
    for path in folders["llama"].iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    bundle = load(tmp_path)
    dense, file = DenseWeights(bundle), sorted(tmp_path.glob("*.safetensors"))[0]
    os.utime(file, ns=(1, 1))
    with pytest.raises(ModelChanged, match=rf"the weight file \S*{file.name} has changed while"):
        dense.restore()
    file.unlink()
    with pytest.raises(ModelChanged, match=file.name):
        bundle.model(input_ids=windows())


def test_a_disk_without_room(monkeypatch):
    """Weights that do not fit on the disk, and a temporary folder that is memory, are refused before anything else."""
    model = nn.Linear(8, 8, bias=False)
    monkeypatch.setattr(os, "posix_fallocate", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
    with pytest.raises(CannotWrite, match=r"no room for .* set TMPDIR to a folder on a larger disk"):
        mapped.Maps().temporary(model.parameters())
    monkeypatch.setattr(temporary, "file_system", lambda folder: "tmpfs")
    with pytest.raises(CannotWrite, match=r"is memory itself \(tmpfs\); set TMPDIR"):
        mapped.Maps().temporary(model.parameters())
    none = FileNotFoundError(2, "No usable temporary directory found in ['/a']")
    monkeypatch.setattr(temporary.tempfile, "gettempdir", lambda: (_ for _ in ()).throw(none))
    with pytest.raises(CannotWrite, match=r"^No usable temporary directory found in \['/a'\]; set TMPDIR"):
        mapped.Maps().temporary(model.parameters())


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts descriptors as Linux lists them")
def test_results_of_many_layers_take_few_files(folders):
    """Masks and weights of all layers are kept in few files, and each is what it was; the space is free afterwards."""
    bundle = load(folders["mixtral"])
    before = len(os.listdir("/proc/self/fd"))
    given = {name: Pruned(layer.read() > 0, layer.read().float()) for name, layer in bundle.layers.items()}
    with Keeping(bundle) as keeping:
        for name, pruned in given.items():
            keeping.take(name, pruned)
        results = keeping.layers()
    assert len(given) > 20
    assert 1 <= len(os.listdir("/proc/self/fd")) - before <= 8
    for name, pruned in given.items():
        assert torch.equal(results[name].mask, pruned.mask)
        assert torch.equal(results[name].weight, pruned.weight)
    del results, keeping
    assert len(os.listdir("/proc/self/fd")) == before


def test_weights_are_read_from_their_files(folders):
    """What is read of a block is its dense weights, and its changed ones once it was written to."""
    bundle = load(folders["llama"])
    for changed in (False, True):
        for layer in bundle.layers.values():
            if changed:
                bundle.open(layer.name)
                layer.read().mul_(2)
            into = torch.full_like(layer.read(), torch.nan)
            bundle.disk.read(layer.read(), into)
            assert torch.equal(into, layer.read())


def test_a_file_that_became_shorter(folders, tmp_path):
    """A weight file that was cut while its weights are read ends in a line that names it."""
    shutil.copytree(folders["llama"], tmp_path / "model")
    bundle = load(tmp_path / "model")
    weight = bundle.layers[NAME].read()
    (place,) = mapped.places([weight])
    os.truncate(place.path, place.offset + weight.nbytes // 2)
    with pytest.raises(ModelChanged, match=f"{place.path.name} has become shorter"):
        bundle.disk.read(weight, torch.empty_like(weight))


def test_changed_mappings_are_not_files(tmp_path):
    """A weight that was changed in memory after it was loaded is not taken for that in its file."""
    save_file({"weight": torch.ones(64, 64)}, tmp_path / "model.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        weight = file.get_tensor("weight")
    (place,) = mapped.places([weight])
    assert place.path == tmp_path / "model.safetensors"
    weight[0, 0] = 2
    assert list(mapped.places([weight])) == [None]
    entries = tmp_path / "smaps"
    entries.write_text("1000-2000 r--p 0 0 0 /gone\nAnonymous: 0 kB\n2000-3000 rw-p 00000000 00:00 0\n")
    assert mapped.pristine_mappings(entries) == []
    assert mapped.pristine_mappings(tmp_path / "elsewhere") == []


GROWTH = """
import ctypes, json, sys
from pathlib import Path
import torch
ctypes.CDLL(None).mallopt(-3, 1 << 16)  # small tensors are given back as large ones are, not kept in a heap
from nmbench.models.dense_weights import DenseWeights
from nmbench.models.applying import apply
from nmbench.evaluation.losses import window_losses
from nmbench.experiment.loading import load_model
from nmbench.experiment.measurement import in_parts
from nmbench import load_plugins, Pattern
from nmbench.pruning.one_shot import prune_one_shot
from nmbench_plugins.wanda import Wanda

def status(name):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) << 10

def row(folder, from_disk):
    bundle = load_model(folder, plugins, dtype="float32", device="cpu", place=lambda b, d: b.stream(d, from_disk))
    dense, windows = DenseWeights(bundle), torch.arange(64).view(2, 32)
    pruned = prune_one_shot(bundle, dense, Wanda(), dict.fromkeys(bundle.layers, Pattern(2, 4)), windows, "it").pruned
    apply(bundle, pruned)
    measured = bundle.digest()
    in_parts(bundle)(lambda part: window_losses(bundle.model, part), windows, 2, lambda *_: None)
    dense.restore()

plugins = load_plugins()
large, small = sys.argv[1:]
row(small, True)
found = []
for from_disk in (True, False):
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here on
    before = status("VmRSS")
    row(large, from_disk)
    found.append(status("VmHWM") - before)
print(json.dumps(found))
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the peak of memory is read as Linux has it")
def test_memory_is_that_of_a_few_blocks(python, folders, tmp_path):
    """Loading, pruning, measuring and restoring a model of 12 blocks needs memory for a few, not for all of them."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 257, "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 12}
    with torch.device("meta"):
        model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4))
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        parameter.data.fill_(1).add_(torch.arange(parameter.shape[-1]) / 1e4)
    model.save_pretrained(tmp_path, max_shard_size="40MB")
    for path in folders["llama"].glob("tokenizer*"):
        (tmp_path / path.name).write_bytes(path.read_bytes())
    weights = sum(parameter.nbytes for parameter in model.parameters())
    done = python.run("-c", GROWTH, str(tmp_path), str(folders["llama"]))
    assert done.returncode == 0, done.stderr
    from_disk, in_memory = json.loads(done.stdout.splitlines()[-1])
    assert weights > 80 * 2**20
    assert from_disk < 0.5 * weights  # in memory, masks alone would be as much
    assert in_memory > 1.5 * weights


def test_a_dry_run_says_what_will_be_where(nmbench, folders, texts):
    """The dry run of a folder loads no weights, and estimates what device, host memory and disk will hold."""
    text = ["--calibration", f"text:{texts}/cal.txt", "--metric", f"ppl:text:{texts}/test.txt@64"]
    flags = ["--method", "sparsegpt", *text, "--dry-run"]
    streamed = nmbench("run", *flags, "--model", folders["llama"], "--stream-from", "disk", "--dtype", "bfloat16")
    assert streamed.exit_code == 0, streamed.output
    assert "Estimated, blocks come from disk one by one:" in streamed.output
    assert "  host memory: about 0.0 GiB (dense weights outside blocks" in streamed.output
    assert "  disk: about 0.0 GiB (dense weights, in the model's files" in streamed.output
    assert "disk: " not in nmbench("run", *flags, "--model", folders["llama"], "--no-stream").output
    assert "is known when the model is loaded" in nmbench("run", *flags, "--model", "tiny:llama").output


def test_estimates_of_places(folders):
    """Every weight lies somewhere: in memory twice where blocks come from there, on disk where they come from it."""
    bundle, loaded = outline_of_folder(Folder(dtype="bfloat16"), str(folders["llama"])), load(folders["llama"])
    assert next(bundle.model.parameters()).is_meta
    assert bundle.shapes == loaded.shapes
    spec = RunSpec((MethodSpec("wanda", "wanda", {}),), "m", windows=2, window_tokens=32).resolved(bundle.defaults)
    inside = sum(p.nbytes for block in loaded.blocks.values() for p in block.parameters())
    whole = sum(tensor.nbytes for tensor in loaded.tensors().values())
    found = {source: whereabouts(bundle, spec, [Wanda()], CPU, source) for source in (None, "host", "disk")}
    assert found["host"].host["live weights"] == found["disk"].disk["pruned weights"] == inside
    assert found[None].host == {"dense weights": whole}
    assert found["disk"].host["dense weights outside blocks"] == whole - inside
    masks = sum(a * b for a, b in bundle.shapes.values())
    assert found["host"].host["masks"] == found["disk"].disk["masks"] == masks
    assert "repaired weights" not in found["disk"].disk
    assert whereabouts(bundle, spec, [SparseGPT()], CPU, "disk").disk["repaired weights"] == 2 * masks
