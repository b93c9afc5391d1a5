import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import pytest
from tqdm import tqdm
from transformers import AutoTokenizer

from lightning_ipu_bert.data import feature_cache
from lightning_ipu_bert.data.feature_cache import cache_key, cached_features
from lightning_ipu_bert.data.formats import read_files
from lightning_ipu_bert.data.questions import Answer, Question, QuestionSet
from lightning_ipu_bert.data.records import Rules
from lightning_ipu_bert.data.settings import Windowing

WINDOWING = Windowing(64, 16)


@pytest.fixture
def tokenizer(quickstart):
    return AutoTokenizer.from_pretrained(str(quickstart / "tokenizer"))


@pytest.fixture
def question_set(quickstart):
    return read_files([str(quickstart / "validation.json")], Rules())


def small(passage="Ada was here.", text="Who?", start=0):
    return QuestionSet([passage], [Question("1", text, 0, (Answer("Ada", start),))])


def test_the_second_run_builds_nothing(question_set, tokenizer, tmp_path, monkeypatch):
    first = cached_features(question_set, tokenizer, WINDOWING, tmp_path)
    monkeypatch.setattr(feature_cache, "build_dataset", None)
    second = cached_features(question_set, tokenizer, WINDOWING, tmp_path)
    assert first.to_dict() == second.to_dict()


def test_the_key_changes_with_whatever_shapes_a_feature(quickstart, tokenizer, monkeypatch):
    other = AutoTokenizer.from_pretrained(str(quickstart / "tokenizer"))
    other.add_tokens(["ada"])
    keys = [
        cache_key(small(), tokenizer, WINDOWING),
        cache_key(small(passage="Ada was there."), tokenizer, WINDOWING),
        cache_key(small(text="Who was it?"), tokenizer, WINDOWING),
        cache_key(small(start=1), tokenizer, WINDOWING),
        cache_key(small(), other, WINDOWING),
        cache_key(small(), tokenizer, Windowing(65, 16)),
        cache_key(small(), tokenizer, Windowing(64, 17)),
    ]
    monkeypatch.setattr(feature_cache.features, "__file__", __file__)
    keys.append(cache_key(small(), tokenizer, WINDOWING))
    assert len(set(keys)) == len(keys)


def build_in_process(quickstart, cache, slow, done):
    """Build the cache in another process; slowly if asked, to be caught in the middle."""
    tqdm.set_lock(threading.RLock())  # forks share one, which a killed process would keep
    tokenizer = AutoTokenizer.from_pretrained(str(quickstart / "tokenizer"))
    question_set = read_files([str(quickstart / "validation.json")], Rules())
    build = feature_cache.build_dataset

    def counted(*args):
        done.put("built")
        dataset = build(*args)
        time.sleep(slow)
        return dataset

    feature_cache.build_dataset = counted
    done.put(len(cached_features(question_set, tokenizer, WINDOWING, cache)))


def test_two_processes_at_once_build_it_once(quickstart, tmp_path):
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    arguments = (quickstart, tmp_path, 1.0, done)
    processes = [context.Process(target=build_in_process, args=arguments) for _ in range(2)]
    for process in processes:
        process.start()
    said = [done.get(timeout=120) for _ in range(3)]
    for process in processes:
        process.join(timeout=60)
    assert said.count("built") == 1
    assert len({s for s in said if s != "built"}) == 1


def test_a_killed_run_leaves_no_broken_cache(quickstart, question_set, tokenizer, tmp_path):
    context = multiprocessing.get_context("fork")
    done = context.Queue()
    process = context.Process(target=build_in_process, args=(quickstart, tmp_path, 600, done))
    process.start()
    assert done.get(timeout=120) == "built"
    partial = Path(tmp_path) / "features" / f"{cache_key(question_set, tokenizer, WINDOWING)}"
    partial.with_name(f"{partial.name}.partial").mkdir()  # as if killed while writing
    os.kill(process.pid, signal.SIGKILL)
    process.join(timeout=60)
    assert not partial.exists()
    features = cached_features(question_set, tokenizer, WINDOWING, tmp_path)
    assert len(features) > 0
    assert [p.suffix for p in partial.parent.iterdir() if p.is_dir()] == [""]
