"""Plots of a training run: its loss and learning rate, and how the experts share the load."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from model.snapshots import disk
from services.training.curves import curve, fits_log
from services.training.expert_loads import Counted
from services.training.records import StepRecord

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDTH_INCHES = 7.0
COLOUR, PALE, SECOND = "#0b2f5c", "#4c9bd6", "#b5651d"
FEW = 3  # points that no line shows
LARGEST_SHARE = 4.0  # of the mean; what is above has the same colour


def draw_loss(records: Sequence[StepRecord], path: Path) -> None:
    """Loss and learning rate over the steps, at least one. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, MaxNLocator

    steps = np.array([record.step for record in records], np.float64)
    loss = curve(steps, np.array([record.loss for record in records], np.float64))
    rate = curve(steps, np.array([record.lr for record in records], np.float64))
    marker = "." if len(steps) < FEW else ""
    figure = Figure(figsize=(WIDTH_INCHES, 4.4), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    if len(loss.steps) < len(steps):
        above.fill_between(loss.steps, loss.low, loss.high, color=PALE, alpha=0.25, linewidth=0, gid="loss-range")
    above.plot(loss.steps, loss.mean, color=PALE, linewidth=0.8, marker=marker, label="loss", gid="loss")
    above.plot(loss.steps, loss.smoothed, color=COLOUR, linewidth=1.6, label="smoothed", gid="loss-smoothed")
    if fits_log(np.concatenate((loss.low, loss.high))):
        above.set_yscale("log")
        above.yaxis.set_major_formatter(LogFormatter())
        above.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2.0, 0.4)))
    above.set_ylabel("loss, nats a token")
    above.set_title("Training loss and learning rate", fontsize="medium")
    above.legend(frameon=False, fontsize="small")
    below.plot(rate.steps, rate.mean, color=SECOND, linewidth=1.2, marker=marker, gid="learning-rate")
    below.set_ylim(bottom=0)
    below.ticklabel_format(axis="y", scilimits=(0, 0))
    below.set_ylabel("learning rate")
    below.set_xlabel("step")
    below.set_xlim(steps[0] - 0.5, steps[-1] + 0.5)
    below.xaxis.set_major_locator(MaxNLocator(steps=[1, 2, 5, 10], integer=True, min_n_ticks=1))
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    _save(figure, path)


def draw_experts(counted: Counted, layers: Sequence[int], path: Path) -> None:
    """A cell for each layer and expert. Raises ModuleNotFoundError without matplotlib."""
    from matplotlib.colors import TwoSlopeNorm
    from matplotlib.figure import Figure

    share_LE = relative_load(counted.rows_LE)
    rows, experts = share_LE.shape
    top = min(LARGEST_SHARE, max(2.0, float(share_LE.max())))
    figure = Figure(figsize=(WIDTH_INCHES, 1.6 + min(6.0, max(0.9, 0.13 * rows))), layout="constrained")
    axes = figure.subplots()
    cells = axes.pcolormesh(share_LE, cmap="RdBu_r", norm=TwoSlopeNorm(1.0, 0.0, top), gid="experts", linewidth=0)
    axes.invert_yaxis()
    shown_rows, shown_experts = range(0, rows, max(1, rows // 10)), range(0, experts, max(1, experts // 8))
    axes.set_yticks([row + 0.5 for row in shown_rows], [str(layers[row]) for row in shown_rows])
    axes.set_xticks([expert + 0.5 for expert in shown_experts], [str(expert) for expert in shown_experts])
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    axes.set_title(f"{_title(counted)}\n{_busiest(share_LE, layers)}", fontsize="medium")
    extend = "max" if share_LE.max() > top else "neither"
    figure.colorbar(cells, ax=axes, label="load / mean", ticks=np.arange(top + 1), extend=extend)
    _save(figure, path)


def relative_load(rows_LE: NDArray[np.int64]) -> NDArray[np.float64]:
    """Rows of each expert over the mean of its layer's; 1 throughout a layer without any."""
    mean_L1 = rows_LE.mean(1, keepdims=True)
    share_LE = np.ones(rows_LE.shape)
    np.divide(rows_LE, mean_L1, out=share_LE, where=mean_L1 > 0)
    return share_LE


def _title(counted: Counted) -> str:
    steps = "1 step" if counted.steps == 1 else f"{counted.steps} steps"
    return f"Load of each expert, relative to the mean of its layer, over {steps}"


def _busiest(share_LE: NDArray[np.float64], layers: Sequence[int]) -> str:
    row, expert = divmod(int(share_LE.argmax()), share_LE.shape[1])
    return f"busiest: expert {expert} of layer {layers[row]}, {share_LE[row, expert]:.2f} times the mean"


def _save(figure: "Figure", path: Path) -> None:
    """Whole or not at all; the same figures give the same file, with its text as text."""
    import matplotlib

    drawn = io.BytesIO()
    with matplotlib.rc_context({"svg.hashsalt": "shoal", "svg.fonttype": "none"}):
        figure.savefig(drawn, format="svg", metadata={"Date": None, "Creator": None})
    disk.write_file(path, [drawn.getvalue()], len(drawn.getvalue()))
