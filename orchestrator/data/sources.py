"""Reading rows: where they come from and what may be wrong with them. A row is a dictionary of named fields."""

import csv
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from actors.config.places import in_object_storage
from orchestrator.config.data import BuiltinSource, DigitsSource, FilesSource, GradingSource, HubSource, SourceConfig
from orchestrator.data.grading import make_graded_answers
from orchestrator.data.synthetic import make_rows

Row = dict[str, Any]

ONE_A_LINE = "rows that stand one a line belong in a .jsonl file"
QUOTED = 'a text with a comma, a quote or a line end in it stands in quotes, and such a quote twice: "say ""yes"", please"'

ROWS_AT_ONCE = 1000
"""Of a Parquet file, as Python objects."""
LONGEST_CELL = 1 << 24
"""Characters of a cell of a CSV file; where one is longer, a quote is missing rather than the text that long."""


def read_rows(source: SourceConfig, seed: int, key: str = "data.source") -> list[Row]:
    """Return all rows of a source; see ``rows_of``."""
    return list(rows_of(source, seed, key))


def rows_of(source: SourceConfig, seed: int, key: str = "data.source") -> Iterator[Row]:
    """Yield all rows of a source, in its own order. Lines, Parquet files and data sets of the hub are read as rows are taken.

    Args:
        source: the built-in generator, files, or a dataset of the hub.
        seed: draws the rows of the built-in generator; the other sources do not use it.
        key: of the source, for errors.

    Raises:
        ValueError: naming the file and the line, if something is missing, empty or no row.
    """
    match source:
        case BuiltinSource():
            yield from make_rows(source.rows, source.tasks, seed)
        case GradingSource():
            yield from make_graded_answers(source.rows, seed)
        case DigitsSource():
            yield from read_digits()
        case FilesSource():
            for path in files_of(source, key):
                yield from rows_of_file(path)
        case HubSource():
            yield from read_hub(source, key)


def files_of(source: FilesSource, key: str = "data.source") -> list[Path]:
    """Return the file that is named, or the files of a known kind in the folder that is named, in name order."""
    if in_object_storage(source.path):
        from actors.storage.fetched import fetched_files  # loads a cloud's library

        if not (files := fetched_files(source.path, _is_known)):
            raise ValueError(f"{source.path} ({key}.path) is no {_known_kinds()} file, and no folder in which one stands")
        return files
    path = Path(source.path).expanduser()
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if kind_of_file(file) in READERS and file.is_file())
        if not files:
            raise ValueError(f"the folder {path} ({key}.path) holds no {_known_kinds()} file")
        return files
    if not path.exists():
        raise ValueError(
            f"there is no file {path.absolute()}; {key}.path=... names a {_known_kinds()} file, or a folder of such files"
        )
    return [path]


def _is_known(name: str) -> bool:
    return kind_of_file(Path(name)) in READERS


def source_hash(source: SourceConfig) -> str | None:
    """Return a hash of the bytes of a source's files, or, in object storage, of their names, sizes and times; None where the
    source is no file, or its files are gone."""
    if source.kind != "files":
        return None
    if in_object_storage(source.path):
        from actors.storage.fetched import fingerprint

        return fingerprint(source.path, _is_known)
    if not Path(source.path).expanduser().exists():
        return None
    digest = hashlib.sha256()
    for path in files_of(source):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()


def read_file(path: Path) -> list[Row]:
    """Return the rows of one file; see ``rows_of_file``."""
    return list(rows_of_file(path))


def rows_of_file(path: Path) -> Iterator[Row]:
    """Yield the rows of one file, read as its suffix says.

    Raises:
        ValueError: naming the file and the line, if it cannot be read or holds none.
    """
    kind, found = kind_of_file(path), False
    if kind not in READERS:
        raise ValueError(f"{path}: files of the kind {kind!r} cannot be read as rows; {_known_kinds()} can")
    try:
        for row in READERS[kind](path):
            found = True
            yield row
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: cannot be unpacked, it was cut short or is no gzip file: {error}") from error
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error}") from error
    if not found:
        raise ValueError(f"{path}: the file holds no rows")


def kind_of_file(path: Path) -> str:
    """Return the suffix that says how a file is read; of a packed one it is both, such as ``.jsonl.gz``."""
    return "".join(path.suffixes[-2:]) if path.suffix == ".gz" else path.suffix


