"""How does a checkpoint continue a text?

One process reads the weights of any layout; MTP is left out. Every token runs the whole window
again: right for looking at small models, slow for large ones (the latent cache is another issue).
"""

import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.distributed import FileStore  # pyright: ignore[reportPrivateImportUsage]  public

from parallel import groups
from parallel.layout import Layout
from pretrain.checkpoint.sharded import load_weights
from pretrain.serving.request import Sampling
from pretrain.serving.sampling import sample_token
from pretrain.serving.scorer import build_for_reading
from pretrain.serving.trained import TrainedModel


class Decoder:
    """A model on one process, ready to continue token sequences."""

    def __init__(self, trained: TrainedModel, checkpoint: Path) -> None:
        """Read the weights.

        Args:
            trained: the checkpoint's model.
            checkpoint: a verified checkpoint folder.

        Raises:
            CheckpointError: if the checkpoint is not of this model.
        """
        with tempfile.TemporaryDirectory() as folder:  # groups are made through the store, too
            store = FileStore(str(Path(folder) / "store"), 1)
            device = groups.join_world(store=store, rank=0, num_ranks=1)
            [self._model] = build_for_reading(trained, layout=Layout(), device=device)
        self._device = device.current()
        self._window_tokens = trained.sequence_tokens
        load_weights(checkpoint, chunks=[self._model])

    @torch.no_grad()
    def continue_ids(
        self, prompt: Sequence[int], *, max_new_tokens: int, sampling: Sampling, stop_id: int
    ) -> Iterator[int]:
        """Yield new token ids, one by one, until `stop_id` (not yielded) or `max_new_tokens`.

        Args:
            prompt: at least one id; the last window's worth is read.
            max_new_tokens: 1 or more.
            sampling: how each token is drawn.
            stop_id: end of document.
        """
        generator = torch.Generator().manual_seed(sampling.seed)
        ids = list(prompt)
        for _ in range(max_new_tokens):
            window = torch.tensor([ids[-self._window_tokens :]], device=self._device)
            positions = torch.arange(window.shape[1], device=self._device)[None]
            logits_V = self._model(window, positions, None)[0, -1].float().cpu()
            token = sample_token(logits_V, sampling=sampling, generator=generator)
            if token == stop_id:
                return
            ids.append(token)
            yield token
