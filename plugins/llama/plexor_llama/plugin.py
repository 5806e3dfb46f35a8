"""What plexor-llama contributes: seven architectures, named by strings and imported only when one is chosen."""

from __future__ import annotations

from collections.abc import Iterable

from plexor import hookimpl
from plexor.api import Architecture


@hookimpl
def architectures() -> Iterable[Architecture]:
    return (
        _llama("LlamaForCausalLM", "llama"),
        _llama("MistralForCausalLM", "mistral"),
        _llama("Qwen2ForCausalLM", "qwen2"),
        _llama("Qwen3ForCausalLM", "qwen3"),
        _gpt("GPT2LMHeadModel", "gpt2"),
        _gpt("GPTNeoXForCausalLM", "gpt_neox"),
        _gpt("OPTForCausalLM", "opt"),
    )


def _llama(name: str, config: str) -> Architecture:
    """One model and one set of weight rules; configs set the members apart."""
    home = "plexor_llama.llama"
    return Architecture(name=name, config=f"{home}:{config}", model=f"{home}:model", weights=f"{home}:weights")


def _gpt(name: str, module: str) -> Architecture:
    """One model; configs and weight rules set the members apart."""
    home = f"plexor_llama.{module}"
    return Architecture(name=name, config=f"{home}:config", model="plexor_llama.stack:model", weights=f"{home}:weights")
