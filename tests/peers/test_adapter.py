"""Adapters cross over both ways: PEFT loads pronk's, pronk loads PEFT's, and the logits are the same."""
import json

import pytest
from conftest import RECIPE
from helpers import GOLDEN, ROOT, TEXT, assert_different, assert_same, load, logits_of, pronk, pronk_logits
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoTokenizer


def test_peft_loads_what_pronk_trained(trained, tmp_path):
    base = GOLDEN / "tiny-gqa"
    found = pronk_logits(tmp_path / "logits.safetensors", base, trained)
    model = load(base, trained)
    assert_same(found.logits, logits_of(model, found.token_ids))
    assert_different(found.logits, logits_of(load(base), found.token_ids))

    # PEFT warns of missing tensors and says nothing of surplus ones.
    saved = load_file(trained / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model)
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in expected.items()}
    assert len(saved) == 28
    for name, tensor in saved.items():
        assert tensor.abs().max() > 0, f"{name} is all zero after training"


@pytest.mark.parametrize("adapter, base", [("gqa", "gqa"), ("tied", "tied"), ("rslora", "gqa"), ("patterns", "gqa"), ("dora", "bias")])
def test_pronk_loads_what_peft_saved(adapter, base, tmp_path):
    base, adapter = GOLDEN / f"tiny-{base}", GOLDEN / f"adapter-{adapter}"
    found = pronk_logits(tmp_path / "logits.safetensors", base, adapter)
    assert_same(found.logits, logits_of(load(base, adapter), found.token_ids))
    assert_different(found.logits, logits_of(load(base), found.token_ids))


@pytest.mark.parametrize("variant", ["gqa", "tied", "bias", "head-dim", "rope-linear", "rope-llama3"])
def test_bases_agree_on_a_text(variant, tmp_path):
    base = GOLDEN / f"tiny-{variant}"
    found = pronk_logits(tmp_path / "logits.safetensors", base)
    assert found.token_ids.tolist() == AutoTokenizer.from_pretrained(base)(TEXT)["input_ids"]
    assert_same(found.logits, logits_of(load(base), found.token_ids))


def test_smollm2_with_a_peft_adapter(gguf, smollm2_hf, smollm2_adapter, tmp_path):
    found = pronk_logits(tmp_path / "logits.safetensors", gguf, smollm2_adapter)
    assert_same(found.logits, logits_of(load(smollm2_hf, smollm2_adapter), found.token_ids))
    assert_different(found.logits, logits_of(load(smollm2_hf), found.token_ids))


@pytest.mark.parametrize("method, other", [("cat", "rslora"), ("linear", "gqa")])
def test_combined_as_peft_combines(method, other, tmp_path):
    base, first, second = GOLDEN / "tiny-gqa", GOLDEN / "adapter-gqa", GOLDEN / f"adapter-{other}"
    out = tmp_path / "combined"
    pronk("adapter", "combine", "--adapter", first, "--weight", "0.7", "--adapter", second, "--weight", "-0.4",
          "--out", out, "--method", method)  # fmt: skip
    found = pronk_logits(tmp_path / "logits.safetensors", base, out)
    assert_same(found.logits, logits_of(load(base, out), found.token_ids))

    model = load(base, first)
    model.load_adapter(str(second), "second")
    model.add_weighted_adapter(["default", "second"], [0.7, -0.4], "both", combination_type=method)
    model.set_adapter("both")
    assert_same(found.logits, logits_of(model, found.token_ids))


def test_dora_trained_here_loads_in_peft(tmp_path):
    base, run = GOLDEN / "tiny-bias", tmp_path / "run"
    recipe = tmp_path / "recipe.toml"
    paths = {"base": base, "data": ROOT / "datasets" / "pronk.json", "run": run}
    recipe.write_text(RECIPE.format(**{key: json.dumps(str(path)) for key, path in paths.items()}))
    pronk("train", recipe, "--set", "lora.use_dora=true", "--set", "train.max_steps=4", "--set", "base.compute=f32")
    found = pronk_logits(tmp_path / "logits.safetensors", base, run / "adapter")
    assert_same(found.logits, logits_of(load(base, run / "adapter"), found.token_ids))
    saved = load_file(run / "adapter" / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(load(base, run / "adapter"))
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in expected.items()}
    assert sum("magnitude" in name for name in saved) == 14


def test_extracted_adapter_is_the_merged_one(tmp_path):
    base, adapter = GOLDEN / "tiny-gqa", GOLDEN / "adapter-gqa"
    merged, out = tmp_path / "merged", tmp_path / "extracted"
    pronk("merge", "--base", base, "--adapter", adapter, "--out", merged, "--dtype", "f32")
    pronk("adapter", "extract", "--base", base, "--tuned", merged, "--rank", "4", "--out", out)
    found = pronk_logits(tmp_path / "logits.safetensors", base, adapter)
    assert_same(found.logits, logits_of(load(base, out), found.token_ids))
