"""Estimates the memory of a training step from the architecture, without loading weights."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_sft.model.loss import CHUNK_ELEMENTS, PIECE_ELEMENTS

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Parameters of glibc's `mallopt` (malloc.h)."""

CPU_SCRATCH = 200_000_000
"""Bytes by which code and scratch memory of kernels grow the process in the first steps (measured
with SmolLM2-135M, full and with LoRA).
"""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one device."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    checkpoint: int
    """On disk: trained weights and optimizer state."""

    @property
    def parts(self) -> dict[str, int]:
        """The parts of the device's memory, by name."""
        return {name: size for name, size in asdict(self).items() if name != "checkpoint"}

    @property
    def total(self) -> int:
        """Bytes of all parts of the device's memory."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What determines the memory of a training step, beside the config of the model."""

    num_parameters: int
    """Parameters of the base."""
    num_trained: int
    """Parameters with a gradient."""
    tokens: int
    """Tokens in one forward pass."""
    stored_bytes: int
    """Bytes of a stored weight."""
    compute_bytes: int
    """Bytes of a number in compute dtype: 2 under bf16 autocast, which also copies the weights."""
    optimizer_bytes: float
    """Bytes of optimizer state per trained parameter: 8 for Adam in fp32, 0 for plain SGD."""
    gradient_checkpointing: bool | str
    """`model.gradient_checkpointing`: False, True, `full` or `selective`."""
    accumulates: bool = True
    """Whether gradients of an earlier micro-batch exist during the forward pass. Otherwise they
    appear in the backward pass, while activations are freed.
    """
    adapted: bool = False
    """Whether low-rank adapters lie over a frozen base."""
    input_copies: bool = False
    """Whether every adapted layer saves a copy of its input. peft does, for all but plain LoRA."""
    normed_heads: bool = False
    """Whether queries and keys have norms, which save their inputs (Qwen3, Gemma3)."""
    on_cpu: bool = False
    """Whether the step runs on a CPU. Then `CPU_SCRATCH` is counted, too."""
    num_quantized: int = 0
    """Parameters that are stored in 4 bits: those of linear layers, not of experts."""
    shards: int = 1
    """Devices over which weights, gradients and optimizer state are sharded. Each gathers head,
    embedding and two blocks.
    """


def estimate(config: Any, step: StepShape) -> MemoryEstimate:
    """Estimates the memory at the end of the last forward pass of a step, the peak.

    Args:
        config: Config of the model. Its text part is used.
        step: The step.
    """
    text = config.get_text_config()
    # Adapters are stored in fp32, whatever the base is stored in.
    trained = step.num_trained * (4 if step.adapted else step.stored_bytes)
    optimizer_state = int(step.num_trained * step.optimizer_bytes)
    activations = step.tokens * _kept_per_token(text, step) + CPU_SCRATCH * step.on_cpu
    logits = _logits(text, step)
    gradients = trained // step.shards
    if not step.accumulates:
        gradients = max(0, gradients - activations - logits)
    return MemoryEstimate(
        weights=_weights(text, step),
        gradients=gradients,
        optimizer=optimizer_state // step.shards,
        activations=activations,
        logits=logits,
        checkpoint=trained + optimizer_state,
    )


def _weights(text: Any, step: StepShape) -> int:
    """Bytes of the base's weights, of their copies in compute dtype, and of the adapters."""
    count = step.num_parameters
    # Parameters of embedding and head.
    ends = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    if step.num_quantized:
        # Half a byte per parameter, and the scales.
        others = count - step.num_quantized
        base = others * step.stored_bytes + int(step.num_quantized * 0.52)
    elif step.shards > 1:
        gathered = ends + 2 * (count - ends) // text.num_hidden_layers
        base = int(count * step.stored_bytes // step.shards + gathered * step.compute_bytes)
    elif step.compute_bytes < step.stored_bytes:
        base = count * (step.stored_bytes + step.compute_bytes)
    else:
        base = count * step.stored_bytes
    adapters = 4 * step.num_trained // step.shards if step.adapted else 0
    return base + adapters


def _logits(text: Any, step: StepShape) -> int:
    """Bytes of a chunk of logits, of its fp32 pieces, and of the head's gradient (see `loss`)."""
    vocabulary = text.vocab_size
    chunk_tokens = min(step.tokens, max(1, CHUNK_ELEMENTS // vocabulary))
    chunk = chunk_tokens * vocabulary * step.compute_bytes
    # Logits, log probabilities and gradient.
    pieces = 3 * 4 * PIECE_ELEMENTS["cpu" if step.on_cpu else "cuda"]
    # The sum in fp32, and the part of a chunk in compute dtype.
    head = 0 if step.adapted else vocabulary * text.hidden_size * (4 + step.compute_bytes)
    return chunk + pieces + head


def _kept_per_token(text: Any, step: StepShape) -> int:
    """Bytes of activations per token, over all blocks.

    With gradient checkpointing: the input of every block, some results if it is selective, and all
    activations of the one block that is recomputed.
    """
    layers = text.num_hidden_layers
    stream = text.hidden_size * step.stored_bytes
    block = 2 * stream + _block_numbers(text, step) * step.compute_bytes
    if not step.gradient_checkpointing:
        return int(layers * block)
    costly = 0
    if step.gradient_checkpointing == "selective":
        costly = _costly_numbers(text) * step.compute_bytes
    return int(layers * (stream + costly) + block)


def _sizes(text: Any) -> tuple[int, int, int, int]:
    """The widths of the hidden states, of all queries, of all keys, and within the MLP."""
    hidden = text.hidden_size
    heads = getattr(text, "num_attention_heads", 1)
    kv = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    return hidden, heads * head_dim, kv * head_dim, inner


def _costly_numbers(text: Any) -> int:
    """Numbers per token that selective checkpointing saves in a Llama-like block.

    These are attention's output, and every second result of its seven matrix products, from the
    query on.
    """
    hidden, queries, keys, inner = _sizes(text)
    return 2 * queries + keys + inner + hidden


def _block_numbers(text: Any, step: StepShape) -> int:
    """Numbers per token, in compute dtype, that a Llama-like block saves for backward.

    These are the outputs of the norms, query, key, value, attention's output, the two factors in
    the MLP, and with adapters their product. The inputs of the two norms are not counted here.
    """
    hidden, queries, keys, inner = _sizes(text)
    if step.input_copies:
        linear_inputs = 5 * hidden + queries + 2 * inner
    else:
        linear_inputs = 2 * hidden + inner * step.adapted
    head_norms = step.normed_heads * (queries + keys)
    return int(linear_inputs + 2 * (queries + keys) + 2 * inner + head_norms)


def resident(peak: bool = False) -> int:
    """Returns the resident memory of this process, in bytes.

    Windows has no `resource`: there it is not measured, and 0 is returned.

    Args:
        peak: Return the largest value so far.
    """
    if sys.platform == "linux":
        name = "VmHWM" if peak else "VmRSS"
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    if sys.platform == "win32":
        return 0
    # Elsewhere only the peak is available, which a process inherits from the one that started it.
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_freed_memory() -> None:
    """Makes the C library keep freed memory for the next tensor.

    By default it returns every large block to the system, which must clear the pages again: 300,000
    page faults per step of a model with 135 M parameters on a CPU, 5 to 10 % of its time. The peak
    memory does not change.
    """
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    # Only glibc has `mallopt`.
    if getattr(library, "mallopt", None) is not None:
        # The largest threshold that glibc accepts. Larger blocks are still returned.
        library.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
        library.mallopt(M_TRIM_THRESHOLD, -1)
