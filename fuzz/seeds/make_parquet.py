"""Wrote the Parquet files beside it: python3 fuzz/seeds/make_parquet.py. Needs pyarrow."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

HERE = Path(__file__).resolve().parent


def write(name, table, **options):
    pq.write_table(pa.table(table).replace_schema_metadata(None), HERE / f"{name}.parquet", store_schema=False, **options)


write("pairs", {"prompt": ["a:", "b:"], "completion": ["x", None]}, compression="snappy", use_dictionary=True)
talk = [[{"role": "user", "content": "u"}, {"role": "assistant", "content": "a"}], []]
write("talk", {"messages": talk}, compression="zstd", use_dictionary=False)
write(
    "texts",
    {"text": [b"one", b"two"], "n": [1, None], "x": [0.5, 1.5], "flag": [True, False], "tags": [[("k", 1)], []]}
    | {"tags": pa.array([[("k", 1)], []], pa.map_(pa.string(), pa.int32()))},
    compression="gzip",
    data_page_version="2.0",
)
