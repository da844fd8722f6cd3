"""Steps of a training in MLflow; the only file that knows mlflow."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param
from mlflow.exceptions import MlflowException

from actors.config.tracking import MlflowConfig, TrackerFailed

SEND_SECONDS = 5.0
MOST_METRICS = 900
"""Of one request: MLflow takes a thousand."""
LONGEST_PARAM = 500


class MlflowLog:
    """One run of MLflow, resumed by the id that stands in ``<name>.mlflow``.

    Steps are sent in the background, some at a time.

    Raises:
        TrackerFailed: if the server does not accept the run.
    """

    def __init__(self, tracking: MlflowConfig, folder: Path, run: str, name: str, about: Mapping[str, Any]) -> None:
        self._client = MlflowClient(tracking_uri=tracking.uri)
        self._waiting: list[Metric] = []
        self._sent: list[Any] = []
        self._sent_at = time.monotonic()
        id_file = folder / f"{name}.mlflow"
        try:
            if id_file.exists():
                self._run_id = id_file.read_text()
                self._client.update_run(self._run_id, status="RUNNING")
            else:
                made = self._client.create_run(self._experiment(tracking.experiment), run_name=f"{run}/{name}", tags={"run": run})
                self._run_id = str(made.info.run_id)
                params = [Param(key, str(value)[:LONGEST_PARAM]) for key, value in about.items()]
                self._client.log_batch(self._run_id, params=params)
                id_file.write_text(self._run_id)
        except MlflowException as error:
            raise TrackerFailed(f"tracking.mlflow at {tracking.uri}: {error}; tracking.mlflow=null would do") from error

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Record one step."""
        now = round(time.time() * 1000)
        self._waiting += [Metric(name, float(value), now, step) for name, value in values.items()]
        if len(self._waiting) > MOST_METRICS - len(values) or time.monotonic() - self._sent_at > SEND_SECONDS:
            self._send()

    def close(self) -> None:
        """Send what is left; say so if some of it did not arrive, which is no reason to lose the training."""
        try:
            self._send()
            for operations in self._sent:
                operations.wait()
            self._client.set_terminated(self._run_id)
        except Exception as error:  # whatever the store's own library raises
            print(f"tracking.mlflow: not all steps arrived: {error}", file=sys.stderr, flush=True)

    def _send(self) -> None:
        if self._waiting:
            self._sent.append(self._client.log_batch(self._run_id, metrics=self._waiting, synchronous=False))
        self._waiting, self._sent_at = [], time.monotonic()

    def _experiment(self, name: str) -> str:
        if found := self._client.get_experiment_by_name(name):
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(name))
        except MlflowException:
            if made := self._client.get_experiment_by_name(name):  # by another trial, between the two calls
                return str(made.experiment_id)
            raise
