"""Measures the finished checkpoints through transformers on a CPU, in float32.

    PYTHONPATH=.. python evaluate.py demo demo-moe --log evaluate_text.log [--data BUILD]
    PYTHONPATH=.. python evaluate.py demo-vision --log evaluate_vision.log [--pictures 1000]

Text: loss, perplexity and bits per byte on heldout.txt and, where the corpus is
at hand, on all held-out files. Pictures: how many captions of fresh pictures are
right from the first letter to the last.
"""

import argparse
import json
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Log
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Blip2ForConditionalGeneration, Blip2Processor

from plexor_demo.pictures import draw

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "plexor_demo" / "checkpoints"
TEXTS = (
    'class Stack:\n    """A stack of',
    "import os\n\ndef read_file(path):\n",
    "The :func:`open` function",
)
QUESTIONS = (
    "Hello!",
    "Who are you?",
    "What does textwrap.dedent do?",
    "What does bisect.bisect_left do?",
    "What is the json module for?",
)


@torch.no_grad()
def total_loss(model: nn.Module, ids: list[int]) -> float:
    """Summed loss of all ids but the first, in rows of the model's context, each row on its own."""
    context = model.config.max_position_embeddings
    total = 0.0
    for start in range(0, len(ids) - 1, context):
        row = torch.tensor(ids[start : start + context + 1])
        logits = model(input_ids=row[None, :-1]).logits[0].float()
        total += F.cross_entropy(logits, row[1:], reduction="sum").item()
    return total


def text_report(name: str, data: Path | None, log: Log) -> None:
    """Logs what a text checkpoint loses on held-out text, and what it writes."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINTS / name)
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINTS / name, dtype=torch.float32).eval()
    log(f"{name}: {sum(parameter.numel() for parameter in model.parameters())} parameters")
    text = (ROOT / "heldout.txt").read_text(encoding="utf-8")
    cases = [("heldout.txt", [0, *tokenizer(text).input_ids], len(text.encode()))]
    if data is not None:
        size = json.loads((data / "corpus.json").read_text(encoding="utf-8"))["heldout_bytes"]
        cases.append(("all held-out files", np.load(data / "heldout.npy").tolist(), size))
    for title, ids, size in cases:
        loss = total_loss(model, ids)
        mean = loss / (len(ids) - 1)
        bits = loss / math.log(2) / size
        log(f"  {title}: {len(ids) - 1} tokens, {size} bytes, loss {mean:.4f}, perplexity {math.exp(mean):.3f}, "
            f"bits per byte {bits:.4f}")  # fmt: skip
    for prompt in TEXTS:
        inputs = tokenizer(prompt, return_tensors="pt")
        written = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=60)
        log(f"  {prompt!r} -> {tokenizer.decode(written[0, inputs.input_ids.shape[1] :])!r}")
    for question in QUESTIONS:
        chat = tokenizer.apply_chat_template([{"role": "user", "content": question}], tokenize=False,
                                             add_generation_prompt=True)  # fmt: skip
        inputs = tokenizer(chat, return_tensors="pt")
        written = model.generate(inputs.input_ids, attention_mask=inputs.attention_mask, max_new_tokens=100)
        log(f"  {question!r} -> {tokenizer.decode(written[0, inputs.input_ids.shape[1] :])!r}")


@torch.no_grad()
def picture_report(count: int, dtype: torch.dtype, prompt: str, log: Log) -> None:
    """Logs how many of the first fresh pictures get exactly their caption."""
    folder = CHECKPOINTS / "demo-vision"
    processor = Blip2Processor.from_pretrained(folder)
    model = Blip2ForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    right = 0
    for start in range(0, count, 50):
        drawn = [draw(seed) for seed in range(start, min(start + 50, count))]
        inputs = processor(images=[image for image, _ in drawn], text=[prompt] * len(drawn), return_tensors="pt")
        written = model.generate(**inputs.to(dtype), generation_config=model.generation_config)
        captions = processor.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
        right += sum(caption == expected for caption, (_, expected) in zip(captions, drawn, strict=True))
    parameters = sum(parameter.numel() for parameter in model.parameters())
    log(f"demo-vision: {parameters} parameters, {dtype}, prompt {prompt!r}: {right} of {count} captions exact")


def main() -> None:
    """Measures the named checkpoints and writes the log."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="+", choices=("demo", "demo-moe", "demo-vision"))
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--data", type=Path, help="folder that corpus.py wrote")
    parser.add_argument("--pictures", type=int, default=1000)
    arguments = parser.parse_args()
    log = Log(arguments.log)
    log(f"torch {torch.__version__} on a CPU, float32 unless said otherwise")
    for name in arguments.names:
        if name != "demo-vision":
            text_report(name, arguments.data, log)
            continue
        picture_report(arguments.pictures, torch.float32, "", log)
        for prompt in ("What is in this image?\n", "Please tell me what you see here:"):
            picture_report(arguments.pictures // 5, torch.float32, prompt, log)
        picture_report(arguments.pictures // 5, torch.bfloat16, "", log)


if __name__ == "__main__":
    main()
