"""A tiny random checkpoint for tests of the engine: which architecture it is does not matter to them."""

from pathlib import Path

import pytest
from transformers import LlamaConfig

from plexor.testing.checkpoints import write_checkpoint


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Odd shapes: head size 24, four query heads to a KV head, fewer KV heads than four ranks, vocabulary 301."""
    config = LlamaConfig(
        vocab_size=301,
        hidden_size=40,
        intermediate_size=52,
        num_hidden_layers=2,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=24,
        max_position_embeddings=128,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    return write_checkpoint(tmp_path_factory.mktemp("tiny") / "model", "LlamaForCausalLM", config, seed=3)
