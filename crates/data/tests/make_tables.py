#!/usr/bin/env python3
"""Writes tables/: what pyarrow writes of the same records, for the reader of tables to agree with.

    python3 -m venv venv && venv/bin/pip install pyarrow && venv/bin/python crates/data/tests/make_tables.py

300 records, more than are decoded at a time, in two row groups or batches.
"""
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

OUT = Path(__file__).parent / "tables"
OUT.mkdir(exist_ok=True)
N = 300


def message(role, content):
    return {"role": role, "content": content, "tool_calls": None}


alpaca = {
    "instruction": [f"Say {i}." for i in range(N)],
    "input": [None if i % 3 == 0 else f"in {i % 7}" for i in range(N)],
    "output": [f"It is {i}, “so”.\n" for i in range(N)],
    "score": [i / 2 for i in range(N)],
}
messages = {
    "messages": [
        [message("user", f"Say {i}."), message("assistant", f"It is {i}."), message("user", "Again."), message("assistant", str(i))]
        for i in range(N)
    ],
    "id": list(range(N)),
}
plain = pa.table(alpaca)
# The same in other types: all of them say the same records.
others = pa.table(
    {
        "instruction": pa.array(alpaca["instruction"], pa.large_string()),
        "input": pa.array(alpaca["input"]).dictionary_encode(),
        "output": pa.array([text.encode() for text in alpaca["output"]], pa.binary()),
        "score": pa.array(alpaca["score"], pa.float32()),
    }
)
for codec in ["snappy", "zstd", "gzip", "lz4"]:
    pq.write_table(plain, OUT / f"alpaca-{codec}.parquet", compression=codec, row_group_size=200)
pq.write_table(others, OUT / "others.parquet", row_group_size=200)
pq.write_table(pa.table(messages), OUT / "messages.parquet", row_group_size=200)
# Many pages a column: of nested columns a reader looks ahead at the next one.
pq.write_table(pa.table(messages), OUT / "messages-pages.parquet", use_dictionary=False, data_page_size=512, write_batch_size=16)
for name, table, kind in [
    ("alpaca.arrow", plain, pa.ipc.new_file),
    ("others.stream", others, pa.ipc.new_stream),
    ("messages.stream", pa.table(messages), pa.ipc.new_stream),
]:
    with pa.OSFile(str(OUT / name), "wb") as sink, kind(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=200)
lz4 = pa.ipc.IpcWriteOptions(compression="lz4")
with pa.OSFile(str(OUT / "lz4.arrow"), "wb") as sink, pa.ipc.new_file(sink, plain.schema, options=lz4) as writer:
    writer.write_table(plain)
