"""Sizes and switches of the embedded engine. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 1 << 30
FREE_SHARE = 0.6
"""Of a GPU's free memory, for keys and values; the rest is for what passes allocate."""
MIN_KV_TOKENS = 32_768
TOKENS_PER_SEQUENCE = 1024
"""A guess; where it is too low, sequences wait for pages."""
PAGE_SIZE, GPU_PAGE_SIZE = 4, 16
"""Siblings compute a prompt's last, unfilled page each for itself: on a CPU small pages are the faster ones for it."""
BATCH_TOKENS, GPU_BATCH_TOKENS = 2048, 8192
"""Products of a GPU are at their peak from about 500 tokens on; more make passes of prompts fewer."""
VISION_CACHE_BYTES, GPU_VISION_CACHE_BYTES = GIB // 4, GIB


class PoolTooSmall(ValueError):
    """kv_bytes hold no request at all. needed_bytes: the least that they may be."""

    def __init__(self, kv_bytes: int, needed_bytes: int, tokens: int) -> None:
        super().__init__(
            f"engine.kv_bytes = {kv_bytes}: keys and values of {tokens} tokens take {needed_bytes} bytes; raise it "
            "(--kv-gb, rollout.kv_mib)"
        )
        self.needed_bytes = needed_bytes


@dataclass(frozen=True)
class EngineConfig:
    """page_size: tokens of a page; None: 4 on a CPU, 16 on a GPU. num_pages: pages of the KV pool; None: as many as fit
    kv_bytes. kv_bytes None: on a GPU FREE_SHARE of what is free when the engine starts, in main memory what max_running
    sequences need, up to 1 GiB. least_tokens: of the shortest request there will be, which the pool has to hold.

    max_batch_tokens: tokens per forward pass; longer prompts are prefilled in chunks. vision_cache_bytes: of features
    that are kept when no request holds them. None: more on a GPU than elsewhere. max_running: sequences that hold
    pages at once. resume False: no prefix and no visual feature is ever reused (for measurements).
    share_prefix: whether decoding siblings read the pages that they have in common once for all of them, which
    changes the time and no sample; None: where a measurement says that it pays. encode_ahead: whether the vision
    tower runs for waiting sequences beside the passes of running ones; None: on a GPU, and where a CPU has threads
    for both. device: None is the model's. cuda_graphs: whether decode steps on a GPU are captured in CUDA graphs
    when the engine is made, which takes seconds; without them they are slower. overlap: whether a pass is launched
    before what the one before it sampled is taken in, so that the device does not wait for the host; None: on a GPU.
    num_threads: torch threads of the engine's worker; None leaves them as they are. max_chunks_per_s: of all streams
    together; where tokens come faster, several share one (the first and the last never wait); None: no limit.
    """

    page_size: int | None = None
    num_pages: int | None = None
    kv_bytes: int | None = None
    least_tokens: int = 1
    max_batch_tokens: int | None = None
    max_running: int = 64
    vision_cache_bytes: int | None = None
    resume: bool = True
    share_prefix: bool | None = None
    encode_ahead: bool | None = None
    device: str | None = None
    cuda_graphs: bool = True
    overlap: bool | None = None
    num_threads: int | None = None
    max_chunks_per_s: float | None = None

    def __post_init__(self) -> None:
        checks = (
            (self.page_size is None or self.page_size >= 1, "page_size", self.page_size, ">= 1, or None"),
            (self.num_pages is None or self.num_pages >= 1, "num_pages", self.num_pages, ">= 1, or None"),
            (self.kv_bytes is None or self.kv_bytes >= 1, "kv_bytes", self.kv_bytes, ">= 1, or None"),
            (self.least_tokens >= 1, "least_tokens", self.least_tokens, ">= 1"),
            (self.max_running >= 1, "max_running", self.max_running, ">= 1"),
            (
                self.max_batch_tokens is None or self.max_batch_tokens >= self.max_running,
                "max_batch_tokens",
                self.max_batch_tokens,
                ">= max_running, or None",
            ),
            (
                self.vision_cache_bytes is None or self.vision_cache_bytes >= 0,
                "vision_cache_bytes",
                self.vision_cache_bytes,
                ">= 0, or None",
            ),
            (self.num_threads is None or self.num_threads >= 1, "num_threads", self.num_threads, ">= 1, or None"),
            (
                self.max_chunks_per_s is None or self.max_chunks_per_s > 0,
                "max_chunks_per_s",
                self.max_chunks_per_s,
                "> 0, or None",
            ),
        )
        for ok, name, value, allowed in checks:
            if not ok:
                raise ValueError(f"engine.{name} = {value}: must be {allowed}")

    def tokens_per_page(self, on_gpu: bool) -> int:
        return self.page_size or (GPU_PAGE_SIZE if on_gpu else PAGE_SIZE)

    def batch_tokens(self, on_gpu: bool) -> int:
        tokens = GPU_BATCH_TOKENS if on_gpu else BATCH_TOKENS
        return self.max_batch_tokens or max(tokens, self.max_running)

    def vision_bytes(self, on_gpu: bool) -> int:
        """0: no visual feature outlives its request."""
        if not self.resume:
            return 0
        if self.vision_cache_bytes is not None:
            return self.vision_cache_bytes
        return GPU_VISION_CACHE_BYTES if on_gpu else VISION_CACHE_BYTES

    def pages_that_fit(self, page_size: int, page_bytes: int, free_bytes: int | None = None) -> int:
        """Pages of the pool, for pages of this many tokens and bytes (keys and values of all layers).

        free_bytes: of a GPU. Raises PoolTooSmall.
        """
        if self.num_pages is not None:
            return self.num_pages
        kv_bytes = self.kv_bytes
        if kv_bytes is None and free_bytes is not None:
            kv_bytes = int(FREE_SHARE * free_bytes)
        elif kv_bytes is None:
            tokens = max(MIN_KV_TOKENS, self.max_running * TOKENS_PER_SEQUENCE)
            kv_bytes = min(GIB, -(-tokens // page_size) * page_bytes)
        needed_bytes = -(-self.least_tokens // page_size) * page_bytes
        if kv_bytes < needed_bytes:
            raise PoolTooSmall(kv_bytes, needed_bytes, self.least_tokens)
        return kv_bytes // page_bytes
