"""Trains the two text checkpoints, the dense one and the mixture of experts, on the prepared corpus.

    python train_text.py demo --data BUILD --out CHECKPOINTS/demo --log train_demo.log
    python train_text.py demo-moe --data BUILD --out CHECKPOINTS/demo-moe --log train_demo_moe.log

The weights that did best on the held-out files are kept, in bfloat16.
"""

import argparse
import math
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from common import Log, Schedule, hardware, name_tokenizer_class, optimizer, settled
from torch import nn
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedTokenizerFast,
)
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CONTEXT = 2048
BALANCE = 0.01
CHAT_TEMPLATE = Path(__file__).parent / "chat_template.jinja"


def causal_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **unused: object,
) -> tuple[torch.Tensor, None]:
    """Causal attention over whole rows without a mask tensor, which a compiled model would otherwise build."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
    return mixed.transpose(1, 2).contiguous(), None


def no_mask(*unused: object, **unused_by_name: object) -> None:
    """The mask that goes with causal_attention: none."""


def all_experts(
    self: nn.Module, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """The experts' output from plain matrix products over all experts, those not chosen weighted with zero."""
    weights = torch.zeros(hidden_states.shape[0], self.num_experts, device=hidden_states.device, dtype=torch.float32)
    weights = weights.scatter(1, top_k_index, top_k_weights.float())
    both = F.linear(hidden_states, self.gate_up_proj.flatten(0, 1)).unflatten(-1, (self.num_experts, 2, -1))
    inner = self.act_fn(both[:, :, 0]) * both[:, :, 1] * weights.to(both.dtype).unsqueeze(-1)
    down = self.down_proj.permute(1, 0, 2).flatten(1, 2)
    return F.linear(inner.flatten(1, 2), down).to(hidden_states.dtype)


def make_model(name: str) -> nn.Module:
    """The untrained model of a checkpoint."""
    shared = {
        "vocab_size": 4096,
        "hidden_size": 256,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "max_position_embeddings": CONTEXT,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 1,
    }
    if name == "demo":
        return LlamaForCausalLM(LlamaConfig(**shared, intermediate_size=704, num_hidden_layers=8))
    return MixtralForCausalLM(
        MixtralConfig(
            **shared,
            intermediate_size=128,
            num_hidden_layers=6,
            num_local_experts=8,
            num_experts_per_tok=2,
            router_aux_loss_coef=BALANCE,
        )
    )


def scale_residuals(model: nn.Module) -> None:
    """Starts what each layer adds to the residual stream small, the smaller the more layers there are."""
    factor = (2 * model.config.num_hidden_layers) ** -0.5
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "o_proj" in name or "down_proj" in name:
                parameter.mul_(factor)


def add_dropout(model: nn.Module, rate: float) -> None:
    """Drops a part of what each layer adds to the residual stream, while training."""

    def drop(module: nn.Module, inputs: object, output: torch.Tensor | tuple) -> torch.Tensor | tuple:
        if isinstance(output, tuple):
            return (F.dropout(output[0], rate, module.training), *output[1:])
        return F.dropout(output, rate, module.training)

    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


class Objective(nn.Module):
    """Next-token loss of a model and, for a mixture of experts, how unevenly its router chooses."""

    def __init__(self, model: nn.Module, experts: int) -> None:
        super().__init__()
        self.model = model
        self.experts = experts
        self.routed: list[torch.Tensor] = []
        if experts:
            for layer in model.model.layers:
                layer.mlp.gate.register_forward_hook(lambda module, inputs, output: self.routed.append(output[0]))

    def forward(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The two losses of rows of context + 1 tokens."""
        self.routed.clear()
        logits = self.model(input_ids=rows[:, :-1], use_cache=False).logits
        loss = F.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        if not self.experts:
            return loss, torch.zeros_like(loss)
        chances = torch.stack([router.float().softmax(-1) for router in self.routed])
        self.routed.clear()
        chosen = F.one_hot(chances.topk(2, dim=-1).indices, self.experts).float().sum(2)
        uneven = self.experts / 2 * (chosen.mean(1) * chances.mean(1)).sum(-1).mean()
        return loss, uneven


@torch.no_grad()
def held_out_loss(model: nn.Module, tokens: torch.Tensor) -> float:
    """Mean loss per token over the held-out files, in whole rows of the context's length."""
    model.eval()
    total, count = 0.0, 0
    for rows in tokens.unfold(0, CONTEXT + 1, CONTEXT).split(8):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum").item()
        count += rows[:, 1:].numel()
    model.train()
    return total / count


def save(model: nn.Module, weights: dict[str, torch.Tensor], name: str, data: Path, out: Path) -> None:
    """Writes the checkpoint: weights in bfloat16, configuration, tokenizer."""
    plain = make_model(name)
    plain.load_state_dict({key: tensor.cpu() for key, tensor in weights.items()})
    plain.to(torch.bfloat16)
    plain.generation_config = GenerationConfig(bos_token_id=0, eos_token_id=0, pad_token_id=1, do_sample=False)
    out.mkdir(parents=True, exist_ok=True)
    plain.save_pretrained(out)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(data / "tokenizer.json"),
        bos_token="<|endoftext|>",
        eos_token="<|endoftext|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|system|>", "<|user|>", "<|assistant|>"],
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(out)
    name_tokenizer_class(out)
    shutil.copyfile(CHAT_TEMPLATE, out / "chat_template.jinja")


