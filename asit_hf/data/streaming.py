"""Random crops of a stream."""

import logging
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .audio import AudioReadError, source_name
from .clips import _audio_only, _shared_counter, _source
from .crops import CropSettings, _report
from .randomness import sample_key

logger = logging.getLogger(__name__)


class StreamingCrops(IterableDataset):
    """Random crops of a stream: the items of `PretrainingCrops`, `index` being the sample's hash.

    Args:
        dataset: a `datasets.IterableDataset` with an `audio` column.
        others: as in `PretrainingCrops`.
        rank, world_size: this process and how many there are. Each reads shards of its own where the number of shards
            is a multiple of `world_size`; otherwise each reads all of them and keeps every `world_size`-th row. Loader
            workers share a process's shards among them. `EpochCallback` sets these two and `repeat` within a trainer.
        repeat: start over at the end, in the next epoch, so that the stream has none: processes whose shards hold
            different numbers of clips then still take equally many batches.

    A pass gives each clip once. The crops of a clip depend on (seed, epoch, its path, or its bytes where it has no
    path), not on the order or the number of workers. In place of a clip that cannot be read the next readable one
    comes twice, masked differently by its `sample_key`, and reports it; those at the very end are logged.
    """

    def __init__(
        self,
        dataset: Any,
        sampling_rate: int,
        global_seconds: float = 6.0,
        num_global_crops: int = 2,
        local_seconds: float = 2.0,
        num_local_crops: int = 4,
        seed: int = 0,
        roll_probability: float = 0.0,
        strict: bool = False,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
    ):
        if not 0 <= rank < world_size:
            raise ValueError(f"expected a rank from 0 to {world_size - 1}, got {rank}")
        self.settings = CropSettings(
            sampling_rate, global_seconds, num_global_crops, local_seconds, num_local_crops, roll_probability
        )
        self.dataset = _audio_only(dataset)
        self.seed = seed
        self.strict = strict
        self.rank, self.world_size = rank, world_size
        self.repeat = repeat
        self._skipped = (0, 1)
        self._epoch = _shared_counter()

    def set_epoch(self, epoch: int) -> None:
        """Draw other crops, and another order of a shuffled stream, from the next pass on, in running workers too."""
        self._epoch.fill_(epoch)

    def skip(self, num_batches: int, batch_size: int) -> None:
        """Fast-forward the next loader of this stream: its first batches come without audio, as `{"skipped": clips}`.

        What follows is what would have followed them. Rows are read on the way, but nothing is decoded.
        """
        self._skipped = (num_batches, batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = int(self._epoch)
        rows = self._rows(epoch)
        num_skipped = self._num_skipped_rows(rows.num_shards)
        bad_files: list[tuple[str, str]] = []
        while True:
            is_empty = True
            for row in rows:
                is_empty = False
                if num_skipped > 0:
                    num_skipped -= 1
                    yield {"skipped": 1}
                else:
                    yield from self._items(_source(row), epoch, bad_files)
            if is_empty or not self.repeat:
                break
            epoch += 1
            rows = self._rows(epoch)
        for path, reason in bad_files:
            logger.warning("left out %s: %s", path, reason)

    def _rows(self, epoch: int) -> Any:
        from datasets.distributed import split_dataset_by_node

        # A fresh object: the epoch of one is shared by all workers, which need not be in the same.
        rows = split_dataset_by_node(self.dataset, self.rank, self.world_size)
        rows.set_epoch(epoch)
        return rows

    def _num_skipped_rows(self, num_shards: int) -> int:
        """Workers that have shards take turns, a batch each."""
        num_batches, batch_size = self._skipped
        worker = get_worker_info()
        if worker is None:
            return num_batches * batch_size
        num_working = min(worker.num_workers, num_shards)
        return (num_batches // num_working + (worker.id < num_batches % num_working)) * batch_size

    def _items(self, source: Any, epoch: int, bad_files: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """One item of `source` and one in place of each of `bad_files`; or none, and one bad file more."""
        index = _source_hash(source)
        try:
            crops = self.settings.read(source, sample_key(self.seed, epoch, index))
        except AudioReadError as error:
            if self.strict:
                raise
            _report(bad_files, error)
            return []
        # The clip's own item comes last, so that a run resumed between these items goes on with the same.
        attempts = range(len(bad_files), -1, -1)
        keys = [sample_key(self.seed, epoch, index, attempt) for attempt in attempts]
        crops |= {"index": index, "file": source_name(source)}
        items = [{**crops, "sample_key": key, "bad_files": []} for key in keys]
        items[0]["bad_files"] = bad_files.copy()
        bad_files.clear()
        return items


def _source_hash(source: Any) -> int:
    if isinstance(source, dict) and not source.get("path"):
        source = source.get("bytes") or np.asarray(source.get("array", source.get("raw"))).tobytes()
    content = source if isinstance(source, (bytes, bytearray)) else source_name(source).encode()
    return int.from_bytes(blake2b(content, digest_size=8).digest()) >> 1
