"""The receipt in a packed model's manifest: kept whole, refused in any other shape."""

import dataclasses
import json
import shutil
import zlib
from pathlib import Path
from typing import Any

import pytest

from greenroom.errors import PackedModelError
from greenroom.packed import MANIFEST_NAME, Estimate, PackedModel, Receipt

RECEIPT = Receipt(
    text="words.txt",
    sha256="ab" * 32,
    context=2048,
    stride=None,
    mode="whole-window",
    windows=3,
    tokens=6141,
    nbytes=10,
    original_nbytes=40,
    perplexity=Estimate(value=7.25, se=0.5),
    original_perplexity=Estimate(value=7.0, se=0.5),
    perplexity_ratio=Estimate(value=1.0357143, se=None),
    kl=Estimate(value=0.0048765, se=1e-5),
    top1_agreement=Estimate(value=0.96, se=0.01),
)


@pytest.fixture
def folder(packed4: PackedModel, tmp_path: Path) -> Path:
    """A copy to change."""
    return Path(shutil.copytree(packed4.folder, tmp_path / "model"))


def write(folder: Path, body: "dict[str, Any]") -> None:
    """A manifest with a right checksum."""
    crc32 = zlib.crc32(json.dumps(body, sort_keys=True, separators=(",", ":")).encode())
    (folder / MANIFEST_NAME).write_text(json.dumps({**body, "crc32": crc32}))


def read(folder: Path) -> "dict[str, Any]":
    body: dict[str, Any] = json.loads((folder / MANIFEST_NAME).read_text())
    del body["crc32"]
    return body


def test_a_receipt_survives_and_changes_nothing_else(folder: Path) -> None:
    plain = (folder / MANIFEST_NAME).read_text()
    packed = PackedModel(folder)
    packed.add_receipt(dataclasses.replace(RECEIPT, kl=Estimate(value=0.00487650000001, se=1e-5)))
    again = PackedModel(folder)
    assert again.manifest.receipt == RECEIPT and again.verify() == []
    assert json.loads((folder / MANIFEST_NAME).read_text())["version"] == 2
    assert dataclasses.replace(again.manifest, receipt=None).to_json() == plain


@pytest.mark.parametrize(
    "change",
    [
        {"kl": {"value": 0.5, "se": None}},
        {"kl": {"value": "nan", "se": None}},
        {"kl": {"value": "0.5", "se": "inf"}},
        {"kl": {"value": "0.5"}},
        {"tokens": "many"},
        {"tokens": True},
        {"stride": "0"},
        {"extra": 1},
    ],
)
def test_a_receipt_of_another_shape_is_refused(folder: Path, change: "dict[str, Any]") -> None:
    """With a right checksum, so that the shape alone is wrong."""
    PackedModel(folder).add_receipt(RECEIPT)
    body = read(folder)
    body["receipt"] |= change
    write(folder, body)
    with pytest.raises(PackedModelError, match="damaged") as caught:
        PackedModel(folder)
    assert "\n" not in str(caught.value)


def test_a_receipt_and_its_version_go_together(folder: Path) -> None:
    for version, receipt in ((1, RECEIPT.to_body()), (2, None)):
        body = {name: value for name, value in read(folder).items() if name != "receipt"} | {"version": version}
        write(folder, body | ({} if receipt is None else {"receipt": receipt}))
        with pytest.raises(PackedModelError, match="go together"):
            PackedModel(folder)
