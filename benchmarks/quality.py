"""The quality tables: recipes, ablations and hard twins on the same windows, with llama.cpp beside.

    python -m benchmarks.quality MODEL_DIR --text FILE --calibration FILE --recipes w8a8,w4a16 --out quality.json
    python -m benchmarks.quality MODEL_DIR --text FILE --ablation w8a8 --twins norm-dt:0 --out ablation.json
    python -m benchmarks.quality MODEL_DIR --text FILE --recipes w4a16 --llamacpp llamacpp.json --out quality.json

Each row is one artifact made by the public API and loaded from disk again: what is measured is what would be shipped.
The perplexity ratio, KL divergence and top-1 agreement are against the float original, window by window (``windows``).
A hard twin computes the original's function, so its rows are compared with the original too. llama.cpp's losses are
those of ``benchmarks.peers.llamacpp`` on the same windows, paired with the same float losses; its KL is against F16.

Rows are written to --out as they are finished. A row found there is not measured again, unless the recipe, the windows,
the calibration or any source file of the package has changed since.

Legend: W windows, L tokens, V vocabulary, S sequences.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.tables import llama_rows, sizes, table, twin_summary
from benchmarks.twins import KINDS, STOCK_KINDS, load_double, make_twin, moment_tokens, save_twin
from benchmarks.variants import ABLATIONS, Variant, recipes
from benchmarks.windows import load_tokenizer, perplexity, perplexity_ratio, windows


def float_losses(model: Any, windows_WL: np.ndarray) -> np.ndarray:
    """Mean loss of every window, fp64 [W]."""
    return np.array([_loss(_log_p(model, tokens_L), tokens_L) for tokens_L in _each(windows_WL)])


def compare(model: Any, reference: Any, windows_WL: np.ndarray) -> dict[str, np.ndarray]:
    """``nll``, ``kl`` (reference || model) and ``agreement`` (equal top-1) of every window, each fp64 [W]."""
    rows = []
    for tokens_L in _each(windows_WL):
        log_p_LV, log_q_LV = _log_p(reference, tokens_L), _log_p(model, tokens_L)
        kl = (log_p_LV.exp() * (log_p_LV - log_q_LV)).sum(-1).mean().item()
        same_L = log_p_LV.argmax(-1) == log_q_LV.argmax(-1)
        rows.append((_loss(log_q_LV, tokens_L), kl, same_L.double().mean().item()))
    nll_W, kl_W, agreement_W = np.array(rows).T
    return {"nll": nll_W, "kl": kl_W, "agreement": agreement_W}


def _each(windows_WL: np.ndarray) -> Iterator[Tensor]:
    yield from torch.from_numpy(windows_WL)


def _log_p(model: Any, tokens_L: Tensor) -> Tensor:
    """log-probabilities of the next token, fp64 [L-1, V], from a zero state."""
    with torch.inference_mode():
        return torch.log_softmax(model(tokens_L[None], use_cache=False).logits[0, :-1].double(), dim=-1)


def _loss(log_p_LV: Tensor, tokens_L: Tensor) -> float:
    return -log_p_LV.gather(1, tokens_L[1:, None]).mean().item()


class Bench:
    """One original, its evaluation windows and calibration ids; ``row`` makes and measures one artifact.

    texts: name -> windows [W, L]. calibration: int64 [S, L], or None for each recipe's own.
    """

    def __init__(self, model_dir: Path, texts: dict[str, np.ndarray], calibration: Tensor | None) -> None:
        import mambacompress as mc

        self.directory, self.texts, self.calibration = model_dir, texts, calibration
        self.original = mc.load(model_dir)
        self.code = _digest(b"".join(file.read_bytes() for file in source_files()))
        self.base = {name: float_losses(self.original, windows_WL) for name, windows_WL in texts.items()}

    def original_row(self) -> dict[str, Any]:
        texts = {name: _figures(nll, nll, np.zeros_like(nll), np.ones_like(nll)) for name, nll in self.base.items()}
        return {"model": "original", "variant": "float", **sizes(self.directory), "texts": texts}

    def row(self, source: Any, model_name: str, variant: Variant, out: Path) -> dict[str, Any]:
        """Quantize ``source`` (a directory or a live model) by ``variant`` into ``out`` and measure what was saved.

        The recipe's own perplexity check is off: a table shows bad rows too.
        """
        import mambacompress as mc

        recipe = mc.load_recipe(variant.recipe, dict(variant.overrides) | {"checks.max_perplexity_ratio": None})
        discard(out)
        started = time.perf_counter()
        try:
            mc.quantize(source, recipe=recipe, calibration=self.calibration, out=out)
        except mc.UserError as error:
            return {"model": model_name, "variant": variant.name, "error": str(error)}
        seconds = time.perf_counter() - started
        model = mc.load(out)
        texts = {}
        for name, windows_WL in self.texts.items():
            found = compare(model, self.original, windows_WL)
            texts[name] = _figures(found["nll"], self.base[name], found["kl"], found["agreement"])
        return {"model": model_name, "variant": variant.name, "seconds": round(seconds, 1), **sizes(out),
                "texts": texts}

    def key(self, model_name: str, variant: Variant) -> str:
        """Equal exactly when a row would be measured on the same thing in the same way by the same code."""
        import mambacompress as mc

        recipe = json.loads(mc.load_recipe(variant.recipe, dict(variant.overrides)).canonical_json())
        calibration = b"" if self.calibration is None else self.calibration.numpy().tobytes()
        counts = {name: list(windows_WL.shape) for name, windows_WL in self.texts.items()}
        parts = [self.directory.name, model_name, variant.name, recipe, counts, _digest(calibration), self.code]
        return _digest(json.dumps(parts, sort_keys=True).encode())


def _figures(nll_W: np.ndarray, base_W: np.ndarray, kl_W: np.ndarray, agreement_W: np.ndarray) -> dict[str, Any]:
    ratio = perplexity_ratio(nll_W, base_W)
    return {"perplexity": perplexity(nll_W), "ratio": ratio.ratio, "ratio_se": ratio.se, "kl": float(kl_W.mean()),
            "agreement": float(agreement_W.mean()), "nll_per_window": nll_W.tolist()}


def source_of(name: str, model_dir: Path, text: str | None, folder: Path) -> Any:
    """The model a row starts from: ``original``, or a twin ``kind:seed``, saved where it has a stock form."""
    if name == "original":
        return model_dir
    kind, _, seed = name.partition(":")
    if kind not in KINDS or not seed.isdigit():
        raise ValueError(f"unknown twin {name!r}: write kind:seed, kind one of {', '.join(KINDS)}")
    if kind == "eigenbasis" and text is None:
        raise ValueError("the eigenbasis twin takes its moments from --calibration: name a file")
    tokens_SL = moment_tokens(model_dir, text, int(seed)) if kind == "eigenbasis" and text is not None else None
    twin = make_twin(load_double(model_dir), kind, seed=int(seed), tokens_SL=tokens_SL)
    return save_twin(twin, folder / name.replace(":", "-"), model_dir) if kind in STOCK_KINDS else twin.float()


def _calibration(model_dir: Path, files: Sequence[str], sequences: int, length: int, seed: int) -> Tensor | None:
    if not files:
        return None
    from mambacompress.data import read_texts, token_windows

    return token_windows(load_tokenizer(model_dir), read_texts(list(files)), sequences, length, seed)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality",
                                     description="Quality of recipes on a Mamba-1 or Mamba-2")
    parser.add_argument("model", type=Path, help="a transformers Mamba-1 or Mamba-2 directory")
    parser.add_argument("--text", action="append", required=True, help="evaluation text; may be repeated")
    parser.add_argument("--calibration", action="append", default=[], help="text (default: each recipe's own)")
    parser.add_argument("--sequences", type=int, default=128)
    parser.add_argument("--seed", type=int, default=0, help="of the calibration windows")
    parser.add_argument("--windows", type=int, default=60)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--recipes", default="", help="packaged recipes, or all")
    parser.add_argument("--ablation", default="", help=f"recipes to take apart, of {', '.join(ABLATIONS)}")
    parser.add_argument("--twins", default="", help=f"kind:seed,... with kind of {', '.join(KINDS)}")
    parser.add_argument("--only-twins", action="store_true", help="leave the original's rows out")
    parser.add_argument("--llamacpp", help="results of benchmarks.peers.llamacpp on the same windows")
    parser.add_argument("--keep", type=Path, help="keep artifacts and twins in this folder")
    parser.add_argument("--out", type=Path, required=True, help="results, JSON; a .md table is written beside")
    options = parser.parse_args(arguments)

    chosen = recipes() if options.recipes == "all" else recipes(tuple(n for n in options.recipes.split(",") if n))
    for name in [n for n in options.ablation.split(",") if n]:
        if name not in ABLATIONS:
            parser.error(f"there is no ablation of {name!r}; known: {', '.join(ABLATIONS)}")
        chosen += ABLATIONS[name]()
    models = ([] if options.only_twins else ["original"]) + [n for n in options.twins.split(",") if n]
    tokenizer = load_tokenizer(options.model)
    texts = {Path(text).name: windows(tokenizer, text, options.length, options.windows) for text in options.text}
    calibration = _calibration(options.model, options.calibration, options.sequences, options.length, options.seed)
    bench = Bench(options.model, texts, calibration)
    done = _finished(options.out)
    rows = [bench.original_row()]
    if options.llamacpp:
        rows += llama_rows(options.llamacpp, bench.base)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.keep or Path(scratch)
        for model_name in models:
            source: Any = None
            for variant in chosen:
                key = bench.key(model_name, variant)
                if key not in done:
                    if source is None:
                        text = options.calibration[0] if options.calibration else None
                        source = source_of(model_name, options.model, text, folder)
                    out = folder / f"{model_name}-{variant.name}".replace(":", "-").replace(" ", "_").replace(",", "")
                    done[key] = bench.row(source, model_name, variant, out) | {"key": key}
                rows.append(done[key])
                print(table(rows[:1] + rows[-1:]).splitlines()[-1], flush=True)
                _write(options.out, rows, options)
    _write(options.out, rows, options)
    print(table(rows))
    print(twin_summary(rows, KINDS))


def discard(artifact: Path) -> None:
    """Remove what an earlier run of this benchmark left at a place: an artifact, or an unfinished one."""
    if (artifact / "mambacompress.json").is_file():
        shutil.rmtree(artifact)
    shutil.rmtree(artifact.with_name(f"{artifact.name}.partial"), ignore_errors=True)


def source_files() -> list[Path]:
    """Every source file and recipe of the installed package, in order."""
    import mambacompress as mc

    folder = Path(mc.__file__).parent
    found = [Path(root) / name for root, _, names in os.walk(folder, followlinks=True) for name in names]
    return sorted(file for file in found if file.suffix in (".py", ".cpp", ".h", ".yaml"))


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _finished(file: Path) -> dict[str, dict[str, Any]]:
    if not file.is_file():
        return {}
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    return {row["key"]: row for row in rows if "key" in row and "error" not in row}


def _write(file: Path, rows: list[dict[str, Any]], options: argparse.Namespace) -> None:
    about = {"model": options.model.name, "windows": options.windows, "length": options.length,
             "calibration": [Path(name).name for name in options.calibration] or "the recipe's own",
             "sequences": options.sequences, "torch": torch.__version__,
             "machine": platform.processor() or platform.machine(), "threads": torch.get_num_threads()}
    file.write_text(json.dumps({**about, "rows": rows}, indent=1), encoding="utf-8")
    file.with_suffix(".md").write_text("\n\n".join([table(rows), twin_summary(rows, KINDS)]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
