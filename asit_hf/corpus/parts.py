"""Tables written in parts, each whole or absent: the share of each process, resuming, and joining."""

import json
import logging
import os
import re
import shutil
import socket
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from ..utils.files import whole_file
from .engine import Table, Task
from .sources import Corpus

logger = logging.getLogger(__name__)

SETTINGS_NAME = ".run.json"  # hidden, as programs that read a folder of tables read all its files
# By default a corpus of known length has at least so many parts, to divide among processes; those of a stream have a
# fixed number of clips.
_MIN_PARTS, _MAX_CLIPS, _STREAM_CLIPS = 64, 1024, 256


def default_part_clips(corpus: Corpus, batch_size: int) -> int:
    """Clips in a part: whole batches of them, if a part has that many."""
    if corpus.num_clips is None:
        return -(-_STREAM_CLIPS // batch_size) * batch_size
    clips = max(1, corpus.num_clips // _MIN_PARTS)
    return min(clips if clips < batch_size else -(-clips // batch_size) * batch_size, max(_MAX_CLIPS, batch_size))


def share_out(
    corpus: Corpus, part_clips: int, rank: int = 0, world_size: int = 1, done: Collection[tuple[int, int]] = ()
) -> list[Task]:
    """
    What a process is to do: its share of the parts of `part_clips` clips without those that are done, by shard and
    number.
    """
    if corpus.num_clips is not None:
        numbers = range(rank, -(-corpus.num_clips // part_clips), world_size)
        return [Task(0, part_clips, number, number + 1) for number in numbers if (0, number) not in done]
    shards = range(corpus.num_shards)
    of_shard: dict[int, set[int]] = {shard: set() for shard in shards}
    for shard, number in done:
        of_shard[shard].add(number)
    first = {shard: next(number for number in count() if number not in of_shard[shard]) for shard in shards}
    share = {}
    if len(shards) >= world_size:  # each process has shards of its own
        shards = shards[rank::world_size]
    else:
        share = {"rank": rank, "world_size": world_size}
    return [Task(shard, part_clips, first[shard], done=frozenset(of_shard[shard]), **share) for shard in shards]


def process_share() -> tuple[int, int]:
    """
    Rank and number of the processes, from the environment variables `RANK` and `WORLD_SIZE` that torchrun and
    `accelerate launch` set; no connection between the processes is needed.

    Raises:
        ValueError: only one of them is set, or a rank that is not below the number.
    """
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    if rank is None and world_size is None:
        return 0, 1
    if not (rank and world_size and rank.isdigit() and world_size.isdigit() and int(rank) < int(world_size)):
        raise ValueError(f"expected RANK below WORLD_SIZE in the environment, got {rank} and {world_size}")
    return int(rank), int(world_size)


class Tables(Protocol):
    """A kind of table, whose parts have the extension `suffix`."""

    suffix: str

    def open(self, path: Path) -> AbstractContextManager[Table]: ...

    def join(self, parts: Sequence[Path], path: Path) -> None:
        """Writes one table of all parts."""


@dataclass(frozen=True)
class Parts:
    """
    The parts of a table in a folder, `part-00000.csv`, or `part-00000-00000.csv` by shard and number for a stream of
    several shards.

    Args:
        folder: of the files.
        tables: their kind.
        by_shard (`bool`): whether names have a shard.
        found (`set`): shard and number of all parts that this process has found or written.
    """

    folder: Path
    tables: Tables
    by_shard: bool = False
    found: set[tuple[int, int]] = field(default_factory=set, compare=False)

    def path(self, shard: int, number: int) -> Path:
        name = f"part-{shard:05d}-{number:05d}" if self.by_shard else f"part-{number:05d}"
        return self.folder / f"{name}{self.tables.suffix}"

    @contextmanager
    def open(self, shard: int, number: int) -> Iterator[Table]:
        """The table of a part, which appears under its name when the context is left without an error."""
        with whole_file(self.path(shard, number), by=_process()) as path, self.tables.open(path) as table:
            yield table
        self.found.add((shard, number))

    def done(self) -> dict[tuple[int, int], Path]:
        """The files of complete parts by shard and number, in order."""
        pattern = re.compile(
            r"part-(\d{5,})" + (r"-(\d{5,})" if self.by_shard else "()") + re.escape(self.tables.suffix)
        )
        found = {}
        for path in self.folder.iterdir() if self.folder.is_dir() else ():
            if match := pattern.fullmatch(path.name):
                numbers = [int(group) for group in match.groups() if group]
                found[(numbers[0], numbers[1]) if self.by_shard else (0, numbers[0])] = path
        self.found.update(found)
        return dict(sorted(found.items()))

    def start(self, settings: Mapping[str, Any]) -> None:
        """
        Makes the folder, or finds that of an earlier run with the same settings.

        Raises:
            ValueError: the folder has the parts of a run with other settings, or other files.
        """
        path = self.folder / SETTINGS_NAME
        if not path.is_file():
            if self.folder.is_dir() and (others := sorted(self.folder.glob("[!.]*"))):
                what = f"expected a new or empty folder, or one of an earlier run, got {self.folder}"
                raise ValueError(f"{what} with {others[0].name}: choose another --output")
            with whole_file(path, by=_process()) as unfinished:  # other processes write the same
                unfinished.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        elif unlike := differences(read_settings(self.folder), settings):
            what = f"{self.folder} holds the parts of a run with other settings, {unlike}"
            raise ValueError(f"{what}: choose another --output, or remove that folder")
        self._remove_unfinished()

    def _remove_unfinished(self) -> None:
        """Removes what processes that were killed on this machine have left."""
        for path in self.folder.glob(".*.unfinished"):
            host, _, process = path.name.removesuffix(".unfinished").rpartition(".")[2].rpartition("-")
            if host == _process().rpartition("-")[0] and process.isdigit() and not _is_alive(int(process)):
                path.unlink(missing_ok=True)


def read_settings(folder: Path) -> dict[str, Any]:
    """The settings of the run whose parts a folder holds."""
    return json.loads((folder / SETTINGS_NAME).read_text(encoding="utf-8"))


def count_missing(folder: Path) -> int:
    """How many parts a folder of a corpus of known length lacks; 0 if it is no such folder."""
    settings = read_settings(folder) if (folder / SETTINGS_NAME).is_file() else {}
    if not settings.get("num_clips"):
        return 0
    return -(-settings["num_clips"] // settings["part_clips"]) - len(list(folder.glob("part-*")))


def differences(found: Mapping[str, Any], expected: Mapping[str, Any]) -> str:
    """The settings that differ, as text; empty if there are none."""
    names = [name for name in {**found, **expected} if found.get(name) != expected.get(name)]
    return ", ".join(f"{name} {found.get(name)!r} instead of {expected.get(name)!r}" for name in names)


@contextmanager
def one_file(path: Path, tables: Tables, settings: Mapping[str, Any], by_shard: bool = False) -> Iterator[Parts]:
    """
    Parts in a hidden folder, `parts_folder`, where they stay if the run is killed; on exit they are joined. Those of
    an unfinished run with other settings are removed.
    """
    parts = Parts(parts_folder(path), tables, by_shard)
    if parts.folder.is_dir() and not (parts.folder / SETTINGS_NAME).is_file():
        shutil.rmtree(parts.folder)  # a run was killed while it removed them
    found = read_settings(parts.folder) if (parts.folder / SETTINGS_NAME).is_file() else settings
    if unlike := differences(found, settings):
        logger.warning("removed the parts of an unfinished run with other settings: %s", unlike)
        shutil.rmtree(parts.folder)
    yield parts
    if missing := parts.found - parts.done().keys():
        what = f"expected {parts.path(*min(missing))}, which is gone, as another run writes {path} too"
        raise ValueError(f"{what}: run one of them again when the others have ended")
    try:
        with whole_file(path) as unfinished:
            tables.join(list(parts.done().values()), unfinished)
    except ValueError:  # a table that these parts cannot make
        shutil.rmtree(parts.folder)
        raise
    shutil.rmtree(parts.folder)


def parts_folder(path: Path) -> Path:
    """Where the parts of a single file lie, beside it, until it is complete."""
    return path.with_name(f".{path.name}.parts")


def _process() -> str:
    """A name of this process among all that share a folder."""
    return f"{re.sub('[^A-Za-z0-9-]', '-', socket.gethostname())}-{os.getpid()}"


def _is_alive(process: int) -> bool:
    with suppress(ProcessLookupError):
        with suppress(PermissionError):
            os.kill(process, 0)
        return True
    return False