def main() -> None:
    """Trains one checkpoint until its time or its tokens are used up."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=("demo", "demo-moe"))
    parser.add_argument("--data", type=Path, required=True, help="folder that corpus.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--seconds", type=float, default=480)
    parser.add_argument("--tokens", type=float, default=200e6)
    parser.add_argument("--rows", type=int, default=32)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--decay", type=float, default=0.1)
    parser.add_argument("--dropout", type=float, default=0.1)
    parser.add_argument("--look", type=int, default=250, help="steps between two held-out measurements")
    parser.add_argument("--compile", action="store_true")
    arguments = parser.parse_args()

    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(1)
    torch.set_float32_matmul_precision("high")
    log = Log(arguments.log)
    schedule = Schedule(arguments.rate, arguments.seconds, arguments.tokens)
    ALL_ATTENTION_FUNCTIONS.register("causal_rows", causal_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register("causal_rows", no_mask)
    ALL_EXPERTS_FUNCTIONS.register("all_experts", all_experts)

    train = torch.from_numpy(np.load(arguments.data / "train.npy").astype(np.int64)).to(device)
    heldout = torch.from_numpy(np.load(arguments.data / "heldout.npy").astype(np.int64)).to(device)
    starts = (train[: -CONTEXT - 1] == 0).nonzero().flatten()
    model = make_model(arguments.name).to(device)
    experts = getattr(model.config, "num_local_experts", 0)
    model.config._attn_implementation = "causal_rows"
    if experts:
        model.config._experts_implementation = "all_experts"
    scale_residuals(model)
    add_dropout(model, arguments.dropout)
    objective = Objective(model, experts)
    step_losses = torch.compile(objective) if arguments.compile else objective
    steps = optimizer(model, arguments.decay, device)
    size = sum(parameter.numel() for parameter in model.parameters())
    log(f"{arguments.name}: {size} parameters, {len(train)} tokens, {len(heldout)} held-out, {hardware(device)}")
    log(f"rows {arguments.rows}, rate {arguments.rate}, decay {arguments.decay}, dropout {arguments.dropout}")

    loss = uneven = torch.zeros(())
    best, kept, step, last = math.inf, settled(model), 0, False
    while not last:
        last = schedule.progress >= 1.0
        if step and (step % arguments.look == 0 or last):
            with torch.autocast(device, torch.bfloat16):
                found = held_out_loss(model, heldout)
            speed = schedule.done / schedule.elapsed
            log(
                f"step {step} seconds {schedule.elapsed:.0f} tokens {schedule.done / 1e6:.1f}M loss {loss.item():.3f} "
                f"uneven {uneven.item():.3f} held-out {found:.4f} tokens/s {speed:.0f}"
            )
            if found < best:
                best, kept = found, settled(model)
                if schedule.progress > 0.5:
                    save(model, kept, arguments.name, arguments.data, arguments.out)
        rate = schedule.rate()
        for group in steps.param_groups:
            group["lr"] = rate
        anywhere = torch.randint(0, len(train) - CONTEXT - 1, (arguments.rows,), device=device)
        opening = starts[torch.randint(0, len(starts), (arguments.rows,), device=device)]
        offsets = torch.where(torch.rand(arguments.rows, device=device) < 0.25, opening, anywhere)
        rows = train[offsets[:, None] + torch.arange(CONTEXT + 1, device=device)]
        with torch.autocast(device, torch.bfloat16):
            loss, uneven = step_losses(rows)
        (loss + BALANCE * uneven).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        steps.zero_grad(set_to_none=True)
        step += 1
        schedule.done += rows.shape[0] * CONTEXT
        if step % 20 == 0 and device == "cuda":
            torch.cuda.synchronize()
    save(model, kept, arguments.name, arguments.data, arguments.out)
    log(f"kept held-out loss {best:.4f} perplexity {math.exp(best):.3f} after {schedule.elapsed:.0f} seconds")


if __name__ == "__main__":
    main()
