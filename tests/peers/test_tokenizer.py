"""The tokenizer that `pronk merge` takes out of a GGUF, against the one transformers makes of it, put right."""
import pytest
from transformers import AutoTokenizer

TEXTS = {
    "plain": "The quick brown alpaca jumps over the lazy llama.",
    "digits": "\n\n12 years, 1984-2026, 3.14159, 1,000,000 and 0x7fff",
    "digits in words": "v2rc10 a1b22c333 ½ ٣٤ ²",
    "spaces": "  two   three    four\t\ttabs \n \n\n end  ",
    "code": "def f(x):\n\treturn {'a': [x[0]**2, -x]}  # TODO!?\r\n",
    "contractions": "I'll, you're, it's, WE'VE, don't, ’tis",
    "accents": "Ünïcödé Łódź naïve e\u0301 Ångström ﬁ",
    "scripts": "東京 Москва العربية हिन्दी ไทย 한국어 ქართული",
    "emoji": "🦙🦙 👩‍👩‍👧 🇵🇪 ❤️",
    "odd characters": "\u200b\ufeff\u00a0non-breaking\u2028line\x00\x7f\ufffd",
    "special tokens": "<|im_start|>user\nHi<|im_end|>\n<|endoftext|><|im_star|> <repo_name>",
    "template": "### Instruction:\nCount to 10.\n\n### Response:\n1 2 3 4 5 6 7 8 9 10",
    "long word": "a" * 300 + "é" * 50,
    "empty": "",
}


@pytest.fixture(scope="module")
def tokenizers(smollm2_hf, smollm2_merged):
    return AutoTokenizer.from_pretrained(smollm2_merged), AutoTokenizer.from_pretrained(smollm2_hf)


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_same_ids(tokenizers, text):
    ours, theirs = tokenizers
    ids = ours(text)["input_ids"]
    assert ids == theirs(text)["input_ids"]
    assert ours.decode(ids) == theirs.decode(ids)


def test_same_special_tokens(tokenizers):
    ours, theirs = tokenizers
    assert len(ours) == len(theirs)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours, name) == getattr(theirs, name), name


def test_same_chat_template(tokenizers):
    chat = [{"role": "user", "content": "Hum."}, {"role": "assistant", "content": "Hmm."}]
    ours, theirs = (t.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) for t in tokenizers)
    assert ours == theirs
