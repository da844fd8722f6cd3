"""What the process of a Ray task or actor finds in its environment."""


def task_environment(cpus: float, gpu: bool) -> dict[str, str]:
    """Return the environment variables of a Ray task: as many threads as CPUs, and no GPU in sight where it asked for none."""
    hidden = {} if gpu else {"CUDA_VISIBLE_DEVICES": ""}  # Ray hides GPUs only from who asks for some
    return {"OMP_NUM_THREADS": str(max(1, int(cpus))), **hidden}
