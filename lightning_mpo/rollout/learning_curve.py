"""A picture of training and held-out accuracy over the updates of a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def draw_learning_curve(
    curve: list[dict[str, float]],
    stages: dict[str, dict[str, Any]],
    path: Path,
    updates: int | None = None,
) -> None:
    """Plot training and held-out accuracy over updates, with the evaluated stages.

    Args:
        curve: points with `step` and either `accuracy` (a rollout's) or `validation`.
        stages: the evaluations before and after.
        path: the picture.
        updates: of the run, where the last stage stands; None: the curve's last step.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import MaxNLocator

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    last = max([updates or 0, *(point["step"] for point in curve)])
    top = min(1.02, 1.4 * max([*_accuracies(curve, stages), 0.02]))
    _draw_training(axes, curve)
    # evaluated stages, spread over the run
    for index, (name, stage) in enumerate(stages.items()):
        if "pass_at_1" in stage and "greedy_accuracy" in stage:
            step = last * (index / max(len(stages) - 1, 1))
            _draw_stage(axes, name, stage, step, first=index == 0, low=top / 4)
    axes.set(xlabel="update", ylabel="accuracy", ylim=(0, top))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right" if top > 1 else "upper left")
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _accuracies(curve: list[dict[str, float]], stages: dict[str, dict[str, Any]]) -> list[float]:
    """Return all accuracies that are drawn."""
    names = ("pass_at_1", "greedy_accuracy")
    values = [
        point[name] for point in curve for name in ("accuracy", "validation") if name in point
    ]
    return values + [stage[name] for stage in stages.values() for name in names if name in stage]


def _draw_training(axes: Any, curve: list[dict[str, float]]) -> None:
    """Plot the accuracy of rollouts and of validations over updates."""
    rollouts = [point for point in curve if "accuracy" in point]
    axes.plot(
        [point["step"] for point in rollouts],
        [point["accuracy"] for point in rollouts],
        "." if len(rollouts) == 1 else "-",
        color="tab:gray",
        lw=1,
        label="training rollouts (sampled with the training support)",
    )
    validation = [point for point in curve if "validation" in point]
    if validation:
        axes.plot(
            [point["step"] for point in validation],
            [point["validation"] for point in validation],
            "o-",
            ms=3,
            color="tab:blue",
            label="held-out pass@1 during training",
        )


def _draw_stage(
    axes: Any, name: str, stage: dict[str, Any], step: float, *, first: bool, low: float
) -> None:
    """Mark the accuracies of one evaluation.

    Args:
        axes: of the picture.
        name: of the stage.
        stage: its metrics.
        step: where it stands, in updates.
        first: whether it is the first stage, whose marks are in the legend.
        low: below this accuracy the name stands above its mark.
    """
    # sampled, with its interval
    value, (lower, upper) = stage["pass_at_1"], stage["pass_at_1_interval"]
    axes.errorbar(
        step,
        value,
        yerr=[[value - lower], [upper - value]],
        fmt="D",
        capsize=4,
        color="tab:red",
        label="held-out pass@1, 95 % interval" if first else None,
    )
    # greedy
    greedy = stage["greedy_accuracy"]
    label = "held-out greedy" if first else None
    axes.plot(step, greedy, "^", color="tab:green", label=label)
    # name and value
    axes.annotate(
        f"{name} {value:.2f}",
        (step, value),
        xytext=(6 if first else -6, 8 if value < low else -14),
        textcoords="offset points",
        ha="left" if first else "right",
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1},
    )
