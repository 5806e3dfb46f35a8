"""Tokenizers from a folder: ids equal to those of transformers, templates found, damage and mismatch named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from plexor.checkpoint.tokenizer import Tokenizer, load_tokenizer
from plexor.errors import CheckpointError, RequestError

TEXTS = ["the cat sat on the mat", "a Ünïcode 猫 🐈 line\n", "def f(x):\n    return x"]
HELLO = [{"role": "user", "content": "the cat"}]


def byte_backend() -> Backend:
    """Byte-level BPE over a few sentences, with a begin token that a template puts in front."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXTS * 4, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return backend


def word_backend() -> Backend:
    """Whole words with spaces as in SentencePiece, without a token for unknown ones."""
    words = {"</s>": 0, "▁the": 1, "▁cat": 2, "s": 3}
    backend = Backend(models.WordLevel(words, unk_token="<missing>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    return backend


def tokenizer_folder(folder: Path, backend: Backend | None = None, config: Any = None) -> Path:
    (backend or byte_backend()).save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(named | (config or {})))
    return folder


def peer_of(folder: Path) -> Any:
    transformers = pytest.importorskip("transformers")
    return transformers.PreTrainedTokenizerFast.from_pretrained(str(folder), local_files_only=True)


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return load_tokenizer(tokenizer_folder(tmp_path_factory.mktemp("tokenizer")))


@settings(max_examples=200, deadline=None)
@given(text=st.text())
def test_any_text_comes_back(loaded: Tokenizer, text: str) -> None:
    text = text.replace("<s>", "").replace("</s>", "")
    assert loaded.decode(loaded.encode(text)) == text


def test_special_tokens_around_and_inside(loaded: Tokenizer) -> None:
    plain = loaded.encode("the cat", add_special_tokens=False)
    assert loaded.encode("the cat") == [0, *plain]
    assert loaded.encode("<s>the cat</s>", add_special_tokens=False) == [0, *plain, 1]
    assert loaded.decode([0, *plain, 1]) == "the cat"
    assert loaded.decode([0, *plain, 1], skip_special_tokens=False) == "<s>the cat</s>"
    assert (loaded.bos_id, loaded.eos_id) == (0, 1)
    assert loaded.special_ids == {0, 1}


def test_ids_equal_those_of_transformers(tmp_path: Path) -> None:
    added = {
        "300": {"content": "<tool>", "special": False, "normalized": False},
        "301": {"content": "<end>", "special": True, "normalized": False, "lstrip": True},
    }
    config = {"added_tokens_decoder": added, "pad_token": "<end>"}
    ours, peer = load_tokenizer(tokenizer_folder(tmp_path, config=config)), peer_of(tmp_path)
    for text in [*TEXTS, "<tool> x <end>y", "  <end>", "</s><s>", "<tool", ""]:
        ids = ours.encode(text)
        assert ids == peer.encode(text)
        assert ours.encode(text, add_special_tokens=False) == peer.encode(text, add_special_tokens=False)
        assert ours.decode(ids) == peer.decode(ids, skip_special_tokens=True)
        assert ours.decode(ids, skip_special_tokens=False) == peer.decode(ids)
    assert ours.special_ids == set(peer.all_special_ids)
    assert ours.named_tokens == peer.special_tokens_map
    assert ours.vocab_size == len(peer) == 302


def test_named_token_that_the_vocabulary_holds_as_an_ordinary_one(tmp_path: Path) -> None:
    ours = load_tokenizer(tokenizer_folder(tmp_path, word_backend()))
    peer = peer_of(tmp_path)
    assert ours.special_ids == {0}
    assert ours.decode([1, 0]) == peer.decode([1, 0], skip_special_tokens=True) == "the"


def test_named_token_without_an_id_adds_none(tmp_path: Path) -> None:
    ours = load_tokenizer(tokenizer_folder(tmp_path, word_backend(), {"pad_token": "<pad>"}))
    assert ours.named_tokens["pad_token"] == "<pad>"
    assert ours.vocab_size == 4
    assert ours.bos_id is None


def test_older_map_of_special_tokens(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "special_tokens_map.json").write_text('{"eos_token": {"content": "</s>", "lstrip": false}}')
    ours = load_tokenizer(tmp_path)
    assert (ours.bos_id, ours.eos_id) == (None, 1)


def test_limits_of_the_training_run_do_not_cut_prompts(tmp_path: Path) -> None:
    backend = byte_backend()
    backend.enable_truncation(max_length=4)
    backend.enable_padding(length=64)
    ours = load_tokenizer(tokenizer_folder(tmp_path, backend))
    assert ours.decode(ours.encode(TEXTS[0])) == TEXTS[0]
    assert len(ours.encode("a")) == 2


def test_lone_surrogate_names_the_field(loaded: Tokenizer) -> None:
    with pytest.raises(RequestError, match=r"U\+D800 at character 2") as caught:
        loaded.encode("ab\ud800")
    assert caught.value.field == "prompt"


def test_text_that_the_vocabulary_lacks_names_the_field(tmp_path: Path) -> None:
    ours = load_tokenizer(tokenizer_folder(tmp_path, word_backend()))
    with pytest.raises(RequestError, match="cannot be put into tokens") as caught:
        ours.encode("dog")
    assert caught.value.field == "prompt"


@pytest.mark.parametrize("wrong", [-1, 2**40])
def test_id_that_cannot_be_one(loaded: Tokenizer, wrong: int) -> None:
    with pytest.raises(RequestError, match="between 0 and 299"):
        loaded.decode([wrong])


def test_text_of_a_token_keeps_its_space(loaded: Tokenizer, tmp_path: Path) -> None:
    words = load_tokenizer(tokenizer_folder(tmp_path, word_backend()))
    assert words.decode([2]) == "cat"
    assert words.token_text(2) == " cat"
    assert [loaded.token_text(token_id) for token_id in loaded.encode("the cat")] == ["<s>", "the", " cat"]
    assert {loaded.token_text(token_id) for token_id in loaded.encode("ÿ", add_special_tokens=False)} == {"\ufffd"}


def test_vocabulary_must_fit_the_model(loaded: Tokenizer) -> None:
    loaded.check_vocabulary(300)
    loaded.check_vocabulary(320)
    with pytest.raises(CheckpointError, match=r"with id 299, but the model's vocabulary has 299 entries"):
        loaded.check_vocabulary(299)


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"\xff\xfe", b'{"model": {"type": "Nope"}}', b'{"version": "1.0", "model": 3}']
)
def test_damaged_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "tokenizer.json"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match="is no tokenizer that can be read") as caught:
        load_tokenizer(tmp_path)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"auto_map": {"AutoTokenizer": ["tokenization_x.X", None]}}, '"auto_map"'),
        ({"eos_token": 3}, "sets eos_token to '3'"),
        ({"eos_token": {"text": "</s>"}}, "sets eos_token"),
        ({"added_tokens_decoder": {"7": {"content": "<tool>"}}}, "gives token '<tool>' the id 7"),
        ({"added_tokens_decoder": {"x": {"content": "<tool>"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"300": {"colour": "red"}}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"300": "<tool>"}}, "added_tokens_decoder"),
        ({"added_tokens_decoder": {"300": {"content": "<tool>", "special": 1}}}, "token 300 has a flag"),
        ({"added_tokens_decoder": ["<tool>"]}, "added_tokens_decoder"),
        ({"chat_template": 3}, "chat_template that is no text"),
        ({"chat_template": [{"name": "tools", "template": "x"}]}, "'tools' but no \"default\""),
    ],
)
def test_wrong_configuration_is_named(tmp_path: Path, config: dict[str, Any], reason: str) -> None:
    tokenizer_folder(tmp_path, config=config)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path / "tokenizer_config.json") in str(caught.value)
    assert reason in str(caught.value)


