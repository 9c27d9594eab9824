"""Adapters cross over both ways: PEFT loads pronk's, pronk loads PEFT's, and the logits are the same."""
import pytest
from helpers import GOLDEN, TEXT, assert_different, assert_same, load, logits_of, pronk_logits
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
