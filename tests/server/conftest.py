"""A real `plexor serve` over a tiny random checkpoint, one for all tests that do not end it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from transformers import LlamaConfig

from plexor.testing.checkpoints import write_checkpoint
from plexor.testing.server import RunningServer, start_server

KEY = "first-key"
TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}]{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A context long enough for answers that are under way while a test looks at them; and a chat template."""
    config = LlamaConfig(
        vocab_size=301,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=8192,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    folder = write_checkpoint(tmp_path_factory.mktemp("served") / "tiny", "LlamaForCausalLM", config, seed=5)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


@pytest.fixture(scope="session")
def server(tiny: Path) -> Iterator[RunningServer]:
    """Runs four answers at once, lets eight wait, and takes two keys."""
    sizes = ("--max-sequences", "4", "--max-waiting", "8", "--num-blocks", "1024", "--max-body", "1")
    server = start_server(str(tiny), *sizes, "--api-key", KEY, "--api-key", "second-key", plugins="llama", key=KEY)
    try:
        yield server
    finally:
        assert server.end() == 0, "".join(server.log)


@pytest.fixture
def client(server: RunningServer) -> openai.OpenAI:
    """The official client."""
    return server.openai
