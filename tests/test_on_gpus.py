"""What holds on CPUs holds on GPUs: a step, its ranks over NCCL, vLLM's scores, and what a machine says of itself."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
import torch.multiprocessing
from transformers import LlamaConfig, LlamaForCausalLM

from actors.student.ranks import Worker
from orchestrator.cluster.node_checks import node_faults
from orchestrator.cluster.node_facts import installed_vllm, read_node_facts
from orchestrator.data.tokenizers import train_tokenizer
from tests.actors.student.test_ranks import CASES, step_gradients
from tests.orchestrator.cluster.test_node_checks import on_gpus
from tests.worlds import scored_world, tiny_llama

ROOT = Path(__file__).parents[1]
TOKENS = 600
a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows, scores and a student."""
    folder = tmp_path_factory.mktemp("gpus")
    scored_world(folder, rows=16)
    tiny_llama(folder / "model", seed=1, tied=False)
    return folder


@pytest.mark.gpu
@a_gpu
def test_a_machine_with_gpus_is_read_as_one_and_lacks_nothing() -> None:
    facts = read_node_facts()
    assert facts.usable_gpus == torch.cuda.device_count() and facts.nccl is not None
    assert node_faults(on_gpus(), facts) == []


@pytest.mark.gpu
@a_gpu
@pytest.mark.parametrize("case", CASES)
def test_a_step_on_a_gpu_is_that_of_a_cpu(world: Path, case: str) -> None:
    loss, found = step_gradients(world, Worker(0, 1, torch.device("cuda", 0)), CASES[case], "replicate", 3, None)
    expected_loss, expected = step_gradients(world, Worker(0, 1, torch.device("cpu")), CASES[case], "replicate", 3, None)
    assert loss == pytest.approx(expected_loss, rel=1e-4)
    torch.testing.assert_close({name: one.cpu() for name, one in found.items()}, expected, rtol=1e-3, atol=1e-5)


def rank_main(rank: int, folder: Path) -> None:
    """What each of two processes does on its own GPU; the first writes what it found."""
    torch.cuda.set_device(rank)
    store = torch.distributed.FileStore(str(folder / "rendezvous"), 2)
    torch.distributed.init_process_group("nccl", store=store, rank=rank, world_size=2)
    worker = Worker(rank, 2, torch.device("cuda", rank))
    found = {sharding: step_gradients(folder, worker, CASES["atkd"], sharding, 2, None) for sharding in ("replicate", "fsdp")}
    if rank == 0:
        torch.save({sharding: (loss, {name: one.cpu() for name, one in of.items()}) for sharding, (loss, of) in found.items()},
                   folder / "found.pt")  # fmt: skip
    torch.distributed.destroy_process_group()


@pytest.mark.gpu
@two_gpus
def test_two_gpus_give_the_loss_and_gradients_of_one_cpu(world: Path) -> None:
    torch.multiprocessing.spawn(rank_main, (world,), nprocs=2)
    expected_loss, expected = step_gradients(world, Worker(0, 1, torch.device("cpu")), CASES["atkd"], "replicate", 7, None)
    for loss, found in torch.load(world / "found.pt").values():
        assert loss == pytest.approx(expected_loss, rel=1e-4)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama with heads of 64, which kernels for GPUs have, and more ids than its tokenizer, which reads prose."""
    folder = tmp_path_factory.mktemp("served")
    train_tokenizer([page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))], TOKENS).save_pretrained(folder)
    torch.manual_seed(2)
    config = LlamaConfig(
        vocab_size=TOKENS + 64, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.2, tie_word_embeddings=False,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def measured(teacher: Path, *options: str) -> tuple[str, float]:
    """The way that vLLM took, and by how much its scores differ from float32 at most."""
    command = [sys.executable, "-m", "scripts.gpu_scores", str(teacher), "--rows", "8", *options]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    way, furthest = (re.search(pattern, done.stdout) for pattern in (r"measured way: (.*)", r"the furthest (\S+)"))
    assert way is not None and furthest is not None, done.stdout
    return way[1], float(furthest[1])


@pytest.mark.slow
@pytest.mark.skipif(installed_vllm() != "cpu", reason="needs vLLM for CPUs")
def test_what_is_measured_of_vllm_is_measured_on_cpus_too(teacher: Path) -> None:
    way, furthest = measured(teacher, "--dtype", "float32", "--cpu")
    assert "vLLM" in way and furthest < 1e-3


@pytest.mark.gpu
@a_gpu
@pytest.mark.parametrize(("dtype", "most"), [("float32", 2e-3), ("bfloat16", 1.0)])
def test_vllm_serves_the_teacher_by_the_fast_way(teacher: Path, dtype: str, most: float) -> None:
    way, furthest = measured(teacher, "--dtype", dtype)
    assert not way.startswith("slow:"), way
    assert furthest < most


@pytest.mark.gpu
@two_gpus
def test_vllm_serves_the_same_from_two_gpus(teacher: Path) -> None:
    way, furthest = measured(teacher, "--dtype", "bfloat16", "--tensor-parallel", "2")
    assert "vLLM" in way and furthest < 1.0
