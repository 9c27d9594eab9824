"""llama.cpp loads the GGUF files that pronk writes, and means the same as transformers and PEFT.

Two roundings are llama.cpp's own on a CPU, whoever wrote the file, and are the reference's here too: GELU comes out of a table
of float16 (alone it takes the tiny Gemmas 1e-3 away), and what is multiplied with a float16 matrix is rounded to float16.
"""
import ctypes
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFReader
from gguf.quants import dequantize
from helpers import GOLDEN, load, pronk, save_random_adapter
from runtimes import (
    LlamaCpp,
    expected_after,
    float32_gguf,
    largest_difference,
    runtime,
    with_float16_inputs,
    with_float16_weights,
    with_table_gelu,
)
from safetensors.torch import load_file, save_file
from test_families import CHANGES
from transformers import AutoTokenizer

runtime("xllamacpp")
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
    expected = expected_after(with_table_gelu(load(base, GOLDEN / f"adapter-{name}")), ids)
    found = LlamaCpp(model, tmp_path / "out" / "adapter.gguf").after(ids, expected.shape[1])
    assert largest_difference(f"{name}, adapter", found, expected) < 1e-3
    alone = LlamaCpp(model).after(ids, expected.shape[1])
    assert largest_difference(f"{name}, base alone", alone, expected) > 0.1


def test_ranks_and_scales_of_their_own(tmp_path):
    """No alpha / rank says these: the scales are in B then."""
    base, ids = hugging_face("mistral", tmp_path / "base"), token_ids("mistral")
    adapter = save_random_adapter(
        base, tmp_path / "adapter", ["q_proj", "k_proj", "down_proj"], std=0.3, lora_alpha=6, use_rslora=True,
        rank_pattern={"q_proj": 2}, alpha_pattern={"down_proj": 5},
    )  # fmt: skip
    pronk("export", "--base", GOLDEN / "mistral.gguf", "--adapter", adapter, "--to", "gguf", "--out", tmp_path / "out")
    model = float32_gguf(GOLDEN / "mistral.gguf", tmp_path / "base.gguf")
    expected = expected_after(load(base, adapter), ids)
    found = LlamaCpp(model, tmp_path / "out" / "adapter.gguf").after(ids, expected.shape[1])
    assert largest_difference("mistral, patterns and rsLoRA", found, expected) < 1e-3


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


def test_merged_smollm2(smollm2, smollm2_merged_f32):
    ids, expected = smollm2
    found = LlamaCpp(smollm2_merged_f32).after(ids, expected.shape[1])
    assert largest_difference("SmolLM2, merged f32", found, expected) < 1e-3


def test_merged_smollm2_in_float16(gguf, smollm2, smollm2_hf, smollm2_adapter, smollm2_merged_f32, tmp_path):
    """The file is llama.cpp's own float16 bit by bit; computed as exactly as it can be, it is within the goal. As llama.cpp
    runs it, it is within the goal of a reference that rounds weights and inputs too, though not nearer to it than 1e-2."""
    ids, exact = smollm2
    merge_gguf(gguf, smollm2_adapter, tmp_path / "out", "f16")
    ours = tmp_path / "out" / "model.gguf"
    assert ours.read_bytes() == requantized(ours, smollm2_merged_f32, tmp_path / "theirs.gguf").read_bytes()

    spelled_out = LlamaCpp(float32_gguf(ours, tmp_path / "f32.gguf")).after(ids, exact.shape[1])
    model = with_float16_weights(load(smollm2_hf, smollm2_adapter).merge_and_unload())
    rounded = expected_after(model, ids)
    assert largest_difference("SmolLM2, merged f16 spelled out, weights alike", spelled_out, rounded) < 1e-3
    assert largest_difference("SmolLM2, merged f16 spelled out", spelled_out, exact) < 2e-2

    found = LlamaCpp(ours).after(ids, exact.shape[1])
    largest_difference("SmolLM2, merged f16 as llama.cpp runs it", found, exact)
    rounded = expected_after(with_float16_inputs(model), ids)
    assert largest_difference("SmolLM2, merged f16, rounded alike", found, rounded) < 2e-2


def merge_gguf(base, adapter, out, kind):
    pronk("merge", "--base", base, "--adapter", adapter, "--out", out, "--format", "gguf", "--gguf-type", kind)


def test_merged_hugging_face_directory(smollm2_hf, smollm2, smollm2_adapter, tmp_path):
    """The tokenizer is pronk's to write then: llama.cpp cuts awkward texts as transformers does."""
    ids, expected = smollm2
    merge_gguf(smollm2_hf, smollm2_adapter, tmp_path / "out", "f32")
    llama = LlamaCpp(tmp_path / "out" / "model.gguf")
    found = llama.after(ids, expected.shape[1])
    assert largest_difference("SmolLM2's directory, merged f32", found, expected) < 1e-3
    tokenizer = AutoTokenizer.from_pretrained(smollm2_hf)
    for text in AWKWARD:
        assert llama.token_count(text) == len(tokenizer(text)["input_ids"]), text


AWKWARD = [
    "3 33 333 1,000,000 x86_64\n\n12", "a  b   c\n \n\td", "I'm you're he'LL", "Über café e\u0301 漢字かな 🚀👩‍👩‍👧",
    "<|im_start|>user\nHum.<|im_end|>\n", "fn main() { /* !?!? */ }",
]  # fmt: skip


