"""Runs llama.cpp in its own environment, one process a turn; see `turns` for what the lines it speaks mean.

Needs llama_cpp, numpy and the standard library: it runs under an interpreter that has no greenroom.
"""

import ctypes
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

BATCH = 512


class Model:
    """A GGUF file, loaded: `feed` decodes given tokens; none is sampled."""

    def __init__(self, path: str, *, threads: int, context: int, repack: bool, kv_bits: int = 16) -> None:
        parameters = llama_cpp.llama_model_default_params()
        parameters.use_extra_bufts = repack
        if hasattr(parameters, "load_mode"):
            parameters.load_mode = llama_cpp.LLAMA_LOAD_MODE_MMAP
        else:
            parameters.use_mmap, parameters.use_mlock = True, False
        self.model = llama_cpp.llama_model_load_from_file(path.encode(), parameters)
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot load {path}")
        options = llama_cpp.llama_context_default_params()
        options.n_ctx, options.n_batch, options.n_ubatch = context, BATCH, BATCH
        options.n_threads = options.n_threads_batch = threads
        if kv_bits == 8:  # values in 8 bits want flash attention
            options.type_k = options.type_v = llama_cpp.GGML_TYPE_Q8_0
            options.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_ENABLED
        self.context = llama_cpp.llama_init_from_model(self.model, options)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context: not enough memory")

    def feed(self, tokens: "list[int]") -> None:
        """Decode `tokens` after those before; logits of the last are computed."""
        for start in range(0, len(tokens), BATCH):
            piece = (llama_cpp.llama_token * len(tokens[start : start + BATCH]))(*tokens[start : start + BATCH])
            if llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(piece, len(piece))):
                raise RuntimeError("llama.cpp's llama_decode failed")
        llama_cpp.llama_synchronize(self.context)

    def logits(self) -> "np.ndarray":
        """Of the last token, float32 [vocab]."""
        count = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        return np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(self.context, -1), shape=(count,))

    def forget(self) -> None:
        """Start a new sequence."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)


def drop_pages(path: str) -> None:
    """Drop what the page cache holds of a file: a page counts where it was first read, and that must be this group."""
    file = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(file)


def bytes_read() -> int:
    """What this process has made the disk read so far."""
    for line in Path("/proc/self/io").read_text().splitlines():
        if line.startswith("read_bytes:"):
            return int(line.split()[1])
    return 0


def trial(model: Model, prompt: "list[int]", warm: "list[int]", timed: "list[int]") -> "dict[str, Any]":
    """A prompt, tokens that warm caches up, and tokens that count."""
    model.forget()
    cpu_s, start_s = time.process_time(), time.perf_counter()
    model.feed(prompt)
    prompt_s = time.perf_counter() - start_s
    for token in warm:
        model.feed([token])
    before, start_s = bytes_read(), time.perf_counter()
    for token in timed:
        model.feed([token])
    decode_s = time.perf_counter() - start_s
    if not np.isfinite(model.logits()).all():
        raise RuntimeError("llama.cpp's logits are not finite")
    return {
        "prompt_tokens_per_s": len(prompt) / prompt_s,
        "tokens_per_s": len(timed) / decode_s,
        "cpu_s": time.process_time() - cpu_s,
        "bytes_read_per_token": (bytes_read() - before) / len(timed),
    }


_quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)  # kept: llama.cpp holds only its address


def main() -> None:
    """Load what the first argument says, then answer each line of stdin."""
    job = json.loads(sys.argv[1])
    llama_cpp.llama_log_set(_quiet, ctypes.c_void_p(0))
    llama_cpp.llama_backend_init()
    if job["cold"]:
        drop_pages(job["model"])
    model = Model(job["model"], **{name: job[name] for name in ("threads", "context", "repack", "kv_bits")})
    model.feed(job["first"])
    version = {"engine": f"llama.cpp (llama-cpp-python {llama_cpp.__version__})"}
    print(json.dumps({**version, "system": llama_cpp.llama_print_system_info().decode()}), flush=True)
    for line in sys.stdin:
        print(json.dumps(trial(model, **json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
