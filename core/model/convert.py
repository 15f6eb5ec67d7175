"""Unpacks a Llama GGUF file into a bfloat16 checkpoint with its tokenizer.

Run as ``python -m core.model.convert GGUF FOLDER`` by ``core.model.resolve``, as a process
of its own. Lines that begin with ``progress:`` are for the user. When standard input ends,
the parent is gone: the folder is removed and the process exits.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path

_HEARTBEAT_S = 1.0  # the parent looks at its signals with each line

_step = "starting"


def convert(gguf: Path, folder: Path) -> None:
    """Write config, weights, tokenizer, chat template and generation config to ``folder``."""
    _say("loading libraries")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _say(f"unpacking {gguf.name} (once; about 20 seconds)")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    _say(f"writing {folder.parent}")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # GGUF only names the pre-tokenizer ("smollm"); spelt out, it sets digits apart first.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)
    for path in (*folder.iterdir(), folder):  # whoever may read the cache may read the model
        path.chmod(0o755 if path.is_dir() else 0o644)


def _say(text: str) -> None:
    global _step
    _step = text
    print(f"progress: {text}", flush=True)


def _exit_with_parent(folder: Path) -> None:
    sys.stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _tick() -> None:
    began_s = time.monotonic()
    while True:
        time.sleep(_HEARTBEAT_S)
        print(f"progress: {_step}, {time.monotonic() - began_s:.0f} s", flush=True)


def main() -> None:
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    threading.Thread(target=_tick, daemon=True).start()
    threading.Thread(target=_exit_with_parent, args=(folder,), daemon=True).start()
    convert(gguf, folder)


if __name__ == "__main__":
    main()
