"""What a server counts, for Prometheus."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from skimlm.serve.engine import Engine
from skimlm.serve.skills import Skills

TIMES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)


class Metrics:
    """Counters of requests, and what the engine and the skills have counted."""

    def __init__(self, engine: Engine, skills: Skills) -> None:
        self.engine, self.skills = engine, skills
        self.registry = CollectorRegistry()
        self.registry.register(self)
        self.requests = Counter(
            "skimlm_requests", "Answers by how they ended", ["end"], registry=self.registry
        )
        self.saved = Counter(
            "skimlm_skill_tokens_saved",
            "Tokens of skills' texts that were not read, for what stands in their place",
            registry=self.registry,
        )
        self.first = Histogram(
            "skimlm_first_token_seconds",
            "Time to the first token",
            buckets=TIMES,
            registry=self.registry,
        )

    def collect(self) -> Iterator[Any]:
        """What prometheus_client asks a collector for."""
        engine, skills = self.engine, self.skills
        counted = {
            "skimlm_tokens": ("Tokens of answers", engine.tokens),
            "skimlm_prompt_tokens": ("Tokens of prompts that were read", engine.prompt_tokens),
            "skimlm_prefix_hits": ("Skills that were there already", skills.hits),
            "skimlm_prefix_misses": ("Skills that had to be read first", skills.misses),
            "skimlm_engine_failures": ("Errors of the engine", engine.failures),
        }
        for name, (about, value) in counted.items():
            yield CounterMetricFamily(name, about, value=value)
        yield GaugeMetricFamily("skimlm_running", "Requests that run", value=len(engine.running))
        yield GaugeMetricFamily("skimlm_waiting", "Requests that wait", value=len(engine.waiting))

    def text(self) -> bytes:
        """All of them in Prometheus' text format."""
        return generate_latest(self.registry)
