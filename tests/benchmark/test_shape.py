"""A folder from a config alone."""

import json
from pathlib import Path

import pytest

from plexor.benchmark.shape import make_tokenizer, shape_folder
from plexor.checkpoint.folder import open_folder
from plexor.checkpoint.tokenizer import load_tokenizer
from plexor.errors import ConfigError


def test_the_folder_has_the_config_and_as_many_tokens(tmp_path: Path) -> None:
    raw = {"architectures": ["AnyForCausalLM"], "vocab_size": 1001, "eos_token_id": 2}
    file = tmp_path / "some-1b.json"
    file.write_text(json.dumps(raw))
    with shape_folder(file) as folder:
        assert folder.name == "some-1b"
        assert open_folder(folder).config == raw
        assert load_tokenizer(folder).vocab_size == 1001
    assert not folder.exists()


def test_the_vocabulary_of_a_text_half_counts(tmp_path: Path) -> None:
    file = tmp_path / "sees.json"
    file.write_text(json.dumps({"vocab_size": 7, "text_config": {"vocab_size": 300}}))
    with shape_folder(file) as folder:
        assert load_tokenizer(folder).vocab_size == 300


def test_every_token_stands_for_text() -> None:
    tokenizer = make_tokenizer(1301)
    words = [tokenizer.decode([token_id]) for token_id in range(256, 1301)]
    assert all(word.startswith(" ") and len(word) > 1 for word in words)
    assert len(set(words)) == 1301 - 256
    assert tokenizer.decode(tokenizer.encode("wörds ").ids) == "wörds "


def test_what_is_no_config_is_refused(tmp_path: Path) -> None:
    with (
        pytest.raises(ConfigError, match=r"is no file: name a config\.json, check the path"),
        shape_folder(tmp_path / "x"),
    ):
        pass
    with pytest.raises(ConfigError, match=rf"perhaps {tmp_path}/config\.json"), shape_folder(tmp_path):
        pass
    file = tmp_path / "small.json"
    file.write_text(json.dumps({"vocab_size": "many"}))
    with pytest.raises(ConfigError, match="states the vocab_size 'many': a benchmark needs"), shape_folder(file):
        pass
