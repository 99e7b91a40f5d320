"""Laws of validation: accepted and refused masks, the place of a fault, files and slices."""

import json

import pytest
import safetensors.torch
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

import nmbench.artifacts.artifact as matrix_module
from nmbench.artifacts.artifact import Matrix, Unreadable
from nmbench.artifacts.decoder_scope import Skeleton, scope_of
from nmbench.artifacts.hardware import hardware_of
from nmbench.artifacts.layer_report import layer_report
from nmbench.artifacts.pattern_inference import infer
from nmbench.artifacts.reading import open_artifact
from nmbench.artifacts.rendering import validation_json, validation_text, verdict
from nmbench.artifacts.validation import AT_MOST, BOTH, EXACTLY, in_order, validate
from nmbench.errors import NMBenchError
from nmbench.pattern import Pattern
from nmbench.results.files import save_masks
from nmbench.testing.strategies import masks, patterns, tensors

quick = settings(max_examples=40, deadline=None)
LAYER = "model.layers.3.mlp.up_proj"
TWO_FOUR = Pattern(2, 4)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One folder for all examples of a law."""
    return tmp_path_factory.mktemp("validation")


def judge_masks(folder, mask, pattern, claimed=None):
    save_masks(folder / "masks.safetensors", {LAYER: mask}, {LAYER: claimed or pattern}, {})
    return validate(open_artifact(str(folder / "masks.safetensors")), pattern)


def judge_weight(folder, weight, pattern=None, **options):
    safetensors.torch.save_file({f"{LAYER}.weight": weight}, folder / "weights.safetensors")
    return validate(open_artifact(str(folder / "weights.safetensors")), pattern, **options)


def in_memory(mask, kind=True):
    return Matrix(LAYER, tuple(mask.shape), kind, lambda: lambda start, stop: mask[start:stop], 1)


@quick
@given(st.data())
def test_every_top_mask_is_strict(folder, data):
    """Every mask of `Pattern.top` is accepted, as a mask and as the weights under the mask."""
    pattern = data.draw(patterns(max_group=16, units=(1, 2, 3)))
    weight = data.draw(tensors(pattern))
    mask = pattern.top(weight.abs())
    found = judge_masks(folder, mask, pattern)
    assert found.strict and found.basis == EXACTLY
    assert found.layers[0].groups == mask.numel() // pattern.group
    pruned = judge_weight(folder, weight.masked_fill(~mask, 0.0), pattern)
    (layer,) = pruned.layers
    assert pruned.strict and pruned.basis == AT_MOST
    assert layer.extra_zeros == int((mask & (weight == 0)).sum())
    assert layer.fewer == int((pattern.kept(mask & (weight != 0)) < pattern.keep).sum())


@quick
@given(st.data())
def test_any_flipped_bit_of_a_mask_is_refused(folder, data):
    """A mask file with any bit flipped is refused; the error names layer, row, columns and count."""
    pattern = data.draw(patterns())
    mask = data.draw(masks(pattern))
    row, column = data.draw(st.tuples(st.integers(0, mask.shape[0] - 1), st.integers(0, mask.shape[1] - 1)))
    mask[row, column] ^= True
    first = column - column % pattern.group
    found = judge_masks(folder, mask, pattern)
    assert not found.strict
    kept = pattern.keep + (1 if mask[row, column] else -1)
    assert found.layers[0].first == (row, first, kept)
    assert found.layers[0].broken == 1
    assert f"{LAYER}: 1 of {mask.numel() // pattern.group} groups" in verdict(found)
    assert f"row {row}, columns {first}..{first + pattern.group - 1} keep {kept} instead of {pattern.keep}" in verdict(
        found
    )


@quick
@given(st.data(), st.sampled_from([1e-3, -2.0, 1e-41, torch.nan]))
def test_any_weight_brought_back_is_refused(folder, data, value):
    """One dropped weight that is not zero, however small, breaks its group; the error names the group."""
    pattern = data.draw(patterns())
    mask = data.draw(masks(pattern))
    weight = torch.ones(mask.shape).masked_fill(~mask, 0.0)
    row, column = data.draw(st.sampled_from((~mask).nonzero().tolist()))
    weight[row, column] = value
    found = judge_weight(folder, weight, pattern)
    assert found.layers[0].first == (row, column - column % pattern.group, pattern.keep + 1)
    assert "instead of at most" in verdict(found)


@quick
@given(st.data(), st.integers(1, 60))
def test_slices_do_not_matter(data, weights):
    """A matrix read in slices of any size has the same report as one read at once."""
    pattern = data.draw(patterns(max_group=8))
    kept = data.draw(tensors(pattern)) > 0.3
    report = matrix_module.Artifact("x", "test", masks={LAYER: in_memory(kept)})
    whole = validate(report, pattern).layers
    sliced = Matrix.slices
    try:
        Matrix.slices = lambda self, group=1: sliced(self, group, weights)
        assert validate(report, pattern).layers == whole
    finally:
        Matrix.slices = sliced


@quick
@given(st.data())
def test_the_pattern_of_a_mask_is_inferred(data):
    """The inferred pattern of a mask of many random groups is the pattern that made the mask, in lowest terms."""
    pattern = data.draw(patterns(max_group=16))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31)))
    mask = pattern.top(torch.rand(64, 8 * pattern.group, generator=generator))
    assert infer(in_memory(mask)) == pattern
    mask[5, 0] ^= True
    assert infer(in_memory(mask)) == pattern


@pytest.mark.parametrize("density", [0.02, 0.3, 0.5, 0.9, 0.99, 1.0])
def test_no_pattern_is_seen_where_there_is_none(density):
    """No pattern is inferred for dense and unstructured masks."""
    mask = torch.rand(512, 512, generator=torch.Generator().manual_seed(0)) < density
    assert infer(in_memory(mask)) is None


def test_zeros_are_told_apart(folder):
    """Extra zeros and negative zeros are counted and are no faults; NaN and infinity are faults."""
    weight = torch.tensor([[1.0, 2.0, 0.0, -0.0], [0.0, 3.0, 0.0, 0.0]]).repeat(1, 8)
    found = judge_weight(folder, weight, TWO_FOUR)
    (layer,) = found.layers
    assert found.strict
    assert (layer.groups, layer.fewer, layer.extra_zeros, layer.negative_zeros) == (16, 8, 8, 8)
    assert "8 groups have fewer non-zeros than N, 8 extra zeros, 8 negative zeros" in validation_text(found)
    weight[1, 1] = torch.inf
    found = judge_weight(folder, weight, TWO_FOUR)
    assert not found.strict and "NaN or infinite" in verdict(found)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_every_stored_dtype_is_judged(folder, dtype):
    """Weights in float16, bfloat16, float8 and quantised dtypes have the same report."""
    mask = TWO_FOUR.top(torch.rand(16, 32))
    weight = torch.ones(16, 32).masked_fill(~mask, 0.0)
    assert judge_weight(folder, weight.to(dtype)).strict
    weight[3, :4] = 1
    assert judge_weight(folder, weight.to(dtype), TWO_FOUR).layers[0].first == (3, 0, 4)


def test_a_layer_left_dense_is_refused_unless_it_is_named(folder):
    """One dense layer makes a checkpoint not strict, unless `skip` names that layer."""
    mask = TWO_FOUR.top(torch.rand(16, 32))
    tensors_ = {
        "model.layers.0.mlp.up_proj.weight": torch.ones(16, 32).masked_fill(~mask, 0.0),
        "model.layers.0.self_attn.q_proj.weight": torch.ones(16, 32),
        "model.layers.0.input_layernorm.weight": torch.ones(32),
        "model.embed_tokens.weight": torch.ones(99, 32),
    }
    safetensors.torch.save_file(tensors_, folder / "partly.safetensors")
    artifact = open_artifact(str(folder / "partly.safetensors"))
    found = validate(artifact)
    assert [(layer.name, layer.strict) for layer in found.layers] == [
        ("model.layers.0.mlp.up_proj", True),
        ("model.layers.0.self_attn.q_proj", False),
    ]
    assert found.skipped == {"model.embed_tokens.weight": "outside the decoder blocks"}
    assert "128 of 128 groups are not 2:4" in verdict(found)
    kept = validate(artifact, skip=("q_proj",))
    assert kept.strict
    assert kept.coverage == pytest.approx(512 / (2 * 512 + 32))
    assert kept.skipped["model.layers.0.self_attn.q_proj"] == "left out by --skip q_proj"
    with pytest.raises(NMBenchError, match="--skip 'k_proj' matches no layer"):
        validate(artifact, skip=("k_proj",))


def test_layers_may_have_patterns_of_their_own(folder):
    """Without a pattern, each layer is judged by its own pattern; a given pattern applies to all layers."""
    chosen = {"model.layers.0.a": Pattern(2, 4), "model.layers.0.b": Pattern(5, 8)}
    weights = {f"{name}.weight": p.top(torch.rand(64, 64)).float() for name, p in chosen.items()}
    safetensors.torch.save_file(weights, folder / "two.safetensors")
    artifact = open_artifact(str(folder / "two.safetensors"))
    assert [layer.pattern for layer in validate(artifact).layers] == ["2:4", "5:8"]
    assert [layer.strict for layer in validate(artifact, Pattern(2, 4)).layers] == [True, False]
    assert [layer.strict for layer in validate(artifact, Pattern(4, 8)).layers] == [True, False]
    assert "rows of 64 do not fall into groups of 6" in verdict(validate(artifact, Pattern(3, 6)))


def test_a_claim_is_what_counts(folder):
    """A mask file that claims 2:4 is judged by 2:4, even if its mask shows another pattern."""
    mask = Pattern(1, 4).top(torch.rand(16, 32))
    save_masks(folder / "claim.safetensors", {LAYER: mask}, {LAYER: TWO_FOUR}, {})
    artifact = open_artifact(str(folder / "claim.safetensors"))
    assert not validate(artifact).strict
    assert validate(artifact, Pattern(1, 4)).strict


def test_nothing_to_judge(folder):
    """A checkpoint without matrices in its blocks cannot be judged."""
    safetensors.torch.save_file({"model.layers.0.norm.weight": torch.ones(4)}, folder / "none.safetensors")
    with pytest.raises(Unreadable, match="nothing to judge"):
        validate(open_artifact(str(folder / "none.safetensors")))


# Models as transformers saves them


def saved(folder, family, break_layer=None, masks_too=False, shard="5GB"):
    """A tiny model pruned to 2:4 in its canonical view and saved; one layer may get one weight back."""
    from nmbench_plugins.tiny import TinyModel

    bundle = TinyModel().load(family)
    kept = {name: TWO_FOUR.top(layer.read().abs()) for name, layer in bundle.layers.items()}
    for name, layer in bundle.layers.items():
        layer.write(layer.read().masked_fill(~kept[name], 0.0))
        if name == break_layer:
            weight = layer.read()
            weight[3, 8:12] = 1.0
    bundle.model.save_pretrained(folder, max_shard_size=shard)
    if masks_too:
        save_masks(folder / "nmbench/masks.safetensors", kept, dict.fromkeys(kept, TWO_FOUR), {})
    return bundle


FAMILIES = ("llama", "gpt2", "qwen3", "gptneox", "opt", "phi3", "gemma2")


@pytest.mark.parametrize("family", FAMILIES)
def test_checkpoints_of_every_family(tmp_path, family):
    """The linear layers of the decoder, and no others, are judged, in the canonical view `[out, in]`."""
    bundle = saved(tmp_path, family)
    found = validate(open_artifact(str(tmp_path)))
    assert found.strict, verdict(found)
    assert {layer.name: layer.shape for layer in found.layers} == {n: ly.shape for n, ly in bundle.layers.items()}
    assert found.coverage == pytest.approx(bundle.coverage()["share_of_decoder"])
    assert validate(open_artifact(str(tmp_path)), TWO_FOUR).layers == found.layers


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("masks_too", [True, False])
def test_one_broken_group_in_a_checkpoint(tmp_path, family, masks_too):
    """The one broken group of a whole model is named by its row and columns in `[out, in]`."""
    name = list(saved(tmp_path / "x", family).layers)[-1]
    saved(tmp_path, family, break_layer=name, masks_too=masks_too)
    found = validate(open_artifact(str(tmp_path)))
    (bad,) = [layer for layer in found.layers if not layer.strict]
    assert bad.name == name
    if masks_too:
        assert (found.basis, bad.off_mask) == (BOTH, 2)
    else:
        assert (found.basis, bad.first) == (AT_MOST, (3, 8, 4))


def test_shards_and_bins_give_the_same_report(tmp_path):
    """One file, many shards and a pickled file have the same report."""
    saved(tmp_path / "one", "llama")
    saved(tmp_path / "many", "llama", shard="40KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 2
    (tmp_path / "bin").mkdir()
    weights = safetensors.torch.load_file(tmp_path / "one/model.safetensors")
    torch.save(weights, tmp_path / "bin/pytorch_model.bin")
    reports = [validate(open_artifact(str(tmp_path / name))).layers for name in ("one", "many", "bin")]
    assert reports[0] == reports[1] == reports[2]
    shard = next((tmp_path / "many").glob("*.safetensors"))
    assert validate(open_artifact(str(shard))).strict


def test_flat_masks_take_the_shapes_of_a_model(tmp_path):
    """Bits without a shape are judged as one row; with the shapes of a checkpoint they have rows."""
    import numpy as np

    bundle = saved(tmp_path, "llama")
    kept = {name: layer.read() != 0 for name, layer in bundle.layers.items()}
    name = list(kept)[4]
    kept[name][7, 4:8] = torch.tensor([True, True, True, False])
    packed = {f"{layer}.weight.mask": np.packbits(mask.numpy()) for layer, mask in kept.items()}
    np.savez_compressed(tmp_path / "m.npz", **packed)
    flat = validate(open_artifact(str(tmp_path / "m.npz")), TWO_FOUR)
    columns = kept[name].shape[1]
    assert flat.first_problem.first == (0, 7 * columns + 4, 3)
    assert "give --like" in validation_text(flat)
    shaped = validate(open_artifact(str(tmp_path / "m.npz")), TWO_FOUR, like=open_artifact(str(tmp_path)))
    assert shaped.first_problem.name == name
    assert shaped.first_problem.first == (7, 4, 3)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_fused_experts(folder, turned, suffix):
    """Every matrix of a 3-D tensor is a layer `[out, in]` if the model has fused experts; else it is skipped."""
    name = "model.layers.0.mlp.experts.gate_up_proj"
    weight = torch.stack([TWO_FOUR.top(torch.rand(16, 32)).float() for _ in range(3)])
    weight[2, 5, 8:12] = 1.0
    stored = {f"{name}": weight.mT.contiguous() if turned else weight, "model.layers.0.a.weight": weight[0].clone()}
    save = safetensors.torch.save_file if suffix == "safetensors" else torch.save
    save(stored, folder / f"experts.{suffix}")
    artifact = open_artifact(str(folder / f"experts.{suffix}"))
    assert validate(artifact).skipped == {name: f"not a matrix of weights {tuple(stored[name].shape)}"}
    shapes = {**{f"{name}[{e}]": (16, 32) for e in range(3)}, "model.layers.0.a": (16, 32)}
    skeleton = Skeleton(shapes, frozenset(n for n in shapes if turned and "[" in n), {})
    scope = scope_of(artifact, skeleton)
    assert {layer: matrix.shape for layer, matrix in scope.weights.items()} == shapes
    reports = [layer_report(layer, None, matrix, TWO_FOUR) for layer, matrix in scope.weights.items()]
    (bad,) = [report for report in reports if not report.strict]
    assert (bad.name, bad.first) == (f"{name}[2]", (5, 8, 4))
    assert (scope.skipped, scope.decoder_weights) == ({}, 4 * 16 * 32)


def test_a_file_away_from_its_configuration(tmp_path):
    """A file of GPT-2, whose weights are stored `[in, out]`, is strict only beside the configuration of its model."""
    saved(tmp_path, "gpt2")
    (tmp_path / "away").mkdir()
    (tmp_path / "model.safetensors").rename(tmp_path / "away/m.safetensors")
    alone = open_artifact(str(tmp_path / "away/m.safetensors"))
    assert not validate(alone).strict
    saved(tmp_path, "gpt2")
    assert validate(alone, like=open_artifact(str(tmp_path))).strict


def test_masks_beside_their_model(tmp_path):
    """With `like`, masks alone have a coverage; a mask of a wrong shape or of no layer is a fault."""
    bundle = saved(tmp_path, "gpt2")
    model = open_artifact(str(tmp_path))
    kept = {name: layer.read() != 0 for name, layer in bundle.layers.items()}
    name = "transformer.h.1.mlp.c_fc"

    def beside(chosen):
        save_masks(tmp_path / "m.safetensors", chosen, dict.fromkeys(chosen, TWO_FOUR), {})
        return validate(open_artifact(str(tmp_path / "m.safetensors")), like=model)

    found = beside(kept)
    assert found.strict and found.coverage == pytest.approx(bundle.coverage()["share_of_decoder"])
    found = beside({**kept, name: kept[name].repeat(1, 2)})
    assert verdict(found).endswith(f"{name}: has shape (96, 128), its weights (96, 64).")
    found = beside({**kept, "transformer.h.2.mlp.c_fc": kept[name]})
    assert "transformer.h.2.mlp.c_fc: has a mask, but" in verdict(found)


@pytest.mark.parametrize("name", ["\u00b2", "1" * 5000, "a.0000.b", "\u0663"])
def test_names_with_odd_numbers(folder, name):
    """Layers whose names hold unusual digits are judged like any other."""
    weights = {f"{name}.{i}.weight": TWO_FOUR.top(torch.rand(8, 16)).float() for i in (10, 9)}
    safetensors.torch.save_file(weights, folder / "odd.safetensors")
    assert validate(open_artifact(str(folder / "odd.safetensors"))).strict


def test_layers_come_in_the_order_of_the_model():
    """Numbers in names are compared as numbers."""
    names = [f"model.layers.{i}.mlp" for i in (0, 2, 9, 10, 11, 100)]
    assert in_order(reversed(names)) == names


def test_a_mask_without_its_weight(tmp_path):
    """A mask for a layer that the checkpoint beside it lacks is a fault, not a proof."""
    saved(tmp_path, "llama", masks_too=True)
    weights = safetensors.torch.load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    safetensors.torch.save_file(weights, tmp_path / "model.safetensors")
    found = validate(open_artifact(str(tmp_path)))
    assert verdict(found).endswith(
        "model.layers.1.mlp.up_proj: has a mask, but the checkpoint has no matrix of weights for it."
    )


@pytest.mark.parametrize("config", ["{}", '{"model_type": "nope"}', '{"model_type": "llama", "hidden_size": "x"}'])
def test_a_configuration_that_makes_no_model(tmp_path, config):
    """Where transformers cannot build the model, tensor names alone select the layers."""
    saved(tmp_path, "llama")
    (tmp_path / "config.json").write_text(config)
    assert len(validate(open_artifact(str(tmp_path))).layers) == 14


def test_a_configuration_with_too_many_blocks_is_not_built(tmp_path, monkeypatch):
    """A configuration with a million blocks is not built."""
    saved(tmp_path, "llama")
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, "num_hidden_layers": 10**6, "layer_types": None}))
    built = []
    monkeypatch.setattr(
        transformers.AutoModelForCausalLM, "from_config", lambda *args, **kwargs: built.append(args), raising=True
    )
    assert validate(open_artifact(str(tmp_path))).strict
    assert not built


def test_code_of_a_folder_is_not_run(tmp_path):
    """A folder whose configuration needs its own code is judged by tensor names, and the code does not run."""
    saved(tmp_path, "llama")
    content = json.loads((tmp_path / "config.json").read_text())
    content |= {"model_type": "evil", "auto_map": {"AutoConfig": "evil.E", "AutoModelForCausalLM": "evil.E"}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    (tmp_path / "evil.py").write_text(f"import pathlib; pathlib.Path({str(tmp_path / 'owned')!r}).mkdir()")
    assert validate(open_artifact(str(tmp_path))).strict
    assert not (tmp_path / "owned").exists()


def test_the_json_is_json_and_whole(folder):
    """The report as plain data has every layer, the verdict, and the first problem."""
    weight = torch.ones(16, 32)
    found = judge_weight(folder, weight, TWO_FOUR)
    content = json.loads(json.dumps(validation_json(found)))
    assert content["strict"] is False
    assert content["first_problem"]["layer"] == LAYER
    assert content["first_problem"]["first"] == [0, 0, 4]
    assert content["layers"][0]["broken"] == 128
    assert content["bytes"] == weight.numel() * 4


PAIRS = Pattern.parse("2:4x2")


def test_pairs_are_inferred_proven_and_placed(folder):
    """Weights in pairs are seen as 2:4x2, which names the hardware that runs pairs; torn pairs are named."""
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    pruned = weight.masked_fill(~PAIRS.top(weight.abs(), 2), 0.0)
    found = judge_weight(folder, pruned)
    assert verdict(found) == "STRICT 2:4x2 (1 layers)"
    assert "2:4x2 runs on: NVIDIA Blackwell FP4" in validation_text(found) and "not run by us" in validation_text(found)
    torn = pruned.masked_fill(~torch.arange(64).remainder(2).bool(), 0.0)  # one weight of each pair is zero: at most N
    assert judge_weight(folder, torn, PAIRS).strict and judge_weight(folder, torn, PAIRS).layers[0].fewer == 16 * 8
    four_eight = weight.masked_fill(~Pattern(4, 8).top(weight.abs()), 0.0)
    assert "not in 2 whole units of 2" in verdict(judge_weight(folder, four_eight, PAIRS))
    assert "not in 2 whole units of 2" in verdict(judge_masks(folder, four_eight != 0, PAIRS, Pattern(4, 8)))


@pytest.mark.parametrize(
    ("text", "fp4", "two_four", "slides"),
    [
        ("2:4", False, True, True),
        ("4:6", False, False, True),
        ("6:8", False, False, True),
        ("2:4x2", True, False, False),
        ("1:4", True, True, False),
        ("1:2x2", True, True, False),
        ("1:2x4", True, False, False),
        ("4:8", False, False, False),
        ("3:4x2", False, False, False),
    ],
)
def test_hardware_follows_from_the_pattern(text, fp4, two_four, slides):
    """Hardware is named for exactly the patterns whose every mask it runs."""
    found = " ".join(hardware_of(Pattern.parse(text)))
    assert ("FP4" in found, "Ampere" in found, "SlideSparse" in found) == (fp4, two_four, slides)