@pytest.mark.parametrize("name", ["gqa", "tied", "bias", "head-dim", "rope-linear", "rope-llama3"])
def test_merged_tiny_llama(name, tmp_path):
    base, ids = GOLDEN / f"tiny-{name}", token_ids(name)
    adapter = save_random_adapter(base, tmp_path / "adapter", "all-linear", std=0.1)
    expected = expected_after(load(base, adapter), ids)
    merge_gguf(base, adapter, tmp_path / "out", "f32")
    found = LlamaCpp(tmp_path / "out" / "model.gguf").after(ids, expected.shape[1])
    assert largest_difference(f"tiny-{name}, merged f32", found, expected) < 1e-3


@pytest.mark.parametrize("settings", [
    {"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    {"modules_to_save": ["embed_tokens", "lm_head"]},
    {"bias": "all"},
])  # fmt: skip
def test_merged_with_what_is_trained_whole(settings, tmp_path):
    """As one, the file stays tied; as copies that have parted, the head has a tensor of its own."""
    base, ids = GOLDEN / "tiny-bias", token_ids("bias")
    adapter = save_random_adapter(base, tmp_path / "adapter", ["q_proj"], std=0.1, **settings)
    tensors = load_file(adapter / "adapter_model.safetensors")
    for seed, (name, tensor) in enumerate(sorted(tensors.items())):
        if "lora_" not in name:
            torch.manual_seed(0 if "ensure_weight_tying" in settings else seed)
            tensor += 0.1 * torch.randn_like(tensor)
    save_file(tensors, adapter / "adapter_model.safetensors", {"format": "pt"})
    expected = expected_after(load(base, adapter), ids)
    merge_gguf(base, adapter, tmp_path / "out", "f32")
    names = {tensor.name for tensor in GGUFReader(tmp_path / "out" / "model.gguf").tensors}
    assert ("output.weight" in names) == (settings.keys() == {"modules_to_save"})
    found = LlamaCpp(tmp_path / "out" / "model.gguf").after(ids, expected.shape[1])
    assert largest_difference(f"tiny-bias, merged with {settings}", found, expected) < 1e-3


@pytest.mark.parametrize("name", CHANGES)
def test_merged_family(name, tmp_path):
    base, ids = hugging_face(name, tmp_path / "base"), token_ids(name)
    merge_gguf(GOLDEN / f"{name}.gguf", GOLDEN / f"adapter-{name}", tmp_path / "out", "f32")
    expected = expected_after(with_table_gelu(load(base, GOLDEN / f"adapter-{name}")), ids)
    found = LlamaCpp(tmp_path / "out" / "model.gguf").after(ids, expected.shape[1])
    assert largest_difference(f"{name}, merged f32", found, expected) < 1e-3


@pytest.mark.parametrize("kind", ["q8_0", "q4_0", "q4_k"])
def test_quantized_as_well_as_llama_cpp_does(gguf, smollm2, smollm2_adapter, smollm2_merged_f32, tmp_path, kind):
    """The same file with llama.cpp's own quantizer in place of ours: neither numbers nor answers are further off."""
    ids, expected = smollm2
    merge_gguf(gguf, smollm2_adapter, tmp_path / "out", kind)
    ours = tmp_path / "out" / "model.gguf"
    theirs = requantized(ours, smollm2_merged_f32, tmp_path / "theirs.gguf")
    exact = {t.name: t.data for t in GGUFReader(smollm2_merged_f32).tensors}
    off = [[((dequantize(t.data, t.tensor_type).ravel() - exact[t.name].ravel()) ** 2).sum() for t in GGUFReader(file).tensors]
           for file in (ours, theirs)]  # fmt: skip
    print(f"SmolLM2, {kind}: squared error {sum(off[0]):.4f}, llama.cpp's {sum(off[1]):.4f}", file=sys.stderr)
    assert sum(off[0]) <= 1.05 * sum(off[1])
    found = [(expected.exp() * (expected - LlamaCpp(file).after(ids, expected.shape[1]))).sum(-1).mean().item()
             for file in (ours, theirs)]  # fmt: skip
    print(f"SmolLM2, {kind}: KL {found[0]:.4f} nats, llama.cpp's {found[1]:.4f}", file=sys.stderr)
    assert found[0] <= 1.2 * found[1] + 1e-3


@pytest.fixture(scope="module")
def smollm2_merged_f32(gguf, smollm2_adapter, tmp_path_factory):
    out = tmp_path_factory.mktemp("merge") / "f32"
    merge_gguf(gguf, smollm2_adapter, out, "f32")
    return out / "model.gguf"


def requantized(file, exact, out):
    """A copy of the file whose quantized tensors are what llama.cpp makes of the exact numbers."""
    library = ctypes.CDLL(sys.modules["xllamacpp.xllamacpp"].__file__)
    library.ggml_quantize_chunk.restype = ctypes.c_size_t
    numbers = {t.name: np.ascontiguousarray(t.data) for t in GGUFReader(exact).tensors}
    bytes_ = bytearray(file.read_bytes())
    for tensor in GGUFReader(file).tensors:
        if tensor.tensor_type == GGMLQuantizationType.F32:
            continue
        source, size = numbers[tensor.name], int(tensor.n_bytes)
        columns, target = int(tensor.shape[0]), ctypes.create_string_buffer(size)
        written = library.ggml_quantize_chunk(
            int(tensor.tensor_type), source.ctypes.data_as(ctypes.c_void_p), target, ctypes.c_int64(0),
            ctypes.c_int64(source.size // columns), ctypes.c_int64(columns), None,
        )  # fmt: skip
        assert written == size, tensor.name
        bytes_[int(tensor.data_offset) : int(tensor.data_offset) + size] = target.raw
    out.write_bytes(bytes_)
    return out
