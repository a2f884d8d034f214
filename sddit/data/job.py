"""A data set to be prepared: checked before anything is written, and gone on with where an earlier run was killed.

    <out>/prepare.json       what was asked for, and of which files; written first
    <out>/images-00000.npy   and labels-00000.npy: a shard (`prepare.py`)
    <out>/.parts/            a report of each shard that is whole; gone at the end
    <out>/unreadable.txt     images that could not be decoded, if any
    <out>/manifest.json      written last

How the shards are spread over workers is the caller's (`Run`): a loop in this process, or Ray Data in
`orchestration/prepare.py`. Free of torch.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from sddit.data.manifest import MANIFEST, Manifest, VaeInfo, open_manifest, write_manifest
from sddit.data.output import SCRATCH, Output
from sddit.data.prepare import Report, Task, decode, report_name
from sddit.data.sources import Index, Kind, Listing, check_no_class_is_empty, index_source, list_source, read_images
from sddit.data.vae import encoded, read_vae
from sddit.errors import DataError, UsageError
from sddit.filesystem import is_remote

PLAN, UNREADABLE = "prepare.json", "unreadable.txt"
SHARD_IMAGES, SHARD_BYTES = 4096, 2**28  # of one shard: at most so many images, and bytes of pixels
PROBED = 100  # of the first images, one must be readable
Run = Callable[[Iterator[Task]], Generator[Report, None, None]]  # makes shards, in any order


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Request(_Frozen):
    """What determines the bytes: which files, and what is made of them."""

    kind: Kind
    files: int
    bytes: int
    listing: str  # digest of names and sizes
    size: int | None  # side of the centre crop; None keeps images as they are
    channels: Literal[1, 3]
    vae: str | None  # digest
    mirrored: bool = False


class Plan(_Frozen):
    """`prepare.json`: the request, and what was found in the source."""

    version: Literal[1] = 1
    request: Request
    count: int
    shape: tuple[int, int, int]  # (C, H, W) of the pixels
    shard_images: int

    @property
    def shards(self) -> int:
        return -(-self.count // self.shard_images)


class Job:
    """A data set to be prepared. Making one checks everything and writes nothing.

    Args:
        source: as for `list_source`.
        out: a folder or an address; made where missing.
        size: side of the centre crop; None keeps images that all have one size as they are.
        vae: encode with this AutoencoderKL, a folder or a name on the Hugging Face hub.
        mirrored: encode the mirrored images as well, which `data.flip` needs of latents.
        channels: 3, or 1 for grey images.
        name: of the data set, in its manifest; by default that of its folder.
        max_unreadable: fraction of the images that may be unreadable, and are left out.

    Raises:
        UsageError: arguments that do not fit together, or `out` holds something else.
        DataError: the source is missing, or is not what training data are made of.
        StorageError: a storage cannot be opened.
    """

    def __init__(
        self,
        source: str,
        out: str,
        *,
        size: int | None = None,
        vae: str | None = None,
        mirrored: bool = False,
        channels: Literal[1, 3] = 3,
        name: str | None = None,
        max_unreadable: float = 0.001,
    ) -> None:
        _check_arguments(size, channels, vae, mirrored, max_unreadable)
        # Workers and later readers have other current folders.
        self.vae = _absolute(vae) if vae and Path(vae).expanduser().is_dir() else vae
        self.out = Output(_absolute(out))
        self.name = name or self.out.path.rpartition("/")[2]
        self.max_unreadable = max_unreadable
        vae_digest = read_vae(self.vae)[1] if self.vae else None
        self.listing = list_source(source)
        _check_apart(self.listing, self.out)
        self.request = Request(
            kind=self.listing.kind,
            files=len(self.listing.files),
            bytes=self.listing.bytes,
            listing=self.listing.digest,
            size=size,
            channels=channels,
            vae=vae_digest,
            mirrored=mirrored,
        )
        _check_folder(self.out)
        self.stored = self.out.files()  # bytes of what is there, by name
        known = self._stored_plan()
        self.done = known is not None and MANIFEST in self.stored
        if known is not None and self.done:
            self.plan = known
            open_manifest(self.out.uri)  # whole?
            return
        self.index: Index = index_source(self.listing)
        shape = known.shape if known else _probe(self.listing, self.index, size, channels)
        self.plan = known or Plan(
            request=self.request, count=len(self.index.labels), shape=shape, shard_images=images_in_shard(shape)
        )
        self.vae_info: VaeInfo | None = None
        self.shape = shape  # (C, H, W) as the network sees it
        if self.vae:
            info, self.shape = encoded(self.vae, shape)
            self.vae_info = info.model_copy(update={"mirrored": mirrored})
        self.finished = self._finished()
        _check_room(self.out, self.bytes - sum(self.stored.values()))

    @property
    def bytes(self) -> int:
        """What the images take in all shards: uint8 pixels, or mean and std in half precision."""
        values = self.plan.count * int(np.prod(self.shape))
        return values * (8 if self.request.mirrored else 4) if self.vae else values

    def tasks(self) -> Iterator[Task]:
        """The shards still to be made."""
        skip = {report.index for report in self.finished}
        return (self._task(i) for i in range(self.plan.shards) if i not in skip)

    def run(self, run: Run, tell: Callable[[Report], None] = lambda report: None) -> Manifest:
        """Makes the shards that are missing, calling `tell` after each, and writes the manifest.

        Raises:
            DataError: more images are unreadable than allowed, a class lost all of its images, or images differ in
                size. What is whole is kept.
        """
        self.out.write(PLAN, self.plan.model_dump_json(indent=1) + "\n")
        reports = list(self.finished)
        self._check_unreadable(reports)
        if len(reports) < self.plan.shards:
            with contextlib.closing(run(self.tasks())) as made:  # else workers would go on after an error here
                for report in made:
                    reports.append(report)
                    tell(report)
                    self._check_unreadable(reports)
        return self._finish(sorted(reports, key=lambda report: report.index))

    def clean(self) -> None:
        """Removes what only an unfinished run needs."""
        if any(name.startswith(f"{SCRATCH}/") for name in self.out.files()):
            self.out.delete(SCRATCH)

    def _finished(self) -> list[Report]:
        """The shards of an earlier run that are whole."""
        reports = []
        for name in (report_name(index) for index in range(self.plan.shards)):
            if name in self.stored:
                try:
                    report = Report.model_validate_json(self.out.read(name))
                except ValidationError:  # damaged: the shard is made again
                    continue
                files = (report.shard.images, report.shard.labels) if report.shard else ()
                if all(self.stored.get(file.file) == file.bytes for file in files):
                    reports.append(report)
        return reports

    def _task(self, i: int) -> Task:
        lo, hi = i * self.plan.shard_images, min((i + 1) * self.plan.shard_images, self.plan.count)
        return Task(
            index=i,
            uri=_absolute(self.listing.uri),
            kind=self.listing.kind,
            places=self.index.places(lo, hi),
            labels=self.index.labels[lo:hi].tolist(),
            out=self.out.uri,
            size=self.request.size,
            shape=self.plan.shape,
            num_classes=self.index.num_classes,
            vae=self.vae,
            mirrored=self.request.mirrored,
        )

    def _check_unreadable(self, reports: Sequence[Report]) -> None:
        found = [each for report in reports for each in report.unreadable]
        if len(found) > self.max_unreadable * self.plan.count:
            self._list_unreadable(reports)
            _, name, reason = found[0]
            raise DataError(
                f"{len(found):,} of {self.plan.count:,} images cannot be read, such as {name}: {reason}. They are "
                f"listed in {self.out.uri}/{UNREADABLE}. Mend or remove them, or allow more with --max-unreadable "
                f"(a fraction, now {self.max_unreadable:g})."
            )

    def _list_unreadable(self, reports: Iterable[Report]) -> None:
        lines = [f"{name}\t{reason}\n" for report in reports for _, name, reason in report.unreadable]
        if lines:
            self.out.write(UNREADABLE, "".join(sorted(lines)))

    def _finish(self, reports: Sequence[Report]) -> Manifest:
        self._list_unreadable(reports)
        dropped = [r.index * self.plan.shard_images + i for r in reports for i, _, _ in r.unreadable]
        counts = np.bincount(np.delete(self.index.labels, dropped), minlength=self.index.num_classes)
        where = f"{self.listing.uri}, without what cannot be read,"
        check_no_class_is_empty(where, counts, self.index.classes)
        with self.out.staging() as staging:
            manifest = write_manifest(
                staging,
                [report.shard for report in reports if report.shard],
                name=self.name,
                shape=self.shape,
                num_classes=self.index.num_classes,
                classes=self.index.classes,
                vae=self.vae_info,
            )
        self.clean()
        return manifest

    def _stored_plan(self) -> Plan | None:
        """The plan in `out`, which must be this one; None where `out` is empty."""
        if PLAN not in self.stored:
            if others := [name for name in self.stored if not name.startswith(".")]:
                what = "a data set that was made otherwise" if MANIFEST in others else f"other files ({min(others)})"
                raise UsageError(f"{self.out.uri} holds {what}. Choose another folder with --out, or empty that one.")
            return None
        try:
            plan = Plan.model_validate_json(self.out.read(PLAN))
        except ValueError:
            raise DataError(f"{self.out.uri}/{PLAN} cannot be read. Delete {self.out.uri} and start anew.") from None
        if plan.request != self.request:
            raise UsageError(
                f"{self.out.uri} was begun with another {_differences(plan.request, self.request)}. Give what it was "
                "begun with, choose another folder with --out, or delete that one."
            )
        return plan


def images_in_shard(shape: tuple[int, int, int]) -> int:
    """Images of (C, H, W) in a shard: 4,096, or halved until their pixels fit into `SHARD_BYTES`."""
    images = SHARD_IMAGES
    while images > 1 and images * int(np.prod(shape)) > SHARD_BYTES:
        images //= 2
    return images


def _absolute(path: str) -> str:
    return path if "://" in path else str(Path(path).expanduser().absolute())


def _check_arguments(size: int | None, channels: int, vae: str | None, mirrored: bool, max_unreadable: float) -> None:
    if size is not None and not 1 <= size <= 8192:
        raise UsageError(f"--size is {size}, but must be the side in pixels, from 1 to 8192.")
    if channels not in (1, 3):
        raise UsageError(f"--channels is {channels}, but must be 3 (RGB) or 1 (grey).")
    if not 0 <= max_unreadable < 1:
        raise UsageError(f"--max-unreadable is {max_unreadable:g}, but must be a fraction in [0, 1).")
    if mirrored and not vae:
        raise UsageError("--mirrored is for latents (--vae): pixels are mirrored during training. Leave it out.")


def _check_apart(listing: Listing, out: Output) -> None:
    """What is written must not be read as part of the source at the next start."""
    inside = f"{out.path}/".startswith(f"{listing.root}/") and is_remote(listing.uri) == is_remote(out.uri)
    if inside and (listing.kind == "folder" or out.path == listing.root):
        raise UsageError(f"--out {out.uri} lies in the source {listing.uri}. Choose a folder beside it.")


def _check_folder(out: Output) -> None:
    if out.local and not (existing := _existing(out.local)).is_dir():
        raise UsageError(f"--out {out.uri} cannot be made: {existing} is a file. Choose a folder.")


def _existing(path: Path) -> Path:
    return next(each for each in (path, *path.parents) if each.exists())


def _check_room(out: Output, needed: int) -> None:
    """Whether a local disk has as many bytes free."""
    if out.local is None:
        return
    if (free := shutil.disk_usage(_existing(out.local)).free) < needed:
        raise UsageError(
            f"{out.uri} needs {needed / 1e9:.1f} GB, but its disk has {free / 1e9:.1f} GB free. Make room, or choose "
            "another place with --out."
        )


def _probe(listing: Listing, index: Index, size: int | None, channels: int) -> tuple[int, int, int]:
    """(C, H, W): what `size` says, else what the first image that can be read has."""
    if size is not None:
        return channels, size, size
    for _, content in read_images(listing.uri, listing.kind, index.places(0, min(PROBED, len(index.labels)))):
        try:
            _, height, width = decode(content, None, channels).shape
            return channels, height, width
        except ValueError:
            continue
    raise DataError(f"None of the first {PROBED} images of {listing.uri} can be read. Is it what you meant to give?")


def _differences(before: Request, now: Request) -> str:
    """What two requests differ in, in words."""
    words = []
    if (before.kind, before.listing) != (now.kind, now.listing):
        words.append(
            f"source ({before.files:,} {before.kind} file{'s' * (before.files != 1)} of {before.bytes:,} bytes, now "
            f"{now.files:,} {now.kind} of {now.bytes:,})"
        )
    for name in ("size", "channels", "vae", "mirrored"):
        old, new = getattr(before, name), getattr(now, name)
        if old != new:
            words.append(f"--{name} ({str(old)[:12]}, now {str(new)[:12]})")
    return " and another ".join(words)
