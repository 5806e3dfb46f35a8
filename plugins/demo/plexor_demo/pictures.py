"""Draws the pictures that demo-vision was trained to describe, each with its caption."""

import random

from PIL import Image, ImageDraw

SIZE = 64
FINE = 4
CELL = SIZE * FINE // 3
TRAINING_SEEDS = 1_000_000
"""Training used the seeds from this one on: pictures of smaller seeds are fresh."""

COLOURS = {
    "red": (214, 40, 40),
    "green": (38, 150, 62),
    "blue": (42, 84, 214),
    "yellow": (244, 212, 40),
    "purple": (140, 50, 180),
    "orange": (244, 132, 24),
    "white": (250, 250, 250),
    "black": (14, 14, 14),
}
SHAPES = ("circle", "square", "triangle", "diamond", "cross")
PLACES = (
    "at the top left",
    "at the top",
    "at the top right",
    "on the left",
    "in the centre",
    "on the right",
    "at the bottom left",
    "at the bottom",
    "at the bottom right",
)


def outline(shape: str, x: float, y: float, reach: float) -> list[tuple[float, float]]:
    """The corners of a shape around a centre."""
    if shape == "square":
        side = reach * 0.88
        return [(x - side, y - side), (x + side, y - side), (x + side, y + side), (x - side, y + side)]
    if shape == "triangle":
        return [(x, y - reach), (x + reach, y + reach * 0.85), (x - reach, y + reach * 0.85)]
    if shape == "diamond":
        return [(x, y - reach), (x + reach, y), (x, y + reach), (x - reach, y)]
    arm = reach * 0.34
    corners = [(-arm, -reach), (arm, -reach), (arm, -arm), (reach, -arm), (reach, arm), (arm, arm)]
    corners += [(arm, reach), (-arm, reach), (-arm, arm), (-reach, arm), (-reach, -arm), (-arm, -arm)]
    return [(x + right, y + down) for right, down in corners]


def sentence(parts: list[str]) -> str:
    """The parts as one enumeration."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def draw(seed: int = 0) -> tuple[Image.Image, str]:
    """The picture of a seed and its caption: one to three shapes, named in reading order."""
    chance = random.Random(seed)
    grey = chance.randint(110, 190)
    ground = tuple(grey + chance.randint(-10, 10) for _ in range(3))
    picture = Image.new("RGB", (SIZE * FINE, SIZE * FINE), ground)
    pen = ImageDraw.Draw(picture)
    parts: list[str] = []
    for place in sorted(chance.sample(range(9), chance.randint(1, 3))):
        colour, shape = chance.choice(list(COLOURS)), chance.choice(SHAPES)
        reach = chance.uniform(0.32, 0.42) * CELL
        room = CELL * 0.46 - reach
        x = (place % 3 + 0.5) * CELL + chance.uniform(-room, room)
        y = (place // 3 + 0.5) * CELL + chance.uniform(-room, room)
        fill = tuple(max(0, min(255, part + chance.randint(-8, 8))) for part in COLOURS[colour])
        if shape == "circle":
            pen.ellipse((x - reach, y - reach, x + reach, y + reach), fill=fill)
        else:
            pen.polygon(outline(shape, x, y, reach), fill=fill)
        article = "an" if colour[0] in "aeiou" else "a"
        parts.append(f"{article} {colour} {shape} {PLACES[place]}")
    return picture.reduce(FINE), sentence(parts)
