"""Reading rows from every kind of source, and what is said when something is wrong with them."""

import gzip
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orchestrator.config.data import BuiltinSource, FilesSource, HubSource
from orchestrator.data.sources import LONGEST_CELL, read_file, read_rows, rows_of_file, source_hash
from orchestrator.data.synthetic import make_rows

ROWS: list[dict[str, Any]] = [{"question": f"{n}?", "answer": f"é {n}", "n": n} for n in range(5)]


def read(path: Path) -> list[dict[str, Any]]:
    return read_rows(FilesSource(kind="files", path=str(path)), seed=0)


def write(path: Path, content: str) -> Path:
    path.write_text(content, encoding="utf-8")
    return path


def test_built_in_rows_come_from_the_generator_and_the_seed() -> None:
    source = BuiltinSource(kind="builtin", rows=20, tasks=("add", "sort"))
    assert read_rows(source, seed=4) == make_rows(20, ("add", "sort"), 4)


def test_json_lines_with_blank_lines_and_a_byte_order_mark(tmp_path: Path) -> None:
    lines = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
    assert read(write(tmp_path / "a.jsonl", f"\ufeff{lines}\n  \n")) == ROWS


def test_a_line_separator_within_a_string_does_not_end_a_json_line(tmp_path: Path) -> None:
    row = {"text": "one\u2028two\x85three"}
    assert read(write(tmp_path / "a.jsonl", json.dumps(row, ensure_ascii=False))) == [row]


def test_json_list(tmp_path: Path) -> None:
    assert read(write(tmp_path / "a.json", json.dumps(ROWS, indent=2))) == ROWS


def test_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == ROWS


def test_a_folder_is_its_files_of_known_kinds_in_name_order(tmp_path: Path) -> None:
    write(tmp_path / "b.json", json.dumps(ROWS[2:4]))
    write(tmp_path / "a.jsonl", json.dumps(ROWS[1]))
    pq.write_table(pa.Table.from_pylist(ROWS[4:]), tmp_path / "c.parquet")
    write(tmp_path / "README.md", "no rows")
    write(tmp_path / "rows.gz", "of no kind")
    (tmp_path / "d.json").mkdir()
    assert read(tmp_path) == ROWS[1:]
    write(tmp_path / "aa.csv", "question,answer\n?,!\n")
    (tmp_path / "bb.jsonl.gz").write_bytes(gzip.compress(json.dumps(ROWS[0]).encode()))
    assert read(tmp_path) == [ROWS[1], {"question": "?", "answer": "!"}, *ROWS[2:4], ROWS[0], *ROWS[4:]]


def test_a_path_may_begin_with_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "a.json", json.dumps(ROWS))
    assert read(Path("~/a.json")) == ROWS


def test_missing_file_names_path_and_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"no file {tmp_path}/none\.jsonl; data\.source\.path=\.\.\. names a \.jsonl"):
        read(tmp_path / "none.jsonl")


def test_folder_without_rows_names_the_known_kinds(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"holds no \.jsonl, \.json, \.csv, \.parquet, \.jsonl\.gz, \.json\.gz or \.csv\.gz file"
    ):
        read(tmp_path)


def test_unknown_kind_names_the_known_ones(tmp_path: Path) -> None:
    for kind in (".tsv", ".parquet.gz", ".gz", ""):
        with pytest.raises(ValueError, match=rf"'{kind}' cannot be read as rows; \.jsonl, \.json, \.csv, \.parquet, .* can"):
            read(write(tmp_path / f"a{kind}", "x,y"))


@pytest.mark.parametrize("line", ['{"question": "what"', "{'question': 1}", '{"a": 1} {"b": 2}'])
def test_malformed_line_names_file_line_and_fault(tmp_path: Path, line: str) -> None:
    path = write(tmp_path / "a.jsonl", f'{{"a": 1}}\n\n{line}\n{{"a": 2}}\n')
    with pytest.raises(ValueError, match=rf"^{path}:3: malformed JSON at column \d+: \w+"):
        read(path)


