"""What the training scripts share: the schedule over wall-clock time, the log and the optimizer."""

import json
import math
import time
from pathlib import Path

import torch
from torch import nn


class Schedule:
    """A warm-up and a cosine that ends when either the time or the work is used up."""

    def __init__(self, peak: float, seconds: float, work: float, warmup: float = 0.03, floor: float = 0.01) -> None:
        self.peak, self.seconds, self.work = peak, seconds, work
        self.warmup, self.floor = warmup, floor
        self.started = time.monotonic()
        self.done = 0.0

    @property
    def elapsed(self) -> float:
        """Seconds since the schedule was made."""
        return time.monotonic() - self.started

    @property
    def progress(self) -> float:
        """Between 0 and 1: how much of the time or of the work is used."""
        return min(1.0, max(self.elapsed / self.seconds, self.done / self.work))

    def rate(self) -> float:
        """The learning rate now."""
        progress = self.progress
        rise = min(1.0, self.done / self.work / self.warmup) if self.done < self.warmup * self.work else 1.0
        fall = self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * progress))
        return self.peak * max(rise, 0.02) * fall


class Log:
    """Lines that go to the terminal and to a file at once."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.file = path.open("w", encoding="utf-8")

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        self.file.write(line + "\n")
        self.file.flush()


def optimizer(model: nn.Module, decay: float, device: str) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves vectors alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": decay}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.95), fused=device == "cuda")


def hardware(device: str) -> str:
    """What the training runs on, in words."""
    return f"one {torch.cuda.get_device_name()}" if device == "cuda" else "a CPU"


def settled(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's weights as they are now."""
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


def name_tokenizer_class(folder: Path) -> None:
    """Writes the tokenizer's settings in the words that transformers 4 knows too, not only transformers 5."""
    path = folder / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if "extra_special_tokens" in settings:
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
