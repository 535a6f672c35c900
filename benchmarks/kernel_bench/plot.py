"""One picture of a results folder: the roofline, and each measurement's share of its roof.

Above, the textbook picture: operations per second against operations per byte, under the copy bandwidth and
the rate of the library's matrix product. Below, every measurement by name: the time that the roof allows
over the time that it took, which is what the picture above shows as distance. Letters can be read where the
picture is 560 pixels wide.
"""

from collections.abc import Sequence
from pathlib import Path

from .measure import Machine, Row, best_time
from .report import PLOT, flop_rate, in_order, read_csv, read_environment

FONT = 12
# Okabe and Ito's, which colour-blind readers tell apart; shapes tell implementations apart, names operators
COLOURS = {
    "em": "#0072B2",
    "heads": "#D55E00",
    "gae": "#009E73",
    "token_gae": "#56B4E9",
    "log_probs": "#CC79A7",
}
MARKERS = {
    "ours": "o",
    "eager": "s",
    "eager, K linears": "D",
    "torch.compile default": "^",
    "torch.compile max-autotune-no-cudagraphs": "v",
    "torchrl vec": "P",
    "torchrl loop": "X",
    "liger": "*",
    "cut cross-entropy": "d",
}


def roof_seconds(row: Row, machine: Machine) -> float:
    """Return the least time that the machine allows for the floor's bytes and operations."""
    assert row.floor_bytes is not None
    assert row.floor_flops is not None
    return max(row.floor_bytes / machine.copy, row.floor_flops / machine.gemm[row.dtype])


def plot_folder(folder: Path) -> Path:
    """Draw the picture of a folder's CSV beside it; returns the file."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stated = read_environment(folder)
    machine = Machine(stated["copy_bytes_per_second"], stated["gemm_flops_per_second"])
    rows = [row for row in in_order(read_csv(folder)) if row.floor_bytes and best_time(row) is not None]
    groups = list(dict.fromkeys((r.op, r.size, r.dtype, r.direction) for r in rows))
    blocks = list(dict.fromkeys(group[:3] for group in groups))
    below = 1.6 + 0.27 * (len(groups) + 1.3 * len(blocks))
    figure, (above, shares) = plt.subplots(
        2, 1, figsize=(7.2, 4.2 + below), height_ratios=[4.2, below], layout="constrained"
    )
    draw_roofline(above, rows, machine)
    draw_shares(shares, rows, groups, machine)
    figure.suptitle(f"Kernels on {stated['device']}", fontsize=14)
    figure.savefig(folder / PLOT, dpi=150)
    plt.close(figure)
    return folder / PLOT


def draw_roofline(axes, rows: Sequence[Row], machine: Machine) -> None:
    """Draw the roofs, and every measurement under them."""
    intensities = [row.floor_flops / row.floor_bytes for row in rows if row.floor_flops and row.floor_bytes]
    ridge = max(machine.gemm.values()) / machine.copy
    low, high = min([*intensities, 0.3]) / 2, max([*intensities, ridge]) * 4
    for style, (dtype, rate) in zip(("-", "--", ":"), machine.gemm.items(), strict=False):
        edge = rate / machine.copy
        axes.plot([low, edge, high], [low * machine.copy, rate, rate], style, color="0.35", linewidth=1.2)
        axes.annotate(
            f"{dtype} matrix product {flop_rate(rate)}",
            (high, rate),
            xytext=(-2, 3),
            textcoords="offset points",
            ha="right",
            fontsize=FONT,
        )
    middle = (low * ridge) ** 0.5
    axes.annotate(
        f"copy {machine.copy / 1e9:.4g} GB/s",
        (middle, middle * machine.copy),
        xytext=(-6, 2),
        textcoords="offset points",
        ha="right",
        fontsize=FONT,
    )
    for row in rows:
        taken = best_time(row)
        if row.floor_flops and row.floor_bytes and taken:
            place = row.floor_flops / row.floor_bytes, row.floor_flops / (taken / 1e6)
            axes.plot(*place, **marker(row))
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_ylim(bottom=axes.get_ylim()[0] / 4)  # room for names
    axes.set_xlabel("operations per byte (floor)", fontsize=FONT)
    axes.set_ylabel("operations per second (floor / time)", fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    axes.grid(alpha=0.25)
    label_operators(axes, rows)


def label_operators(axes, rows: Sequence[Row]) -> None:
    """Write each operator's name above its fastest measurement."""
    for op in dict.fromkeys(row.op for row in rows):
        places = [
            (row.floor_flops / (best_time(row) / 1e6), row.floor_flops / row.floor_bytes)
            for row in rows
            if row.op == op and row.floor_flops and row.floor_bytes
        ]
        if places:
            height, place = min(places)
            axes.annotate(
                op, (place, height), xytext=(0, -10), textcoords="offset points", ha="center", va="top",
                fontsize=FONT, color=COLOURS.get(op, "0.4"), fontweight="bold",
            )  # fmt: skip


def draw_shares(axes, rows: Sequence[Row], groups: Sequence[tuple[str, ...]], machine: Machine) -> None:
    """Draw one line a direction under its workload's name, one marker an implementation."""
    places, height, workload = {}, 0.0, None
    for group in groups:
        if group[:3] != workload:
            height -= 1.3 if places else 0.0
            workload = group[:3]
            axes.text(
                0.0, height, " ".join(workload), transform=axes.get_yaxis_transform(), va="center",
                fontsize=FONT, fontweight="bold", bbox={"color": "white", "pad": 1},
            )  # fmt: skip
        height -= 1
        places[group] = height
    for row in rows:
        taken = best_time(row)
        if taken:
            place = places[row.op, row.size, row.dtype, row.direction]
            axes.plot(100 * roof_seconds(row, machine) / (taken / 1e6), place, **marker(row))
    axes.axvline(100, color="0.35", linewidth=1.2)
    axes.set_yticks(list(places.values()), [group[3] for group in places])
    axes.set(xscale="log", ylim=(height - 0.7, 0.8))
    axes.set_xlabel("% of the roof (right is better)", fontsize=FONT)
    axes.tick_params(labelsize=FONT)
    axes.grid(alpha=0.25)
    names = dict.fromkeys(row.implementation for row in rows)
    handles = []
    for name in names:
        shape = marker_of(name)
        handles += axes.plot([], [], shape, color="0.2", markerfacecolor=fill(name, "0.2"), label=name)
    axes.figure.legend(handles=handles, loc="outside lower center", ncols=2, fontsize=FONT, frameon=False)


def marker_of(implementation: str) -> str:
    """Return the shape of an implementation."""
    return MARKERS.get(implementation, "o")


def fill(implementation: str, colour: str) -> str:
    """Return the colour of a marker's face: ours are solid, baselines hollow."""
    return colour if implementation == "ours" else "none"


def marker(row: Row) -> dict[str, object]:
    """Return how a measurement is drawn: colour by operator, shape by implementation."""
    colour = COLOURS.get(row.op, "0.4")
    return {
        "marker": marker_of(row.implementation),
        "linestyle": "",
        "color": colour,
        "markerfacecolor": fill(row.implementation, colour),
        "markersize": 7 if row.implementation == "ours" else 5.5,
    }
