"""What a run holds at one time, and what it is told when that is not there."""

import pytest
import ray

from orchestrator.resources import Demand, demand, ray_for, require_resources
from tests.orchestrator.test_config import changed


def test_teacher_and_student_are_held_together_only_if_they_overlap() -> None:
    overrides = ["teacher.engine.cpus=2", "teacher.engine.replicas=3", "workers={count: 4, cpus: 1.5}"]
    assert demand(changed(*overrides)) == Demand(cpus=12, gpus=0)
    assert demand(changed(*overrides, "scores.overlap=false")) == Demand(cpus=6, gpus=0)


def test_gpus_are_counted_with_tensor_parallel() -> None:
    overrides = ["teacher.engine={gpu: true, replicas: 2, tensor_parallel: 4}", "workers={count: 3, gpus: 1}"]
    assert demand(changed(*overrides)).gpus == 11


def test_fitting_and_evaluation_count_too() -> None:
    assert demand(changed("teacher.fit.workers.cpus=7")).cpus == 7
    assert demand(changed("evaluate={cpus: 9, gpus: 1}")) == Demand(cpus=9, gpus=1)


@pytest.mark.ray
def test_what_is_missing_is_named_with_the_keys_that_would_help(local_ray: None) -> None:
    with pytest.raises(ValueError, match=r"holds 2 GPUs at one time, the cluster has 0: lower teacher\.engine\.replicas"):
        require_resources(Demand(cpus=1, gpus=2))
    with pytest.raises(ValueError, match=r"holds 400 CPUs at one time, the cluster has 4: lower .* set scores\.overlap to false"):
        require_resources(Demand(cpus=400))
    require_resources(Demand(cpus=4))


@pytest.mark.ray
def test_a_ray_that_runs_already_is_used_and_left_running(local_ray: None) -> None:
    with ray_for(changed()):
        pass
    assert ray.is_initialized()
