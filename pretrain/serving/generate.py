"""How does a prompt become printed text?"""

from collections.abc import Callable
from pathlib import Path

from data.tokenizer.codec import Codec
from pretrain.checkpoint.manifest import CheckpointError, Manifest
from pretrain.serving.decoder import Decoder
from pretrain.serving.request import Generation
from pretrain.training.run import Run


def generate(
    generation: Generation,
    *,
    run: Run,
    folder: Path,
    manifest: Manifest,
    write: Callable[[str], object],
) -> None:
    """Write the prompt and its continuation, piece by piece.

    Args:
        generation: what to continue.
        run: the configuration of the checkpoint.
        folder: the checkpoint, verified.
        manifest: its manifest.
        write: takes pieces of text.

    Raises:
        CheckpointError: if the corpus's tokenizer is gone or not the checkpoint's.
    """
    path = run.data.corpus / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(
            f"{folder} needs the tokenizer {path}, which is not there: prepare the corpus again"
        )
    codec = Codec(path)
    if codec.digest != manifest.tokenizer_digest:
        raise CheckpointError(
            f"{path} is not the tokenizer of {folder}: SHA-256 {codec.digest[:12]} given,"
            f" {manifest.tokenizer_digest[:12]} was trained with"
        )
    prompt = [int(token) for token in codec.encode(generation.text)] or [codec.eod_id]
    write(generation.text)
    ids: list[int] = []
    shown = 0
    decoder = Decoder(run, folder)
    for token in decoder.continue_ids(
        prompt,
        max_new_tokens=generation.max_new_tokens,
        sampling=generation.sampling,
        stop_id=codec.eod_id,
    ):
        ids.append(token)
        text = codec.decode(ids)
        if not text.endswith("\ufffd"):  # a character may need several tokens
            write(text[shown:])
            shown = len(text)
    write(codec.decode(ids)[shown:] + "\n")
