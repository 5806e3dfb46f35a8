"""The only door for plugins: specs, the model toolkit, rules for weights, the precision contract, and errors.

Names are resolved on first use, so that a `plugin.py` that needs only specs does not import torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plexor.batch import Batch, ForwardContext, LayerCache, LogitRows, MediaRows, Pages, Prefill
    from plexor.checkpoint.document import read_object
    from plexor.checkpoint.fields import Fields
    from plexor.checkpoint.mapping import Ignore, Rule, WeightRule, under
    from plexor.checkpoint.source import TensorInfo, TensorSource
    from plexor.checkpoint.tokenizer import Tokenizer
    from plexor.checkpoint.view import Grid, Interleaved, Rows, Step, TensorView, Transpose
    from plexor.errors import CapacityError, CheckpointError, ConfigError, PlexorError, PluginError, RequestError
    from plexor.extension.catalog import Catalog
    from plexor.extension.specs import (
        Architecture,
        Checkpoint,
        CheckpointFormat,
        Facts,
        InputProcessor,
        Kernel,
        KVFormat,
        Layer,
        Observer,
        Op,
        Precision,
        StoredWeights,
    )
    from plexor.kernels.cpu.paged_attention import paged_attention
    from plexor.kernels.cuda.call import (
        Arguments,
        Call,
        Epilogue,
        Norm,
        Rotation,
        added_call,
        gated_call,
        num_multiprocessors,
        product_call,
        rotated_call,
    )
    from plexor.kernels.cuda.program import LINEAR_HEADER, STREAM_HEADER, Program, load_program, tensor_map
    from plexor.kernels.cuda.refusal import refuses_tiles
    from plexor.kernels.cuda.tiled_layout import TiledCut, tiled_cut_for
    from plexor.kernels.cuda.tiled_linear import TiledLinear, TiledScales, lies_in_pairs
    from plexor.kernels.op import Sample
    from plexor.kernels.reference.paged_attention import dense_attention, sequence_entries, visible_positions
    from plexor.kernels.reference.rotary_kv_write import rotated
    from plexor.kernels.reference.steps import added_product, gated_product, normed_product, rotated_product
    from plexor.kernels.table import KernelTable, resolve
    from plexor.kernels.triton.kv_write import scaled_kv_write
    from plexor.kernels.triton.pdl import launch_next, overlaps, wait
    from plexor.kernels.triton.rms_norm import rms_norm
    from plexor.kernels.triton.rotary_kv_write import rotary_kv_write
    from plexor.kernels.triton.scaled_attention import ScaledPagedAttention
    from plexor.kernels.triton.silu_mul import silu_mul
    from plexor.model.attention import Attention, AttentionConfig
    from plexor.model.build import Build, facts
    from plexor.model.decoder import Decoder, DecoderConfig, DecoderLayer, Model, ModelConfig, Slots
    from plexor.model.dense import DenseFormat, kv_storage
    from plexor.model.embedding import PositionEmbedding, VocabEmbedding
    from plexor.model.feed_forward import (
        FeedForward,
        FeedForwardConfig,
        GatedFeedForward,
        ResidualFeedForward,
        activation,
        gated_activation,
    )
    from plexor.model.format import (
        FusingFormat,
        Fusion,
        GroupedMultiply,
        KVShape,
        LinearFormat,
        LinearShape,
        Multiply,
        Stored,
    )
    from plexor.model.linear import Cut, GroupedLinear, Linear, LinearWeight, Part
    from plexor.model.media import MediaModel
    from plexor.model.norm import LayerNorm, RMSNorm
    from plexor.model.rotary import Rotary, read_rotary
    from plexor.model.written import Calibration, WrittenFormat
    from plexor.runtime.request import Media, MediaProcessor, Output
    from plexor.runtime.stats import StepObserver, StepStats

_HOMES = {
    "plexor.batch": ("Batch", "ForwardContext", "LayerCache", "LogitRows", "MediaRows", "Pages", "Prefill"),
    "plexor.checkpoint.document": ("read_object",),
    "plexor.checkpoint.fields": ("Fields",),
    "plexor.checkpoint.mapping": ("Ignore", "Rule", "WeightRule", "under"),
    "plexor.checkpoint.source": ("TensorInfo", "TensorSource"),
    "plexor.checkpoint.tokenizer": ("Tokenizer",),
    "plexor.checkpoint.view": ("Grid", "Interleaved", "Rows", "Step", "TensorView", "Transpose"),
    "plexor.errors": (
        "CapacityError",
        "CheckpointError",
        "ConfigError",
        "PlexorError",
        "PluginError",
        "RequestError",
    ),
    "plexor.extension.catalog": ("Catalog",),
    "plexor.extension.specs": (
        "Architecture",
        "Checkpoint",
        "CheckpointFormat",
        "Facts",
        "InputProcessor",
        "KVFormat",
        "Kernel",
        "Layer",
        "Observer",
        "Op",
        "Precision",
        "StoredWeights",
    ),
    "plexor.kernels.cpu.paged_attention": ("paged_attention",),
    "plexor.kernels.cuda.call": (
        "Arguments",
        "Call",
        "Epilogue",
        "Norm",
        "Rotation",
        "added_call",
        "gated_call",
        "num_multiprocessors",
        "product_call",
        "rotated_call",
    ),
    "plexor.kernels.cuda.program": ("LINEAR_HEADER", "STREAM_HEADER", "Program", "load_program", "tensor_map"),
    "plexor.kernels.cuda.refusal": ("refuses_tiles",),
    "plexor.kernels.cuda.tiled_layout": ("TiledCut", "tiled_cut_for"),
    "plexor.kernels.cuda.tiled_linear": ("TiledLinear", "TiledScales", "lies_in_pairs"),
    "plexor.kernels.op": ("Sample",),
    "plexor.kernels.reference.paged_attention": ("dense_attention", "sequence_entries", "visible_positions"),
    "plexor.kernels.reference.rotary_kv_write": ("rotated",),
    "plexor.kernels.reference.steps": ("added_product", "gated_product", "normed_product", "rotated_product"),
    "plexor.kernels.table": ("KernelTable", "resolve"),
    "plexor.kernels.triton.pdl": ("launch_next", "overlaps", "wait"),
    "plexor.kernels.triton.kv_write": ("scaled_kv_write",),
    "plexor.kernels.triton.rms_norm": ("rms_norm",),
    "plexor.kernels.triton.rotary_kv_write": ("rotary_kv_write",),
    "plexor.kernels.triton.scaled_attention": ("ScaledPagedAttention",),
    "plexor.kernels.triton.silu_mul": ("silu_mul",),
    "plexor.model.attention": ("Attention", "AttentionConfig"),
    "plexor.model.build": ("Build", "facts"),
    "plexor.model.decoder": ("Decoder", "DecoderConfig", "DecoderLayer", "Model", "ModelConfig", "Slots"),
    "plexor.model.dense": ("DenseFormat", "kv_storage"),
    "plexor.model.embedding": ("PositionEmbedding", "VocabEmbedding"),
    "plexor.model.feed_forward": (
        "FeedForward",
        "FeedForwardConfig",
        "GatedFeedForward",
        "ResidualFeedForward",
        "activation",
        "gated_activation",
    ),
    "plexor.model.format": (
        "FusingFormat",
        "Fusion",
        "GroupedMultiply",
        "KVShape",
        "LinearFormat",
        "LinearShape",
        "Multiply",
        "Stored",
    ),
    "plexor.model.linear": ("Cut", "GroupedLinear", "Linear", "LinearWeight", "Part"),
    "plexor.model.media": ("MediaModel",),
    "plexor.model.norm": ("LayerNorm", "RMSNorm"),
    "plexor.model.rotary": ("Rotary", "read_rotary"),
    "plexor.model.written": ("Calibration", "WrittenFormat"),
    "plexor.runtime.request": ("Media", "MediaProcessor", "Output"),
    "plexor.runtime.stats": ("StepObserver", "StepStats"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

# Spelled out, because type checkers do not compute it.
__all__ = [
    "LINEAR_HEADER",
    "STREAM_HEADER",
    "Architecture",
    "Arguments",
    "Attention",
    "AttentionConfig",
    "Batch",
    "Build",
    "Calibration",
    "Call",
    "CapacityError",
    "Catalog",
    "Checkpoint",
    "CheckpointError",
    "CheckpointFormat",
    "ConfigError",
    "Cut",
    "Decoder",
    "DecoderConfig",
    "DecoderLayer",
    "DenseFormat",
    "Epilogue",
    "Facts",
    "FeedForward",
    "FeedForwardConfig",
    "Fields",
    "ForwardContext",
    "FusingFormat",
    "Fusion",
    "GatedFeedForward",
    "Grid",
    "GroupedLinear",
    "GroupedMultiply",
    "Ignore",
    "InputProcessor",
    "Interleaved",
    "KVFormat",
    "KVShape",
    "Kernel",
    "KernelTable",
    "Layer",
    "LayerCache",
    "LayerNorm",
    "Linear",
    "LinearFormat",
    "LinearShape",
    "LinearWeight",
    "LogitRows",
    "Media",
    "MediaModel",
    "MediaProcessor",
    "MediaRows",
    "Model",
    "ModelConfig",
    "Multiply",
    "Norm",
    "Observer",
    "Op",
    "Output",
    "Pages",
    "Part",
    "PlexorError",
    "PluginError",
    "PositionEmbedding",
    "Precision",
    "Prefill",
    "Program",
    "RMSNorm",
    "RequestError",
    "ResidualFeedForward",
    "Rotary",
    "Rotation",
    "Rows",
    "Rule",
    "Sample",
    "ScaledPagedAttention",
    "Slots",
    "Step",
    "StepObserver",
    "StepStats",
    "Stored",
    "StoredWeights",
    "TensorInfo",
    "TensorSource",
    "TensorView",
    "TiledCut",
    "TiledLinear",
    "TiledScales",
    "Tokenizer",
    "Transpose",
    "VocabEmbedding",
    "WeightRule",
    "WrittenFormat",
    "activation",
    "added_call",
    "added_product",
    "dense_attention",
    "facts",
    "gated_activation",
    "gated_call",
    "gated_product",
    "kv_storage",
    "launch_next",
    "lies_in_pairs",
    "load_program",
    "normed_product",
    "num_multiprocessors",
    "overlaps",
    "paged_attention",
    "product_call",
    "read_object",
    "read_rotary",
    "refuses_tiles",
    "resolve",
    "rms_norm",
    "rotary_kv_write",
    "rotated",
    "rotated_call",
    "rotated_product",
    "scaled_kv_write",
    "sequence_entries",
    "silu_mul",
    "tensor_map",
    "tiled_cut_for",
    "under",
    "visible_positions",
    "wait",
]


def __getattr__(name: str) -> object:
    if name not in _HOME_OF:
        raise AttributeError(f"module 'plexor.api' has no attribute {name!r}")
    return getattr(import_module(_HOME_OF[name]), name)
