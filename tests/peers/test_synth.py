"""transformers opens what `pronk synth` wrote, and computes the same with it."""
import pytest
import torch
from helpers import TEXT, assert_same, load, logits_of, pronk, pronk_logits
from safetensors import safe_open
from transformers import AutoTokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    out = tmp_path_factory.mktemp("synth") / "base"
    told = pronk("synth", "--like", "smollm2-135m", "--out", out, "--seed", 3)
    assert "272 tensors" in told and "0.27 GB" in told
    return out


def test_same_logits(base, tmp_path):
    found = pronk_logits(tmp_path / "logits.safetensors", base)
    model = load(base)
    assert model.num_parameters() == 134_515_008
    assert found.logits.abs().max() > 0.1
    assert_same(found.logits, logits_of(model, found.token_ids))


def test_same_tokenizer(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    text = TEXT + "  東京 🦙\0\r\n  "
    ids = tokenizer(text)["input_ids"]
    assert ids == [1] + [byte + 3 for byte in text.encode()]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    # An argument cannot hold the zero byte.
    found = pronk_logits(tmp_path / "logits.safetensors", base, text=text.replace("\0", ""))
    assert found.token_ids.tolist() == tokenizer(text.replace("\0", ""))["input_ids"]


def test_weights_are_normal(base):
    with safe_open(base / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
        for name in file.keys():
            tensor = file.get_tensor(name)
            assert tensor.dtype == torch.bfloat16
            x = tensor.double()
            if name.endswith("norm.weight"):
                assert (x == 1).all(), name
            else:
                assert abs(x.mean()) < 5 * 0.02 / x.numel() ** 0.5, name
                assert abs(x.std() / 0.02 - 1) < 5 / (2 * x.numel()) ** 0.5, name
