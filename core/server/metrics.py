"""Prometheus figures of one server: names and buckets as dashboards for vLLM know them, under the prefix plexor_."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.process_collector import ProcessCollector

from plexor.runtime.request import FinishReason
from plexor.runtime.stats import StepStats

_FIRST_TOKEN = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
    160.0,
    640.0,
    2560.0,
)
_BETWEEN_TOKENS = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.025,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.4,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    7.5,
    10.0,
    20.0,
    40.0,
    80.0,
)
_REQUEST = (
    0.3,
    0.5,
    0.8,
    1.0,
    1.5,
    2.0,
    2.5,
    5.0,
    10.0,
    15.0,
    20.0,
    30.0,
    40.0,
    50.0,
    60.0,
    120.0,
    240.0,
    480.0,
    960.0,
    1920.0,
    7680.0,
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000, 200000)


class Metrics:
    """The figures, in a registry of their own, so that several servers in one process do not meet."""

    def __init__(self, model_name: str) -> None:
        self._registry = CollectorRegistry()
        self._model_name = model_name
        self._success = self._counter("request_success", "Finished requests", "finished_reason")
        self._rejections = self._counter("admission_rejections", "Requests turned away", "reason")
        self._prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts")
        self._generation_tokens = self._counter("generation_tokens", "Tokens of answers")
        self._preemptions = self._counter("num_preemptions", "Requests that lost their cache to older ones")
        self._prefix_queries = self._counter("prefix_cache_queries", "Prompt tokens looked up in the prefix cache")
        self._prefix_hits = self._counter("prefix_cache_hits", "Prompt tokens found in the prefix cache")
        self._running = self._gauge("num_requests_running", "Requests in the batch")
        self._waiting = self._gauge("num_requests_waiting", "Requests that wait for a place in the batch")
        self._kv_usage = self._gauge("kv_cache_usage_perc", "Share of the KV cache in use, 1 is all of it")
        self._first_token = self._histogram("time_to_first_token_seconds", "Arrival to first token", _FIRST_TOKEN)
        self._between = self._histogram("inter_token_latency_seconds", "Between two tokens", _BETWEEN_TOKENS)
        self._whole = self._histogram("e2e_request_latency_seconds", "Arrival to end", _REQUEST)
        self._queue = self._histogram("request_queue_time_seconds", "Arrival to the first step", _REQUEST)
        self._prompt_length = self._histogram("request_prompt_tokens", "Tokens of a prompt", _TOKENS)
        self._answer_length = self._histogram("request_generation_tokens", "Tokens of an answer", _TOKENS)
        self._step_tokens = self._histogram("iteration_tokens_total", "Tokens computed in a step", _TOKENS)
        ProcessCollector(registry=self._registry)

    def render(self) -> bytes:
        """All figures in Prometheus' text format."""
        return generate_latest(self._registry)

    def on_step(self, stats: StepStats) -> None:
        """A step was launched."""
        self._running.set(stats.num_running)
        self._waiting.set(stats.num_waiting)
        self._kv_usage.set(1 - stats.free_blocks / stats.total_blocks)
        self._preemptions.inc(stats.num_preempted)
        self._prefix_queries.inc(stats.prefix_queries)
        self._prefix_hits.inc(stats.prefix_hits)
        if stats.num_tokens:
            self._step_tokens.observe(stats.num_tokens)

    def on_start(self, seconds: float) -> None:
        """A request has its first step, this long after it arrived."""
        self._queue.observe(seconds)

    def on_first_token(self, seconds: float, num_prompt_tokens: int) -> None:
        """A request got its first token, this long after it arrived."""
        self._first_token.observe(seconds)
        self._prompt_tokens.inc(num_prompt_tokens)

    def on_tokens(self, count: int) -> None:
        """An answer grew."""
        self._generation_tokens.inc(count)

    def on_next_token(self, seconds: float) -> None:
        """A further token came, this long after the one before."""
        self._between.observe(seconds)

    def on_finish(self, reason: FinishReason, seconds: float, num_prompt_tokens: int, num_tokens: int) -> None:
        """A request ended, this long after it arrived."""
        self._success.labels(self._model_name, reason).inc()
        self._whole.observe(seconds)
        self._prompt_length.observe(num_prompt_tokens)
        self._answer_length.observe(num_tokens)

    def on_rejection(self, reason: str) -> None:
        """A request was turned away before it reached the engine."""
        self._rejections.labels(self._model_name, reason).inc()

    def on_engine_death(self) -> None:
        """Nothing runs any more."""
        for gauge in (self._running, self._waiting, self._kv_usage):
            gauge.set(0)

    def _counter(self, name: str, text: str, label: str | None = None) -> Counter:
        labels = ["model_name"] if label is None else ["model_name", label]
        counter = Counter(f"plexor_{name}", text, labels, registry=self._registry)
        return counter.labels(self._model_name) if label is None else counter

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"plexor_{name}", text, ["model_name"], registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
        histogram = Histogram(f"plexor_{name}", text, ["model_name"], registry=self._registry, buckets=buckets)
        return histogram.labels(self._model_name)
