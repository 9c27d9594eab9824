"""What several tests share: SmolLM2, and adapters for it and for the tiny Llamas."""
import json
import subprocess
from pathlib import Path

import pytest
from helpers import GOLDEN, ROOT, pronk, save_random_adapter

RECIPE = """\
[base]
path = {base}

[data]
files = [{data}]
template = "alpaca-short"
max_seq_len = 256
val_size = 0
order = "sequential"

[lora]
rank = 4
alpha = 8
dropout = 0.0
target_modules = "all-linear"

[train]
max_steps = 12
batch_size = 4
micro_batch_size = 2
learning_rate = 1e-2
schedule = "constant"
warmup_steps = 0
eval_steps = 0
save_steps = 0

[run]
dir = {run}
"""


def train(folder: Path, base: Path, *settings: str) -> Path:
    """The folder of a short run of `pronk train`, with changes to the recipe such as "train.max_steps=4"."""
    paths = {"base": base, "data": ROOT / "datasets" / "pronk.json", "run": folder / "run"}
    recipe = folder / "recipe.toml"
    recipe.write_text(RECIPE.format(**{key: json.dumps(str(path)) for key, path in paths.items()}))
    pronk("train", recipe, *(part for setting in settings for part in ("--set", setting)))
    return folder / "run"


@pytest.fixture(scope="session")
def trained(tmp_path_factory) -> Path:
    """The adapter of a short run on tiny-gqa."""
    return train(tmp_path_factory.mktemp("train"), GOLDEN / "tiny-gqa") / "adapter"


@pytest.fixture(scope="session")
def gguf() -> Path:
    return smollm2()


@pytest.fixture(scope="session")
def smollm2_hf() -> Path:
    """The same weights as transformers has them."""
    return smollm2("--hf")


def smollm2(*arguments: str) -> Path:
    script = [ROOT / "scripts" / "smollm2", *arguments]
    return Path(subprocess.run(script, check=True, stdout=subprocess.PIPE, text=True).stdout.strip())


@pytest.fixture(scope="session")
def smollm2_adapter(smollm2_hf, tmp_path_factory) -> Path:
    """A random adapter on SmolLM2's seven linears, strong enough to change what it says, not to break it."""
    return save_random_adapter(smollm2_hf, tmp_path_factory.mktemp("smollm2") / "adapter", "all-linear", std=0.05)


@pytest.fixture(scope="session")
def smollm2_merged(gguf, smollm2_adapter, tmp_path_factory) -> Path:
    """`pronk merge` of the GGUF and the adapter, to float32."""
    out = tmp_path_factory.mktemp("merge") / "merged"
    pronk("merge", "--base", gguf, "--adapter", smollm2_adapter, "--out", out, "--dtype", "f32")
    return out
