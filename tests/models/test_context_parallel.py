"""What NCCL wants of context parallelism and gloo does not; its laws, on several processes, are in test_sharding.py."""

import torch

from transxssm.models.context_parallel import with_dense_gradient


def test_the_gradient_that_is_sent_is_contiguous():
    received = []
    tensor = torch.randn(2, 3, requires_grad=True)
    sent = tensor * 1
    sent.register_hook(received.append)
    with_dense_gradient(sent).sum().backward()  # the gradient of a sum is expanded
    assert [grad.is_contiguous() for grad in received] == [True]
    assert torch.equal(tensor.grad, torch.ones(2, 3))
