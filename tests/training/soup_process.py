"""One process of a soup: ``python soup_process.py MODEL OUT OVERRIDE ...``; prints the stages it was told of."""

from __future__ import annotations

import json
import sys

import mambacompress as mc

TEXT = "\n".join(f"a small text, line {i} of many, for a small model" for i in range(300))


def main() -> None:
    model, out, *overrides = sys.argv[1:]
    stages: list[str] = []
    mc.soup(model, "soup-2of4", texts=TEXT, eval_texts=TEXT[:2000], out=out, windows=4, overrides=overrides,
            progress=lambda stage, done, total, figures: stages.append(stage))
    print(json.dumps(stages))


if __name__ == "__main__":
    main()