def test_malformed_json_names_its_line(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", '[\n{"a": 1},\n{"a" 2}\n]')
    with pytest.raises(ValueError, match=rf"^{path}:3: malformed JSON at column 6"):
        read(path)


def test_bytes_that_are_no_text_name_their_line(tmp_path: Path) -> None:
    lines, listed = tmp_path / "a.jsonl", tmp_path / "a.json"
    lines.write_bytes(b'{"a": 1}\n{"a": "\xe9"}\n')
    listed.write_bytes(b'[{"a": 1},\n{"a": "\xe9"}]\n')
    for path in (lines, listed):
        with pytest.raises(ValueError, match=rf"^{path}:2: byte 0xe9 is no UTF-8"):
            read(path)


@pytest.mark.parametrize(
    ("value", "kind"), [("[1]", "list"), ("3.5", "number"), ("null", "null"), ('"x"', "string"), ("true", "boolean")]
)
def test_a_row_that_is_no_object_names_its_place(tmp_path: Path, value: str, kind: str) -> None:
    lines = write(tmp_path / "a.jsonl", f'{{"a": 1}}\n{value}\n')
    with pytest.raises(ValueError, match=rf"^{lines}:2: holds a {kind}; a row is an object"):
        read(lines)
    listed = write(tmp_path / "a.json", f'[{{"a": 1}}, {value}]')
    with pytest.raises(ValueError, match=rf"^{listed}: item 1 of the list: holds a {kind}; a row is an object"):
        read(listed)


def test_a_json_file_with_one_row_a_line_is_sent_to_the_right_suffix(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.json:2: .* belong in a \.jsonl file"):
        read(write(tmp_path / "a.json", '{"a": 1}\n{"a": 2}\n'))
    with pytest.raises(ValueError, match=r"holds one object where a list of objects is expected; .* \.jsonl file"):
        read(write(tmp_path / "b.json", '{"a": 1}\n'))
    (tmp_path / "c.json.gz").write_bytes(gzip.compress(b'{"a": 1}\n{"a": 2}\n'))
    with pytest.raises(ValueError, match=r"c\.json\.gz:2: .* belong in a \.jsonl file"):
        read(tmp_path / "c.json.gz")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", ""),
        ("a.jsonl", "\n \n"),
        ("a.json", ""),
        ("a.json", "[]"),
        ("a.csv", ""),
        ("a.csv", "\n\n"),
        ("a.csv", "x,y\n"),
    ],
)
def test_empty_file(tmp_path: Path, name: str, content: str) -> None:
    with pytest.raises(ValueError, match=rf"{name}: the file holds no rows"):
        read(write(tmp_path / name, content))


def test_an_empty_file_among_others_is_an_error_too(tmp_path: Path) -> None:
    write(tmp_path / "a.json", json.dumps(ROWS))
    pq.write_table(pa.Table.from_pylist(ROWS)[:0], tmp_path / "b.parquet")
    with pytest.raises(ValueError, match=r"b\.parquet: the file holds no rows"):
        read(tmp_path)


def test_a_parquet_file_cut_short(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(ValueError, match=r"a\.parquet: cannot be read as a Parquet file"):
        read(path)


def test_csv_cells_are_texts_as_they_stand(tmp_path: Path) -> None:
    path = write(tmp_path / "a.csv", '\ufeffprompt,completion\n007,NA\n42,\n" é, ""so"" ",null\n\n"",1e3\n')
    assert read(path) == [
        {"prompt": "007", "completion": "NA"},
        {"prompt": "42", "completion": ""},
        {"prompt": ' é, "so" ', "completion": "null"},
        {"prompt": "", "completion": "1e3"},
    ]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_csv_with_the_line_ends_of_any_system(tmp_path: Path, end: str) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes(end.join(["prompt,completion", '"two', 'lines",x', "y,z"]).encode())
    assert read(path) == [{"prompt": f"two{end}lines", "completion": "x"}, {"prompt": "y", "completion": "z"}]
    path.write_bytes(path.read_bytes() + f"{end}a,b,c{end}".encode())
    with pytest.raises(
        ValueError, match=rf"^{path}:5: holds 3 cells where the header names 2 \(prompt, completion\); a text with"
    ):
        read(path)


def test_csv_as_people_publish_it(tmp_path: Path) -> None:
    lines = [f'"Question number {n}: what is {n} plus {n + 1}?","The answer is {2 * n + 1}, of course."' for n in range(12)]
    rows = read(write(tmp_path / "rows.csv", "\n".join(["prompt,completion", *lines])))
    assert len(rows) == 12
    assert rows[7] == {"prompt": "Question number 7: what is 7 plus 8?", "completion": "The answer is 15, of course."}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"x,y\n1,2\n3\n", r":3: holds 1 cells where the header names 2 \(x, y\)"),
        (b'x,y\n"1\n\n1",2\n"3\n",4,5\n', r":5: holds 3 cells where the header names 2"),
        (b"x,y,x\n1,2,3\n", r":1: the column 'x' stands twice; the first line of a CSV file names each column once"),
        (b"\nx,,z\n1,2,3\n", r":2: column 2 has no name; the first line of a CSV file names"),
        (b'x,y\n1,2\n"3,4\n5,6\n', r":3: the row that begins here cannot be read: unexpected end of data; a text with a comma"),
        (b'x,y\n1,2\n"3"4,5\n', r":3: the row that begins here cannot be read: ',' expected after '\"'; .* twice: \"say \"\"yes"),
        (b'x,y\n"1\n",2\n3,\xe9\n', r":4: byte 0xe9 is no UTF-8; save the file as UTF-8"),
        (b"x,y\n1,2\n3,\0\n", r":3: holds a NUL; save the file as UTF-8 text"),
        (b"x,y\n1," + b"2" * (LONGEST_CELL + 1), r":2: the row that begins here cannot be read: field larger than field limit"),
    ],
    ids=["short", "long", "twice", "nameless", "open", "strict", "latin", "nul", "huge"],
)
def test_what_is_wrong_with_csv_names_file_and_line(tmp_path: Path, content: bytes, message: str) -> None:
    for path, written in ((tmp_path / "a.csv", content), (tmp_path / "a.csv.gz", gzip.compress(content, 1))):
        path.write_bytes(written)
        with pytest.raises(ValueError, match=rf"^{path}{message}"):
            read(path)


