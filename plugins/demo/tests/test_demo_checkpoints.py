"""Holds the shipped checkpoints to what transformers makes of them: loading, held-out loss, endings and captions."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F

transformers = pytest.importorskip("transformers")

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "plexor_demo" / "checkpoints"
NAMES = ("demo", "demo-moe", "demo-vision")
LIMIT = 16 * 2**20
ROW = 512


def module_of(name: str) -> ModuleType:
    """A module of plexor_demo, loaded from its file whether or not the distribution is installed."""
    spec = importlib.util.spec_from_file_location(f"demo_{name}", ROOT / "plexor_demo" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures() -> ModuleType:
    """The drawing module."""
    return module_of("pictures")


@pytest.fixture(scope="module")
def text_model() -> Callable[[str], tuple[Any, Any]]:
    """Loads tokenizer and model of a text checkpoint in float32, from the folder alone."""

    def load(name: str) -> tuple[Any, Any]:
        folder = CHECKPOINTS / name
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
        return tokenizer, model.eval()

    return load


def test_the_plugin_declares_every_checkpoint_once_and_one_default() -> None:
    declared = tuple(module_of("plugin").checkpoints())
    assert [checkpoint.name for checkpoint in declared] == list(NAMES)
    assert [checkpoint.name for checkpoint in declared if checkpoint.default] == ["demo"]
    for checkpoint in declared:
        package, _, folder = checkpoint.folder.partition(":")
        assert (ROOT / package / folder / "config.json").is_file()


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_stays_below_its_size(name: str) -> None:
    files = [path for path in (CHECKPOINTS / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= LIMIT


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("demo", "LlamaForCausalLM"),
        ("demo-moe", "MixtralForCausalLM"),
        ("demo-vision", "Blip2ForConditionalGeneration"),
    ],
)
def test_every_weight_is_in_the_file_and_none_besides(name: str, architecture: str) -> None:
    model, report = getattr(transformers, architecture).from_pretrained(
        CHECKPOINTS / name, local_files_only=True, output_loading_info=True
    )
    assert type(model).__name__ == architecture
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert not report["mismatched_keys"]
    assert 5e6 <= sum(parameter.numel() for parameter in model.parameters()) <= 8e6
    assert model.generation_config.do_sample is False
    assert model.generation_config.eos_token_id is not None
    assert model.generation_config.pad_token_id is not None


@pytest.mark.parametrize("text", ["def f(x):\n\treturn x\r\n", "é ☃ 漢字 🐍 \x00\x7f", " " * 50, ""])
def test_the_tokenizer_brings_back_every_text(text: str) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINTS / "demo", local_files_only=True)
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 4096


@pytest.mark.parametrize(("name", "bound"), [("demo", 2.75), ("demo-moe", 2.7)])
def test_held_out_text_is_predicted(name: str, bound: float, text_model: Callable[[str], tuple[Any, Any]]) -> None:
    tokenizer, model = text_model(name)
    text = (ROOT / "heldout.txt").read_text(encoding="utf-8")
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    losses = []
    with torch.no_grad():
        for row in ids.unfold(0, ROW + 1, ROW)[::18]:
            losses.append(F.cross_entropy(model(input_ids=row[None, :-1]).logits[0], row[1:]).item())
    assert len(losses) == 6
    assert sum(losses) / len(losses) < bound


@pytest.mark.parametrize("name", ["demo", "demo-moe"])
def test_an_answer_ends_by_itself(name: str, text_model: Callable[[str], tuple[Any, Any]]) -> None:
    tokenizer, model = text_model(name)
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What does textwrap.dedent do?"}], tokenize=False, add_generation_prompt=True
    )
    assert chat == "<|user|>What does textwrap.dedent do?<|assistant|>"
    inputs = tokenizer(chat, return_tensors="pt")
    written = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=60)
    answer = tokenizer.decode(written[0, inputs.input_ids.shape[1] :])
    assert answer == "Remove any common leading whitespace from every line in *text*.<|endoftext|>"


def test_the_chat_template_takes_content_in_parts_and_system_texts() -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(CHECKPOINTS / "demo", local_files_only=True)
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": "Bye"},
    ]
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) == (
        "<|system|>Be brief.<|user|>Hello<|assistant|>Hi.<|endoftext|><|user|>Bye<|assistant|>"
    )


def test_a_seed_always_gives_the_same_picture(pictures: ModuleType) -> None:
    first, caption = pictures.draw(7)
    again, caption_again = pictures.draw(7)
    assert (first.mode, first.size) == ("RGB", (64, 64))
    assert first.tobytes() == again.tobytes()
    assert caption == caption_again
    assert first.tobytes() != pictures.draw(8)[0].tobytes()


def test_captions_of_fresh_pictures_are_right(pictures: ModuleType) -> None:
    folder = CHECKPOINTS / "demo-vision"
    processor = transformers.Blip2Processor.from_pretrained(folder, local_files_only=True)
    model = transformers.Blip2ForConditionalGeneration.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True
    ).eval()
    drawn = [pictures.draw(seed) for seed in range(20_000, 20_020)]
    assert max(range(20_000, 20_020)) < pictures.TRAINING_SEEDS
    inputs = processor(images=[image for image, _ in drawn], text=[""] * len(drawn), return_tensors="pt")
    assert model.config.image_token_index == processor.tokenizer.convert_tokens_to_ids("<image>")
    assert (inputs.input_ids == model.config.image_token_index).sum(1).tolist() == [model.config.num_query_tokens] * 20
    written = model.generate(**inputs, generation_config=model.generation_config)
    captions = processor.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    right = sum(caption == expected for caption, (_, expected) in zip(captions, drawn, strict=True))
    assert right >= 18
