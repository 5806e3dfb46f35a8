"""The frozen data that plugins return from hooks: names, facts, and strings that say where the code is.

Nothing here imports torch, so that listing plugins takes milliseconds. A `Target` is resolved only when it is
chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

Target = str
"""Where a piece of code is: "package.module:attribute"."""

Tolerance = tuple[float, float]
"""(relative, absolute) error that a provider may have against the reference."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Architecture:
    """A model family member, keyed by the string in `architectures` of its `config.json`.

    config: `(raw: Mapping[str, Any]) -> ModelConfig`, the only place that reads a publisher's field names.
    model: `(ModelConfig, Build) -> Model`.
    weights: `(ModelConfig) -> tuple[Rule, ...]`, the weight converter. A model that takes another architecture's model
        in, found through `build.catalog`, adds that one's rules itself (BringsRules in plexor.checkpoint.loader).
    needs: what other plugins must bring, such as "layers:feed_forward/experts" or "architectures:SomeForCausalLM".
    """

    name: str
    config: Target
    model: Target
    weights: Target
    needs: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Layer:
    """A building block that other plugins may use by (slot, name) without importing its plugin.

    build: `(config, Build) -> torch.nn.Module`, where config is what the slot's users agree on.
    """

    slot: str
    name: str
    build: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Op:
    """An operation that kernels may provide.

    reference: the definition, a plain torch function; it is also the provider "reference" on every device.
    samples: `(device: torch.device, dtype: torch.dtype) -> Iterable[Sample]`, odd shapes included.
    tolerance: for each dtype name ("float32"), how far a provider may be from the reference.
    """

    name: str
    reference: Target
    samples: Target
    tolerance: Mapping[str, Tolerance]


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of a call when the model is built: kernels are chosen on it, once.

    device: "cpu" or "cuda". capability: (9, 0) on Hopper, None on a CPU. dtype: of the activations.
    kv_dtype: of the cache's storage, for ops that touch the cache. shape: sizes by name.
    """

    device: str
    dtype: str
    capability: tuple[int, int] | None = None
    kv_dtype: str | None = None
    shape: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kernel:
    """One provider of an op, with the facts it can serve.

    load: a function, or a class (or a functools.partial of one) whose instances are called: each binding gets its own,
    which may keep what belongs to one layer, such as its weight in another layout.
    kv_dtypes: storage dtypes of the cache it reads or writes; a kernel never sees one that it does not list.
    refuses: gives a reason against given facts, or None; a Target of such a function where it needs heavy imports. It
    may not be used as an on/off switch.
    The highest priority that fits wins; the reference has priority 0.
    """

    op: str
    provider: str
    load: Target
    devices: frozenset[str]
    dtypes: frozenset[str]
    capability: tuple[int, int] | None = None
    kv_dtypes: frozenset[str] = frozenset()
    priority: int = 10
    refuses: Callable[[Facts], str | None] | Target | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Precision:
    """A number format for weights and activations of linear layers and expert stacks.

    format: `() -> LinearFormat` (see plexor.model.format).
    needs: a sentence about what hardware it is for, shown by `plexor explain`; empty if it runs anywhere.
    selective: whether it takes only weights that were made for it, so that `plexor eval --precision all` leaves it out.
    written: `() -> WrittenFormat` (see plexor.model.written), how `plexor quantize` writes it; empty if it does not.
    calibrate: `(Decoder, Build, token_ids: Sequence[int], window: int, gain_dtype: torch.dtype) -> Calibration`: the
        dense float32 model, windows of this many tokens that follow one another, and the dtype in which gains of norms
        will be kept; empty for plain rounding only.
    """

    name: str
    format: Target
    summary: str
    needs: str = ""
    selective: bool = False
    written: Target = ""
    calibrate: Target = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class KVFormat:
    """How keys and values are stored in the paged cache.

    storage: `(KVShape, dtype: torch.dtype) -> tuple[Stored, ...]`: what one layer keeps.
    write, rotary_write, attend: names of the ops that store new entries, rotate and store, and read.
    """

    name: str
    storage: Target
    summary: str
    write: str = "kv_write"
    rotary_write: str = "rotary_kv_write"
    attend: str = "paged_attention"


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckpointFormat:
    """A way checkpoints lie on disk.

    detects: `(folder: Path) -> bool`; exactly one format must answer yes.
    open: `(folder: Path) -> TensorSource`.
    """

    name: str
    detects: Target
    open: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredWeights:
    """A layout of checkpoints whose weights are already rounded, read as the dense tensors that they stand for.

    recognises: `(quantization: Mapping[str, Any]) -> bool`, given `quantization_config` of `config.json`; exactly one
    layout must answer yes.
    open: `(TensorSource, quantization) -> TensorSource`: the checkpoint with a dense `weight` [out, in] in place of
    each rounded one. It may be a GridSource (plexor.checkpoint.view), which also tells the grid of each, and a
        FormatSource, which names the formats that keep each as it is.
    precision: `(quantization) -> str`: the precision that keeps the weights as they are, "dense" where none does.
    """

    name: str
    recognises: Target
    open: Target
    precision: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class InputProcessor:
    """Turns media of a kind ("image") into placeholder tokens and tensors for one architecture.

    build: `(folder: Path, raw_config: Mapping[str, Any]) -> MediaProcessor` (see plexor.runtime.request).
    """

    architecture: str
    kind: str
    build: Target


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """A checkpoint that a plugin ships, so that a name stands for a folder.

    folder: "package:relative/path". default: what is run when no model is named. prompt: what it continues when no
    prompt is given. sample: "module:function", called with a seed, draws an input for it and says the expected
    answer: `(int) -> (PIL.Image.Image, str)`.
    """

    name: str
    folder: str
    summary: str
    default: bool = False
    prompt: str = ""
    sample: Target = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Observer:
    """Told of each step and each finished request, in the process that schedules.

    build: `() -> StepObserver` with `on_step(StepStats)` and `on_finish(Output)` (see plexor.runtime.stats).
    """

    name: str
    build: Target
