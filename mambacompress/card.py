"""Model cards. Of an artifact: what was done, what it cost on the calibration text, how to load it. Of a model trained
here: from what, how, and how well it came out.
"""

from __future__ import annotations

from collections.abc import Mapping
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


_TRAINED = """---
library_name: transformers
pipeline_tag: text-generation
tags:
- {kind}
- mambacompress
---
# {name}

A language model trained from scratch by [mambacompress](https://pypi.org/project/mambacompress/).

```python
import mambacompress as mc

model = mc.load("path/to/this/directory")
```

transformers' `AutoModelForCausalLM` loads it as well.

| | |
|---|---|
{rows}
"""


def trained_card(name: str, kind: str, facts: Mapping[str, str]) -> str:
    """Markdown for a trained model. kind: its transformers model type. facts: a row each, in order."""
    rows = "\n".join(f"| {what} | {value} |" for what, value in facts.items())
    return _TRAINED.format(name=name, kind=kind, rows=rows)