def read_json_lines(path: Path) -> Iterator[Row]:
    """Yield one row a line; blank lines are no rows."""
    with _unpacked(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield _require_object(_parse_json(line.rstrip(b"\r\n"), path, number), f"{path}:{number}")


def read_json(path: Path) -> list[Row]:
    """Return the rows of a JSON list of objects."""
    with _unpacked(path) as file:
        content = file.read()
    if not content.strip():
        return []
    values = _parse_json(content, path, line=1)
    if not isinstance(values, list):
        raise ValueError(f"{path}: holds one {_kind_of(values)} where a list of objects is expected; {ONE_A_LINE}")
    return [_require_object(value, f"{path}: item {index} of the list") for index, value in enumerate(values)]


def read_csv(path: Path) -> Iterator[Row]:
    """Yield a row for each record under the header; every cell is the text that stands there, an empty one is ""."""
    with _unpacked(path) as file:
        records = _csv_records(_csv_lines(file, path), path)
        line, names = next(records, (1, []))
        for name in names:
            if not name.strip() or names.count(name) > 1:
                fault = f"the column {name!r} stands twice" if name.strip() else f"column {names.index(name) + 1} has no name"
                raise ValueError(
                    f"{path}:{line}: {fault}; the first line of a CSV file names each column once: instruction,response"
                )
        for line, cells in records:
            if len(cells) != len(names):
                raise ValueError(
                    f"{path}:{line}: holds {len(cells)} cells where the header names {len(names)} ({', '.join(names)}); {QUOTED}"
                )
            yield dict(zip(names, cells, strict=True))


def read_parquet(path: Path) -> Iterator[Row]:
    """Yield the rows of a Parquet file; a value that is missing is None."""
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(ROWS_AT_ONCE):
                yield from batch.to_pylist()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: cannot be read as a Parquet file: {error}") from error


READERS: dict[str, Callable[[Path], Iterable[Row]]] = {
    ".jsonl": read_json_lines, ".json": read_json, ".csv": read_csv, ".parquet": read_parquet,
    ".jsonl.gz": read_json_lines, ".json.gz": read_json, ".csv.gz": read_csv,
}  # fmt: skip
"""The kinds of files that hold rows, by their suffix."""


def read_digits() -> list[Row]:
    """Return the images of digits of scikit-learn.

    Raises:
        ValueError: if scikit-learn is not installed.
    """
    try:
        from sklearn.datasets import load_digits  # only this source needs it
    except ImportError as error:
        raise ValueError("data.source.kind digits comes with scikit-learn: pip install scikit-learn") from error
    digits = load_digits()
    return [{"image": image.tolist(), "label": int(label)} for image, label in zip(digits.images, digits.target, strict=True)]


def read_hub(source: HubSource, key: str = "data.source") -> Iterator[Row]:
    """Yield the rows of a dataset that ``datasets`` finds on the hub or in a folder; it maps them from its cache."""
    import datasets  # slow to import, and only this source needs it

    try:
        dataset = datasets.load_dataset(source.name, source.subset, split=source.split, revision=source.revision)
    except Exception as error:  # datasets raises what the libraries of each format and the network raise
        reason = f"{error}: {error.__cause__}" if error.__cause__ else str(error)
        raise ValueError(
            f"{key}.name={source.name!r} (subset {source.subset!r}, split {source.split!r}, revision {source.revision!r}) "
            f"cannot be loaded: {reason}"
        ) from error
    yield from dataset


def _unpacked(path: Path) -> gzip.GzipFile | io.BufferedReader:
    """Open a file, or what a .gz file holds."""
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _decode(content: bytes, path: Path, line: int) -> str:
    """Return the text, without its byte-order mark, that begins in ``line`` of ``path``."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line += content[: error.start].count(b"\n")
        raise ValueError(f"{path}:{line}: byte {content[error.start]:#04x} is no UTF-8; save the file as UTF-8") from error


def _csv_lines(file: gzip.GzipFile | io.BufferedReader, path: Path) -> Iterator[str]:
    """Yield the lines of a file as text, with their ends."""
    number = 1
    try:
        for line in io.TextIOWrapper(file, "utf-8-sig", newline=""):
            if "\0" in line:
                raise ValueError(f"{path}:{number}: holds a NUL; save the file as UTF-8 text")
            yield line
            number += line.count("\n")
    except UnicodeDecodeError:
        with _unpacked(path) as again:  # whoever reads some at a time does not know the line
            _decode(again.read(), path, line=1)
        raise


def _csv_records(lines: Iterable[str], path: Path) -> Iterator[tuple[int, list[str]]]:
    """Yield the line in which each record begins, and its cells; blank lines are no records."""
    reader, before = csv.reader(lines, strict=True), csv.field_size_limit(LONGEST_CELL)
    try:
        while True:
            line = reader.line_num + 1
            if cells := next(reader, None):
                yield line, cells
            elif cells is None:
                return
    except csv.Error as error:
        raise ValueError(f"{path}:{line}: the row that begins here cannot be read: {error}; {QUOTED}") from error
    finally:
        csv.field_size_limit(before)


def _parse_json(content: bytes, path: Path, line: int) -> Any:
    """Parse JSON that begins in ``line`` of ``path``."""
    text = _decode(content, path, line)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        hint = f"; {ONE_A_LINE}" if READERS.get(kind_of_file(path)) is read_json and error.msg == "Extra data" else ""
        where = f"{path}:{line + error.lineno - 1}"
        raise ValueError(f"{where}: malformed JSON at column {error.colno}: {error.msg}{hint}") from error
    except RecursionError:
        raise ValueError(f"{path}:{line}: lists and objects are nested too deeply to be rows") from None
    except ValueError as error:  # numbers of thousands of digits
        raise ValueError(f"{path}:{line}: {error}") from None


def _require_object(value: Any, where: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f'{where}: holds a {_kind_of(value)}; a row is an object: {{"instruction": ..., "response": ...}}')
    return value


def _kind_of(value: Any) -> str:
    """Name a value as JSON does."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", int: "number", float: "number", type(None): "null"}
    return names[type(value)]


def _known_kinds() -> str:
    *others, last = READERS
    return f"{', '.join(others)} or {last}"
