"""What vLLM asks of an adapter before it loads it, written out from its source: vLLM itself is too large to install here.

vllm/lora/peft_helper.py and vllm/lora/lora_model.py of https://github.com/vllm-project/vllm: the keys that it takes from
adapter_config.json, the features that it refuses, the rank that it makes room for, and the names of tensors.
"""
import json
import math
import re

import pytest
from helpers import GOLDEN, pronk
from safetensors.torch import load_file

DEFAULT_MAX_RANK = 16
NAME = re.compile(r"base_model\.model\.(model\.layers\.\d+\.\w+\.\w+)\.lora_([AB])\.weight")


def validated(folder):
    """Refuses what vLLM refuses; returns the configuration and the scale that it computes."""
    config = json.loads((folder / "adapter_config.json").read_text())
    for required in ("r", "lora_alpha", "target_modules"):
        assert required in config, required
    assert isinstance(config["r"], int) and isinstance(config["target_modules"], (list, str))
    assert config.get("bias", "none") == "none", "bias"
    assert not config.get("modules_to_save"), "only supports modules_to_save being None"
    assert not config.get("use_dora"), "does not support DoRA"
    rank = config["r"]
    return config, config["lora_alpha"] / (math.sqrt(rank) if config.get("use_rslora") else rank)


@pytest.mark.parametrize("adapter, name, scale", [("gqa", "gqa", 2.0), ("tied", "tied", 2.0), ("rslora", "gqa", 8 / math.sqrt(8))])
def test_an_exported_adapter_passes(adapter, name, scale, tmp_path):
    pronk("export", "--base", GOLDEN / f"tiny-{name}", "--adapter", GOLDEN / f"adapter-{adapter}", "--to", "vllm", "--out",
          tmp_path / "out")  # fmt: skip
    config, found = validated(tmp_path / "out")
    assert config["r"] <= DEFAULT_MAX_RANK
    assert math.isclose(found, scale)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    modules = set()
    for key, tensor in tensors.items():
        module, half = NAME.fullmatch(key).groups()
        assert module.rsplit(".", 1)[1] in config["target_modules"]
        assert tensor.shape[0 if half == "A" else 1] == config["r"]
        modules.add(module)
    assert len(tensors) == 2 * len(modules)
