"""The normalisation of the model's layers, and of heads and states where an option asks for it."""

from torch import Tensor, nn

from transxssm.ops import rms_norm


class TransXSSMRMSNorm(nn.RMSNorm):
    """Root-mean-square normalisation; the name tells transformers how to initialise it."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__(hidden_size, eps=eps)
        self.variance_epsilon = eps

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.weight, self.variance_epsilon)
