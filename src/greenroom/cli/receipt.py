"""A receipt in one line, and making one."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenroom.packed import Estimate, PackedModel, Receipt


def line(receipt: "Receipt") -> str:
    """What was measured, on what."""
    return (
        f"KL {_figure(receipt.kl)} nats to the original, perplexity × {_figure(receipt.perplexity_ratio)}, "
        f"same first choice {receipt.top1_agreement.value:.1%} "
        f"({receipt.tokens} tokens of {receipt.text}, {receipt.mode})"
    )


def fields(receipt: "Receipt | None") -> "dict[str, Any] | None":
    """The receipt for JSON, or None where there is none."""
    return None if receipt is None else dataclasses.asdict(receipt)


def show(packed: "PackedModel") -> None:
    """The receipt on stderr, where there is one."""
    if packed.manifest.receipt is not None:
        print(f"quality: {line(packed.manifest.receipt)}", file=sys.stderr)


def keep(packed: "PackedModel", receipt: "Receipt") -> None:
    """Put the receipt into the packed model, and say so."""
    packed.add_receipt(receipt)
    print(f"{packed.folder}: receipt kept")


def _figure(estimate: "Estimate") -> str:
    value = f"{estimate.value:.4g}"
    return value if estimate.se is None else f"{value} ± {estimate.se:.1g}"
