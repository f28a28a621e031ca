"""Packed blocks of a stream of documents, which a training can resume without reading it again."""

import multiprocessing
from collections import defaultdict
from collections.abc import Iterator
from itertools import count
from typing import Any, TypeAlias

import numpy as np
from datasets import IterableDataset
from torch.utils import data as torch_data

from ..errors import UserError
from .encoding import encode_unlearnt, is_learnt

_SHUFFLE_BUFFER = 10_000  # documents of a stream; so many are read and shuffled at a time

Place: TypeAlias = dict[str, Any]
"""Where a reader was before it read a group of documents, ready for JSON but for `rest`."""
_START: Place = {"blocks": 0, "epoch": 0, "group": 0, "documents": None, "rest": []}


class PackedStream(torch_data.IterableDataset):
    """Rows with `input_ids` of `context_length` tokens, cut from documents while they are read.

    With a `seed` the stream never ends: it is read again and again, each time in a new order. The
    order depends only on the seed and the number of readers. Each worker of a `DataLoader` is a
    reader, with its own part of the shards; workers beyond the number of shards read nothing. If
    several processes train, the first reads for all of them (Accelerate's default), so that no
    document is read twice. After `split`, each process reads its own shards.

    A seeded stream resumes in place. `datasets` restores its position in the documents exactly, but
    not the documents that wait in a shuffle buffer. So whole groups of documents are read and
    shuffled here: a position is a place between two groups, and blocks to drop after it.
    """

    num_bytes: int | None = None  # of the text, if they were counted

    def __init__(
        self,
        tokens: IterableDataset,
        *,
        context_length: int,
        eos_token_id: int | None,
        seed: int | None = None,
    ):
        self.tokens = tokens
        self.context_length = context_length
        self.eos = np.array([] if eos_token_id is None else [eos_token_id], dtype=np.int64)
        self.seed = seed
        self.num_processes, self.process_index = 1, 0
        self._begin_at({})

    def split(self, num_processes: int, process_index: int) -> None:
        """Read only the shards of one of several processes, which has a `DataLoader` of its own.

        All readers of all processes take turns: N processes with W workers each get, in turn, the
        batches of one process with N * W workers.

        Raises:
            UserError: there are fewer shards than processes.
        """
        if self.tokens.num_shards < num_processes:
            raise UserError(
                f"dispatch_batches=False lets each process read its own shards, but the stream has "
                f"{self.tokens.num_shards} for {num_processes} processes: leave it out, and the "
                "first process reads for all."
            )
        self.num_processes, self.process_index = num_processes, process_index

    def _begin_at(self, state: dict[str, Any]) -> None:
        self._state = state
        # Where each reader has been; workers of a DataLoader send it.
        self._places: dict[int, list[Place]] = defaultdict(list)
        self._sent: Any = None if self.seed is None else multiprocessing.Queue()

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        worker = torch_data.get_worker_info()
        readers = self.count_readers(worker.num_workers if worker else 0)
        own, turn = self._list_own(readers), worker.id if worker else 0
        if turn >= len(own):
            return
        number, tokens = own[turn], self.tokens
        if readers > 1:
            tokens = tokens.shard(readers, number, contiguous=False)
        yield from self._cut(tokens, number)

    def count_readers(self, num_workers: int) -> int:
        """Return how many readers share the shards, if each `DataLoader` has so many workers."""
        most = self.tokens.num_shards // self.num_processes
        return self.num_processes * max(1, min(num_workers, most))

    def _list_own(self, readers: int) -> list[int]:
        """Return the numbers of the readers in this process, in the order of its workers."""
        # DataLoader takes batches from its workers in turn, and from worker 0 first.
        first = self._state.get("turn", 0) + self.process_index
        return [(first + i) % readers for i in range(0, readers, self.num_processes)]

    def state_dict(self, *, batches: int, batch_size: int, num_workers: int = 0) -> dict[str, Any]:
        """Return the position after so many batches, those of all processes together.

        The loader may have read more in advance. The result is ready for JSON. It has no `places`,
        so that a resumed training must read all again, if a reader has no documents in its shards.
        The places of readers in other processes are None: see `merge_positions`.
        """
        readers = self.count_readers(num_workers)
        own = self._list_own(readers)
        order = {"readers": readers, "batch_size": batch_size}
        while self._sent is not None and not self._sent.empty():
            number, place = self._sent.get()
            self._places[number].append(place)
        if any("ended" in places[-1] for places in self._places.values() if places):
            return order
        blocks = [len(range(number, batches, readers)) * batch_size for number in range(readers)]
        places = [self._find_place(n, blocks[n]) if n in own else None for n in range(readers)]
        return order | {"turn": batches % readers, "blocks": blocks, "places": places}

    def _find_place(self, number: int, blocks: int) -> Place:
        """Return the last place of a reader before so many blocks, and forget those before it."""
        known = self._places[number]
        while len(known) > 1 and known[1]["blocks"] <= blocks:
            known.pop(0)
        place = known[0] if known and known[0]["blocks"] <= blocks else self._begin(number)[0]
        return place | {"rest": [int(token) for token in place["rest"]]}

    def load_state_dict(
        self, state: dict[str, Any] | None, *, batch_size: int, num_workers: int = 0
    ) -> None:
        """Begin at a position that `state_dict` returned; None, or no `places`, is the start.

        Raises:
            UserError: the documents would come in another order: the number of readers differs, or
                several readers take turns after batches of another size.
        """
        state, readers = state or {}, self.count_readers(num_workers)
        if state and readers != (was := state["readers"]):
            workers, hint = f"dataloader_num_workers={num_workers}", f"dataloader_num_workers={was}"
            if self.num_processes > 1:
                workers += f" in {self.num_processes} processes"
                hint = f"{was} workers in all processes (none counts as one), or leave out "
                hint += f"dispatch_batches=False and set dataloader_num_workers={was}"
            raise UserError(
                f"{workers} would read the stream in another order than before: resume with {hint}."
            )
        if state and readers > 1 and batch_size != state["batch_size"]:
            raise UserError(
                f"Batches of {batch_size} rows would read the stream in another order than before: "
                f"resume with {state['batch_size']} as per_device_train_batch_size, or use "
                "dataloader_num_workers=0 from the start."
            )
        self._begin_at(state if "places" in state else {})

    def _begin(self, number: int) -> tuple[Place, int]:
        """Return where a reader begins, and how many blocks were yielded when it was saved."""
        if not self._state:
            return _START, 0
        return self._state["places"][number], self._state["blocks"][number]

    def _cut(self, tokens: IterableDataset, number: int) -> Iterator[dict[str, np.ndarray]]:
        """Yield the blocks of one reader."""
        begin, done = self._begin(number)
        blocks, step = begin["blocks"], self.context_length - 1
        rest = np.array(begin["rest"], dtype=np.int64)
        for place, group in self._read_groups(tokens, begin):
            self._record(number, place | {"blocks": blocks, "rest": rest})
            for ids in group:
                rest = np.concatenate((rest, ids))
                whole = max(0, len(rest) - 1) // step * step
                for start in range(0, whole, step):
                    blocks += 1
                    if blocks > done:
                        yield {"input_ids": rest[start : start + step + 1]}
                rest = rest[whole:]
        if self.num_processes > 1 and self.seed is not None:  # the other processes would wait
            raise UserError(
                "dispatch_batches=False lets each process read its own shards, but some of these "
                "have no documents: leave it out, and the first process reads for all."
            )
        self._record(number, begin | {"ended": True})
        if len(rest):
            yield {"input_ids": np.concatenate((rest, match_end(self.eos, rest)))}

    def _read_groups(
        self, tokens: IterableDataset, place: Place
    ) -> Iterator[tuple[Place, list[np.ndarray]]]:
        """Yield groups of documents, each with the place before it; shuffled if there is a seed."""
        # `iter`, as `for row in tokens` would divide the shards once more in a worker.
        if self.seed is None:
            for batch in tokens.iter(batch_size=1):
                yield place, batch["input_ids"]
            return
        # Shuffle the shards, and read one at a time, as `datasets` finds its place in a shard by
        # reading it from its start. A buffer of 1 leaves the rows to us. (The selection stops a
        # warning that the content of the buffer is lost.)
        tokens = tokens.shuffle(seed=self.seed, buffer_size=1, max_buffer_input_shards=1)
        tokens = tokens.select_columns("input_ids")
        documents = place["documents"]
        if documents:
            tokens.load_state_dict(documents)
        for epoch in count(place["epoch"]):
            tokens.set_epoch(epoch)
            first = place["group"] if epoch == place["epoch"] else 0
            group = -1
            for group, batch in enumerate(tokens.iter(batch_size=_SHUFFLE_BUFFER), first):
                rows = batch["input_ids"]
                order = np.random.default_rng((self.seed, epoch, group)).permutation(len(rows))
                before = {"epoch": epoch, "group": group, "documents": documents}
                yield before, [rows[i] for i in order]
                documents = tokens.state_dict()
            documents = None
            if group < 0:  # this reader has no documents
                return

    def _record(self, number: int, place: Place) -> None:
        if self.seed is None:
            return
        if torch_data.get_worker_info() is None:
            self._places[number].append(place)
        else:
            self._sent.cancel_join_thread()  # a worker may end before all is received
            self._sent.put((number, place))


def merge_positions(positions: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the position of a stream that several processes read, from what each of them knows.

    It is that of one process with as many readers.
    """
    places = zip(*(position["places"] for position in positions), strict=True)
    return positions[0] | {"places": [next(filter(None, some)) for some in places]}


def match_end(eos: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Return the last eos of a corpus, to be learnt only if the token before it is."""
    return eos if len(tokens) == 0 or is_learnt(tokens[-1]) else encode_unlearnt(eos)
