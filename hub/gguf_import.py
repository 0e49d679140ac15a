"""A GGUF file -> a model folder in Hugging Face's layout.

Owns the order of the steps. Does not know where the file came from or where the folder will live.
"""

from __future__ import annotations

import json
from pathlib import Path

from mili.hub.gguf_config import architecture_of, generation_config, model_config
from mili.hub.gguf_file import GgufFile
from mili.hub.gguf_tokenizer import write_tokenizer
from mili.hub.gguf_weights import plan_weights, write_weights
from mili.hub.progress import Progress


def import_gguf(source: Path, folder: Path, progress: Progress) -> None:
    """Fill the existing, empty `folder`. Raise PullError if MILI cannot run such a model."""
    gguf = GgufFile(source)
    plan = plan_weights(gguf, architecture_of(gguf))
    config = model_config(gguf, dtype=plan.dtype, vocab_size=plan.vocab_size, tied=plan.tied)
    write_tokenizer(gguf, folder)
    for name, contents in {
        "config.json": config,
        "generation_config.json": generation_config(gguf),
    }.items():
        (folder / name).write_text(json.dumps(contents, indent=2) + "\n", encoding="utf-8")
    write_weights(plan, folder / "model.safetensors", config, progress)
