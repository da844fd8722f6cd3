import re
from pathlib import Path

import pytest
import ray

from orchestrator.cluster import shared_folder
from orchestrator.cluster.shared_folder import nodes_that_miss, require_shared

pytestmark = pytest.mark.ray


def test_a_file_that_a_node_does_not_see_is_told_with_its_address(local_ray: None, tmp_path: Path) -> None:
    nodes = ray.nodes()
    token = tmp_path / "token"
    assert nodes_that_miss(str(tmp_path), "token", nodes) == [nodes[0]["NodeManagerAddress"]]
    token.write_text("another file of that name, on storage of the node's own")
    assert nodes_that_miss(str(tmp_path), "token", nodes) == [nodes[0]["NodeManagerAddress"]]
    token.write_text("token")
    assert nodes_that_miss(str(tmp_path), "token", nodes) == []
    (error,) = nodes_that_miss("ftp://host/folder", "token", nodes)
    assert re.fullmatch(r"[\d.]+: ftp://host/folder begins with ftp://; a path, or an address of s3, gs, .* would do", error)


def test_a_folder_that_not_all_nodes_share_is_refused(
    local_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    require_shared([str(tmp_path / "alone")])  # one node: nobody to share with
    assert not (tmp_path / "alone").exists()
    nodes = ray.nodes()
    monkeypatch.setattr(ray, "nodes", lambda: nodes * 2)
    require_shared([str(tmp_path / "runs")])
    assert not list((tmp_path / "runs").iterdir())
    monkeypatch.setattr(shared_folder, "nodes_that_miss", lambda place, token, nodes: ["10.0.0.7"])
    with pytest.raises(ValueError, match=r"runs is not seen by 1 of 2 nodes \(10.0.0.7\): output, scores.root and checkpoints"):
        require_shared([str(tmp_path / "runs")])
