"""What several files of trainings share: the one training that nothing disturbs."""

from pathlib import Path

import pytest
import torch

from tests.orchestrator.training_world import task_in, trained


@pytest.fixture(scope="session")
def training_world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with rows, scores and a model."""
    return tmp_path_factory.mktemp("world")


@pytest.fixture(scope="session")
def undisturbed(
    local_ray: None, training_world: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[str, torch.Tensor]]:
    """One worker, one forward pass a step, never interrupted."""
    folder = tmp_path_factory.mktemp("undisturbed")
    return folder, trained(task_in(folder, training_world), folder)
