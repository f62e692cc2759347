"""Whether an engine's step gets on, or has come to a stand."""

STAND_S = 300.0  # more than a layer takes to compute, and to have asked hosts that fail one after another


class StepWatch:
    """Told from time to time how far a step is: by the layers whose rows were sent to the experts so far, ever.

    Between two of them a step computes one layer and waits for its experts, for which it has a deadline. A bound on the
    whole step would have to be that of a layer times the layers: hours, for a large model.
    """

    def __init__(self, expert_deadline_s: float) -> None:
        self.longest_s = expert_deadline_s + STAND_S
        self._layers = -1
        self._since_s = 0.0

    def stands_s(self, step_s: float | None, layers: int, now_s: float) -> float:
        """For how long the step that began `step_s` ago was seen where it is; 0 where none runs."""
        if layers != self._layers:
            self._layers, self._since_s = layers, now_s
        return min(step_s or 0.0, now_s - self._since_s)
