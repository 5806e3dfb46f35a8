"""What plexor-llama contributes: seven architectures, named by strings and imported only when one is chosen."""

from __future__ import annotations

from collections.abc import Iterable

from plexor import hookimpl
from plexor.api import Architecture


@hookimpl
def architectures() -> Iterable[Architecture]:
    return (
        _architecture("LlamaForCausalLM", "llama", "llama"),
        _architecture("MistralForCausalLM", "llama", "mistral"),
        _architecture("Qwen2ForCausalLM", "llama", "qwen2"),
        _architecture("Qwen3ForCausalLM", "llama", "qwen3"),
        _architecture("GPT2LMHeadModel", "gpt2", "config"),
        _architecture("GPTNeoXForCausalLM", "gpt_neox", "config"),
        _architecture("OPTForCausalLM", "opt", "config"),
    )


def _architecture(name: str, module: str, config: str) -> Architecture:
    home = f"plexor_llama.{module}"
    return Architecture(name=name, config=f"{home}:{config}", model=f"{home}:model", weights=f"{home}:weights")
