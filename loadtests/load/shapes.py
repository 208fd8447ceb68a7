"""Load shapes, chosen by ``--shape``: the users over the time of a test, from --users, --spawn-rate and --run-time.

Not imported by name into the locustfile: locust takes every shape that it finds there for the one to use.
"""

from __future__ import annotations

from typing import Any, ClassVar

from locust import LoadTestShape


class Shape(LoadTestShape):
    """
    Attributes:
        run_time: seconds, where --run-time does not say.
    """

    abstract = True
    use_common_options = True
    run_time: ClassVar[float] = 60.0

    @property
    def peak(self) -> int:
        return int(self._option("num_users") or 1)

    @property
    def rate(self) -> float:
        return float(self._option("spawn_rate") or max(1, self.peak))

    @property
    def seconds(self) -> float:
        return float(self._option("run_time") or self.run_time)

    def _option(self, name: str) -> Any:
        assert self.runner is not None
        return getattr(self.runner.environment.parsed_options, name, None)

    def tick(self) -> tuple[int, float] | None:
        share = self.get_run_time() / self.seconds
        if share >= 1:
            return None
        return max(1, round(self.peak * self.level(share))), self.rate

    def level(self, share: float) -> float:
        """Share of the users at a share of the time, both from 0 to 1."""
        raise NotImplementedError


class Steps(Shape):
    """More users in five equal steps: where does it break?"""

    steps: ClassVar[int] = 5

    def level(self, share: float) -> float:
        return (int(share * self.steps) + 1) / self.steps


class Spikes(Shape):
    """A tenth of the users, and three times all of them: does it recover?"""

    spikes: ClassVar[int] = 3

    def level(self, share: float) -> float:
        within = share * self.spikes % 1
        return 1.0 if 0.4 <= within < 0.7 else 0.1


class Soak(Shape):
    """All users for a long time, slowly more at the beginning and fewer at the end: what leaks?"""

    run_time: ClassVar[float] = 3600.0
    edge: ClassVar[float] = 0.05

    def level(self, share: float) -> float:
        return min(1.0, share / self.edge, (1 - share) / self.edge)


SHAPES: dict[str, type[Shape]] = {"steps": Steps, "spikes": Spikes, "soak": Soak}
