"""Adapters cross over both ways: PEFT loads pronk's, pronk loads PEFT's, and the logits are the same."""
import json

import pytest
from conftest import train
from helpers import (
    GOLDEN,
    TEXT,
    assert_different,
    assert_same,
    load,
    logits_of,
    pronk,
    pronk_logits,
    save_random_adapter,
)
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
    base = GOLDEN / "tiny-bias"
    run = train(tmp_path, base, "lora.use_dora=true", "train.max_steps=4", "base.compute=f32")
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


@pytest.mark.parametrize("settings", [
    {"target_modules": r".*layers\.[01]\.(self_attn\.(q|k)|mlp\.up)_proj"},
    {"target_modules": r"model\.layers\.\d+\..*_proj", "exclude_modules": r".*layers\.0\..*(q|down)_proj"},
    {"target_modules": "all-linear", "exclude_modules": ["layers.1.self_attn.o_proj", "v_proj"]},
])  # fmt: skip
def test_modules_by_regular_expressions(settings, tmp_path):
    """Chosen alike, saved alike: PEFT's adapter here, and after an export in PEFT again."""
    base = GOLDEN / "tiny-gqa"
    settings = {"exclude_modules": None} | settings
    adapter = save_random_adapter(base, tmp_path / "adapter", settings["target_modules"], std=0.3, exclude_modules=settings["exclude_modules"])
    found = pronk_logits(tmp_path / "logits.safetensors", base, adapter)
    assert_same(found.logits, logits_of(load(base, adapter), found.token_ids))
    assert_different(found.logits, logits_of(load(base), found.token_ids))
    pronk("export", "--base", base, "--adapter", adapter, "--to", "peft", "--out", tmp_path / "out")
    assert_same(found.logits, logits_of(load(base, tmp_path / "out"), found.token_ids))
    saved, theirs = (load_file(d / "adapter_model.safetensors") for d in (tmp_path / "out", adapter))
    assert saved.keys() == theirs.keys()


def test_a_run_chooses_by_an_expression_as_peft_does(tmp_path):
    base = GOLDEN / "tiny-gqa"
    pattern = r"model\.layers\.1\.(self_attn\.o|mlp\.gate)_proj"
    run = train(tmp_path, base, f"lora.target_modules='{pattern}'", "train.max_steps=2")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert config["target_modules"] == pattern
    expected = get_peft_model_state_dict(load(base, run / "adapter"))
    assert load_file(run / "adapter" / "adapter_model.safetensors").keys() == expected.keys()
    assert len(expected) == 4
