#!/usr/bin/env python3
"""SmolLM2's GGUF as a Hugging Face directory that old and new readers agree on.

    smollm2_to_hf.py FILE.gguf OUT float32|bfloat16

transformers does the work: it dequantizes and undoes the permutation of the q and k rows. What it gets wrong, or writes
for its newest readers only, is put right here.
"""
import json
import sys
from pathlib import Path

import torch
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.utils import logging


def write_model(gguf: Path, out: Path, dtype: torch.dtype) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config  # says "gguf" of weights that are dense by now
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = dtype
    config.rms_norm_eps = round(config.rms_norm_eps, 9)  # a float32 of 1e-5 in the GGUF

    # A model that was loaded from a GGUF refuses to be saved; a fresh one with its weights does not.
    model = type(loaded)(config).to(dtype)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(out)
    (out / "model.safetensors").chmod(0o644)

    saved = read_json(out / "config.json")
    # Readers before transformers 5 look for these names.
    saved["rope_theta"] = saved["rope_parameters"]["rope_theta"]
    saved["rope_scaling"] = None
    saved["torch_dtype"] = saved["dtype"]
    saved.pop("_model_name_or_path", None)
    write_json(out / "config.json", saved)


def write_tokenizer(gguf: Path, out: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF's pre-tokenizer is "smollm": digits one by one, then GPT-2's. transformers takes GPT-2's alone.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.save_pretrained(out)

    saved = read_json(out / "tokenizer_config.json")
    saved["tokenizer_class"] = "PreTrainedTokenizerFast"  # its new name means nothing to transformers 4
    saved["chat_template"] = tokenizer.chat_template  # else only in chat_template.jinja
    for key in ("backend", "is_local", "local_files_only"):
        saved.pop(key, None)
    write_json(out / "tokenizer_config.json", saved)


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def main() -> None:
    if len(sys.argv) != 4 or sys.argv[3] not in ("float32", "bfloat16"):
        sys.exit("usage: smollm2_to_hf.py FILE.gguf OUT float32|bfloat16")
    gguf, out, dtype = Path(sys.argv[1]).resolve(), Path(sys.argv[2]), getattr(torch, sys.argv[3])
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    out.mkdir(parents=True, exist_ok=True)
    write_model(gguf, out, dtype)
    write_tokenizer(gguf, out)


if __name__ == "__main__":
    main()
