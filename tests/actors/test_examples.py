from pathlib import Path

import numpy as np

from actors.examples import ExampleFile, with_shortest_prompts, write_examples
from actors.records import Example, examples_hash
from tests.fakes import fake_examples


def test_examples_come_back_as_they_were_written(tmp_path: Path) -> None:
    examples = fake_examples(7)
    write_examples(tmp_path / "train.arrow", examples)
    file = ExampleFile(tmp_path / "train.arrow")
    assert len(file) == 7
    assert file.keys == [example.key for example in examples]
    assert file.rows == list(range(7))
    assert file.hash == examples_hash(file.keys)
    assert file.lengths.tolist() == [len(example.token_ids) for example in examples]
    for position, example in enumerate(examples):
        found = file[position]
        np.testing.assert_array_equal(found.token_ids, example.token_ids)
        np.testing.assert_array_equal(found.loss_mask, example.loss_mask)
        assert (found.key, found.row) == (example.key, example.row)
        assert (found.token_ids.dtype, found.loss_mask.dtype) == (np.int32, np.bool_)


def test_a_file_without_rows_is_a_file(tmp_path: Path) -> None:
    write_examples(tmp_path / "none.arrow", [])
    assert len(ExampleFile(tmp_path / "none.arrow")) == 0


def test_arrays_are_views_into_the_mapped_file(tmp_path: Path) -> None:
    write_examples(tmp_path / "train.arrow", fake_examples(2))
    file = ExampleFile(tmp_path / "train.arrow")
    assert np.shares_memory(file[0].token_ids, file[0].token_ids)
    assert not file[0].token_ids.flags.writeable


def test_rows_are_found_by_the_length_of_their_prompts(tmp_path: Path) -> None:
    examples = fake_examples(20)
    write_examples(tmp_path / "rows.arrow", examples)
    file = ExampleFile(tmp_path / "rows.arrow")
    found = [int(row.target_positions[0]) for row in with_shortest_prompts(file, 6)]
    assert found == sorted(int(row.target_positions[0]) for row in examples)[:6]
    assert len(with_shortest_prompts(file, 50)) == 20 and with_shortest_prompts(file, 0) == []


def test_other_tokens_under_the_same_keys_have_another_name(tmp_path: Path) -> None:
    names = []
    for token in (1, 1, 2):
        example = Example(np.array([token, 7], dtype=np.int32), np.array([False, True]), "ab" * 16, 0)
        write_examples(tmp_path / "rows.arrow", [example])
        names.append(ExampleFile(tmp_path / "rows.arrow"))
    assert names[0].hash == names[2].hash
    assert names[0].tokens_hash == names[1].tokens_hash != names[2].tokens_hash
