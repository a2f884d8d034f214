"""The same few images with their classes in every form that `sddit prepare` reads."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

CLASSES = ("n01440764", "n01443537", "n01484850")  # synsets of ImageNet
KINDS = ("folder", "parquet", "webdataset", "npz")


def images_of(count: int, side: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Noise uint8 (n, H, W, 3), and labels int64 (n,) in rising order, as a folder sorts them."""
    images = np.random.default_rng(0).integers(0, 256, (count, side, side, 3), dtype=np.uint8)
    return images, np.arange(count) * len(CLASSES) // count


def encoded(image: np.ndarray, form: str = "PNG") -> bytes:
    """The bytes of an image file."""
    file = io.BytesIO()
    Image.fromarray(image).save(file, form)
    return file.getvalue()


def write_source(kind: str, folder: Path, count: int = 20, *, side: int = 8, broken: tuple[int, ...] = ()) -> Path:
    """Writes the images into `folder` and returns what to give as SOURCE; of `broken` ones only the first bytes."""
    images, labels = images_of(count, side)
    files = [encoded(image)[: 60 if i in broken else None] for i, image in enumerate(images)]
    folder.mkdir(parents=True)
    if kind == "folder":
        for i, (content, label) in enumerate(zip(files, labels, strict=True)):
            path = folder / CLASSES[label] / f"{CLASSES[label]}_{i:05d}.JPEG"  # the name is not believed
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        return folder
    if kind == "parquet":
        for part in range(2):
            chosen = range(part * count // 2, (part + 1) * count // 2)
            write_parquet(
                folder / f"train-{part:05d}-of-00002.parquet", [files[i] for i in chosen], labels[list(chosen)]
            )
        return folder
    if kind == "webdataset":
        for part in range(2):
            chosen = range(part * count // 2, (part + 1) * count // 2)
            write_tar(
                folder / f"images-{part:03d}.tar",
                {f"{i:05d}.{e}": c for i in chosen for e, c in (("png", files[i]), ("cls", b"%d" % labels[i]))},
            )
        return folder
    np.savez(folder / "images.npz", images=images, labels=labels)
    return folder / "images.npz"


def write_parquet(path: Path, files: list[bytes | None], labels, *, names=CLASSES, rows: int = 4, **columns) -> None:
    """A parquet file in the Hugging Face layout."""
    import json

    image = pa.array([{"bytes": file, "path": f"{i}.png"} for i, file in enumerate(files)],
                     pa.struct([("bytes", pa.binary()), ("path", pa.string())]))  # fmt: skip
    table = pa.table({"image": image, "label": pa.array(labels)} | columns)
    features = {"image": {"_type": "Image"}, "label": {"_type": "ClassLabel", "names": list(names)}}
    known = {"huggingface": json.dumps({"info": {"features": features}})} if names else {}
    pq.write_table(table.replace_schema_metadata(known), path, row_group_size=rows)


def write_tar(path: Path, files: dict[str, bytes]) -> None:
    """A plain tar."""
    with tarfile.open(path, "w") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
