"""transformers and bitsandbytes open what pronk keeps quantized, and the numbers are the same."""
import json

import pytest
import torch
from helpers import ROOT, assert_same, load, logits_of, pronk, pronk_logits, save_random_adapter
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

bitsandbytes = pytest.importorskip(
    "bitsandbytes", reason="bitsandbytes is not installed: scripts/peers installs it where it has a wheel"
)

RECIPE = """\
[base]
path = {base}
quantize = "{scheme}"
[data]
files = [{data}]
max_seq_len = 128
template = "alpaca-short"
[train]
max_steps = 1
warmup_steps = 0
batch_size = 1
micro_batch_size = 1
[run]
dir = {run}
samples = 0
"""


@pytest.fixture(scope="module", params=["nf4", "int8"])
def cached(request, smollm2_hf, tmp_path_factory):
    """The scheme, and the directory in the cache that a run of one step leaves behind.

    Not of a tiny base: on a CPU, bitsandbytes 0.50.2 takes the wrong scales where rows are no whole blocks of 64.
    """
    folder = tmp_path_factory.mktemp("quantized")
    paths = {"base": smollm2_hf, "data": ROOT / "datasets" / "pronk.json", "run": folder / "run"}
    paths = {key: json.dumps(str(path)) for key, path in paths.items()}
    (folder / "recipe.toml").write_text(RECIPE.format(scheme=request.param, **paths))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PRONK_CACHE", str(folder / "cache"))
        pronk("train", folder / "recipe.toml")
    (directory,) = (folder / "cache").iterdir()
    return request.param, directory


@pytest.fixture(scope="module")
def model(cached):
    return AutoModelForCausalLM.from_pretrained(cached[1], dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def dequantized(cached, smollm2_hf, tmp_path_factory):
    """Our numbers: the base merged with an adapter that changes nothing."""
    folder = tmp_path_factory.mktemp("merged")
    adapter = save_random_adapter(smollm2_hf, folder / "adapter", ["q_proj"], std=0.0)
    pronk("merge", "--base", cached[1], "--adapter", adapter, "--out", folder / "out", "--dtype", "f32")
    return load_file(folder / "out" / "model.safetensors")


def dequantize(model) -> dict[str, torch.Tensor]:
    """What bitsandbytes reads, by the weights' names."""
    weights = {}
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = weight.quant_state
            assert (state.quant_type, state.blocksize, state.nested, state.dtype) == ("nf4", 64, True, torch.float32)
            weights[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(weight.data, state)
        elif isinstance(module, bitsandbytes.nn.Linear8bitLt):
            weights[f"{name}.weight"] = bitsandbytes.functional.int8_vectorwise_dequant(weight.data, weight.SCB)
    assert len(weights) == 7 * 30, "seven linear layers in each block"
    return weights


def test_the_same_weights(model, dequantized):
    for name, weight in dequantize(model).items():
        assert torch.equal(weight, dequantized[name]), name


def test_the_same_quantized_weights(cached, smollm2_hf):
    """What bitsandbytes makes of the base's weights is what pronk made of them."""
    ours, base = load_file(cached[1] / "model.safetensors"), load_file(smollm2_hf / "model.safetensors")
    for name, weight in base.items():
        if "layers" not in name or weight.dim() != 2:
            continue
        if cached[0] == "nf4":
            codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            assert torch.equal(ours[name], codes), name
            # torch's mean of the scales ends in another bit, which now and then tips one of their codes.
            off = (ours[f"{name}.absmax"].int() - state.absmax.int()).abs()
            assert off.max() <= 1 and (off > 0).float().mean() < 1e-3, name
            assert torch.allclose(ours[f"{name}.nested_absmax"], state.state2.absmax, rtol=1e-5), name
            assert torch.equal(ours[f"{name}.quant_map"], state.code), name
            assert torch.equal(ours[f"{name}.nested_quant_map"], state.state2.code), name
        else:
            codes, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight)
            assert torch.equal(ours[name], codes), name
            assert torch.equal(ours[name.replace(".weight", ".SCB")], scales), name


def test_the_same_logits(cached, model, smollm2_hf, tmp_path):
    # In a model of plain linear layers: those of bitsandbytes round what they multiply with as well.
    plain = load(smollm2_hf)
    weights = dequantize(model) | {"model.embed_tokens.weight": model.get_input_embeddings().weight}
    plain.load_state_dict(weights, strict=False)
    found = pronk_logits(tmp_path / "logits.safetensors", cached[1])
    assert_same(found.logits, logits_of(plain, found.token_ids))


def test_synthetic_bases_straight_to_nf4(tmp_path):
    """bitsandbytes reads in them what it makes of the same base in bf16."""
    for name, options in (("dense", []), ("nf4", ["--quantize", "nf4"])):
        pronk("synth", "--like", "smollm2-135m", "--seed", 5, "--out", tmp_path / name, *options)
    straight = AutoModelForCausalLM.from_pretrained(tmp_path / "nf4")
    checked = 0
    for name, weight in load_file(tmp_path / "dense" / "model.safetensors").items():
        found = straight.get_parameter(name)
        if "layers" in name and weight.dim() == 2:
            codes, state = bitsandbytes.functional.quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
            theirs = bitsandbytes.functional.dequantize_4bit(codes, state).float()
            ours = bitsandbytes.functional.dequantize_4bit(found.data, found.quant_state).float()
            # A scale whose code torch rounds to the other side is off by at most 1 in 128 or so.
            assert (ours - theirs).abs().max() < 0.02 * weight.abs().max(), name
            assert torch.equal(found.data, codes), name
            checked += 1
        else:
            assert torch.equal(found.data.to(weight.dtype), weight), name
    assert checked == 7 * 30
