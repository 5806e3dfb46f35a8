"""Checkpoints that `plexor quantize` writes: read back code for code, and by others as the same dense weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from plexor.api import (
    Catalog,
    CheckpointError,
    ConfigError,
    Decoder,
    DecoderLayer,
    GroupedLinear,
    Linear,
    RequestError,
    RMSNorm,
)
from plexor.testing.architecture import expected_logits, load_model, random_prompts, run
from plexor.testing.checkpoints import quantize, write_checkpoint
from plexor_quant.calibration.layers import TextCalibration, calibrate
from plexor_quant.calibration.scheme import find_scheme

CATALOG = Catalog.load()
LLAMA: dict[str, Any] = {
    "vocab_size": 307,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
}
PRECISIONS = ("fp8", "int8_sq", "w4a_fp8", "int8_wo", "int4_wo", "int4_wo_g64", "int4_wo_g32", "int4_wo_channel")
CONFIGS: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "LlamaForCausalLM": lambda: transformers.LlamaConfig(**LLAMA, tie_word_embeddings=False),
    "MixtralForCausalLM": lambda: transformers.MixtralConfig(**LLAMA, num_local_experts=3, tie_word_embeddings=False),
    "OPTForCausalLM": lambda: transformers.OPTConfig(
        vocab_size=307,
        hidden_size=128,
        num_attention_heads=4,
        ffn_dim=256,
        num_hidden_layers=2,
        word_embed_proj_dim=128,
        max_position_embeddings=64,
    ),
}
TEXT = "".join(chr(97 + (7 * i + i * i // 5) % 26) for i in range(900))


def tied_with_biases() -> transformers.PretrainedConfig:
    return transformers.LlamaConfig(**LLAMA, tie_word_embeddings=True, attention_bias=True, mlp_bias=True)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Dense bfloat16 models by architecture, and "tied", a llama with biases and without a head of its own."""
    folder = tmp_path_factory.mktemp("dense")
    made = {
        name: write_checkpoint(folder / name, name, config(), dtype=torch.bfloat16) for name, config in CONFIGS.items()
    }
    made["tied"] = write_checkpoint(folder / "tied", "LlamaForCausalLM", tied_with_biases(), dtype=torch.bfloat16)
    return made


def stored(folder: Path, precision: str) -> dict[str, dict[str, Tensor]]:
    """What is kept of each linear layer and stack that the precision rounds."""
    built = load_model(folder, CATALOG, precision=precision, dtype=torch.bfloat16)
    return {
        name: dict(module.stored)
        for name, module in built.module.named_modules()
        if isinstance(module, Linear | GroupedLinear) and "scale" in module.stored
    }


