"""Trains demo-vision, a small BLIP-2 that describes the pictures which plexor_demo.pictures draws.

    PYTHONPATH=.. python train_vision.py --out CHECKPOINTS/demo-vision --log train_demo_vision.log

Vision encoder, Q-Former and language model are trained together from nothing.
"""

import argparse
import multiprocessing
import random
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Log, Schedule, hardware, name_tokenizer_class, optimizer, settled
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn
from transformers import (
    Blip2Config,
    Blip2ForConditionalGeneration,
    Blip2Processor,
    GenerationConfig,
    OPTConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from plexor_demo.pictures import COLOURS, PLACES, SHAPES, SIZE, TRAINING_SEEDS, draw

START, PAD, END, IMAGE = "<s>", "<pad>", "</s>", "<image>"
START_ID, PAD_ID, END_ID, IMAGE_ID = range(4)
VOCABULARY = 384
QUERIES = 16
MEAN = (0.48145466, 0.4578275, 0.40821073)
DEVIATION = (0.26862954, 0.26130258, 0.27577711)
PROMPTS = (
    "Describe the picture.",
    "Describe this picture.",
    "Describe the image.",
    "Describe this image.",
    "What is in the picture?",
    "What is in this picture?",
    "What is in the image?",
    "What is in this image?",
    "What do you see?",
    "What can you see in this picture?",
    "What does the picture show?",
    "Question: what is in the picture? Answer:",
    "a picture of",
    "Caption:",
)
LONGEST_PROMPT = 24
LONGEST_CAPTION = 40


def make_tokenizer() -> Tokenizer:
    """A byte-level BPE tokenizer learnt from captions and prompts, which puts the start token first."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[AddedToken(token, normalized=False, special=True) for token in (START, PAD, END, IMAGE)],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words = [f" {colour} {shape} {place}, and" for colour in COLOURS for shape in SHAPES for place in PLACES]
    tokenizer.train_from_iterator([*words, *(f"{prompt}\n" for prompt in PROMPTS), "a an"], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A", pair=f"{START} $A $B", special_tokens=[(START, START_ID)]
    )
    return tokenizer


def make_model(vocabulary: int) -> Blip2ForConditionalGeneration:
    """The untrained model; its queries start different from one another."""
    text = OPTConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        word_embed_proj_dim=256,
        num_hidden_layers=4,
        ffn_dim=1024,
        num_attention_heads=8,
        max_position_embeddings=512,
        dropout=0.0,
        bos_token_id=START_ID,
        pad_token_id=PAD_ID,
        eos_token_id=END_ID,
    )
    vision = {
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": 8,
        "initializer_range": 0.02,
    }
    bridge = {
        "vocab_size": vocabulary,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "cross_attention_frequency": 2,
        "encoder_hidden_size": 128,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    config = Blip2Config(
        vision_config=vision,
        qformer_config=bridge,
        text_config=text.to_dict(),
        num_query_tokens=QUERIES,
        image_token_index=IMAGE_ID,
    )
    model = Blip2ForConditionalGeneration(config)
    with torch.no_grad():
        model.query_tokens.normal_(std=1.0)
        model.vision_model.embeddings.position_embedding.normal_(std=0.1)
    return model


def picture(seed: int) -> tuple[np.ndarray, str]:
    """The pixels and the caption of a seed."""
    image, caption = draw(seed)
    return np.asarray(image), caption


def pictures(seeds: range) -> tuple[torch.Tensor, list[str]]:
    """The pixels (channels first) and the captions of many seeds."""
    with multiprocessing.Pool() as pool:
        drawn = pool.map(picture, seeds, chunksize=1000)
    pixels = torch.from_numpy(np.stack([pixels for pixels, _ in drawn])).permute(0, 3, 1, 2).contiguous()
    return pixels, [caption for _, caption in drawn]


def caption_rows(tokenizer: Tokenizer, captions: list[str]) -> torch.Tensor:
    """The captions' tokens, each with its end, padded to one length."""
    rows = torch.full((len(captions), LONGEST_CAPTION), PAD_ID)
    for row, encoding in zip(rows, tokenizer.encode_batch(captions, add_special_tokens=False), strict=True):
        ids = torch.tensor([*encoding.ids, END_ID])
        row[: len(ids)] = ids
    return rows


def prompt_rows(tokenizer: Tokenizer, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts and their lengths: half none at all, then known ones, then arbitrary tokens."""
    chance = random.Random(3)
    rows = torch.full((count, LONGEST_PROMPT), PAD_ID)
    lengths = torch.zeros(count, dtype=torch.long)
    known = [tokenizer.encode(p + tail, add_special_tokens=False).ids for p in PROMPTS for tail in ("", " ", "\n")]
    for index in range(count):
        draw_of = chance.random()
        ids: list[int] = []
        if draw_of > 0.75:
            ids = [chance.randrange(IMAGE_ID + 1, tokenizer.get_vocab_size()) for _ in range(chance.randint(1, 12))]
        elif draw_of > 0.5:
            ids = chance.choice(known)
        lengths[index] = len(ids)
        rows[index, : len(ids)] = torch.tensor(ids, dtype=torch.long)
    return rows, lengths


class Objective(nn.Module):
    """Loss and exactness of the captions that a model gives to pictures."""

    def __init__(self, model: Blip2ForConditionalGeneration) -> None:
        super().__init__()
        self.model = model
        self.register_buffer("mean", torch.tensor(MEAN).view(1, 3, 1, 1))
        self.register_buffer("deviation", torch.tensor(DEVIATION).view(1, 3, 1, 1))

    def forward(
        self, pixels: torch.Tensor, ids: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and for each picture whether every token of its caption is the likeliest."""
        model = self.model
        seen = model.vision_model(pixel_values=(pixels.float() / 255 - self.mean) / self.deviation).last_hidden_state
        queries = model.query_tokens.expand(len(pixels), -1, -1)
        bridged = model.qformer(query_embeds=queries, encoder_hidden_states=seen).last_hidden_state
        prefix = model.language_projection(bridged)
        embedded = torch.cat([prefix, model.get_input_embeddings()(ids).to(prefix.dtype)], dim=1)
        logits = model.language_model(inputs_embeds=embedded, use_cache=False).logits[:, QUERIES:].float()
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        exact = ((logits.argmax(-1) == labels) | (labels == -100)).all(-1)
        return loss, exact


def sequences(
    captions: torch.Tensor, prompts: torch.Tensor, lengths: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Start token, prompt and caption in one row, and the labels: the next token wherever it is the caption's."""
    width = 1 + LONGEST_PROMPT + LONGEST_CAPTION
    place = torch.arange(width, device=captions.device).expand(len(captions), -1)
    inside = place - 1 - lengths[:, None]
    from_prompt = F.pad(prompts, (1, LONGEST_CAPTION), value=START_ID)
    from_caption = captions.gather(1, inside.clamp(0, LONGEST_CAPTION - 1))
    from_caption = torch.where(inside < LONGEST_CAPTION, from_caption, PAD_ID)
    rows = torch.where(inside >= 0, from_caption, from_prompt)
    wanted = torch.where((inside >= 0) & (rows != PAD_ID), rows, -100)
    return rows[:, :-1].contiguous(), wanted[:, 1:].contiguous()


def save(weights: dict[str, torch.Tensor], tokenizer: Tokenizer, out: Path) -> None:
    """Writes the checkpoint: weights in bfloat16, configuration, processor."""
    model = make_model(tokenizer.get_vocab_size())
    model.load_state_dict({key: tensor.cpu() for key, tensor in weights.items()})
    model.to(torch.bfloat16)
    ids = {"bos_token_id": START_ID, "pad_token_id": PAD_ID, "eos_token_id": END_ID}
    model.generation_config = GenerationConfig(**ids, do_sample=False, max_new_tokens=LONGEST_CAPTION)
    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    size = {"height": SIZE, "width": SIZE}
    images = BlipImageProcessorPil(size=size, image_mean=list(MEAN), image_std=list(DEVIATION), do_convert_rgb=True)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START,
        eos_token=END,
        pad_token=PAD,
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )
    Blip2Processor(images, wrapped, num_query_tokens=QUERIES).save_pretrained(out)
    images.save_pretrained(out)
    name_tokenizer_class(out)


def main() -> None:
    """Trains the checkpoint until its time or its pictures are used up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--steps", type=float, default=12_000)
    parser.add_argument("--batch", type=int, default=512)
    parser.add_argument("--rate", type=float, default=1e-3)
    parser.add_argument("--decay", type=float, default=0.05)
    parser.add_argument("--drawn", type=int, default=400_000, help="how many different pictures")
    parser.add_argument("--look", type=int, default=250, help="steps between two measurements on fresh pictures")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()

    log = Log(arguments.log)
    schedule = Schedule(arguments.rate, arguments.seconds, arguments.steps)
    pixels, captions = pictures(range(TRAINING_SEEDS, TRAINING_SEEDS + arguments.drawn))
    fresh_pixels, fresh_captions = pictures(range(arguments.batch))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(2)
    torch.set_float32_matmul_precision("high")
    tokenizer = make_tokenizer()
    pixels, rows = pixels.to(device), caption_rows(tokenizer, captions).to(device)
    fresh_pixels, fresh_rows = fresh_pixels.to(device), caption_rows(tokenizer, fresh_captions).to(device)
    prompts, lengths = (part.to(device) for part in prompt_rows(tokenizer, 20_000))
    nothing = torch.full((len(fresh_rows), LONGEST_PROMPT), PAD_ID, device=device)
    fresh_ids, fresh_labels = sequences(fresh_rows, nothing, torch.zeros_like(nothing[:, 0]))

    model = make_model(tokenizer.get_vocab_size()).to(device)
    objective = Objective(model).to(device)
    step_losses = torch.compile(objective) if arguments.compile else objective
    steps = optimizer(model, arguments.decay, device)
    size = sum(parameter.numel() for parameter in model.parameters())
    log(f"demo-vision: {size} parameters, {len(pixels)} pictures drawn in {schedule.elapsed:.0f} s, {hardware(device)}")
    log(f"batch {arguments.batch}, rate {arguments.rate}, decay {arguments.decay}")

    loss = torch.zeros(())
    step, last = 0, False
    while not last:
        last = schedule.progress >= 1.0
        if step and (step % arguments.look == 0 or last):
            with torch.no_grad(), torch.autocast(device, torch.bfloat16):
                fresh_loss, exact = step_losses(fresh_pixels, fresh_ids, fresh_labels)
            log(
                f"step {step} seconds {schedule.elapsed:.0f} loss {loss.item():.4f} fresh loss {fresh_loss.item():.4f} "
                f"exact {exact.float().mean().item():.4f} pictures/s {step * arguments.batch / schedule.elapsed:.0f}"
            )
            if schedule.progress > 0.3 and step % (4 * arguments.look) == 0:
                save(settled(model), tokenizer, arguments.out)
        rate = schedule.rate()
        for group in steps.param_groups:
            group["lr"] = rate
        chosen = torch.randint(0, len(pixels), (arguments.batch,), device=device)
        asked = torch.randint(0, len(prompts), (arguments.batch,), device=device)
        ids, labels = sequences(rows[chosen], prompts[asked], lengths[asked])
        with torch.autocast(device, torch.bfloat16):
            loss, _ = step_losses(pixels[chosen], ids, labels)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        steps.zero_grad(set_to_none=True)
        step += 1
        schedule.done = step
        if step % 20 == 0 and device == "cuda":
            torch.cuda.synchronize()
    save(settled(model), tokenizer, arguments.out)
    log(f"finished after {schedule.elapsed:.0f} seconds")


if __name__ == "__main__":
    main()
