"""PiSSA's and LoftQ's starts are PEFT's, and what is trained from them, or beside what is restored, loads in PEFT."""
import json

import pytest
import torch
from conftest import train
from helpers import GOLDEN, assert_same, load, logits_of, pronk, pronk_logits
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

PREFIX = "base_model.model."


def test_pissa_starts_as_pefts_and_loads_over_the_base_as_it_is(tmp_path):
    base = GOLDEN / "tiny-bias"
    run = train(tmp_path, base, "lora.init_lora_weights=pissa", "train.max_steps=6", "train.save_steps=6",
                "train.keep_last=9", "base.compute=f32", "train.learning_rate=3e-3")  # fmt: skip
    config = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights="pissa")
    model = get_peft_model(load(base), config)
    start = load_file(run / "checkpoints" / "step-000000" / "adapter_model.safetensors")
    compared = 0
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and f"{name}.lora_A.weight" in start:
            a, b = (start[f"{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
            assert torch.equal(a[:4], a[4:]) and torch.equal(b[:, :4], -b[:, 4:]), "the start takes itself away"
            expected = module.lora_B["default"].weight @ module.lora_A["default"].weight
            assert_same(b[:, :4] @ a[:4], expected)
            compared += 1
    assert compared == 14

    found = pronk_logits(tmp_path / "logits.safetensors", base, run / "adapter")
    assert_same(found.logits, logits_of(load(base, run / "adapter"), found.token_ids))
    assert (found.logits - logits_of(load(base), found.token_ids)).abs().max() > 1e-2


def test_loftq_starts_as_well_as_pefts_and_loads_over_the_quantized_base(smollm2_hf, tmp_path, monkeypatch):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    from peft.utils.loftq_utils import _low_rank_decomposition

    monkeypatch.setenv("PRONK_CACHE", str(tmp_path / "cache"))
    run = train(tmp_path, smollm2_hf, "base.quantize=nf4", "lora.init_lora_weights=loftq", "lora.rank=8", "lora.alpha=8",
                "lora.target_modules=['o_proj', 'up_proj']", "train.max_steps=2", "train.batch_size=1",
                "train.micro_batch_size=1", "train.save_steps=2", "base.compute=f32", "run.samples=0")  # fmt: skip
    (quantized,) = (tmp_path / "cache").iterdir()
    model = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32, attn_implementation="eager").eval()
    original = load(smollm2_hf)
    start = load_file(run / "checkpoints" / "step-000000" / "adapter_model.safetensors")
    for layer in (0, 17, 29):
        for name in (f"model.layers.{layer}.self_attn.o_proj", f"model.layers.{layer}.mlp.up_proj"):
            weight = model.get_submodule(name).weight
            now = bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
            lost = original.get_submodule(name).weight.data - now
            best = _low_rank_decomposition(lost, reduced_rank=8)
            a, b = (start[f"{PREFIX}{name}.{factor}.weight"] for factor in ("lora_A", "lora_B"))
            ours, pefts = (lost - b @ a).norm(), (lost - best["L"] @ best["R"]).norm()
            # alpha is the rank: PEFT's LoftQ leaves the scale out. Its directions are exact, ours are random at first.
            assert ours < 1.001 * pefts < 0.999 * lost.norm(), f"{name}: {ours} {pefts} {lost.norm()}"

    found = pronk_logits(tmp_path / "logits.safetensors", smollm2_hf, run / "adapter")
    peft = PeftModel.from_pretrained(spelled_out(model, smollm2_hf), run / "adapter")
    assert_same(found.logits, logits_of(peft, found.token_ids))
    assert json.loads((run / "adapter" / "adapter_config.json").read_text())["loftq_config"]["loftq_bits"] == 4


def test_what_is_fixed_beside_an_adapter_stays_and_loads_with_it(smollm2_hf, tmp_path, monkeypatch):
    pytest.importorskip("bitsandbytes")
    monkeypatch.setenv("PRONK_CACHE", str(tmp_path / "cache"))
    run = train(tmp_path, smollm2_hf, "base.quantize=nf4", "lora.restore_rank=200", "lora.target_modules=['v_proj', 'up_proj']",
                "train.max_steps=2", "train.batch_size=1", "train.micro_batch_size=1", "train.save_steps=2",
                "train.keep_last=9", "base.compute=f32", "run.samples=0")  # fmt: skip
    (quantized,) = (tmp_path / "cache").iterdir()
    start = load_file(run / "checkpoints" / "step-000000" / "adapter_model.safetensors")
    end = load_file(run / "adapter" / "adapter_model.safetensors")
    for module, fixed in (("self_attn.v_proj", 192), ("mlp.up_proj", 200)):
        name = f"{PREFIX}model.layers.3.{module}"
        (a, b), (first, nothing) = ([them[f"{name}.lora_{factor}.weight"] for factor in "AB"] for them in (end, start))
        assert (a.shape[0], b.shape[1]) == (4 + fixed, 4 + fixed)
        assert torch.equal(a[4:], first[4:]) and torch.equal(b[:, 4:], nothing[:, 4:])
        assert not nothing[:, :4].any() and b[:, :4].any() and not torch.equal(a[:4], first[:4])

    model = AutoModelForCausalLM.from_pretrained(quantized, dtype=torch.float32, attn_implementation="eager").eval()
    plain, original = spelled_out(model, smollm2_hf), load(smollm2_hf)
    found = pronk_logits(tmp_path / "logits.safetensors", smollm2_hf, run / "adapter")
    of_base, of_original = (logits_of(model, found.token_ids) for model in (plain, original))
    peft = PeftModel.from_pretrained(plain, run / "adapter")
    assert_same(found.logits, logits_of(peft, found.token_ids))
    assert (found.logits - of_original).norm() < 0.9 * (of_base - of_original).norm()


def spelled_out(model, base):
    """In a model of plain linear layers what `model`'s are: those of bitsandbytes round what they multiply with as well."""
    import bitsandbytes

    plain = load(base)
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            plain.get_submodule(name).weight.data = weight.float()
    plain.get_input_embeddings().weight.data = model.get_input_embeddings().weight.data.float()
    return plain
