"""Random crops of a stream."""

import logging
from collections.abc import Iterator
from hashlib import blake2b
from typing import Any

import numpy as np
from torch.utils.data import IterableDataset, get_worker_info

from .audio import AudioReadError, source_name
from .clips import audio_of, select_audio
from .crops import CropSettings, add_bad_file
from .randomness import Seeded, sample_key

logger = logging.getLogger(__name__)


class StreamingCrops(Seeded, IterableDataset):
    """Random crops of a stream: the items of `PretrainingCrops`, with a hash of the clip as `index`.

    Args:
        dataset: a `datasets.IterableDataset` with an `audio` column.
        sampling_rate, seed, strict, crops: as in `PretrainingCrops`.
        rank, world_size: this process and the number of processes. If the number of shards is a multiple of
            `world_size`, each process reads its own shards; otherwise each reads all of them and keeps every
            `world_size`-th row. Loader workers divide a process's shards among them. `EpochCallback` sets these two
            and `repeat` within a trainer.
        repeat: start the next epoch at the end of the stream, so that it never ends: processes whose shards hold
            different numbers of clips then still take equally many batches.

    A pass yields each clip once. A clip's crops depend only on (seed, epoch, its path, or its bytes without a path),
    not on the order or the number of workers. An unreadable clip is replaced by a second item of the next readable
    one, which has another `sample_key` (so another mask) and reports it; unreadable clips at the very end are logged.
    """

    def __init__(
        self,
        dataset: Any,
        sampling_rate: int,
        *,
        seed: int = 0,
        strict: bool = False,
        rank: int = 0,
        world_size: int = 1,
        repeat: bool = False,
        **crops: Any,
    ):
        super().__init__(seed)
        if not 0 <= rank < world_size:
            raise ValueError(f"expected a rank from 0 to {world_size - 1}, got {rank}")
        self.settings = CropSettings(sampling_rate, **crops)
        self.dataset = select_audio(dataset)
        self.strict, self.repeat = strict, repeat
        self.rank, self.world_size = rank, world_size
        self._skipped = (0, 1)

    def skip(self, num_batches: int, batch_size: int) -> None:
        """Fast-forward the next loader of this stream: its first batches are `{"skipped": clips}`, without audio.

        The batches after them are those of an uninterrupted run. Skipped rows are read but not decoded.
        """
        self._skipped = (num_batches, batch_size)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        epoch = self.epoch
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
                    yield from self._items(audio_of(row), epoch, bad_files)
            if is_empty or not self.repeat:
                break
            epoch += 1
            rows = self._rows(epoch)
        for path, reason in bad_files:
            logger.warning("skipped %s: %s", path, reason)

    def _rows(self, epoch: int) -> Any:
        from datasets.distributed import split_dataset_by_node

        # a new object, as one object's epoch is shared by all workers, which may be in different epochs
        rows = split_dataset_by_node(self.dataset, self.rank, self.world_size)
        rows.set_epoch(epoch)
        return rows

    def _num_skipped_rows(self, num_shards: int) -> int:
        """Rows this worker skips: the workers that have shards take turns, one batch each."""
        num_batches, batch_size = self._skipped
        worker = get_worker_info()
        if worker is None:
            return num_batches * batch_size
        num_working = min(worker.num_workers, num_shards)
        return (num_batches // num_working + (worker.id < num_batches % num_working)) * batch_size

    def _items(self, source: Any, epoch: int, bad_files: list[tuple[str, str]]) -> list[dict[str, Any]]:
        """One item of `source` and one for each of `bad_files`, which it empties; none if `source` is unreadable."""
        index = _source_hash(source)
        try:
            crops = self.settings.read(source, sample_key(self.seed, epoch, index))
        except AudioReadError as error:
            if self.strict:
                raise
            add_bad_file(bad_files, error)
            return []
        # The clip's own item is last, so that a run resumed between these items continues with the same ones.
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
