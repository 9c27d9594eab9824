"""One template, everywhere: the prompt that a run learned from is the prompt that transformers and `generate` make of
what lies with its adapter."""
import json

import pytest
from helpers import GOLDEN, pronk
from transformers import AutoTokenizer

QUESTION = "Name a colour."
CHAT = (
    "{{ bos_token }}{% for m in messages %}{{ '[' + m['role'] + '] ' + m['content'] | trim + eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '[assistant] ' }}{% endif %}"
)
RECIPE = """\
[base]
path = {base}
[data]
files = [{data}]
template = {template}
[lora]
rank = 2
[train]
max_steps = 2
warmup_steps = 0
eval_steps = 0
save_steps = 0
[run]
dir = {run}
samples = 0
"""


def prompt_in_training(run) -> list[int]:
    """The prompt's ids of the run's only row, as `pronk inspect` shows them."""
    shown = pronk("inspect", "data", run / "prepared.safetensors", "--row", "0").splitlines()[1:]
    return [int(line.split()[1]) for line in shown if line.startswith("prompt")]


@pytest.mark.parametrize("name", ["alpaca", "alpaca-short", "vicuna", "own"])
def test_the_same_prompt_ids_everywhere(tmp_path, name):
    base, data, run = GOLDEN / "tiny-gqa", tmp_path / "data.json", tmp_path / "run"
    data.write_text(json.dumps([{"instruction": QUESTION, "output": "Green."}]))
    (tmp_path / "own.jinja").write_text(CHAT)
    template = "own.jinja" if name == "own" else name
    values = {"base": str(base), "data": str(data), "run": str(run), "template": template}
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(RECIPE.format(**{key: json.dumps(value) for key, value in values.items()}))
    pronk("train", recipe)
    learned = prompt_in_training(run)

    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.chat_template = (run / "adapter" / "chat_template.jinja").read_text()
    messages = [{"role": "user", "content": QUESTION}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert theirs == learned

    # What generate answers by default is what it answers with the template that the run named.
    ask = ["generate", "--base", base, "--adapter", run / "adapter", "--instruction", QUESTION, "--max-new-tokens", 12]
    by_name = tmp_path / "own.jinja" if name == "own" else name
    assert pronk(*ask) == pronk(*ask, "--template", by_name)
    merged = tmp_path / "merged"
    pronk("merge", "--base", base, "--adapter", run / "adapter", "--out", merged)
    theirs = AutoTokenizer.from_pretrained(merged)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == learned
