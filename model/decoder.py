"""The light decoder of the masked autoencoder (paper section 3.1): used in pretraining, then thrown away."""

# B samples, N patches, K kept patches, D width, E decoder width, V values per patch

from __future__ import annotations

import torch
from torch import Tensor, nn

from model.constants import kept
from model.layers import EncoderLayer


class Decoder(nn.Module):
    """Predicts every patch of both sensors from the encodings of the visible ones."""

    def __init__(self, width: int, decoder_width: int, depth: int, heads: int, values: int) -> None:
        super().__init__()
        self.embedding = nn.Linear(width, decoder_width)
        self.mask_token = nn.Parameter(torch.empty(decoder_width))
        self.layers = nn.ModuleList(EncoderLayer(decoder_width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(decoder_width)
        self.prediction = nn.Linear(decoder_width, values)

    def forward(self, encodings: Tensor, kept: Tensor, rows: int, columns: int) -> Tensor:
        """Encodings (B, K, D) of the patches kept (B, K) of a rows x columns grid -> predictions (B, N, V)."""
        visible = self.embedding(encodings)
        tokens = self.mask_token.to(visible.dtype).expand(visible.shape[0], rows * columns, -1)
        tokens = tokens.scatter(1, kept[..., None].expand_as(visible), visible)
        positions = sine_cosine_positions(rows, columns, visible.shape[-1], visible.device)
        # In the weights' own type, as in the encoders: float32 under autocast.
        tokens = tokens + positions.to(self.mask_token.dtype)
        for layer in self.layers:
            tokens = layer(tokens, None)
        predicted: Tensor = self.prediction(self.norm(tokens))
        return predicted


@kept
def sine_cosine_positions(rows: int, columns: int, width: int, device: torch.device) -> Tensor:
    """(N, width) float32, fixed: the first half of the width encodes the patch's column, the second its row.

    Each half holds sines, then cosines, of the coordinate times 10000^(-k / (width / 4)).
    """
    quarter = width // 4
    frequencies = 10000.0 ** (-torch.arange(quarter, dtype=torch.float64, device=device) / quarter)
    sides = (torch.arange(side, dtype=torch.float64, device=device) for side in (rows, columns))
    row, column = torch.meshgrid(*sides, indexing="ij")
    angles = [coordinate.reshape(-1, 1) * frequencies for coordinate in (column, row)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()
