"""What is found of a checkpoint that something happened to after it was written."""

from collections.abc import Callable
from pathlib import Path

import pytest

from actors.storage.folder import DiskFolder
from actors.student.train_checkpoints import checkpoints_up_to, damage, damaged_checkpoints, set_aside, write_checksums


def checkpoint(folder: Path, workers: int = 2) -> Path:
    """A checkpoint as Ray Train puts it together: the files of each worker, who listed them in a folder of its own."""
    whole = folder / "checkpoint_1"
    whole.mkdir(parents=True)
    for rank in range(workers):
        part = folder / f"part-{rank}"
        part.mkdir()
        for index in range(3):
            (part / f"__{rank}_{index}.safetensors").write_bytes(bytes(range(rank + index, 200)))
        (part / ("progress.json" if rank == 0 else "other.json")).write_text('{"step": 3}')
        write_checksums(part, rank, workers)
        for path in part.iterdir():
            path.rename(whole / path.name)
    return whole


def flip_a_byte(folder: Path) -> str:
    content = bytearray((folder / "__1_2.safetensors").read_bytes())
    content[17] ^= 4
    (folder / "__1_2.safetensors").write_bytes(content)
    return "__1_2.safetensors is not as it was written"


def cut_short(folder: Path) -> str:
    (folder / "progress.json").write_text('{"step"')
    return "progress.json is not as it was written"


def lose(folder: Path) -> str:
    (folder / "__0_0.safetensors").unlink()
    return "__0_0.safetensors is gone"


def lose_the_list(folder: Path) -> str:
    (folder / "checksums-1.json").unlink()
    return "its list of files cannot be read (FileNotFoundError: "


def cut_the_list(folder: Path) -> str:
    (folder / "checksums-0.json").write_text((folder / "checksums-0.json").read_text()[:30])
    return "its list of files cannot be read (JSONDecodeError: "


def empty_the_list(folder: Path) -> str:
    (folder / "checksums-0.json").write_text("[]")
    return "its list of files cannot be read (TypeError: "


@pytest.mark.parametrize("readers", [1, 2, 5])
def test_a_checkpoint_as_it_was_written_is_whole_for_any_number_of_readers(tmp_path: Path, readers: int) -> None:
    folder = checkpoint(tmp_path)
    assert [damage(folder, rank, readers) for rank in range(readers)] == [""] * readers


@pytest.mark.parametrize("readers", [1, 3])
@pytest.mark.parametrize("harm", [flip_a_byte, cut_short, lose, lose_the_list, cut_the_list, empty_the_list])
def test_any_harm_is_found_by_one_of_the_readers(tmp_path: Path, harm: Callable[[Path], str], readers: int) -> None:
    folder = checkpoint(tmp_path)
    said = harm(folder)
    found = [why for rank in range(readers) if (why := damage(folder, rank, readers))]
    assert found and all(why.startswith(said) for why in found)


def test_every_single_byte_of_every_file_counts(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, workers=1)
    for path in [file for file in sorted(folder.iterdir()) if not file.name.startswith("checksums-")]:
        whole = path.read_bytes()
        for place in range(0, len(whole), 7):
            path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
            assert damage(folder, 0, 1) == f"{path.name} is not as it was written"
        path.write_bytes(whole)
    assert damage(folder, 0, 1) == ""


def test_what_was_set_aside_is_not_looked_at_again_and_is_remembered(tmp_path: Path) -> None:
    folder = DiskFolder(tmp_path)
    assert damaged_checkpoints(folder) == []
    for number in (1, 2, 3, 4):
        (tmp_path / f"checkpoint_{number}").mkdir()
    (tmp_path / "another").mkdir()
    set_aside(folder, "checkpoint_2", "progress.json is gone")
    assert checkpoints_up_to("checkpoint_3", folder) == ["checkpoint_1", "checkpoint_3"]
    folder.remove_folder("checkpoint_2")
    assert damaged_checkpoints(folder) == ["checkpoint_2: progress.json is gone"]
    set_aside(folder, "checkpoint_1", "its list is")
    assert checkpoints_up_to("checkpoint_4", folder) == ["checkpoint_3", "checkpoint_4"] == checkpoints_up_to(None, folder)
    assert damaged_checkpoints(folder) == ["checkpoint_1: its list is", "checkpoint_2: progress.json is gone"]
