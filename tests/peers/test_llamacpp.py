"""llama.cpp loads the GGUF files that pronk writes, and means the same as transformers and PEFT."""
import json
import shutil

import pytest
from helpers import GOLDEN, load, pronk
from runtimes import LlamaCpp, expected_after, float32_gguf, largest_difference, runtime
from safetensors.torch import load_file
from test_families import CHANGES
from transformers import AutoTokenizer

runtime("xllamacpp")
# llama.cpp looks GELU up in a table of float16.
TOLERANCE = {"gemma2": 3e-3, "gemma3": 3e-3}
TEXT = "Alpacas hum. Say in two words why 1 + 1 = 2, please, and hum again, a little louder this time."


def hugging_face(name, folder):
    """The tiny checkpoint of a family, as its GGUF file has it."""
    shutil.copytree(GOLDEN / f"tiny-{name}", folder)
    config = json.loads((folder / "config.json").read_text()) | CHANGES.get(name, {})
    if name == "phi3":
        config["sliding_window"] = None  # llama.cpp leaves Phi-3's out
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def token_ids(name):
    return load_file(GOLDEN / f"tiny-{name}" / "expected.safetensors")["token_ids"].tolist()


@pytest.mark.parametrize("name", CHANGES)
def test_adapter_of_a_family(name, tmp_path):
    base, ids = hugging_face(name, tmp_path / "base"), token_ids(name)
    pronk("export", "--base", GOLDEN / f"{name}.gguf", "--adapter", GOLDEN / f"adapter-{name}", "--to", "gguf", "--out",
          tmp_path / "out")  # fmt: skip
    model = float32_gguf(GOLDEN / f"{name}.gguf", tmp_path / "base.gguf")
    expected = expected_after(load(base, GOLDEN / f"adapter-{name}"), ids)
    found = LlamaCpp(model, tmp_path / "out" / "adapter.gguf").after(ids, expected.shape[1])
    assert largest_difference(f"{name}, adapter", found, expected) < TOLERANCE.get(name, 1e-3)
    alone = LlamaCpp(model).after(ids, expected.shape[1])
    assert largest_difference(f"{name}, base alone", alone, expected) > 0.1


@pytest.fixture(scope="module")
def smollm2(smollm2_hf, smollm2_adapter):
    """Token ids, and what PEFT says after them."""
    ids = AutoTokenizer.from_pretrained(smollm2_hf)(TEXT)["input_ids"]
    return ids, expected_after(load(smollm2_hf, smollm2_adapter), ids)


def test_adapter_of_smollm2(gguf, smollm2, smollm2_adapter, tmp_path):
    ids, expected = smollm2
    pronk("export", "--base", gguf, "--adapter", smollm2_adapter, "--to", "gguf", "--out", tmp_path / "out")
    model = float32_gguf(gguf, tmp_path / "base.gguf")
    found = LlamaCpp(model, tmp_path / "out" / "adapter.gguf").after(ids, expected.shape[1])
    assert largest_difference("SmolLM2, adapter", found, expected) < 1e-3
