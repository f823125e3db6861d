"""Live timings, smoothed."""


def smoothed(known: "float | None", latest: float, weight: float) -> float:
    """The weighted mean of what is known and `latest`, counted by `weight` (0 … 1), or wholly if nothing is known."""
    return latest if known is None else known + (latest - known) * weight
