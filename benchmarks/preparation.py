"""How fast rows become examples, and in how much memory: one process, one core, by processor time.

    python benchmarks/preparation.py --tokenizer DIRECTORY --files ../shared/conversations/sgd/sgd_test.messages.jsonl
    python benchmarks/preparation.py --tokenizer DIRECTORY --rows 10000 100000 1000000

`--files` prepares real conversations, `--rows` as many generated ones (three rounds, a system prompt, about 1 kB). Each
measurement has a process of its own. `tokenizer MB/s` is what the tokenizer alone does with the same messages, each
text once, in the same process. Preparation is faster than it where words and texts repeat.
"""

from __future__ import annotations

import argparse
import datetime
import json
import random
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any

SYLLABLES = ("ba", "co", "de", "fi", "gu", "ha", "in", "jo", "ka", "le", "mi", "no", "or", "pe", "qua", "ri", "tu")


def main() -> None:
    """Measure each set of rows in a process of its own, and print the table."""
    options = _options()
    if options.one:
        print(json.dumps(measure(Path(options.one), Path(options.tokenizer))))
        return
    lines = []
    with tempfile.TemporaryDirectory() as place:
        for path in chain(map(Path, options.files), _generated(options.rows, Path(place))):
            arguments = [sys.executable, __file__, "--tokenizer", options.tokenizer, "--one", str(path)]
            lines.append(json.loads(subprocess.run(arguments, check=True, capture_output=True, text=True).stdout))
            print(_line(lines[-1]), flush=True)
    if options.json:
        Path(options.json).write_text(json.dumps(lines, indent=1), encoding="utf-8")


def measure(path: Path, tokenizer: Path) -> dict[str, Any]:
    """Prepare the rows of a file in this process, and tokenize their messages once for comparison."""
    from schoolhouse.config import Data, Source
    from schoolhouse.data import prepare, served
    from schoolhouse.data.choose import Choice

    serving = served.Serving(tokenizer, None, "{}", (), datetime.date(2026, 1, 1))
    model, source = served.load(serving), Source(path=str(path))
    with tempfile.TemporaryDirectory() as cache:
        data = Data(train=(source,), workers=1, cache=cache)
        before, began = _memory(), time.process_time()
        store = prepare.prepare(data, Choice((source,)), serving, served.Rules("every", 1_000_000, "error"))
        seconds, peak = time.process_time() - began, _memory()
        rows, tokens = store.ledger.rows, store.ledger.tokens
    texts = list(_texts(path, 20_000))
    began = time.process_time()
    model.tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    alone = time.process_time() - began
    size = path.stat().st_size
    return {
        "rows": rows, "file": path.name, "megabytes": size / 1e6, "seconds": seconds, "mb_per_s": size / 1e6 / seconds,
        "tokens": tokens, "us_per_row": 1e6 * seconds / rows, "peak_mib": peak, "grown_mib": peak - before,
        "tokenizer_mb_per_s": sum(len(text.encode()) for text in texts) / 1e6 / alone,
    }


def _line(found: dict[str, Any]) -> str:
    return (
        f"{found['rows']:>9,} rows {found['megabytes']:8.1f} MB {found['seconds']:8.1f} s"
        f" {found['us_per_row']:6.0f} µs/row"
        f" {found['mb_per_s']:5.2f} MB/s (tokenizer {found['tokenizer_mb_per_s']:.2f} MB/s)"
        f" peak {found['peak_mib']:,.0f} MiB, grown {found['grown_mib']:,.0f}  {found['file']}"
    )


def _texts(path: Path, most: int) -> Iterator[str]:
    """The distinct texts of the first messages of a file."""
    text = path.read_text(encoding="utf-8")
    rows = json.loads(text) if path.suffix == ".json" else map(json.loads, text.splitlines()[:most])
    seen: dict[str, None] = {}
    for row in rows:
        for message in row.get("messages") or row.get("conversations") or []:
            seen[message.get("content") or message.get("value") or ""] = None
        seen |= {row[name]: None for name in ("question", "answer") if name in row}
        tools = row.get("tools") or ""
        seen[tools if isinstance(tools, str) else json.dumps(tools, ensure_ascii=False)] = None
    return iter(list(seen)[:most])


def _generated(counts: list[int], place: Path) -> Iterator[Path]:
    """Files with so many generated conversations; a longer one begins with the shorter one's."""
    for count in counts:
        path, chance = place / f"generated-{count}.jsonl", random.Random(0)
        with path.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps({"messages": _conversation(chance)}) + "\n" for _ in range(count))
        yield path
        path.unlink()


def _conversation(chance: random.Random) -> list[dict[str, str]]:
    said = [{"role": "system", "content": "You are a helpful assistant."}]
    for _ in range(3):
        said.append({"role": "user", "content": _sentence(chance, 12)})
        said.append({"role": "assistant", "content": _sentence(chance, 30)})
    return said


def _sentence(chance: random.Random, length: int) -> str:
    words = ("".join(chance.choices(SYLLABLES, k=chance.randint(1, 3))) for _ in range(length))
    return " ".join(words).capitalize() + chance.choice(".?!")


def _memory() -> float:
    """The most memory this process has held, in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--tokenizer", required=True, help="a directory with tokenizer files and a chat template")
    parser.add_argument("--files", nargs="*", default=[], help="files of conversations")
    parser.add_argument("--rows", nargs="*", type=int, default=[], help="numbers of generated rows")
    parser.add_argument("--json", help="write the figures to this file")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    return parser.parse_args()


if __name__ == "__main__":
    main()
