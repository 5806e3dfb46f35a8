"""BLIP-2 against transformers' own: features of each part, logits at each position, greedy tokens of the engine."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from plexor import Engine, EngineConfig, SamplingParams
from plexor.api import Batch, Catalog, CheckpointError, ForwardContext, MediaModel, MediaRows, Pages, PluginError
from plexor.testing.architecture import load_model
from plexor.testing.checkpoints import write_checkpoint
from plexor_blip2 import plugin
from plexor_blip2.architecture import Blip2
from plexor_blip2.config import QFormerConfig, VisionConfig
from plexor_blip2.config import config as read_config

VOCABULARY = 307
IMAGE_ID = 3
QUERIES = 5
SIDE = 33  # with patches of 10: three a side, and three pixels that no patch covers
BLOCK_SIZE = 4

VISION: dict[str, Any] = {
    "hidden_size": 40,
    "intermediate_size": 72,
    "num_hidden_layers": 2,
    "num_attention_heads": 5,
    "image_size": SIDE,
    "patch_size": 10,
}
QFORMER: dict[str, Any] = {
    "hidden_size": 36,
    "intermediate_size": 52,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "vocab_size": 300,
}
# A head of 80 features, as in the language half of the published checkpoint.
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 160,
    "word_embed_proj_dim": 160,
    "num_attention_heads": 2,
    "ffn_dim": 100,
    "num_hidden_layers": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
VARIANTS: dict[str, dict[str, dict[str, Any]]] = {
    "plain": {},
    "untied": {"text": {"tie_word_embeddings": False}},
    "without biases": {"vision": {"qkv_bias": False}, "text": {"enable_bias": False}},
    "a Q-Former that reads text too": {"qformer": {"use_qformer_text_input": True}},
    "every block crosses": {"qformer": {"cross_attention_frequency": 1}},
    "other activations": {
        "vision": {"hidden_act": "quick_gelu", "layer_norm_eps": 1e-2},
        "qformer": {"hidden_act": "relu", "layer_norm_eps": 1e-2, "cross_attention_frequency": 3},
    },
}


def write(folder: Path, vision: dict[str, Any] = {}, qformer: dict[str, Any] = {}, text: dict[str, Any] = {}) -> Path:  # noqa: B006
    """A random checkpoint with its image processor's settings."""
    config = transformers.Blip2Config(
        vision_config=VISION | vision,
        qformer_config=QFORMER | qformer,
        text_config=transformers.OPTConfig(**(TEXT | text)).to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_ID,
    )
    write_checkpoint(folder, plugin.NAME, config, special_tokens={"<image>": IMAGE_ID})
    BlipImageProcessorPil(size={"height": SIDE, "width": SIDE}).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def catalog() -> Catalog:
    return Catalog.load()


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("plain"))


def oracle(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    load = transformers.Blip2ForConditionalGeneration.from_pretrained
    return load(folder, dtype=dtype, attn_implementation="eager").eval()


def load(folder: Path, catalog: Catalog, dtype: torch.dtype = torch.float32) -> Blip2:
    model = load_model(folder, catalog, dtype=dtype).model
    assert isinstance(model, Blip2)
    return model


def images(count: int) -> list[Image.Image]:
    generator = np.random.default_rng(count)
    sizes = ((20 + 7 * index, 50 - 3 * index) for index in range(count))
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]


