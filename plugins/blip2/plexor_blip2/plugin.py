"""What plexor-blip2 contributes: one architecture and its image processor, imported only when they are chosen."""

from __future__ import annotations

from collections.abc import Iterable

from plexor import hookimpl
from plexor.api import Architecture, InputProcessor

NAME = "Blip2ForConditionalGeneration"


@hookimpl
def architectures() -> Iterable[Architecture]:
    return (
        Architecture(
            name=NAME,
            config="plexor_blip2.config:config",
            model="plexor_blip2.architecture:model",
            weights="plexor_blip2.architecture:weights",
            needs=("architectures:OPTForCausalLM",),
        ),
    )


@hookimpl
def input_processors() -> Iterable[InputProcessor]:
    return (InputProcessor(architecture=NAME, kind="image", build="plexor_blip2.processor:build"),)
