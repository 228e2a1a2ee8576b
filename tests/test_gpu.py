"""What only a GPU can show; skipped without one."""

import sys

import pytest
import torch
from test_train import SMALL, toy_rows

import train as train_script

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device here")


@pytest.mark.parametrize("flags", ["--lam 0", "--lam 2", "--lam 1 --distance infonce", "--layout paper --grad_accum 2"])
def test_a_step_never_waits_for_the_device(tmp_path, monkeypatch, flags):
    """After a step that warms up, no operation of a step may read the device back: torch raises where one does."""
    rows = toy_rows(tmp_path / "rows.jsonl", 32)
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(rows), "--device", "cuda", *SMALL, *flags.split()])
    run = train_script.prepare(train_script.arguments())
    run.total, (run.failures, run.skipped) = 10, torch.zeros(2, device=run.device)
    train_script.take_step(run, run.examples[:8])
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for start in (8, 16, 24):
            taken = train_script.take_step(run, run.examples[start : start + 8])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.isfinite(taken["sums"]).all() and not run.skipped


def test_heads_that_share_keys_run_in_a_fused_kernel():
    """torch raises here where only attention written out, with all its scores in memory, would do."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from model import Config, Decoder

    decoder = Decoder(Config(64, n_layer=1, n_head=4, n_kv_head=2, d_model=256, d_ff=64)).cuda()
    with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION]):
        decoder(torch.ones(2, 16, dtype=torch.long, device="cuda")).sum().backward()


def test_bfloat16_is_the_default_on_a_gpu_that_has_it():
    from support import processes

    device, autocast = processes.hardware("cuda", "auto")
    with autocast():
        found = (torch.ones(8, 8, device=device) @ torch.ones(8, 8, device=device)).dtype
    assert found == (torch.bfloat16 if processes.has_bfloat16(device) else torch.float32)
