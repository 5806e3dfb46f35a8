"""Orthogonal matrices folded into a model's weights, so that no feature stands out: what is rounded then is rounder.

QuaRot (Ashkboos et al., 2024, arXiv 2404.00456), as far as it costs nothing at run time. A root mean square norm
without its gain does not see a rotation of its input, so the whole residual stream may be kept as x Q:

    embedding E Q   ->   norm, its gain g folded into what reads it:   W diag(g) Q   ->   what adds to x:   Qᵀ W, b Q
    head E' diag(g) Q                                                                     of queries, keys, gate, up ...

A second matrix turns the values of each head: rows of the value projection by Rᵀ, columns of the output projection
by R.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from plexor.api import (
    Attention,
    Build,
    ConfigError,
    Decoder,
    DecoderLayer,
    DenseFormat,
    GroupedLinear,
    Linear,
    RMSNorm,
    VocabEmbedding,
)

PROBES = 8
"""Rows that are sent through a feed-forward layer to see which of its products read them."""


@torch.no_grad()
def rotate(model: nn.Module, build: Build, seed: int = 0) -> None:
    """Rotate the model's decoder in place: its logits stay as they are but for float's rounding.

    The model is dense and of one rank. Gains of the norms of its layers and before its head become one; a head that was
    the embedding itself becomes a table of its own. ConfigError for an architecture that a rotation would change.
    """
    rotation = Rotation(model, build, seed)
    for index in range(rotation.num_layers):
        rotation.turn_layer(index)
    rotation.turn_tables()


class Rotation:
    """A decoder's rotation in parts, for those who hold one layer at a time: each is turned once, in any order.

    A model that is refused is refused here, before anything is changed.
    """

    def __init__(self, model: nn.Module, build: Build, seed: int = 0) -> None:
        self._decoder = _decoder(model, build)
        self._build = build
        self._seed = seed
        hidden = self._decoder.embedding.weight.shape[1]
        self._turn = orthogonal(hidden, torch.Generator().manual_seed(seed)).to(build.device)

    @property
    def num_layers(self) -> int:
        return len(self._decoder.layers)

    def turn_tables(self) -> None:
        """Embedding, learned positions, head, and the norm before it."""
        _turn_tables(self._decoder, self._build, self._turn)

    def turn_layer(self, index: int) -> None:
        """A layer whose weights are there."""
        layer = self._decoder.layers[index]
        assert isinstance(layer, DecoderLayer)
        readers, writers = _feed_forward_products(layer, len(self._turn))
        _turn_inputs(layer.attention.qkv, _gain(layer.attention_norm), self._turn)
        _turn_outputs(layer.attention.out, self._turn)
        for reader in readers:
            _turn_inputs(reader, _gain(layer.feed_forward_norm), self._turn)
        for writer in writers:
            _turn_outputs(writer, self._turn)
        _turn_values(layer.attention, torch.Generator().manual_seed(self._seed + 1 + index))
        for norm in (layer.attention_norm, layer.feed_forward_norm):
            _gain(norm).fill_(1)


def orthogonal(size: int, generator: torch.Generator) -> Tensor:
    """A random orthogonal matrix, float64 [size, size]: a Hadamard matrix with random signs where one is known."""
    known = hadamard(size)
    if known is None:
        drawn = torch.randn(size, size, dtype=torch.float64, generator=generator)
        found: Tensor = torch.linalg.qr(drawn).Q
        return found
    signs = torch.randint(0, 2, (size, 1), generator=generator) * 2 - 1
    return known * signs / math.sqrt(size)


def hadamard(size: int) -> Tensor | None:
    """A matrix of ones and minus ones with orthogonal rows, float64 [size, size]; None where no construction here fits.

    Paley's for an order that a prime gives, doubled by Sylvester's as often as needed: all powers of two, and 12, 20,
    24, 28, 36 ... times these.
    """
    order = size
    while order % 2 == 0 and order > 1:
        order //= 2
    while size % order == 0:
        base = _paley(order)
        if base is not None:
            pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
            while len(base) < size:
                base = torch.kron(pair, base)
            return base
        order *= 2
    return None


def _paley(order: int) -> Tensor | None:
    if order <= 2:
        return torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)[:order, :order]
    if _is_prime(order - 1) and order % 4 == 0:
        cross = _residues(order - 1)
        skew = torch.cat((torch.cat((torch.zeros(1, 1), torch.ones(1, order - 1)), 1), _beside(-1, cross)))
        return torch.eye(order, dtype=torch.float64) + skew
    prime = order // 2 - 1
    if order % 4 == 0 and prime % 4 == 1 and _is_prime(prime):
        cross = _residues(prime)
        border = torch.cat((torch.cat((torch.zeros(1, 1), torch.ones(1, prime)), 1), _beside(1, cross))).double()
        pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.float64)
        filling = torch.tensor([[1, -1], [-1, -1]], dtype=torch.float64)
        return torch.kron(border, pair) + torch.kron(torch.eye(order // 2, dtype=torch.float64), filling)
    return None


def _beside(value: int, matrix: Tensor) -> Tensor:
    return torch.cat((torch.full((len(matrix), 1), float(value)), matrix), 1)


def _residues(prime: int) -> Tensor:
    """[i, j]: 1 where i - j is a square modulo the prime, 0 where it is 0, else -1."""
    squares = {number * number % prime for number in range(1, prime)}
    character = torch.tensor([0.0] + [1.0 if number in squares else -1.0 for number in range(1, prime)])
    numbers = torch.arange(prime)
    return character[(numbers.unsqueeze(1) - numbers) % prime]


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % factor for factor in range(2, math.isqrt(number) + 1))


def _decoder(model: nn.Module, build: Build) -> Decoder:
    """The model's decoder; ConfigError for one that rotations do not serve."""
    if build.mesh.size > 1:
        raise ConfigError(f"a model is rotated on one rank, not on {build.mesh.size}: leave --tp out")
    decoder = next((module for module in model.modules() if isinstance(module, Decoder)), None)
    why = "has no decoder" if decoder is None else _refusal(model, decoder)
    if decoder is None or why:
        raise ConfigError(f"{type(model).__name__} cannot be rotated, because it {why}: calibrate without rotation")
    return decoder


