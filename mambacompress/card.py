"""The model card of an artifact: what was done, what it cost on the calibration text, how to load it."""

from __future__ import annotations

from typing import Any

_CARD = """---
library_name: transformers
tags:
- mambacompress
- {recipe}
---
# {source} · {recipe}

A Mamba model compressed by [mambacompress](https://pypi.org/project/mambacompress/) with the recipe `{recipe}`.

```python
import mambacompress as mc

model = mc.load("path/to/this/directory")
```

With transformers, after registering the plug-in:

```python
import mambacompress.hf
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("path/to/this/directory")
```

Without that import transformers refuses to load it (a shape mismatch of the final norm), by design.

| | |
|---|---|
| matrix bytes packed | {coverage:.1%} |
| perplexity ratio on the {tokens:,} calibration tokens | {ratio:.5f} |
| layers packed | {packed} |
| source (SHA-256) | `{source_sha256}` |

The calibration text was seen while compressing; measure on text of your own with `mambacompress evaluate`.

{refused}
"""


def model_card(manifest: dict[str, Any]) -> str:
    """Markdown with the figures of ``manifest``."""
    refused = [f"- {item['target']}: {item['reason']} (pass `{item['pass']}`)" for item in manifest["refused"]]
    return _CARD.format(
        recipe=manifest["recipe"]["name"],
        source=manifest["source"],
        coverage=manifest["coverage"],
        tokens=manifest["calibration"]["tokens"],
        ratio=manifest["calibration"]["perplexity_ratio"],
        packed=sum(spec["type"].startswith("Packed") for spec in manifest["layout"].values()),
        source_sha256=manifest["source_sha256"],
        refused="Left out, with the reason:\n\n" + "\n".join(sorted(set(refused))) if refused else "",
    )
