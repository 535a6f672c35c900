"""CPU seconds of features of texts that stand in many pairs: each place read, each text read, nothing read.

    python benchmarks/text_features.py            # 1,500 texts in 33,000 places, an encoder of MiniLM's size
    python benchmarks/text_features.py --quick    # a tenth of it; measured and not judged

An encoder of 6 layers, 384 wide, with random weights; texts of 8 to 56 words. ``every place`` is what
``diagnose`` did before: the texts of all pairs, sorted by length, 256 at once. ``first run`` is what it does
now, its cache empty, ``second run`` again with what the first one left; from the pairs to the differences of
their features, tokens included. Each is a process of its own with one thread.
Bars, or the exit status is 1: the first run takes at most 1/15 of every place's CPU seconds, and reads no
more rows than there are texts; the second reads none; the differences of all are alike but for rounding.
"""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from facts import CONTESTANTS, facts, peak_of, results_file, write

SHARE = 1 / 15
WAYS = ("every place", "first run", "second run")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", type=int, default=1500)
    parser.add_argument("--pairs", type=int, default=16_500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="a tenth of it; measured and not judged")
    parser.add_argument("--output", type=Path, help="JSON file; results/PROCESSOR/text_features.json")
    given = parser.parse_args()
    if given.quick:
        given.texts, given.pairs = 150, 1650
    results = {}
    with tempfile.TemporaryDirectory() as name:
        for way in WAYS:
            command = [str(CONTESTANTS / "text_features.py"), way, name, str(given.texts), str(given.pairs)]
            peak, output = peak_of(command, threads=given.threads)
            results[way] = json.loads(output.splitlines()[-1]) | {"peak_bytes": peak}
            print(
                "{:<12}{cpu_seconds:8.1f} s of CPU, {rows:,} rows read, of {tokens:,} tokens".format(
                    way, **results[way]
                ),
                flush=True,
            )
    every, first, second = (results[way] for way in WAYS)
    bars = {
        "first run over every place, CPU seconds": (first["cpu_seconds"] / every["cpu_seconds"], SHARE),
        "rows that the first run reads, a text": (first["rows"] / given.texts, 1.0),
        "rows that the second run reads": (second["rows"], 0),
        "largest difference over the largest value": (first["distance"], 1e-5),
        "of the second run": (second["distance"], 1e-5),
    }
    for text, (value, bar) in bars.items():
        print(f"{text}: {value:.3g}, at most {bar:.3g}{'' if value <= bar else ': missed'}")
    if given.quick and given.output is None:
        return 0
    result = {
        "environment": facts("tokenizers", "safetensors", threads=given.threads),
        "settings": {"texts": given.texts, "pairs": given.pairs, "places": 2 * given.pairs},
        "results": results,
        "bars": {
            text: {"value": value, "bar": bar, "holds": value <= bar} for text, (value, bar) in bars.items()
        },
    }
    write(given.output or results_file("text_features.json"), result)
    return 0 if given.quick else int(any(value > bar for value, bar in bars.values()))


if __name__ == "__main__":
    sys.exit(main())