def _refusal(model: nn.Module, decoder: Decoder) -> str:
    if model is not decoder and hasattr(model, "encode"):
        return "puts what it sees into the residual stream"
    if decoder.project_in is not None:
        return "projects its embeddings"
    for layer in decoder.layers:
        if not isinstance(layer, DecoderLayer) or layer.residual == "norm_after":
            return "norms its residual stream"
        for linear in (module for module in layer.modules() if isinstance(module, Linear | GroupedLinear)):
            if not isinstance(linear.format, DenseFormat):
                return "is not dense"
    others = {type(norm).__name__ for norm in _all_norms(decoder) if not isinstance(norm, RMSNorm)}
    return f"has norms of the kind {' and '.join(sorted(others))}, which see a rotation" if others else ""


def _all_norms(decoder: Decoder) -> list[nn.Module]:
    """Those that read the residual stream."""
    of_layers = (
        norm
        for layer in decoder.layers
        if isinstance(layer, DecoderLayer)
        for norm in (layer.attention_norm, layer.feed_forward_norm)
    )
    return [*of_layers, decoder.norm]


def _gain(norm: nn.Module) -> Tensor:
    assert isinstance(norm, RMSNorm)
    return norm.weight


def _feed_forward_products(
    layer: DecoderLayer, hidden: int
) -> tuple[list[Linear | GroupedLinear], list[Linear | GroupedLinear]]:
    """The products of a feed-forward layer that read its input and those that add to its output; no others may be.

    Told by sending rows through it: a product reads the input if all of its rows are rows of it.
    """
    feed_forward = layer.feed_forward
    products = [module for module in feed_forward.modules() if isinstance(module, Linear | GroupedLinear)]
    seen: dict[nn.Module, Tensor] = {}

    def note(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen[module] = inputs[0]

    hooks = [product.register_forward_pre_hook(note) for product in products]
    weight = products[0].stored["weight"] if products else _gain(layer.feed_forward_norm)
    generator = torch.Generator().manual_seed(0)
    probe = torch.randn(PROBES, hidden, generator=generator).to(weight.device, weight.dtype)
    try:
        feed_forward(probe)
    finally:
        for hook in hooks:
            hook.remove()
    readers, writers = [], []
    for product in products:
        x = seen.get(product)
        if x is not None and x.shape[1] == hidden and bool((x.unsqueeze(1) == probe).all(dim=-1).any(dim=1).all()):
            readers.append(product)
        elif x is not None and product.shape.out_features == hidden:
            writers.append(product)
        else:
            raise ConfigError(
                f"a feed-forward layer {type(feed_forward).__name__} has a product that neither reads nor adds to the "
                "residual stream: calibrate without rotation"
            )
    return readers, writers


def _turn_tables(decoder: Decoder, build: Build, turn: Tensor) -> None:
    embedding = decoder.embedding
    if decoder.head is None:
        decoder.head = VocabEmbedding(build, embedding.vocab_size, embedding.weight.shape[1])
        decoder.head.weight.copy_(embedding.weight)
    gain = _gain(decoder.norm)
    decoder.head.weight.copy_(decoder.head.weight.double() * gain.double() @ turn)
    gain.fill_(1)
    embedding.weight.copy_(embedding.weight.double() @ turn)
    if decoder.positions is not None:
        decoder.positions.weight.copy_(decoder.positions.weight.double() @ turn)


def _turn_inputs(linear: Linear | GroupedLinear, gain: Tensor, turn: Tensor) -> None:
    """What reads x reads x Q: W diag(g) Q."""
    weight = linear.stored["weight"]
    weight.copy_(weight.double() * gain.double() @ turn)


def _turn_outputs(linear: Linear | GroupedLinear, turn: Tensor) -> None:
    """What adds to x adds to x Q: Qᵀ W, b Q."""
    weight = linear.stored["weight"]
    weight.copy_(turn.T @ weight.double())
    if linear.bias is not None:
        linear.bias.copy_(linear.bias.double() @ turn)


def _turn_values(attention: Attention, generator: torch.Generator) -> None:
    """A rotation of each head's values, undone where the heads are put together."""
    values = attention.qkv.parts[-1]
    turn = orthogonal(values.unit_size, generator).to(attention.qkv.stored["weight"].device)
    weight = attention.qkv.stored["weight"][-values.size :].unflatten(0, (-1, values.unit_size))
    weight.copy_(turn.T @ weight.double())
    if attention.qkv.bias is not None:
        bias = attention.qkv.bias[-values.size :].unflatten(0, (-1, values.unit_size))
        bias.copy_(bias.double() @ turn)
    columns = attention.out.stored["weight"].unflatten(1, (-1, values.unit_size))
    columns.copy_(columns.double() @ turn)
