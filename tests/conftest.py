"""Toy decoders and examples that the tests share. Every parameter is random, norms and biases too."""

import gc
import os
import signal

import pytest
import torch
from matplotlib.figure import Figure

from data import Example
from model import Config, Decoder, RMSNorm
from support.rms_norm import rms_norm

RMSNorm.formula = staticmethod(rms_norm)  # as in train.py and eval.py
torch.set_num_threads(1)  # here, and in what tests start: the number of threads decides the last bits of a sum, and
os.environ["OMP_NUM_THREADS"] = "1"  # two tests run at a time, on two cores
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs, and their children, ignore it

STYLES = {
    "llama": dict(n_kv_head=2, tied=False),
    "gpt2": dict(position="learned", norm="layer", activation="gelu_tanh", gated=False, qkv_bias=True, out_bias=True,
                 mlp_bias=True),
}


def toy_decoder(style, vocab_size=50, seed=0, **changes):
    """Two layers, width 32, all parameters drawn at random."""
    torch.manual_seed(seed)
    config = Config(vocab_size, n_layer=2, n_head=4, d_model=32, d_ff=48, block_size=64, **STYLES[style] | changes)
    decoder = Decoder(config)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(0.3 * torch.randn(parameter.shape) + (1.0 if parameter.dim() == 1 else 0.0))
    return decoder


def pytest_collection_modifyitems(items):
    """test_gpu.py comes last: a process that has used CUDA cannot use it after a fork, and test_kills.py forks."""
    items.sort(key=lambda item: item.path.name == "test_gpu.py")


def pytest_collection_finish():
    """Tests that collect garbage, to see processes end, need not go through what the imports have left each time."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="module")
def on_cpus(request):
    """What runs inside this process computes where the processes do that tests start. test_gpu.py alone sees a GPU."""
    with pytest.MonkeyPatch.context() as patch:
        if request.module.__name__ != "test_gpu":
            patch.setattr(torch.cuda, "is_available", lambda: False)
        yield


@pytest.fixture(autouse=True)
def rough(monkeypatch):
    """Pictures are drawn small, and nobody looks where the legend goes: that is three times as quick."""
    savefig = Figure.savefig

    def quick(self, path, metadata, **options):
        self.set_layout_engine("none")
        savefig(self, path, format="png", dpi=20, metadata=metadata)

    monkeypatch.setattr(Figure, "savefig", quick)


@pytest.fixture(params=STYLES)
def decoder(request):
    return toy_decoder(request.param)


@pytest.fixture
def examples():
    """Four examples of different lengths with random ids below 50; the text of the paper layout is TEXT itself."""
    torch.manual_seed(1)
    made = []
    for text, answer in ((5, 4), (9, 2), (3, 7), (7, 3)):
        ids = torch.randint(1, 50, (text + 1 + answer,)).tolist()  # TEXT, one header id, answer and stop
        trained = [False] * (text + 1) + [True] * answer
        code = ids[text:-1]  # header and answer, without the stop token
        made.append(Example(ids, trained, text, text=ids[:text], code=code, text_start=1, answer_start=text + 1))
    return made