def test_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"has no tokenizer\.json, nor any older"):
        load_tokenizer(tmp_path)


def test_older_files_are_converted(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    byte_backend().model.save(str(tmp_path))  # vocab.json and merges.txt
    config = {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "</s>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": "{{ eos_token }}"}))
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    ours = load_tokenizer(tmp_path)
    assert [ours.decode(ours.encode(text)) for text in TEXTS] == TEXTS
    assert (ours.bos_id, ours.eos_id) == (0, 1)
    assert ours.render_chat(HELLO) == "</s>"


def test_older_files_that_are_damaged(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    (tmp_path / "tokenizer.model").write_bytes(b"not a model")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(CheckpointError, match="cannot be converted") as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_chat_template_is_found_where_it_stands(tmp_path: Path) -> None:
    def rendered() -> str:
        return load_tokenizer(tmp_path).render_chat(HELLO)

    tokenizer_folder(tmp_path, config={"chat_template": "configuration {{ bos_token }}"})
    assert rendered() == "configuration <s>"
    several = [{"name": "tools", "template": "wrong"}, {"name": "default", "template": "default {{ eos_token }}"}]
    tokenizer_folder(tmp_path, config={"chat_template": several})
    assert rendered() == "default </s>"
    (tmp_path / "chat_template.json").write_text('{"chat_template": "processor"}')
    assert rendered() == "processor"
    (tmp_path / "chat_template.jinja").write_text("own {{ messages[0].content }} {{ add_generation_prompt }}")
    assert rendered() == "own the cat True"
    assert load_tokenizer(tmp_path).render_chat(HELLO, add_generation_prompt=False) == "own the cat False"


def test_no_chat_template_says_what_to_do(loaded: Tokenizer) -> None:
    assert not loaded.has_chat_template
    with pytest.raises(RequestError, match=r"plain prompt instead, or put a chat_template\.jinja") as caught:
        loaded.render_chat(HELLO)
    assert caught.value.field == "messages"


def test_broken_template_leaves_plain_prompts_alone(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path, config={"chat_template": "{% for"})
    ours = load_tokenizer(tmp_path)
    assert ours.has_chat_template
    assert ours.decode(ours.encode("the cat")) == "the cat"
    with pytest.raises(RequestError, match="not valid Jinja"):
        ours.render_chat(HELLO)


def test_rendered_chat_has_one_begin_token(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path, config={"chat_template": "{{ bos_token }}{{ messages[0].content }}"})
    ours = load_tokenizer(tmp_path)
    peer = peer_of(tmp_path)
    ids = ours.encode(ours.render_chat(HELLO), add_special_tokens=False)
    assert ids == peer.apply_chat_template(HELLO, return_dict=False, add_generation_prompt=True)
    assert ids.count(0) == 1


def test_template_that_is_no_text(tmp_path: Path) -> None:
    tokenizer_folder(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"chat_template\.jinja is not UTF-8"):
        load_tokenizer(tmp_path)


def test_special_flag_of_the_configuration_counts(tmp_path: Path) -> None:
    backend = byte_backend()
    backend.add_tokens([AddedToken("<think>", normalized=False)])
    added = {"300": {"content": "<think>", "special": True, "normalized": False}}
    ours = load_tokenizer(tokenizer_folder(tmp_path, backend, {"added_tokens_decoder": added}))
    assert 300 in ours.special_ids
    assert ours.decode([300]) == ""