def test_a_long_cell_is_a_text_like_any_other(tmp_path: Path) -> None:
    text = "long, " * 400_000
    assert read(write(tmp_path / "a.csv", f'x\n"{text}"\n')) == [{"x": text}]


def test_csv_is_read_as_rows_are_taken(tmp_path: Path) -> None:
    rows = rows_of_file(write(tmp_path / "a.csv", "x,y\n" + "1,2\n" * 50_000 + "3\n"))
    assert [next(rows) for _ in range(50_000)][-1] == {"x": "1", "y": "2"}
    with pytest.raises(ValueError, match=r"a\.csv:50002: holds 1 cells where the header names 2"):
        next(rows)


@pytest.mark.parametrize("kind", [".jsonl", ".json", ".csv"])
def test_what_is_packed_reads_as_what_is_not(tmp_path: Path, kind: str) -> None:
    rows = [{"question": f"{n}?", "answer": f"é {n}"} for n in range(50)]
    content = {
        ".jsonl": "\n".join(json.dumps(row) for row in rows),
        ".json": json.dumps(rows),
        ".csv": "\n".join(["question,answer", *(f"{row['question']},{row['answer']}" for row in rows)]),
    }[kind].encode()
    path = tmp_path / f"rows.v1{kind}.gz"
    path.write_bytes(gzip.compress(content[:40]) + gzip.compress(content[40:]))  # as several packers in a row leave it
    assert read(path) == rows
    whole = path.read_bytes()
    for broken in (whole[: len(whole) // 2], whole[:-1], content, whole[:60] + b"\xff" * 8 + whole[68:]):
        path.write_bytes(broken)
        with pytest.raises(ValueError, match=rf"^{path}: cannot be unpacked, it was cut short or is no gzip file: "):
            read(path)


def test_the_hash_of_a_source_is_of_the_bytes_as_stored(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"a": 1}\n', mtime=0))
    stored = hashlib.sha256(hashlib.sha256(path.read_bytes()).digest()).hexdigest()
    assert source_hash(FilesSource(kind="files", path=str(path))) == stored


def test_a_file_that_cannot_be_opened_is_named(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.symlink_to(path)
    with pytest.raises(ValueError, match=r"rows\.jsonl"):
        read(path)
    (tmp_path / "folder.jsonl").mkdir()
    with pytest.raises(ValueError, match=rf"^{tmp_path}/folder\.jsonl: cannot be read: .*Is a directory"):
        read_file(tmp_path / "folder.jsonl")


@pytest.fixture
def dataset_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that the datasets library can load, and a cache of its own."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "dataset"
    folder.mkdir()
    write(folder / "train.jsonl", "\n".join(json.dumps(row) for row in ROWS))
    write(folder / "test.jsonl", json.dumps(ROWS[0]))
    return folder


def test_a_folder_through_the_datasets_library(dataset_folder: Path) -> None:
    assert read_rows(HubSource(kind="hub", name=str(dataset_folder)), seed=0) == ROWS
    assert read_rows(HubSource(kind="hub", name=str(dataset_folder), split="train[1:3]"), seed=0) == ROWS[1:3]
    assert read_rows(HubSource(kind="hub", name=str(dataset_folder), split="test"), seed=0) == ROWS[:1]


def test_a_split_that_is_not_there_names_the_source(dataset_folder: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.source\.name='.*dataset' \(subset None, split 'dev'.*cannot be loaded: .*train"):
        read_rows(HubSource(kind="hub", name=str(dataset_folder), split="dev"), seed=0)


def test_a_dataset_that_is_not_there_names_the_source(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"data\.source\.name='.*none'.*cannot be loaded"):
        read_rows(HubSource(kind="hub", name=str(tmp_path / "none")), seed=0)


def test_a_dataset_with_malformed_rows_names_source_and_reason(dataset_folder: Path) -> None:
    write(dataset_folder / "train.jsonl", '{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match=r"data\.source\.name='.*dataset'.*cannot be loaded: .*JSON"):
        read_rows(HubSource(kind="hub", name=str(dataset_folder)), seed=0)


def test_a_dataset_without_rows(dataset_folder: Path) -> None:
    for file in dataset_folder.iterdir():
        file.unlink()
    write(dataset_folder / "train.csv", "question,answer\n")
    with pytest.raises(ValueError, match=r"data\.source\.name='.*dataset'.*corresponds to no data"):
        read_rows(HubSource(kind="hub", name=str(dataset_folder)), seed=0)
