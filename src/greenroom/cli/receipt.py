"""A receipt in one line, and making one."""

import dataclasses
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from greenroom.packed import PackedModel, Receipt


def line(receipt: "Receipt") -> str:
    """What was measured, on what."""
    return (
        f"KL {receipt.kl.text(4)} nats to the original, perplexity × {receipt.perplexity_ratio.text(4)}, "
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
