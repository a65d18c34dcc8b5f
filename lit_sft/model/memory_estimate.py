"""How much memory a training step will take, from the architecture alone: no weights are loaded."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lit_sft.model.loss import CHUNK_ELEMENTS, PIECE_ELEMENTS

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of two of glibc's settings (malloc.h)."""

CPU_SCRATCH = 200_000_000
"""Bytes of code and kernels' scratch that came with the first steps of SmolLM2-135M, full and with
LoRA.
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
    """On disk: what is trained, and what the optimizer remembers of it."""

    @property
    def parts(self) -> dict[str, int]:
        """Of the device's memory, by name."""
        return {name: size for name, size in asdict(self).items() if name != "checkpoint"}

    @property
    def total(self) -> int:
        """All of them."""
        return sum(self.parts.values())


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """What the memory of a training step depends on, beside the config of the model."""

    num_parameters: int
    """Parameters of the base."""
    num_trained: int
    """Parameters with a gradient."""
    tokens: int
    """Tokens in one forward pass."""
    stored_bytes: int
    """Bytes of a stored weight."""
    compute_bytes: int
    """Bytes of a number that is computed with: 2 under bf16 autocast, which also copies the
    weights.
    """
    optimizer_bytes: float
    """Bytes that the optimizer remembers of a trained parameter: 8 for Adam in fp32, 0 for plain
    SGD.
    """
    gradient_checkpointing: bool | str
    """Whether only the inputs of blocks are kept; with `selective` some of the costly results,
    too.
    """
    accumulates: bool = True
    """Whether gradients of an earlier forward pass are there; otherwise they come as activations
    go.
    """
    adapted: bool = False
    """Whether low-rank adapters lie over a frozen base."""
    input_copies: bool = False
    """Whether every adapted layer keeps a copy of its input, as in peft: adapters that are not
    plain LoRA do.
    """
    normed_heads: bool = False
    """Whether queries and keys have norms of their own, which keep their inputs (Qwen3, Gemma3)."""
    on_cpu: bool = False
    """Whether to count what the process itself grows by, too."""
    quantized: bool = False
    """Whether the linear layers of the blocks are stored in 4 bits."""
    shards: int = 1
    """Devices that share weights, gradients and optimizer state; each gathers head, embedding and
    two blocks.
    """


def estimate(config: Any, step: StepShape) -> MemoryEstimate:
    """Adds up what a step holds when its last forward pass has ended.

    Args:
        config: Of the model (its text part is used).
        step: The step.
    """
    text = config.get_text_config()
    # Adapters are stored in fp32, whatever the base is stored in.
    trained = step.num_trained * (4 if step.adapted else step.stored_bytes)
    remembered = int(step.num_trained * step.optimizer_bytes)
    activations = step.tokens * _kept_per_token(text, step) + CPU_SCRATCH * step.on_cpu
    logits = _logits(text, step)
    gradients = trained // step.shards
    if not step.accumulates:
        gradients = max(0, gradients - activations - logits)
    return MemoryEstimate(
        weights=_weights(text, step),
        gradients=gradients,
        optimizer=remembered // step.shards,
        activations=activations,
        logits=logits,
        checkpoint=trained + remembered,
    )


def _weights(text: Any, step: StepShape) -> int:
    """Bytes of the base's weights, of their copies in compute type, and of the adapters."""
    count = step.num_parameters
    # Embedding and head.
    ends = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)
    if step.quantized:
        # Half a byte, and the scales.
        base = int(ends * step.stored_bytes + int((count - ends) * 0.52))
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
    """Bytes of the logits that the loss holds at once, of their pieces in fp32, and of the head's
    gradient.
    """
    vocabulary = text.vocab_size
    chunk = min(step.tokens, max(1, CHUNK_ELEMENTS // vocabulary)) * vocabulary * step.compute_bytes
    pieces = 3 * 4 * PIECE_ELEMENTS["cpu" if step.on_cpu else "cuda"]
    # The gradient, and that of a chunk.
    head = 0 if step.adapted else vocabulary * text.hidden_size * (4 + step.compute_bytes)
    return chunk + pieces + head


def _kept_per_token(text: Any, step: StepShape) -> int:
    """Bytes that all blocks keep; of those that are checkpointed what goes in, some products, and
    all of one block.
    """
    layers = text.num_hidden_layers
    stream = text.hidden_size * step.stored_bytes
    block = 2 * stream + _block_numbers(text, step) * step.compute_bytes
    if not step.gradient_checkpointing:
        return int(layers * block)
    costly = (
        _costly_numbers(text) * step.compute_bytes
        if step.gradient_checkpointing == "selective"
        else 0
    )
    return int(layers * (stream + costly) + block)


def _sizes(text: Any) -> tuple[int, int, int, int]:
    """Of the hidden states, of all queries, of all keys, and between the gated products."""
    hidden, heads = text.hidden_size, getattr(text, "num_attention_heads", 1)
    kv = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    return hidden, heads * head_dim, kv * head_dim, inner


def _costly_numbers(text: Any) -> int:
    """What selective checkpointing keeps of a Llama-like block per token: attention's output and
    every second of its seven products, from the query on.
    """
    hidden, queries, keys, inner = _sizes(text)
    return 2 * queries + keys + inner + hidden


def _block_numbers(text: Any, step: StepShape) -> int:
    """Numbers in compute type that a Llama-like block keeps per token, beside the two inputs of its
    norms: the norms' outputs, query, key, value, the attention's output, the two factors of the
        MLP; with adapters their product, too.
    """
    hidden, queries, keys, inner = _sizes(text)
    if step.input_copies:
        linear_inputs = 5 * hidden + queries + 2 * inner
    else:
        linear_inputs = 2 * hidden + inner * step.adapted
    return int(
        linear_inputs + 2 * (queries + keys) + 2 * inner + step.normed_heads * (queries + keys)
    )


def resident(peak: bool = False) -> int:
    """Bytes of host memory that this process holds, or the most it ever held. Not `ru_maxrss` where
    it can be avoided: a program inherits that of the one that started it.
    """
    if sys.platform == "linux":
        name = "VmHWM" if peak else "VmRSS"
        line = next(
            line
            for line in Path("/proc/self/status").read_text().splitlines()
            if line.startswith(name)
        )
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_freed_memory() -> None:
    """Makes the C library keep what is freed, for the next tensor of that size.

    By default it gives every large block back to the system, which then has to clear the same pages
    again: 300,000 page faults per step of a model of 135 M parameters on a CPU, 5 to 10 % of its
        time. The peak stays as it was.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if getattr(library, "mallopt", None) is not None:
            # Glibc.
            # The most it takes; larger blocks would leave gaps.
            library.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)
            library.mallopt(M_TRIM_THRESHOLD, -1)
