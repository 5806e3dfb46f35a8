"""Small random checkpoints in Hugging Face layout, made with transformers, for tests that need a whole model."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from string import ascii_lowercase
from types import MappingProxyType
from typing import Any

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn

from plexor.checkpoint.folder import open_folder
from plexor.extension.catalog import Catalog
from plexor.runtime.conversion import Conversion, convert

NO_TOKENS: Mapping[str, int] = MappingProxyType({})
SHARD_BYTES = 300_000
"""Small enough that most test models lie in several files with an index."""


def write_checkpoint(
    folder: Path,
    architecture: str,
    config: transformers.PretrainedConfig,
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    special_tokens: Mapping[str, int] = NO_TOKENS,
) -> Path:
    """A random model of the transformers class `architecture`, with a byte-level tokenizer; returns the folder.

    Every tensor is drawn so that it matters to the logits: norms and biases are not left at one and zero.
    special_tokens: token to id, beside those that the config names as its bos, eos and pad.
    """
    with torch.random.fork_rng(devices=[]):
        model = getattr(transformers, architecture)(config)
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            _fill(name, parameter, id(parameter) in embeddings, generator)
    model.to(dtype).save_pretrained(folder, max_shard_size=SHARD_BYTES)
    write_tokenizer(folder, config, special_tokens)
    return folder


def quantize(
    folder: Path,
    out: Path,
    precision: str,
    catalog: Catalog | None = None,
    *,
    text: str | None = None,
    window: int = 512,
    dense: tuple[str, ...] = (),
) -> Path:
    """What `plexor quantize` writes on a CPU, calibrated if a text is given; returns `out`."""
    job = Conversion(
        folder=open_folder(folder), precision=precision, out=out, device="cpu", text=text, window=window, dense=dense
    )
    convert(job, catalog or Catalog.load())
    return out


def write_tokenizer(
    folder: Path, config: transformers.PretrainedConfig, special_tokens: Mapping[str, int] = NO_TOKENS
) -> None:
    """A byte-level tokenizer with exactly as many tokens as the (text) config has, 260 at least."""
    text = config.get_text_config()
    named = {f"{role}_token": (f"<{role}>", getattr(text, f"{role}_token_id", None)) for role in ("bos", "eos", "pad")}
    special = {token: token_id for token, token_id in named.values() if isinstance(token_id, int)} | {**special_tokens}
    assert text.vocab_size >= 256 + len(special), f"a byte-level vocabulary needs more than {text.vocab_size} tokens"
    free = sorted(set(range(text.vocab_size)) - set(special.values()))
    merges = list(product(ascii_lowercase, ascii_lowercase))[: len(free) - 256]
    tokens = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *(first + second for first, second in merges)]
    vocabulary = dict(zip(tokens, free, strict=True)) | special
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(token, special=True) for token in special])
    roles = {role: token for role, (token, _) in named.items() if token in special}
    fast: Any = transformers.PreTrainedTokenizerFast  # its constructor has no annotations
    fast(tokenizer_object=backend, **roles).save_pretrained(folder)


def _fill(name: str, parameter: Tensor, is_embedding: bool, generator: torch.Generator) -> None:
    """Draw a parameter so that signals neither vanish nor drown one another on their way through the layers."""
    noise = torch.randn(parameter.shape, generator=generator)
    if parameter.dim() == 1:
        values = 0.2 * noise if name.endswith("bias") else 1 + 0.3 * noise
    else:
        values = noise * (2.0 if is_embedding else 1.5) / math.sqrt(parameter.shape[-1])
    parameter.copy_(values)
