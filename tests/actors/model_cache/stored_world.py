"""Has the nodes of a Ray of its own fetch a model from object storage, twice; ``test_object_storage`` runs this.

    python -m tests.actors.model_cache.stored_world ADDRESS FOLDER
"""

import json
import sys

import ray

from actors.model_cache.nodes import NodeDownloads
from actors.model_cache.object_storage import StoredModelFiles, look_up
from actors.placement import read_nodes

if __name__ == "__main__":
    address, folder = sys.argv[1:]
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    found = []
    for _ in range(2):
        with NodeDownloads(StoredModelFiles, (look_up(address), folder), read_nodes()) as downloads:
            found.append({"fetching": len(downloads.fetching), "bytes": [one.bytes for one in downloads.fetch()]})
    print(json.dumps(found))
