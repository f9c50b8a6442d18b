"""Watching the losses: a run whose loss is not finite stops, one whose loss jumps is reported."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass, field

from star_fast.errors import AgreedError

WINDOW_STEPS = 200  # losses that a new one is compared with
LEAST_STEPS = 50  # fewer say too little
LONGEST_EPISODE_STEPS = 10 * WINDOW_STEPS  # after so long a jump is the new level
_LEAST_DEVIATION = 1e-3  # of the mean: a loss that hardly moves is not a reason for alarm


class Diverged(AgreedError):
    """The loss or the weights are not finite, or the loss has jumped and the run is set to stop then. All ranks know
    it: they read the same sums.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step  # the last one taken, counted from 1


@dataclass
class LossWatch:
    """The last losses of a run, and whether they have jumped.

    A spike is a loss more than `deviations` standard deviations above the mean of the last 200 steps. An episode lasts
    from there until the loss is back within two deviations of that mean, which stands still meanwhile.
    """

    deviations: float  # 0: spikes are not looked for
    window: list[float] = field(default_factory=list)
    episode: int | None = None  # the step at which an ongoing episode began, counted from 1

    def see(self, step: int, terms: dict[str, float]) -> float | None:
        """Note the losses of one step, counted from 1.

        Returns:
            At the first step of an episode how many deviations its loss lies above the mean; else None.

        Raises:
            Diverged: a loss is not finite.
        """
        if not all(math.isfinite(value) for value in terms.values()):
            told = ", ".join(f"{name} {value:.4g}" for name, value in terms.items())
            raise Diverged(f"step {step}: the loss is not finite ({told})", step)
        loss = terms["loss"]
        if self.deviations and len(self.window) >= LEAST_STEPS:
            mean = statistics.fmean(self.window)
            deviation = max(statistics.pstdev(self.window, mean), _LEAST_DEVIATION * abs(mean))
            above = (loss - mean) / deviation
            if self.episode is None and above > self.deviations:
                self.episode = step
                return above
            if self.episode is not None and above > 2:
                if step - self.episode < LONGEST_EPISODE_STEPS:
                    return None
                self.window.clear()  # the loss stays up here: compare with the new level from now on
            self.episode = None
        self.window = [*self.window[-(WINDOW_STEPS - 1) :], loss]
        return None
