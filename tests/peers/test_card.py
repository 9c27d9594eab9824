"""The commands of a model card do what the card says: its Python is run as it stands, in the folder that it is about."""
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import GOLDEN, pronk
from test_template import trained as trained_with

QUESTION = "Why do alpacas hum?"
BASE = GOLDEN / "tiny-gqa"


def card(folder: Path) -> str:
    return (folder / "README.md").read_text()


def commands(folder: Path, runtime: str) -> str:
    """The block below a runtime's heading."""
    section = re.search(rf"^### {re.escape(runtime)}\n+```\w+\n(.*?)^```$", card(folder), re.DOTALL | re.MULTILINE)
    assert section, f"{runtime}: no commands in\n{card(folder)}"
    return section[1]


def said(folder: Path, runtime: str) -> str:
    """What the Python below a runtime's heading prints."""
    done = subprocess.run(
        [sys.executable, "-c", commands(folder, runtime)], cwd=folder, capture_output=True, text=True, timeout=300,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def begin_alike(one: str, other: str) -> bool:
    """Asked otherwise, answers differ from their first token on. In bf16 they may, far behind, where two are as likely."""
    return len(os.path.commonprefix([one, other])) >= min(16, len(one))


def pronk_says(*arguments) -> str:
    asked = ["--instruction", QUESTION, "--max-new-tokens", 64]
    return pronk("generate", *arguments, *asked).strip()


def test_an_adapters_card(trained):
    answer = said(trained, "transformers and PEFT")
    assert answer and begin_alike(answer, pronk_says("--base", BASE, "--adapter", trained))
    assert not begin_alike(answer, pronk_says("--base", BASE))
    text = card(trained)
    for line in (
        r"\| data: pronk\.json \| sha256 `[0-9a-f]{64}` \|", r"\| prepared rows \| `[0-9a-f]+` \|", r"\| optimizer steps \| 12 \|",
        r"^learning_rate = 0\.01$", r"^path = \"tiny-gqa\"$", r"^pronk chat --base \S+ --adapter \.$",
        r"^vllm serve \S+ --enable-lora --lora-modules tuned=\. --chat-template chat_template\.jinja$",
        r"^pronk export --base \S+ --adapter \. --to gguf --out \.\./gguf$", r"^mlx_lm\.generate --model ",
        r"^ollama create tuned --file \.\./ollama/Modelfile$",
    ):  # fmt: skip
        assert re.search(line, text, re.MULTILINE), f"{line} is not in\n{text}"


@pytest.mark.parametrize("template", ["own", "record"])
def test_a_card_asks_as_training_did(tmp_path, template):
    """By a chat template of the user's own, and by one that transformers cannot read."""
    if template == "record":
        template = str(tmp_path / "record.jinja")
        Path(template).write_text("Q: {{ instruction }}\nA: {{ output }}")
    adapter = trained_with(tmp_path, template) / "adapter"
    answer = said(adapter, "transformers and PEFT")
    assert begin_alike(answer, pronk_says("--base", BASE, "--adapter", adapter))


def test_a_merged_models_card(trained, tmp_path):
    merged = tmp_path / "merged"
    pronk("merge", "--base", BASE, "--adapter", trained, "--out", merged)
    assert begin_alike(said(merged, "transformers"), pronk_says("--base", merged))
    training = card(trained).split("## Training\n")[1]
    assert training.count("\n") > 20 and card(merged).endswith(training)


def test_mistral_rs_takes_its_commands(trained, tmp_path):
    pytest.importorskip("mistralrs")
    merged = tmp_path / "merged"
    pronk("merge", "--base", BASE, "--adapter", trained, "--out", merged)
    assert said(trained, "mistral.rs")
    assert said(merged, "mistral.rs")


def test_a_merged_ggufs_card(trained, tmp_path):
    out = tmp_path / "out"
    pronk("merge", "--base", BASE, "--adapter", trained, "--out", out, "--format", "gguf")
    assert "llama-cli --model model.gguf\n" in commands(out, "llama.cpp")
    assert "ollama create tuned --file Modelfile\n" in commands(out, "Ollama")
    assert card(out).endswith(card(trained).split("## Training\n")[1])


@pytest.mark.parametrize("to, runtime", [("gguf", "llama.cpp"), ("ollama", "Ollama"), ("mlx", "MLX"), ("vllm", "vLLM")])
def test_an_exports_card(trained, tmp_path, to, runtime):
    out = tmp_path / "out"
    pronk("export", "--base", BASE, "--adapter", trained, "--to", to, "--out", out)
    assert commands(out, runtime)
    assert card(out).endswith(card(trained).split("## Training\n")[1])


@pytest.mark.parametrize("adapter, kind", [("dora", "DoRA"), ("rslora", "rsLoRA"), ("gqa", "LoRA")])
def test_a_card_says_what_kind_it_is(adapter, kind, tmp_path):
    """And where a runtime knows no such kind, how to merge it for that. What these adapters of random numbers answer is left open:
    their likeliest tokens are too close to each other for bf16."""
    base = GOLDEN / ("tiny-bias" if adapter == "dora" else "tiny-gqa")
    pronk("export", "--base", base, "--adapter", GOLDEN / f"adapter-{adapter}", "--to", "peft", "--out", tmp_path / "out")
    text = card(tmp_path / "out")
    assert f"A {kind} adapter for" in text and (f" {kind}: " in text) == (kind != "LoRA")
    assert text.count("The adapter alone does not load: ") == (4 if adapter == "dora" else 0)
    assert said(tmp_path / "out", "transformers and PEFT")
