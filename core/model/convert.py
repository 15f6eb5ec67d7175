"""Converts a Llama GGUF file into a bfloat16 checkpoint with its tokenizer.

``core.model.resolve`` runs this module in a separate process, as
``python -m core.model.convert GGUF FOLDER``. Output lines that begin with ``progress:`` are shown
to the user. Standard input ends when the parent process dies. This process then removes the folder
and exits.
"""

from __future__ import annotations

import os
import shutil
import sys
import threading
import time
from pathlib import Path

# The parent checks for a stop signal each time that it reads a line.
_PROGRESS_PERIOD_S = 1.0

_step = "starting"


def convert(gguf: Path, folder: Path) -> None:
    """Write config, weights, tokenizer, chat template and generation config to ``folder``."""
    _start_step("loading libraries")
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    _start_step(f"unpacking {gguf.name} (once; about 20 seconds)")
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
    )
    # As SmolLM2's model card recommends. The GGUF file has no such defaults, and with those of vLLM
    # (temperature 1) the answers of so small a model are noise.
    model.generation_config.update(do_sample=True, temperature=0.2, top_p=0.9)
    _start_step(f"writing {folder.parent}")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.model_max_length = model.config.max_position_embeddings
    # The GGUF file contains only the name of the pre-tokenizer ("smollm"), not its two steps.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.save_pretrained(folder)
    # The parent made the folder readable for its owner only. Let other users read the model.
    for path in (*folder.iterdir(), folder):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _start_step(text: str) -> None:
    global _step
    _step = text
    print(f"progress: {text}", flush=True)


def _exit_with_parent(folder: Path) -> None:
    sys.stdin.read()
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _report_progress() -> None:
    began_s = time.monotonic()
    while True:
        time.sleep(_PROGRESS_PERIOD_S)
        print(f"progress: {_step}, {time.monotonic() - began_s:.0f} s", flush=True)


def main() -> None:
    gguf, folder = Path(sys.argv[1]), Path(sys.argv[2])
    threading.Thread(target=_report_progress, daemon=True).start()
    threading.Thread(target=_exit_with_parent, args=(folder,), daemon=True).start()
    convert(gguf, folder)


if __name__ == "__main__":
    main()
