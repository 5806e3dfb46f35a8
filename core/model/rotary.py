"""Rotary position tables in the variants that published checkpoints use.

Sources: RoFormer (Su et al., 2021); position interpolation (Chen et al., 2023); dynamic NTK scaling; YaRN (Peng et al.,
2023); the frequency-dependent scaling of long-context checkpoints ("llama3" in their config files).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plexor.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Rotary:
    """How positions rotate queries and keys.

    size: rotated dimensions of a head (fewer than the head's with partial rotary). kind: "default", "linear",
    "dynamic", "yarn" or "frequency". num_original: the context a scaled model was trained for.
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
        """cos and sin [num_positions, size / 2] float32."""
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
        span = max(high - low, 0.001)
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


def read_rotary(raw: Mapping[str, Any], head_size: int, num_positions: int) -> Rotary:
    """The rotary settings of a `config.json`, in the old fields (`rope_theta`, `rope_scaling`) or the new ones
    (`rope_parameters`); CheckpointError for a kind that is not known.
    """
    settings: dict[str, Any] = {**(raw.get("rope_scaling") or {}), **(raw.get("rope_parameters") or {})}
    kind = str(settings.get("rope_type") or settings.get("type") or "default")
    kinds = {"default": "default", "linear": "linear", "dynamic": "dynamic", "yarn": "yarn", "llama3": "frequency"}
    if kind not in kinds:
        raise CheckpointError(
            f"config.json asks for rotary positions of type {kind!r}, which are not built in: "
            f"known are {', '.join(sorted(kinds))}"
        )
    share = float(settings.get("partial_rotary_factor") or raw.get("partial_rotary_factor") or raw.get("rotary_pct") or 1)
    theta = settings.get("rope_theta") or raw.get("rope_theta") or raw.get("rotary_emb_base") or 10000.0
    longest = int(raw.get("max_position_embeddings") or num_positions)
    original = int(settings.get("original_max_position_embeddings") or longest) if kind != "dynamic" else longest
    factor = float(settings.get("factor") or longest / original)
    attention_factor = settings.get("attention_factor")
    return Rotary(
        size=int(head_size * share),
        theta=float(theta),
        num_positions=num_positions,
        kind=kinds[kind],
        factor=factor,
        num_original=original,
        low_frequency=float(settings.get("low_freq_factor") or 1.0),
        high_frequency=float(settings.get("high_freq_factor") or 4.0),
        beta_fast=float(settings.get("beta_fast") or 32.0),
        beta_slow=float(settings.get("beta_slow") or 1.0),
        attention_factor=None if attention_factor is None else float(attention_factor),
        mscale=float(settings.get("mscale") or 0.0),
        mscale_all_dim=float(settings.get("mscale_all_dim") or 0.0),
        truncate=bool(settings.get("truncate", True)),
    )


def _mscale(factor: float, weight: float) -> float:
    return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0
