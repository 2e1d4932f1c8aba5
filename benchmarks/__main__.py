"""``make bench``: the quality tables of every recipe, with llama.cpp beside where it is installed.

    python -m benchmarks [MODEL_DIR] [--text FILE ...] [--out DIR]

Without a model the embedded demo model is measured on the standard library's held-out source. The single benchmarks
(quality, peers.llamacpp, memory) take more options: see ``python -m benchmarks.quality --help``.
"""

from __future__ import annotations

import argparse
import importlib.util
from pathlib import Path

from benchmarks import quality


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--text", action="append", default=[])
    parser.add_argument("--calibration", action="append", default=[])
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--out", type=Path, default=Path("bench"))
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    model, texts = options.model, list(options.text)
    if model is None:
        from mambacompress.api import demo_directory
        from mambacompress.data import stdlib_texts

        model = demo_directory()
        held_out = options.out / "stdlib-test.txt"
        held_out.write_text("\n".join(stdlib_texts("test")), encoding="utf-8")
        texts = texts or [str(held_out)]
    if not texts:
        parser.error("name the text to measure on with --text")
    arguments = [str(model), "--recipes", "all", "--windows", str(options.windows), "--out",
                 str(options.out / "quality.json")]
    for name in texts:
        arguments += ["--text", name]
    for name in options.calibration:
        arguments += ["--calibration", name]
    if importlib.util.find_spec("llama_cpp") is not None:
        from benchmarks.peers import llamacpp

        peer = options.out / "llamacpp.json"
        named = [item for name in texts for item in ("--text", name)]
        llamacpp.main([str(model), *named, "--windows", str(options.windows), "--out", str(peer)])
        arguments += ["--llamacpp", str(peer)]
    quality.main(arguments)


if __name__ == "__main__":
    main()
