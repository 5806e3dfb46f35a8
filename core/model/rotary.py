"""Rotary position tables in the variants that published checkpoints use.

Sources: RoFormer (Su et al., 2021); position interpolation (Chen et al., 2023); dynamic NTK scaling; YaRN (Peng et al.,
2023); the frequency-dependent scaling of long-context checkpoints ("llama3" in their config files).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from plexor.checkpoint.fields import Fields
from plexor.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Rotary:
    """How positions rotate queries and keys.

    size: rotated dimensions of a head (fewer than the head's with partial rotary). num_positions: the longest sequence
    that the settings are for. kind: "default", "linear", "dynamic", "yarn" or "frequency". num_original: the context a
    scaled model was trained for.
    """

    size: int
    theta: float
    num_positions: int
    kind: str = "default"
    factor: float = 1.0
    num_original: int = 0
    low_frequency: float = 1.0
    high_frequency: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True

    def tables(self, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """The cosines and sines [num_positions, size / 2] float32."""
        positions = torch.arange(num_positions, dtype=torch.float32, device=device).unsqueeze(1)
        angles = positions * self._frequencies(positions)
        scale = self._attention_scale()
        return angles.cos() * scale, angles.sin() * scale

    def _frequencies(self, positions: Tensor) -> Tensor:
        """[1, size / 2], or [P, size / 2] where they depend on the position."""
        if self.kind == "dynamic":
            return self._dynamic(positions)
        plain = self._plain(positions.device)
        if self.kind == "default":
            return plain
        if self.kind == "linear":
            return plain / self.factor
        return self._yarn(plain) if self.kind == "yarn" else self._by_frequency(plain)

    def _exponents(self, device: torch.device) -> Tensor:
        return torch.arange(0, self.size, 2, dtype=torch.int64, device=device).float() / self.size

    def _plain(self, device: torch.device) -> Tensor:
        return (1.0 / self.theta ** self._exponents(device)).unsqueeze(0)

    def _dynamic(self, positions: Tensor) -> Tensor:
        """NTK scaling by the length a token sees, so that neither chunks nor a shared prefix change a key."""
        length = (positions + 1).clamp(min=float(self.num_original))
        stretch = self.factor * length / self.num_original - (self.factor - 1)
        theta = self.theta * stretch ** (self.size / (self.size - 2))
        return 1.0 / theta ** self._exponents(positions.device)

    def _by_frequency(self, plain: Tensor) -> Tensor:
        """Long waves are stretched by the factor, short ones kept, those between blended."""
        turns = self.num_original * plain / (2 * math.pi)
        blend = ((turns - self.low_frequency) / (self.high_frequency - self.low_frequency)).clamp(0, 1)
        return (1 - blend) * plain / self.factor + blend * plain

    def _yarn(self, plain: Tensor) -> Tensor:
        low, high = self._yarn_dimension(self.beta_fast), self._yarn_dimension(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, self.size - 1)
        span = high - low if high != low else 0.001
        index = torch.arange(self.size // 2, dtype=torch.float32, device=plain.device)
        stretched = ((index - low) / span).clamp(0, 1)
        return plain / self.factor * stretched + plain * (1 - stretched)

    def _yarn_dimension(self, num_rotations: float) -> float:
        """The dimension that turns this often within the original context."""
        wave = self.num_original / (num_rotations * 2 * math.pi)
        return self.size * math.log(wave) / (2 * math.log(self.theta))

    def _attention_scale(self) -> float:
        if self.kind != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return _mscale(self.factor, self.mscale) / _mscale(self.factor, self.mscale_all_dim)
        return _mscale(self.factor, 1.0)


_KINDS: Mapping[str, str] = MappingProxyType(
    {"default": "default", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "frequency"}
)


def read_rotary(raw: Mapping[str, Any], head_size: int, num_positions: int) -> Rotary:
    """The rotary settings of a `config.json`, in the old fields (`rope_theta`, `rope_scaling`) or the new ones
    (`rope_parameters`); CheckpointError for a kind that is not known.

    num_positions: what the file calls `max_position_embeddings`. Files state it before or after scaling; the settings'
    own num_positions is the longest sequence either way.
    """
    settings: dict[str, Any] = {}
    for name in ("rope_scaling", "rope_parameters"):
        settings |= Fields(raw).section(name).raw if raw.get(name) else {}
    fields = Fields({**raw, **settings}, "config.json (with its rotary settings)")
    kind = str(settings.get("rope_type") or settings.get("type") or "default")
    if kind not in _KINDS:
        raise CheckpointError(
            f"config.json asks for rotary positions of type {kind!r}, which are not built in: "
            f"known are {', '.join(sorted(_KINDS))}"
        )
    # Dynamic scaling starts where max_position_embeddings ends, whatever else the file says.
    scaled = kind in ("yarn", "llama3")
    original = fields.integer("original_max_position_embeddings", num_positions) if scaled else num_positions
    factor = 1.0 if kind == "default" else fields.number("factor", num_positions / original, above=0)
    stretched = num_positions if kind in ("default", "llama3") else int(original * factor)
    share = fields.number("partial_rotary_factor", fields.number("rotary_pct", 1.0), above=0)
    size = int(head_size * share)
    if size < 2 or size % 2 or size > head_size:
        raise CheckpointError(
            f"config.json rotates {size} of a head's {head_size} features ({share:g} of them), which must be an even "
            "number of at least 2: correct the file"
        )
    return Rotary(
        size=size,
        theta=fields.number("rope_theta", fields.number("rotary_emb_base", 10000.0), above=0),
        num_positions=max(num_positions, stretched),
        kind=_KINDS[kind],
        factor=factor,
        num_original=original,
        low_frequency=fields.number("low_freq_factor", 1.0),
        high_frequency=fields.number("high_freq_factor", 4.0),
        beta_fast=fields.number("beta_fast", 32.0),
        beta_slow=fields.number("beta_slow", 1.0),
        attention_factor=None if fields.raw.get("attention_factor") is None else fields.number("attention_factor"),
        mscale=fields.number("mscale", 0.0),
        mscale_all_dim=fields.number("mscale_all_dim", 0.0),
        truncate=fields.flag("truncate", True),
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
