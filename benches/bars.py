"""The project's bars for `full_size.py`, and its tables in Markdown."""

from __future__ import annotations

import statistics
from dataclasses import asdict, dataclass, field


@dataclass
class Samples:
    """Seconds of one network in one variant, by round."""

    rounds: list[list[float]] = field(default_factory=list)

    def all(self) -> list[float]:
        """Of all rounds together."""
        return [second for seconds in self.rounds for second in seconds]

    def ratio(self, base: Samples) -> tuple[float, float, float]:
        """Ratio of the medians to `base`'s, and the least and the largest of a round."""
        pairs = zip(self.rounds, base.rounds, strict=True)
        ratios = [statistics.median(own) / statistics.median(other) for own, other in pairs]
        return statistics.median(self.all()) / statistics.median(base.all()), min(ratios), max(ratios)

    def summary(self, base: Samples) -> dict[str, object]:
        """What the JSON file says of them."""
        ratio, least, largest = self.ratio(base)
        return {
            "seconds": statistics.median(self.all()),
            "seconds-least": min(self.all()),
            "seconds-largest": max(self.all()),
            "samples": self.rounds,
            "ratio-to-torch": ratio,
            "ratio-least": least,
            "ratio-largest": largest,
        }


@dataclass
class Bar:
    """One figure and the most that it may be; `value` is `None` where it was not measured."""

    what: str
    value: float | None
    bar: float
    unit: str = ""
    spread: str = ""

    @property
    def holds(self) -> bool | None:
        """Whether the value is within the bar."""
        return None if self.value is None else self.value <= self.bar

    def json(self) -> dict[str, object]:
        """What the JSON file says of it."""
        return {**asdict(self), "holds": self.holds}


# The network, the mode and the most that tronie's median may be of torch's.
RATIOS = (("unet", "fast", 0.87), ("unet", "low", 1.02), ("vae", "fast", 0.72))
NETWORKS = {"unet": "UNet forward", "vae": "VAE decode"}
# The least size, px, up to which anonymous memory while denoising is held to how many bytes.
DENOISE = ((512, 0.8e9), (1024, 2e9))
LOAD_SECONDS, LOAD_BYTES = 5.0, 0.3e9
OUTSIDE = 0.01


def of(speed: dict[str, dict], low: list[dict]) -> list[Bar]:
    """All bars, of what `full_size.py` measured by variant and network, and in `low` by size."""
    bars = []
    for network, mode, most in RATIOS:
        what = f"{NETWORKS[network]}, {mode}: ratio to torch"
        times = speed.get(mode)
        if not times:
            bars.append(Bar(what, None, most))
            continue
        found = times[network]
        spread = f"{found['ratio-least']:.3f}–{found['ratio-largest']:.3f}"
        bars.append(Bar(what, found["ratio-to-torch"], most, spread=spread))
    first = low[0]
    bars.append(Bar("UNet load, low", first["unet-load-seconds"], LOAD_SECONDS, "s"))
    bars.append(Bar("UNet load, low: anonymous", first["unet-load-anonymous-bytes"], LOAD_BYTES, "B"))
    sizes = {row["size"]: row["denoise-anonymous-bytes"] for row in low}
    for size, most in DENOISE:
        bars.append(Bar(f"denoising at {size}×{size}, low: anonymous", sizes.get(size), most, "B"))
    for mode, times in speed.items():
        if mode != "torch":
            what = f"outside ONNX Runtime, {mode}: share of a step"
            bars.append(Bar(what, times["outside-runtime-share"], OUTSIDE, "%"))
    return bars


def text(value: float, unit: str) -> str:
    """A value with its unit."""
    if unit == "B":
        return f"{value / 1e9:.2f} GB"
    if unit == "%":
        return f"{value:.3%}"
    return f"{value:.2f} s" if unit == "s" else f"{value:.3f}"


def speed_table(speed: dict[str, dict]) -> str:
    """Seconds of every network in every variant."""
    rows = [["variant", "network", "median, s", "min–max, s", "ratio to torch", "ratio by round"]]
    for name, times in speed.items():
        for network, title in NETWORKS.items():
            found = times[network]
            cells = [f"tronie, {name}" if name != "torch" else name, title, f"{found['seconds']:.3f}"]
            cells.append(f"{found['seconds-least']:.3f}–{found['seconds-largest']:.3f}")
            cells += ["1", ""]
            if name != "torch":
                spread = f"{found['ratio-least']:.3f}–{found['ratio-largest']:.3f}"
                cells[-2:] = [f"{found['ratio-to-torch']:.3f}", spread]
            rows.append(cells)
    return table(rows)


def bar_table(bars: list[Bar]) -> str:
    """Every bar and whether it holds; what was not measured is said to be so."""
    rows = [["figure", "measured", "by round", "bar", "holds"]]
    for bar in bars:
        value = "not measured" if bar.value is None else text(bar.value, bar.unit)
        holds = {True: "yes", False: "**no**", None: "–"}[bar.holds]
        limit = f"{bar.bar:.0%}" if bar.unit == "%" else text(bar.bar, bar.unit)
        rows.append([bar.what, value, bar.spread, f"≤ {limit}", holds])
    return table(rows)


def verdict(bars: list[Bar]) -> str:
    """One line that says how many hold."""
    measured = [bar for bar in bars if bar.holds is not None]
    missed = [bar.what for bar in measured if not bar.holds]
    line = f"{len(measured) - len(missed)} of {len(measured)} measured bars hold"
    if missed:
        line += f"; missed: {'; '.join(missed)}"
    left = len(bars) - len(measured)
    return f"{line}; {left} not measured" if left else line


def table(rows: list[list[str]]) -> str:
    """Rows in Markdown, the first the head."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in rows
    ]
    return "\n".join([lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]])
