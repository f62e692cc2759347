"""The one error of the benchmark that people see."""


class BenchError(Exception):
    """The run cannot go on; the message says why and what to do."""
