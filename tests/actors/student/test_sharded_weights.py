"""Four gloo ranks read their shares of a model: together the whole of it, and none more than its own."""

import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from safetensors.torch import load_file, save_file

from actors.config.models import LoraAdapter, TrainConfig
from actors.model_source import ModelSource
from actors.models import load_model
from actors.student.causal_lm import make_student, prepare_model
from actors.student.checkpoint import whole_weights
from actors.student.ranks import Worker
from actors.student.sharded_weights import model_without_weights
from losses.config import HardLabelLoss
from tests.worlds import tiny_llama

RANKS = 4
LOSS = HardLabelLoss(kind="hard_label")
SHARDED = TrainConfig(sharding="fsdp")
LARGE = {"hidden_size": 512, "layers": 8}  # 100 MB, so that what a process needs besides is little
CASES: dict[str, tuple[str, LoraAdapter | None]] = {
    "tied": ("tied", None), "in several files, in 16 bits": ("several", None), "adapted": ("tied", LoraAdapter(rank=2)),
    "names that are converted": ("converted", None),
}  # fmt: skip


class Anonymous(threading.Thread):
    """Follows how much memory of its own, files that it maps aside, this process holds at most."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.most, self._over = 0, threading.Event()

    def run(self) -> None:
        while not self._over.wait(0.002):
            self.most = max(self.most, anonymous_bytes())

    def stop(self) -> int:
        self._over.set()
        self.join()
        return self.most


def anonymous_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon"))


@contextmanager
def ranks(rank: int, folder: Path) -> Iterator[Worker]:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "rendezvous"), RANKS)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=RANKS)
    yield Worker(rank, RANKS, torch.device("cpu"))
    torch.distributed.destroy_process_group()


def rank_main(rank: int, folder: Path) -> None:
    """What each process does: every case, and the memory of a larger model."""
    found: dict[str, Any] = {}
    with ranks(rank, folder) as worker:
        for case, (name, lora) in CASES.items():
            torch.manual_seed(3)
            student = make_student(ModelSource(str(folder / name)), lora, LOSS, SHARDED, worker)
            found[case] = whole_weights(student)
        before, follower = anonymous_bytes(), Anonymous()
        follower.start()
        student = make_student(ModelSource(str(folder / "large")), None, LOSS, SHARDED, worker)
        share = sum(weight.to_local().nbytes for weight in student.parameters())  # type: ignore[operator]
        found["memory"] = torch.tensor([follower.stop() - before, share])
    torch.save(found, folder / f"found-{rank}.pt")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    tiny_llama(folder / "tied", seed=1)
    large = load_model(ModelSource(str(tiny_llama(folder / "large", seed=3, tied=False, **LARGE))), torch.bfloat16)
    large.save_pretrained(folder / "large")  # in another type than it is computed in, so that a mapped file does not serve
    model = load_model(ModelSource(str(tiny_llama(folder / "several", seed=2, tied=False))), torch.bfloat16)
    (folder / "several" / "model.safetensors").unlink()
    model.save_pretrained(folder / "several", max_shard_size="4KB")
    assert len(list((folder / "several").glob("*.safetensors"))) > 2
    rename(tiny_llama(folder / "converted", seed=4), lambda name: name.removeprefix("model."))
    torch.multiprocessing.spawn(rank_main, (folder,), nprocs=RANKS)
    return folder


def rename(folder: Path, change: Any) -> None:
    """Give the weights of a model the names that a file of its decoder alone has."""
    file = folder / "model.safetensors"
    tensors = {change(name): tensor for name, tensor in load_file(file).items()}
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


@pytest.mark.parametrize("case", CASES)
def test_the_shares_are_together_the_model(world: Path, case: str) -> None:
    name, lora = CASES[case]
    torch.manual_seed(3)
    expected = prepare_model(ModelSource(str(world / name)), lora, TrainConfig()).state_dict()
    found = torch.load(world / "found-0.pt")[case]
    assert found.keys() == {f"model.{name}" for name in expected}
    for name, weight in expected.items():
        torch.testing.assert_close(found[f"model.{name}"], weight, rtol=0, atol=0)


def test_no_worker_holds_much_more_than_its_share(world: Path) -> None:
    for rank in range(RANKS):
        most, share = torch.load(world / f"found-{rank}.pt")["memory"].tolist()
        assert 0.9 * share < most < 1.3 * share, rank


def test_only_files_with_the_models_own_names_are_read_in_shares(world: Path, tmp_path: Path) -> None:
    assert model_without_weights(ModelSource(str(world / "several"))) is not None
    assert model_without_weights(ModelSource(str(world / "converted"))) is None
    shutil.copytree(world / "tied", tmp_path / "twice")
    shutil.copy(tmp_path / "twice" / "model.safetensors", tmp_path / "twice" / "old.safetensors")
    assert model_without_weights(ModelSource(str(tmp_path / "twice"))) is None, "which of two files it is to be is not said"
