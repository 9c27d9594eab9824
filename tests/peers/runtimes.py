"""Other runtimes, asked for the log-probabilities of the next token. Each loads what pronk wrote by its own code."""
import importlib
import json
import shutil
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from helpers import GOLDEN

# Of the texts that the next token is asked for after: from a few tokens, within every window, to all.
LENGTHS = (3, 6, 12, 20, 28)


def runtime(module: str):
    """The module, or the tests of the file are skipped with the reason."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        pytest.skip(f"{module} does not load here: {error}", allow_module_level=True)


def log_probabilities(logits: torch.Tensor) -> torch.Tensor:
    return torch.log_softmax(logits.double(), dim=-1)


def expected_after(model, token_ids: list[int]) -> torch.Tensor:
    """What transformers gives after the first of each of LENGTHS tokens: [texts, vocab]."""
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([token_ids])).logits[0]
    return log_probabilities(torch.stack([logits[n - 1] for n in lengths(token_ids)]))


def lengths(token_ids: list[int]) -> list[int]:
    return [n for n in LENGTHS if n <= len(token_ids)]


def largest_difference(what: str, found: torch.Tensor, expected: torch.Tensor, floor: float = -12.0) -> float:
    """Between two log-probabilities, of tokens that are not next to impossible."""
    assert found.shape == expected.shape
    likely = expected > floor
    difference = (found.double() - expected)[likely].abs().max().item()
    print(f"{what}: log-probabilities differ by {difference:.1e}", file=sys.stderr)
    return difference


def through_float16(x: torch.Tensor) -> torch.Tensor:
    return x.half().float()


class TableGelu(torch.nn.Module):
    """GELU as ggml computes it on a CPU: looked up in a table of float16 by what its argument is in float16."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        looked_up = through_float16(torch.nn.functional.gelu(through_float16(x), approximate="tanh"))
        return torch.where(x <= -10, torch.zeros_like(x), torch.where(x >= 10, x, looked_up))


def with_table_gelu(model):
    """A Gemma that computes GELU as ggml does. Models with other activations stay as they are."""
    for module in model.modules():
        if hasattr(module, "act_fn") and "gelu" in type(module.act_fn).__name__.lower():
            module.act_fn = TableGelu()
    return model


def with_float16_weights(model):
    """Matrices rounded as a float16 file has them; what is no matrix stays, as llama.cpp's converter leaves it."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(through_float16(parameter))
    return model


def with_float16_inputs(model):
    """What goes into a product with a float16 matrix is rounded to float16 by ggml on a CPU."""
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, inputs: (through_float16(inputs[0]),))
    return model


class LlamaCpp:
    """llama.cpp with a model and perhaps an adapter, computing as exactly as it can."""

    def __init__(self, model: Path, adapter: Path | None = None):
        xllamacpp = runtime("xllamacpp")
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.n_ctx = params.n_batch = params.n_ubatch = 256
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = 0
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        if adapter:
            params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(adapter), 1.0)]
        self.server = xllamacpp.Server(params)

    def token_count(self, text: str) -> int:
        answer = self.server.handle_completions({"prompt": text, "n_predict": 1, "cache_prompt": False})
        return answer["usage"]["prompt_tokens"]

    def after(self, token_ids: list[int], vocab: int) -> torch.Tensor:
        rows = []
        for n in lengths(token_ids):
            top = self.first_token(token_ids[:n], vocab)["top_logprobs"]
            row = torch.full((vocab,), -float("inf"), dtype=torch.double)
            for token in top:
                row[token["id"]] = token["logprob"]
            rows.append(row)
        return torch.stack(rows)

    def first_token(self, token_ids: list[int], vocab: int) -> dict:
        """Drawn until it is one that shows: of half a character, or one that ends the text, the server says nothing. The
        probabilities are those of the bare logits, whichever is drawn."""
        for seed in range(32):
            answer = self.server.handle_completions({
                "prompt": token_ids, "n_predict": 1, "n_probs": vocab, "temperature": 1.0, "seed": seed,
                "ignore_eos": True, "cache_prompt": False,
            })  # fmt: skip
            assert "choices" in answer, answer
            if answer["choices"][0]["logprobs"]:
                return answer["choices"][0]["logprobs"]["content"][0]
        raise AssertionError("32 draws, and none of them shows")


def float32_gguf(source: Path, out: Path) -> Path:
    """The same GGUF file with all its numbers spelled out, by llama.cpp's own Python."""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for key, field in reader.fields.items():
        if key.startswith("GGUF.") or key in ("general.architecture", "general.file_type"):
            continue
        kind, sub = field.types[0], field.types[-1] if len(field.types) > 1 else None
        writer.add_key_value(key, field.contents(), kind, sub_type=sub)
    for tensor in reader.tensors:
        shape = [int(n) for n in reversed(tensor.shape)]
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        writer.add_tensor(tensor.name, np.ascontiguousarray(values.reshape(shape), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


def family_base(name: str, merged: Path, folder: Path) -> Path:
    """The tiny checkpoint of a family with the configuration and the tokenizer of its merged GGUF file: old readers do
    not find what they need in the configurations of transformers 5, and the checkpoints have no tokenizer."""
    shutil.copytree(GOLDEN / f"tiny-{name}", folder)
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        shutil.copy(merged / file, folder / file)
    if name == "mistral":  # a Llama in GGUF files
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": None}
        (folder / "config.json").write_text(json.dumps(config))
    return folder
