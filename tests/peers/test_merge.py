"""transformers loads what `pronk merge` wrote, and means and says the same."""
import json

import pytest
import torch
from helpers import (
    GOLDEN,
    assert_same,
    assert_same_greedy_text,
    load,
    logits_of,
    pronk,
    pronk_logits,
    save_random_adapter,
)
from safetensors.torch import load_file
from transformers import AutoTokenizer


@pytest.mark.parametrize("variant", ["gqa", "tied"])
def test_merged_tiny_llama(variant, tmp_path):
    base, adapter, merged = GOLDEN / f"tiny-{variant}", GOLDEN / f"adapter-{variant}", tmp_path / "merged"
    pronk("merge", "--base", base, "--adapter", adapter, "--out", merged, "--dtype", "f32")
    model = load(merged)
    found = pronk_logits(tmp_path / "logits.safetensors", merged)
    assert_same(found.logits, logits_of(model, found.token_ids))
    assert_same(found.logits, logits_of(load(base, adapter), found.token_ids))

    tensors = load_file(merged / "model.safetensors")
    assert tensors.keys() == load_file(base / "model.safetensors").keys()
    assert {t.dtype for t in tensors.values()} == {torch.float32}
    config = json.loads((merged / "config.json").read_text())
    assert config["dtype"] == config["torch_dtype"] == "float32"


def test_merged_tiny_llama_says_the_same(trained, tmp_path):
    base, merged = GOLDEN / "tiny-gqa", tmp_path / "merged"
    pronk("merge", "--base", base, "--adapter", trained, "--out", merged)
    model, tokenizer = load(merged), AutoTokenizer.from_pretrained(merged)
    assert_same_greedy_text(model, tokenizer, "alpaca-short", (merged, None), (base, trained))


def test_merge_keeps_the_names_and_dtypes_of_a_sharded_base(tmp_path):
    base, merged = GOLDEN / "tiny-head-dim", tmp_path / "merged"
    adapter = save_random_adapter(base, tmp_path / "adapter", ["q_proj", "down_proj"], std=0.1)
    pronk("merge", "--base", base, "--adapter", adapter, "--out", merged)
    before, after = ({f.name: load_file(f) for f in d.glob("model*.safetensors")} for d in (base, merged))
    assert {f: {n: (t.dtype, t.shape) for n, t in ts.items()} for f, ts in after.items()} == {
        f: {n: (t.dtype, t.shape) for n, t in ts.items()} for f, ts in before.items()
    }
    # Rounded to bfloat16 only once: equal to PEFT's own merge.
    expected = load(base, adapter).merge_and_unload().to(torch.bfloat16).state_dict()
    for tensors in after.values():
        for name, tensor in tensors.items():
            torch.testing.assert_close(tensor, expected[name], rtol=2**-7, atol=1e-6)


def test_merged_gguf(gguf, smollm2_hf, smollm2_adapter, smollm2_merged, tmp_path):
    model = load(smollm2_merged)
    found = pronk_logits(tmp_path / "logits.safetensors", smollm2_merged)
    assert_same(found.logits, logits_of(model, found.token_ids))
    assert_same(found.logits, logits_of(load(smollm2_hf, smollm2_adapter), found.token_ids))

    tokenizer = AutoTokenizer.from_pretrained(smollm2_merged)
    assert_same_greedy_text(model, tokenizer, "alpaca", (smollm2_merged, None), (gguf, smollm2_adapter))
