"""How much memory a training step will take, from the architecture alone: no weights are loaded."""

from __future__ import annotations

import ctypes
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Numbers of two of glibc's settings (malloc.h)."""

PIECE_ELEMENTS = {True: 2**21, False: 2**24}
"""As in the loss, on a CPU and on a GPU."""

CPU_SCRATCH = 200_000_000
"""Bytes of code and kernels' scratch that came with the first steps of SmolLM2-135M, full and with LoRA."""


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


def estimate(
    config: Any,
    *,
    num_parameters: int,
    num_trained: int,
    tokens: int,
    stored_bytes: int,
    compute_bytes: int,
    optimizer_bytes: float,
    gradient_checkpointing: bool | str,
    accumulates: bool = True,
    adapted: bool = False,
    input_copies: bool = False,
    normed_heads: bool = False,
    chunk_elements: int,
    on_cpu: bool = False,
    quantized: bool = False,
    shards: int = 1,
) -> MemoryEstimate:
    """Adds up what a step holds when its last forward pass has ended.

    Args:
        config: Of the model (its text part is used).
        num_parameters: Of the base.
        num_trained: Those with a gradient.
        tokens: In one forward pass.
        stored_bytes: Per stored weight.
        compute_bytes: Per number that is computed with (2 under bf16 autocast, which also copies the weights).
        optimizer_bytes: Remembered of each trained parameter: 8 for Adam in fp32, 0 for plain SGD.
        gradient_checkpointing: Only block inputs are kept; with `selective` some of what is costly, too.
        accumulates: Gradients of an earlier forward pass are there; else they come as activations go.
        adapted: Low-rank adapters over a frozen base.
        input_copies: Every adapted layer keeps a copy of its input, as in peft: what is not plain LoRA does.
        normed_heads: Queries and keys have norms of their own, which keep their inputs (Qwen3, Gemma3).
        chunk_elements: Logits that the loss holds at once.
        on_cpu: Count what the process itself grows by, too.
        quantized: The linear layers of the blocks are stored in 4 bits.
        shards: Devices that share weights, gradients and optimizer state; each gathers head, embedding, two blocks.
    """
    text = config.get_text_config()
    hidden, vocabulary = text.hidden_size, text.vocab_size
    numbers = _block_numbers(text, adapted, input_copies, normed_heads)
    kept = _kept_per_token(text, numbers, stored_bytes, compute_bytes, gradient_checkpointing)
    weights = _weights(text, num_parameters, stored_bytes, compute_bytes, quantized, shards)
    weights += 4 * num_trained * adapted // shards  # in fp32, whatever the base is in
    logits = min(tokens, max(1, chunk_elements // vocabulary)) * vocabulary * compute_bytes
    head = 0 if adapted else vocabulary * hidden * (4 + compute_bytes)  # its gradient, and that of a chunk
    trained, remembered = num_trained * (4 if adapted else stored_bytes), int(num_trained * optimizer_bytes)
    activations, logits = tokens * kept + CPU_SCRATCH * on_cpu, logits + 3 * 4 * PIECE_ELEMENTS[on_cpu] + head
    return MemoryEstimate(
        weights=weights,
        gradients=trained // shards if accumulates else max(0, trained // shards - activations - logits),
        optimizer=remembered // shards,
        activations=activations,
        logits=logits,
        checkpoint=trained + remembered,
    )


def _weights(text: Any, count: int, stored_bytes: int, compute_bytes: int, quantized: bool, shards: int) -> int:
    """Bytes of all weights, and of their copies in compute type."""
    ends = text.vocab_size * text.hidden_size * (1 if text.tie_word_embeddings else 2)  # embedding and head
    if quantized:  # half a byte, and the scales
        return int(ends * stored_bytes + int((count - ends) * 0.52))
    if shards > 1:
        gathered = ends + 2 * (count - ends) // text.num_hidden_layers
        return int(count * stored_bytes // shards + gathered * compute_bytes)
    return count * (stored_bytes + (compute_bytes if compute_bytes < stored_bytes else 0))


def _kept_per_token(text: Any, numbers: int, stored_bytes: int, compute_bytes: int, checkpointing: bool | str) -> int:
    """Bytes that all blocks keep; of those that are checkpointed what goes in, some products, and all of one block."""
    layers, stream = text.num_hidden_layers, text.hidden_size * stored_bytes
    block = 2 * stream + numbers * compute_bytes
    costly = _costly_numbers(text) * compute_bytes if checkpointing == "selective" else 0
    return int(layers * (stream + costly) + block if checkpointing else layers * block)


def _sizes(text: Any) -> tuple[int, int, int, int]:
    """Of the hidden states, of all queries, of all keys, and between the gated products."""
    hidden, heads = text.hidden_size, getattr(text, "num_attention_heads", 1)
    kv = getattr(text, "num_key_value_heads", None) or heads
    head_dim = getattr(text, "head_dim", None) or hidden // heads
    inner = getattr(text, "intermediate_size", None) or 4 * hidden
    return hidden, heads * head_dim, kv * head_dim, inner


def _costly_numbers(text: Any) -> int:
    """What selective checkpointing keeps of a Llama-like block per token: attention's output and every second of its
    seven products, from the query on.
    """
    hidden, queries, keys, inner = _sizes(text)
    return 2 * queries + keys + inner + hidden


def _block_numbers(text: Any, adapted: bool, input_copies: bool, normed_heads: bool) -> int:
    """Numbers in compute type that a Llama-like block keeps per token, beside the two inputs of its norms: the norms'
    outputs, query, key, value, the attention's output, the two factors of the MLP; with adapters their product, too.
    """
    hidden, queries, keys, inner = _sizes(text)
    linear_inputs = 2 * hidden + inner * adapted
    if input_copies:
        linear_inputs = 5 * hidden + queries + 2 * inner
    return int(linear_inputs + 2 * (queries + keys) + 2 * inner + normed_heads * (queries + keys))


def resident(peak: bool = False) -> int:
    """Bytes of host memory that this process holds, or the most it ever held. Not `ru_maxrss` where it can be avoided:
    a program inherits that of the one that started it.
    """
    if sys.platform == "linux":
        name = "VmHWM" if peak else "VmRSS"
        line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
        return int(line.split()[1]) * 1024
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def keep_freed_memory() -> None:
    """Makes the C library keep what is freed, for the next tensor of that size.

    By default it gives every large block back to the system, which then has to clear the same pages again: 300,000 page
    faults per step of a model of 135 M parameters on a CPU, 5 to 10 % of its time. The peak stays as it was.
    """
    if sys.platform == "linux":
        library = ctypes.CDLL(None)
        if getattr(library, "mallopt", None) is not None:  # glibc
            library.mallopt(M_MMAP_THRESHOLD, 32 * 2**20)  # the most it takes; larger blocks would leave gaps
            library.mallopt(M_TRIM_THRESHOLD, -1)
