"""A driver that scores a store with a slow fake teacher; ``test_scoring_drills`` kills it, and starts it again."""

import sys
import tempfile
from pathlib import Path

import ray

from actors.score_store.store import ScoreStore
from actors.teacher.pool import TeacherPool
from tests.fakes import FakeTeacher, fake_spec

TOP_K = 5


def main(folder: Path) -> None:
    """Score what is missing in ``folder/store``; note each scored row in ``folder/scored``."""
    with tempfile.TemporaryDirectory(prefix="r", dir="/tmp") as short:
        ray.init(
            address="local", num_cpus=2, include_dashboard=False, object_store_memory=80 << 20, log_to_driver=False,
            logging_level="ERROR", _temp_dir=short,
        )  # fmt: skip
        teacher = FakeTeacher(seconds_per_call=0.2, log=folder / "scored")
        with TeacherPool(fake_spec(TOP_K, replicas=2), engine_factory=teacher) as pool:
            for _ in pool.score_missing(folder / "train.arrow", ScoreStore(folder / "store")):
                pass
        ray.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
