"""The checkpoints that plexor-demo brings."""

from collections.abc import Iterable

from plexor import hookimpl
from plexor.api import Checkpoint

PROMPT = 'def read_lines(path):\n    """'


@hookimpl
def checkpoints() -> Iterable[Checkpoint]:
    """Two text models and one that describes pictures."""
    return (
        Checkpoint(
            name="demo",
            folder="plexor_demo:checkpoints/demo",
            summary="a dense model of 7 million parameters that knows Python's standard library and a simple chat",
            default=True,
            prompt=PROMPT,
        ),
        Checkpoint(
            name="demo-moe",
            folder="plexor_demo:checkpoints/demo-moe",
            summary="a mixture of eight experts, 7 million parameters, trained on the same text",
            prompt=PROMPT,
        ),
        Checkpoint(
            name="demo-vision",
            folder="plexor_demo:checkpoints/demo-vision",
            summary="a BLIP-2 of 6 million parameters that describes drawn shapes",
            sample="plexor_demo.pictures:draw",
        ),
    )
