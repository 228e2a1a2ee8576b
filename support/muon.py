"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/): a matrix moves along its momentum with singular
values made more equal, so that rare directions are learned as fast as common ones. From scratch the tiny model needs a
third of the steps that it needs with AdamW (experiments/README.md). Why not torch's own: see support/README.md."""

import torch


def orthogonal(matrix):  # (n, m) -> (n, m)
    """The matrix with singular values from 0.002 of its norm on brought to 0.68 to 1.2, smaller ones times 485. No
    decomposition: five Newton-Schulz steps, each of which makes 3.4445 s - 4.775 s^3 + 2.0315 s^5 of a value s."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # so that the product below is the smaller one
    x = x / x.norm().clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class Muon(torch.optim.AdamW):
    """AdamW, except that groups with "muon": True, which hold only matrices, go by Muon, its updates scaled to the size
    of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2): both share a learning rate and a weight decay. With
    fused=True, `found_inf` = 1 (the gradient is not finite) changes nothing."""

    @torch.no_grad()
    def step(self, closure=None):
        groups = self.param_groups
        self.param_groups = [group for group in groups if not group.get("muon")]
        loss = super().step(closure)
        self.param_groups = groups
        for group in groups:
            for matrix in group["params"] if group.get("muon") else ():
                if matrix.grad is not None:
                    self.move(matrix, group["lr"], group["weight_decay"])
        return loss

    def move(self, matrix, lr, weight_decay):
        """Change a matrix and its momentum in place."""
        if not self.state[matrix]:  # torch's loader wants "step", which is not used, and hf/runs.py "exp_avg"
            self.state[matrix] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(matrix)}
        before = self.state[matrix]["exp_avg"]
        momentum = before.lerp(matrix.grad, 0.05)
        ahead = matrix.grad.lerp(momentum, 0.95)  # Nesterov's
        if hasattr(ahead, "full_tensor"):  # a part of a sharded matrix; the singular values are those of the whole
            from torch.distributed.tensor import DTensor, Replicate

            whole = orthogonal(ahead.full_tensor())  # in every process: so each keeps its part, and nothing is sent
            whole = DTensor.from_local(whole, ahead.device_mesh, [Replicate()], run_check=False)
            direction = whole.redistribute(placements=ahead.placements)
        else:
            direction = orthogonal(ahead)
        after = matrix * (1 - lr * weight_decay) - 0.2 * max(matrix.shape) ** 0.5 * lr * direction
        skip = getattr(self, "found_inf", torch.zeros((), device=matrix.device)) > 0
        before.copy_(torch.where(skip, before, momentum))
        matrix.copy_(torch.where(skip, matrix, after))
