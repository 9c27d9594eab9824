"""What is trained whole crosses over both ways: embeddings and head, apart and tied, biases, and tokens that were added."""
import json
from pathlib import Path

import pytest
import torch
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
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from runtimes import LlamaCpp, largest_difference, lengths
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

BOTH = ["embed_tokens", "lm_head"]
SHORT = ("train.max_steps=4", "base.compute=f32")
ADDED = [f"<|hum-{n}|>" for n in range(6)]  # the tiny bases have four rows to spare, so that two are new


def log_probs_agree(found: torch.Tensor, expected: torch.Tensor) -> float:
    difference = (found.log_softmax(-1) - expected.log_softmax(-1)).abs().max().item()
    assert difference < 1e-4, difference
    return difference


def saved_by_pefts_rules(adapter: Path, model) -> None:
    saved = load_file(adapter / "adapter_model.safetensors")
    expected = get_peft_model_state_dict(model)
    assert {k: v.shape for k, v in saved.items()} == {k: v.shape for k, v in expected.items()}


@pytest.mark.parametrize("base, settings", [
    ("gqa", {"modules_to_save": BOTH}),
    ("gqa", {"modules_to_save": ["lm_head"], "layers_to_transform": [1]}),
    ("tied", {"modules_to_save": BOTH, "ensure_weight_tying": True}),
    ("tied", {"modules_to_save": BOTH}),
    ("tied", {"modules_to_save": ["embed_tokens"]}),
    ("tied", {"modules_to_save": ["lm_head"]}),
    ("bias", {"bias": "all"}),
    ("bias", {"bias": "lora_only", "use_dora": True}),
])  # fmt: skip
def test_pronk_loads_merges_and_passes_on_what_peft_saved(base, settings, tmp_path):
    base = GOLDEN / f"tiny-{base}"
    adapter = save_random_adapter(base, tmp_path / "adapter", ["q_proj", "up_proj"], std=0.2, **settings)
    weights = load_file(adapter / "adapter_model.safetensors")
    torch.manual_seed(1)
    shared = torch.randn_like(load_file(base / "model.safetensors")["model.embed_tokens.weight"].float())
    for name, tensor in weights.items():  # what PEFT copies from the base changes nothing yet
        if "lora_" not in name:
            noise = shared if settings.get("ensure_weight_tying") else torch.randn_like(tensor)
            tensor += 0.2 * noise
    save_file(weights, adapter / "adapter_model.safetensors", {"format": "pt"})

    found = pronk_logits(tmp_path / "logits.safetensors", base, adapter)
    expected = logits_of(load(base, adapter), found.token_ids)
    log_probs_agree(found.logits, expected)
    assert_different(found.logits, logits_of(load(base), found.token_ids))

    pronk("export", "--base", base, "--adapter", adapter, "--to", "peft", "--out", tmp_path / "peft")
    log_probs_agree(logits_of(load(base, tmp_path / "peft"), found.token_ids), expected)
    pronk("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "merged", "--dtype", "f32")
    log_probs_agree(logits_of(load(tmp_path / "merged"), found.token_ids), expected)
    merged = pronk_logits(tmp_path / "merged.safetensors", tmp_path / "merged")
    log_probs_agree(merged.logits, expected)
    config = json.loads((tmp_path / "merged" / "config.json").read_text())
    parted = base.name == "tiny-tied" and not settings.get("ensure_weight_tying")
    assert config["tie_word_embeddings"] == (base.name != "tiny-gqa" and not parted)


@pytest.mark.parametrize("base, settings", [
    ("gqa", ["lora.modules_to_save=['embed_tokens', 'lm_head']"]),
    ("gqa", ["lora.modules_to_save=['lm_head']", "train.optimizer=muon"]),
    ("tied", ["lora.modules_to_save=['embed_tokens']", "train.optimizer=lion"]),
    ("tied", ["lora.modules_to_save=['embed_tokens', 'lm_head']", "lora.ensure_weight_tying=false"]),
    ("bias", ["lora.bias=all", "lora.target_modules=['q_proj']", "train.optimizer=adamw8bit"]),
    ("bias", ["lora.bias=lora_only", "lora.use_dora=true"]),
])  # fmt: skip
def test_peft_loads_what_pronk_trained(base, settings, tmp_path):
    base = GOLDEN / f"tiny-{base}"
    adapter = train(tmp_path, base, *SHORT, *settings) / "adapter"
    found = pronk_logits(tmp_path / "logits.safetensors", base, adapter)
    model = load(base, adapter)
    log_probs_agree(found.logits, logits_of(model, found.token_ids))
    assert_different(found.logits, logits_of(load(base), found.token_ids))
    saved_by_pefts_rules(adapter, model)
    plain = load_file(base / "model.safetensors")
    whole = {k: v for k, v in load_file(adapter / "adapter_model.safetensors").items() if "lora_" not in k}
    assert whole
    for name, tensor in whole.items():
        name = name.removeprefix("base_model.model.").replace(".base_layer", "")
        start = plain.get(name, plain["model.embed_tokens.weight"]).float()
        assert not torch.equal(tensor, start), f"{name} has not moved"


@pytest.mark.parametrize("base, rows", [("gqa", 266), ("tied", 266), ("qwen2-like", 266)])
def test_added_tokens_travel_with_adapter_and_merged_model(base, rows, tmp_path):
    base = GOLDEN / ("tiny-bias" if base == "qwen2-like" else f"tiny-{base}")
    text = f"{TEXT}{ADDED[0]}{ADDED[5]} hm"
    run = train(tmp_path, base, *SHORT, f"tokens.add={json.dumps(ADDED)}")
    adapter = run / "adapter"

    # As the card says it: the tokenizer of the adapter, the base resized, then PEFT.
    card = (adapter / "README.md").read_text()
    assert f"model.resize_token_embeddings({rows})\n" in card and 'AutoTokenizer.from_pretrained(".")' in card
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    ids = tokenizer(text)["input_ids"]
    assert {260, 265} <= set(ids) and tokenizer.decode([260, 265]) == f"{ADDED[0]}{ADDED[5]}"
    model = load(base)
    model.resize_token_embeddings(rows)
    model = PeftModel.from_pretrained(model, adapter).eval()
    # PEFT itself would write both a second time here, and what the base had.
    saved = load_file(adapter / "adapter_model.safetensors").keys()
    again = (".original_module.weight", ".modules_to_save.weight")
    assert saved == {name for name in get_peft_model_state_dict(model) if not name.endswith(again)}

    found = pronk_logits(tmp_path / "logits.safetensors", base, adapter, text)
    assert found.token_ids.tolist() == ids and found.logits.shape[1] == rows
    expected = logits_of(model, found.token_ids)
    log_probs_agree(found.logits, expected)

    merged = tmp_path / "merged"
    pronk("merge", "--base", base, "--adapter", adapter, "--out", merged, "--dtype", "f32")
    assert json.loads((merged / "config.json").read_text())["vocab_size"] == rows
    assert AutoTokenizer.from_pretrained(merged)(text)["input_ids"] == ids
    assert_same(logits_of(load(merged), found.token_ids), expected)

    pytest.importorskip("xllamacpp")
    pronk("merge", "--base", base, "--adapter", adapter, "--out", tmp_path / "gguf", "--format", "gguf", "--gguf-type", "f32")
    llama = LlamaCpp(tmp_path / "gguf" / "model.gguf")
    assert llama.token_count(text) == len(ids)
    after = llama.after(ids, rows)
    wanted = torch.stack([expected[n - 1] for n in lengths(ids)]).log_softmax(-1)
    assert largest_difference(f"{base.name} with new tokens, merged GGUF", after, wanted) < 1e-3


@pytest.mark.parametrize("saved", [BOTH, None])
def test_an_adapter_that_peft_saved_over_a_resized_base(saved, tmp_path):
    """Without modules_to_save, too, PEFT writes embeddings and head of a base that was resized."""
    base = GOLDEN / "tiny-tied"
    torch.manual_seed(0)
    model = load(base)
    model.resize_token_embeddings(270)
    config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM", modules_to_save=saved, ensure_weight_tying=bool(saved))
    model = get_peft_model(model, config)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    found = pronk_logits(tmp_path / "logits.safetensors", base, tmp_path / "adapter")
    assert found.logits.shape[1] == 270
    log_probs_agree(found.logits, logits_of(model.eval(), found.token_ids))


def test_new_rows_start_as_the_mean_of_the_old_ones(tmp_path):
    base = GOLDEN / "tiny-gqa"
    run = train(tmp_path, base, *SHORT, f"tokens.add={json.dumps(ADDED)}", "train.save_steps=4", "train.keep_last=9")
    start = load_file(run / "checkpoints" / "step-000000" / "adapter_model.safetensors")
    plain = load_file(base / "model.safetensors")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        weight = start[f"base_model.model.{name}"]
        assert torch.equal(weight[:264], plain[name])
        torch.testing.assert_close(weight[264:], plain[name].mean(0).expand(2, -1), rtol=1e-5, atol=1e-6)
