"""One template, everywhere: the prompt that a run learned from is the prompt that transformers and `generate` make of
what lies with its adapter."""
import json

import pytest
from helpers import GOLDEN, chat, pronk
from transformers import AutoTokenizer

BASE = GOLDEN / "tiny-gqa"
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


def trained(folder, name):
    """The run folder of two steps with the template `name`, on one question."""
    data, run = folder / "data.json", folder / "run"
    data.write_text(json.dumps([{"instruction": QUESTION, "output": "Green."}]))
    (folder / "own.jinja").write_text(CHAT)
    template = "own.jinja" if name == "own" else name
    values = {"base": str(BASE), "data": str(data), "run": str(run), "template": template}
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(**{key: json.dumps(value) for key, value in values.items()}))
    pronk("train", recipe)
    return run


def prompt_in_training(run) -> list[int]:
    """The prompt's ids of the run's only row, as `pronk inspect` shows them."""
    shown = pronk("inspect", "data", run / "prepared.safetensors", "--row", "0").splitlines()[1:]
    return [int(line.split()[1]) for line in shown if line.startswith("prompt")]


@pytest.mark.parametrize("name", ["alpaca", "alpaca-short", "vicuna", "own"])
def test_the_same_prompt_ids_everywhere(tmp_path, name):
    run = trained(tmp_path, name)
    learned = prompt_in_training(run)

    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.chat_template = (run / "adapter" / "chat_template.jinja").read_text()
    messages = [{"role": "user", "content": QUESTION}]
    theirs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert theirs == learned

    # What generate answers by default is what it answers with the template that the run named.
    ask = ["generate", "--base", BASE, "--adapter", run / "adapter", "--instruction", QUESTION, "--max-new-tokens", 12]
    by_name = tmp_path / "own.jinja" if name == "own" else name
    assert pronk(*ask) == pronk(*ask, "--template", by_name)
    merged = tmp_path / "merged"
    pronk("merge", "--base", BASE, "--adapter", run / "adapter", "--out", merged)
    theirs = AutoTokenizer.from_pretrained(merged)
    ids = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert ids == learned


@pytest.mark.parametrize("name", ["alpaca-short", "own"])
def test_a_conversation_has_the_same_ids_everywhere(tmp_path, name):
    """What `pronk chat` was asked and said, saved as a record: in training, in chat, and by transformers."""
    run = trained(tmp_path, name)
    merged, talk, rows = tmp_path / "merged", tmp_path / "talk.jsonl", tmp_path / "rows"
    pronk("merge", "--base", BASE, "--adapter", run / "adapter", "--out", merged)
    lines = f"/system Be brief.\n{QUESTION}\nAnother.\n/save {talk}\n"
    said = chat(lines, "--base", merged, "--max-new-tokens", 8, "--verbose-prompt")
    chatted = [json.loads(line.removeprefix("prompt: ")) for line in said if line.startswith("prompt: ")]

    tokenizer = AutoTokenizer.from_pretrained(merged)
    messages = json.loads(talk.read_text())["messages"]
    asked = tokenizer.apply_chat_template(messages[:-1], add_generation_prompt=True, tokenize=True, return_dict=False)
    assert chatted[1] == asked
    whole = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    pronk("prep", "--data", talk, "--base", merged, "--template", "chat", "--out", rows)
    shown = pronk("inspect", "data", rows, "--row", "0").splitlines()[1:]
    assert [int(line.split()[1]) for line in shown] == whole
