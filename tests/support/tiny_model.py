"""Makes a tiny random Llama model with SmolLM2's tokenizer, for quick tests of real engines.

``python -m tests.support.tiny_model FOLDER`` writes the model in a few seconds.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from core.config.schema import ModelConfig
from core.model.resolve import resolve_model

# Tests compute KV sizes from these. vLLM's CPU attention supports no smaller HEAD_DIM.
LAYERS = 2
KV_HEADS = 2
HEAD_DIM = 32
MAX_MODEL_LEN = 4096  # tokens
WINDOW = 40  # tokens that a layer of sliding attention sees
BYTES_PER_VALUE = 4  # float32, so that batching changes no token
KV_BYTES_PER_TOKEN = 2 * LAYERS * KV_HEADS * HEAD_DIM * BYTES_PER_VALUE

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


def make_tiny_model(folder: Path, *, seed: int = 0, layer_types: Sequence[str] = ()) -> Path:
    """Write a float32 checkpoint (50 MB) that vLLM and transformers can load. Return ``folder``.

    ``layer_types``: the attention of each layer, as named in the model's configuration. By default,
    all layers have full attention.
    """
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    embedded = Path(resolve_model(ModelConfig(), print).path)
    config = LlamaConfig(
        vocab_size=49152,
        hidden_size=4 * HEAD_DIM,
        intermediate_size=256,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        max_position_embeddings=MAX_MODEL_LEN,
        initializer_range=0.2,  # large, so that the most probable token wins clearly
        tie_word_embeddings=False,  # with tied random weights, the model repeats its input
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
        dtype=torch.float32,
        **({"layer_types": [*layer_types], "sliding_window": WINDOW} if layer_types else {}),
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    model.save_pretrained(folder)
    for name in _TOKENIZER_FILES:
        shutil.copyfile(embedded / name, folder / name)
    return folder


if __name__ == "__main__":
    print(make_tiny_model(Path(sys.argv[1])))
