"""Training on a quantized file is training on its numbers, spelled out."""
import json
import subprocess

from helpers import ROOT, pronk

RECIPE = """\
[base]
path = {base}
compute = "f32"
[data]
files = [{data}]
order = "sequential"
[lora]
target_modules = "all-linear"
[train]
max_steps = 8
warmup_steps = 0
batch_size = 1
learning_rate = 1e-3
eval_steps = 0
save_steps = 0
[run]
dir = {run}
samples = 0
"""


def losses(folder, name, base) -> list[float]:
    paths = {"base": base, "data": folder / "data.json", "run": folder / name}
    recipe = folder / f"{name}.toml"
    recipe.write_text(RECIPE.format(**{key: json.dumps(str(path)) for key, path in paths.items()}))
    pronk("train", recipe, "--device", "cpu")
    return [json.loads(line)["loss"] for line in (folder / name / "metrics.jsonl").read_text().splitlines()]


def test_the_same_losses_as_of_the_same_numbers(smollm2_hf, tmp_path):
    records = json.loads((ROOT / "datasets" / "pronk.json").read_text(encoding="utf-8"))[:4]
    (tmp_path / "data.json").write_text(json.dumps(records * 2))
    found = subprocess.run([ROOT / "scripts" / "smollm2"], check=True, stdout=subprocess.PIPE, text=True)
    quantized = losses(tmp_path, "quantized", found.stdout.strip())
    spelled_out = losses(tmp_path, "spelled_out", smollm2_hf)
    assert len(quantized) == 8 and quantized[4] < quantized[0], "the second time round it is known"
    assert max(abs(a - b) for a, b in zip(quantized, spelled_out, strict=True)) < 1e-3
