"""What `GET /metrics` tells Prometheus."""

from __future__ import annotations

from typing import get_args

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from fastgrpo_sandbox.serving.jails import Jails
from fastgrpo_sandbox.types import Status

SECONDS = (0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60, 120)


class Metrics:
    """Requests by path and HTTP status with their seconds, and the pool's own counters, read when asked."""

    def __init__(self, jails: Jails) -> None:
        self._jails = jails
        self._registry = CollectorRegistry()
        labels = ("path", "status")
        self._requests = Counter("sandbox_requests", "Requests answered", labels, registry=self._registry)
        self._seconds = Histogram(
            "sandbox_request_seconds", "From request to answer", ("path",), buckets=SECONDS, registry=self._registry
        )
        self._outcomes = Gauge("sandbox_jobs", "Jobs ended, by outcome", ("status",), registry=self._registry)
        for status in get_args(Status):
            self._gauge(self._outcomes.labels(status), status)
        for name, text in (
            ("queued", "Jobs waiting for a jail"),
            ("running", "Jobs in jails"),
            ("cells", "Cells"),
            ("cells_lost", "Cells that had to be replaced"),
            ("peak_memory_mb", "Most memory of any job, in MiB"),
        ):
            self._gauge(Gauge(f"sandbox_{name}", text, registry=self._registry), name)
        self._places = Gauge("sandbox_places", "Places in the queue, running jobs included", registry=self._registry)
        self._places.set(jails.places)

    def _gauge(self, gauge: Gauge, name: str) -> None:
        more = (lambda: self._jails.waiting) if name == "queued" else int
        gauge.set_function(lambda: self._jails.pool.stats()[name] + more())

    def answered(self, path: str, status: int, seconds: float) -> None:
        """Counts one request."""
        self._requests.labels(path, str(status)).inc()
        self._seconds.labels(path).observe(seconds)

    def text(self) -> bytes:
        """Everything in Prometheus' text form."""
        return generate_latest(self._registry)
