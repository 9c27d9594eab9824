#!/usr/bin/env python3
"""Alpaca-style LoRA with transformers and PEFT: what pronk is compared with. scripts/compare-peft runs it.

    peft_train.py BASE DATA.json --steps 8 [options]

BASE is a Hugging Face directory, DATA a JSON array of {instruction, input, output}, taken in the order of the file.
Constant learning rate, no weight decay, no clipping, no dropout. Prints a JSON object a step, as pronk's metrics.jsonl
has it: step, loss (mean over the step's supervised tokens), tokens (padding left out), supervised_tokens, seconds.
"""
import argparse
import json
import time
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

PREAMBLE = (
    "Below is an instruction that describes a task{}. "
    "Write a response that appropriately completes the request.\n\n"
)
WITH_INPUT = (
    PREAMBLE.format(", paired with an input that provides further context")
    + "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
WITHOUT_INPUT = PREAMBLE.format("") + "### Instruction:\n{instruction}\n\n### Response:\n"
IGNORED = -100


@dataclass
class Example:
    ids: torch.Tensor
    labels: torch.Tensor


def encode(record: dict, tokenizer, cutoff: int) -> Example:
    template = WITH_INPUT if record.get("input") else WITHOUT_INPUT
    prompt = tokenizer(template.format(**record))["input_ids"]  # with a BOS where the tokenizer wants one
    answer = tokenizer(record["output"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
    ids = (prompt + answer)[:cutoff]
    labels = ([IGNORED] * len(prompt) + answer)[:cutoff]
    return Example(torch.tensor(ids), torch.tensor(labels))


def load_model(a: argparse.Namespace):
    torch.manual_seed(a.seed)
    model = AutoModelForCausalLM.from_pretrained(a.base, dtype=getattr(torch, a.dtype)).to(a.device)
    if a.init_adapter:
        model = PeftModel.from_pretrained(model, a.init_adapter, is_trainable=True)
    else:
        config = LoraConfig(
            r=a.rank,
            lora_alpha=a.alpha,
            lora_dropout=0.0,
            bias="none",
            target_modules=a.target_modules.split(","),
            modules_to_save=a.modules_to_save.split(",") if a.modules_to_save else None,
            ensure_weight_tying=bool(a.modules_to_save),
            task_type="CAUSAL_LM",
        )
        model = get_peft_model(model, config)
    if a.save_init:
        model.save_pretrained(a.save_init)
    if a.gradient_checkpointing:
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    return model.train()


def train_step(model, optimizer, batch: list[Example], a: argparse.Namespace) -> dict:
    started = time.perf_counter()
    supervised = sum(int((e.labels[1:] != IGNORED).sum()) for e in batch)  # nothing predicts the first token
    loss_sum = 0.0
    for i in range(0, len(batch), a.micro_batch_size):
        part = batch[i : i + a.micro_batch_size]
        ids = pad_sequence([e.ids for e in part], batch_first=True).to(a.device)
        labels = pad_sequence([e.labels for e in part], batch_first=True, padding_value=IGNORED).to(a.device)
        mask = pad_sequence([torch.ones_like(e.ids) for e in part], batch_first=True).to(a.device)
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
        # Divided by the tokens of the whole step: a mean of the micro-batches' means would be another loss.
        loss = cross_entropy(logits.flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORED, reduction="sum")
        (loss / supervised).backward()
        loss_sum += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return {
        "loss": loss_sum / supervised,
        "tokens": sum(len(e.ids) for e in batch),
        "supervised_tokens": supervised,
        "seconds": time.perf_counter() - started,
    }


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("base")
    p.add_argument("data")
    p.add_argument("--steps", type=int, default=8)
    p.add_argument("--batch-size", type=int, default=8)
    p.add_argument("--micro-batch-size", type=int, default=4)
    p.add_argument("--cutoff", type=int, default=512, help="tokens a row at most")
    p.add_argument("--learning-rate", type=float, default=3e-4)
    p.add_argument("--rank", type=int, default=8)
    p.add_argument("--alpha", type=float, default=16)
    p.add_argument("--target-modules", default="q_proj,v_proj")
    p.add_argument("--modules-to-save", default="", help="trained whole, tied where the base ties them")
    p.add_argument("--seed", type=int, default=0, help="of the new adapter")
    p.add_argument("--init-adapter", metavar="DIR", help="start from this adapter")
    p.add_argument("--save-init", metavar="DIR", help="write the adapter as it is before the first step")
    p.add_argument("--save", metavar="DIR", help="write the trained adapter")
    p.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"], help="of the base")
    p.add_argument("--group-by-length", action="store_true", help="longest records first, instead of the file's order")
    p.add_argument("--gradient-checkpointing", action="store_true")
    p.add_argument("--device", default="cpu")
    a = p.parse_args()
    logging.disable_progress_bar()

    tokenizer = AutoTokenizer.from_pretrained(a.base)
    with open(a.data, encoding="utf-8") as file:
        records = json.load(file)[: a.steps * a.batch_size]
    if len(records) < a.steps * a.batch_size:
        raise SystemExit(f"peft_train: {a.data} has {len(records)} records; {a.steps * a.batch_size} are needed")
    examples = [encode(record, tokenizer, a.cutoff) for record in records]
    if a.group_by_length:
        examples.sort(key=lambda e: -len(e.ids))

    model = load_model(a)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=a.learning_rate, weight_decay=0.0)
    for step in range(a.steps):
        batch = examples[step * a.batch_size : (step + 1) * a.batch_size]
        line = {"step": step + 1} | train_step(model, optimizer, batch, a)
        if a.device.startswith("cuda"):
            line["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        print(json.dumps(line), flush=True)
    if a.save:
        model.save_pretrained(a.save)


if __name__ == "__main__":
    main()
