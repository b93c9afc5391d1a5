"""Fixtures of all tests: a small corpus with its tokenizer, and the folders of real data.

They import the package, not this module: a process that only hands out tests needs none of it.
"""

import gc
import logging
import os
import signal
import threading
from pathlib import Path

import pytest
from tqdm import tqdm

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests and their ranks run side by side
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # DataLoader workers are forked

# Ctrl-C is tested; a shell that starts pytest in the background has it ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)

TINY = {
    "vocab_size": 900,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "max_position_embeddings": 128,
}


@pytest.fixture(autouse=True)
def quiet(monkeypatch, tmp_path_factory):
    """Small networks are fastest on one thread; the cache of the user stays as it is."""
    import torch

    torch.set_num_threads(1)
    # Lightning keeps its lines from `caplog` unless pytest was listening when it was imported.
    logging.getLogger("lightning.pytorch").propagate = True
    monkeypatch.setenv("XDG_CACHE_HOME", str(_shared(tmp_path_factory) / "xdg"))


@pytest.fixture
def short_grace(monkeypatch):
    """Ranks that lose a connection report it soon, in tests where another one fails at once."""
    from lightning_ipu_bert.strategies.distributed.launch import failure

    monkeypatch.setattr(failure, "GRACE_SECONDS", 1.0)


@pytest.fixture(scope="session")
def cache_dir(tmp_path_factory):
    """A cache that the tests share.

    Its quickstart corpus has 1,500 passages: reading all takes longer than most runs of the tests.
    """
    from lightning_ipu_bert.data.quickstart.folder import folder_name, write_quickstart
    from lightning_ipu_bert.files import built_once

    cache = _shared(tmp_path_factory) / "cache"
    built_once(cache / folder_name(), lambda path: write_quickstart(path, training_passages=1500))
    return str(cache)


@pytest.fixture(scope="session")
def quickstart(cache_dir):
    """The generated corpus: train.json, validation.json and tokenizer/."""
    from lightning_ipu_bert.data.quickstart.folder import folder_name

    return Path(cache_dir) / folder_name()


def _shared(tmp_path_factory):
    """A folder that all workers of pytest-xdist share."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base


@pytest.fixture
def make_data(quickstart, cache_dir):
    """Make data modules on the corpus."""
    from lightning_ipu_bert import SquadDataModule

    def make(**changes):
        options = {
            "train_file": str(quickstart / "train.json"),
            "validation_file": str(quickstart / "validation.json"),
            "tokenizer_name_or_path": str(quickstart / "tokenizer"),
            "max_length": 128,
            "doc_stride": 32,
            "micro_batch_size": 4,
            "cache_dir": cache_dir,
        }
        return SquadDataModule(**{**options, **changes})

    return make


@pytest.fixture
def make_module(quickstart):
    """Make modules of a tiny BERT with random weights."""
    from lightning_ipu_bert import BertForQuestionAnsweringModule

    def make(dropout=0.1, config_changes=(), **changes):
        config = {**TINY, "hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config.update(config_changes)
        return BertForQuestionAnsweringModule(config=config, **changes)

    return make


def _folder(variable):
    if not os.environ.get(variable):
        pytest.skip(f"{variable} is not set: it names a folder with real data")
    return Path(os.environ[variable])


@pytest.fixture(scope="session")
def squad_dir():
    """Real SQuAD files: train.json and validation.json."""
    return _folder("SQUAD_DIR")


@pytest.fixture(scope="session")
def bert_dir():
    """A real pretrained BERT, stored in float16."""
    return _folder("BERT_WEIGHTS_DIR")


def pytest_configure(config):
    """Import Lightning; begin files in the order of the items, not with those of most tests."""
    if config.getoption("dist", "no") == "no":  # not in a process that only hands out tests
        # Before pytest listens to logs, or Lightning would print none, also not in forks.
        import lightning.pytorch  # noqa: F401
    # Locks of progress bars are shared with forks, which tests kill: one that is killed while it
    # holds the lock would block this process.
    tqdm.set_lock(threading.RLock())
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    """Begin with the longest test, beside which all others can run."""
    # What was imported stays: full collections, which tests ask for, need not look at it.
    gc.freeze()
    items.sort(key=lambda item: "quickstart_learns" not in item.name)
