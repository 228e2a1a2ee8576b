"""Muon (Jordan 2024, https://kellerjordan.github.io/posts/muon/): a matrix moves along its momentum with singular
values made more equal, so that rare directions are learned as fast as common ones. From scratch the tiny model needs a
third of the steps that it needs with AdamW (experiments/README.md). Why not torch's own: see support/README.md."""

import torch

AT_ONCE = 2**22  # a stack of matrices holds at most so many numbers; a larger matrix goes alone


def orthogonal(stack):  # (N, n, m) -> (N, n, m)
    """Each matrix with singular values from 0.002 of its norm on brought to 0.68 to 1.2, smaller ones times 485. No
    decomposition: five Newton-Schulz steps, each of which makes 3.4445 s - 4.775 s^3 + 2.0315 s^5 of a value s."""
    tall = stack.shape[1] > stack.shape[2]
    x = stack.mT if tall else stack  # so that the product below is the smaller one
    x = x / torch.linalg.matrix_norm(x, keepdim=True).clamp(min=1e-7)  # no singular value is above 1
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), x, beta=3.4445)
    return x.mT if tall else x


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
            moving = [matrix for matrix in group["params"] if group.get("muon") and matrix.grad is not None]
            for shape in {matrix.shape: None for matrix in moving}:
                matrices, many = [m for m in moving if m.shape == shape], max(1, AT_ONCE // shape.numel())
                for start in range(0, len(matrices), many):
                    self.move(matrices[start : start + many], group["lr"], group["weight_decay"])
        return loss

    def move(self, matrices, lr, weight_decay):
        """Change matrices of one shape, and their momentum, in place."""
        for matrix in matrices:
            if not self.state[matrix]:  # torch's loader wants "step", which is not used, and hf/runs.py "exp_avg"
                self.state[matrix] = {"step": torch.zeros(()), "exp_avg": torch.zeros_like(matrix)}
        before = [self.state[matrix]["exp_avg"] for matrix in matrices]
        momentum = [old.lerp(matrix.grad, 0.05) for old, matrix in zip(before, matrices, strict=True)]
        ahead = [matrix.grad.lerp(new, 0.95) for new, matrix in zip(momentum, matrices, strict=True)]  # Nesterov's
        if hasattr(ahead[0], "full_tensor"):  # parts of sharded matrices; the singular values are those of the whole
            from torch.distributed.tensor import DTensor, Replicate

            whole = orthogonal(torch.stack([part.full_tensor() for part in ahead]))  # the same in every process
            mesh, places = ahead[0].device_mesh, ahead[0].placements
            directions = [DTensor.from_local(each, mesh, [Replicate()], run_check=False).redistribute(placements=places)
                          for each in whole]
        else:
            directions = orthogonal(torch.stack(ahead))
        skip = getattr(self, "found_inf", torch.zeros((), device=matrices[0].device)) > 0
        for matrix, old, new, direction in zip(matrices, before, momentum, directions, strict=True):
            after = matrix * (1 - lr * weight_decay) - 0.2 * max(matrix.shape) ** 0.5 * lr * direction
            old.copy_(torch.where(skip, old, new))
            matrix.copy_(torch.where(skip, matrix, after))
