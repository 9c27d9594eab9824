"""PiSSA's start is PEFT's, and what is trained from it loads in PEFT over the base as it is."""
import json

import torch
from conftest import RECIPE
from helpers import GOLDEN, ROOT, assert_same, load, logits_of, pronk, pronk_logits
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file


def train(folder, base, *settings):
    paths = {"base": base, "data": ROOT / "datasets" / "pronk.json", "run": folder / "run"}
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(**{key: json.dumps(str(path)) for key, path in paths.items()}))
    changes = [argument for setting in settings for argument in ("--set", setting)]
    pronk("train", recipe, *changes)
    return folder / "run"


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
