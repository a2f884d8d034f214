"""Parquet in the layout of the Hugging Face hub: `image: {bytes, path}` and `label`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import fs

from sddit.data.sources.base import BUFFER, THREADS, Index, Listing, Place, count_classes
from sddit.errors import DataError


def index(listing: Listing, filesystem: fs.FileSystem) -> Index:
    """Reads the column of labels; names of classes are those in the metadata, if any."""

    def get(path: str) -> tuple[np.ndarray, tuple[str, ...] | None]:
        with _open(filesystem, path) as file:
            schema = file.schema_arrow
            if not {"image", "label"} <= set(schema.names) or not _is_image(schema.field("image").type):
                raise DataError(
                    f"{path} has the columns {', '.join(f'{f.name}: {f.type}' for f in schema)}, but must have image: "
                    "struct<bytes, path> and label: int, as the Hugging Face hub stores image classes. Rename them."
                )
            if not pa.types.is_integer(schema.field("label").type):
                raise DataError(f"{path} has labels of {schema.field('label').type}, but they must be integers.")
            column = file.read(columns=["label"])["label"]
            if column.null_count:
                raise DataError(f"{path} has {column.null_count:,} images without a label. All must have one.")
            return column.to_numpy().astype(np.int64), _class_names(path, schema)

    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(get, [path for path, _ in listing.files]))
    for (path, _), (_, names) in zip(listing.files, found, strict=True):
        if names != found[0][1]:
            raise DataError(f"{path} names other classes than {listing.files[0][0]}. Give files of one data set.")
    labels, classes = np.concatenate([each for each, _ in found]), found[0][1]
    rows = tuple((path, len(each)) for (path, _), (each, _) in zip(listing.files, found, strict=True))
    return Index(labels, count_classes(labels, classes), classes, rows=rows)


def read(filesystem: fs.FileSystem, places: Sequence[Place], remote: bool) -> Iterator[tuple[str, bytes | None]]:
    """Name and bytes of the images of the rows at `places`; None where a row has no bytes. 64 rows at a time."""
    for path, lo, hi in places:
        yield from _rows(filesystem, path, lo, hi)


def _open(filesystem: fs.FileSystem, path: str) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(filesystem.open_input_file(path), buffer_size=4 * BUFFER)  # not a whole row group at once
    except pa.ArrowInvalid as error:
        raise DataError(f"{path} is not a parquet file, or only part of one: {error}. Fetch it again.") from None


def _is_image(kind: pa.DataType) -> bool:
    return pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0


def _class_names(path: str, schema: pa.Schema) -> tuple[str, ...] | None:
    """The names in the Hugging Face metadata of a parquet file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        names = features["label"]["names"]
    except (KeyError, TypeError, ValueError):
        return None
    if not isinstance(names, list):
        return None
    if double := sorted({str(name) for name in names if names.count(name) > 1}):
        raise DataError(f"{path} has several classes of the name {double[0]!r}. Give each class a name of its own.")
    return tuple(map(str, names))


def _rows(filesystem: fs.FileSystem, path: str, lo: int, hi: int) -> Iterator[tuple[str, bytes | None]]:
    with _open(filesystem, path) as file:
        groups: list[int] = []
        begin = first = 0
        for i in range(file.num_row_groups):
            end = begin + file.metadata.row_group(i).num_rows
            if begin < hi and end > lo:
                first = begin if not groups else first
                groups.append(i)
            begin = end
        position = first
        for batch in file.iter_batches(64, row_groups=groups, columns=["image"], use_threads=False):
            if position + len(batch) > lo and position < hi:
                column = batch.column(0)
                contents, names = column.field("bytes"), column.field("path") if column.type.num_fields > 1 else None
                for i in range(max(lo - position, 0), min(hi - position, len(batch))):
                    name = names[i].as_py() if names is not None else None
                    yield f"{path.rpartition('/')[2]}, row {position + i} ({name})", contents[i].as_py()
            position += len(batch)