def pixels(count: int, seed: int = 0) -> Tensor:
    return torch.randn(count, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_each_part_equals_its_counterpart(tmp_path: Path, catalog: Catalog, variant: str) -> None:
    folder = write(tmp_path, **VARIANTS[variant])
    model, theirs, pictures = load(folder, catalog), oracle(folder), pixels(3)
    outputs = theirs.get_image_features(pictures)
    features, queries = outputs.vision_outputs.last_hidden_state, outputs.qformer_outputs.last_hidden_state
    torch.testing.assert_close(model.vision(pictures), features, rtol=0, atol=2e-5)
    torch.testing.assert_close(model.qformer(features), queries, rtol=0, atol=2e-5)
    torch.testing.assert_close(model.projection(queries), outputs.pooler_output, rtol=0, atol=2e-5)
    assert isinstance(model, MediaModel)
    encoded = model.encode("image", list(pictures))
    torch.testing.assert_close(torch.stack(encoded), outputs.pooler_output, rtol=0, atol=5e-5)
    assert float((encoded[0] - encoded[1]).abs().max()) > 0.1, "the pictures hardly matter"


@pytest.mark.parametrize("variant", ["plain", "untied", "without biases"])
@torch.no_grad()
def test_logits_equal(tmp_path: Path, catalog: Catalog, variant: str) -> None:
    """Whole, and in chunks that cut the placeholders apart; two sequences side by side, one without a picture."""
    folder = write(tmp_path, **VARIANTS[variant])
    model, theirs, pictures = load(folder, catalog), oracle(folder), pixels(1)
    seen = [IMAGE_ID] * QUERIES + [1, 50, 60, 70, 5]
    blind = [1, 90, 80, 70, 60, 50, 40, 30, 20, 10]
    expected = [
        theirs(pixel_values=pictures, input_ids=torch.tensor([seen])).logits[0],
        theirs.language_model(input_ids=torch.tensor([blind])).logits[0],
    ]
    assert min(float(reference.std()) for reference in expected) > 0.1
    for chunk in (64, 7, 1):
        actual = run(model, (seen, blind), model.encode("image", list(pictures))[0], chunk)
        for ours, reference in zip(actual, expected, strict=True):
            torch.testing.assert_close(ours, reference, rtol=0, atol=1e-4)


def run(model: Blip2, sequences: Sequence[Sequence[int]], embeddings: Tensor, chunk: int) -> list[Tensor]:
    """Logits [n, V] of sequences of one length over a paged cache; the first begins with the placeholders."""
    length, count = len(sequences[0]), len(sequences)
    num_blocks = -(-length // BLOCK_SIZE)
    table = torch.arange(count * num_blocks, dtype=torch.int32).view(num_blocks, count).t().contiguous()
    cache = tuple(
        {name: torch.zeros(count * num_blocks, BLOCK_SIZE, s.num_kv_heads, s.head_size) for name in ("keys", "values")}
        for s in model.kv_shapes(count * num_blocks, BLOCK_SIZE)
    )
    logits: list[list[Tensor]] = [[] for _ in sequences]
    for start in range(0, length, chunk):
        positions = torch.arange(start, min(start + chunk, length))
        slots = table[:, positions // BLOCK_SIZE].long() * BLOCK_SIZE + positions % BLOCK_SIZE
        pages = Pages(
            query_start=torch.arange(count + 1, dtype=torch.int32) * len(positions),
            kv_length=torch.full((count,), start + len(positions), dtype=torch.int32),
            block_table=table,
            max_query=len(positions),
        )
        ctx = ForwardContext(pages, slots.flatten(), None, cache)
        placeholders = positions[positions < QUERIES]
        media = (MediaRows(placeholders - start, embeddings[placeholders]),) if len(placeholders) else ()
        ids = torch.tensor([sequence[start : start + chunk] for sequence in sequences])
        hidden = model.forward(Batch(ids.flatten(), positions.repeat(count), media), ctx)
        for rows, piece in zip(logits, model.logits(hidden).split(len(positions)), strict=True):
            rows.append(piece)
    return [torch.cat(rows) for rows in logits]


@torch.no_grad()
def test_the_q_former_stays_in_float32(plain: Path, catalog: Catalog) -> None:
    model, theirs = load(plain, catalog, torch.bfloat16), oracle(plain, torch.bfloat16)
    assert {parameter.dtype for parameter in model.qformer.parameters()} == {torch.float32}
    assert {buffer.dtype for buffer in model.qformer.buffers()} == {torch.float32}
    assert model.vision.position_embedding.dtype == torch.bfloat16
    pictures = pixels(2)
    expected = theirs.get_image_features(pictures.bfloat16()).pooler_output
    encoded = torch.stack(model.encode("image", list(pictures)))
    assert encoded.dtype == torch.bfloat16
    assert float((encoded - expected).float().norm() / expected.float().norm()) < 0.02


TEXTS = ("", "a picture of", "what is this? it is", "say", "a picture of")


def ask(engine: Engine) -> list[Any]:
    """Prompts with pictures, two of which differ in the picture alone."""
    return [engine.prompts.text(text, [image]) for text, image in zip(TEXTS, images(len(TEXTS)), strict=True)]


@pytest.fixture(scope="module")
def expected_tokens(plain: Path, catalog: Catalog) -> list[list[int]]:
    """What transformers makes of the pictures and the texts on its own."""
    processor = transformers.Blip2Processor(
        BlipImageProcessorPil.from_pretrained(plain),
        transformers.AutoTokenizer.from_pretrained(plain),
        num_query_tokens=QUERIES,
    )
    theirs, answers = oracle(plain), []
    for text, image in zip(TEXTS, images(len(TEXTS)), strict=True):
        inputs = processor(images=image, text=text, return_tensors="pt")
        answer = theirs.generate(**inputs, max_new_tokens=8, do_sample=False)
        answers.append(answer[0, inputs["input_ids"].shape[1] :].tolist())
    assert answers[1] != answers[4], "the pictures hardly matter"
    return answers


@pytest.mark.parametrize(
    "settings",
    [{}, {"chunk": 7}, {"chunk": 2, "prefix_caching": False}, {"num_blocks": 14}],
    ids=["together", "chunks of 7", "chunks of 2", "a cache too small for all"],
)
def test_the_engine_generates_what_transformers_does(
    plain: Path, catalog: Catalog, expected_tokens: list[list[int]], settings: dict[str, Any]
) -> None:
    common: dict[str, Any] = {"dtype": "float32", "device": "cpu", "block_size": BLOCK_SIZE, "num_blocks": 128}
    sampling = SamplingParams(temperature=0, max_tokens=8)
    with Engine(config=EngineConfig(model=str(plain), **(common | settings)), catalog=catalog) as engine:
        prompts = ask(engine)
        assert [completion.token_ids for completion in engine.generate(prompts, sampling)] == expected_tokens
        again = engine.generate(prompts, sampling)
        assert [completion.token_ids for completion in again] == expected_tokens
        if not settings:
            assert all(completion.num_cached_tokens > 0 for completion in again)
        alone = [engine.generate(prompt, sampling)[0].token_ids for prompt in prompts]
        assert alone == expected_tokens


def test_every_precision_leaves_the_eyes_alone(plain: Path, catalog: Catalog) -> None:
    """Whatever formats are installed, pictures are encoded exactly."""
    expected = load(plain, catalog).encode("image", list(pixels(1)))[0]
    for name in (spec.name for spec in catalog.precisions.values() if not spec.selective):
        model = load_model(plain, catalog, precision=name).model
        assert isinstance(model, Blip2)
        assert torch.equal(model.encode("image", list(pixels(1)))[0], expected), name


def test_a_missing_tensor_is_called_by_its_own_name(plain: Path, tmp_path: Path, catalog: Catalog) -> None:
    weights = {name: tensor for shard in plain.glob("*.safetensors") for name, tensor in load_file(shard).items()}
    (tmp_path / "config.json").write_text((plain / "config.json").read_text())
    for name in (
        "query_tokens",
        "vision_model.embeddings.position_embedding",
        "qformer.encoder.layer.0.crossattention.attention.value.bias",
        "language_projection.weight",
        "language_model.model.decoder.layers.1.fc1.weight",
    ):
        save_file({key: tensor for key, tensor in weights.items() if key != name}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=rf"1 tensors? .*{name}"):
            load_model(tmp_path, catalog)


def test_another_language_half_is_refused_by_name(plain: Path) -> None:
    raw = json.loads((plain / "config.json").read_text())
    with pytest.raises(CheckpointError, match=r"language half of this BLIP-2 is 't5', and .* those with 'opt'"):
        read_config({**raw, "text_config": {"model_type": "t5"}})


def test_settings_that_were_left_out_are_those_of_the_published_checkpoint() -> None:
    """Compared with transformers' defaults, which the publishers' files rely on."""
    read = read_config({"vision_config": {}, "qformer_config": {}, "text_config": {}})
    theirs: Any = transformers.Blip2Config()
    vision, qformer, text = theirs.vision_config, theirs.qformer_config, theirs.text_config
    assert read.vision == VisionConfig(
        hidden_size=vision.hidden_size,
        intermediate_size=vision.intermediate_size,
        num_layers=vision.num_hidden_layers,
        num_heads=vision.num_attention_heads,
        image_size=vision.image_size,
        patch_size=vision.patch_size,
        activation=vision.hidden_act,
        norm_eps=vision.layer_norm_eps,
        qkv_bias=vision.qkv_bias,
    )
    assert read.qformer == QFormerConfig(
        hidden_size=qformer.hidden_size,
        intermediate_size=qformer.intermediate_size,
        num_layers=qformer.num_hidden_layers,
        num_heads=qformer.num_attention_heads,
        activation=qformer.hidden_act,
        norm_eps=qformer.layer_norm_eps,
        cross_every=qformer.cross_attention_frequency,
        picture_size=vision.hidden_size,
        num_queries=theirs.num_query_tokens,
    )
    assert (read.vocab_size, read.max_positions) == (text.vocab_size, text.max_position_embeddings)
    assert {name: getattr(text, name) for name in read.language} == read.language
    assert read.image_token_id is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"image_token_index": VOCABULARY}, "the language half has 307 tokens"),
        ({"vision_config": VISION | {"num_attention_heads": 3}}, "40 hidden features between 3 attention heads"),
        ({"qformer_config": QFORMER | {"num_attention_heads": 5}}, "36 hidden features between 5 attention heads"),
        ({"vision_config": VISION | {"patch_size": 34}}, "patches of 34, which leaves none"),
        ({"vision_config": None}, "has no 'vision_config'"),
        ({"num_query_tokens": 0}, "num_query_tokens = 0"),
    ],
)
def test_bad_configs_are_refused(plain: Path, change: dict[str, Any], words: str) -> None:
    raw = json.loads((plain / "config.json").read_text())
    with pytest.raises(CheckpointError, match=words):
        read_config(raw | change)


def test_without_the_language_half_the_error_says_what_is_needed() -> None:
    with pytest.raises(PluginError, match=f"needs more for {plugin.NAME}: .*OPTForCausalLM"):
        Catalog.load(allow=frozenset({"blip2"})).architecture(plugin.NAME)


def test_the_catalog_lists_what_the_plugin_brings(catalog: Catalog) -> None:
    assert catalog.owner("architectures", plugin.NAME).name == "blip2"
    assert catalog.input_processor(plugin.NAME, "image").build == "plexor_blip2.processor:build"
