"""How does a prompt become printed text?"""

from collections.abc import Callable
from pathlib import Path

from data.tokenizer.codec import Codec
from pretrain.checkpoint.manifest import Manifest
from pretrain.serving.decoder import Decoder
from pretrain.serving.request import Generation
from pretrain.serving.trained import TrainedModel, find_tokenizer


def generate(
    generation: Generation,
    *,
    trained: TrainedModel,
    folder: Path,
    manifest: Manifest,
    write: Callable[[str], object],
) -> None:
    """Write the prompt and its continuation, piece by piece.

    Args:
        generation: what to continue.
        trained: the checkpoint's model.
        folder: the checkpoint, verified.
        manifest: its manifest.
        write: takes pieces of text.

    Raises:
        CheckpointError: if the tokenizer is gone or not the checkpoint's.
    """
    codec = Codec(find_tokenizer(folder, manifest, trained))
    prompt = [int(token) for token in codec.encode(generation.text)] or [codec.eod_id]
    write(generation.text)
    ids: list[int] = []
    shown = 0
    decoder = Decoder(trained, folder)
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
