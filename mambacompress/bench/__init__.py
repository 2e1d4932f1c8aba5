"""Speed, side by side: a model's own figures and its rivals', from rounds that take turns in one run.

Machines are shared and noisy, so a rate alone says little. Every contestant lives in a worker process of its own
(``worker``), loaded once, with the thread settings of its runtime; only one works at a time. A *round* lets each of
them do the same thing once (``race``): the ratio to the reference is taken within a round, and the medians and
quartiles of those ratios are what is reported (``summary``). Before any timing all contestants read the same short
prompts, and whoever does not compute the model's function is out.

    bench(models, baseline, peers, threads) -> Result        Result.markdown(), Result.save(file)

``line_up`` says who takes part, ``ours``, ``stock`` (transformers), ``llamacpp`` and ``openvino_graph`` how each runs.
Importing this loads neither torch nor a peer.
"""

from mambacompress.bench.line_up import PEERS, bench
from mambacompress.bench.race import Settings
from mambacompress.bench.summary import Result

__all__ = ["PEERS", "Result", "Settings", "bench"]
