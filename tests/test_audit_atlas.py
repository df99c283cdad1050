"""Networks of diffusers that follow no convention are called by a table, and the atlas lists how all of them start."""

from __future__ import annotations

import pytest
import torch

from dit.audit import atlas, targets
from dit.audit.signatures import SIGNATURES


@pytest.mark.parametrize("name", SIGNATURES)
def test_every_network_of_the_table_takes_what_the_table_says(name: str) -> None:
    target = targets.load(f"diffusers:{name}", {})
    assert isinstance(target.batch, dict)
    with torch.no_grad():
        output = target.model.eval()(**target.batch)
    assert getattr(output, "sample", output).isfinite().all()


def test_the_atlas_puts_first_what_differs_from_the_original_code() -> None:
    page = atlas.page(["ErnieImageTransformer2DModel", "DiTTransformer2DModel", "RFD4ProteinaTransformer"])
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| ") and "Transformer" in line]
    assert rows == ["| DiTTransformer2DModel", "| ErnieImageTransformer2DModel"]
    assert "0 of 2 are the identity" in page
    assert "## Not called (1 of 3)" in page
    assert "- RFD4ProteinaTransformer: no input is known for argument 'bb_ca'" in page
