"""A folder that can be run with random weights, made from nothing but a published `config.json`."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from string import ascii_lowercase

from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from plexor.checkpoint.document import read_object
from plexor.checkpoint.folder import CONFIG_FILE
from plexor.checkpoint.tokenizer import TOKENIZER_FILE
from plexor.errors import ConfigError

BYTES = 256


@contextmanager
def shape_folder(file: Path) -> Iterator[Path]:
    """A temporary folder with the config and a tokenizer of as many tokens as it states; ConfigError if it cannot be.

    Every token stands for text, so turning ids into text takes the time that it takes with a real vocabulary.
    """
    if not file.is_file():
        hint = f"perhaps {file / CONFIG_FILE}" if file.is_dir() else "check the path"
        raise ConfigError(f"--shape {file} is no file: name a config.json, {hint}")
    raw = read_object(file)
    text = raw.get("text_config")
    size = (text if isinstance(text, dict) else raw).get("vocab_size")
    if type(size) is not int or size < BYTES:
        raise ConfigError(
            f"{file} states the vocab_size {size!r}: a benchmark needs a whole number of at least {BYTES}"
        )
    with tempfile.TemporaryDirectory(prefix="plexor-bench-") as temporary:
        folder = Path(temporary) / file.stem
        folder.mkdir()
        (folder / CONFIG_FILE).write_text(json.dumps(raw), encoding="utf-8")
        make_tokenizer(size).save(str(folder / TOKENIZER_FILE))
        yield folder


def make_tokenizer(vocab_size: int) -> Tokenizer:
    """Byte level: 256 bytes, then made-up words with a space in front, up to vocab_size tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    space = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(" ")[0][0]
    tokens = itertools.chain(alphabet, (space + word for word in _words()))
    vocabulary = {token: token_id for token_id, token in enumerate(itertools.islice(tokens, vocab_size))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _words() -> Iterator[str]:
    """a, b, ..., z, aa, ab, ..."""
    for length in itertools.count(1):
        for letters in itertools.product(ascii_lowercase, repeat=length):
            yield "".join(letters)
