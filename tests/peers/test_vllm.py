"""vLLM's own check of an adapter, run alone, takes what pronk exports for it and reads the same ranks and scales.

`scripts/vllm-helper` fetches two modules of vLLM's wheel. What is run of them: PEFTHelper, which reads adapter_config.json,
refuses what vLLM cannot do, and computes every module's rank and scale; and parse_fine_tuned_lora_name, which refuses names
of tensors that vLLM does not know. Everything else that they import is a stub here. vLLM does not load the tensors here,
nor does it answer: it wants a graphics card.
"""
import ast
import importlib.util
import json
import math
import re
import sys
from dataclasses import dataclass
from types import ModuleType, SimpleNamespace

import pytest
from helpers import GOLDEN, ROOT, pronk, save_random_adapter
from safetensors.torch import load_file

SOURCE = ROOT / "target" / "vllm" / "vllm" / "lora"
if not (SOURCE / "peft_helper.py").is_file():
    pytest.skip("scripts/vllm-helper has not been run", allow_module_level=True)
pytest.importorskip("regex")


@dataclass
class LoRAConfig:
    max_lora_rank: int = 16  # vLLM's default


def peft_helper():
    """vLLM's class, with stubs for the two modules of vLLM's that its file imports."""
    stubs = {name: ModuleType(name) for name in ("vllm", "vllm.config", "vllm.config.lora", "vllm.logger")}
    stubs["vllm.config.lora"].LoRAConfig = LoRAConfig
    stubs["vllm.logger"].init_logger = lambda name: SimpleNamespace(info_once=lambda *_: None)
    spec = importlib.util.spec_from_file_location("vllm_peft_helper", SOURCE / "peft_helper.py")
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        for name, stub in {**stubs, spec.name: module}.items():
            patch.setitem(sys.modules, name, stub)
        spec.loader.exec_module(module)
    return module.PEFTHelper


def name_parser():
    """One function of a file that imports most of vLLM."""
    tree = ast.parse((SOURCE / "utils.py").read_text())
    function = next(n for n in tree.body if getattr(n, "name", None) == "parse_fine_tuned_lora_name")
    scope = {}
    exec(compile(ast.Module([function], []), "utils.py", "exec"), scope)
    return scope[function.name]


def export(base, adapter, out):
    pronk("export", "--base", base, "--adapter", adapter, "--to", "vllm", "--out", out)
    return out


@pytest.mark.parametrize("adapter, name", [("gqa", "gqa"), ("tied", "tied"), ("rslora", "gqa"), ("patterns", "gqa")])
def test_an_exported_adapter_passes(adapter, name, tmp_path):
    out = export(GOLDEN / f"tiny-{name}", GOLDEN / f"adapter-{adapter}", tmp_path / "out")
    helper = peft_helper().from_local_dir(str(out), max_position_embeddings=None)
    helper.validate_legal(LoRAConfig())
    config = json.loads((GOLDEN / f"adapter-{adapter}" / "adapter_config.json").read_text())
    tensors, modules = load_file(out / "adapter_model.safetensors"), set()
    for key, tensor in tensors.items():
        module, is_a = name_parser()(key)
        rank, scale = helper.get_rank_and_scaling(module)
        assert tensor.shape[0 if is_a else 1] == rank, key
        matching = (a for end, a in config["alpha_pattern"].items() if re.match(rf"(.*\.)?({end})$", module))
        alpha = next(matching, config["lora_alpha"])
        assert math.isclose(scale, alpha / (math.sqrt(rank) if config["use_rslora"] else rank)), key
        modules.add(module)
    assert len(tensors) == 2 * len(modules)


def test_what_is_over_its_default_rank_wants_a_higher_one(tmp_path):
    base = GOLDEN / "tiny-gqa"
    adapter = save_random_adapter(base, tmp_path / "adapter", ["q_proj"], std=0.1, r=24, lora_alpha=24)
    out = export(base, adapter, tmp_path / "out")
    helper = peft_helper().from_local_dir(str(out), max_position_embeddings=None)
    with pytest.raises(ValueError, match="24 is greater than max_lora_rank 16"):
        helper.validate_legal(LoRAConfig())
    helper.validate_legal(LoRAConfig(32))


def test_it_refuses_what_pronk_refuses_to_export(tmp_path):
    helper = peft_helper().from_local_dir(str(GOLDEN / "adapter-dora"), max_position_embeddings=None)
    with pytest.raises(ValueError, match="does not yet support DoRA"):
        helper.validate_legal(LoRAConfig())
    with pytest.raises(AssertionError, match="vllm knows no DoRA"):
        export(GOLDEN / "tiny-bias", GOLDEN / "adapter-dora", tmp_path / "out")


@pytest.mark.parametrize("base, settings, words, ours", [
    ("tied", {"modules_to_save": ["embed_tokens"]}, "modules_to_save", "lora.modules_to_save"),
    ("bias", {"bias": "all"}, "bias", "lora.bias"),
])  # fmt: skip
def test_it_refuses_what_is_trained_whole(base, settings, words, ours, tmp_path):
    base = GOLDEN / f"tiny-{base}"
    adapter = save_random_adapter(base, tmp_path / "adapter", ["q_proj"], std=0.1, **settings)
    helper = peft_helper().from_local_dir(str(adapter), max_position_embeddings=None)
    with pytest.raises(ValueError, match=words):
        helper.validate_legal(LoRAConfig())
    with pytest.raises(AssertionError, match=ours):
        export(base, adapter, tmp_path / "out")
