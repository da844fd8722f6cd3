"""Small networks that read tokens. B rows, T tokens of a row, C classes, W width of an embedding."""

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from actors.config.networks import TextCnn, TextMlp, TextRnn


class TextMlpNetwork(nn.Module):
    """The mean of a row's embeddings, a hidden layer, and the classes."""

    def __init__(self, shape: TextMlp, vocab_size: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, shape.width)
        self.hidden = nn.Linear(shape.width, shape.hidden)
        self.dropout = nn.Dropout(shape.dropout)
        self.output = nn.Linear(shape.hidden, classes)

    def forward(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, C] of token ids [B, T], of which those count whose mask [B, T] is 1."""
        mean = mean_over_tokens(self.embedding(token_ids), attention_mask)
        return self.output(self.dropout(self.hidden(mean).relu()))


class TextCnnNetwork(nn.Module):
    """Filters of several widths over a row's embeddings, and the largest response of each."""

    def __init__(self, shape: TextCnn, vocab_size: int, classes: int) -> None:
        super().__init__()
        self.kernels = shape.kernels
        self.embedding = nn.Embedding(vocab_size, shape.width)
        self.filters = nn.ModuleList(
            nn.Conv1d(shape.width, shape.filters, kernel, padding=kernel - 1) for kernel in shape.kernels
        )
        self.dropout = nn.Dropout(shape.dropout)
        self.output = nn.Linear(shape.filters * len(shape.kernels), classes)

    def forward(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, C] of token ids [B, T], of which those count whose mask [B, T] is 1."""
        embedded = (self.embedding(token_ids) * attention_mask[:, :, None]).transpose(1, 2)  # [B, W, T]
        last = attention_mask.sum(dim=1)  # rows are padded on the right
        responses = []
        for kernel, filters in zip(self.kernels, self.filters, strict=True):
            found = filters(embedded).relu()  # [B, F, T + kernel - 1], at 0 the filter ends in the first token
            reach = torch.arange(found.shape[2], device=found.device) < (last + kernel - 1)[:, None]
            responses.append(found.masked_fill(~reach[:, None], 0.0).amax(dim=2))
        return self.output(self.dropout(torch.cat(responses, dim=1)))


class TextRnnNetwork(nn.Module):
    """A bidirectional GRU over a row's embeddings, and the mean of its states."""

    def __init__(self, shape: TextRnn, vocab_size: int, classes: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, shape.width)
        self.states = nn.GRU(shape.width, shape.hidden, batch_first=True, bidirectional=True)
        self.dropout = nn.Dropout(shape.dropout)
        self.output = nn.Linear(2 * shape.hidden, classes)

    def forward(self, token_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Return logits [B, C] of token ids [B, T], of which those count whose mask [B, T] is 1."""
        lengths = attention_mask.sum(dim=1).clamp(min=1).cpu()
        packed = pack_padded_sequence(self.embedding(token_ids), lengths, batch_first=True, enforce_sorted=False)
        states, _ = pad_packed_sequence(self.states(packed)[0], batch_first=True, total_length=token_ids.shape[1])
        return self.output(self.dropout(mean_over_tokens(states, attention_mask)))


def mean_over_tokens(states: Tensor, attention_mask: Tensor) -> Tensor:
    """Return the mean [B, W] of the states [B, T, W] of tokens whose mask [B, T] is 1; zeros for a row without any."""
    mask = attention_mask[:, :, None].to(states.dtype)
    return (states * mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1.0)
