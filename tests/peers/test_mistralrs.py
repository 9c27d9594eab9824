"""mistral.rs loads PEFT directories and merged models of pronk's, and means the same."""
import os

import pytest
import torch
from helpers import GOLDEN, load, pronk, save_random_adapter
from runtimes import family_base, largest_difference, runtime
from test_families import CHANGES
from tokenizers import Tokenizer

os.environ["MISTRALRS_CPU_KV_F32"] = "1"
mistralrs = runtime("mistralrs")


def top_after(base, adapter, text, folder):
    """Token ids and log-probabilities of the likeliest next tokens, and how many tokens the text has."""
    template = folder / "plain.jinja"
    template.write_text("{{ messages[0]['content'] }}")
    f32 = mistralrs.ModelDType.F32
    if adapter:
        adapters = [mistralrs.LoraAdapter("ours", str(adapter))]
        which = mistralrs.Which.Lora(model_id=str(base), adapters=adapters, dtype=f32)
    else:
        which = mistralrs.Which.Plain(model_id=str(base), dtype=f32)
    runner = mistralrs.Runner(which=which, no_paged_attn=True, prefix_cache_n=0, chat_template=str(template))
    request = mistralrs.ChatCompletionRequest(
        messages=[{"role": "user", "content": text}], model="default", logprobs=True, top_logprobs=20, max_tokens=1,
        adapter="ours" if adapter else None,
    )  # fmt: skip
    response = runner.send_chat_completion_request(request)
    top = response.choices[0].logprobs.content[0].top_logprobs
    return [t.token for t in top], torch.tensor([t.logprob for t in top]), response.usage.prompt_tokens


def check(what, base, adapter, text, model, folder):
    ids = Tokenizer.from_file(str(base / "tokenizer.json")).encode(text).ids
    with torch.no_grad():
        expected = torch.log_softmax(model(input_ids=torch.tensor([ids])).logits[0, -1].double(), dim=-1)
    tokens, found, count = top_after(base, adapter, text, folder)
    assert count == len(ids) and len(tokens) == 20
    assert largest_difference(what, found, expected[torch.tensor(tokens)]) < 1e-3


@pytest.mark.parametrize("adapter, name", [("gqa", "gqa"), ("tied", "tied"), ("rslora", "gqa"), ("patterns", "gqa")])
def test_tiny_llama(adapter, name, tmp_path):
    base, ours, merged = GOLDEN / f"tiny-{name}", tmp_path / "adapter", tmp_path / "merged"
    adapter = GOLDEN / f"adapter-{adapter}"
    pronk("export", "--base", base, "--adapter", adapter, "--to", "mistralrs", "--out", ours)
    pronk("merge", "--base", base, "--adapter", adapter, "--out", merged, "--dtype", "f32")
    model = load(base, adapter)
    check(f"{adapter.name}, mistral.rs adapter", base, ours, "Hello 12", model, tmp_path)
    check(f"{adapter.name}, mistral.rs merged", merged, None, "Hello 12", model, tmp_path)


@pytest.mark.parametrize("name", CHANGES)
def test_family(name, tmp_path):
    if name == "gemma3":
        pytest.skip("mistral.rs knows no Gemma3ForCausalLM; pronk refuses to export to it")
    ours, merged, adapter = tmp_path / "adapter", tmp_path / "merged", GOLDEN / f"adapter-{name}"
    pronk("merge", "--base", GOLDEN / f"{name}.gguf", "--adapter", adapter, "--out", merged)
    base = family_base(name, merged, tmp_path / "base")
    if name == "mistral":  # mistral.rs's Llama, which a GGUF file makes of it, has no width of heads of its own
        merged = tmp_path / "merged-mistral"
        pronk("merge", "--base", base, "--adapter", adapter, "--out", merged, "--dtype", "f32")
    pronk("export", "--base", base, "--adapter", adapter, "--to", "mistralrs", "--out", ours)
    model = load(base, adapter)
    check(f"{name}, mistral.rs adapter", base, ours, "A hum", model, tmp_path)
    check(f"{name}, mistral.rs merged", merged, None, "A hum", model, tmp_path)


def test_smollm2(smollm2_hf, smollm2_adapter, smollm2_merged, tmp_path):
    model, text = load(smollm2_hf, smollm2_adapter), "Alpacas hum because"
    pronk("export", "--base", smollm2_hf, "--adapter", smollm2_adapter, "--to", "mistralrs", "--out", tmp_path / "out")
    check("SmolLM2, mistral.rs adapter", smollm2_hf, tmp_path / "out", text, model, tmp_path)
    check("SmolLM2, mistral.rs merged", smollm2_merged, None, text, model, tmp_path)


@pytest.mark.parametrize("base, settings", [("gqa", {"modules_to_save": ["lm_head"]}), ("bias", {"bias": "all"})])
def test_it_refuses_what_is_trained_whole(base, settings, tmp_path):
    """As pronk refuses to export it."""
    base = GOLDEN / f"tiny-{base}"
    adapter = save_random_adapter(base, tmp_path / "adapter", ["q_proj"], std=0.1, **settings)
    with pytest.raises(Exception, match="modules_to_save|bias"):
        top_after(base, adapter, "Hello 12", tmp_path)
    with pytest.raises(AssertionError, match="trained whole"):
        pronk("export", "--base", base, "--adapter", adapter, "--to", "mistralrs", "--out", tmp_path / "out")
