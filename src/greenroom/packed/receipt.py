"""The receipt: what was measured of a packed model's quality, kept in its manifest."""

import dataclasses
import math
from typing import Any

_DIGITS = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class Estimate:
    """A figure and its standard error; None where one sample alone was drawn."""

    value: float
    se: "float | None"

    def text(self, digits: int, se_digits: int = 1, scale: float = 1.0) -> str:
        """For people, times `scale`, with so many significant digits: "0.00527 ± 0.0002"."""
        value = f"{self.value * scale:.{digits}g}"
        return value if self.se is None else f"{value} ± {self.se * scale:.{se_digits}g}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Receipt:
    """Figures against the original checkpoint on a text; `docs/format.md` says what each is."""

    text: str
    """name of the text's file"""
    sha256: str
    """of the text's bytes"""
    context: int
    stride: "int | None"
    mode: str
    windows: int
    tokens: int
    nbytes: int
    original_nbytes: int
    perplexity: Estimate
    original_perplexity: Estimate
    perplexity_ratio: Estimate
    kl: Estimate
    top1_agreement: Estimate

    @property
    def is_finite(self) -> bool:
        """Whether every figure is a number that can be stored."""
        estimates = [value for value in vars(self).values() if isinstance(value, Estimate)]
        return all(math.isfinite(one.value) and math.isfinite(one.se or 0) for one in estimates)

    def to_body(self) -> "dict[str, Any]":
        """For the manifest, which holds no fractions: figures as decimal texts."""
        return {name: _text(value) if isinstance(value, Estimate) else value for name, value in vars(self).items()}

    @classmethod
    def of_body(cls, body: "dict[str, Any]") -> "Receipt":
        """The reverse of `to_body`; raises TypeError, ValueError or KeyError for anything else."""
        estimates = {field.name for field in dataclasses.fields(cls) if field.type is Estimate}
        values: dict[str, Any] = {
            name: _estimate(value) if name in estimates else value for name, value in body.items()
        }
        receipt = cls(**values)
        counts = (receipt.context, receipt.windows, receipt.tokens, receipt.nbytes, receipt.original_nbytes)
        texts = (receipt.text, receipt.sha256, receipt.mode)
        if not all(type(count) is int for count in counts) or not all(isinstance(text, str) for text in texts):
            raise TypeError("the receipt has values of other types")
        if not (receipt.stride is None or type(receipt.stride) is int) or not receipt.is_finite:
            raise ValueError("the receipt has values that cannot be")
        return receipt


def _text(estimate: Estimate) -> "dict[str, str | None]":
    return {name: None if number is None else f"{number:.{_DIGITS}g}" for name, number in vars(estimate).items()}


def _estimate(body: "dict[str, str | None]") -> Estimate:
    value, se = body["value"], body["se"]
    if not isinstance(value, str) or len(body) != 2:
        raise TypeError("a figure of the receipt is no decimal text")
    return Estimate(value=float(value), se=None if se is None else float(se))
