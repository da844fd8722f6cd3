"""Where a training worker stands among its peers; the one file of the student that speaks to torch.distributed's ranks."""

from dataclasses import dataclass

import torch
import torch.distributed

from losses.distillation import LossSums


@dataclass(frozen=True, slots=True)
class Worker:
    """One of ``world_size`` workers, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @staticmethod
    def here(threads: int, gpu: bool) -> "Worker":
        """Describe the worker that calls, and give it ``threads`` CPU threads.

        Raises:
            ValueError: if it is to have a GPU and sees none.
        """
        if gpu and not torch.cuda.is_available():
            raise ValueError(
                "workers.gpus is 1, but this worker's torch sees no GPU: workers.gpus=0, or a torch built for this machine's "
                f"driver ({torch.__version__} is installed), would do"
            )
        torch.set_num_threads(threads)
        distributed = torch.distributed.is_initialized()
        return Worker(
            rank=torch.distributed.get_rank() if distributed else 0,
            world_size=torch.distributed.get_world_size() if distributed else 1,
            device=torch.device("cuda", torch.cuda.current_device()) if gpu else torch.device("cpu"),
        )

    def seed_step(self, seed: int, step: int) -> None:
        """Make the step's random numbers a function of seed, step and rank, so that a resumed run draws the same."""
        torch.manual_seed(((seed * 1_000_003 + step) * 65_537 + self.rank) % 2**64)

    def agree(self, told: bool) -> bool:
        """Return what the first worker was told; all workers call it together."""
        if self.world_size == 1:
            return told
        answer = torch.tensor([told], dtype=torch.uint8, device=self.device)
        torch.distributed.broadcast(answer, src=0)
        return bool(answer)

    def any(self, told: bool) -> bool:
        """Return whether any worker was told so; all workers call it together."""
        if self.world_size == 1:
            return told
        answer = torch.tensor([told], dtype=torch.uint8, device=self.device)
        torch.distributed.all_reduce(answer, torch.distributed.ReduceOp.MAX)
        return bool(answer)

    def barrier(self) -> None:
        """Return once all workers have called it."""
        self.any(False)

    def sum_over_workers(self, sums: LossSums) -> LossSums:
        """Return the sums of all workers together."""
        if self.world_size == 1:
            return sums
        packed = torch.stack([value.float() for value in sums.tensors()])
        torch.distributed.all_reduce(packed)
        return LossSums(*packed)
