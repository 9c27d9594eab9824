"""mlx-lm loads the adapters that pronk exports and the models that it merges, and means the same."""

import pytest
import torch
from helpers import GOLDEN, load, pronk
from runtimes import expected_after, family_base, largest_difference, lengths, runtime
from safetensors.torch import load_file, save_file
from test_families import CHANGES
from test_llamacpp import TEXT, token_ids
from transformers import AutoTokenizer

mx = runtime("mlx.core")
runtime("mlx_lm")


def mlx_after(base, adapter, token_ids):
    from mlx_lm.tuner.utils import load_adapters
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(base)
    if adapter:
        model = load_adapters(model, str(adapter))
    model.set_dtype(mx.float32)
    model.eval()
    logits = torch.tensor(model(mx.array([token_ids]))[0].tolist())
    return torch.log_softmax(torch.stack([logits[n - 1] for n in lengths(token_ids)]).double(), dim=-1)


@pytest.mark.parametrize("adapter, name", [("gqa", "gqa"), ("tied", "tied"), ("rslora", "gqa"), ("patterns", "gqa"), ("dora", "bias")])
def test_adapter_of_a_tiny_llama(adapter, name, tmp_path):
    base, adapter = GOLDEN / f"tiny-{name}", GOLDEN / f"adapter-{adapter}"
    check(adapter.name, base, adapter, token_ids(name), tmp_path)


@pytest.mark.parametrize("name", CHANGES)
def test_adapter_and_merged_model_of_a_family(name, tmp_path):
    adapter, merged = GOLDEN / f"adapter-{name}", tmp_path / "merged"
    pronk("merge", "--base", GOLDEN / f"{name}.gguf", "--adapter", adapter, "--out", merged)
    base = family_base(name, merged, tmp_path / "base")
    # As many tokens as every window holds: mlx-lm has none for some families.
    ids = token_ids(name)[:6]
    expected = check(name, base, adapter, ids, tmp_path)
    assert largest_difference(f"{name}, MLX merged", mlx_after(merged, None, ids), expected) < 1e-3


def check(what, base, adapter, ids, folder):
    pronk("export", "--base", base, "--adapter", adapter, "--to", "mlx", "--out", folder / "out")
    expected = expected_after(load(base, adapter), ids)
    assert largest_difference(f"{what}, MLX adapter", mlx_after(base, folder / "out", ids), expected) < 1e-3
    assert largest_difference(f"{what}, MLX base alone", mlx_after(base, None, ids), expected) > 0.1
    return expected


def test_adapter_and_merged_model_of_smollm2(smollm2_hf, smollm2_adapter, smollm2_merged, tmp_path):
    ids = AutoTokenizer.from_pretrained(smollm2_hf)(TEXT)["input_ids"]
    expected = expected_after(load(smollm2_hf, smollm2_adapter), ids)
    pronk("export", "--base", smollm2_hf, "--adapter", smollm2_adapter, "--to", "mlx", "--out", tmp_path / "out")
    found = mlx_after(smollm2_hf, tmp_path / "out", ids)
    assert largest_difference("SmolLM2, MLX adapter", found, expected) < 1e-3
    found = mlx_after(smollm2_merged, None, ids)
    assert largest_difference("SmolLM2, MLX merged", found, expected) < 1e-3


def test_it_refuses_what_is_trained_whole(tmp_path):
    """As pronk refuses to export it: nothing but the pairs' own tensors may lie in its file."""
    base = GOLDEN / "tiny-gqa"
    pronk("export", "--base", base, "--adapter", GOLDEN / "adapter-gqa", "--to", "mlx", "--out", tmp_path / "out")
    file = tmp_path / "out" / "adapters.safetensors"
    head = load_file(base / "model.safetensors")["lm_head.weight"]
    save_file(load_file(file) | {"lm_head.weight": head}, file)
    with pytest.raises(ValueError, match="lm_head.weight: not an adapter parameter"):
        mlx_after(base, tmp_path / "out", token_ids("gqa"))
