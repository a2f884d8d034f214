"""One process of a test as one worker of several over gloo."""

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist


@contextlib.contextmanager
def worker(**where: Any) -> Iterator[int]:
    """Yields the rank. Ends the process, without Python's own way of closing.

    A thread of gloo that lets go of a collective's tensor while the interpreter closes aborts the process now and
    then (pytorch #179291), also after the group is destroyed, since a DistributedDataParallel still refers to it.
    """
    dist.init_process_group("gloo", **where)
    torch.set_num_threads(1)
    yield dist.get_rank()
    dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
