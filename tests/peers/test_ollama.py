"""What pronk writes for Ollama, held against its documented rules: https://docs.ollama.com/modelfile and /import.

Ollama itself does not run here. The Modelfile is read by a parser that knows the documented instructions alone; the GGUF
files by gguf, as llama.cpp's (which Ollama is built on); and the template is filled by Go's own text/template, with the
values that Ollama gives it, where `scripts/go` has been run. Ids are compared with those that training used.
"""
import json
import os
import re
import subprocess

import pytest
from gguf import GGMLQuantizationType, GGUFReader
from helpers import GOLDEN, ROOT, pronk
from test_template import BASE, QUESTION, prompt_in_training, trained
from transformers import AutoTokenizer

GO = ROOT / "target" / "go" / "go" / "bin" / "go"
# System messages, and turns, as Ollama 0.12's template package hands them to a template that ranges over .Messages.
FILL = """\
package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

func main() {
	var given struct {
		Template string
		Messages []*Message
	}
	if err := json.NewDecoder(os.Stdin).Decode(&given); err != nil {
		panic(err)
	}
	var system []string
	for _, message := range given.Messages {
		if message.Role == "system" {
			system = append(system, message.Content)
		}
	}
	parsed := template.Must(template.New("").Option("missingkey=zero").Parse(given.Template))
	values := map[string]any{"System": strings.Join(system, "\\n\\n"), "Messages": given.Messages, "Response": ""}
	if err := parsed.Execute(os.Stdout, values); err != nil {
		panic(err)
	}
}
"""


def instructions(text: str) -> list[tuple[str, str]]:
    """A Modelfile's instructions, in order; an argument may stand in quotes, or over several lines in three."""
    found, rest = [], text
    while rest:
        if blank := re.match(r"[ \t]*(#[^\n]*)?\n", rest):
            rest = rest[blank.end() :]
            continue
        name = re.match(r"(FROM|ADAPTER|TEMPLATE|SYSTEM|LICENSE|PARAMETER [a-z_0-9]+) ", rest)
        assert name, f"no instruction: {rest[:40]!r}"
        rest = rest[name.end() :]
        value = re.match(r'"""(.*?)"""\n', rest, re.DOTALL) or re.match(r'"([^"\n]*)"\n', rest)
        if value is None:
            assert not rest.startswith('"'), f"quotes that do not end: {rest[:40]!r}"
            value = re.match(r"([^\n]+)\n", rest)
        found.append((name[1], value[1]))
        rest = rest[value.end() :]
    return found


def checked(folder, adapter: bool) -> dict[str, list[str]]:
    """The Modelfile's instructions by name, each as often as the documentation allows."""
    found = instructions((folder / "Modelfile").read_text())
    names = [name for name, _ in found]
    assert names[0] == "FROM" and names.count("FROM") == 1
    assert names.count("TEMPLATE") == 1 and names.count("ADAPTER") == int(adapter)
    assert set(names) <= {"FROM", "ADAPTER", "TEMPLATE", "PARAMETER stop"}
    by_name = {name: [value for n, value in found if n == name] for name in names}
    # Ollama drops what does not show, and cuts off what stands around an argument.
    for value in by_name["PARAMETER stop"] + by_name["TEMPLATE"]:
        assert all(c.isprintable() or c in "\n\t" for c in value)
    return by_name


def filled(template: str, messages) -> str:
    if not GO.is_file():
        pytest.skip("scripts/go has not been run")
    program = ROOT / "target" / "go" / "fill.go"
    program.write_text(FILL)
    environment = os.environ | {"GOTOOLCHAIN": "local", "GOFLAGS": "", "GOCACHE": str(GO.parents[2] / "cache")}
    given = json.dumps({"Template": template, "Messages": messages})
    done = subprocess.run([GO, "run", program], input=given, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def ids_by_ollama(tokenizer, template, messages) -> list[int]:
    """Ollama tokenizes what the template gives, with the token that begins a text in front."""
    return tokenizer(filled(template, messages))["input_ids"]


TALK = [
    {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hum?"},
    {"role": "assistant", "content": "Hum."}, {"role": "user", "content": "{{ .Again }}?"},
]  # fmt: skip


@pytest.mark.parametrize("name", ["alpaca", "alpaca-short", "vicuna", "own"])
def test_the_template_gives_the_ids_that_training_used(tmp_path, name):
    run = trained(tmp_path, name)
    pronk("export", "--base", BASE, "--adapter", run / "adapter", "--to", "ollama", "--out", tmp_path / "out")
    modelfile = checked(tmp_path / "out", adapter=True)
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    assert modelfile["PARAMETER stop"] == [tokenizer.eos_token]
    [template] = modelfile["TEMPLATE"]
    question = [{"role": "user", "content": QUESTION}]
    assert ids_by_ollama(tokenizer, template, question) == prompt_in_training(run)
    tokenizer.chat_template = (run / "adapter" / "chat_template.jinja").read_text()
    for talk in (TALK, TALK[1:]):
        asked = tokenizer.apply_chat_template(talk, add_generation_prompt=True, return_dict=False)
        assert ids_by_ollama(tokenizer, template, talk) == asked


def test_the_adapter_is_one_that_ollama_documents(tmp_path):
    """A GGUF adapter on the base of its FROM: of that architecture, with an alpha that is a whole number."""
    base = GOLDEN / "mistral.gguf"
    pronk("export", "--base", base, "--adapter", GOLDEN / "adapter-mistral", "--to", "ollama", "--out", tmp_path / "out")
    modelfile = checked(tmp_path / "out", adapter=True)
    assert modelfile["FROM"] == [str(base)]
    adapter = GGUFReader(tmp_path / "out" / modelfile["ADAPTER"][0])
    value = {key: field.contents() for key, field in adapter.fields.items()}
    of_base = GGUFReader(modelfile["FROM"][0]).fields["general.architecture"].contents()
    assert (value["general.type"], value["adapter.type"]) == ("adapter", "lora")
    assert value["general.architecture"] == of_base
    assert float(value["adapter.lora.alpha"]).is_integer()
    names = {tensor.name for tensor in adapter.tensors}
    assert {name.removesuffix("a") for name in names if name.endswith(".lora_a")} == {
        name.removesuffix("b") for name in names if name.endswith(".lora_b")
    }
    assert {tensor.tensor_type for tensor in adapter.tensors} == {GGMLQuantizationType.F32}


def test_a_merged_file_comes_with_its_modelfile(tmp_path):
    pronk("merge", "--base", BASE, "--adapter", GOLDEN / "adapter-gqa", "--format", "gguf", "--out", tmp_path / "out")
    modelfile = checked(tmp_path / "out", adapter=False)
    model = GGUFReader(tmp_path / "out" / modelfile["FROM"][0])
    assert model.fields["general.type"].contents() == "model"
    [template] = modelfile["TEMPLATE"]
    assert filled(template, TALK).endswith("### Response:\n") and "{{ .Again }}?" in filled(template, TALK)
