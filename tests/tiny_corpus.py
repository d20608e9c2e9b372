"""A corpus of two domains, sentences and programs, drawn from a seed.

Nothing of it is our own text: an edit of the code must not move a loss curve.
"""

import random
from pathlib import Path

from data.corpus.prepare import prepare
from data.corpus.prepare_config import PrepareConfig
from data.corpus.sources import SourceConfig

SUBJECTS = ["The rank", "A gradient", "Every expert", "One token", "The router", "This layer"]
VERBS = ["waits for", "sends", "counts", "adds up", "forgets", "divides"]
OBJECTS = ["windows of text", "bytes on the wire", "weights of a matrix", "steps of the run"]


def _program(draw: random.Random) -> str:
    """Return some functions of no meaning."""
    names = ["rank", "tokens", "weight", "expert", "layer", "scale", "window", "offset"]
    lines: list[str] = []
    for _ in range(12):
        first, second = draw.sample(names, 2)
        lines += [
            f"def {draw.choice(['count', 'find', 'merge'])}_{first}({first}, {second}=None):",
            f'    """Return {first} {draw.choice(["of", "beside", "without"])} {second}."""',
            f"    for {second}_idx in range({draw.randrange(2, 64)}):",
            f"        {first} = {first} {draw.choice('+-*')} {draw.randrange(1000)}",
            f"    return {first} if {second} is None else {second}",
            "",
        ]
    return "\n".join(lines)


def _noise(draw: random.Random) -> str:
    """Return letters and signs at random, as a broken scan has them."""
    signs = [chr(number) for number in range(33, 127)]
    return "".join(draw.choice(signs) for _ in range(150))


def write_corpus(folder: Path, *, num_noisy: int = 0, tokenizer: Path | None = None) -> Path:
    """Write texts below `folder` and prepare them; return the corpus.

    Windows of 64 and of 128 tokens, a vocabulary of 512.

    Args:
        folder: empty.
        num_noisy: documents of random signs behind the 120 of `sentences`, a row of their own.
        tokenizer: of another corpus; None: a new one is trained.
    """
    draw = random.Random(2)
    texts, code, corpus = (folder / name for name in ("texts", "code", "corpus"))
    texts.mkdir(parents=True)
    code.mkdir()
    for number in range(120):
        sentences = [
            f"{draw.choice(SUBJECTS)} {draw.choice(VERBS)} {draw.randrange(1000)} "
            f"{draw.choice(OBJECTS)}."
            for _ in range(40)
        ]
        (texts / f"{number:03d}.txt").write_text(" ".join(sentences), encoding="utf-8")
    noise = random.Random(5)  # of its own: the other texts are the same without it
    for number in range(120, 120 + num_noisy):
        (texts / f"{number:03d}.txt").write_text(_noise(noise), encoding="utf-8")
    for number in range(120):
        (code / f"{number:03d}.py").write_text(_program(draw), encoding="utf-8")
    sources = {
        "sentences": SourceConfig(kind="text_folder", path=str(texts)),
        "code": SourceConfig(kind="text_folder", path=str(code), glob="**/*.py", domain="code"),
    }
    config = PrepareConfig(
        output=str(corpus),
        sources=sources,
        vocab_size=512,
        tokenizer=None if tokenizer is None else str(tokenizer),
        validation_fraction=0.2,
        window_tokens={"64": 0.8, "128": 0.2},
        validation_window_tokens=64,
    )
    prepare(config, progress=lambda *_: None)
    return corpus
