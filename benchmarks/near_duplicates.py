"""Near-duplicates of 100,000 texts: processor seconds, peak memory, and how many planted pairs are found.

    python benchmarks/near_duplicates.py [--rows 100000]

A tenth of the rows are copies with one character changed. Words are drawn by a Zipf law, 5 to 40 a text.
"""

import argparse
import resource
import time

import numpy as np

from ftcore.duplicates import group


def make_texts(count: int, copies: int) -> list[str]:
    """`count` texts; the last `copies` are changed versions of the first."""
    rng = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    words = np.array(["".join(rng.choice(letters, size=n)) for n in rng.integers(2, 10, size=20_000)])
    lengths = rng.integers(5, 41, size=count - copies)
    drawn = words[np.minimum(rng.zipf(1.2, size=lengths.sum()), len(words)) - 1]
    texts = [" ".join(part) for part in np.split(drawn, np.cumsum(lengths)[:-1])]
    for text in texts[:copies]:
        place = int(rng.integers(len(text)))
        texts.append(f"{text[:place]}{rng.choice(letters)}{text[place + 1 :]}")
    return texts


def main() -> None:
    """Measure once: the groups do not depend on chance."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    rows = parser.parse_args().rows
    copies = rows // 10
    texts = make_texts(rows, copies)
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    groups = group(texts)
    seconds, peak = time.process_time() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = np.mean(groups[:copies] == groups[rows - copies :])
    sizes = np.bincount(groups)
    print(
        f"{rows:,} texts, {sum(map(len, texts)) / 1e6:.1f} million characters: {seconds:.1f} processor s,"
        f" {(peak - before) / 1024:.0f} MiB more at the peak"
    )
    print(f"{found:.2%} of {copies:,} changed copies beside their originals; largest group {sizes.max()}")


if __name__ == "__main__":
    main()
