"""The worker's Prometheus metrics, and the small HTTP server that shows them next to the worker's health.

``/metrics`` Prometheus text · ``/health`` 200 while the decoding loop turns · ``/ready`` 200 while it also has Redis
and the broker and is not draining. Runs on daemon threads of its own; a scrape never waits for the engine. Next:
``worker.py``.
"""

from __future__ import annotations

import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest

from axon_llm.errors import UsageError
from axon_llm.serving.served_model import EngineStatistics
from axon_llm.serving.wire import Terminal

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_GAPS = (0.001, 0.0025, 0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.2, 0.5, 1, 5)


class WorkerMetrics:
    """Everything a worker counts, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.ttft_s = Histogram(
            "axon_time_to_first_token_seconds", "Submission to first token", registry=registry, buckets=_SECONDS
        )
        self.tpot_s = Histogram(
            "axon_time_per_output_token_seconds",
            "(last - first token) / (tokens - 1) of a job",
            registry=registry,
            buckets=_GAPS,
        )
        self.itl_s = Histogram(
            "axon_inter_token_latency_seconds", "Each gap between tokens of a job", registry=registry, buckets=_GAPS
        )
        self.queue_s = Histogram(
            "axon_queue_seconds", "Submission to the claim by a worker", registry=registry, buckets=_SECONDS
        )
        self.job_s = Histogram("axon_job_seconds", "Claim to the end of a job", registry=registry, buckets=_SECONDS)
        self.running = Gauge("axon_jobs_running", "Jobs that hold a slot", registry=registry)
        self.waiting = Gauge("axon_jobs_waiting", "Jobs with this worker that wait for a slot", registry=registry)
        self.slots = Gauge("axon_slots", "Slots of the KV cache", registry=registry)
        self.cache_bytes = Gauge("axon_kv_cache_bytes", "Size of the KV cache", registry=registry)
        self.cache_used = Gauge(
            "axon_kv_cache_used_bytes", "Bytes of the KV cache that hold running sequences", registry=registry
        )
        self.prompt_tokens = Counter("axon_prompt_tokens", "Prompt tokens of ended jobs", registry=registry)
        self.cached_tokens = Counter(
            "axon_cached_tokens", "Prompt tokens of ended jobs that were found in a slot", registry=registry
        )
        self.generated_tokens = Counter("axon_generated_tokens", "Tokens generated here", registry=registry)
        self.ended = Counter("axon_jobs_ended", "Jobs ended here", ["finish_reason"], registry=registry)
        self.failures = Counter("axon_job_failures", "Jobs that failed here", ["reason"], registry=registry)
        self.resumes = Counter("axon_job_resumes", "Jobs continued after another worker began them", registry=registry)
        self.adopted = Counter(
            "axon_jobs_adopted", "Deliveries of jobs that were being decoded here already", registry=registry
        )
        self.fenced = Counter("axon_emits_fenced", "Emits refused: another worker had the job", registry=registry)
        self.backfills = Counter("axon_emits_backfilled", "Emits repeated from an earlier token", registry=registry)
        self.duplicates = Counter("axon_deliveries_duplicate", "Deliveries dropped as duplicates", registry=registry)
        self.rejected = Counter("axon_deliveries_rejected", "Deliveries that are no job", registry=registry)
        self.suspects = Counter("axon_jobs_suspect", "Jobs moved to the solo queue", registry=registry)
        self.returned = Counter("axon_jobs_returned", "Jobs handed back by a drain", registry=registry)
        self.store_errors = Counter("axon_store_errors", "Times Redis was not available", registry=registry)
        self.emit_s = Histogram(
            "axon_emit_seconds", "One round trip with the tokens of one step", registry=registry, buckets=_GAPS
        )

    def show(self, stats: EngineStatistics, waiting: int) -> None:
        """The engine as it is now, and how many jobs wait for a slot."""
        self.running.set(stats.running)
        self.waiting.set(waiting)
        self.slots.set(stats.slots)
        self.cache_bytes.set(stats.cache_bytes)
        self.cache_used.set(stats.cache_bytes_in_use)

    def job_ended(self, terminal: Terminal, took_s: float) -> None:
        """Count a job that ended here, so many seconds after its claim."""
        self.ended.labels(terminal.finish_reason).inc()
        self.job_s.observe(took_s)
        if terminal.error is not None:
            self.failures.labels(terminal.error.code).inc()
        if terminal.usage is not None:
            self.prompt_tokens.inc(terminal.usage.prompt_tokens)
            self.cached_tokens.inc(terminal.usage.cached_tokens)
        if terminal.timings is not None and terminal.timings.tpot_s is not None:
            self.tpot_s.observe(terminal.timings.tpot_s)


class Health:
    """What ``/health`` and ``/ready`` answer; set by the decoding loop, read by the HTTP threads."""

    def __init__(self, stale_s: float = 60.0) -> None:
        self._stale_s = stale_s
        self._beat = time.monotonic()
        self.ready = False
        self.reason = "starting"

    def beat(self) -> None:
        """The loop has turned once more."""
        self._beat = time.monotonic()

    @property
    def healthy(self) -> bool:
        """Whether the loop has turned lately."""
        return time.monotonic() - self._beat < self._stale_s


class MetricsServer:
    """Serves metrics and health on an address; port 0 takes a free one.

    Raises:
        UsageError: the port is taken.
    """

    def __init__(self, metrics: WorkerMetrics, health: Health, host: str, port: int) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                path = self.path.split("?")[0]
                if path == "/metrics":
                    self._answer(200, generate_latest(metrics.registry), CONTENT_TYPE_LATEST)
                elif path == "/health":
                    self._answer(200 if health.healthy else 503, b"ok\n" if health.healthy else b"stuck\n")
                elif path == "/ready":
                    ready = health.ready and health.healthy
                    self._answer(200 if ready else 503, b"ready\n" if ready else f"{health.reason}\n".encode())
                else:
                    self._answer(404, b"not found\n")

            def _answer(self, status: int, body: bytes, kind: str = "text/plain; charset=utf-8") -> None:
                self.send_response(status)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: object) -> None:
                """Scrapes are not worth a line."""

        try:
            self._server = ThreadingHTTPServer((host, port), Handler)
        except OSError as error:
            raise UsageError(
                f"cannot listen for metrics on {host}:{port}: {error.strerror}", hint="set AXON_METRICS_PORT"
            ) from None
        self._server.daemon_threads = True
        self.port = int(self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, name="axon-metrics", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        self._server.shutdown()
        self._server.server_close()
