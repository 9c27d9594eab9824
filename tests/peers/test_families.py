"""transformers loads what pronk makes of every family's GGUF file, its configuration included, and says the same."""
import json
import shutil

import pytest
from helpers import GOLDEN, assert_same, load, logits_of, pronk, pronk_logits

TEXT = "Is an alpaca a llama? No, 1 + 1 = 2."
# What GGUF files have no key for: there, a base is as usual.
CHANGES = {
    "mistral": {"sliding_window": None},
    "qwen2": {"use_sliding_window": False},
    "qwen3": {},
    "gemma2": {"query_pre_attn_scalar": 16},
    "gemma3": {"query_pre_attn_scalar": 16},
    "phi3": {},
}


@pytest.mark.parametrize("name", CHANGES)
def test_merged_gguf_of_a_family(name, tmp_path):
    base, merged, adapter = tmp_path / "base", tmp_path / "merged", GOLDEN / f"adapter-{name}"
    shutil.copytree(GOLDEN / f"tiny-{name}", base)
    config = json.loads((base / "config.json").read_text()) | CHANGES[name]
    (base / "config.json").write_text(json.dumps(config))

    pronk("merge", "--base", GOLDEN / f"{name}.gguf", "--adapter", adapter, "--out", merged)
    found = pronk_logits(tmp_path / "logits.safetensors", merged, text=TEXT)
    assert len(found.token_ids) > 30 and 0 not in found.token_ids
    assert_same(found.logits, logits_of(load(merged), found.token_ids))
    assert_same(found.logits, logits_of(load(base, adapter), found.token_ids))
