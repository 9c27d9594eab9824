"""Runs the real pronk, and asks transformers and PEFT the same questions."""
import os
import subprocess
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

ROOT = Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests" / "golden"
PRONK = Path(os.environ.get("PRONK", ROOT / "target" / "release" / "pronk")).resolve()
TEXT = "Pronk says: an alpaca hums, 1 + 1 = 2, and the llama (señor) agrees.\n"

logging.disable_progress_bar()


def pronk(*arguments) -> str:
    """Runs pronk and returns its standard output; what it complains of becomes the test's failure."""
    return run(arguments).stdout


def chat(lines: str, *arguments) -> list[str]:
    """Runs `pronk chat` on these lines and returns those of its standard error."""
    return run(("chat", *arguments), lines).stderr.splitlines()


def run(arguments, lines: str = "") -> subprocess.CompletedProcess:
    assert PRONK.is_file(), f"{PRONK} is missing: cargo build --release, or set PRONK"
    command = [str(a) for a in (PRONK, *arguments)]
    done = subprocess.run(command, capture_output=True, encoding="utf-8", timeout=900, input=lines)
    assert done.returncode == 0, f"{' '.join(command)}\nexit code {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done


@dataclass
class Logits:
    token_ids: torch.Tensor  # [n]
    logits: torch.Tensor  # [n, vocab]


def pronk_logits(out: Path, base: Path, adapter: Path | None = None, text: str = TEXT) -> Logits:
    arguments = ["--adapter", adapter] if adapter else []
    pronk("inspect", "logits", "--base", base, *arguments, "--text", text, "--out", out)
    return Logits(**load_file(out))


def load(base: Path, adapter: Path | None = None):
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    return model.eval()


def save_random_adapter(base: Path, folder: Path, target_modules, std: float, **settings) -> Path:
    """A PEFT adapter, of rank 4 unless settings say otherwise, whose B has this standard deviation."""
    torch.manual_seed(0)
    settings = {"r": 4, "lora_alpha": 8} | settings
    config = LoraConfig(target_modules=target_modules, task_type="CAUSAL_LM", **settings)
    model = get_peft_model(load(base), config)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=std)
    model.save_pretrained(folder)
    return folder


@torch.no_grad()
def logits_of(model, token_ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=token_ids[None]).logits[0]


def assert_same(found: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-4) -> None:
    """Within tolerance of the largest logit."""
    assert found.shape == expected.shape
    error = ((found - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"relative error {error:.1e}"


def assert_different(found: torch.Tensor, base: torch.Tensor) -> None:
    """An adapter that does nothing would agree with anything."""
    assert (found - base).abs().max() > 0.05 * base.abs().max()


def greedy_text(model, tokenizer, prompt: str, n: int) -> tuple[str, bool]:
    """The greedy answer of at most n tokens, and whether it is whole: a near tie, which rounding may turn, ends it."""
    ids = tokenizer(prompt, return_tensors="pt")["input_ids"]
    out = model.generate(
        ids, max_new_tokens=n, do_sample=False, output_logits=True, return_dict_in_generate=True,
    )  # fmt: skip
    answer = out.sequences[0, ids.shape[1] :]
    best, second = torch.cat(out.logits).topk(2).values.T
    ties = (best - second < 1e-3).nonzero()[:, 0].tolist()
    end = ties[0] if ties else len(answer)
    assert end >= min(4, len(answer)), "hardly a token before a near tie: take another prompt"
    return tokenizer.decode(answer[:end], skip_special_tokens=True), not ties


def assert_same_greedy_text(model, tokenizer, template: str, *ours: tuple[Path, Path | None]) -> None:
    """`pronk generate` on each of our (base, adapter) says what model says."""
    instruction, n = "How do I boil an egg?", 24
    expected, whole = greedy_text(model, tokenizer, PROMPTS[template].format(instruction), n)
    for base, adapter in ours:
        arguments = ["--adapter", adapter] if adapter else []
        found = pronk(
            "generate", "--base", base, *arguments, "--instruction", instruction, "--template", template,
            "--temperature", 0, "--max-new-tokens", n,
        )  # fmt: skip
        if whole:
            assert found.strip() == expected.strip()
        else:
            assert found.strip().startswith(expected.strip().rstrip("\ufffd"))


PROMPTS = {
    "alpaca": "Below is an instruction that describes a task. "
    "Write a response that appropriately completes the request.\n\n### Instruction:\n{}\n\n### Response:\n",
    "alpaca-short": "### Instruction:\n{}\n\n### Response:\n",
}
