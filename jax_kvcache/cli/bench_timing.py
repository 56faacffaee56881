"""Times several things side by side, within one run, so that a busy machine is fair to all."""

import resource
import statistics
import time
from collections.abc import Callable, Mapping

import jax

ROUND_SECONDS = 0.01  # one contestant's share of a round; long enough for the clock


class Contestant:
    """One thing that is timed: a step, the state it donates to itself, and its inputs in turn."""

    def __init__(self, step: Callable, state, inputs: list):
        """Compiles and warms up, and finds how many calls fill `ROUND_SECONDS`."""
        self.step, self.state, self.inputs, self.turn = step, state, inputs, 0
        self.seconds: list[float] = []
        self.faults: list[float] = []
        self.calls = 1
        for _ in range(2 + len(inputs)):
            self._call()
        start = time.perf_counter()
        self._call()
        self.calls = max(1, min(500, int(ROUND_SECONDS / (time.perf_counter() - start))))

    def _call(self):
        inputs = self.inputs[self.turn % len(self.inputs)]
        self.turn += 1
        outputs, self.state = self.step(self.state, inputs)
        jax.block_until_ready((outputs, self.state))

    def round(self):
        """Times a few calls, after one that finds the caches as it leaves them."""
        self._call()
        faults = _page_faults()
        start = time.perf_counter()
        for _ in range(self.calls):
            self._call()
        self.seconds.append((time.perf_counter() - start) / self.calls)
        self.faults.append((_page_faults() - faults) / self.calls)

    def median(self) -> float:
        """Microseconds per call."""
        return 1e6 * statistics.median(self.seconds)

    def page_faults(self) -> float:
        """Pages per call that the system had to find: results in memory fresh from malloc."""
        return statistics.median(self.faults)


def _page_faults() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


class Rounds:
    """The times of contestants in interleaved rounds."""

    def __init__(
        self,
        found: Mapping[str, Contestant],
        rounds: int,
        progress: Callable[[], object] | None = None,
    ):
        """Runs the rounds.

        Args:
          found: the contestants by name.
          rounds: how many.
          progress: called after every round.
        """
        order = list(found.values())
        for _ in range(rounds):
            for contestant in order:
                contestant.round()
            order.reverse()  # nobody always comes after the one that moves the most memory
            if progress:
                progress()
        self.microseconds = {name: contestant.median() for name, contestant in found.items()}
        self._times = [{n: c.seconds[i] for n, c in found.items()} for i in range(rounds)]

    def ratio(self, of: Callable[[dict[str, float]], float]) -> float:
        """The median over rounds: what is compared ran within the same fraction of a second."""
        return statistics.median(map(of, self._times))

    def of(self, one: str, other: str) -> float:
        """`ratio` of one contestant's time to another's."""
        return self.ratio(lambda times: times[one] / times[other])