def assert_same(found: dict[str, dict[str, Tensor]], expected: dict[str, dict[str, Tensor]]) -> None:
    assert found.keys() == expected.keys() != set()
    for name, tensors in expected.items():
        assert found[name].keys() == tensors.keys()
        for key, tensor in tensors.items():
            ours = found[name][key]
            assert ours.dtype == tensor.dtype, (name, key)
            assert torch.equal(ours.float(), tensor.float()), (name, key)


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *product(("tied",), PRECISIONS),
        *product(("LlamaForCausalLM", "MixtralForCausalLM", "OPTForCausalLM"), ("fp8", "w4a_fp8", "int8_wo")),
    ],
)
def test_plain_rounding_reads_back_as_what_loading_rounds(
    name: str, precision: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    out = quantize(checkpoints[name], tmp_path / "out", precision)
    assert_same(stored(out, precision), stored(checkpoints[name], precision))
    prompts = random_prompts(307)
    both = (out, checkpoints[name])
    models = [load_model(folder, CATALOG, precision=precision, dtype=torch.bfloat16) for folder in both]
    for ours, theirs in zip(*(run(model, prompts, (50,)) for model in models), strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("precision", ["fp8", "int8_sq", "w4a_fp8", "int8_wo", "int4_wo_g64"])
@pytest.mark.parametrize("name", ["LlamaForCausalLM", "MixtralForCausalLM", "tied"])
def test_a_calibrated_checkpoint_runs_as_the_calibrated_model(
    name: str, precision: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """Layer by layer from disk as in one piece in memory: the same codes, scales, gains and logits."""
    out = quantize(checkpoints[name], tmp_path / "out", precision, CATALOG, text=TEXT, window=30)
    found = load_model(out, CATALOG, precision=precision, dtype=torch.bfloat16)
    dense = load_model(checkpoints[name], CATALOG, kernels=dict.fromkeys(("linear", "grouped_linear"), "reference"))
    token_ids = transformers.AutoTokenizer.from_pretrained(out).encode(TEXT, add_special_tokens=False)
    kept = calibrate(dense.module, dense.build, token_ids, 30, find_scheme(precision), gain_dtype=torch.bfloat16)
    expected = load_model(checkpoints[name], CATALOG, precision=precision, dtype=torch.bfloat16)
    targets = dict(expected.module.named_modules())
    for module, tensors in kept.items():
        for key, tensor in tensors.items():
            targets[module].stored[key].copy_(tensor)
    gains = {module: norm for module, norm in dense.module.named_modules() if isinstance(norm, RMSNorm)}
    for module, norm in gains.items():
        targets[module].weight.copy_(norm.weight)
    prompts = random_prompts(307)
    for ours, theirs in zip(run(found, prompts, (50,)), run(expected, prompts, (50,)), strict=True):
        assert torch.equal(ours, theirs)
    plain = load_model(checkpoints[name], CATALOG, precision=precision, dtype=torch.bfloat16)
    assert not torch.equal(run(plain, prompts, (50,))[0], run(found, prompts, (50,))[0]), "nothing was calibrated"


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_library_of_the_layout_reads_the_same_weights(
    precision: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    library = pytest.importorskip("compressed_tensors")
    out = quantize(checkpoints["MixtralForCausalLM"], tmp_path / "out", precision)
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    config = library.QuantizationConfig.model_validate(settings)
    group = config.config_groups["group_0"]
    compressor = library.BaseCompressor.get_value_from_registry(settings["format"])
    tensors, dense = tensors_of(out), tensors_of(checkpoints["MixtralForCausalLM"])
    modules = {name.rpartition(".")[0] for name in tensors if name.endswith(".weight_scale")}
    matrices = {name.removesuffix(".weight") for name, tensor in dense.items() if tensor.dim() == 2}
    assert modules == {name for name in matrices if name not in (*settings["ignore"], "model.embed_tokens")}
    meant = ours_dense(out, precision)
    for module in modules:
        prefix = f"{module}."
        parts = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
        theirs = compressor.decompress(parts, group)["weight"]
        ours = meant[module]
        assert torch.equal(theirs, ours.to(theirs.dtype)), module


def ours_dense(folder: Path, precision: str) -> dict[str, Tensor]:
    """What the formats that read a mixtral keep means, by the checkpoint's modules."""
    built = load_model(folder, CATALOG, precision=precision, dtype=torch.bfloat16)
    found: dict[str, Tensor] = {}
    for index in range(2):
        layer, source = f"layers.{index}", f"model.layers.{index}"
        modules = dict(built.module.named_modules())
        qkv = modules[f"{layer}.attention.qkv"]
        names = [f"{source}.self_attn.{part}_proj" for part in "qkv"]
        sizes = [part.size for part in qkv.parts]
        found |= zip(names, qkv.format.dense(qkv.stored).split(sizes), strict=True)
        out = modules[f"{layer}.attention.out"]
        found[f"{source}.self_attn.o_proj"] = out.format.dense(out.stored)
        experts = modules[f"{layer}.feed_forward.experts"]
        gate_up = experts.gate_up.format.dense(experts.gate_up.stored)
        down = experts.down.format.dense(experts.down.stored)
        for expert in range(3):
            prefix = f"{source}.block_sparse_moe.experts.{expert}"
            found[f"{prefix}.w1"], found[f"{prefix}.w3"] = gate_up[expert].chunk(2)
            found[f"{prefix}.w2"] = down[expert]
    return found


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        *product(("LlamaForCausalLM", "tied"), ("fp8", "int8_wo", "w4a_fp8", "int4_wo_channel")),
        # Where the inputs of a layer lie as [T, in], as in OPT, the library does not round them token by token.
        ("OPTForCausalLM", "int8_wo"),
        ("OPTForCausalLM", "int4_wo"),
    ],
)
def test_transformers_loads_it_and_computes_the_same(
    name: str, precision: str, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """In float32, with activations rounded by both: e4m3 of few of them may differ where sums do in their last bit."""
    pytest.importorskip("compressed_tensors")
    out = quantize(checkpoints[name], tmp_path / "out", precision)
    prompts = random_prompts(307)
    ours = torch.cat(run(load_model(out, CATALOG, precision=precision), prompts, (50,)))
    error = (ours - torch.cat(expected_logits(out, prompts))).abs().amax(dim=-1)
    share = 0.4 if precision in ("fp8", "w4a_fp8") else 1.0
    assert float((error < 1e-4).float().mean()) >= share, error


def test_rows_that_alternate_in_a_fused_tensor_stay_where_they_are(tmp_path: Path) -> None:
    """gpt_neox has queries, keys and values of each head side by side; its biases and its untied head are kept."""
    config = transformers.GPTNeoXConfig(
        vocab_size=307,
        hidden_size=128,
        num_attention_heads=4,
        intermediate_size=256,
        num_hidden_layers=2,
        max_position_embeddings=64,
    )
    folder = write_checkpoint(tmp_path / "dense", "GPTNeoXForCausalLM", config, dtype=torch.bfloat16)
    out = quantize(folder, tmp_path / "out", "int8_wo", text=TEXT, window=30)
    assert json.loads((out / "config.json").read_text())["quantization_config"]["ignore"] == ["embed_out", "lm_head"]
    prompts = random_prompts(307)
    theirs = expected_logits(out, prompts)
    for precision in ("dense", "int8_wo"):
        ours = run(load_model(out, CATALOG, precision=precision), prompts, (50,))
        torch.testing.assert_close(torch.cat(ours), torch.cat(theirs), rtol=0, atol=1e-4)


def test_experts_in_one_tensor_are_written_one_by_one(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    """What transformers 5 has in memory, and saves when told so, becomes the published layout."""
    folder = checkpoints["MixtralForCausalLM"]
    fused = tmp_path / "fused"
    fused.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and not file.name.endswith("index.json"):
            (fused / file.name).write_bytes(file.read_bytes())
    tensors = tensors_of(folder)
    for layer in ("model.layers.0", "model.layers.1"):
        experts = [f"{layer}.block_sparse_moe.experts.{expert}" for expert in range(3)]
        gate, down, up = ([tensors.pop(f"{each}.w{number}.weight") for each in experts] for number in (1, 2, 3))
        gate_up = [torch.cat(both) for both in zip(gate, up, strict=True)]
        tensors[f"{layer}.mlp.experts.gate_up_proj"] = torch.stack(gate_up)
        tensors[f"{layer}.mlp.experts.down_proj"] = torch.stack(down)
    save_file(tensors, fused / "model.safetensors", {"format": "pt"})
    out, expected = quantize(fused, tmp_path / "out", "w4a_fp8"), quantize(folder, tmp_path / "expected", "w4a_fp8")
    found, wanted = tensors_of(out), tensors_of(expected)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name].view(torch.uint8), wanted[name].view(torch.uint8)) for name in wanted)


def test_the_folder_holds_all_that_the_model_needs(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    folder = checkpoints["MixtralForCausalLM"]
    out = quantize(folder, tmp_path / "out", "fp8")
    kept = {file.name for file in folder.iterdir() if ".safetensors" not in file.name}
    assert {file.name for file in out.iterdir()} == {*kept, "model.safetensors"}
    for name in kept - {"config.json"}:
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    config = json.loads((out / "config.json").read_text())
    settings = config.pop("quantization_config")
    assert config == json.loads((folder / "config.json").read_text())
    assert settings["format"] == settings["config_groups"]["group_0"]["format"] == "float-quantized"
    routers = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(2)]
    assert sorted(settings["ignore"]) == ["lm_head", *routers]
    dense, found = tensors_of(folder), tensors_of(out)
    for name in ("model.embed_tokens.weight", "lm_head.weight", f"{routers[0]}.weight", "model.norm.weight"):
        assert torch.equal(dense[name], found[name])


@pytest.mark.parametrize("calibrated", [False, True])
def test_layers_that_are_to_stay_dense_are_not_touched(
    calibrated: bool, checkpoints: dict[str, Path], tmp_path: Path
) -> None:
    """gate and up are dense, so factors for the inputs of down have nowhere to go."""
    folder = checkpoints["LlamaForCausalLM"]
    text = TEXT if calibrated else None
    dense_layers = ("*.gate_proj", "*.up_proj")
    out = quantize(folder, tmp_path / "out", "int8_wo", CATALOG, text=text, window=30, dense=dense_layers)
    kept = [f"model.layers.{layer}.mlp.{part}_proj" for layer in range(2) for part in ("gate", "up")]
    settings = json.loads((out / "config.json").read_text())["quantization_config"]
    assert sorted(settings["ignore"]) == ["lm_head", *kept]
    before, after = tensors_of(folder), tensors_of(out)
    for name in kept:
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    assert "model.layers.1.mlp.down_proj.weight_packed" in after
    built = load_model(out, CATALOG, precision="int8_wo")
    rounded = {
        name for name, module in built.module.named_modules() if "scale" in dict(module.named_buffers(recurse=False))
    }
    assert {name.rpartition(".")[2] for name in rounded} == {"qkv", "out", "down"}
    prompts = random_prompts(307)
    dense = torch.cat(run(load_model(folder, CATALOG), prompts, (50,)))
    ours = torch.cat(run(built, prompts, (50,)))
    assert float((ours - dense).std()) < 0.05 * float(dense.std())


def test_only_the_layer_that_is_rounded_has_memory(
    checkpoints: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held: list[list[int]] = []
    decoders: list[Decoder] = []
    make, rounded = TextCalibration.__init__, TextCalibration.round

    def remember(self: TextCalibration, decoder: Decoder, *rest: Any) -> None:
        decoders.append(decoder)
        make(self, decoder, *rest)

    def look(self: TextCalibration, layer: DecoderLayer, linears: Any) -> Any:
        parts = [decoders[0].embedding, *decoders[0].layers]
        held.append([sum(t.untyped_storage().nbytes() for t in [*p.parameters(), *p.buffers()]) for p in parts])
        return rounded(self, layer, linears)

    monkeypatch.setattr(TextCalibration, "__init__", remember)
    monkeypatch.setattr(TextCalibration, "round", look)
    quantize(checkpoints["OPTForCausalLM"], tmp_path / "out", "int4_wo", CATALOG, text=TEXT, window=30)
    assert [[size > 0 for size in sizes] for sizes in held] == [[False, True, False], [False, False, True]]


@pytest.fixture
def changed(checkpoints: dict[str, Path], tmp_path: Path) -> Callable[[dict[str, Tensor], dict[str, Any]], Path]:
    """A function that copies the llama with other tensors and other settings in its config.json."""

    def change(tensors: dict[str, Tensor], settings: dict[str, Any]) -> Path:
        source, folder = checkpoints["LlamaForCausalLM"], tmp_path / "changed"
        folder.mkdir()
        for file in source.iterdir():
            if ".safetensors" not in file.name:
                (folder / file.name).write_bytes(file.read_bytes())
        save_file({**tensors_of(source), **tensors}, folder / "model.safetensors", {"format": "pt"})
        config = json.loads((source / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | settings))
        return folder

    return change


def test_what_cannot_be_written_is_refused_and_leaves_nothing(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    model, out = checkpoints["LlamaForCausalLM"], tmp_path / "out"
    with pytest.raises(
        ConfigError, match="the precision 'dense' cannot be written as a checkpoint: choose one of fp8, "
    ):
        quantize(model, out, "dense", CATALOG)
    with pytest.raises(ConfigError, match=r"is called '\*.down': names are such as model.layers"):
        quantize(model, out, "fp8", CATALOG, dense=("*.down",))
    with pytest.raises(ConfigError, match="k_proj is multiplied together with layers that are to stay"):
        quantize(model, out, "fp8", CATALOG, dense=("*.q_proj",))
    with pytest.raises(RequestError, match=r"has \d+ tokens, fewer than one window of 64"):
        quantize(model, out, "fp8", CATALOG, text="few")
    done = quantize(model, tmp_path / "done", "fp8")
    with pytest.raises(CheckpointError, match="stored quantised already"):
        quantize(done, out, "int8_wo", CATALOG)
    assert [path.name for path in tmp_path.iterdir()] == ["done"]


def test_an_empty_folder_is_taken(checkpoints: dict[str, Path], tmp_path: Path) -> None:
    quantize(checkpoints["LlamaForCausalLM"], tmp_path, "fp8", CATALOG)
    assert (tmp_path / "model.safetensors").is_file()


def test_groups_that_do_not_divide_a_row_are_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    cut = {
        f"model.layers.{layer}.mlp.{part}_proj.weight": torch.ones((128, 96) if part == "down" else (96, 128))
        for layer in range(2)
        for part in ("gate", "up", "down")
    }
    folder = changed(cut, {"intermediate_size": 96})
    said = "has 96 input features, which groups of 128 do not divide, .* choose int4_wo_g32 or another"
    with pytest.raises(CheckpointError, match=said):
        quantize(folder, tmp_path / "out", "w4a_fp8", CATALOG)
    quantize(folder, tmp_path / "out", "int4_wo_g32", CATALOG)
    quantize(folder, tmp_path / "mixed", "w4a_fp8", CATALOG, dense=("*.down_proj",))


def test_a_text_that_overflows_is_refused(changed: Callable[..., Path], tmp_path: Path) -> None:
    folder = changed({"model.layers.1.mlp.down_proj.weight": torch.full((128, 256), 3e38)}, {"dtype": "float32"})
    with pytest.raises(CheckpointError, match="layer 2 of 2 makes NaN or infinity of the calibration text"):
        quantize(folder, tmp_path / "out", "fp8", CATALOG, text=TEXT)
    assert not (tmp_path / "out").exists()


def test_transposed_weights_are_refused(tmp_path: Path) -> None:
    config = transformers.GPT2Config(vocab_size=307, n_embd=64, n_head=4, n_layer=1, n_positions=64)
    folder = write_checkpoint(tmp_path / "dense", "GPT2LMHeadModel", config)
    with pytest.raises(CheckpointError, match="lies transposed"):
        quantize(folder, tmp_path / "out", "fp8", CATALOG)
