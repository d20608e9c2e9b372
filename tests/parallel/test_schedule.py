"""What of a micro-batch reaches the model: by hand."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from parallel import schedule
from parallel.device import Device
from parallel.schedule import MicroBatch, mtp_loss_mask


def test_mtp_counts_where_the_next_two_tokens_are_of_the_same_document() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 2, 3, 3, 3, 3]])
    ends = torch.tensor([[0, 0, 1, 0, 1, 1, 0, 0, 0, 0]])
    mask = 1.0 - ends.float()  # the last document goes on after the window
    rolled = mtp_loss_mask(mask, documents).roll(-1, dims=1)
    rolled[:, -1] = 0.0  # what megatron does with it
    # by position: only 0 (1 and 2 follow), 6 and 7; of 8 the token after the next is the label of 9
    assert rolled.tolist() == [[1, 0, 0, 0, 0, 0, 1, 1, 1, 0]]
    once = mask.roll(-1, dims=1)
    once[:, -1] = 0.0
    # megatron alone would ask the last token of documents 0 and 2 for the second of the next
    assert once.tolist() == [[1, 0, 1, 0, 0, 1, 1, 1, 1, 0]]


def test_mtp_does_not_rely_on_the_caller_to_leave_out_the_last_label() -> None:
    documents = torch.tensor([[0, 0, 0, 1, 1, 1]])
    given = mtp_loss_mask(torch.ones(1, 6), documents)
    assert given.tolist() == [[1, 1, 0, 0, 1, 1]]


def test_without_documents_mtp_takes_the_mask_as_it_is() -> None:
    mask = torch.rand(2, 5)
    assert mtp_loss_mask(mask, None) is mask


def test_documents_are_refused_where_attention_would_not_hear_of_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    monkeypatch.setattr(schedule, "prepare", lambda: Device(kind="cuda", backend="nccl"))

    def batches() -> Iterator[MicroBatch]:
        whole = torch.zeros(1, 4, dtype=torch.int64)
        yield MicroBatch(
            tokens=whole,
            labels=whole,
            loss_mask=whole.float(),
            domain_idx=whole[0, :1],
            documents=whole.int(),
        )

    def never(*_: object, **__: object) -> Tensor:
        raise AssertionError("the model was called")

    with pytest.raises(ValueError, match=r"set data\.document_attention=false"):
        schedule._forward_step(batches(), never, read_loss=lambda _, loss: loss)  # type: ignore[arg-type]  no module is needed
