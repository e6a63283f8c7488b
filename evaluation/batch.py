"""Reconstruct or decode a batch of files, and write scores.csv. A failed file does not stop it.

Three things happen at the same time: a thread reads files, the model reconstructs groups of files
(reconstruct_group.py), and another thread writes outputs and draws figures. Each step is only a few
groups ahead of the next, which bounds the memory for waiting files.
"""

from __future__ import annotations

import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from tqdm import tqdm

from dataset import prefetch
from evaluation.batch_figures import MAX_FIGURES, BatchFigures
from evaluation.codec import BATCH_SIZE, Coder
from evaluation.reconstruct_group import (
    LoadedFile,
    Result,
    decode_file,
    output_path,
    reconstruct_group,
    split_groups,
    write_outputs,
)
from evaluation.score_table import ScoreTable, input_path, output_stem, print_scores
from modules import VQVAE
from mri import files
from mri.files import printable
from training.guards import collect_stop_signals
from utils import DataError, UserError

MANY_FILES = 64  # from this number on, a CPU reconstructs several groups at the same time
MAX_GROUPS = 4  # largest number of these groups, which limits the memory
MAX_READ_BYTES = 1 << 23  # a read task ends when its files exceed 8 MiB in total


class Batch:
    """All files of one call of predict.py: reconstruct or decode them, and report the results."""

    def __init__(self, model: VQVAE, inputs: list[Path], out: Path, coder: Coder | None = None):
        """Choose the names of all outputs. With a coder, files of codes are entropy-coded.

        Raises:
            DataError: if an earlier scores.csv in `out` cannot be used.
            OSError: if `out` cannot be written.
        """
        self.model = model
        self.inputs = inputs
        self.out = out
        self.coder = coder
        self.table = ScoreTable(out)
        self.names = self.table.claim_names(inputs)
        self._finished: set[str] = set()  # output names
        self._errors: list[str] = []
        self._signals: list[int] = []
        self._progress = tqdm(total=len(inputs), unit=" files")

    def reconstruct(
        self,
        load: Callable[[Path, str], LoadedFile],
        *,
        resize_to: tuple[int, int] | None = None,
        figures: int = MAX_FIGURES,
        error_map: bool = False,
        export_codes: bool = False,
    ) -> None:
        """Reconstruct all files, write their outputs and scores.csv, and print the scores.

        Args:
            load: function (path, output name) -> the loaded file.
            resize_to: see `reconstruct_group`.
            figures, error_map, export_codes: see `evaluation.reconstruct.reconstruct_files`.

        Raises:
            UserError: if files could not be read or written.
            KeyboardInterrupt, SystemExit: after a stop signal.
        """
        with self._finishing():
            drawing = BatchFigures(
                self.out, self.table, self.names, figures, self.model.bits_per_pixel
            )

            def write(results: list[Result]) -> list[tuple[Result, str]]:
                """Write the outputs of a group; return an error message, or "", for each file."""
                written = []
                for result in results:
                    try:
                        write_outputs(
                            self.model, result, self.out, error_map, export_codes, self.coder
                        )
                    except (DataError, OSError) as error:
                        written.append((result, str(error)))
                        continue
                    result.row |= {"in_training": result.source.in_training, "figure": ""}
                    drawing.add(result)
                    written.append((result, ""))
                return written

            for written in prefetch(write, self._reconstruct_groups(load, resize_to), depth=1):
                for result, error in written:
                    if error:
                        self._fail(result.source.name, error)
                    else:
                        self._succeed(result)
            drawing.finish()
            self._errors += drawing.errors
        if drawing.num_left_out:
            print(
                f"note: {drawing.num_left_out} files have no figure, because the limit is "
                f"{figures} figures (--figures)"
            )
        self._report()

    def decode(self) -> None:
        """Decode files of codes, and write the slices.

        Raises:
            UserError, KeyboardInterrupt, SystemExit: as in `reconstruct`.
        """
        with self._finishing():
            for file, name in zip(self.inputs, self.names, strict=True):
                if self._signals:
                    break
                path = output_path(self.out, name, "_reconstruction.nii.gz")
                try:
                    shape = decode_file(self.model, file, path, self.coder)
                except (DataError, OSError) as error:
                    self._fail(name, str(error))
                    continue
                row = {"file": name, "path": printable(str(input_path(file)))}
                self._finish(row | dict(zip(("slices", "rows", "columns"), shape, strict=True)))
        self._report()

    @contextlib.contextmanager
    def _finishing(self) -> Iterator[None]:
        """Collect stop signals during the block, and always write scores.csv at its end."""
        try:
            with collect_stop_signals(self._signals):
                yield
        finally:
            self._progress.close()
            try:
                self.table.finish(self.names)
            except OSError as error:
                self._errors.append(str(error))

    def _reconstruct_groups(
        self, load: Callable[[Path, str], LoadedFile], resize_to: tuple[int, int] | None
    ) -> Iterator[list[Result]]:
        """Yield the results of each group of files until a stop signal arrives.

        If there are many files, a CPU reconstructs several groups in parallel, each on a few cores.
        With more cores for each group, the cores would often wait for each other.
        """

        def reconstruct(group: list[LoadedFile]) -> list[Result]:
            return reconstruct_group(self.model, group, resize_to)

        groups = split_groups(self._load_files(load))
        groups = itertools.takewhile(lambda _: not self._signals, groups)
        cores = torch.get_num_threads()
        on_cpu = next(self.model.parameters()).device.type == "cpu"
        threads = min(cores, MAX_GROUPS) if on_cpu and len(self.inputs) >= MANY_FILES else 1
        if threads == 1:
            yield from map(reconstruct, groups)
            return
        torch.set_num_threads(cores // threads)  # of each thread
        try:
            yield from prefetch(reconstruct, groups, depth=threads, threads=threads)
        finally:
            torch.set_num_threads(cores)

    def _load_files(self, load: Callable[[Path, str], LoadedFile]) -> Iterator[LoadedFile]:
        """Yield the usable files; a thread reads them ahead. Record the errors of the others."""

        def load_all(pairs: list[tuple[Path, str]]) -> list[LoadedFile | str]:
            """Read files; return an error message in place of each unusable file."""
            items = []
            for file, name in pairs:
                try:
                    items.append(load(file, name))
                except (DataError, OSError) as error:
                    items.append(str(error))
            return items

        pairs = list(zip(self.inputs, self.names, strict=True))
        for items in prefetch(load_all, _split_reads(pairs), depth=1):
            for item in items:
                if isinstance(item, str):
                    self._errors.append(item)
                    self._progress.update()
                else:
                    yield item

    def _succeed(self, result: Result) -> None:
        """Add a file to scores.csv after its outputs have been written."""
        source = result.source
        if source.label_error:
            self._errors.append(source.label_error)
        elif not result.shown:
            note = "has only empty slices; it gets no figure and no scores"
            tqdm.write(f"note: {source.name} {note}")
        self._finish(result.row)

    def _finish(self, row: dict) -> None:
        """Add a row to scores.csv, and advance the progress bar."""
        self._finished.add(row["file"])
        self.table.add(row)
        self._progress.update()

    def _fail(self, name: str, error: str) -> None:
        """Record an error; remove the row of an earlier call if its reconstruction is gone."""
        self._errors.append(error)
        if not output_path(self.out, name, "_reconstruction.nii.gz").exists():
            self.table.remove(name)
        self._progress.update()

    def _report(self) -> None:
        """Print the scores of this call; then raise its errors, or end as a stop signal would.

        Raises:
            UserError: if files could not be used.
            KeyboardInterrupt, SystemExit: after a stop signal.
        """
        rows = [self.table.rows[name] for name in self.names if name in self._finished]
        if rows and "ssim" in rows[0]:
            print_scores(rows)
        total = len(self.inputs)
        print(f"{len(rows)} of {total} files reconstructed; results are in {self.out}")
        renamed = sum(
            name != output_stem(file) for file, name in zip(self.inputs, self.names, strict=True)
        )
        if renamed:
            print(
                f"note: the outputs of {renamed} files have a numbered or shortened name; the "
                "columns file and path of scores.csv list them"
            )
        message = ""
        if self._errors:
            listing = files.format_listing(self._errors)
            message = f"{len(self._errors)} of {total} files cannot be used:\n{listing}"
        if self._signals:
            print(f"stopped by a signal; run the same command again for all files\n{message}")
            if self._signals[0] == signal.SIGINT:
                raise KeyboardInterrupt
            raise SystemExit(128 + self._signals[0])
        if message:
            raise UserError(message)


def _split_reads(pairs: list[tuple[Path, str]]) -> Iterator[list[tuple[Path, str]]]:
    """Split files into read tasks: 16 files each, or fewer if they exceed MAX_READ_BYTES."""
    task: list[tuple[Path, str]] = []
    total = 0
    for pair in pairs:
        with contextlib.suppress(OSError):  # reading the file will report the error
            total += pair[0].stat().st_size
        task.append(pair)
        if len(task) == BATCH_SIZE or total > MAX_READ_BYTES:
            yield task
            task, total = [], 0
    if task:
        yield task
