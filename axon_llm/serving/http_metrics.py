"""Prometheus metrics of the session manager. Labels are route templates and reasons: few, and never anything typed."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class HttpMetrics:
    """The session manager's metrics, in a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "axon_http_requests", "Requests answered.", ("route", "method", "status"), registry=self.registry
        )
        self.request_seconds = Histogram(
            "axon_http_request_seconds",
            "First byte of the request to last byte of the answer.",
            ("route",),
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.first_token_seconds = Histogram(
            "axon_session_manager_ttft_seconds",
            "Job submitted to its first token log entry, as the session manager sees it.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.open_streams = Gauge("axon_open_streams", "Answers under way.", registry=self.registry)
        self.jobs = Counter("axon_jobs_submitted", "Jobs confirmed by the queue.", registry=self.registry)
        self.refused = Counter("axon_requests_refused", "Refused requests.", ("code",), registry=self.registry)
        self.disconnects = Counter(
            "axon_client_disconnects", "Clients that left before their answer's end.", registry=self.registry
        )
