"""A picture of support shift: the contexts by who solves them, one bar for each judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from lightning_mpo.metrics.support_shift import PARTS

COLOURS = ("tab:gray", "tab:green", "tab:red", "lightgray")


def draw_shift(tables: Mapping[str, Mapping[str, Sequence[float]]], path: Path) -> None:
    """Draw a bar for each judge, divided into the four parts, with the ESR beside it.

    Args:
        tables: results of `support_shift` by the name of the judge.
        path: the picture.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 1.2 + 0.7 * len(tables)), layout="constrained")
    places = range(len(tables))
    left = [0.0] * len(tables)
    for name, colour in zip(PARTS, COLOURS, strict=True):
        widths = [table[name][0] for table in tables.values()]
        axes.barh(places, widths, left=left, color=colour, label=name.replace("_", " "))
        for place, width, start in zip(places, widths, left, strict=True):
            if width >= 0.07:
                axes.text(start + width / 2, place, f"{width:.2f}", ha="center", va="center")
        left = [start + width for start, width in zip(left, widths, strict=True)]
    labels = [f"{name}\nESR {table['esr'][0]:.2f}" for name, table in tables.items()]
    axes.set(yticks=list(places), yticklabels=labels, xlim=(0, 1), xlabel="share of the contexts")
    axes.invert_yaxis()
    figure.legend(loc="outside upper center", ncols=len(PARTS), fontsize=8)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
